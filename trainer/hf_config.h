// config.json of a model as Hugging Face transformers reads it; ParseHfConfig's inverse.
// `compute_dtype`: of the policy, kept for whoever opens it (kComputeTypeField) if it has 16 bits.
#pragma once

#include <string>

#include "kernels/base/dtype.h"
#include "kernels/model/model_config.h"

namespace coppice {

std::string HfConfigJson(const ModelConfig& config, DType compute_dtype);

}  // namespace coppice
