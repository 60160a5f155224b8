// TensorSource: named tensors in files, whatever the format. Two implementations: a safetensors
// file or sharded directory (safetensors.h) and GGUF (gguf.h). Files are memory-mapped; every
// offset and size is checked against the file before use, so a truncated or corrupt file gives
// DATA_LOSS with file, tensor, want and got, never a fault.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/model/stored_tensor.h"

namespace coppice {

class TensorSource {
 public:
  virtual ~TensorSource() = default;
  // Hugging Face names (GGUF names are translated), in file order.
  virtual std::vector<std::string> Names() const = 0;
  // Row-major, outermost first. NOT_FOUND if there is no such tensor.
  virtual absl::StatusOr<std::vector<int64_t>> Shape(absl::string_view name) const = 0;
  // NOT_FOUND if there is no such tensor.
  virtual absl::StatusOr<StoredType> Type(absl::string_view name) const = 0;
  // Dequantises / widens rows [row_begin, row_end) (of a matrix; elements of a vector) to f32.
  // Thread-safe.
  virtual absl::Status ReadRows(absl::string_view name, int64_t row_begin, int64_t row_end,
                                float* out) const = 0;
};

}  // namespace coppice
