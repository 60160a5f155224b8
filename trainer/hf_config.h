// config.json of a model as Hugging Face transformers reads it; ParseHfConfig's inverse.
#pragma once

#include <string>

#include "kernels/model/model_config.h"

namespace coppice {

std::string HfConfigJson(const ModelConfig& config);

}  // namespace coppice
