// PinnedMemory: page-locked host blocks for copies that the host does not wait for. A block is
// taken, filled or named as a destination, used by copies on one stream, marked, and given back; it
// is taken again only after the stream has passed the mark. At most kMaxBlocks, kept until the end.
// Owned by Context; one caller at a time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace coppice::cuda {

class PinnedMemory {
 public:
  static constexpr int kMaxBlocks = 16;

  struct Block {
    char* data = nullptr;
    int64_t size_bytes = 0;
    cudaEvent_t passed = nullptr;  // of the last mark
    bool taken = false;
  };

  PinnedMemory() = default;
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  // At least `size_bytes`, contents undefined. Waits for the device only if every block is on its
  // way. REQUIRES: fewer than kMaxBlocks are taken.
  cudaError_t Take(int64_t size_bytes, Block** block);
  // All copies of the block are queued on `stream`.
  static cudaError_t Mark(Block& block, cudaStream_t stream) {
    return cudaEventRecord(block.passed, stream);
  }
  static void GiveBack(Block& block) { block.taken = false; }

 private:
  Block* FindIdle(int64_t size_bytes);
  cudaError_t Resize(Block& block, int64_t size_bytes);

  std::vector<std::unique_ptr<Block>> blocks_;
};

}  // namespace coppice::cuda
