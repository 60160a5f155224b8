#include "trainer/optimizer.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

constexpr int64_t kDecayGroup =
    64;  // elements per entry of the decay mask; tensors start at multiples
constexpr double kClipEpsilon = 1e-6;  // as torch.nn.utils.clip_grad_norm_

// 1 for every group of elements that belongs to a matrix.
std::vector<uint8_t> DecayMask(const ModelConfig& config, const Parameters& params) {
  std::vector<uint8_t> mask(params.flat.num_elements() / kDecayGroup);
  for (const NamedTensor& tensor : HfTensors(config, params)) {
    if (!tensor.decay) continue;
    const int64_t offset_bytes = tensor.view.as<char>() - params.flat.as<char>();
    const int64_t begin = offset_bytes / SizeOf(params.flat.dtype);
    const int64_t end = begin + tensor.view.num_elements();
    std::fill(mask.begin() + begin / kDecayGroup,
              mask.begin() + (end + kDecayGroup - 1) / kDecayGroup, 1);
  }
  return mask;
}

float ClipFactor(double norm, float max_norm) {
  if (max_norm == 0) return 1;
  return static_cast<float>(std::min(1.0, max_norm / (norm + kClipEpsilon)));
}

}  // namespace

absl::StatusOr<Optimizer> Optimizer::Create(const ModelConfig& config, const Parameters& params,
                                            ops::Ops& ops) {
  const int64_t elements = params.flat.num_elements();
  const int64_t bytes = elements * SizeOf(DType::kF32);
  Optimizer optimizer;
  ASSIGN_OR_RETURN(optimizer.m_buffer_, ops.Allocate(bytes, "optimizer first moment"));
  ASSIGN_OR_RETURN(optimizer.v_buffer_, ops.Allocate(bytes, "optimizer second moment"));
  optimizer.m_ = View1D(optimizer.m_buffer_.data(), DType::kF32, elements);
  optimizer.v_ = View1D(optimizer.v_buffer_.data(), DType::kF32, elements);

  if (params.flat.dtype != DType::kF32) {
    ASSIGN_OR_RETURN(optimizer.remainder_buffer_,
                     ops.Allocate(elements * SizeOf(DType::kBF16), "optimizer master remainder"));
    optimizer.remainder_ = View1D(optimizer.remainder_buffer_.data(), DType::kBF16, elements);
  }

  const std::vector<uint8_t> mask = DecayMask(config, params);
  const int64_t mask_size = static_cast<int64_t>(mask.size());
  ASSIGN_OR_RETURN(optimizer.decay_buffer_, ops.Allocate(mask_size, "weight decay mask"));
  optimizer.decay_mask_ = View1D(optimizer.decay_buffer_.data(), DType::kU8, mask_size);
  RETURN_IF_ERROR(ops.Upload(mask.data(), optimizer.decay_mask_));
  return optimizer;
}

absl::StatusOr<Optimizer::Outcome> Optimizer::Step(const AdamConfig& config,
                                                   const Parameters& params,
                                                   const GradientArena& grads, double scale,
                                                   ops::Ops& ops) {
  ASSIGN_OR_RETURN(const double sum_squares, grads.SumSquares(ops));
  const double norm = std::sqrt(sum_squares) / scale;
  if (!std::isfinite(norm)) return Outcome{.grad_norm = norm, .updated = false};
  const float factor = ClipFactor(norm, config.grad_clip_norm) / static_cast<float>(scale);
  for (const GradientArena::Slice& slice : grads.slices()) {
    const int64_t begin = slice.begin, end = begin + slice.values.dim(0);
    RETURN_IF_ERROR(ops.AdamW(
        {.param = params.flat.Rows(begin, end),
         .master_remainder = remainder_.present() ? remainder_.Rows(begin, end) : TensorView{},
         .grad = slice.values,
         .m = m_.Rows(begin, end),
         .v = v_.Rows(begin, end),
         .decay_mask = decay_mask_.Rows(begin / kDecayGroup, end / kDecayGroup),
         .step = num_steps_ + 1,
         .learning_rate = config.learning_rate,
         .beta1 = config.beta1,
         .beta2 = config.beta2,
         .eps = config.eps,
         .weight_decay = config.weight_decay,
         .grad_scale = factor}));
  }
  ++num_steps_;
  return Outcome{.grad_norm = norm, .updated = true};
}

}  // namespace coppice
