#include "kernels/model/decoder.h"

#include <vector>

#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "kernels/model/arena.h"
#include "kernels/model/rope.h"

namespace coppice {
namespace {

// Inference activations: `body` serves every layer in turn, `tail` the second half of the last
// layer on the head rows.
struct Workspace {
  LayerActivations body;
  LayerActivations tail;
  TensorView hidden;  // [head_rows, hidden] f
  int64_t size_bytes = 0;
};

void LayOutMlpHalf(const ModelConfig& config, DType dtype, int64_t rows, Arena& arena,
                   LayerActivations& acts) {
  acts.mid = acts.output = acts.input;
  acts.gate_up = arena.Matrix(dtype, rows, 2 * config.ffn);
  acts.mlp_act = arena.Matrix(dtype, rows, config.ffn);
}

Workspace LayOut(const ModelConfig& config, const ops::ActivationTypes& types, int64_t rows,
                 int64_t head_rows, void* base) {
  const DType dtype = types.compute;
  Arena arena(base);
  Workspace w;
  LayerActivations& body = w.body;
  body.input = arena.Matrix(types.residual, rows, config.hidden);
  body.attn_in = body.mlp_in = arena.Matrix(dtype, rows, config.hidden);
  body.qkv = arena.Matrix(dtype, rows, config.qkv_dim());
  const QkvHeads heads = SplitQkv(config, body.qkv);
  body.q = heads.q;
  body.k = heads.k;
  body.v = heads.v;
  body.attn_out = arena.Matrix(dtype, rows, config.q_dim());
  body.lse = arena.Matrix(DType::kF32, rows, config.q_heads);
  LayOutMlpHalf(config, dtype, rows, arena, body);

  LayerActivations& tail = w.tail;
  tail.input = arena.Matrix(types.residual, head_rows, config.hidden);
  tail.mlp_in = w.hidden = arena.Matrix(dtype, head_rows, config.hidden);
  tail.attn_out = arena.Matrix(dtype, head_rows, config.q_dim());
  LayOutMlpHalf(config, dtype, head_rows, arena, tail);
  w.size_bytes = arena.size_bytes();
  return w;
}

}  // namespace

QkvHeads SplitQkv(const ModelConfig& config, TensorView qkv) {
  const int64_t q_end = config.q_dim(), k_end = q_end + config.kv_dim();
  return {.q = qkv.Cols(0, q_end).SplitHeads(config.q_heads, config.head_dim),
          .k = qkv.Cols(q_end, k_end).SplitHeads(config.kv_heads, config.head_dim),
          .v = qkv.Cols(k_end, config.qkv_dim()).SplitHeads(config.kv_heads, config.head_dim)};
}

absl::StatusOr<std::unique_ptr<Decoder>> Decoder::Create(const ModelConfig& config, ops::Ops& ops) {
  RETURN_IF_ERROR(config.Validate());
  std::unique_ptr<Decoder> decoder(new Decoder(config, ops));
  const std::vector<float> table = RopeTable(config.rope, config.head_dim, config.max_positions);
  ASSIGN_OR_RETURN(decoder->rope_buffer_, ops.Allocate(table.size() * sizeof(float), "rope table"));
  decoder->rope_ =
      View2D(decoder->rope_buffer_.data(), DType::kF32, config.max_positions, config.head_dim);
  RETURN_IF_ERROR(ops.Upload(table.data(), decoder->rope_));
  return decoder;
}

int64_t Decoder::WorkspaceBytes(int64_t max_rows, int64_t max_head_rows) const {
  return LayOut(config_, ops_->Info().activation_types(), max_rows, max_head_rows, nullptr)
      .size_bytes;
}

ops::NormMatMulParams Decoder::Projections(const LayerParameters& params,
                                           const LayerActivations& acts) const {
  return {.norm = {.x = acts.input,
                   .weight = params.attn_norm,
                   .eps = config_.rms_eps,
                   .out = acts.attn_in,
                   .rstd = acts.attn_rstd},
          .b = params.qkv,
          .bias = params.qkv_bias,
          .c = acts.qkv};
}

absl::Status Decoder::QkvForward(const LayerParameters& params, const ops::BatchPlan& plan,
                                 const ops::PagedKv& kv, const LayerActivations& acts) const {
  RETURN_IF_ERROR(ops_->NormMatMul(Projections(params, acts)));
  return RotateForward(params, plan, kv, acts);
}

ops::QkNormRopeParams Decoder::Rotation(const LayerParameters& params, const ops::BatchPlan& plan,
                                        const ops::PagedKv& kv,
                                        const LayerActivations& acts) const {
  const QkvHeads heads = SplitQkv(config_, acts.qkv);
  return {.plan = &plan,
          .q_in = heads.q,
          .k_in = heads.k,
          .v = heads.v,
          .q_norm = params.q_norm,
          .k_norm = params.k_norm,
          .eps = config_.rms_eps,
          .rope = rope_,
          .q_out = acts.q,
          .k_out = acts.k,
          .pages = kv};
}

absl::Status Decoder::RotateForward(const LayerParameters& params, const ops::BatchPlan& plan,
                                    const ops::PagedKv& kv, const LayerActivations& acts) const {
  return ops_->QkNormRope(Rotation(params, plan, kv, acts));
}

absl::Status Decoder::AttentionForward(const LayerParameters& params, const ops::BatchPlan& plan,
                                       const ops::PagedKv& kv, const LayerActivations& acts) const {
  RETURN_IF_ERROR(QkvForward(params, plan, kv, acts));
  return Attend(plan, kv, acts);
}

absl::Status Decoder::Attend(const ops::BatchPlan& plan, const ops::PagedKv& kv,
                             const LayerActivations& acts) const {
  return ops_->TreeAttention({.plan = &plan,
                              .q = acts.q,
                              .k = acts.k,
                              .v = acts.v,
                              .context = kv,
                              .scale = config_.attention_scale(),
                              .out = acts.attn_out.SplitHeads(config_.q_heads, config_.head_dim),
                              .lse = acts.lse});
}

absl::Status Decoder::MidForward(const LayerParameters& params,
                                 const LayerActivations& acts) const {
  return ops_->MatMul({.a = acts.attn_out,
                       .b = params.o,
                       .trans_b = true,
                       .addend = acts.input,
                       .c = acts.mid,
                       .b_is_parameter = true});
}

ops::RmsNormParams Decoder::MlpNorm(const LayerParameters& params,
                                    const LayerActivations& acts) const {
  return {.x = acts.mid,
          .weight = params.mlp_norm,
          .eps = config_.rms_eps,
          .out = acts.mlp_in,
          .rstd = acts.mlp_rstd};
}

absl::Status Decoder::GateUpForward(const LayerParameters& params,
                                    const LayerActivations& acts) const {
  RETURN_IF_ERROR(MidForward(params, acts));
  return ops_->NormSwiGlu(
      {.norm = MlpNorm(params, acts), .b = params.gate_up, .gate_up = acts.gate_up});
}

ops::MlpBlockParams Decoder::Block(const LayerParameters& params,
                                   const LayerActivations& acts) const {
  return {.attn_out = acts.attn_out,
          .o = params.o,
          .input = acts.input,
          .mlp = {.norm = MlpNorm(params, acts),
                  .b = params.gate_up,
                  .gate_up = acts.gate_up,
                  .out = acts.mlp_act,
                  .keep_gate_up = acts.keeps_gate_up},
          .down = params.down,
          .output = acts.output};
}

absl::Status Decoder::MlpForward(const LayerParameters& params,
                                 const LayerActivations& acts) const {
  return ops_->MlpBlock(Block(params, acts));
}

absl::StatusOr<TensorView> Decoder::Forward(const Parameters& params, const ops::BatchPlan& plan,
                                            const KvPool* kv, DeviceBuffer& workspace,
                                            LayerObserver* observer) const {
  const int64_t rows = plan.batch().num_rows();
  const int64_t head_rows = static_cast<int64_t>(plan.batch().logit_rows.size());
  Workspace w = LayOut(config_, ops_->Info().activation_types(), rows, head_rows, workspace.data());
  CHECK_LE(w.size_bytes, workspace.size_bytes()) << "decoder workspace";
  if (observer == nullptr) w.body.lse = {};

  RETURN_IF_ERROR(
      ops_->Embedding({.ids = plan.tokens(), .table = params.embedding, .out = w.body.input}));
  const auto pages = [&](int64_t l) { return kv == nullptr ? ops::PagedKv{} : kv->layer(l); };
  RETURN_IF_ERROR(QkvForward(params.layers[0], plan, pages(0), w.body));
  const int64_t last = config_.num_layers - 1;
  for (int64_t l = 0; l <= last; ++l) {
    // A prefill chunk that nobody reads leaves only keys and values.
    if (l == last && observer == nullptr && head_rows == 0) return w.hidden;
    RETURN_IF_ERROR(Attend(plan, pages(l), w.body));
    if (observer != nullptr) RETURN_IF_ERROR(observer->OnAttention(l, w.body));
    if (l == last) break;
    ops::MlpBlockParams block = Block(params.layers[l], w.body);
    block.next = Projections(params.layers[l + 1], w.body);
    block.rotate = Rotation(params.layers[l + 1], plan, pages(l + 1), w.body);
    RETURN_IF_ERROR(ops_->MlpBlock(block));
  }
  if (head_rows == 0) return w.hidden;
  RETURN_IF_ERROR(
      ops_->GatherRows({.src = w.body.input, .indices = plan.logit_rows(), .out = w.tail.input}));
  RETURN_IF_ERROR(ops_->GatherRows(
      {.src = w.body.attn_out, .indices = plan.logit_rows(), .out = w.tail.attn_out}));
  RETURN_IF_ERROR(MlpForward(params.layers[last], w.tail));
  RETURN_IF_ERROR(ops_->RmsNorm(
      {.x = w.tail.output, .weight = params.final_norm, .eps = config_.rms_eps, .out = w.hidden}));
  return w.hidden;
}

absl::Status Decoder::Logits(const Parameters& params, TensorView hidden, TensorView logits) const {
  return ops_->MatMul(
      {.a = hidden, .b = params.head, .trans_b = true, .c = logits, .b_is_parameter = true});
}

}  // namespace coppice
