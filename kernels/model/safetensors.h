// Reader of safetensors (https://github.com/huggingface/safetensors#format): [header bytes
// u64][JSON header][data]. The header is untrusted: its length, every dtype, shape and byte range
// are checked against the file, ranges may not overlap, and names may not repeat.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/model/tensor_source.h"

namespace coppice {

// `path`: one .safetensors file.
absl::StatusOr<std::unique_ptr<TensorSource>> OpenSafetensors(const std::string& path);

// A directory with model.safetensors, or with model.safetensors.index.json and its shards.
// NOT_FOUND if it has neither.
absl::StatusOr<std::unique_ptr<TensorSource>> OpenSafetensorsDirectory(const std::string& path);

}  // namespace coppice
