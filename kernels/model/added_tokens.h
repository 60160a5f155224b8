// Added tokens: texts that are one token wherever they stand (<|im_end|>), found before everything
// else. Leftmost match first, the longest of those that start there, as Hugging Face tokenizers
// does. Immutable after the last Add; any thread.
#pragma once

#include <bitset>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"

namespace coppice {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool single_word = false;  // only between characters that are no word characters
  bool lstrip = false;       // swallows white space before it
  bool rstrip = false;       // swallows white space behind it
  bool normalized = false;   // looked for after normalisation, else before
  bool special = false;
};

class AddedTokenSplitter {
 public:
  // Looks for `content`, which stands for token.content after normalisation. Empty content is never
  // found.
  void Add(const AddedToken& token, absl::string_view content);

  using TextSink = std::function<void(absl::string_view text)>;
  using TokenSink = std::function<void(int32_t id)>;
  // Calls the sinks in the order of the text. O(n * longest token).
  void Split(absl::string_view text, const TextSink& on_text, const TokenSink& on_token) const;

 private:
  struct Found {
    int32_t token = -1;  // index into tokens_, -1 = none
    size_t size = 0;
  };

  Found LongestAt(absl::string_view text) const;
  static bool StandsAlone(absl::string_view text, size_t begin, size_t end);

  std::vector<AddedToken> tokens_;
  std::bitset<256> first_bytes_;
  absl::flat_hash_map<uint64_t, int32_t> edges_;   // node * 256 + byte -> node; node 0 is the root
  absl::flat_hash_map<int32_t, int32_t> accepts_;  // node -> index into tokens_
  int32_t num_nodes_ = 1;
};

}  // namespace coppice
