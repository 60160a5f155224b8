// Pre-tokenizer: cuts a text into the pieces that BPE may not merge across. A list of stages, each
// cutting the pieces of the one before. Patterns run in PCRE2 with Unicode properties,
// JIT-compiled. Immutable after creation; any thread.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

struct pcre2_real_code_8;

namespace coppice {

// The patterns that models refer to by name. Sources: tokenizers' byte_level.rs and the models'
// tokenizer.json.
extern const char kGpt2Pattern[];
extern const char kLlama3Pattern[];
extern const char kQwen2Pattern[];
extern const char kOneDigitPattern[];
extern const char kDigitsPattern[];

// A compiled pattern that cuts text at its matches.
class Splitter {
 public:
  enum class Behavior { kIsolated, kRemoved };  // matches become pieces of their own, or vanish

  // `invert`: what lies between matches counts as the match. INVALID_ARGUMENT with the pattern's
  // error.
  static absl::StatusOr<Splitter> Create(absl::string_view pattern, Behavior behavior, bool invert);

  using Sink = std::function<void(absl::string_view piece)>;
  // Calls `sink` with the non-empty pieces in order. A pattern that hits PCRE2's match limit leaves
  // the rest in one piece. REQUIRES: valid UTF-8.
  void Split(absl::string_view text, const Sink& sink) const;

 private:
  struct FreeCode {
    void operator()(pcre2_real_code_8* code) const;
  };

  std::unique_ptr<pcre2_real_code_8, FreeCode> code_;
  Behavior behavior_ = Behavior::kIsolated;
  bool invert_ = false;
};

class PreTokenizer {
 public:
  // A space is put before every piece of the stage that does not begin with one.
  void AddPrefixSpace() { stages_.push_back({std::nullopt}); }
  void AddSplit(Splitter splitter) { stages_.push_back({std::move(splitter)}); }

  void Run(absl::string_view text, const Splitter::Sink& sink) const { RunFrom(0, text, sink); }

 private:
  struct Stage {
    std::optional<Splitter> splitter;  // absent = prefix space
  };

  void RunFrom(size_t stage, absl::string_view text, const Splitter::Sink& sink) const;

  std::vector<Stage> stages_;
};

}  // namespace coppice
