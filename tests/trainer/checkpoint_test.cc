#include "trainer/checkpoint.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "kernels/model/model_config.h"
#include "tests/trainer/trainer_fixture.h"
#include "trainer/hf_config.h"
#include "trainer/sha256.h"

namespace coppice {
namespace {

namespace fs = std::filesystem;

class CheckpointTest : public testing::Test {
 protected:
  CheckpointTest() {
    const std::string name = testing::UnitTest::GetInstance()->current_test_info()->name();
    root_ = fs::path(testing::TempDir()) / ("coppice_" + std::to_string(getpid()) + name);
    fs::remove_all(root_);
    fs::create_directories(root_);
  }
  ~CheckpointTest() override { fs::remove_all(root_); }

  std::string Path(const std::string& name) const { return (root_ / name).string(); }

  fs::path root_;
};

ForwardBackwardRequest StepRequest(uint64_t step) {
  Random random(step);
  return RandomRequest(random, 61);
}

void TrainSteps(TinyPolicy& policy, uint64_t first, uint64_t count) {
  for (uint64_t step = first; step < first + count; ++step) {
    ASSERT_TRUE(policy.trainer().ForwardBackward(StepRequest(step)).ok());
    ASSERT_TRUE(policy.trainer().OptimStep({.learning_rate = 0.01f, .weight_decay = 0.1f}).ok());
  }
}

ModelConfig Config() { return TinyConfig(Architecture::kQwen2, true); }

void FlipByte(const std::string& path, int64_t offset) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(offset);
  const char byte = static_cast<char>(file.get() ^ 1);
  file.seekp(offset);
  file.put(byte);
}

std::string ReadText(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

TEST_F(CheckpointTest, ResumesBitForBit) {
  for (const Architecture architecture :
       {Architecture::kLlama, Architecture::kQwen2, Architecture::kQwen3}) {
    const ModelConfig config = TinyConfig(architecture, architecture == Architecture::kLlama);
    TinyPolicy original(config, 1);
    TrainSteps(original, 0, 3);
    ASSERT_TRUE(original.trainer().SaveCheckpoint(Path("a")).ok());
    TrainSteps(original, 3, 3);

    TinyPolicy resumed(config, 2);  // other weights
    const absl::Status status = resumed.trainer().LoadCheckpoint(Path("a"));
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(Raw(resumed.trainer().policy_version()), 3u);
    TrainSteps(resumed, 3, 3);
    EXPECT_EQ(resumed.Weights(), original.Weights());
    EXPECT_EQ(resumed.trainer().policy_version(), original.trainer().policy_version());
  }
}

// Beside the optimizer that it replaces; the activations of a former step make room.
TEST_F(CheckpointTest, LoadsAnOptimizerWhereActivationsWere) {
  TinyPolicy policy(Config());
  TrainSteps(policy, 0, 1);
  ASSERT_TRUE(policy.trainer().SaveCheckpoint(Path("a")).ok());
  const int64_t optimizer_bytes = 2 * NumParameterElements(Config()) * SizeOf(DType::kF32);
  policy.ops().LimitAllocations(optimizer_bytes - 1);
  const absl::Status status = policy.trainer().LoadCheckpoint(Path("a"));
  EXPECT_TRUE(status.ok()) << status;
  policy.ops().AllowAllocations();
  TrainSteps(policy, 1, 1);
}

TEST_F(CheckpointTest, HoldsAPolicyThatWasNeverTrained) {
  TinyPolicy fresh(Config(), 1), trained(Config(), 2);
  ASSERT_TRUE(fresh.trainer().SaveCheckpoint(Path("a")).ok());
  EXPECT_FALSE(fs::exists(Path("a/optimizer.safetensors")));
  TrainSteps(trained, 0, 1);
  ASSERT_TRUE(trained.trainer().LoadCheckpoint(Path("a")).ok());
  EXPECT_EQ(trained.Weights(), fresh.Weights());
  EXPECT_FALSE(trained.trainer().has_optimizer_state());
}

TEST_F(CheckpointTest, ReplacesAFormerCheckpointAndNothingElse) {
  TinyPolicy policy(Config());
  ASSERT_TRUE(policy.trainer().SaveCheckpoint(Path("a")).ok());
  TrainSteps(policy, 0, 1);
  ASSERT_TRUE(policy.trainer().SaveCheckpoint(Path("a/")).ok());
  EXPECT_FALSE(fs::exists(Path("a.partial")));
  TinyPolicy other(Config(), 2);
  ASSERT_TRUE(other.trainer().LoadCheckpoint(Path("a")).ok());
  EXPECT_EQ(other.Weights(), policy.Weights());

  fs::create_directories(Path("home"));
  std::ofstream(Path("home/letter.txt")) << "dear";
  EXPECT_EQ(policy.trainer().SaveCheckpoint(Path("home")).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(fs::exists(Path("home/letter.txt")));
}

TEST_F(CheckpointTest, RefusesToSaveWithPendingGradients) {
  TinyPolicy policy(Config());
  ASSERT_TRUE(policy.trainer().ForwardBackward(StepRequest(0)).ok());
  EXPECT_EQ(policy.trainer().SaveCheckpoint(Path("a")).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_FALSE(fs::exists(Path("a")));
}

TEST_F(CheckpointTest, AnythingWrongLeavesThePolicyAsItWas) {
  TinyPolicy writer(Config());
  TrainSteps(writer, 0, 2);
  const auto expect_refused = [&](absl::StatusCode code, const std::string& what) {
    TinyPolicy policy(Config(), 5);
    TrainSteps(policy, 7, 1);
    const std::vector<float> weights = policy.Weights();
    const absl::Status status = policy.trainer().LoadCheckpoint(Path("a"));
    EXPECT_EQ(status.code(), code) << what << ": " << status;
    EXPECT_EQ(policy.Weights(), weights) << what;
    EXPECT_EQ(Raw(policy.trainer().policy_version()), 1u) << what;
  };
  expect_refused(absl::StatusCode::kNotFound, "nothing there");
  for (const char* file : {"model.safetensors", "optimizer.safetensors", "config.json"}) {
    ASSERT_TRUE(writer.trainer().SaveCheckpoint(Path("a")).ok());
    const std::string path = Path("a/") + file;
    FlipByte(path, static_cast<int64_t>(fs::file_size(path)) / 2);
    expect_refused(absl::StatusCode::kDataLoss, std::string("flipped bit in ") + file);
    fs::resize_file(path, fs::file_size(path) - 1);
    expect_refused(absl::StatusCode::kDataLoss, std::string("truncated ") + file);
    fs::remove(path);
    expect_refused(absl::StatusCode::kDataLoss, std::string("missing ") + file);
  }
  for (const char* text : {"", "{", "[]", "{\"format\": 1}", "{\"files\": 3}"}) {
    std::ofstream(Path("a/checkpoint.json")) << text;
    expect_refused(absl::StatusCode::kDataLoss, std::string("manifest ") + text);
  }
  for (const char* scale :
       {"7", "{}", R"({"exponent": 1, "finite_norms": 0})",
        R"({"exponent": -99, "finite_norms": 0})", R"({"exponent": -2, "finite_norms": 100})",
        R"({"exponent": -2.5, "finite_norms": 1})"}) {
    ASSERT_TRUE(writer.trainer().SaveCheckpoint(Path("a")).ok());
    std::string manifest = ReadText(Path("a/checkpoint.json"));
    manifest.insert(1, absl::StrCat("\"gradient_scale\": ", scale, ","));
    std::ofstream(Path("a/checkpoint.json")) << manifest;
    expect_refused(absl::StatusCode::kDataLoss, std::string("gradient scale ") + scale);
  }
}

TEST_F(CheckpointTest, RefusesAnotherModel) {
  TinyPolicy writer(Config());
  ASSERT_TRUE(writer.trainer().SaveCheckpoint(Path("a")).ok());
  ModelConfig wider = Config();
  wider.ffn = 64;
  for (const ModelConfig& config : {wider, TinyConfig(Architecture::kLlama, true)}) {
    TinyPolicy reader(config);
    const std::vector<float> weights = reader.Weights();
    EXPECT_EQ(reader.trainer().LoadCheckpoint(Path("a")).code(),
              absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(reader.Weights(), weights);
  }
}

// Whatever fails before the weights' turn leaves them; a device that fails later is INTERNAL.
TEST_F(CheckpointTest, AFailingDeviceIsInternalAndNoVersion) {
  TinyPolicy writer(Config());
  TrainSteps(writer, 0, 1);
  ASSERT_TRUE(writer.trainer().SaveCheckpoint(Path("a")).ok());
  const int tensors = static_cast<int>(HfTensors(Config(), writer.model().params).size());
  for (const int uploads :
       {0, 1, 2 * tensors, 3 * tensors}) {  // moments come first, decay mask too
    TinyPolicy policy(Config(), 5);
    const std::vector<float> weights = policy.Weights();
    policy.ops().FailUploadsAfter(uploads);
    EXPECT_EQ(policy.trainer().LoadCheckpoint(Path("a")).code(), absl::StatusCode::kInternal);
    EXPECT_EQ(Raw(policy.trainer().policy_version()), 0u);
    const bool weights_begun = uploads > 2 * tensors;
    EXPECT_EQ(policy.Weights() == weights, !weights_begun) << uploads;
  }
}

TEST_F(CheckpointTest, RefusesADtypeItCannotReadAndChangesNothing) {
  TinyPolicy policy(Config());
  ASSERT_TRUE(policy.trainer().SaveCheckpoint(Path("a")).ok());
  const std::string weights_file = Path("a/model.safetensors");
  const std::string before = *Sha256OfFile(weights_file);
  std::string bytes = ReadText(weights_file);
  bytes.replace(bytes.rfind("\"F32\""), 5, "\"I32\"");  // of the last tensor
  std::ofstream(weights_file, std::ios::binary) << bytes;
  std::string manifest = ReadText(Path("a/checkpoint.json"));
  manifest.replace(manifest.find(before), before.size(), *Sha256OfFile(weights_file));
  std::ofstream(Path("a/checkpoint.json"), std::ios::binary) << manifest;

  TinyPolicy reader(Config(), 5);
  const std::vector<float> weights = reader.Weights();
  EXPECT_EQ(reader.trainer().LoadCheckpoint(Path("a")).code(), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(reader.Weights(), weights);
}

TEST_F(CheckpointTest, WritesAConfigurationThatReadsBack) {
  for (const Architecture architecture :
       {Architecture::kLlama, Architecture::kQwen2, Architecture::kQwen3}) {
    ModelConfig want = TinyConfig(architecture, true);
    want.rope = {.theta = 5e5,
                 .scaling = RopeConfig::Scaling::kLlama3,
                 .factor = 8,
                 .low_freq_factor = 1,
                 .high_freq_factor = 4,
                 .original_max_positions = 64};
    want.eos_tokens = {2, 3};
    const ModelConfig got = ParseHfConfig(HfConfigJson(want, DType::kF32)).value();
    EXPECT_EQ(HfConfigJson(got, DType::kF32), HfConfigJson(want, DType::kF32));
    const auto names = [&](DType computed) {
      return HfConfigJson(want, computed).find(kComputeTypeField) != std::string::npos;
    };
    EXPECT_TRUE(names(DType::kBF16) && names(DType::kF16) && !names(DType::kF32));
    EXPECT_EQ(NumParameterElements(got), NumParameterElements(want));
    EXPECT_EQ(got.rms_eps, want.rms_eps);
    EXPECT_EQ(got.rope.scaling, want.rope.scaling);
  }
}

// Saves in a child process that is killed at the `stop`-th change of the file system; false if it
// lived to the end.
bool SaveAndDieAt(TinyPolicy& policy, uint64_t version, const std::string& path, int stop) {
  const pid_t child = fork();
  if (child == 0) {
    int boundary = 0;
    const CheckpointView view{.config = policy.config(),
                              .params = policy.model().params,
                              .optimizer = nullptr,
                              .version = PolicyVersion{version}};
    const absl::Status status = WriteCheckpoint(view, path, policy.ops(), [&](absl::string_view) {
      if (boundary++ == stop) raise(SIGKILL);
    });
    _exit(status.ok() ? 0 : 1);
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  if (WIFSIGNALED(status)) return true;
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  return false;
}

TEST_F(CheckpointTest, KilledAtAnyWriteLeavesTheFormerOrTheNewOne) {
  TinyPolicy former(Config(), 1), latter(Config(), 2);
  int old_ones = 0, new_ones = 0, stop = 0;
  ASSERT_FALSE(SaveAndDieAt(former, 10, Path("a"), -1));
  for (bool killed = true; killed; ++stop) {
    killed = SaveAndDieAt(latter, 20, Path("a"), stop);
    TinyPolicy reader(Config(), 3);
    const absl::Status status = reader.trainer().LoadCheckpoint(Path("a"));
    ASSERT_TRUE(status.ok()) << "killed at write " << stop << ": " << status;
    const bool is_new = Raw(reader.trainer().policy_version()) == 20;
    ++(is_new ? new_ones : old_ones);
    EXPECT_EQ(reader.Weights(), is_new ? latter.Weights() : former.Weights());
    // The next save cleans up and succeeds.
    ASSERT_FALSE(SaveAndDieAt(former, 10, Path("a"), -1));
    EXPECT_FALSE(fs::exists(Path("a.partial")));
  }
  EXPECT_GT(old_ones, 20);
  EXPECT_GE(new_ones, 3);
}

TEST_F(CheckpointTest, KilledAtAnyWriteOfTheFirstOneLeavesNoneOrAWholeOne) {
  TinyPolicy policy(Config(), 1);
  int stop = 0;
  for (bool killed = true; killed; ++stop) {
    fs::remove_all(Path("a"));
    killed = SaveAndDieAt(policy, 10, Path("a"), stop);
    TinyPolicy reader(Config(), 3);
    const absl::Status status = reader.trainer().LoadCheckpoint(Path("a"));
    EXPECT_TRUE(status.ok() || absl::IsNotFound(status)) << status;
    EXPECT_EQ(status.ok(), fs::exists(Path("a")));
  }
}

}  // namespace
}  // namespace coppice
