// Generator: carries Generate and Warm requests from the queue to their last token, a step at a
// time. Owns requests, stems, KV and rollouts; knows nothing of threads or of the trainer. Owner
// and thread: Engine, on the engine thread.
//
// A step: end what is cancelled or late; plan who holds KV and do it; plan the rows; build the
// batch; queue it; wait for it; append what was drawn and stream it out; retire what is complete. A
// Status is a device error: nothing can run any more.
//
// With EngineOptions::overlap the batch of a step is left in flight, and the next step queues its
// own before it waits, so that the device never waits for the host. Only decoding is queued
// blindly: rows of samples whose newest token the device alone knows. What turns out to have ended
// runs one row for nothing. Anything else (prefill, admission, a request that ends early, a
// command, the policy gate) lands the batch in flight first.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/clock.h"
#include "kernels/model/decoder.h"
#include "kernels/model/model_loader.h"
#include "server/engine/batch_builder.h"
#include "server/engine/engine.h"
#include "server/engine/kv_store.h"
#include "server/engine/prompt_states.h"
#include "server/engine/rollouts.h"
#include "server/engine/roster.h"
#include "server/engine/runner.h"
#include "server/engine/scheduler.h"
#include "server/metrics/metrics.h"

namespace coppice {

class Generator {
 public:
  // Allocates KV pool, workspace and logits. Borrows everything else. `nonce`: of rollout ids.
  static absl::StatusOr<std::unique_ptr<Generator>> Create(const EngineOptions& options,
                                                           const Model& model,
                                                           const Decoder& decoder, Metrics& metrics,
                                                           const Clock& clock, uint64_t nonce);

  void Enqueue(std::unique_ptr<Group> group);

  struct StepMode {
    bool admit = true;  // start waiting requests
    bool run = true;    // false: paused, only cancellations and deadlines are served
  };
  // True if anything happened, or is in flight.
  absl::StatusOr<bool> Step(const StepMode& mode);
  // Waits for the batch in flight, if any, and streams out what it drew. The calls below require
  // it.
  absl::Status Land();

  // Ends requests by name with kAborted; partial output has been streamed. Returns how many.
  int64_t Abort(const std::string& request_id, const std::string& session_id);
  // Ends every running request with kPaused.
  int64_t EndRunning();
  // Ends everything with `status`.
  void Fail(const absl::Status& status);
  // Running samples give back their KV and prefill again later. Returns the requests affected.
  int64_t RetractAll();
  // What is in prefill starts again; decoding samples keep their KV, which nobody else will ever
  // match.
  void RestartStems();
  // Notes in each group what the cache holds of its prompt, for as long as the leases live.
  std::vector<Lease> LeaseCached(const std::string& tenant_salt, std::vector<TrainGroup>& groups);
  // New weights. REQUIRES: RetractAll or RestartStems, or nothing runs.
  void SetPolicy(PolicyVersion version, bool replaced);

  int64_t num_waiting() const { return static_cast<int64_t>(roster_.waiting().size()); }
  int64_t num_running() const { return static_cast<int64_t>(roster_.running().size()); }
  int64_t num_running_samples() const { return roster_.num_running_samples(); }
  // When the first request will be late or its reader stalled for too long; infinite if none.
  absl::Duration NextDeadline() const;
  Rollouts& rollouts() { return rollouts_; }
  KvStore& kv() { return *kv_; }
  void UpdateGauges();

 private:
  // What one step runs. Head rows of the batch: one per decoding sample, then one per stem that
  // completes.
  struct Batch {
    std::vector<SegmentSpec> segments;
    std::vector<std::pair<std::shared_ptr<Stem>, int64_t>> prefill;  // stem, rows
    std::vector<KeptRows> kept;
    int64_t rows = 0;
    std::vector<Draw> draws;
    std::vector<Sprout> drawers;  // parallel to draws; no group = its sample has ended meanwhile
    std::vector<SampleKey> keys;  // of the drawers
    std::vector<CarriedTokens> carried;
    int32_t head_rows = 0;
  };
  // A batch that is queued.
  struct Flight {
    Batch batch;
    std::unique_ptr<PendingDraws> draws = nullptr;  // null if it draws nothing
    absl::Duration queued_at = absl::ZeroDuration();
  };

  Generator(const EngineOptions& options, const Model& model, const Decoder& decoder,
            Metrics& metrics, const Clock& clock, uint64_t nonce);

  // ---- Before the batch
  // Requests that are cancelled, late, or whose reader has stalled for too long.
  absl::StatusOr<bool> EndGivenUp();
  std::vector<Group*> GivenUp(absl::Duration now);
  // The next batch may be queued before the one in flight is read.
  bool MayFollow(const AdmissionPlan& plan) const;
  std::optional<absl::Status> ReasonToGiveUp(Group& group, absl::Duration now) const;
  absl::StatusOr<bool> ApplyAdmission(const AdmissionPlan& plan);
  absl::StatusOr<bool> AdmitGroup(RequestId id);
  // Gives a sample (and those of its group that are as fresh) a stem. False if the pool lacks
  // blocks.
  absl::StatusOr<bool> StartSprouts(Group& group, int32_t sample);
  // Asks for the state of a retained request's prompt. What others compute or have computed of it
  // leaves none.
  void KeepPrompt(const Group& group, Stem& stem);
  void Retract(const SampleKey& key);
  void DropStem(const std::shared_ptr<Stem>& stem);
  // A stem that no reader has room for gives way: what it produces, others may be waiting for. Its
  // sprouts try again later.
  void DropUnreadStems();
  // States that no stem will fill any more.
  void DropUnfilledStates();

  // ---- The batch
  // `before`: in flight until now, not read yet.
  absl::StatusOr<Flight> Launch(const RowPlan& plan, const std::optional<Flight>& before);
  Batch Build(const RowPlan& plan, const std::optional<Flight>& before);
  void AddDecode(Group& group, int32_t sample, const std::optional<Flight>& before, Batch& batch);
  void AddPrefill(const std::shared_ptr<Stem>& stem, int64_t rows, Batch& batch);
  // Sprouts whose reader has no room for the first token try again later; the others do not wait
  // for them.
  void SetAsideSlowReaders(Stem& stem);
  void AddDraw(const Sprout& drawer, int64_t position, Batch& batch);
  // The next row's token is the one that `before` draws for the sample.
  static void CarryToken(const SampleKey& key, const Batch& before, Batch& batch);

  // ---- After the batch
  absl::Status Finish(Flight flight);
  // Draws of the batch in flight whose samples have ended are for nobody.
  void ForgetEnded();
  absl::Status Publish(const Batch& batch, const std::vector<DrawnToken>& drawn);
  // Settles the usage of requests whose prompt is complete and starts their streams.
  void StartStreams(const Stem& stem);
  void SettleUsage(const Stem& stem, bool pays, Group& group);
  void CountWritten(int64_t tokens, Group& group);
  absl::Status ForkUnfinished(const std::shared_ptr<Stem>& stem);
  bool FinishWarmStems();
  void FinishWarm(Group& group);
  void Append(Group& group, int32_t sample, const DrawnToken& drawn);
  TokenChunk MakeChunk(const Group& group, int32_t sample, const DrawnToken& drawn) const;
  std::optional<FinishReason> ReasonToFinish(const Group& group, int32_t sample) const;
  bool IsStopToken(const Group& group, int32_t token) const;
  void FinishSample(Group& group, int32_t sample, FinishReason reason);
  void RetireFinished();
  std::string Retain(const Group& group);
  // Ends a request early: its unfinished samples with `reason`, or all at once with the status.
  void EndEarly(Group& group, FinishReason reason);
  void EndWithStatus(Group& group, const absl::Status& status);

  const EngineOptions options_;
  const Model& model_;
  Metrics& metrics_;
  const Clock& clock_;
  std::unique_ptr<KvStore> kv_;
  std::unique_ptr<Runner> runner_;
  Roster roster_;
  Rollouts rollouts_;
  PromptStates prompt_states_;
  TenantMeter tenants_;
  std::optional<Flight> flight_;
  absl::Duration landed_at_;  // the last batch
  uint64_t step_ = 0;
  int64_t evicted_seen_ = 0;
};

}  // namespace coppice
