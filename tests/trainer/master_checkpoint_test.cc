// Resuming on every device, bit for bit: where weights have 16 bits, the checkpoint holds their
// masters.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <numeric>
#include <random>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/model/safetensors.h"
#include "tests/support/narrow_ops.h"
#include "tests/support/test_ops.h"
#include "tests/trainer/device_policy.h"
#include "trainer/master_weights.h"

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
    const MasterParts parts = SplitMaster(DType::kBF16, master);
    ASSERT_EQ(std::bit_cast<uint32_t>(JoinMaster(DType::kBF16, parts)), bits);
    ASSERT_EQ(SplitMaster(DType::kBF16, JoinMaster(DType::kBF16, parts)), parts);
  }
}

// From the definition, in double: param is the nearest f16, what is left lies within half of its
// unit.
void ExpectF16Parts(float master) {
  const MasterParts parts = SplitMaster(DType::kF16, master);
  ASSERT_EQ(parts.param, F16FromFloat(master)) << master;
  const double joined = JoinMaster(DType::kF16, parts);
  if (std::abs(master) >= 0x1p-16f) {
    ASSERT_EQ(joined, master);
  } else {
    ASSERT_LE(std::abs(joined - master), 0x1p-40) << master;
  }
  const MasterParts again = SplitMaster(DType::kF16, static_cast<float>(joined));
  ASSERT_EQ(JoinMaster(DType::kF16, again), joined) << master;
  if (joined == 0) return;  // without a sign
  ASSERT_EQ(again, parts) << master;
}

TEST(MasterWeightsTest, FloatsOfF16sRangeAreTheirParts) {
  constexpr uint64_t kSeed = 12;
  SCOPED_TRACE(absl::StrCat("seed ", kSeed));
  std::mt19937_64 random(kSeed);
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {  // every f16, halves between, neighbours of both
    const float low = FloatFromF16(static_cast<uint16_t>(bits));
    const float high = FloatFromF16(static_cast<uint16_t>(bits + 1));
    const float half = low + (high - low) / 2;
    for (const float x : {low, half, std::nextafter(half, 0.0f), std::nextafter(half, 1e9f),
                          std::nextafter(low, 0.0f), std::nextafter(low, high)}) {
      ExpectF16Parts(x);
      ExpectF16Parts(-x);
    }
  }
  std::uniform_real_distribution<float> exponent(-40, 16);
  for (int i = 0; i < 1 << 18; ++i) {
    const float x = std::exp2(exponent(random));
    if (x <= kMaxF16) ExpectF16Parts(i % 2 == 0 ? x : -x);
  }
}

TEST(MasterWeightsTest, MastersOfF16EndAtItsLargest) {
  for (const float x : {65505.0f, 65520.0f, 1e9f, INFINITY}) {
    EXPECT_EQ(JoinMaster(DType::kF16, SplitMaster(DType::kF16, x)), kMaxF16);
    EXPECT_EQ(JoinMaster(DType::kF16, SplitMaster(DType::kF16, -x)), -kMaxF16);
  }
}

// Trains on requests that follow from the step.
class Policy : public DevicePolicy {
 public:
  using DevicePolicy::DevicePolicy;

  void Train(int first, int count) {
    for (int step = first; step < first + count; ++step) {
      std::mt19937_64 random(step);
      ForwardBackwardRequest request;
      TrainGroup group;
      for (int i = 0; i < 20; ++i) group.prompt.push_back(static_cast<int32_t>(random() % kVocab));
      for (int s = 0; s < 3; ++s) {
        TrainSample sample;
        for (int i = 0; i < 9; ++i)
          sample.tokens.push_back(static_cast<int32_t>(random() % kVocab));
        sample.advantages = {static_cast<float>(s) - 1};
        group.samples.push_back(sample);
      }
      request.groups.push_back(group);
      ASSERT_TRUE(trainer().ForwardBackward(request).ok());
      // Small steps: most of them change a master below what 16 bits show.
      ASSERT_TRUE(trainer().OptimStep({.learning_rate = 3e-5f, .weight_decay = 0.1f}).ok());
    }
  }
};

std::string Bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

// All of a checkpoint's, as f32.
std::vector<float> Weights(const std::string& path) {
  const auto file = OpenSafetensors(path + "/model.safetensors").value();
  std::vector<float> weights;
  for (const std::string& name : file->Names()) {
    const std::vector<int64_t> shape = file->Shape(name).value();
    const size_t begin = weights.size();
    weights.resize(begin +
                   std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies()));
    EXPECT_TRUE(file->ReadRows(name, 0, shape[0], weights.data() + begin).ok());
  }
  return weights;
}

class MasterCheckpointTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const absl::Status device = CreateTestOps(GetParam(), 1).status();
    if (SkipsDevice(GetParam(), device)) GTEST_SKIP() << device;
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

// What one type leaves of a policy is whole for the other, but for f16's smallest.
TEST_P(MasterCheckpointTest, MovesToOtherTypesAndBack) {
  Policy original(GetParam(), 1);
  original.Train(0, 2);
  ASSERT_TRUE(original.trainer().SaveCheckpoint(Path("here")).ok());
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    SCOPED_TRACE(Name(dtype));
    const std::string there = absl::StrCat("there ", Name(dtype));
    Policy narrow(std::make_unique<NarrowOps>(dtype), 2),
        last(std::make_unique<NarrowOps>(dtype), 3);
    ASSERT_TRUE(narrow.trainer().LoadCheckpoint(Path("here")).ok());
    ASSERT_TRUE(narrow.trainer().SaveCheckpoint(Path(there)).ok());
    EXPECT_TRUE(Bytes(Path(there) + "/optimizer.safetensors") ==
                Bytes(Path("here") + "/optimizer.safetensors"));
    const std::vector<float> want = Weights(Path("here")), got = Weights(Path(there));
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < want.size(); ++i) {
      const bool exact = dtype == DType::kBF16 || std::abs(want[i]) >= 0x1p-16f;
      ASSERT_LE(std::abs(got[i] - want[i]), exact ? 0 : 0x1p-40f) << want[i];
    }
    ASSERT_TRUE(last.trainer().LoadCheckpoint(Path(there)).ok());
    ASSERT_TRUE(last.trainer().SaveCheckpoint(Path("again")).ok());
    EXPECT_TRUE(Bytes(Path("again") + "/model.safetensors") ==
                Bytes(Path(there) + "/model.safetensors"));
  }
}

TEST(MasterCheckpointRangeTest, AWeightBeyondF16IsRefusedBeforeAnythingChanges) {
  const std::string path =
      (fs::path(testing::TempDir()) / absl::StrCat("coppice_range_", getpid())).string();
  for (const bool with_masters : {false, true}) {
    Policy wide("cpu", 1), narrow(std::make_unique<NarrowOps>(DType::kF16), 2);
    if (with_masters) wide.Train(0, 1);
    wide.model().params.layers[1].down.f32()[5] = -70000;
    ASSERT_TRUE(wide.trainer().SaveCheckpoint(path).ok());
    const TensorView flat = narrow.model().params.flat;
    const auto weights = [&] { return std::string(flat.as<char>(), flat.num_bytes()); };
    const std::string before = weights();
    const absl::Status loaded = narrow.trainer().LoadCheckpoint(path);
    EXPECT_EQ(loaded.code(), absl::StatusCode::kInvalidArgument) << loaded;
    EXPECT_NE(
        loaded.message().find("layers.1.mlp.down_proj.weight wants at most 65504, got -70000"),
        absl::string_view::npos)
        << loaded;
    EXPECT_TRUE(weights() == before);
    fs::remove_all(path);
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, MasterCheckpointTest, testing::ValuesIn(kDevices));

}  // namespace
}  // namespace coppice
