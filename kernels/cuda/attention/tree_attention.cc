// Which kernels a launch is made of, and how its scratch is cut.
#include "kernels/cuda/attention/tree_attention.h"

#include <algorithm>

#include "kernels/cuda/attention/launchers.h"

namespace coppice::cuda {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int64_t kImageBytes = int64_t{2} * kKeyTile * kBackwardQueryTile;

int64_t Align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Cuts scratch into aligned pieces; counts bytes when there is no memory yet.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* Take(int64_t count) {
    T* at = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += Align(count * static_cast<int64_t>(sizeof(T)));
    return at;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

struct ForwardScratch {
  ForwardScratch(Scratch scratch, const AttentionSchedule& schedule, const AttentionShape& shape) {
    const int64_t partials = int64_t{schedule.num_partials} * shape.q_heads;
    counter = scratch.Take<int>(1);
    chunks.out = scratch.Take<float>(partials * shape.head_dim);
    chunks.sums = scratch.Take<float2>(partials);
    used = scratch.used();
  }
  int* counter;
  ChunkScratch chunks;
  int64_t used;
};

struct BackwardScratch {
  BackwardScratch(Scratch scratch, const AttentionSchedule& schedule, const AttentionShape& shape) {
    const int64_t context =
        int64_t{schedule.num_context_tiles} * kKeyTile * shape.kv_heads * shape.head_dim;
    const int64_t padded = (shape.rows + kKeyTile - 1) / kKeyTile * kKeyTile;
    counters = scratch.Take<int>(2);
    row_lse = scratch.Take<float>(padded * shape.q_heads);
    row_delta = scratch.Take<float>(padded * shape.q_heads);
    context_k = scratch.Take<uint16_t>(context);
    context_v = scratch.Take<uint16_t>(context);
    sums = scratch.Take<float>(
        schedule.num_rounds > 1 ? 2 * padded * shape.kv_heads * shape.head_dim : 0);
    ds = scratch.Take<char>(0);
    used = scratch.used();
  }
  int* counters;
  float *row_lse, *row_delta;
  uint16_t *context_k, *context_v;
  float* sums;
  char* ds;
  int64_t used;
};

int64_t DsBytesPerKvHead(const AttentionSchedule& schedule, const AttentionShape& shape) {
  return int64_t{schedule.num_images} * (shape.q_heads / shape.kv_heads) * kImageBytes;
}

// The lists of one round.
void Narrow(AttentionSchedule& schedule, const BackwardRound& round) {
  schedule.backward_tiles += round.tiles_begin;
  schedule.num_backward_tiles = round.num_tiles;
  schedule.longest_backward_list = round.longest_list;
  schedule.num_backward_entries = round.num_entries;
  schedule.key_work += round.work_begin;
  schedule.num_key_work = round.num_work;
  schedule.num_images = round.num_images;
}

bool StoresDs(const AttentionShape& shape) { return shape.head_dim >= kStoredScoresHeadDim; }

}  // namespace

bool HasTileKernels(int32_t head_dim, int compute_capability) {
  return compute_capability == 90 && (head_dim == 64 || head_dim == 128 || head_dim == 256);
}

bool HasStackedKernels(int32_t head_dim, int compute_capability) {
  return HasTileKernels(head_dim, compute_capability) && head_dim <= 128;
}

int32_t PortableSharedBytes(int32_t head_dim) {
  return std::max(ChunkSharedBytes(head_dim), PortableBackwardSharedBytes(head_dim));
}

int32_t DecodeSlots(int32_t kv_heads) { return Multiprocessors() / kv_heads; }

int64_t TreeAttentionScratchBytes(const AttentionSchedule& schedule, const AttentionShape& shape) {
  return ForwardScratch(Scratch(nullptr), schedule, shape).used;
}

cudaError_t LaunchTreeAttention(const TreeAttentionArgs& args, cudaStream_t stream) {
  const ForwardScratch scratch(Scratch(args.scratch), args.schedule, args.shape);
  if (args.schedule.num_query_tiles > 0) {
    if (const cudaError_t e = LaunchTileForward(args, scratch.counter, stream)) return e;
  }
  if (args.schedule.num_wide + args.schedule.num_narrow > 0) {
    if (const cudaError_t e = LaunchChunks(args, scratch.chunks, stream)) return e;
  }
  if (args.schedule.num_stacked_slots > 0) {
    return LaunchStackedChunks(args, scratch.chunks, stream);
  }
  if (args.schedule.num_merges == 0) return cudaSuccess;
  return LaunchMerges(args, scratch.chunks, stream);
}

int32_t ImagesOfBytes(const AttentionShape& shape, int64_t bytes) {
  return StoresDs(shape) ? static_cast<int32_t>(bytes / (shape.q_heads * kImageBytes)) : 0;
}

int32_t QueryTileItems(const AttentionShape& shape) {
  const int32_t group_size = shape.q_heads / shape.kv_heads;
  const int32_t pairs = (group_size + 1) / 2, parts = (shape.head_dim + 127) / 128;
  return shape.kv_heads * pairs * parts;
}

int32_t WaveItems() { return Multiprocessors(); }

int64_t TreeAttentionBackwardScratchBytes(const AttentionSchedule& schedule,
                                          const AttentionShape& shape, int32_t kv_heads) {
  const int64_t fixed = BackwardScratch(Scratch(nullptr), schedule, shape).used;
  return StoresDs(shape) ? fixed + kv_heads * DsBytesPerKvHead(schedule, shape) : fixed;
}

cudaError_t LaunchTreeAttentionBackward(const TreeAttentionBackwardArgs& args,
                                        cudaStream_t stream) {
  const AttentionShape& shape = args.shape;
  if (shape.rows == 0) return cudaSuccess;
  const BackwardScratch scratch(Scratch(args.scratch), args.schedule, shape);
  if (args.scratch_bytes < scratch.used) return cudaErrorInvalidValue;
  if (args.schedule.num_key_work == 0) return cudaErrorNotSupported;
  if (args.portable && args.schedule.num_rounds > 1) return cudaErrorInvalidValue;
  const int64_t fit = (args.scratch_bytes - scratch.used) / DsBytesPerKvHead(args.schedule, shape);
  const bool stores = fit > 0;
  // As many heads go together each time.
  const int64_t times = stores ? (shape.kv_heads + fit - 1) / fit : 1;
  const int32_t heads = static_cast<int32_t>((shape.kv_heads + times - 1) / times);

  BackwardPass pass = {.args = &args,
                       .row_lse = scratch.row_lse,
                       .row_delta = scratch.row_delta,
                       .context_k = scratch.context_k,
                       .context_v = scratch.context_v,
                       .ds = stores ? scratch.ds : nullptr,
                       .sums = scratch.sums,
                       .counters = scratch.counters};
  if (const cudaError_t e = LaunchBackwardRowSums(pass, stream)) return e;
  if (args.schedule.num_context_tiles > 0) {
    if (const cudaError_t e = LaunchGatherContext(pass, stream)) return e;
  }
  if (args.portable) return LaunchPortableBackward(pass, stream);
  for (int32_t r = 0; r < args.schedule.num_rounds; ++r) {
    TreeAttentionBackwardArgs round = args;
    Narrow(round.schedule, args.rounds[r]);
    pass.args = &round;
    for (int32_t first = 0; first < shape.kv_heads; first += heads) {
      pass.first_kv_head = first;
      pass.num_kv_heads = std::min(heads, shape.kv_heads - first);
      if (const cudaError_t e = LaunchBackwardKeys(pass, stream)) return e;
      if (const cudaError_t e = LaunchBackwardQueries(pass, stream)) return e;
    }
  }
  return cudaSuccess;
}

}  // namespace coppice::cuda
