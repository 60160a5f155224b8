#include "kernels/model/arena_fill.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "kernels/base/float16.h"
#include "kernels/base/log.h"
#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

constexpr int64_t kChunkElements = int64_t{1} << 20;
constexpr int64_t kLoggedElements = int64_t{1} << 28;  // from here on progress is logged

struct Chunk {
  size_t tensor;
  int64_t row_begin, row_end;
};

std::vector<Chunk> SplitIntoChunks(const std::vector<NamedTensor>& tensors) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorView& view = tensors[i].view;
    const int64_t rows = view.dim(0);
    const int64_t step =
        std::max<int64_t>(1, kChunkElements / std::max<int64_t>(1, view.stride[0]));
    for (int64_t r = 0; r < rows; r += step) chunks.push_back({i, r, std::min(rows, r + step)});
  }
  return chunks;
}

class Filler {
 public:
  Filler(const std::vector<NamedTensor>& tensors, const RowSource& source, ops::Ops& ops)
      : tensors_(tensors), source_(source), ops_(ops), chunks_(SplitIntoChunks(tensors)) {
    const ops::DeviceInfo info = ops.Info();
    in_place_ = info.kind == DeviceKind::kCpu && info.compute_dtype == DType::kF32;
    for (const NamedTensor& t : tensors) num_elements_ += t.view.num_elements();
  }

  absl::Status Run() {
    const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
    const int64_t num_threads = std::min(cores, 1 + num_elements_ / kChunkElements);
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < num_threads; ++i) threads.emplace_back([this] { Work(); });
    Work();
    for (std::thread& t : threads) t.join();
    absl::MutexLock lock(&mutex_);
    return status_;
  }

 private:
  void Work() {
    std::vector<float> staging;
    std::vector<uint16_t> narrow;
    while (!failed_.load(std::memory_order_relaxed)) {
      const size_t i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= chunks_.size()) return;
      const absl::Status status = FillChunk(chunks_[i], staging, narrow);
      if (status.ok()) {
        CountDone(chunks_[i]);
        continue;
      }
      absl::MutexLock lock(&mutex_);
      if (status_.ok()) status_ = status;
      failed_.store(true, std::memory_order_relaxed);
    }
  }

  // Logs every quarter of a large model.
  void CountDone(const Chunk& chunk) {
    const TensorView rows = tensors_[chunk.tensor].view.Rows(chunk.row_begin, chunk.row_end);
    const int64_t before = done_.fetch_add(rows.num_elements()),
                  after = before + rows.num_elements();
    if (num_elements_ < kLoggedElements ||
        4 * after / num_elements_ == 4 * before / num_elements_) {
      return;
    }
    LOG(INFO) << "weights_loading percent=" << 100 * after / num_elements_
              << " params_m=" << after / 1'000'000;
  }

  absl::Status FillChunk(const Chunk& chunk, std::vector<float>& staging,
                         std::vector<uint16_t>& narrow) {
    const TensorView dst = tensors_[chunk.tensor].view.Rows(chunk.row_begin, chunk.row_end);
    if (in_place_) return source_(chunk.tensor, chunk.row_begin, chunk.row_end, dst.f32());
    staging.resize(dst.num_elements());
    RETURN_IF_ERROR(source_(chunk.tensor, chunk.row_begin, chunk.row_end, staging.data()));
    const void* host = staging.data();
    if (dst.dtype != DType::kF32) {
      if (dst.dtype == DType::kF16) {
        RETURN_IF_ERROR(CheckF16Range(tensors_[chunk.tensor].name, staging));
      }
      narrow.resize(staging.size());
      std::transform(staging.begin(), staging.end(), narrow.begin(),
                     [dtype = dst.dtype](float x) { return Bits16FromFloat(dtype, x); });
      host = narrow.data();
    }
    absl::MutexLock lock(&mutex_);  // an Ops takes one caller at a time
    RETURN_IF_ERROR(ops_.Upload(host, dst));
    return ops_.Synchronize();
  }

  const std::vector<NamedTensor>& tensors_;
  const RowSource& source_;
  ops::Ops& ops_;
  const std::vector<Chunk> chunks_;
  bool in_place_ = false;
  int64_t num_elements_ = 0;
  std::atomic<int64_t> done_{0};
  std::atomic<size_t> next_{0};
  std::atomic<bool> failed_{false};
  absl::Mutex mutex_;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

absl::Status CheckF16Range(absl::string_view name, absl::Span<const float> values) {
  for (const float x : values) {
    if (std::abs(x) <= kMaxF16) continue;
    return absl::InvalidArgumentError(absl::StrCat("weights do not fit f16: tensor ", name,
                                                   " wants at most ", kMaxF16, ", got ", x,
                                                   "; run with --compute_dtype=bf16"));
  }
  return absl::OkStatus();
}

absl::Status FillTensors(const std::vector<NamedTensor>& tensors, const RowSource& source,
                         ops::Ops& ops) {
  return Filler(tensors, source, ops).Run();
}

}  // namespace coppice
