// decode: the next token of each sample of a group: forward, logits, greedy sampling. Bound: the
// bytes that must be read (all weights once, keys and values of the context; of a shared prompt
// once) at the measured bandwidth of memory.
#include <vector>

#include "kernels/base/status_macros.h"
#include "tests/bench/bench_model.h"
#include "tests/bench/benches.h"
#include "tests/bench/bounds.h"
#include "tests/bench/group_batches.h"
#include "tests/bench/measure.h"

namespace coppice::bench {
namespace {

// Computes prompt and own tokens of every sample into a pool, ready for decode steps.
absl::StatusOr<KvPool> FillPool(const Options& options, const GroupLayout& layout,
                                BenchModel& bench) {
  ASSIGN_OR_RETURN(KvPool pool, KvPool::Create(bench.config(), layout.num_blocks,
                                               options.block_tokens, bench.ops()));
  if (layout.shared_tokens > 0) {
    const std::vector<int32_t> prompt = bench.RandomTokens(layout.shared_tokens, options.seed);
    const std::vector<int32_t>& first = layout.prompt_blocks.front();
    RETURN_IF_ERROR(bench
                        .Logits(PromptChunk(prompt, 0, layout.shared_tokens, first,
                                            options.block_tokens, /*with_logits=*/false),
                                &pool)
                        .status());
    for (size_t i = 1; i < layout.prompt_blocks.size(); ++i) {
      if (layout.prompt_blocks[i] == first) continue;
      RETURN_IF_ERROR(bench.ops().CopyBlocks({.pool = pool.all(),
                                              .src = first.data(),
                                              .dst = layout.prompt_blocks[i].data(),
                                              .n = static_cast<int64_t>(first.size())}));
    }
  }
  const std::vector<int32_t> own =
      bench.RandomTokens(layout.group * layout.own_tokens, options.seed + 1);
  RETURN_IF_ERROR(
      bench.Logits(layout.Rows(0, layout.own_tokens, own, /*with_logits=*/false), &pool).status());
  return pool;
}

ops::TokenBatch NextTokens(const Options& options, const GroupLayout& layout,
                           const BenchModel& bench) {
  return layout.Rows(layout.own_tokens, layout.own_tokens + 1,
                     bench.RandomTokens(layout.group, options.seed + 2), /*with_logits=*/true);
}

absl::StatusOr<std::vector<float>> NextLogits(const Options& options, BenchModel& bench) {
  const GroupLayout layout(options);
  ASSIGN_OR_RETURN(const KvPool pool, FillPool(options, layout, bench));
  return bench.Logits(NextTokens(options, layout, bench), &pool);
}

// A small group: reading the shared prompt once gives the logits of reading it for each sample, be
// it stored once or for each.
absl::Status VerifyGrouping(Options options, BenchModel& bench) {
  options.prompt = 3 * options.block_tokens + 1;
  options.response = 2;
  options.group = std::min<int64_t>(options.group, 3);
  options.mode = Mode::kShared;
  ASSIGN_OR_RETURN(const std::vector<float> shared, NextLogits(options, bench));
  for (const Mode mode : {Mode::kFlat, Mode::kUngrouped}) {
    options.mode = mode;
    ASSIGN_OR_RETURN(const std::vector<float> apart, NextLogits(options, bench));
    RETURN_IF_ERROR(
        Verify("decode of a group", RelativeError(shared, apart), ModelTolerance(bench)));
  }
  return absl::OkStatus();
}

double BytesRead(const ModelConfig& config, DType dtype, int64_t context_tokens) {
  const int64_t gathered = config.tied_head ? 0 : config.vocab * config.hidden;  // single rows only
  const int64_t kv = context_tokens * 2 * config.kv_dim() * config.num_layers;
  return static_cast<double>((NumParameters(config) - gathered + kv) * SizeOf(dtype));
}

}  // namespace

absl::Status RunDecode(const Options& options) {
  ASSIGN_OR_RETURN(const std::unique_ptr<BenchModel> bench, BenchModel::Create(options));
  RETURN_IF_ERROR(VerifyGrouping(options, *bench));

  const GroupLayout layout(options);
  ASSIGN_OR_RETURN(const KvPool pool, FillPool(options, layout, *bench));
  ASSIGN_OR_RETURN(PlannedBatch batch,
                   PlannedBatch::Create(*bench, NextTokens(options, layout, *bench)));
  Result result{.bench = "decode"};
  ASSIGN_OR_RETURN(result.seconds,
                   MedianSeconds(options.repeats, [&] { return batch.RunAndSample(&pool); }));
  ASSIGN_OR_RETURN(const double bandwidth,
                   MemoryBandwidth(bench->ops(), static_cast<int>(options.threads)));
  result.bound_seconds =
      BytesRead(bench->config(), bench->ops().Info().compute_dtype, layout.ContextTokens()) /
      bandwidth;
  result.bound = BandwidthBoundName(bandwidth);
  result.device = bench->ops().Info().name;
  Print(options, result);
  return absl::OkStatus();
}

}  // namespace coppice::bench
