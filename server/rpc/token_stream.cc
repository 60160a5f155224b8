#include "server/rpc/token_stream.h"

#include <utility>

#include "server/rpc/convert.h"

namespace coppice {

TokenStream::Next TokenStream::Advance() {
  if (cancelled_) waiting_.clear();  // nobody reads them
  if (write_in_flight_ || finished_) return Next::kNothing;
  if (!waiting_.empty()) {
    writing_ = std::move(waiting_.front());
    waiting_.pop_front();
    write_in_flight_ = true;
    return Next::kWrite;
  }
  if (!done_) return Next::kNothing;
  finished_ = true;
  return Next::kFinish;
}

void TokenStream::Do(Next next) {
  if (next == Next::kWrite) transport_.Write(&writing_);
  if (next == Next::kFinish) transport_.Finish(status_);
}

void TokenStream::Push(v1::GenerateEvent event) {
  Next next;
  {
    absl::MutexLock lock(&mutex_);
    waiting_.push_back(std::move(event));
    next = Advance();
  }
  Do(next);
}

void TokenStream::WriteDone(bool ok) {
  if (!ok) cancelled_ = true;
  Next next;
  bool wake = !ok;
  {
    absl::MutexLock lock(&mutex_);
    write_in_flight_ = false;
    next = Advance();
    if (asked_for_room_ && static_cast<int64_t>(waiting_.size()) <= options_.capacity / 2) {
      asked_for_room_ = false;
      wake = true;
    }
  }
  // Last: Finish may end this object's owner.
  if (wake) options_.wake_engine();
  Do(next);
}

void TokenStream::Cancel() {
  cancelled_ = true;
  options_.wake_engine();
}

void TokenStream::Refuse(const absl::Status& status) {
  Next next;
  {
    absl::MutexLock lock(&mutex_);
    status_ = status;
    done_ = true;
    next = Advance();
  }
  Do(next);
}

bool TokenStream::HasRoom() const {
  absl::MutexLock lock(&mutex_);
  const bool room = static_cast<int64_t>(waiting_.size()) < options_.capacity;
  // The flag is what HasRoom promised: a wake-up once it would answer true.
  if (!room) asked_for_room_ = true;
  return room;
}

void TokenStream::OnStarted(uint64_t seed, const Usage& prompt_usage, PolicyVersion version) {
  v1::GenerateEvent event;
  v1::Started* started = event.mutable_started();
  started->set_seed(seed);
  *started->mutable_prompt_usage() = ToProto(prompt_usage);
  started->set_policy_version(Raw(version));
  started->mutable_prompt_token_ids()->Add(options_.prompt_echo.begin(),
                                           options_.prompt_echo.end());
  Push(std::move(event));
}

void TokenStream::OnChunk(TokenChunk chunk) {
  v1::GenerateEvent event;
  *event.mutable_chunk() = ToProto(chunk);
  Push(std::move(event));
}

void TokenStream::OnSampleFinished(const SampleFinished& finished) {
  v1::GenerateEvent event;
  *event.mutable_finished() = ToProto(finished);
  Push(std::move(event));
}

void TokenStream::OnDone(const absl::Status& status, const Usage& usage,
                         const std::string& rollout_id, PolicyVersion version) {
  Next next;
  {
    absl::MutexLock lock(&mutex_);
    if (status.ok()) {
      v1::GroupFinished* group = waiting_.emplace_back().mutable_group();
      *group->mutable_usage() = ToProto(usage);
      group->set_rollout_id(rollout_id);
      group->set_policy_version(Raw(version));
    }
    status_ = status;
    done_ = true;
    next = Advance();
  }
  Do(next);
}

}  // namespace coppice
