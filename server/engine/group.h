// Running state of accepted requests. A Group is one request: a prompt and the samples that grow
// from it. A Stem is a prefill: a path of tokens that is computed once and from whose end one or
// more samples sprout - the samples of a group, those of other requests with the same prompt that
// arrived meanwhile, or one retracted sample that resumes.
//
//   sample:  kIdle --attach to a stem--> kSprouting --stem complete, first token drawn, tail block
//   copied--> kDecoding
//              ^--------------- retracted (no blocks, policy update)
//              --------------------------------------------'
//            any --> kFinished
//
// Owner and thread: Generator, on the engine thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "cache/radix_cache.h"
#include "server/engine/command_queue.h"
#include "server/engine/engine.h"
#include "server/engine/request.h"
#include "server/engine/scheduler.h"
#include "server/engine/text_stream.h"
#include "trainer/prompt_state.h"

namespace coppice {

struct Stem;

// One response.
struct Sample {
  enum class State { kIdle, kSprouting, kDecoding, kFinished };

  State state = State::kIdle;
  std::vector<int32_t> tokens;          // drawn so far; kept when retracted
  std::vector<float> sampler_logprobs;  // of `tokens`, for rollouts; see rollouts.h
  PolicyVersion oldest_version{0};      // of the weights that drew any of `tokens`
  // The stem whose whole blocks begin this sample's path. Shared by all samples that sprouted from
  // it; the blocks live until the last of them is done.
  std::shared_ptr<Stem> stem;
  BlockSet own;  // blocks behind the stem's whole blocks
  // Leading tokens of the path whose KV exists or is queued: all but the newest when decoding, all
  // while the row that draws the next one is queued.
  int64_t kv_tokens = 0;
  std::unique_ptr<TextStream> text;  // if text or stop strings are asked for
  uint64_t last_step = 0;
  absl::Duration last_token_at;
};

struct Group {
  RequestId id{0};
  GenerateRequest request;
  std::shared_ptr<GenerateSink>
      sink;                // of the RPC layer, which keeps it for its reader; null for Warm
  Reply<WarmResult> warm;  // null for Generate
  QueueSlot slot;          // its place in the queue, until admitted
  absl::Duration arrived;
  uint64_t seed = 0;
  int64_t max_response = 0;  // tokens at which a sample ends: max_tokens, or the context is full

  absl::Duration stalled_since = absl::InfiniteDuration();  // its reader has no room
  absl::Status failure;                                     // why it ends at the next turn

  bool started = false;  // OnStarted was called; usage of the prompt is settled
  PeekResult estimate;   // while waiting: what the cache holds of the prompt
  Usage usage;
  std::weak_ptr<KeptPrompt> kept_prompt;  // of the stem that its samples sprouted from
  std::vector<Sample> samples;

  bool is_warm() const { return warm != nullptr; }
  SampleKey key(int32_t sample) const { return {id, sample}; }
  int64_t unfinished() const;
  // Prompt and response of one sample so far.
  std::vector<int32_t> Path(int32_t sample) const;
  int64_t PathLength(int32_t sample) const;
  // The row that draws its next token is queued; the token is not known here.
  bool HasTokenInFlight(int32_t sample) const;
};

// A sample that waits for a stem.
struct Sprout {
  Group* group = nullptr;
  int32_t sample = 0;
};

struct Stem {
  uint64_t id = 0;  // ascending in order of creation; names the producer in the cache
  Namespace ns;
  std::vector<int32_t> tokens;
  bool joinable = false;     // others with the same tokens may sprout from it
  bool wants_logits = true;  // false for Warm
  int32_t priority = 0;      // of the request that started it

  Lease lease;   // published whole blocks, from position 0
  BlockSet own;  // blocks behind the lease: the partial tail, or all if nothing is published
  int64_t ready_tokens = 0;  // leading tokens whose KV exists
  int64_t next_row = 0;      // position of the next token to run; == tokens.size() when complete

  int64_t matched_tokens =
      0;                      // of the lease, when it started: others compute or have computed them
  int64_t cached_tokens = 0;  // of usage
  int64_t computed_tokens = 0;
  int64_t written_tokens = 0;
  MissReason miss_reason = MissReason::kNone;
  std::weak_ptr<KeptPrompt> kept;  // filled as it runs, if a retained request asked for it
  std::vector<Sprout> sprouts;     // oldest first; empty = dropped at the next sweep

  int64_t num_tokens() const { return static_cast<int64_t>(tokens.size()); }
  bool complete() const { return next_row == num_tokens(); }
  // Block table of the whole stem.
  std::vector<BlockId> Blocks() const;
};

// Block table of a sample that decodes: the whole blocks of its stem, then its own.
std::vector<BlockId> SampleBlocks(const Sample& sample, int64_t block_tokens);

}  // namespace coppice
