// Writes tensors as one safetensors file (https://github.com/huggingface/safetensors#format),
// readable by transformers.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "kernels/base/tensor_view.h"
#include "kernels/ops/ops.h"
#include "trainer/atomic_directory.h"

namespace coppice {

// A contiguous tensor of rank 1 or 2 on the device.
struct TensorToWrite {
  std::string name;
  TensorView view;
  TensorView remainder = {};  // optional 16-bit, same shape: f32 masters are written
};

// In the order given; one tensor at a time passes through host memory. REQUIRES: dtypes f32, f16 or
// bf16.
absl::Status WriteSafetensors(const std::vector<TensorToWrite>& tensors, ops::Ops& ops,
                              DurableFile& file);

}  // namespace coppice
