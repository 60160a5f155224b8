// StepCost: what a plan of passes costs, predicted from shapes alone, to compare one plan of a
// request with another. Left out is what all plans of a request have in common: attention, the
// head, elementwise work of the first time.
//
// All in FLOPs of products: a byte of memory traffic counts as what a product does in its time,
// kFlopsPerByte, from 700 TFLOP/s and 4.1 TB/s measured on an H200. A constant, so that a plan
// follows from request, model and memory; where products are slower beside memory (a CPU), more is
// recomputed than need be. Pure.
#pragma once

#include <cstdint>

#include "kernels/base/dtype.h"
#include "kernels/model/model_config.h"
#include "kernels/ops/ops.h"
#include "trainer/activations.h"

namespace coppice {

struct StepCost {
  static constexpr double kFlopsPerByte = 170;

  double flops = 0;       // products of forward and backward, once for each row that runs
  double recomputed = 0;  // products, and attention, that backward runs again
  double bytes = 0;       // elementwise work again; weights and their gradients for each tree

  // One more tree that runs forward and backward. `pairs`: of rows that see each other;
  // `gradients`: of the matrices of layers.
  void AddTree(const ModelConfig& config, const ops::ActivationTypes& types, DType gradients,
               int64_t rows, double pairs, const Retention& retention);
  StepCost& operator+=(const StepCost& other) {
    flops += other.flops;
    recomputed += other.recomputed;
    bytes += other.bytes;
    return *this;
  }
  double Total() const { return flops + recomputed + kFlopsPerByte * bytes; }
};

}  // namespace coppice
