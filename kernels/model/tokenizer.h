// Byte-level BPE tokenizer with added tokens, equal to Hugging Face `tokenizers` on the models that
// we load. Immutable after creation; every method is thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace coppice {

class GgufFile;

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // Text of a tokenizer.json. UNIMPLEMENTED naming the part (model type, pre-tokenizer, normalizer)
  // that we do not have.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromJson(absl::string_view json);
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromGguf(const GgufFile& file);

  // Token ids of `text`; invalid UTF-8 is replaced by U+FFFD as HF does. Added tokens in the text
  // become their ids. add_special: what the model's post-processor adds (e.g. a bos token).
  virtual std::vector<int32_t> Encode(absl::string_view text, bool add_special) const = 0;
  // Bytes of the tokens, joined; may end inside a UTF-8 character. Unknown ids give nothing.
  virtual std::string DecodeBytes(const std::vector<int32_t>& ids, bool skip_special) const = 0;
  // As DecodeBytes, with invalid UTF-8 replaced by U+FFFD.
  std::string Decode(const std::vector<int32_t>& ids, bool skip_special) const;

  virtual int32_t vocab_size() const = 0;  // added tokens included
  virtual bool IsSpecial(int32_t id) const = 0;
  virtual int32_t bos_token() const = 0;  // -1 = none
  virtual int32_t eos_token() const = 0;  // -1 = none
};

// Text of a growing token sequence: holds back bytes that do not yet form a whole UTF-8 character.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer* tokenizer) : tokenizer_(tokenizer) {}
  // Appends a token; returns the text that became certain.
  std::string Push(int32_t id);
  // The rest, invalid bytes replaced.
  std::string Finish();

 private:
  const Tokenizer* tokenizer_;
  std::string pending_;
};

}  // namespace coppice
