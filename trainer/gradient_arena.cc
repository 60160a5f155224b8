#include "trainer/gradient_arena.h"

#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

// Elements that a tensor takes in the flat arena.
int64_t Padded(const TensorView& t) {
  constexpr int64_t kAlign = 64;
  return (t.num_elements() + kAlign - 1) / kAlign * kAlign;
}

// Calls f(tensor, whether it is a layer's matrix) in the order of the arena; a tied head is left
// out.
template <typename F>
void ForEachTensor(const ModelConfig& config, Parameters& p, const F& f) {
  f(p.embedding, false);
  for (LayerParameters& l : p.layers) {
    for (TensorView* t : {&l.attn_norm, &l.qkv, &l.qkv_bias, &l.q_norm, &l.k_norm, &l.o,
                          &l.mlp_norm, &l.gate_up, &l.down}) {
      if (t->present()) f(*t, t->rank == 2);
    }
  }
  f(p.final_norm, false);
  if (!config.tied_head) f(p.head, false);
}

}  // namespace

int64_t GradientArena::SizeBytes(const ModelConfig& config, DType matrices) {
  if (matrices == DType::kF32) return NumParameterElements(config) * SizeOf(DType::kF32);
  const Elements elements = GradientArena().LayOut(config, matrices);
  return elements.f32 * SizeOf(DType::kF32) + elements.matrices * SizeOf(matrices);
}

GradientArena::Elements GradientArena::LayOut(const ModelConfig& config, DType matrices) {
  parameters_ = MapParameters(config, nullptr, DType::kF32);
  parameters_.flat = {};
  slices_.clear();
  Elements used;
  int64_t begin = 0;
  bool last_is_matrix = false;
  ForEachTensor(config, parameters_, [&](TensorView& t, bool is_matrix) {
    const int64_t n = Padded(t);
    int64_t& at = is_matrix ? used.matrices : used.f32;
    const DeviceBuffer& buffer = is_matrix ? matrices_buffer_ : buffer_;
    t.dtype = is_matrix ? matrices : DType::kF32;
    if (buffer.data() != nullptr) {
      t.data = static_cast<char*>(buffer.data()) + at * SizeOf(t.dtype);
    }
    if (slices_.empty() || is_matrix != last_is_matrix) {
      slices_.push_back({begin, View1D(t.data, t.dtype, 0)});
    }
    slices_.back().values.shape[0] += n;
    last_is_matrix = is_matrix;
    begin += n;
    at += n;
  });
  if (config.tied_head) parameters_.head = parameters_.embedding;
  return used;
}

absl::StatusOr<GradientArena> GradientArena::Create(const ModelConfig& config, DType matrices,
                                                    ops::Ops& ops) {
  GradientArena arena;
  if (matrices == DType::kF32) {
    ASSIGN_OR_RETURN(arena.buffer_, ops.Allocate(SizeBytes(config, matrices), "gradients"));
    arena.parameters_ = MapParameters(config, arena.buffer_.data(), DType::kF32);
    arena.flats_ = {arena.parameters_.flat};
    arena.slices_ = {{0, arena.parameters_.flat}};
    return arena;
  }
  const Elements elements = arena.LayOut(config, matrices);
  ASSIGN_OR_RETURN(arena.buffer_, ops.Allocate(elements.f32 * SizeOf(DType::kF32), "gradients"));
  ASSIGN_OR_RETURN(arena.matrices_buffer_,
                   ops.Allocate(elements.matrices * SizeOf(matrices), "gradients of matrices"));
  arena.LayOut(config, matrices);
  arena.flats_ = {View1D(arena.buffer_.data(), DType::kF32, elements.f32),
                  View1D(arena.matrices_buffer_.data(), matrices, elements.matrices)};
  return arena;
}

absl::Status GradientArena::Zero(ops::Ops& ops) const {
  for (const TensorView& flat : flats_) RETURN_IF_ERROR(ops.Zero(flat));
  return absl::OkStatus();
}

absl::StatusOr<double> GradientArena::SumSquares(ops::Ops& ops) const {
  double sum = 0;
  for (const TensorView& flat : flats_) {
    ASSIGN_OR_RETURN(const double squares, ops.SumSquares(flat));
    sum += squares;
  }
  return sum;
}

}  // namespace coppice
