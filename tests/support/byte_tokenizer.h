// ByteTokenizer: one token per byte, plus a bos token that Encode puts in front. Enough to test
// text in and out without a model.
#pragma once

#include <string>
#include <vector>

#include "kernels/model/tokenizer.h"

namespace coppice {

class ByteTokenizer final : public Tokenizer {
 public:
  static constexpr int32_t kBos = 256;

  std::vector<int32_t> Encode(absl::string_view text, bool add_special) const override {
    std::vector<int32_t> ids;
    if (add_special) ids.push_back(kBos);
    for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
    return ids;
  }
  std::string DecodeBytes(const std::vector<int32_t>& ids, bool skip_special) const override {
    std::string text;
    for (const int32_t id : ids) {
      if (id < 256) text += static_cast<char>(id);
      if (id == kBos && !skip_special) text += "<s>";
    }
    return text;
  }
  int32_t vocab_size() const override { return 257; }
  bool IsSpecial(int32_t id) const override { return id == kBos; }
  int32_t bos_token() const override { return kBos; }
  int32_t eos_token() const override { return -1; }
};

}  // namespace coppice
