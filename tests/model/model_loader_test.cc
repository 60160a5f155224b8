#include "kernels/model/model_loader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/base/float16.h"
#include "tests/model/file_builders.h"
#include "tests/support/narrow_ops.h"

namespace coppice {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class ModelLoaderTest : public testing::Test {
 protected:
  // Loads a directory of this configuration and these tensors.
  absl::StatusOr<Model> Load(const std::string& config, const std::vector<TestTensor>& tensors) {
    directory_.Write("config.json", config);
    directory_.Write("model.safetensors", SafetensorsBytes(tensors));
    return LoadModel(directory_.path(), *ops_);
  }
  std::vector<TestTensor> Tensors(absl::string_view type) const {
    return HfTestTensors(*ParseHfConfig(SmallConfigJson(type)));
  }
  void ExpectError(const std::vector<TestTensor>& tensors, absl::StatusCode code,
                   const char* message) {
    const auto model = Load(SmallConfigJson("llama"), tensors);
    EXPECT_EQ(model.status().code(), code) << model.status();
    EXPECT_THAT(std::string(model.status().message()), HasSubstr(message));
  }

  TempDirectory directory_;
  std::unique_ptr<ops::Ops> ops_ = *ops::CreateOps("cpu");
};

TEST_F(ModelLoaderTest, PutsEveryTensorIntoItsSlice) {
  for (const char* type : {"llama", "qwen2", "qwen3"}) {
    const auto model = Load(SmallConfigJson(type), Tensors(type));
    ASSERT_TRUE(model.ok()) << model.status();
    for (const NamedTensor& t : HfTensors(model->config, model->params)) {
      for (int64_t i = 0; i < t.view.num_elements(); ++i) {
        ASSERT_EQ(t.view.f32()[i], static_cast<float>(i) / 1000) << t.name;
      }
    }
    EXPECT_EQ(model->tokenizer, nullptr);
  }
}

TEST_F(ModelLoaderTest, RoundsWeightsToTheDevicesType) {
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    ops_ = std::make_unique<NarrowOps>(dtype);
    const auto model = Load(SmallConfigJson("qwen3"), Tensors("qwen3"));
    ASSERT_TRUE(model.ok()) << model.status();
    for (const NamedTensor& t : HfTensors(model->config, model->params)) {
      ASSERT_EQ(t.view.dtype, dtype);
      for (int64_t i = 0; i < t.view.num_elements(); ++i) {
        const uint16_t want = Bits16FromFloat(dtype, static_cast<float>(i) / 1000);
        ASSERT_EQ(t.view.as<uint16_t>()[i], want) << t.name << " " << i;
      }
    }
  }
}

TEST_F(ModelLoaderTest, WeightsBeyondF16AreRefusedByName) {
  ops_ = std::make_unique<NarrowOps>(DType::kF16);
  std::vector<TestTensor> tensors = Tensors("llama");
  for (const auto& [value, fits] : {std::pair(-65504.0f, true), {70000.0f, false}}) {
    const std::string bytes = FloatBytes({value});
    std::copy(bytes.begin(), bytes.end(), tensors[1].data.begin());
    const auto model = Load(SmallConfigJson("llama"), tensors);
    ASSERT_EQ(model.ok(), fits) << model.status();
    if (fits) continue;
    EXPECT_EQ(model.status().code(), absl::StatusCode::kInvalidArgument);
    for (const char* part : {tensors[1].name.c_str(), "got 70000", "--compute_dtype=bf16"}) {
      EXPECT_THAT(std::string(model.status().message()), HasSubstr(part));
    }
  }
}

TEST_F(ModelLoaderTest, ComputesInTheTypeOfACheckpointsMatrices) {
  const auto write = [&](const char* config, const char* matrix, const char* vector) {
    const auto tensor = [](const char* name, const char* type, std::vector<int64_t> shape) {
      const size_t bytes = type[0] == 'F' && type[1] == '3' ? 64 : 32;
      return TestTensor{
          .name = name, .type = type, .shape = std::move(shape), .data = std::string(bytes, '\0')};
    };
    directory_.Write("config.json", config);
    directory_.Write("model.safetensors",
                     SafetensorsBytes({tensor("a", "F32", {4, 4}), tensor("b", matrix, {4, 4}),
                                       tensor("c", vector, {16})}));
    return *ComputeTypeOf(directory_.path());
  };
  EXPECT_EQ(write("{}", "F32", "BF16").dtype, DType::kF16);
  EXPECT_EQ(write("{}", "F32", "BF16").because, "weights stored as f32");
  EXPECT_EQ(write("{}", "F16", "F32").dtype, DType::kF16);
  EXPECT_EQ(write("{}", "F16", "F32").because, "weights stored as f32, f16");
  EXPECT_EQ(write("{}", "BF16", "F32").dtype, DType::kBF16);
  EXPECT_EQ(write(R"({"dtype": "float32"})", "F16", "F32").dtype, DType::kF16);
  for (const char* config : {R"({"dtype": "bfloat16"})", R"({"torch_dtype": "bfloat16"})"}) {
    const ComputeType type = write(config, "F32", "F32");
    EXPECT_EQ(type.dtype, DType::kBF16);
    EXPECT_THAT(type.because, HasSubstr("dtype bfloat16 in config.json"));
  }
  const std::string field = kComputeTypeField;
  for (const char* name : {"bf16", "f16"}) {
    const ComputeType type = write(
        ("{\"dtype\": \"float32\", \"" + field + "\": \"" + name + "\"}").c_str(), "F32", "F32");
    EXPECT_EQ(Name(type.dtype), name);
    EXPECT_THAT(type.because, HasSubstr(field + " " + name));
  }
  directory_.Write("config.json", "{\"" + field + "\": \"f8\"}");
  EXPECT_THAT(std::string(ComputeTypeOf(directory_.path()).status().message()),
              HasSubstr("want bf16 or f16, got f8"));
  directory_.Write("config.json", R"({"dtype": 16})");
  EXPECT_EQ(ComputeTypeOf(directory_.path()).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ComputeTypeOf("/no/such/model").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(ModelLoaderTest, ComputesAQuantisedGgufInF16AndOneWithBf16InBf16) {
  for (const bool bf16 : {false, true}) {
    const ComputeType type =
        *ComputeTypeOf(directory_.Write("m.gguf", SmallLlamaGguf(bf16).Build()));
    EXPECT_EQ(type.dtype, bf16 ? DType::kBF16 : DType::kF16);
    EXPECT_EQ(type.because, bf16 ? "weights stored as f16, bf16, q8_0, q4_0, q4_1"
                                 : "weights stored as f16, q8_0, q4_0, q4_1");
  }
}

TEST_F(ModelLoaderTest, ReadsStopTokensAndChatTemplateBesideTheWeights) {
  directory_.Write("generation_config.json", R"({"eos_token_id": [3, 5]})");
  directory_.Write("tokenizer_config.json", R"({"chat_template": [{"name": "tool", "template": "T"},
                                                {"name": "default", "template": "D"}]})");
  const auto model = Load(SmallConfigJson("llama"), Tensors("llama"));
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_THAT(model->config.eos_tokens, ElementsAre(2, 3, 5));
  EXPECT_EQ(model->chat_template, "D");
  directory_.Write("chat_template.jinja", "J");
  EXPECT_EQ(LoadModel(directory_.path(), *ops_)->chat_template, "J");
}

TEST_F(ModelLoaderTest, WeightsOfAnotherModelAreRefusedByName) {
  std::vector<TestTensor> tensors = Tensors("llama");
  std::vector<TestTensor> missing(tensors.begin() + 1, tensors.end());
  ExpectError(missing, absl::StatusCode::kNotFound, "model.embed_tokens.weight");
  std::vector<TestTensor> extra = tensors;
  extra.push_back({.name = "model.layers.0.self_attn.q_proj.bias",
                   .type = "F32",
                   .shape = {1},
                   .data = FloatBytes({0})});
  ExpectError(extra, absl::StatusCode::kInvalidArgument, "q_proj.bias");
  std::swap(tensors[0].shape[0], tensors[0].shape[1]);
  ExpectError(tensors, absl::StatusCode::kInvalidArgument, "want shape [11, 32], got [32, 11]");
}

TEST_F(ModelLoaderTest, WeightsThatAreNotFiniteAreDataLoss) {
  for (const float bad :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    std::vector<TestTensor> tensors = Tensors("llama");
    tensors[3].data.replace(40, 4, FloatBytes({bad}));
    ExpectError(tensors, absl::StatusCode::kDataLoss, "want finite weights");
  }
}

TEST_F(ModelLoaderTest, LoadsAWholeGguf) {
  const auto model = LoadModel(directory_.Write("m.gguf", SmallLlamaGguf().Build()), *ops_);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_TRUE(model->config.tied_head);
  EXPECT_EQ(model->config.vocab, 4);
  EXPECT_THAT(model->config.eos_tokens, ElementsAre(0));
  EXPECT_EQ(model->chat_template, "{{ messages }}");
  ASSERT_NE(model->tokenizer, nullptr);
  EXPECT_THAT(model->tokenizer->Encode("ab<s>ba", true), ElementsAre(3, 0, 2, 1));
}

TEST_F(ModelLoaderTest, MissingFilesAreNotFound) {
  EXPECT_EQ(LoadModel("/no/such/model", *ops_).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(LoadModel(directory_.path(), *ops_).status().code(), absl::StatusCode::kNotFound);
  directory_.Write("config.json", SmallConfigJson("llama"));
  EXPECT_EQ(LoadModel(directory_.path(), *ops_).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(ModelLoaderTest, UnknownArchitecturesAreUnimplemented) {
  EXPECT_EQ(Load(SmallConfigJson("mamba"), Tensors("llama")).status().code(),
            absl::StatusCode::kUnimplemented);
  const std::string gguf = GgufBuilder().String("general.architecture", "rwkv").Build();
  const auto model = LoadModel(directory_.Write("m.gguf", gguf), *ops_);
  EXPECT_EQ(model.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(model.status().message()), HasSubstr("rwkv"));
}

TEST_F(ModelLoaderTest, RandomWeightsDependOnTheSeedAlone) {
  const ModelConfig config = *NamedGeometry("tiny-qwen3");
  const auto a = RandomModel(config, 7, *ops_), b = RandomModel(config, 7, *ops_),
             c = RandomModel(config, 8, *ops_);
  ASSERT_TRUE(a.ok() && b.ok() && c.ok());
  const auto values = [](const Model& m) {
    return std::vector<float>(m.params.flat.f32(),
                              m.params.flat.f32() + m.params.flat.num_elements());
  };
  EXPECT_EQ(values(*a), values(*b));
  EXPECT_NE(values(*a), values(*c));
  // Mean 0 and deviation 0.02 within five standard errors of 19,200 draws.
  double sum = 0, square = 0;
  const TensorView table = a->params.embedding;
  const double n = static_cast<double>(table.num_elements());
  for (int64_t i = 0; i < table.num_elements(); ++i) {
    sum += table.f32()[i];
    square += static_cast<double>(table.f32()[i]) * table.f32()[i];
  }
  EXPECT_LT(std::abs(sum / n), 5 * 0.02 / std::sqrt(n));
  EXPECT_LT(std::abs(std::sqrt(square / n) / 0.02 - 1), 5 / std::sqrt(2 * n));
  EXPECT_EQ(a->params.final_norm.f32()[5], 1.0f);
}

}  // namespace
}  // namespace coppice
