// Advantages of samples from the rewards of their group. Pure host arithmetic in double.
#pragma once

#include <vector>

#include "absl/types/span.h"
#include "trainer/train_types.h"

namespace coppice {

// One advantage per reward; zero in a group of one.
//   kGroupNormalized  (r - mean) / (std + 1e-6), std unbiased   (GRPO, Shao et al. 2024)
//   kGroupCentered    r - mean                                  (Dr. GRPO, Liu et al. 2025)
//   kLeaveOneOut      r - mean of the others                    (RLOO, Ahmadian et al. 2024)
// REQUIRES: kind is not kGiven.
std::vector<double> GroupAdvantages(LossConfig::Advantage kind, absl::Span<const double> rewards);

// Per sample of the group: one entry for the whole sample, or one per token. Given advantages are
// taken as they are; a sample without advantages and reward (cross entropy) gets 1. REQUIRES: a
// validated group.
std::vector<std::vector<double>> SampleAdvantages(const LossConfig& config,
                                                  const TrainGroup& group);

}  // namespace coppice
