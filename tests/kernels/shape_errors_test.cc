// A wrong shape, type or stride is INVALID_ARGUMENT that names op, tensor, want and got, and
// nothing is written.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

#include "kernels/ops/ops.h"
#include "tests/support/guarded_tensor.h"

namespace coppice {
namespace {

using testing::HasSubstr;

class ShapeErrorsTest : public testing::Test {
 protected:
  ShapeErrorsTest() : ops_(std::move(ops::CreateOps("cpu", 1)).value()) {
    batch_.tokens = {1, 2};
    batch_.positions = {0, 1};
    batch_.subtree_end = {2, 2};
    batch_.segments = {{0, 2, -1}};
    plan_ = std::move(ops_->PlanBatch(batch_)).value();
  }
  static TensorView F32(std::vector<int64_t> shape) {
    static float memory[4096];
    TensorView v = {memory, DType::kF32, static_cast<int32_t>(shape.size()), {}, {}};
    int64_t stride = 1;
    for (int i = v.rank - 1; i >= 0; --i) {
      v.shape[i] = shape[i];
      v.stride[i] = stride;
      stride *= shape[i];
    }
    return v;
  }
  static TensorView I32(int64_t n) {
    static int32_t memory[64] = {};
    return View1D(memory, DType::kI32, n);
  }
  static void Expect(const absl::Status& status, const char* what) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << what;
    EXPECT_THAT(std::string(status.message()), HasSubstr(what));
  }

  ops::TokenBatch batch_;
  std::unique_ptr<ops::Ops> ops_;
  std::unique_ptr<ops::BatchPlan> plan_;
};

TEST_F(ShapeErrorsTest, RowOpsNameTensorWantAndGot) {
  Expect(ops_->RmsNorm({.x = F32({2, 8}), .weight = F32({7}), .out = F32({2, 8})}),
         "rms_norm: tensor weight: want f32 [8], got f32 [7]; ");
  Expect(ops_->RmsNorm({.x = F32({2, 8}), .weight = F32({8}), .out = F32({3, 8})}),
         "rms_norm: tensor out: want f32 [2, 8], got f32 [3, 8]; ");
  Expect(ops_->RmsNorm({.x = F32({2, 8}), .weight = F32({8})}),
         "rms_norm: tensor out: want f32 [2, 8], got no tensor; ");
  Expect(
      ops_->RmsNorm({.x = F32({2, 8}), .weight = F32({8}), .out = F32({2, 8}), .rstd = F32({3})}),
      "rms_norm: tensor rstd: want f32 [2], got f32 [3]; ");
  Expect(ops_->RmsNormBackward({.d_out = F32({2, 7}), .x = F32({2, 8})}),
         "rms_norm_backward: tensor d_out: want f32 [2, 8], got f32 [2, 7]; ");
  Expect(ops_->SwiGlu({.gate_up = F32({2, 6}), .out = F32({2, 4})}),
         "swiglu: tensor gate_up: want f32 [2, 8], got f32 [2, 6]; ");
  Expect(ops_->SwiGluBackward({.gate_up = F32({2, 8}), .d_out = F32({2, 4})}),
         "swiglu_backward: tensor d_gate_up: want f32 [2, 8], got no tensor; ");
  Expect(ops_->Embedding({.ids = F32({2}), .table = F32({4, 3}), .out = F32({2, 3})}),
         "embedding: tensor ids: want i32 [2], got f32 [2]; ");
  Expect(ops_->EmbeddingBackward({.ids = I32(2), .d_out = F32({2, 3}), .d_table = F32({4, 5})}),
         "embedding_backward: tensor d_out: want f32 [2, 5], got f32 [2, 3]; ");
  Expect(ops_->GatherRows({.src = F32({4, 3}), .indices = I32(2), .out = F32({3, 3})}),
         "gather_rows: tensor out: want f32 [2, 3], got f32 [3, 3]; ");
  Expect(ops_->ScatterAddRows({.src = F32({3, 3}), .indices = I32(2), .dst = F32({4, 3})}),
         "scatter_add_rows: tensor src: want f32 [2, 3], got f32 [3, 3]; ");
  Expect(ops_->SumRows({.x = F32({2, 3}), .out = F32({4})}),
         "sum_rows: tensor x: want f32 [2, 4], got f32 [2, 3]; ");
}

TEST_F(ShapeErrorsTest, StridesAndNullMemoryAreRefused) {
  TensorView strided = F32({2, 8});
  strided.stride[1] = 2;
  Expect(ops_->RmsNorm({.x = strided, .weight = F32({8}), .out = F32({2, 8})}),
         "rms_norm: tensor x: want unit stride in the last dimension, got stride 2; ");
  TensorView null = F32({2, 8});
  null.data = nullptr;
  Expect(ops_->RmsNorm({.x = null, .weight = F32({8}), .out = F32({2, 8})}),
         "rms_norm: tensor x: want memory, got a null pointer; ");
}

TEST_F(ShapeErrorsTest, MatMulNamesTheOperand) {
  Expect(ops_->MatMul({.a = F32({2, 3}), .b = F32({4, 5}), .c = F32({2, 5})}),
         "matmul: tensor b: want f32 [3, 5], got f32 [4, 5]; ");
  Expect(ops_->MatMul({.a = F32({2, 3}), .b = F32({4, 5}), .trans_b = true, .c = F32({2, 4})}),
         "matmul: tensor b: want f32 [4, 3], got f32 [4, 5]; ");
  Expect(ops_->MatMul({.a = F32({2, 3}), .b = F32({3, 5}), .bias = F32({4}), .c = F32({2, 5})}),
         "matmul: tensor bias: want f32 [5], got f32 [4]; ");
  Expect(ops_->MatMul({.a = F32({2, 3}), .b = F32({3, 5}), .c = F32({2, 4})}),
         "matmul: tensor c: want f32 [2, 5], got f32 [2, 4]; ");
  Expect(ops_->MatMul({.a = F32({6}), .b = F32({3, 5}), .c = F32({2, 4})}),
         "matmul: tensor a: want rank 2, got f32 [6]; ");
}

TEST_F(ShapeErrorsTest, RopeAndAttentionCheckPlanAndPages) {
  ops::QkNormRopeParams rope = {.plan = plan_.get(),
                                .q_in = F32({2, 2, 4}),
                                .k_in = F32({2, 1, 4}),
                                .v = F32({2, 1, 4}),
                                .rope = F32({1, 4}),
                                .q_out = F32({2, 2, 4}),
                                .k_out = F32({2, 1, 4})};
  Expect(ops_->QkNormRope(rope), "qk_norm_rope: position: want below the rows of rope, got 1; ");
  rope.rope = F32({8, 4});
  rope.q_norm = F32({5});
  Expect(ops_->QkNormRope(rope), "qk_norm_rope: tensor q_norm: want f32 [4], got f32 [5]; ");
  rope.plan = nullptr;
  Expect(ops_->QkNormRope(rope), "qk_norm_rope: plan: want a batch plan");

  ops::TreeAttentionParams attention = {.plan = plan_.get(),
                                        .q = F32({2, 3, 4}),
                                        .k = F32({2, 2, 4}),
                                        .v = F32({2, 2, 4}),
                                        .scale = 1,
                                        .out = F32({2, 3, 4})};
  Expect(ops_->TreeAttention(attention),
         "tree_attention: q_heads: want a multiple of kv_heads, got 3; ");
  attention.q = attention.out = F32({2, 2, 4});
  attention.v = F32({2, 1, 4});
  Expect(ops_->TreeAttention(attention),
         "tree_attention: tensor v: want f32 [2, 2, 4], got f32 [2, 1, 4]; ");
  attention.v = F32({2, 2, 4});
  attention.scale = 0;
  Expect(ops_->TreeAttention(attention), "tree_attention: scale: want a positive number");

  batch_.block_tokens = 4;
  batch_.context_nodes = {{-1, 3, 0}};
  batch_.context_blocks = {5};
  batch_.positions = {3, 4};
  batch_.segments = {{0, 2, 0}};
  const auto below = std::move(ops_->PlanBatch(batch_)).value();
  attention.scale = 1;
  attention.plan = below.get();
  Expect(ops_->TreeAttention(attention), "tree_attention: tensor context.k: want f32 [");
  attention.context = {F32({5, 4, 2, 4}), F32({5, 4, 2, 4})};
  Expect(ops_->TreeAttention(attention), "tree_attention: context block: want below the blocks");
  attention.context = {F32({6, 4, 2, 4}), F32({6, 4, 2, 4})};
  EXPECT_TRUE(ops_->TreeAttention(attention).ok());
}

TEST_F(ShapeErrorsTest, KvSlotsMustLieInThePool) {
  batch_.block_tokens = 4;
  batch_.kv_slots = {7, 8};
  const auto plan = std::move(ops_->PlanBatch(batch_)).value();
  Expect(ops_->QkNormRope({.plan = plan.get(),
                           .q_in = F32({2, 2, 4}),
                           .k_in = F32({2, 1, 4}),
                           .v = F32({2, 1, 4}),
                           .rope = F32({8, 4}),
                           .q_out = F32({2, 2, 4}),
                           .k_out = F32({2, 1, 4}),
                           .pages = {F32({2, 4, 1, 4}), F32({2, 4, 1, 4})}}),
         "qk_norm_rope: kv slot: want below the slots of the pool, got 8; ");
}

TEST_F(ShapeErrorsTest, HeadUpdateAndMemoryOpsNameTheTensor) {
  Expect(ops_->LogProbHead({.hidden = F32({2, 4}),
                            .weight = F32({5, 3}),
                            .target_indptr = I32(3),
                            .targets = I32(0)}),
         "logprob_head: tensor weight: want f32 [5, 4], got f32 [5, 3]; ");
  Expect(ops_->AdamW({.param = F32({64}), .grad = F32({32}), .m = F32({64}), .v = F32({64})}),
         "adamw: tensor grad: want f32 [64], got f32 [32]; ");
  Expect(ops_->AdamW(
             {.param = F32({64}), .grad = F32({64}), .m = F32({64}), .v = F32({64}), .step = 0}),
         "adamw: step: want at least 1, got 0; ");
  Expect(ops_->Copy(F32({2, 3}), F32({3, 2})), "copy: tensor dst: want the shape of src");
  EXPECT_EQ(ops_->Copy(F32({2}), I32(2)).code(), absl::StatusCode::kUnimplemented);
}

TEST_F(ShapeErrorsTest, AMalformedBatchGetsNoPlan) {
  batch_.positions[1] = 5;
  Expect(ops_->PlanBatch(batch_).status(), "row 1 wants position 1, got 5");
}

TEST(CreateOpsTest, RefusesUnknownDevicesAndNegativeThreads) {
  EXPECT_EQ(ops::CreateOps("tpu").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ops::CreateOps("cpu", -1).status().code(), absl::StatusCode::kInvalidArgument);
  const auto ops = ops::CreateOps("cpu");
  ASSERT_TRUE(ops.ok());
  EXPECT_EQ((*ops)->Info().kind, DeviceKind::kCpu);
  EXPECT_THAT((*ops)->Info().name, HasSubstr("threads"));
  EXPECT_GT((*ops)->Info().total_bytes, 0);
}

}  // namespace
}  // namespace coppice
