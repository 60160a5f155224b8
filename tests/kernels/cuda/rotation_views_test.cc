// The views that the decoder hands to MlpBlock are those of which the layer chain rotates heads in
// its own kernel: what else would fit falls back to one launch more, with the same results. No
// device is needed: the decoder runs on the CPU.
#include <gtest/gtest.h>

#include <memory>

#include "kernels/cuda/families.h"
#include "kernels/model/decoder.h"
#include "kernels/model/kv_pool.h"
#include "kernels/model/model_loader.h"
#include "tests/support/failing_ops.h"

namespace coppice {
namespace {

class WatchedOps final : public FailingOps {
 public:
  WatchedOps() : FailingOps(*ops::CreateOps("cpu", 1)) {}
  absl::Status MlpBlock(const ops::MlpBlockParams& p) override {
    if (p.next.c.present()) ++(cuda::FitsRotation(p) ? rotated : left);
    return ops::Ops::MlpBlock(p);
  }
  int rotated = 0, left = 0;  // blocks with projections behind
};

ops::TokenBatch StoredRows(int32_t rows) {
  ops::TokenBatch batch;
  batch.block_tokens = 16;
  for (int32_t row = 0; row < rows; ++row) {
    batch.tokens.push_back(row + 3);
    batch.positions.push_back(row);
    batch.subtree_end.push_back(rows);
    batch.kv_slots.push_back(row);
  }
  batch.segments = {{.row_begin = 0, .row_end = rows}};
  batch.logit_rows = {rows - 1};
  return batch;
}

// Of a forward pass over `rows` rows, on a model of three layers.
void RunForward(const ModelConfig& config, int32_t rows, WatchedOps& ops) {
  const Model model = *RandomModel(config, 3, ops);
  const std::unique_ptr<Decoder> decoder = *Decoder::Create(config, ops);
  const KvPool pool = *KvPool::Create(config, 2, 16, ops);
  const auto plan = *ops.PlanBatch(StoredRows(rows));
  DeviceBuffer workspace = *ops.Allocate(decoder->WorkspaceBytes(rows, 1), "workspace");
  const auto hidden = decoder->Forward(model.params, *plan, &pool, workspace, nullptr);
  ASSERT_TRUE(hidden.ok()) << hidden.status();
}

TEST(RotationViewsTest, TheDecodersBlocksRotateInTheChain) {
  for (const char* name : {"tiny-llama", "tiny-qwen2", "tiny-qwen3"}) {
    for (const int64_t head_dim : {64, 128}) {
      for (const int32_t rows : {1, 5}) {
        SCOPED_TRACE(testing::Message() << name << " " << head_dim << " " << rows << " rows");
        ModelConfig config = *NamedGeometry(name);
        config.num_layers = 3;
        config.head_dim = head_dim;
        WatchedOps ops;
        RunForward(config, rows, ops);
        EXPECT_EQ(ops.rotated, 2);
        EXPECT_EQ(ops.left, 0);
      }
    }
  }
}

TEST(RotationViewsTest, OtherHeadsAreLeftToTheirOwnKernel) {
  ModelConfig config = *NamedGeometry("tiny-qwen3");
  config.num_layers = 3;
  config.head_dim = 32;
  WatchedOps ops;
  RunForward(config, 5, ops);
  EXPECT_EQ(ops.rotated, 0);
  EXPECT_EQ(ops.left, 2);
}

}  // namespace
}  // namespace coppice
