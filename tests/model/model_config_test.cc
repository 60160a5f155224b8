#include "kernels/model/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "kernels/model/parameters.h"
#include "tests/model/file_builders.h"

namespace coppice {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string WithField(const std::string& json, absl::string_view field) {
  return absl::StrCat(json.substr(0, json.rfind('}')), ", ", field, "}");
}

TEST(ModelConfigTest, ReadsEveryFieldOfLlama) {
  const auto config = ParseHfConfig(SmallConfigJson("llama"));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->architecture, Architecture::kLlama);
  EXPECT_EQ(config->num_layers, 2);
  EXPECT_EQ(config->q_heads, 4);
  EXPECT_EQ(config->kv_heads, 2);
  EXPECT_EQ(config->head_dim, 8);
  EXPECT_EQ(config->qkv_dim(), 64);
  EXPECT_EQ(config->max_positions, 64);
  EXPECT_DOUBLE_EQ(config->rope.theta, 500.0);
  EXPECT_FLOAT_EQ(config->rms_eps, 1e-5f);
  EXPECT_FALSE(config->tied_head || config->qkv_bias || config->qk_norm);
  EXPECT_EQ(config->bos_token, 1);
  EXPECT_THAT(config->eos_tokens, ElementsAre(2, 3));
}

TEST(ModelConfigTest, ArchitectureDecidesBiasesAndNorms) {
  const auto qwen2 = ParseHfConfig(SmallConfigJson("qwen2"));
  const auto qwen3 = ParseHfConfig(WithField(SmallConfigJson("qwen3"), R"("head_dim": 16)"));
  ASSERT_TRUE(qwen2.ok() && qwen3.ok());
  EXPECT_TRUE(qwen2->qkv_bias && !qwen2->qk_norm);
  EXPECT_TRUE(qwen3->qk_norm && !qwen3->qkv_bias);
  EXPECT_EQ(qwen3->head_dim, 16);
}

TEST(ModelConfigTest, ReadsRopeScalingOfOldAndNewTransformers) {
  const auto old_style = ParseHfConfig(
      WithField(SmallConfigJson("llama"), R"("rope_scaling": {"type": "linear", "factor": 4.0})"));
  ASSERT_TRUE(old_style.ok()) << old_style.status();
  EXPECT_EQ(old_style->rope.scaling, RopeConfig::Scaling::kLinear);
  EXPECT_DOUBLE_EQ(old_style->rope.factor, 4.0);
  const auto new_style = ParseHfConfig(WithField(
      SmallConfigJson("llama"),
      R"("rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32})"));
  ASSERT_TRUE(new_style.ok()) << new_style.status();
  EXPECT_EQ(new_style->rope.scaling, RopeConfig::Scaling::kLlama3);
  EXPECT_DOUBLE_EQ(new_style->rope.theta, 5e5);
  EXPECT_EQ(new_style->rope.original_max_positions, 32);
}

TEST(ModelConfigTest, WhatWeCannotRunIsUnimplementedAndNamed) {
  struct Case {
    const char* field;
    const char* message;
  };
  for (const Case& c : {Case{R"("rope_scaling": {"rope_type": "yarn", "factor": 2})", "yarn"},
                        Case{R"("attention_bias": true)", "attention_bias"},
                        Case{R"("mlp_bias": true)", "mlp_bias"},
                        Case{R"("use_sliding_window": true)", "use_sliding_window"},
                        Case{R"("hidden_act": "gelu")", "hidden_act"},
                        Case{R"("partial_rotary_factor": 0.5)", "partial_rotary_factor"}}) {
    const auto config = ParseHfConfig(WithField(SmallConfigJson("llama"), c.field));
    EXPECT_EQ(config.status().code(), absl::StatusCode::kUnimplemented) << c.field;
    EXPECT_THAT(std::string(config.status().message()), HasSubstr(c.message));
  }
  const auto unknown = ParseHfConfig(SmallConfigJson("mamba"));
  EXPECT_EQ(unknown.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(unknown.status().message()), HasSubstr("llama, qwen2, qwen3"));
}

TEST(ModelConfigTest, NonsenseIsInvalidAndNamesTheField) {
  struct Case {
    const char* from;
    const char* to;
    const char* field;
  };
  for (const Case& c :
       {Case{"\"hidden_size\": 32", "\"hidden_size\": -32", "hidden"},
        Case{"\"hidden_size\": 32", "\"hidden_size\": \"32\"", "hidden_size"},
        Case{"\"hidden_size\": 32", "\"hidden_size\": 99999999999999", "hidden"},
        Case{"\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", "q_heads"},
        Case{"\"num_hidden_layers\": 2", "\"num_hidden_layers\": 0", "num_layers"},
        Case{"\"rms_norm_eps\": 1e-5", "\"rms_norm_eps\": -1", "rms_eps"},
        Case{"\"rope_theta\": 500.0", "\"rope_theta\": 0", "rope"},
        Case{"[2, 3]", "[2, 11]", "eos_tokens"}, Case{"[2, 3]", "[2, \"x\"]", "eos_token_id"},
        Case{"\"vocab_size\": 11", "\"vocab_size\": 1.5", "vocab_size"}}) {
    const std::string json = absl::StrReplaceAll(SmallConfigJson("llama"), {{c.from, c.to}});
    const auto config = ParseHfConfig(json);
    EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument) << c.to;
    EXPECT_THAT(std::string(config.status().message()), HasSubstr(c.field));
  }
  EXPECT_EQ(ParseHfConfig("{").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ParseHfConfig("[]").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(ModelConfigTest, NamedGeometriesAreValidAndHaveTheirPublishedSize) {
  struct Case {
    const char* name;
    double millions;
  };
  for (const Case& c : {Case{"smollm2-135m", 134.5}, Case{"qwen3-4b", 4022.5}}) {
    const auto config = NamedGeometry(c.name);
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_TRUE(config->Validate().ok());
    EXPECT_NEAR(static_cast<double>(NumParameters(*config)) / 1e6, c.millions, 0.05) << c.name;
  }
  for (const char* name : {"tiny-llama", "tiny-qwen2", "tiny-qwen3"}) {
    const auto config = NamedGeometry(name);
    ASSERT_TRUE(config.ok());
    EXPECT_TRUE(config->Validate().ok());
  }
  EXPECT_EQ(NamedGeometry("gpt-5").status().code(), absl::StatusCode::kNotFound);
}

TEST(ParametersTest, TensorsTileTheArenaWithoutOverlap) {
  for (const char* name : {"tiny-llama", "tiny-qwen2", "tiny-qwen3"}) {
    const ModelConfig config = *NamedGeometry(name);
    std::vector<float> arena(NumParameterElements(config), 0.0f);
    const Parameters params = MapParameters(config, arena.data(), DType::kF32);
    EXPECT_EQ(params.flat.num_elements(), NumParameterElements(config));
    int64_t elements = 0;
    for (const NamedTensor& t : HfTensors(config, params)) {
      ASSERT_TRUE(t.view.contiguous());
      for (int64_t i = 0; i < t.view.num_elements(); ++i) t.view.f32()[i] += 1;
      elements += t.view.num_elements();
    }
    EXPECT_EQ(elements, NumParameters(config));
    EXPECT_EQ(std::count(arena.begin(), arena.end(), 1.0f), elements) << name;
    EXPECT_EQ(std::count(arena.begin(), arena.end(), 0.0f), std::ssize(arena) - elements) << name;
    EXPECT_EQ(params.head.data == params.embedding.data, config.tied_head);
  }
}

TEST(ParametersTest, EveryMergedTensorStartsAtAMultipleOf64) {
  const ModelConfig config = *NamedGeometry("tiny-qwen2");
  std::vector<float> arena(NumParameterElements(config));
  const Parameters params = MapParameters(config, arena.data(), DType::kF32);
  for (const LayerParameters& l : params.layers) {
    for (const TensorView& t :
         {l.attn_norm, l.qkv, l.qkv_bias, l.o, l.mlp_norm, l.gate_up, l.down}) {
      EXPECT_EQ((t.f32() - arena.data()) % 64, 0);
    }
  }
}

}  // namespace
}  // namespace coppice
