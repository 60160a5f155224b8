#include "kernels/cuda/pinned_memory.h"

#include <algorithm>

#include "kernels/base/check.h"

namespace coppice::cuda {
namespace {

constexpr int64_t kMinBlockBytes = int64_t{64} << 10;

bool IsIdle(const PinnedMemory::Block& block) {
  if (block.taken) return false;
  if (cudaEventQuery(block.passed) == cudaSuccess) return true;
  cudaGetLastError();  // "not ready" is an answer, not an error for the next launch to find
  return false;
}

}  // namespace

PinnedMemory::~PinnedMemory() {
  for (const std::unique_ptr<Block>& block : blocks_) {
    cudaEventDestroy(block->passed);
    cudaFreeHost(block->data);
  }
}

cudaError_t PinnedMemory::Take(int64_t size_bytes, Block** block) {
  Block* found = FindIdle(size_bytes);
  if (found == nullptr && blocks_.size() < kMaxBlocks) {
    auto fresh = std::make_unique<Block>();
    const cudaError_t error = cudaEventCreateWithFlags(&fresh->passed, cudaEventDisableTiming);
    if (error != cudaSuccess) return error;
    found = blocks_.emplace_back(std::move(fresh)).get();
  }
  if (found == nullptr) {
    const auto free = std::find_if(blocks_.begin(), blocks_.end(),
                                   [](const auto& candidate) { return !candidate->taken; });
    CHECK(free != blocks_.end());
    found = free->get();
  }
  if (const cudaError_t error = cudaEventSynchronize(found->passed); error != cudaSuccess) {
    return error;
  }
  if (found->size_bytes < size_bytes) {
    if (const cudaError_t error = Resize(*found, size_bytes); error != cudaSuccess) return error;
  }
  found->taken = true;
  *block = found;
  return cudaSuccess;
}

PinnedMemory::Block* PinnedMemory::FindIdle(int64_t size_bytes) {
  for (const std::unique_ptr<Block>& block : blocks_) {
    if (block->size_bytes >= size_bytes && IsIdle(*block)) return block.get();
  }
  return nullptr;
}

cudaError_t PinnedMemory::Resize(Block& block, int64_t size_bytes) {
  int64_t rounded = kMinBlockBytes;
  while (rounded < size_bytes) rounded *= 2;
  cudaFreeHost(block.data);
  block.data = nullptr;
  block.size_bytes = 0;
  void* data = nullptr;
  const cudaError_t error = cudaMallocHost(&data, static_cast<size_t>(rounded));
  if (error != cudaSuccess) return error;
  block.data = static_cast<char*>(data);
  block.size_bytes = rounded;
  return cudaSuccess;
}

}  // namespace coppice::cuda
