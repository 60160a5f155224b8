#include "tests/parity/golden.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/model/safetensors.h"

namespace coppice {
namespace {

// Sixteen signs of element i in the low bits (Wellons 2018, lowbias32).
uint32_t Signs(uint32_t i) {
  uint32_t x = i + 0x9E3779B9u;
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

}  // namespace

std::string GoldenPath(absl::string_view relative) {
  return absl::StrCat(COPPICE_SOURCE_DIR, "/tests/parity/golden/", relative);
}

std::string SmolLm2Path() {
  if (const char* path = std::getenv("COPPICE_SMOLLM2_GGUF")) return path;
  return absl::StrCat(COPPICE_SOURCE_DIR, "/build/models/SmolLM2-135M-Instruct.Q4_1.gguf");
}

GoldenArrays::GoldenArrays(const std::string& path) {
  auto source = OpenSafetensors(path);
  CHECK_OK(source.status());
  source_ = *std::move(source);
}

bool GoldenArrays::Has(absl::string_view name) const { return source_->Shape(name).ok(); }

std::vector<float> GoldenArrays::Floats(absl::string_view name) const {
  const auto shape = source_->Shape(name);
  CHECK_OK(shape.status());
  int64_t n = 1;
  for (const int64_t dim : *shape) n *= dim;
  std::vector<float> out(n);
  CHECK_OK(source_->ReadRows(name, 0, (*shape)[0], out.data()));
  return out;
}

std::vector<int32_t> GoldenArrays::Tokens(absl::string_view name) const {
  const std::vector<float> floats = Floats(name);
  return {floats.begin(), floats.end()};
}

std::vector<double> Digest(const float* x, int64_t n) {
  std::vector<double> out(1 + kDigestProjections + kDigestEntries);
  double square = 0, sums[kDigestProjections] = {};
  for (int64_t i = 0; i < n; ++i) {
    const double value = x[i];
    square += value * value;
    const uint32_t signs = Signs(static_cast<uint32_t>(i));
    for (int b = 0; b < kDigestProjections; ++b) sums[b] += (signs >> b & 1) ? -value : value;
  }
  out[0] = std::sqrt(square);
  std::copy(sums, sums + kDigestProjections, out.begin() + 1);
  for (int64_t e = 0; e < kDigestEntries; ++e) {
    out[1 + kDigestProjections + e] = x[e * 1000003 % n];
  }
  return out;
}

double RelativeError(const std::vector<float>& got, const std::vector<float>& want) {
  CHECK_EQ(got.size(), want.size());
  double difference = 0, norm = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double d = static_cast<double>(got[i]) - want[i];
    difference += d * d;
    norm += static_cast<double>(want[i]) * want[i];
  }
  return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}

double DigestRelativeError(const std::vector<double>& got, const std::vector<float>& want) {
  CHECK_EQ(got.size(), want.size());
  const double norm = want[0];
  double square = 0;
  for (int b = 1; b <= kDigestProjections; ++b) square += (got[b] - want[b]) * (got[b] - want[b]);
  double error = std::sqrt(square / kDigestProjections);
  for (size_t e = 1 + kDigestProjections; e < got.size(); ++e) {
    error =
        std::max(error, std::abs(got[e] - want[e]));  // an entry differs by no more than the array
  }
  error = std::max(error, std::abs(got[0] - norm));
  return norm == 0 ? error : error / norm;
}

}  // namespace coppice
