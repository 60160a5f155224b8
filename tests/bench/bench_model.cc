#include "tests/bench/bench_model.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>

#include "kernels/base/status_macros.h"
#include "tests/support/tolerances.h"

namespace coppice::bench {

absl::StatusOr<std::unique_ptr<ops::Ops>> OpenDevice(const Options& options) {
  return ops::CreateOps(options.device, static_cast<int>(options.threads),
                        /*deterministic=*/false, options.compute_dtype,
                        {.path = options.matmul_cache, .grows = true});
}

absl::StatusOr<std::unique_ptr<BenchModel>> BenchModel::Create(const Options& options) {
  auto bench = std::make_unique<BenchModel>();
  ASSIGN_OR_RETURN(bench->ops_, OpenDevice(options));
  if (options.phases) {
    ASSIGN_OR_RETURN(std::unique_ptr<ops::ProfiledOps> profiled,
                     ops::ProfiledOps::Create(std::move(bench->ops_)));
    bench->profiled_ops_ = profiled.get();
    bench->ops_ = std::move(profiled);
  }
  ASSIGN_OR_RETURN(const ModelConfig config, NamedGeometry(options.geometry));
  ASSIGN_OR_RETURN(bench->model_, RandomModel(config, options.seed, *bench->ops_));
  ASSIGN_OR_RETURN(bench->decoder_, Decoder::Create(config, *bench->ops_));
  return bench;
}

std::vector<int32_t> BenchModel::RandomTokens(int64_t n, uint64_t seed) const {
  std::mt19937_64 rng(seed);
  std::vector<int32_t> tokens(n);
  for (int32_t& t : tokens) t = static_cast<int32_t>(rng() % config().vocab);
  return tokens;
}

absl::StatusOr<std::vector<float>> BenchModel::Logits(const ops::TokenBatch& batch,
                                                      const KvPool* pool) {
  ASSIGN_OR_RETURN(PlannedBatch planned, PlannedBatch::Create(*this, batch));
  RETURN_IF_ERROR(planned.Run(pool));
  std::vector<float> logits(planned.logits().num_elements());
  RETURN_IF_ERROR(ops_->Download(planned.logits(), logits.data()));
  return logits;
}

absl::StatusOr<PlannedBatch> PlannedBatch::Create(BenchModel& model, const ops::TokenBatch& batch) {
  PlannedBatch planned;
  planned.model_ = &model;
  ops::Ops& ops = model.ops();
  const int64_t head_rows = static_cast<int64_t>(batch.logit_rows.size());
  const int64_t vocab = model.config().vocab;
  ASSIGN_OR_RETURN(planned.plan_, ops.PlanBatch(batch));
  const int64_t bytes = model.decoder().WorkspaceBytes(batch.num_rows(), head_rows);
  ASSIGN_OR_RETURN(planned.workspace_, ops.Allocate(bytes, "decoder workspace"));
  ASSIGN_OR_RETURN(planned.logits_buffer_, ops.Allocate(head_rows * vocab * 4, "logits"));
  planned.logits_ = View2D(planned.logits_buffer_.data(), DType::kF32, head_rows, vocab);
  planned.sampling_.assign(head_rows, {.temperature = 0});
  planned.tokens_.resize(head_rows);
  planned.raw_logprobs_.resize(head_rows);
  planned.sampled_logprobs_.resize(head_rows);
  return planned;
}

absl::Status PlannedBatch::Run(const KvPool* pool) {
  const Parameters& params = model_->model().params;
  ASSIGN_OR_RETURN(const TensorView hidden,
                   model_->decoder().Forward(params, *plan_, pool, workspace_));
  if (logits_.dim(0) > 0) RETURN_IF_ERROR(model_->decoder().Logits(params, hidden, logits_));
  return model_->ops().Synchronize();
}

absl::Status PlannedBatch::RunAndSample(const KvPool* pool) {
  RETURN_IF_ERROR(Run(pool));
  return model_->ops().Sample({.logits = logits_,
                               .rows = sampling_.data(),
                               .tokens = tokens_.data(),
                               .raw_logprobs = raw_logprobs_.data(),
                               .sampled_logprobs = sampled_logprobs_.data()});
}

double RelativeError(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return INFINITY;
  double largest = 0, difference = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    largest = std::max(largest, std::abs(double{a[i]}));
    const double d = std::abs(double{a[i]} - double{b[i]});
    difference = d >= difference ? d : std::isnan(d) ? INFINITY : difference;
  }
  return largest > 0 ? difference / largest : difference;
}

double ModelTolerance(BenchModel& model) {
  const DType dtype = model.ops().Info().compute_dtype;
  if (dtype == DType::kF32) return tolerance::kParity;
  return dtype == DType::kF16 ? tolerance::kF16Model : tolerance::kBf16Model;
}

}  // namespace coppice::bench
