#include "trainer/step_cost.h"

#include "kernels/model/parameters.h"

namespace coppice {
namespace {

// Of a row and layer.
struct RowCost {
  double qkv, mlp_inputs, down;  // FLOPs; mlp_inputs: o, gate and up
  double elementwise;            // bytes of both norms' outputs, and of q and k after theirs
  double norm_input;             // bytes that a norm reads, unless its backward computes it again

  RowCost(const ModelConfig& c, const ops::ActivationTypes& types) {
    const double h = static_cast<double>(c.hidden), q = static_cast<double>(c.q_dim());
    qkv = 2 * h * static_cast<double>(c.qkv_dim());
    mlp_inputs = 2 * q * h + 4 * h * static_cast<double>(c.ffn);
    down = 2 * h * static_cast<double>(c.ffn);
    const double f = static_cast<double>(SizeOf(types.compute));
    elementwise = 2 * h * f + 2 * f * (q + static_cast<double>(c.kv_dim()));
    norm_input = h * static_cast<double>(SizeOf(types.residual));
  }
  double parameters() const { return (qkv + mlp_inputs + down) / 2; }  // of a layer's matrices
};

}  // namespace

void StepCost::AddTree(const ModelConfig& config, const ops::ActivationTypes& types,
                       DType gradients, int64_t rows, double pairs, const Retention& retention) {
  const RowCost row(config, types);
  const double n = static_cast<double>(rows);
  for (int64_t l = 0; l < config.num_layers; ++l) {
    flops += 3 * n * (row.qkv + row.mlp_inputs + row.down);
    const Retain retain = retention.of(l);
    if (retain == Retain::kAll) continue;
    bytes += n * row.elementwise;
    if (retain < Retain::kProjections) {
      recomputed += n * row.mlp_inputs;
      bytes += n * row.norm_input;
    }
    if (retain < Retain::kLean) {
      recomputed += n * row.qkv;
      bytes += n * row.norm_input;
    }
    if (retain == Retain::kInputs) recomputed += 4 * pairs * static_cast<double>(config.q_dim());
  }
  // Weights are read by both products, gradients read and written.
  const double all = static_cast<double>(NumParameterElements(config));
  const double matrices = static_cast<double>(config.num_layers) * row.parameters();
  bytes +=
      2 * (all * static_cast<double>(SizeOf(types.compute)) + (all - matrices) * sizeof(float) +
           matrices * static_cast<double>(SizeOf(gradients)));
}

}  // namespace coppice
