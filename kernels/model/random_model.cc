// RandomModel: weights that are a pure function of (seed, tensor, element), whatever the number of
// threads.
#include <cmath>
#include <numbers>

#include "absl/strings/match.h"
#include "kernels/base/rng.h"
#include "kernels/base/status_macros.h"
#include "kernels/model/arena_fill.h"
#include "kernels/model/model_loader.h"

namespace coppice {
namespace {

constexpr float kStddev = 0.02f;

// Box & Muller 1958: two uniforms give two normals.
void NormalPair(uint32_t a, uint32_t b, float* out) {
  const float radius = kStddev * std::sqrt(-2.0f * std::log(UniformFloat(a)));
  const float angle = 2.0f * std::numbers::pi_v<float> * UniformFloat(b);
  out[0] = radius * std::cos(angle);
  out[1] = radius * std::sin(angle);
}

void FillNormal(uint64_t seed, uint32_t tensor, int64_t begin, int64_t end, float* out) {
  float quad[4];
  for (int64_t e = begin; e < end; ++e) {
    if (e == begin || e % 4 == 0) {
      const uint64_t counter = static_cast<uint64_t>(e) / 4;
      const Philox4 r = Philox(seed, static_cast<uint32_t>(counter),
                               static_cast<uint32_t>(counter >> 32), tensor, 0);
      NormalPair(r.v[0], r.v[1], quad);
      NormalPair(r.v[2], r.v[3], quad + 2);
    }
    out[e - begin] = quad[e % 4];
  }
}

}  // namespace

absl::StatusOr<Model> RandomModel(const ModelConfig& config, uint64_t seed, ops::Ops& ops) {
  RETURN_IF_ERROR(config.Validate());
  const DType dtype = ops.Info().compute_dtype;
  Model model;
  model.config = config;
  ASSIGN_OR_RETURN(model.arena,
                   ops.Allocate(NumParameterElements(config) * SizeOf(dtype), "weights"));
  model.params = MapParameters(config, model.arena.data(), dtype);
  const std::vector<NamedTensor> tensors = HfTensors(config, model.params);
  const auto source = [&](size_t index, int64_t row_begin, int64_t row_end, float* out) {
    const NamedTensor& tensor = tensors[index];
    const int64_t row = tensor.view.stride[0];
    if (absl::EndsWith(tensor.name, "norm.weight")) {
      std::fill(out, out + (row_end - row_begin) * row, 1.0f);
    } else {
      FillNormal(seed, static_cast<uint32_t>(index), row_begin * row, row_end * row, out);
    }
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(FillTensors(tensors, source, ops));
  return model;
}

}  // namespace coppice
