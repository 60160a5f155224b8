// Resuming on every device, bit for bit: where weights are bf16, the checkpoint holds their
// masters.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/base/clock.h"
#include "kernels/model/decoder.h"
#include "kernels/model/model_loader.h"
#include "kernels/ops/ops.h"
#include "trainer/master_weights.h"
#include "trainer/trainer.h"

namespace coppice {
namespace {

namespace fs = std::filesystem;

TEST(MasterWeightsTest, EveryFloatIsItsParts) {
  constexpr uint64_t kSeed = 11;
  SCOPED_TRACE(absl::StrCat("seed ", kSeed));
  std::mt19937_64 random(kSeed);
  for (int i = 0; i < 1 << 20; ++i) {
    const uint32_t bits = i < 1 << 17 ? static_cast<uint32_t>(i) << 15  // halves and whole ones
                                      : static_cast<uint32_t>(random());
    const float master = std::bit_cast<float>(bits);
    const MasterParts parts = SplitMaster(master);
    ASSERT_EQ(std::bit_cast<uint32_t>(JoinMaster(parts)), bits);
    ASSERT_EQ(SplitMaster(JoinMaster(parts)), parts);
  }
}

// A policy on a device, with shapes that a GPU has kernels for.
class Policy {
 public:
  Policy(const char* device, uint64_t seed) : ops_(ops::CreateOps(device, 2).value()) {
    ModelConfig c;
    c.name = "tiny";
    c.num_layers = 2;
    c.hidden = 128;
    c.q_heads = 2;
    c.kv_heads = 1;
    c.head_dim = 64;
    c.ffn = 192;
    c.vocab = 264;
    c.max_positions = 256;
    model_ = RandomModel(c, seed, *ops_).value();
    decoder_ = Decoder::Create(c, *ops_).value();
    trainer_ = Trainer::Create({}, model_, *decoder_, clock_).value();
  }

  Trainer& trainer() { return *trainer_; }

  void Train(int first, int count) {
    for (int step = first; step < first + count; ++step) {
      std::mt19937_64 random(step);
      ForwardBackwardRequest request;
      TrainGroup group;
      for (int i = 0; i < 20; ++i) group.prompt.push_back(static_cast<int32_t>(random() % 264));
      for (int s = 0; s < 3; ++s) {
        TrainSample sample;
        for (int i = 0; i < 9; ++i) sample.tokens.push_back(static_cast<int32_t>(random() % 264));
        sample.advantages = {static_cast<float>(s) - 1};
        group.samples.push_back(sample);
      }
      request.groups.push_back(group);
      ASSERT_TRUE(trainer_->ForwardBackward(request).ok());
      // Small steps: most of them change a master below what bf16 shows.
      ASSERT_TRUE(trainer_->OptimStep({.learning_rate = 3e-5f, .weight_decay = 0.1f}).ok());
    }
  }

 private:
  std::unique_ptr<ops::Ops> ops_;
  SteadyClock clock_;
  Model model_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<Trainer> trainer_;
};

std::string Bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

class MasterCheckpointTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const absl::Status device = ops::CreateOps(GetParam(), 1).status();
    if (GetParam() == std::string("cuda") && !device.ok() &&
        std::getenv("REQUIRE_CUDA") == nullptr) {
      GTEST_SKIP() << device;
    }
    ASSERT_TRUE(device.ok()) << device;
    fs::create_directories(root_);
  }
  void TearDown() override { fs::remove_all(root_); }
  std::string Path(const std::string& name) const { return (root_ / name).string(); }

  const fs::path root_ = fs::path(testing::TempDir()) / absl::StrCat("coppice_masters_", getpid());
};

TEST_P(MasterCheckpointTest, ResumesBitForBit) {
  Policy original(GetParam(), 1), resumed(GetParam(), 2);
  original.Train(0, 3);
  ASSERT_TRUE(original.trainer().SaveCheckpoint(Path("middle")).ok());
  original.Train(3, 3);
  ASSERT_TRUE(original.trainer().SaveCheckpoint(Path("end")).ok());

  const absl::Status loaded = resumed.trainer().LoadCheckpoint(Path("middle"));
  ASSERT_TRUE(loaded.ok()) << loaded;
  resumed.Train(3, 3);
  ASSERT_TRUE(resumed.trainer().SaveCheckpoint(Path("resumed")).ok());
  for (const char* file : {"/model.safetensors", "/optimizer.safetensors"}) {
    EXPECT_TRUE(Bytes(Path("resumed") + file) == Bytes(Path("end") + file)) << file;
  }
}

// Written on one device and read on the other, nothing is lost.
TEST_P(MasterCheckpointTest, MovesToTheCpuAndBackUnchanged) {
  Policy original(GetParam(), 1), cpu("cpu", 2), back(GetParam(), 3);
  original.Train(0, 2);
  ASSERT_TRUE(original.trainer().SaveCheckpoint(Path("here")).ok());
  ASSERT_TRUE(cpu.trainer().LoadCheckpoint(Path("here")).ok());
  ASSERT_TRUE(cpu.trainer().SaveCheckpoint(Path("there")).ok());
  ASSERT_TRUE(back.trainer().LoadCheckpoint(Path("there")).ok());
  ASSERT_TRUE(back.trainer().SaveCheckpoint(Path("again")).ok());
  for (const char* file : {"/model.safetensors", "/optimizer.safetensors"}) {
    EXPECT_TRUE(Bytes(Path("again") + file) == Bytes(Path("here") + file)) << file;
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, MasterCheckpointTest, testing::Values("cpu", "cuda"));

}  // namespace
}  // namespace coppice
