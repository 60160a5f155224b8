#include "server/engine/validate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

namespace coppice {
namespace {

using ::testing::HasSubstr;

constexpr GenerateLimits kLimits = {.vocab = 100,
                                    .max_context = 64,
                                    .max_group_size = 8,
                                    .num_blocks = 3,
                                    .block_tokens = 16,
                                    .has_tokenizer = true};

GenerateRequest Good() {
  GenerateRequest request;
  request.prompt = {1, 2, 3};
  request.sampling.max_tokens = 4;
  return request;
}

TEST(ValidateGenerateTest, AcceptsAGoodRequest) {
  EXPECT_TRUE(ValidateGenerate(Good(), kLimits).ok());
}

TEST(ValidateGenerateTest, RefusesEachBadFieldByName) {
  struct Case {
    const char* message;
    std::function<void(GenerateRequest&)> spoil;
  };
  const std::vector<Case> cases = {
      {"prompt: want at least 1 token, got 0", [](auto& r) { r.prompt.clear(); }},
      {"prompt[1]: want token ids in [0, 100), got 100", [](auto& r) { r.prompt[1] = 100; }},
      {"prompt[0]: want token ids in [0, 100), got -1", [](auto& r) { r.prompt[0] = -1; }},
      {"context of 64, got 64", [](auto& r) { r.prompt.assign(64, 1); }},
      {"n: want 1 to 8 samples, got 0", [](auto& r) { r.n = 0; }},
      {"n: want 1 to 8 samples, got 9", [](auto& r) { r.n = 9; }},
      {"max_tokens: want at least 1, got 0", [](auto& r) { r.sampling.max_tokens = 0; }},
      {"temperature", [](auto& r) { r.sampling.temperature = std::nanf(""); }},
      {"temperature", [](auto& r) { r.sampling.temperature = -1; }},
      {"temperature",
       [](auto& r) { r.sampling.temperature = std::numeric_limits<float>::infinity(); }},
      {"top_p", [](auto& r) { r.sampling.top_p = 0; }},
      {"top_p", [](auto& r) { r.sampling.top_p = 1.5f; }},
      {"top_p", [](auto& r) { r.sampling.top_p = std::nanf(""); }},
      {"min_p", [](auto& r) { r.sampling.min_p = 1; }},
      {"top_k", [](auto& r) { r.sampling.top_k = -1; }},
      {"logit_bias", [](auto& r) { r.sampling.logit_bias[100] = 1; }},
      {"logit_bias", [](auto& r) { r.sampling.logit_bias[1] = std::nanf(""); }},
      {"stop_token_ids", [](auto& r) { r.sampling.stop_token_ids = {100}; }},
      {"stop_strings", [](auto& r) { r.sampling.stop_strings = {""}; }},
      {"top_logprobs", [](auto& r) { r.top_logprobs = 21; }},
      {"cache priority", [](auto& r) { r.cache_priority = 101; }},
      {"cache ttl", [](auto& r) { r.cache_ttl = absl::ZeroDuration(); }},
      {"need 4 blocks of 16 tokens for prompt + max_tokens = 63, have 3",
       [](auto& r) { r.sampling.max_tokens = 60; }},
  };
  for (const Case& c : cases) {
    GenerateRequest request = Good();
    c.spoil(request);
    const absl::Status status = ValidateGenerate(request, kLimits);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << c.message;
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.message));
  }
}

TEST(ValidateGenerateTest, TextNeedsATokenizer) {
  GenerateLimits limits = kLimits;
  limits.has_tokenizer = false;
  GenerateRequest request = Good();
  request.return_text = true;
  EXPECT_FALSE(ValidateGenerate(request, limits).ok());
  request.return_text = false;
  request.sampling.stop_strings = {"x"};
  EXPECT_FALSE(ValidateGenerate(request, limits).ok());
}

}  // namespace
}  // namespace coppice
