#include "server/rpc/convert.h"

#include <limits>
#include <random>
#include <string>

#include "gmock/gmock.h"
#include "google/protobuf/stubs/logging.h"
#include "gtest/gtest.h"
#include "server/engine/validate.h"
#include "tests/support/byte_tokenizer.h"

namespace coppice {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

class ConvertTest : public ::testing::Test {
 protected:
  v1::GenerateRequest Generate() const {
    v1::GenerateRequest proto;
    for (const int id : {1, 2, 3}) proto.mutable_prompt()->mutable_tokens()->add_ids(id);
    proto.mutable_sampling()->set_max_tokens(8);
    return proto;
  }

  v1::TrainStepRequest Step() const {
    v1::TrainStepRequest proto;
    proto.set_step_id("step-1");
    proto.mutable_optim()->set_learning_rate(1e-3f);
    v1::Group* group = proto.add_groups();
    for (const int id : {1, 2}) group->mutable_prompt()->add_ids(id);
    for (const float reward : {1.0f, 0.0f}) {
      v1::Sample* sample = group->add_samples();
      for (const int id : {5, 6, 7}) sample->mutable_token_ids()->add_ids(id);
      sample->set_reward(reward);
    }
    return proto;
  }

  // One sample with given advantages instead of rewards.
  v1::TrainStepRequest StepWithAdvantages(const std::vector<float>& advantages) const {
    v1::TrainStepRequest proto = Step();
    proto.mutable_groups(0)->mutable_samples()->RemoveLast();
    v1::Sample* sample = proto.mutable_groups(0)->mutable_samples(0);
    sample->clear_reward();
    sample->mutable_advantages()->Add(advantages.begin(), advantages.end());
    return proto;
  }

  template <typename Proto>
  void ExpectRefused(const Proto& proto, const std::string& field,
                     absl::StatusCode code = absl::StatusCode::kInvalidArgument) {
    const absl::Status status = FromProto(proto, tenant_, limits_).status();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_EQ(std::string(status.message()).rfind(field, 0), 0u) << status << " want " << field;
    EXPECT_THAT(std::string(status.message()), HasSubstr(": want "));
    EXPECT_THAT(std::string(status.message()), HasSubstr(", got "));
  }

  ByteTokenizer tokenizer_;
  RequestLimits limits_{.vocab = 257, .max_context = 64, .tokenizer = &tokenizer_};
  Tenant tenant_{.salt = "tenant:a", .prefix = "a/"};
};

TEST_F(ConvertTest, AbsentFieldsTakeTheDocumentedDefaults) {
  const auto request = FromProto(Generate(), tenant_, limits_);
  ASSERT_TRUE(request.ok()) << request.status();
  EXPECT_EQ(request->n, 1);
  EXPECT_EQ(request->sampling.temperature, 1);
  EXPECT_EQ(request->sampling.top_p, 1);
  EXPECT_EQ(request->sampling.seed, std::nullopt);
  EXPECT_EQ(request->logprobs, LogprobMode::kNone);
  EXPECT_EQ(request->cache_priority, 35);
  EXPECT_EQ(request->cache_ttl, std::nullopt);
  EXPECT_EQ(request->tenant_salt, "tenant:a");
  EXPECT_EQ(request->request_id, "");
}

TEST_F(ConvertTest, EveryGenerateFieldArrives) {
  v1::GenerateRequest proto = Generate();
  proto.set_request_id("r1");
  proto.set_session_id("s1");
  proto.mutable_prompt()->mutable_suffix()->add_ids(9);
  proto.set_n(4);
  v1::SamplingParams* sampling = proto.mutable_sampling();
  sampling->set_temperature(0);
  sampling->set_top_k(5);
  sampling->set_top_p(0.5f);
  sampling->set_min_p(0.25f);
  sampling->set_seed(0);
  sampling->add_stop_token_ids(11);
  sampling->add_stop_strings("END");
  sampling->set_ignore_eos(true);
  (*sampling->mutable_logit_bias())[12] = -2.5f;
  proto.set_logprobs(v1::LOGPROB_MODE_AS_SAMPLED);
  proto.set_top_logprobs(3);
  proto.mutable_cache()->set_skip_read(true);
  proto.mutable_cache()->set_priority(0);
  proto.mutable_cache()->mutable_ttl()->set_nanos(500'000'000);
  proto.set_priority(-3);
  proto.set_retain(true);
  proto.set_return_text(true);

  const auto request = FromProto(proto, tenant_, limits_);

  ASSERT_TRUE(request.ok()) << request.status();
  EXPECT_EQ(request->request_id, "a/r1");
  EXPECT_EQ(request->session_id, "a/s1");
  EXPECT_THAT(request->prompt, ElementsAre(1, 2, 3, 9));
  EXPECT_EQ(request->n, 4);
  EXPECT_EQ(request->sampling.temperature, 0);
  EXPECT_EQ(request->sampling.top_k, 5);
  EXPECT_EQ(request->sampling.top_p, 0.5f);
  EXPECT_EQ(request->sampling.min_p, 0.25f);
  EXPECT_EQ(request->sampling.seed, 0u);
  EXPECT_EQ(request->sampling.max_tokens, 8);
  EXPECT_THAT(request->sampling.stop_token_ids, ElementsAre(11));
  EXPECT_THAT(request->sampling.stop_strings, ElementsAre("END"));
  EXPECT_TRUE(request->sampling.ignore_eos);
  EXPECT_EQ(request->sampling.logit_bias.at(12), -2.5f);
  EXPECT_EQ(request->logprobs, LogprobMode::kAsSampled);
  EXPECT_EQ(request->top_logprobs, 3);
  EXPECT_TRUE(request->cache_skip_read);
  EXPECT_EQ(request->cache_priority, 0);
  EXPECT_EQ(request->cache_ttl, absl::Milliseconds(500));
  EXPECT_EQ(request->priority, -3);
  EXPECT_TRUE(request->retain);
  EXPECT_TRUE(request->return_text);
}

TEST_F(ConvertTest, TextPromptsAreTokenizedAndContinued) {
  v1::GenerateRequest proto = Generate();
  proto.mutable_prompt()->set_text("ab");
  proto.mutable_prompt()->mutable_suffix()->add_ids(7);
  EXPECT_THAT(FromProto(proto, tenant_, limits_)->prompt,
              ElementsAre(ByteTokenizer::kBos, 'a', 'b', 7));
}

TEST_F(ConvertTest, TextIsRefusedBeforeItIsTokenized) {
  v1::GenerateRequest proto = Generate();
  proto.mutable_prompt()->set_text(std::string(1'000'000, 'x'));
  ExpectRefused(proto, "prompt.text: want at most");
  limits_.tokenizer = nullptr;
  ExpectRefused(proto, "prompt.text", absl::StatusCode::kFailedPrecondition);
}

TEST_F(ConvertTest, BadNamesAndCacheFieldsAreRefused) {
  v1::GenerateRequest proto = Generate();
  proto.set_request_id("two\nlines");
  ExpectRefused(proto, "request_id: want printable ASCII");
  proto = Generate();
  proto.set_session_id(std::string(257, 'x'));
  ExpectRefused(proto, "session_id");
  proto = Generate();
  proto.set_priority(1001);
  ExpectRefused(proto, "priority");
  proto = Generate();
  proto.mutable_cache()->mutable_ttl()->set_seconds(0);
  ExpectRefused(proto, "cache.ttl");
  proto = Generate();
  proto.set_logprobs(static_cast<v1::LogprobMode>(77));
  ExpectRefused(proto, "logprobs");
  proto = Generate();
  proto.set_top_logprobs(3);
  ExpectRefused(proto, "logprobs: want RAW or AS_SAMPLED");
}

// The limit is of the name that the client gave, not of what the engine is told.
TEST_F(ConvertTest, NamesOfFullLengthFitBesideATenant) {
  v1::GenerateRequest proto = Generate();
  proto.set_request_id(std::string(256, 'r'));
  proto.set_session_id(std::string(256, 's'));
  const auto request = FromProto(proto, tenant_, limits_);
  ASSERT_TRUE(request.ok()) << request.status();
  const absl::Status status = ValidateGenerate(*request, {.vocab = limits_.vocab,
                                                          .max_context = 64,
                                                          .max_group_size = 1,
                                                          .num_blocks = 4,
                                                          .block_tokens = 16,
                                                          .has_tokenizer = true});
  EXPECT_TRUE(status.ok()) << status;
}

TEST_F(ConvertTest, TrainStepTakesTheDocumentedDefaults) {
  const auto step = FromProto(Step(), tenant_, limits_);
  ASSERT_TRUE(step.ok()) << step.status();
  EXPECT_EQ(step->step_id, "a/step-1");
  EXPECT_EQ(step->tenant_salt, "tenant:a");
  EXPECT_EQ(step->running, RunningRequests::kDrain);
  EXPECT_EQ(step->batch.loss.kind, LossConfig::Kind::kGrpo);
  EXPECT_EQ(step->batch.loss.advantage, LossConfig::Advantage::kGroupNormalized);
  EXPECT_EQ(step->batch.loss.aggregation, LossConfig::Aggregation::kSeqMeanTokenMean);
  EXPECT_EQ(step->batch.loss.kl, LossConfig::KlEstimator::kNone);
  EXPECT_EQ(step->optim.beta2, 0.95f);
  EXPECT_EQ(step->optim.grad_clip_norm, 1);
  EXPECT_EQ(step->expected_policy_version, std::nullopt);
  ASSERT_EQ(step->batch.groups.size(), 1u);
  EXPECT_THAT(step->batch.groups[0].prompt, ElementsAre(1, 2));
  EXPECT_THAT(step->batch.groups[0].samples[1].tokens, ElementsAre(5, 6, 7));
  EXPECT_EQ(step->batch.groups[0].samples[1].reward, 0.0f);
  EXPECT_EQ(step->rollout_ids[0], "");
}

TEST_F(ConvertTest, LossDefaultsDependOnTheKind) {
  v1::TrainStepRequest proto = Step();
  proto.mutable_loss()->set_kind(v1::LossConfig::DAPO);
  EXPECT_EQ(FromProto(proto, tenant_, limits_)->batch.loss.clip_high, 0.28f);
  EXPECT_EQ(FromProto(proto, tenant_, limits_)->batch.loss.aggregation,
            LossConfig::Aggregation::kTokenMean);
  proto.mutable_loss()->set_kind(v1::LossConfig::DR_GRPO);
  EXPECT_EQ(FromProto(proto, tenant_, limits_)->batch.loss.advantage,
            LossConfig::Advantage::kGroupCentered);
  EXPECT_EQ(FromProto(proto, tenant_, limits_)->batch.loss.aggregation,
            LossConfig::Aggregation::kSeqMeanTokenSum);

  v1::TrainStepRequest cross_entropy = StepWithAdvantages({});
  cross_entropy.mutable_loss()->set_kind(v1::LossConfig::CROSS_ENTROPY);
  EXPECT_THAT(FromProto(cross_entropy, tenant_, limits_)->batch.groups[0].samples[0].advantages,
              ElementsAre(1.0f));
}

TEST_F(ConvertTest, RolloutGroupsNameSamples) {
  v1::TrainStepRequest proto = Step();
  proto.mutable_groups(0)->set_rollout_id("rollout-3");
  ExpectRefused(proto, "groups[0].samples[0].tokens");
  proto.mutable_groups(0)->mutable_samples(0)->set_rollout_sample(4);
  proto.mutable_groups(0)->mutable_samples(1)->set_rollout_sample(2);

  const auto step = FromProto(proto, tenant_, limits_);

  ASSERT_TRUE(step.ok()) << step.status();
  EXPECT_THAT(step->rollout_ids, ElementsAre("rollout-3"));
  EXPECT_THAT(step->rollout_samples[0], ElementsAre(4, 2));
  EXPECT_TRUE(step->batch.groups[0].samples[0].tokens.empty());
  proto.mutable_groups(0)->mutable_samples(1)->set_rollout_sample(-1);
  ExpectRefused(proto, "groups[0].samples[1].rollout_sample");
}

TEST_F(ConvertTest, BadAdvantagesAreRefused) {
  ExpectRefused(StepWithAdvantages({1, 2}), "groups[0].samples[0].advantages: want 1 or 3");
  ExpectRefused(StepWithAdvantages({1, 2, 3, 4}), "groups[0].samples[0].advantages");
  ExpectRefused(StepWithAdvantages({1, kNan, 3}), "groups[0].samples[0].advantages[1]");
  ExpectRefused(StepWithAdvantages({kInf}), "groups[0].samples[0].advantages[0]");
  ExpectRefused(StepWithAdvantages({}), "groups[0].samples[0].advantages");
  EXPECT_TRUE(FromProto(StepWithAdvantages({1}), tenant_, limits_).ok());
  EXPECT_TRUE(FromProto(StepWithAdvantages({1, 2, 3}), tenant_, limits_).ok());

  v1::TrainStepRequest mixed = Step();
  mixed.mutable_groups(0)->mutable_samples(0)->add_advantages(1);
  ExpectRefused(mixed, "groups[0].samples[0].advantages: want none beside rewards");
  mixed = Step();
  mixed.mutable_groups(0)->mutable_samples(1)->clear_reward();
  ExpectRefused(mixed, "groups[0].samples[1].reward");
}

TEST_F(ConvertTest, BadSamplesAreRefused) {
  const auto refuse = [this](const std::string& field, auto set) {
    v1::TrainStepRequest proto = Step();
    set(*proto.mutable_groups(0)->mutable_samples(1));
    ExpectRefused(proto, "groups[0].samples[1]." + field);
  };
  refuse("token_ids.size", [](v1::Sample& s) { s.mutable_token_ids()->clear_ids(); });
  refuse("token_ids[0]", [](v1::Sample& s) { s.mutable_token_ids()->set_ids(0, 1000); });
  refuse("tokens", [](v1::Sample& s) { s.clear_token_ids(); });
  refuse("reward", [](v1::Sample& s) { s.set_reward(kNan); });
  refuse("weight", [](v1::Sample& s) { s.set_weight(-1); });
  refuse("loss_mask[0]", [](v1::Sample& s) { s.add_loss_mask(-1); });
  refuse("old_logprobs", [](v1::Sample& s) { s.add_old_logprobs(-1); });
  refuse("sampler_logprobs[0]", [](v1::Sample& s) { s.add_sampler_logprobs(-kInf); });
  refuse("ref_logprobs", [](v1::Sample& s) { s.add_ref_logprobs(-1); });
  refuse("token_ids.size", [](v1::Sample& s) {
    while (s.token_ids().ids_size() < 63) s.mutable_token_ids()->add_ids(1);
  });
}

TEST_F(ConvertTest, BadStepsAreRefused) {
  const auto refuse = [this](const std::string& field, auto set) {
    v1::TrainStepRequest proto = Step();
    set(proto);
    ExpectRefused(proto, field);
  };
  refuse("step_id", [](v1::TrainStepRequest& p) { p.clear_step_id(); });
  refuse("step_id", [](v1::TrainStepRequest& p) { p.set_step_id(std::string(257, 'x')); });
  refuse("groups", [](v1::TrainStepRequest& p) { p.clear_groups(); });
  refuse("groups[0].samples",
         [](v1::TrainStepRequest& p) { p.mutable_groups(0)->clear_samples(); });
  refuse("groups[0].prompt.size",
         [](v1::TrainStepRequest& p) { p.mutable_groups(0)->clear_prompt(); });
  refuse("groups[0].rollout_id",
         [](v1::TrainStepRequest& p) { p.mutable_groups(0)->set_rollout_id(""); });
  refuse("optim", [](v1::TrainStepRequest& p) { p.clear_optim(); });
  refuse("optim.learning_rate",
         [](v1::TrainStepRequest& p) { p.mutable_optim()->set_learning_rate(kNan); });
  refuse("optim.beta1", [](v1::TrainStepRequest& p) { p.mutable_optim()->set_beta1(1); });
  refuse("optim.eps", [](v1::TrainStepRequest& p) { p.mutable_optim()->set_eps(0); });
  refuse("optim.grad_clip_norm",
         [](v1::TrainStepRequest& p) { p.mutable_optim()->set_grad_clip_norm(-1); });
  refuse("loss.temperature", [](v1::TrainStepRequest& p) { p.mutable_loss()->set_temperature(0); });
  refuse("loss.clip.low",
         [](v1::TrainStepRequest& p) { p.mutable_loss()->mutable_clip()->set_low(2); });
  refuse("loss.clip.dual",
         [](v1::TrainStepRequest& p) { p.mutable_loss()->mutable_clip()->set_dual(1); });
  refuse("loss.kind", [](v1::TrainStepRequest& p) {
    p.mutable_loss()->set_kind(static_cast<v1::LossConfig::Kind>(99));
  });
  refuse("loss.denominator", [](v1::TrainStepRequest& p) { p.mutable_loss()->set_denominator(0); });
  refuse("loss.denominator", [](v1::TrainStepRequest& p) {
    p.mutable_loss()->set_aggregation(v1::LossConfig::CONSTANT);
  });
  refuse("loss.importance_cap",
         [](v1::TrainStepRequest& p) { p.mutable_loss()->set_importance_cap(-2); });
  refuse("loss.kl.coef",
         [](v1::TrainStepRequest& p) { p.mutable_loss()->mutable_kl()->set_coef(-1); });
  refuse("groups[0].samples[0].ref_logprobs",
         [](v1::TrainStepRequest& p) { p.mutable_loss()->mutable_kl()->set_coef(0.1f); });
  refuse("running",
         [](v1::TrainStepRequest& p) { p.set_running(static_cast<v1::RunningRequests>(9)); });
  refuse("max_policy_lag", [](v1::TrainStepRequest& p) { p.set_max_policy_lag(-1); });
}

TEST_F(ConvertTest, ScoreChecksEveryResponse) {
  v1::ScoreRequest proto;
  EXPECT_FALSE(FromProto(proto, tenant_, limits_).ok());
  v1::ScoreGroup* group = proto.add_groups();
  group->mutable_prompt()->add_ids(1);
  EXPECT_FALSE(FromProto(proto, tenant_, limits_).ok());
  group->add_responses()->add_ids(2);
  EXPECT_EQ(FromProto(proto, tenant_, limits_)->tenant_salt, "tenant:a");
  group->add_responses();
  EXPECT_THAT(std::string(FromProto(proto, tenant_, limits_).status().message()),
              HasSubstr("groups[0].responses[1].size"));
  group->mutable_responses(1)->add_ids(999);
  EXPECT_THAT(std::string(FromProto(proto, tenant_, limits_).status().message()),
              HasSubstr("groups[0].responses[1][0]"));
  group->mutable_responses(1)->set_ids(0, 3);
  proto.set_temperature(0);
  EXPECT_FALSE(FromProto(proto, tenant_, limits_).ok());
}

TEST_F(ConvertTest, EnumsKeepTheirMeaning) {
  SampleFinished finished;
  finished.reason = FinishReason::kStopToken;
  EXPECT_EQ(ToProto(finished).reason(), v1::FINISH_REASON_STOP_TOKEN);
  finished.reason = FinishReason::kPaused;
  EXPECT_EQ(ToProto(finished).reason(), v1::FINISH_REASON_PAUSED);
  Usage usage;
  usage.miss_reason = MissReason::kRoutedElsewhere;
  EXPECT_EQ(ToProto(usage).miss_reason(), v1::MISS_REASON_ROUTED_ELSEWHERE);
  usage.miss_reason = MissReason::kNone;
  EXPECT_EQ(ToProto(usage).miss_reason(), v1::MISS_REASON_UNSPECIFIED);
  EXPECT_EQ(ToGrpcStatus(absl::UnavailableError("x")).error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(ToGrpcStatus(absl::DataLossError("x")).error_code(), grpc::StatusCode::DATA_LOSS);
}

TEST_F(ConvertTest, TrainResultArrives) {
  TrainStepResult result;
  result.policy_version = PolicyVersion{4};
  result.grad_norm = 2;
  result.batch.loss = -0.5;
  result.batch.metrics["kl"] = 0.125;
  result.batch.tokens = {.flat = 20, .unique = 12, .prompt_forward_skipped = 3, .with_loss = 9};
  result.batch.phases = {{"forward", 1.5}};
  result.batch.samples = {{{-1.0f, -2.0f}, 0.75, 0.25}};
  v1::TrainStepResponse proto;

  ToProto(result, &proto);

  EXPECT_EQ(proto.policy_version(), 4u);
  EXPECT_EQ(proto.loss(), -0.5);
  EXPECT_EQ(proto.grad_norm(), 2);
  EXPECT_EQ(proto.metrics().at("kl"), 0.125);
  EXPECT_EQ(proto.tokens().unique(), 12);
  EXPECT_EQ(proto.phases(0).phase(), "forward");
  EXPECT_THAT(proto.samples(0).logprobs(), ElementsAre(-1.0f, -2.0f));
}

// Whatever bytes parse as a request, translation answers OK or INVALID_ARGUMENT and what it passes
// keeps the limits.
TEST_F(ConvertTest, MutatedRequestsNeverCrash) {
  constexpr uint64_t kSeed = 20261121;
  SCOPED_TRACE(kSeed);
  const google::protobuf::LogSilencer silencer;  // bytes that do not parse are logged
  std::mt19937_64 random(kSeed);
  v1::GenerateRequest generate = Generate();
  generate.set_request_id("r");
  generate.mutable_sampling()->set_temperature(0.5f);
  (*generate.mutable_sampling()->mutable_logit_bias())[3] = 1;
  generate.mutable_cache()->mutable_ttl()->set_seconds(5);
  v1::TrainStepRequest step = StepWithAdvantages({1, 2, 3});
  step.mutable_loss()->mutable_clip()->set_dual(3);
  const std::string seeds[2] = {generate.SerializeAsString(), step.SerializeAsString()};
  int64_t parsed = 0, passed = 0, valid = 0;
  const GenerateLimits engine_limits{.vocab = limits_.vocab,
                                     .max_context = 64,
                                     .max_group_size = 16,
                                     .num_blocks = 4,
                                     .block_tokens = 16,
                                     .has_tokenizer = true};
  for (int i = 0; i < 200'000; ++i) {
    std::string bytes = seeds[i % 2];
    for (int flips = 1 + static_cast<int>(random() % 3); flips > 0; --flips) {
      bytes[random() % bytes.size()] = static_cast<char>(random());
    }
    if (random() % 8 == 0) bytes.resize(random() % bytes.size());
    if (i % 2 == 0) {
      v1::GenerateRequest proto;
      if (!proto.ParseFromString(bytes)) continue;
      ++parsed;
      const auto request = FromProto(proto, tenant_, limits_);
      if (!request.ok()) continue;
      ++passed;
      if (ValidateGenerate(*request, engine_limits).ok()) ++valid;
    } else {
      v1::TrainStepRequest proto;
      if (!proto.ParseFromString(bytes)) continue;
      ++parsed;
      const auto request = FromProto(proto, tenant_, limits_);
      if (!request.ok()) continue;
      ++passed;
      ASSERT_EQ(request->rollout_ids.size(), request->batch.groups.size());
    }
  }
  EXPECT_GT(parsed, 10'000);
  EXPECT_GT(passed, 1'000);
  EXPECT_GT(valid, 1'000);
}

}  // namespace
}  // namespace coppice
