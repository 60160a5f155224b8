#include "server/engine/step_records.h"

#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "server/engine/step_log.h"

namespace coppice {
namespace {

using nlohmann::json;

json ToJson(const StepRecords::Key& key, const TrainStepResult& r) {
  json samples = json::array();
  for (const SampleResult& s : r.batch.samples) samples.push_back({s.logprobs, s.entropy, s.kl});
  const TokenStats& t = r.batch.tokens;
  return {{"kind", static_cast<int>(key.first)},
          {"step_id", key.second},
          {"policy_version", Raw(r.policy_version)},
          {"skipped", r.skipped},
          {"skip_reason", r.skip_reason},
          {"grad_norm", r.grad_norm},
          {"loss", r.batch.loss},
          {"metrics", r.batch.metrics},
          {"tokens", {t.flat, t.unique, t.prompt_forward_skipped, t.with_loss}},
          {"phases", r.batch.phases},
          {"samples", std::move(samples)}};
}

// JSON has no NaN; the writer puts null.
double Number(const json& j) {
  return j.is_null() ? std::numeric_limits<double>::quiet_NaN() : j.get<double>();
}

TrainStepResult FromJson(const json& j) {
  TrainStepResult r;
  r.policy_version = PolicyVersion{j.at("policy_version").get<uint64_t>()};
  r.skipped = j.at("skipped").get<bool>();
  r.skip_reason = j.at("skip_reason").get<std::string>();
  r.grad_norm = Number(j.at("grad_norm"));
  r.batch.loss = Number(j.at("loss"));
  for (const auto& [name, value] : j.at("metrics").items()) r.batch.metrics[name] = Number(value);
  const json& t = j.at("tokens");
  r.batch.tokens = {
      .flat = t.at(0), .unique = t.at(1), .prompt_forward_skipped = t.at(2), .with_loss = t.at(3)};
  for (const json& p : j.at("phases")) r.batch.phases.emplace_back(p.at(0), Number(p.at(1)));
  for (const json& s : j.at("samples")) {
    SampleResult sample{.entropy = Number(s.at(1)), .kl = Number(s.at(2))};
    for (const json& x : s.at(0)) sample.logprobs.push_back(static_cast<float>(Number(x)));
    r.batch.samples.push_back(std::move(sample));
  }
  return r;
}

}  // namespace

StepRecords::Record* StepRecords::Find(const Key& key) {
  const auto it = records_.find(key);
  return it == records_.end() ? nullptr : &it->second;
}

void StepRecords::Begin(const Key& key, Reply<TrainStepResult> reply) {
  records_[key].waiting.push_back(std::move(reply));
}

std::vector<Reply<TrainStepResult>> StepRecords::Keep(const Key& key,
                                                      const TrainStepResult& result) {
  Record& record = records_[key];
  record.done = true;
  record.result = result;
  std::vector<Reply<TrainStepResult>> waiting = std::exchange(record.waiting, {});
  done_.push_back(key);
  if (static_cast<int64_t>(done_.size()) > capacity_) {
    records_.erase(done_.front());
    done_.pop_front();
  }
  return waiting;
}

void StepRecords::Fail(const Key& key, const absl::Status& status) {
  const std::vector<Reply<TrainStepResult>> waiting = std::exchange(records_[key].waiting, {});
  records_.erase(key);
  for (const Reply<TrainStepResult>& reply : waiting) reply(status);
}

void StepRecords::Forget(const Key& key) {
  records_.erase(key);
  std::erase(done_, key);
}

void StepRecords::Clear() {
  for (const Key& key : done_) records_.erase(key);
  done_.clear();
}

absl::Status StepRecords::WriteFile(const std::string& path) const {
  json steps = json::array();
  int64_t skip = static_cast<int64_t>(done_.size()) - kMaxPersistedSteps;
  for (const Key& key : done_) {
    if (skip-- > 0 || key.first == StepKind::kForwardBackward) continue;
    steps.push_back(ToJson(key, records_.at(key).result));
  }
  return WriteSynced(path, steps.dump());
}

absl::Status StepRecords::ReadFile(const std::string& path) {
  Clear();
  std::ifstream file(path);
  if (!file) return absl::OkStatus();
  std::stringstream text;
  text << file.rdbuf();
  // The library reports wrong types by exceptions; they end here.
  try {
    for (const json& step : json::parse(text.str())) {
      const Key key{static_cast<StepKind>(step.at("kind").get<int>()), step.at("step_id")};
      Keep(key, FromJson(step));
      records_[key].durable = true;
    }
  } catch (const json::exception& e) {
    return absl::DataLossError(absl::StrCat("step records: cannot read ", path, ": ", e.what(),
                                            "; remove the file to forget answered steps"));
  }
  return absl::OkStatus();
}

}  // namespace coppice
