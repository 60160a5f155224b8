#include "kernels/model/row_equality.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/rng.h"
#include "kernels/base/status_macros.h"
#include "kernels/model/kv_pool.h"

namespace coppice {
namespace {

constexpr int64_t kTokens = 640;
constexpr int64_t kChunks[] = {1, 2, 7, 8, 63, 64, 65, 257};  // rows over a cached prefix
constexpr int64_t kMaxChunk = 257;
constexpr int64_t kDecodes[] = {2, 8, 63, 64, 65};  // copies of the last row, each with its context

class RowEquality {
 public:
  RowEquality(const Decoder& decoder, const Parameters& params, int64_t block_tokens)
      : decoder_(decoder),
        params_(params),
        ops_(decoder.ops()),
        num_tokens_(std::min(kTokens, decoder.config().max_positions)),
        block_tokens_(block_tokens),
        num_blocks_((num_tokens_ + block_tokens - 1) / block_tokens) {}

  absl::Status Check() {
    RETURN_IF_ERROR(Allocate());
    const int64_t last = std::min(kMaxChunk, num_tokens_ - 1);
    ASSIGN_OR_RETURN(cold_, Run(Whole(last)));
    for (const int64_t rows : kChunks) {
      if (rows > last) continue;
      RETURN_IF_ERROR(
          ExpectColdBits(Chunk(rows), absl::StrCat(rows, " rows over a cached prefix")));
    }
    for (const int64_t copies : kDecodes) {
      RETURN_IF_ERROR(ExpectColdBits(Decodes(copies), absl::StrCat(copies, " decode rows")));
    }
    ops::TokenBatch mixed = Decodes(5);
    AppendChunk(std::min<int64_t>(65, last), mixed);
    return ExpectColdBits(mixed, "decode rows beside a prefill chunk");
  }

 private:
  absl::Status Allocate() {
    const ModelConfig& config = decoder_.config();
    // The second half takes the KV of what runs again.
    ASSIGN_OR_RETURN(kv_, KvPool::Create(config, 2 * num_blocks_ + kMaxChunk, block_tokens_, ops_));
    ASSIGN_OR_RETURN(workspace_, ops_.Allocate(decoder_.WorkspaceBytes(num_tokens_, kMaxChunk),
                                               "self-test workspace"));
    ASSIGN_OR_RETURN(
        logits_, ops_.Allocate(kMaxChunk * config.vocab * SizeOf(DType::kF32), "self-test logits"));
    return absl::OkStatus();
  }

  int32_t Token(int64_t position) const {
    const uint32_t bits = Philox(1, static_cast<uint32_t>(position), 0, 0, 0).v[0];
    return static_cast<int32_t>(bits % static_cast<uint32_t>(decoder_.config().vocab));
  }

  ops::TokenBatch Empty() const {
    ops::TokenBatch batch;
    batch.block_tokens = static_cast<int32_t>(block_tokens_);
    return batch;
  }
  // A segment of positions [begin, end) below `node`, its KV stored from `slot` on.
  void AppendRows(int64_t begin, int64_t end, int32_t node, int64_t slot,
                  ops::TokenBatch& batch) const {
    const int32_t row = static_cast<int32_t>(batch.num_rows());
    const int32_t row_end = row + static_cast<int32_t>(end - begin);
    for (int64_t p = begin; p < end; ++p) {
      batch.tokens.push_back(Token(p));
      batch.positions.push_back(static_cast<int32_t>(p));
      batch.subtree_end.push_back(row_end);
      batch.kv_slots.push_back(static_cast<int32_t>(slot++));
    }
    batch.segments.push_back({row, row_end, node});
  }
  // A context node of the cold run's blocks for positions [begin, end); `begin` at a block.
  int32_t AppendContext(int64_t begin, int64_t end, int32_t parent, ops::TokenBatch& batch) const {
    if (begin == end) return parent;
    batch.context_nodes.push_back({parent, static_cast<int32_t>(end - begin),
                                   static_cast<int32_t>(batch.context_blocks.size())});
    for (int64_t b = begin / block_tokens_; b * block_tokens_ < end; ++b) {
      batch.context_blocks.push_back(static_cast<int32_t>(b));
    }
    return static_cast<int32_t>(batch.context_nodes.size()) - 1;
  }
  void AppendChunk(int64_t rows, ops::TokenBatch& batch) const {
    const int64_t cached = num_tokens_ - rows;
    const int32_t node = AppendContext(0, cached, -1, batch);
    const int64_t slot = (num_blocks_ + kMaxChunk) * block_tokens_;
    AppendRows(cached, num_tokens_, node, slot, batch);
    for (int64_t r = batch.num_rows() - rows; r < batch.num_rows(); ++r) {
      batch.logit_rows.push_back(static_cast<int32_t>(r));
    }
  }

  ops::TokenBatch Whole(int64_t logit_rows) const {
    ops::TokenBatch batch = Empty();
    AppendRows(0, num_tokens_, -1, 0, batch);
    for (int64_t r = num_tokens_ - logit_rows; r < num_tokens_; ++r) {
      batch.logit_rows.push_back(static_cast<int32_t>(r));
    }
    return batch;
  }
  ops::TokenBatch Chunk(int64_t rows) const {
    ops::TokenBatch batch = Empty();
    AppendChunk(rows, batch);
    return batch;
  }
  // The last row `copies` times: whole blocks of its context shared, the rest a node for each.
  ops::TokenBatch Decodes(int64_t copies) const {
    ops::TokenBatch batch = Empty();
    const int64_t cached = num_tokens_ - 1, whole = cached / block_tokens_ * block_tokens_;
    const int32_t shared = AppendContext(0, whole, -1, batch);
    for (int64_t i = 0; i < copies; ++i) {
      const int32_t node = AppendContext(whole, cached, shared, batch);
      AppendRows(cached, num_tokens_, node, (num_blocks_ + i) * block_tokens_, batch);
      batch.logit_rows.push_back(static_cast<int32_t>(i));
    }
    return batch;
  }

  // The logits of the batch's logit rows.
  absl::StatusOr<std::vector<float>> Run(const ops::TokenBatch& batch) {
    const int64_t rows = static_cast<int64_t>(batch.logit_rows.size());
    const TensorView logits = View2D(logits_.data(), DType::kF32, rows, decoder_.config().vocab);
    ASSIGN_OR_RETURN(const std::unique_ptr<ops::BatchPlan> plan, ops_.PlanBatch(batch));
    ASSIGN_OR_RETURN(const TensorView hidden, decoder_.Forward(params_, *plan, &kv_, workspace_));
    RETURN_IF_ERROR(decoder_.Logits(params_, hidden, logits));
    std::vector<float> host(logits.num_elements());
    RETURN_IF_ERROR(ops_.Download(logits, host.data()));
    return host;
  }

  absl::Status ExpectColdBits(const ops::TokenBatch& batch, const std::string& what) {
    ASSIGN_OR_RETURN(const std::vector<float> got, Run(batch));
    const int64_t vocab = decoder_.config().vocab;
    for (size_t i = 0; i < batch.logit_rows.size(); ++i) {
      const int64_t position = batch.positions[batch.logit_rows[i]];
      const float* want =
          cold_.data() + static_cast<int64_t>(cold_.size()) - (num_tokens_ - position) * vocab;
      const float* row = got.data() + static_cast<int64_t>(i) * vocab;
      if (std::memcmp(row, want, vocab * sizeof(float)) == 0) continue;
      const int64_t at = std::mismatch(row, row + vocab, want).first - row;
      return absl::InternalError(absl::StrCat(
          "deterministic mode: row equality: position ", position, " as one of ", what,
          ": want the logits of one batch of ", num_tokens_, " rows, got logit ", at, " = ",
          row[at], " for ", want[at], "; run without --deterministic and report device and model"));
    }
    return absl::OkStatus();
  }

  const Decoder& decoder_;
  const Parameters& params_;
  ops::Ops& ops_;
  const int64_t num_tokens_, block_tokens_, num_blocks_;
  KvPool kv_;
  DeviceBuffer workspace_, logits_;
  std::vector<float> cold_;  // [last rows, vocab]
};

}  // namespace

absl::Status CheckRowEquality(const Decoder& decoder, const Parameters& params,
                              int64_t block_tokens) {
  return RowEquality(decoder, params, block_tokens).Check();
}

}  // namespace coppice
