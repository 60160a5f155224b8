// Reads the golden files of tests/parity/golden. A missing or broken file fails the test with its
// path.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "kernels/model/tensor_source.h"

namespace coppice {

// tests/parity/golden/<relative>
std::string GoldenPath(absl::string_view relative);
// $COPPICE_SMOLLM2_GGUF, or where deploy/fetch_model.sh puts the model.
std::string SmolLm2Path();

// Named f32 arrays of one golden .safetensors file.
class GoldenArrays {
 public:
  explicit GoldenArrays(const std::string& path);

  bool Has(absl::string_view name) const;
  std::vector<std::string> Names() const { return source_->Names(); }
  std::vector<float> Floats(absl::string_view name) const;    // all elements, row-major
  std::vector<int32_t> Tokens(absl::string_view name) const;  // token ids, stored as f32

 private:
  std::unique_ptr<TensorSource> source_;
};

// Norm, 16 projections on random signs and 64 entries of an array: golden_models.py's digest().
inline constexpr int kDigestProjections = 16;
inline constexpr int kDigestEntries = 64;
std::vector<double> Digest(const float* x, int64_t n);

// |got - want| / |want| in the Euclidean norm. The projections of two digests estimate it for the
// arrays themselves: the mean square of (r.a - r.b) over random signs r is |a - b|^2.
double RelativeError(const std::vector<float>& got, const std::vector<float>& want);
double DigestRelativeError(const std::vector<double>& got, const std::vector<float>& want);

}  // namespace coppice
