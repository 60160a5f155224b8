// Gradients of a whole model on a GPU, in bf16 and in f16, against the CPU's in fp32 from the same
// weights. fp32 stands for the exact gradient: against fp64 it is off by about 1e-6
// (kTreeVersusFlat bounds it at 1e-5), bf16 by more than 1e-3.
//
// Skipped without a GPU, unless REQUIRE_CUDA=1 makes that a failure.
#include <gtest/gtest.h>

#include <algorithm>
#include <iostream>

#include "kernels/base/float16.h"
#include "kernels/base/status_macros.h"
#include "tests/support/kept_prompt.h"
#include "tests/support/test_ops.h"
#include "tests/support/tolerances.h"
#include "tests/trainer/trainer_fixture.h"
#include "trainer/activations.h"

namespace coppice {
namespace {

// ---- Models

ModelConfig Config(Architecture architecture, int64_t head_dim) {
  ModelConfig c = TinyConfig(architecture, architecture == Architecture::kQwen2);
  c.num_layers = 3;
  c.hidden = 256;
  c.q_heads = 4;
  c.kv_heads = 2;
  c.head_dim = head_dim;
  c.ffn = 384;
  c.vocab = 509;
  c.max_positions = 1024;
  return c;
}

// Matrices as a model starts with them, or so large that each layer passes on all of the size, and
// all of the error, of what it gets.
enum class Scale { kInitial, kLarge };

// Bits of weights in a 16-bit type, so that both devices start from the same numbers; norms around
// 1.
std::vector<uint16_t> Weights(const ModelConfig& config, Scale scale, uint64_t seed, DType dtype) {
  std::vector<float> arena(NumParameterElements(config));
  Random random(seed);
  std::normal_distribution<float> normal;
  for (const NamedTensor& tensor :
       HfTensors(config, MapParameters(config, arena.data(), DType::kF32))) {
    float deviation = 0.2f, mean = tensor.name.ends_with("bias") ? 0.0f : 1.0f;
    if (tensor.decay) {
      mean = 0;
      deviation =
          scale == Scale::kInitial ? 0.02f : 1 / std::sqrt(static_cast<float>(tensor.view.dim(1)));
    }
    for (int64_t i = 0; i < tensor.view.num_elements(); ++i) {
      tensor.view.f32()[i] = mean + deviation * normal(random);
    }
  }
  std::vector<uint16_t> bits(arena.size());
  std::transform(arena.begin(), arena.end(), bits.begin(),
                 [dtype](float x) { return Bits16FromFloat(dtype, x); });
  return bits;
}

// One device with the model on it.
class Policy {
 public:
  // With weights that `dtype` holds.
  static absl::StatusOr<std::unique_ptr<Policy>> Create(const char* device,
                                                        const ModelConfig& config, Scale scale,
                                                        DType dtype) {
    auto policy = std::make_unique<Policy>();
    ASSIGN_OR_RETURN(policy->ops_, CreateTestOps(device, 2));
    ASSIGN_OR_RETURN(policy->model_, RandomModel(config, 1, *policy->ops_));
    const std::vector<uint16_t> bits = Weights(config, scale, 5, dtype);
    std::vector<float> values(bits.size());
    std::transform(bits.begin(), bits.end(), values.begin(),
                   [dtype](uint16_t x) { return FloatFrom16(dtype, x); });
    const TensorView flat = policy->model_.params.flat;
    const bool f32 = flat.dtype == DType::kF32;
    RETURN_IF_ERROR(policy->ops_->Upload(
        f32 ? static_cast<const void*>(values.data()) : static_cast<const void*>(bits.data()),
        flat));
    RETURN_IF_ERROR(policy->ops_->Synchronize());
    ASSIGN_OR_RETURN(policy->decoder_, Decoder::Create(config, *policy->ops_));
    return policy;
  }

  std::vector<float> Gradients(const ForwardBackwardRequest& request, bool share,
                               int64_t activation_bytes = 0, int64_t max_rows = 16384,
                               DType gradient_dtype = DType::kF32) {
    const Trainer::Options options = {.max_rows = max_rows,
                                      .activation_bytes = activation_bytes,
                                      .gradient_dtype = gradient_dtype,
                                      .share_prefixes = share};
    const auto trainer = Trainer::Create(options, model_, *decoder_, clock_).value();
    const auto result = trainer->ForwardBackward(request);
    EXPECT_TRUE(result.ok()) << result.status();
    std::vector<float> gradients = Download(trainer->gradients());
    for (float& g : gradients) g /= static_cast<float>(trainer->gradient_scale());
    return gradients;
  }

  void Keep(TrainGroup& group) {
    group.kept_prompt =
        KeepPrompt(*decoder_, model_.params, group.prompt, PolicyVersion{0}, /*piece=*/96).value();
  }

 private:
  // In the order of the arena, whatever the types of tensors.
  std::vector<float> Download(const Parameters& gradients) {
    const ModelConfig& config = model_.config;
    std::vector<float> arena(NumParameterElements(config));
    const auto wanted = ArenaTensors(MapParameters(config, arena.data(), DType::kF32));
    const auto held = ArenaTensors(gradients);
    for (size_t i = 0; i < wanted.size(); ++i) {
      const TensorView& from = held[i].second;
      float* to = wanted[i].second.f32();
      if (from.dtype == DType::kF32) {
        EXPECT_TRUE(ops_->Download(from, to).ok());
        continue;
      }
      std::vector<uint16_t> bits(from.num_elements());
      EXPECT_TRUE(ops_->Download(from, bits.data()).ok());
      std::transform(bits.begin(), bits.end(), to,
                     [&from](uint16_t x) { return FloatFrom16(from.dtype, x); });
    }
    return arena;
  }

  SteadyClock clock_;
  std::unique_ptr<ops::Ops> ops_;
  Model model_;
  std::unique_ptr<Decoder> decoder_;
};

// ---- Requests

std::vector<int32_t> Tokens(Random& random, int64_t n, int64_t vocab) {
  std::vector<int32_t> tokens(n);
  for (int32_t& t : tokens) t = static_cast<int32_t>(Uniform(random, 0, vocab - 1));
  return tokens;
}

TrainSample Sample(Random& random, std::vector<int32_t> response) {
  std::normal_distribution<float> normal;
  TrainSample sample;
  sample.tokens = std::move(response);
  sample.advantages = {normal(random)};
  return sample;
}

TrainGroup Group(Random& random, int64_t vocab, int64_t prompt,
                 const std::vector<int64_t>& responses) {
  TrainGroup group{.prompt = Tokens(random, prompt, vocab)};
  for (const int64_t n : responses) {
    group.samples.push_back(Sample(random, Tokens(random, n, vocab)));
  }
  return group;
}

// Runs of `run` tokens that fork in two, `depth` deep: every path is a sample.
void Fork(Random& random, int64_t vocab, int64_t run, int depth, std::vector<int32_t> path,
          TrainGroup& group) {
  for (const int32_t t : Tokens(random, run + depth, vocab)) path.push_back(t);
  if (depth == 1) {
    group.samples.push_back(Sample(random, std::move(path)));
    return;
  }
  for (int child = 0; child < 2; ++child) Fork(random, vocab, run, depth - 1, path, group);
}

struct Case {
  const char* name;
  int64_t prompt;
  std::vector<int64_t> responses;
  int depth = 1;  // > 1: a tree below the prompt, with runs of responses[0]
  int groups = 1;
};

const Case kCases[] = {
    {"PromptBeyondATile", 129, {40, 40, 40}},
    {"ResponsesOfOneToken", 100, {1, 1, 1, 1}},
    {"ResponsesBelowATile", 256, {7, 7, 7}},
    {"UnequalResponses", 77, {1, 130, 64, 3}},
    {"OneSample", 200, {33}},
    {"SixtyFourSamples", 150, std::vector<int64_t>(64, 9)},
    {"TreeFourDeep", 61, {37}, 4},
    {"ThreeGroups", 90, {20, 31, 5}, 1, 3},
};

ForwardBackwardRequest Request(const Case& c, int64_t vocab, uint64_t seed) {
  Random random(seed);
  ForwardBackwardRequest request;
  request.loss.entropy_coef = 0.01f;
  for (int g = 0; g < c.groups; ++g) {
    if (c.depth == 1) {
      request.groups.push_back(Group(random, vocab, c.prompt + g, c.responses));
      continue;
    }
    TrainGroup group{.prompt = Tokens(random, c.prompt, vocab)};
    Fork(random, vocab, c.responses[0], c.depth, {}, group);
    request.groups.push_back(std::move(group));
  }
  return request;
}

// |got - want| / |want| in the Euclidean norm: the largest over the tensors, and over all at once.
struct Errors {
  double worst = 0, total = 0;
  std::string worst_name;
};

Errors Compare(const ModelConfig& config, const std::vector<float>& got,
               const std::vector<float>& want) {
  Errors errors;
  double all_errors = 0, all_norms = 0;
  std::vector<float> base(got.size());
  for (const auto& [name, view] : ArenaTensors(MapParameters(config, base.data(), DType::kF32))) {
    const int64_t begin = view.f32() - base.data();
    double error = 0, norm = 0;
    for (int64_t i = begin; i < begin + view.num_elements(); ++i) {
      error += (double{got[i]} - want[i]) * (double{got[i]} - want[i]);
      norm += double{want[i]} * want[i];
    }
    all_errors += error;
    all_norms += norm;
    const double relative = std::sqrt(error / norm);
    if (relative <= errors.worst) continue;  // NaN is worst of all
    errors.worst = relative;
    errors.worst_name = name;
  }
  errors.total = std::sqrt(all_errors / all_norms);
  return errors;
}

// ---- Tests

constexpr uint64_t kSeeds[] = {11, 12, 13};

using Parameter = std::tuple<std::pair<Architecture, int64_t>, Case, const char*>;

class CudaGradientTest : public testing::TestWithParam<Parameter> {
 protected:
  void SetUp() override {
    SetMinLogSeverity(LogSeverity::kError);
    const auto& [architecture, head_dim] = std::get<0>(GetParam());
    config_ = Config(architecture, head_dim);
    request_ = SeededRequest(kSeeds[0]);
    const auto ops = CreateTestOps(device());
    if (SkipsDevice(device(), ops.status())) GTEST_SKIP() << ops.status();
    ASSERT_TRUE(ops.ok()) << ops.status();
  }

  static const char* device() { return std::get<2>(GetParam()); }
  static double Limit(double bf16, double f16) {
    return ComputeDType(device()) == DType::kF16 ? f16 : bf16;
  }
  static double Limit() { return Limit(tolerance::kBf16Gradient, tolerance::kF16Gradient); }
  std::unique_ptr<Policy> Cpu(Scale scale) const { return OnDevice("cpu", scale); }
  std::unique_ptr<Policy> Cuda(Scale scale) const { return OnDevice(device(), scale); }

  ForwardBackwardRequest SeededRequest(uint64_t seed) const {
    return Request(std::get<1>(GetParam()), config_.vocab, seed);
  }

  void CompareBothWithExact(Scale scale, double limit) {
    const auto cpu = Cpu(scale);
    const auto cuda = Cuda(scale);
    double shared_squares = 0, flat_squares = 0;
    for (const uint64_t seed : kSeeds) {
      const ForwardBackwardRequest request = SeededRequest(seed);
      const std::vector<float> exact = cpu->Gradients(request, /*share=*/true);
      const Errors shared = Compare(config_, cuda->Gradients(request, /*share=*/true), exact);
      const Errors flat = Compare(config_, cuda->Gradients(request, /*share=*/false), exact);
      std::cout << "shared " << shared.total << ", worst " << shared.worst << " ("
                << shared.worst_name << "); flat " << flat.total << ", worst " << flat.worst << " ("
                << flat.worst_name << ")\n";
      EXPECT_LE(shared.worst, limit) << shared.worst_name << ", seed " << seed;
      shared_squares += shared.total * shared.total;
      flat_squares += flat.total * flat.total;
    }
    EXPECT_LE(std::sqrt(shared_squares), std::sqrt(flat_squares) * tolerance::kSharedOverFlat);
  }

  // The fewest that any pass needs.
  int64_t FewestRows() const {
    int64_t rows = 1;
    for (const TrainGroup& group : request_.groups) {
      rows = std::max(rows, static_cast<int64_t>(group.prompt.size()));
      for (const TrainSample& s : group.samples) {
        rows = std::max(rows, static_cast<int64_t>(s.tokens.size()));
      }
    }
    return rows;
  }

  ModelConfig config_;
  ForwardBackwardRequest request_;

 private:
  std::unique_ptr<Policy> OnDevice(const char* name, Scale scale) const {
    return Policy::Create(name, config_, scale, ComputeDType(device())).value();
  }
};

TEST_P(CudaGradientTest, SharedTreeIsCloseToExactAndNoFurtherThanSeparateSequences) {
  CompareBothWithExact(Scale::kInitial, Limit());
}

TEST_P(CudaGradientTest, SoItIsWhereLayersPassOnAllOfTheirError) {
  CompareBothWithExact(Scale::kLarge, Limit(tolerance::kBf16GradientOfLargeWeights,
                                            tolerance::kF16GradientOfLargeWeights));
}

TEST_P(CudaGradientTest, TwoRunsAndEveryLevelOfMemoryGiveEqualBits) {
  const auto cuda = Cuda(Scale::kLarge);
  const std::vector<float> once = cuda->Gradients(request_, /*share=*/true);
  EXPECT_EQ(cuda->Gradients(request_, /*share=*/true), once);
  // Hardly anything is kept: rows of at most 1,024 tokens, the least level of memory.
  const int64_t least = Activations::SizeBytes(config_, {ComputeDType(device()), DType::kF32}, 1024,
                                               1024, Retain::kInputs);
  EXPECT_EQ(cuda->Gradients(request_, /*share=*/true, least), once);
}

TEST_P(CudaGradientTest, BranchesBehindTheirPromptAreAsClose) {
  const std::vector<float> exact = Cpu(Scale::kInitial)->Gradients(request_, /*share=*/true);
  const auto cuda = Cuda(Scale::kInitial);
  const int64_t rows = FewestRows();
  const std::vector<float> cut = cuda->Gradients(request_, /*share=*/true, 0, rows);
  EXPECT_LE(Compare(config_, cut, exact).worst, Limit());
  EXPECT_EQ(cuda->Gradients(request_, /*share=*/true, 0, rows), cut);

  for (TrainGroup& group : request_.groups) cuda->Keep(group);
  const std::vector<float> kept = cuda->Gradients(request_, /*share=*/true);
  EXPECT_LE(Compare(config_, kept, exact).worst, Limit());
}

// Not on a device that computes in f16.
class Bf16MatricesTest : public CudaGradientTest {};

// Each tree that runs rounds its sum once.
TEST_P(Bf16MatricesTest, MatricesInBf16AddOneRoundingATree) {
  const auto cuda = Cuda(Scale::kLarge);
  for (const int64_t max_rows : {int64_t{16384}, FewestRows()}) {
    const std::vector<float> f32 = cuda->Gradients(request_, /*share=*/true, 0, max_rows);
    const std::vector<float> bf16 =
        cuda->Gradients(request_, /*share=*/true, 0, max_rows, DType::kBF16);
    EXPECT_LE(Compare(config_, bf16, f32).worst, tolerance::kBf16Gradient / 2);
    EXPECT_NE(bf16, f32) << "the flag was ignored";
  }
}

std::string CaseName(const testing::TestParamInfo<Parameter>& info) {
  const auto& [architecture, head_dim] = std::get<0>(info.param);
  return ArchitectureName(Config(architecture, head_dim)) + std::to_string(head_dim) +
         std::get<1>(info.param).name + Name(ComputeDType(std::get<2>(info.param)));
}

const auto kModels = testing::Values(std::pair(Architecture::kQwen3, int64_t{128}),
                                     std::pair(Architecture::kQwen2, int64_t{64}),
                                     std::pair(Architecture::kLlama, int64_t{64}));
INSTANTIATE_TEST_SUITE_P(Models, CudaGradientTest,
                         testing::Combine(kModels, testing::ValuesIn(kCases),
                                          testing::ValuesIn(kCudaDevices)),
                         CaseName);
INSTANTIATE_TEST_SUITE_P(Models, Bf16MatricesTest,
                         testing::Combine(kModels, testing::ValuesIn(kCases),
                                          testing::Values("cuda")),
                         CaseName);

}  // namespace
}  // namespace coppice
