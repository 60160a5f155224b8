#include "kernels/cuda/attention/decode_spread.h"

#include <algorithm>
#include <tuple>

namespace coppice::cuda {
namespace {

// Costs in quarters of a whole key tile's time.
constexpr int64_t kTileCost = 4;
constexpr int64_t kPieceCost = 1;   // queries in, sums out
constexpr int32_t kWholeTiles = 2;  // jobs of at most as many key tiles are not cut

int32_t Tiles(const DecodeJob& job) {
  return (job.key_end - job.key_begin + kKeyTile - 1) / kKeyTile;
}
int64_t CostOf(const DecodeJob& job) {
  constexpr int32_t kUnit = kKeyTile / kTileCost;
  return kPieceCost + (job.key_end - job.key_begin + kUnit - 1) / kUnit;
}

class Spreader {
 public:
  Spreader(const std::vector<DecodeJob>& jobs, int32_t slots) : jobs_(jobs), loads_(slots, 0) {}

  std::vector<DecodePiece> Spread() {
    PlaceShortJobs();
    CutLongJobs();
    std::sort(pieces_.begin(), pieces_.end(), [](const DecodePiece& a, const DecodePiece& b) {
      return std::tie(a.job, a.key_begin) < std::tie(b.job, b.key_begin);
    });
    return std::move(pieces_);
  }

 private:
  void PlaceShortJobs() {
    std::vector<int32_t> order;
    for (int32_t j = 0; j < static_cast<int32_t>(jobs_.size()); ++j) {
      if (Tiles(jobs_[j]) <= kWholeTiles) order.push_back(j);
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return CostOf(jobs_[a]) > CostOf(jobs_[b]); });
    for (const int32_t j : order) {
      const auto least = std::min_element(loads_.begin(), loads_.end());
      *least += CostOf(jobs_[j]);
      const auto slot = static_cast<int32_t>(least - loads_.begin());
      pieces_.push_back({j, slot, jobs_[j].key_begin, jobs_[j].key_end});
    }
  }

  // Key tiles that a slot can take until its load is `level`.
  static int64_t Room(int64_t load, int64_t level) {
    return std::max<int64_t>(0, (level - load - kPieceCost) / kTileCost);
  }

  // The least level that makes room for as many tiles.
  int64_t Level(int64_t tiles) const {
    int64_t low = 0;
    int64_t high = *std::max_element(loads_.begin(), loads_.end()) + kPieceCost + tiles * kTileCost;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      int64_t room = 0;
      for (const int64_t load : loads_) room += Room(load, middle);
      (room >= tiles ? high : low) = room >= tiles ? middle : middle + 1;
    }
    return low;
  }

  void CutLongJobs() {
    int64_t tiles = 0;
    for (const DecodeJob& job : jobs_) tiles += Tiles(job) > kWholeTiles ? Tiles(job) : 0;
    if (tiles == 0) return;
    const int64_t level = Level(tiles);
    int32_t slot = 0;
    int64_t room = Room(loads_[0], level);
    for (int32_t j = 0; j < static_cast<int32_t>(jobs_.size()); ++j) {
      if (Tiles(jobs_[j]) <= kWholeTiles) continue;
      for (int32_t key = jobs_[j].key_begin; key < jobs_[j].key_end;) {
        while (room == 0) room = Room(loads_[++slot], level);
        const int64_t left = (jobs_[j].key_end - key + kKeyTile - 1) / kKeyTile;
        const auto take = static_cast<int32_t>(std::min(room, left));
        const int32_t end = std::min(key + take * kKeyTile, jobs_[j].key_end);
        pieces_.push_back({j, slot, key, end});
        room -= take;
        key = end;
      }
    }
  }

  const std::vector<DecodeJob>& jobs_;
  std::vector<int64_t> loads_;  // [slots]
  std::vector<DecodePiece> pieces_;
};

}  // namespace

std::vector<DecodePiece> SpreadDecode(const std::vector<DecodeJob>& jobs, int32_t slots) {
  return Spreader(jobs, slots).Spread();
}

bool FitBeside(const std::vector<ChunkWork>& leaves, const std::vector<ChunkWork>& stacked) {
  int64_t leaf_keys = 0, stacked_keys = 0;
  for (const ChunkWork& item : leaves) leaf_keys += item.key_end - item.key_begin + 32;
  for (const ChunkWork& item : stacked) stacked_keys += item.key_end - item.key_begin;
  return 2 * leaf_keys <= stacked_keys;
}

void SortLongestFirst(std::vector<ChunkWork>& items) {
  std::stable_sort(items.begin(), items.end(), [](const ChunkWork& a, const ChunkWork& b) {
    return a.key_end - a.key_begin > b.key_end - b.key_begin;
  });
}

DealtItems DealInTurn(std::vector<ChunkWork> items, int32_t slots) {
  SortLongestFirst(items);
  DealtItems dealt;
  const auto count = static_cast<int32_t>(items.size());
  for (int32_t slot = 0; slot < slots; ++slot) {
    dealt.begins.push_back(static_cast<int32_t>(dealt.items.size()));
    for (int32_t i = slot; i < count; i += slots) dealt.items.push_back(items[i]);
  }
  dealt.begins.push_back(static_cast<int32_t>(dealt.items.size()));
  return dealt;
}

MergeLists PlanMerges(std::vector<std::vector<PartialResult>> rows, bool by_position) {
  MergeLists lists;
  const auto size = [](const auto& v) { return static_cast<int32_t>(v.size()); };
  for (int32_t row = 0; row < size(rows); ++row) {
    std::vector<PartialResult>& parts = rows[row];
    if (parts.empty()) continue;
    std::stable_sort(parts.begin(), parts.end(),
                     [](const PartialResult& a, const PartialResult& b) { return a.key < b.key; });
    MergeWork work = {row, size(lists.chunks), 0, size(lists.parts), 0};
    for (int32_t i = 0; i < size(parts); ++i) {
      if (i == 0 || (by_position ? parts[i].key % kChunkKeys : i % kChunkParts) == 0) {
        lists.chunks.push_back(size(lists.parts));
        ++work.num_chunks;
      }
      lists.parts.push_back(parts[i].index);
    }
    work.parts_end = size(lists.parts);
    lists.chunks.push_back(work.parts_end);
    lists.most_chunks = std::max(lists.most_chunks, work.num_chunks);
    lists.rows.push_back(work);
  }
  return lists;
}

}  // namespace coppice::cuda
