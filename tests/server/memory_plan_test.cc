#include "server/memory_plan.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/model/kv_pool.h"

namespace coppice {
namespace {

using ::testing::HasSubstr;

class MemoryPlanTest : public ::testing::Test {
 protected:
  absl::StatusOr<MemoryPlan> Plan() { return PlanMemory(config_, model_, DType::kF32, 1000); }

  Config config_;
  ModelConfig model_ = *NamedGeometry("tiny-llama");
};

TEST_F(MemoryPlanTest, DefaultHoldsSixteenContexts) {
  const auto plan = Plan();
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->max_context, model_.max_positions);
  EXPECT_EQ(plan->num_blocks, 16 * ((model_.max_positions + 15) / 16));
  EXPECT_GT(plan->total_bytes(), plan->num_blocks * plan->block_bytes);
  EXPECT_THAT(plan->ToString(), HasSubstr("kv_blocks_mib="));
}

TEST_F(MemoryPlanTest, FlagsDecideTheNumberOfBlocks) {
  config_.max_context = 32;
  config_.kv_blocks = 7;
  EXPECT_EQ(Plan()->num_blocks, 7);
  config_.kv_blocks = 0;
  config_.kv_bytes = 5 * KvPool::BytesPerBlock(model_, 16, DType::kF32) + 1;
  EXPECT_EQ(Plan()->num_blocks, 5);
}

TEST_F(MemoryPlanTest, RefusesWhatCannotHoldOneContext) {
  config_.max_context = 100;
  config_.kv_blocks = 6;
  EXPECT_THAT(std::string(Plan().status().message()), HasSubstr("want 7 blocks of 16 tokens"));
  config_.kv_blocks = 0;
  config_.max_context = model_.max_positions + 1;
  EXPECT_THAT(std::string(Plan().status().message()), HasSubstr("lower --max_context"));
}

}  // namespace
}  // namespace coppice
