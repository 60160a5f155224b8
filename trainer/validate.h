// Checks of what a controller sends, before anything changes. Messages name group, sample and
// field.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "kernels/model/model_config.h"
#include "trainer/train_types.h"

namespace coppice {

// Prompts and responses only: tokens in the vocabulary, neither empty, within the context.
// INVALID_ARGUMENT.
absl::Status ValidateTokens(const ModelConfig& config, const std::vector<TrainGroup>& groups);

// Tokens, loss settings and every per-sample field that the settings need. INVALID_ARGUMENT.
absl::Status ValidateRequest(const ModelConfig& config, const ForwardBackwardRequest& request);

absl::Status ValidateTemperature(float temperature);
absl::Status ValidateAdam(const AdamConfig& config);

}  // namespace coppice
