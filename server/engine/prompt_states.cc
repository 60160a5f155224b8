#include "server/engine/prompt_states.h"

#include <utility>

#include "kernels/base/log.h"

namespace coppice {

std::weak_ptr<KeptPrompt> PromptStates::Add(const std::vector<int32_t>& tokens,
                                            PolicyVersion version) {
  const int64_t rows = static_cast<int64_t>(tokens.size());
  const int64_t bytes =
      PromptState::SizeBytes(decoder_.config(), decoder_.ops().Info().activation_types(), rows);
  if (bytes > budget_bytes_) return {};
  while (size_bytes_ + bytes > budget_bytes_) DropOldest();
  auto prompt = std::make_shared<KeptPrompt>();
  prompt->tokens = tokens;
  prompt->version = version;
  const absl::Status room = prompt->state.Allocate(decoder_.config(), decoder_.ops(), rows);
  if (!room.ok()) {
    LOG(WARNING) << "prompt_state_not_kept status=\"" << room << '"';
    return {};
  }
  size_bytes_ += prompt->state.size_bytes();
  kept_.push_back(std::move(prompt));
  return kept_.back();
}

void PromptStates::DropIncomplete(const absl::flat_hash_set<const KeptPrompt*>& filling) {
  std::erase_if(kept_, [&](const std::shared_ptr<KeptPrompt>& prompt) {
    const bool drop = !prompt->complete() && !filling.contains(prompt.get());
    if (drop) size_bytes_ -= prompt->state.size_bytes();
    return drop;
  });
}

void PromptStates::Clear() {
  kept_.clear();
  size_bytes_ = 0;
}

void PromptStates::DropOldest() {
  size_bytes_ -= kept_.front()->state.size_bytes();
  kept_.pop_front();
}

}  // namespace coppice
