// PromptStates: what retained requests leave of their prompts for the next update, so that it need
// not run them forward again (trainer/prompt_state.h). At most `budget_bytes` of device memory; the
// oldest goes first; a new policy drops all. Others hold weak pointers. Owner and thread:
// Generator, on the engine thread.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "kernels/base/ids.h"
#include "kernels/model/decoder.h"
#include "trainer/prompt_state.h"

namespace coppice {

class PromptStates {
 public:
  // Borrows the decoder. 0 bytes: nothing is kept.
  PromptStates(int64_t budget_bytes, const Decoder& decoder)
      : budget_bytes_(budget_bytes), decoder_(decoder) {}

  bool enabled() const { return budget_bytes_ > 0; }
  // Room for a prompt that is about to run. Empty if it is larger than the budget or the device has
  // no memory for it.
  std::weak_ptr<KeptPrompt> Add(const std::vector<int32_t>& tokens, PolicyVersion version);
  // Drops what is neither complete nor in `filling`.
  void DropIncomplete(const absl::flat_hash_set<const KeptPrompt*>& filling);
  void Clear();
  int64_t size_bytes() const { return size_bytes_; }

 private:
  void DropOldest();

  const int64_t budget_bytes_;
  const Decoder& decoder_;
  std::deque<std::shared_ptr<KeptPrompt>> kept_;  // oldest first
  int64_t size_bytes_ = 0;
};

}  // namespace coppice
