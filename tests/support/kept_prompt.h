// What generation keeps of a prompt (trainer/prompt_state.h), made by a prefill of its own.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels/base/status_macros.h"
#include "kernels/model/decoder.h"
#include "kernels/model/kv_pool.h"
#include "trainer/prompt_state.h"

namespace coppice {

// Tokens [begin, end) of a prompt whose KV lies in blocks 0, 1, ... of a pool.
inline ops::TokenBatch PrefillPiece(const std::vector<int32_t>& prompt, int64_t begin, int64_t end,
                                    int32_t block_tokens) {
  const int32_t rows = static_cast<int32_t>(end - begin);
  ops::TokenBatch batch;
  batch.block_tokens = block_tokens;
  for (int32_t p = static_cast<int32_t>(begin); p < end; ++p) {
    batch.tokens.push_back(prompt[p]);
    batch.positions.push_back(p);
    batch.subtree_end.push_back(rows);
    batch.kv_slots.push_back(p);
  }
  batch.segments = {{.row_end = rows}};
  if (begin > 0) {
    batch.context_nodes = {{.num_tokens = static_cast<int32_t>(begin)}};
    for (int32_t b = 0; b * block_tokens < begin; ++b) batch.context_blocks.push_back(b);
    batch.segments[0].context_node = 0;
  }
  if (end == static_cast<int64_t>(prompt.size())) batch.logit_rows = {rows - 1};
  return batch;
}

// Prefills in pieces of at most `piece` tokens.
inline absl::StatusOr<std::shared_ptr<KeptPrompt>> KeepPrompt(const Decoder& decoder,
                                                              const Parameters& params,
                                                              const std::vector<int32_t>& prompt,
                                                              PolicyVersion version,
                                                              int64_t piece) {
  constexpr int32_t kBlockTokens = 16;
  ops::Ops& ops = decoder.ops();
  const int64_t tokens = static_cast<int64_t>(prompt.size());
  auto kept = std::make_shared<KeptPrompt>();
  kept->tokens = prompt;
  kept->version = version;
  RETURN_IF_ERROR(kept->state.Allocate(decoder.config(), ops, tokens));
  ASSIGN_OR_RETURN(const KvPool pool,
                   KvPool::Create(decoder.config(), (tokens + kBlockTokens - 1) / kBlockTokens,
                                  kBlockTokens, ops));
  ASSIGN_OR_RETURN(DeviceBuffer workspace,
                   ops.Allocate(decoder.WorkspaceBytes(piece, 1), "prefill workspace"));
  for (int64_t begin = 0; begin < tokens; begin += piece) {
    const int64_t end = std::min(tokens, begin + piece);
    ASSIGN_OR_RETURN(const std::unique_ptr<ops::BatchPlan> plan,
                     ops.PlanBatch(PrefillPiece(prompt, begin, end, kBlockTokens)));
    PromptCapture capture(ops, {{.rows = end - begin, .prompt = kept}});
    RETURN_IF_ERROR(decoder.Forward(params, *plan, &pool, workspace, &capture).status());
    RETURN_IF_ERROR(ops.Synchronize());
    capture.Finish();
  }
  return kept;
}

}  // namespace coppice
