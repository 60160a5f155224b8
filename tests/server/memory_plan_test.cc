#include "server/memory_plan.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/model/kv_pool.h"

namespace coppice {
namespace {

using ::testing::HasSubstr;

class MemoryPlanTest : public ::testing::Test {
 protected:
  absl::StatusOr<MemoryPlan> Plan() { return PlanMemory(config_, model_, device_, 1000); }

  Config config_;
  ModelConfig model_ = *NamedGeometry("tiny-llama");
  ops::DeviceInfo device_;
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

TEST_F(MemoryPlanTest, AFractionLeavesRoomForTheRest) {
  device_ = {.kind = DeviceKind::kCuda,
             .compute_dtype = DType::kBF16,
             .total_bytes = int64_t{12} << 30,
             .free_bytes = int64_t{11} << 30};
  config_.kv_fraction = 0.75;
  const auto plan = Plan();
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_LE(plan->total_bytes(), device_.free_bytes);
  EXPECT_GT(plan->total_bytes(), device_.free_bytes - plan->block_bytes);
  const double kv = static_cast<double>(plan->num_blocks * plan->block_bytes);
  EXPECT_NEAR(kv / (kv + static_cast<double>(plan->activation_bytes)), 0.75, 1e-3);

  device_.free_bytes = int64_t{1} << 30;  // the scratch alone
  EXPECT_THAT(std::string(Plan().status().message()), HasSubstr("use --kv_bytes"));
  config_.kv_fraction = 0;
  EXPECT_TRUE(Plan().ok());
}

TEST_F(MemoryPlanTest, CountsWhatOpsMayTakeAndKeptPrompts) {
  device_ = {.kind = DeviceKind::kCuda,
             .compute_dtype = DType::kBF16,
             .total_bytes = int64_t{12} << 30,
             .free_bytes = int64_t{11} << 30,
             .op_scratch_bytes = int64_t{5} << 30};
  config_.kv_fraction = 0.5;
  config_.prompt_state_bytes = int64_t{1} << 30;
  const auto plan = Plan();
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->ToString(), HasSubstr(" scratch_mib=5120 "));
  EXPECT_LE(plan->total_bytes(), device_.free_bytes);
  config_.prompt_state_bytes = int64_t{6} << 30;  // nothing is left
  EXPECT_THAT(std::string(Plan().status().message()), HasSubstr("prompt states, got"));
}

TEST_F(MemoryPlanTest, GradientsInBf16LeaveMore) {
  const auto plan = Plan();
  ASSERT_TRUE(plan.ok()) << plan.status();
  config_.gradient_dtype = "bf16";
  const auto less = Plan();
  ASSERT_TRUE(less.ok()) << less.status();
  EXPECT_LT(less->total_bytes(), plan->total_bytes());
}

// 0 would mean the trainer's own choice, which the plan knows nothing of.
TEST_F(MemoryPlanTest, WritesDownTheLeastOfActivations) {
  device_ = {.kind = DeviceKind::kCuda,
             .compute_dtype = DType::kBF16,
             .total_bytes = int64_t{12} << 30,
             .free_bytes = int64_t{3} << 29,
             .op_scratch_bytes = int64_t{2} << 30};
  const auto plan = Plan();
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_GT(plan->activation_bytes, 0);
  EXPECT_LE(plan->activation_bytes, device_.free_bytes / 8);
}

}  // namespace
}  // namespace coppice
