// Rotary position table (Su et al. 2021) with the frequency scalings of transformers'
// modeling_rope_utils.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/model/model_config.h"

namespace coppice {

// Frequencies w_i = theta^(-2i / head_dim), scaled; in f32 steps as transformers computes them.
std::vector<float> RopeFrequencies(const RopeConfig& rope, int64_t head_dim);  // [head_dim / 2]

// Row p = [cos(p w_i), i < head_dim / 2 | sin(p w_i)]: what ops::QkNormRope reads.
std::vector<float> RopeTable(const RopeConfig& rope, int64_t head_dim,
                             int64_t max_positions);  // [max_positions, head_dim]

}  // namespace coppice
