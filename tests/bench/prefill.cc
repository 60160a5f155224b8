// prefill: one forward pass over what is not cached of a prompt. Bound: the time of that pass's
// GEMMs.
#include <algorithm>
#include <numeric>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "tests/bench/bench_model.h"
#include "tests/bench/benches.h"
#include "tests/bench/bounds.h"
#include "tests/bench/group_batches.h"
#include "tests/bench/measure.h"

namespace coppice::bench {
namespace {

// A prompt in two chunks through the KV pool gives the logits of one pass.
absl::Status VerifyChunks(const Options& options, BenchModel& bench, const KvPool& pool,
                          const std::vector<int32_t>& tokens, const std::vector<int32_t>& blocks) {
  const int64_t end = std::min<int64_t>(options.prompt, 97), cut = end / 2;
  const int64_t bt = options.block_tokens;
  ASSIGN_OR_RETURN(const std::vector<float> whole,
                   bench.Logits(PromptChunk(tokens, 0, end, blocks, bt, true), &pool));
  if (cut > 0) {
    RETURN_IF_ERROR(bench.Logits(PromptChunk(tokens, 0, cut, blocks, bt, false), &pool).status());
  }
  ASSIGN_OR_RETURN(const std::vector<float> chunked,
                   bench.Logits(PromptChunk(tokens, cut, end, blocks, bt, true), &pool));
  return Verify("prefill in chunks", RelativeError(whole, chunked), ModelTolerance(bench));
}

}  // namespace

absl::Status RunPrefill(const Options& options) {
  if (options.cached >= options.prompt) {
    return absl::InvalidArgumentError(absl::StrCat("--cached wants fewer than the ", options.prompt,
                                                   " prompt tokens, got ", options.cached,
                                                   "; see --help"));
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<BenchModel> bench, BenchModel::Create(options));
  const std::vector<int32_t> tokens = bench->RandomTokens(options.prompt, options.seed);
  std::vector<int32_t> blocks((options.prompt + options.block_tokens - 1) / options.block_tokens);
  std::iota(blocks.begin(), blocks.end(), 0);
  ASSIGN_OR_RETURN(const KvPool pool,
                   KvPool::Create(bench->config(), static_cast<int64_t>(blocks.size()),
                                  options.block_tokens, bench->ops()));
  RETURN_IF_ERROR(VerifyChunks(options, *bench, pool, tokens, blocks));

  if (options.cached > 0) {
    RETURN_IF_ERROR(bench
                        ->Logits(PromptChunk(tokens, 0, options.cached, blocks,
                                             options.block_tokens, /*with_logits=*/false),
                                 &pool)
                        .status());
  }
  ASSIGN_OR_RETURN(
      PlannedBatch batch,
      PlannedBatch::Create(*bench, PromptChunk(tokens, options.cached, options.prompt, blocks,
                                               options.block_tokens, /*with_logits=*/true)));
  Result result{.bench = "prefill"};
  ASSIGN_OR_RETURN(result.seconds,
                   MedianSeconds(options.repeats, [&] { return batch.Run(&pool); }));
  ASSIGN_OR_RETURN(result.bound_seconds,
                   GemmSeconds(bench->ops(), static_cast<int>(options.threads),
                               ForwardGemms(bench->config(), options.prompt - options.cached, 1)));
  result.bound = GemmBoundName(bench->ops());
  result.device = bench->ops().Info().name;
  Print(options, result);
  return absl::OkStatus();
}

}  // namespace coppice::bench
