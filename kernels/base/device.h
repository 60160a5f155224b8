// Memory of the device that an Ops runs on. Buffers are move-only; freeing never throws and never
// fails.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>

namespace coppice {

enum class DeviceKind { kCpu, kCuda };

// Owns one allocation, at least 64-byte aligned on the CPU and 256 on CUDA. Moved-from buffers are
// empty.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(void* data, int64_t size_bytes, std::function<void(void*)> free)
      : data_(data), size_bytes_(size_bytes), free_(std::move(free)) {}
  DeviceBuffer(DeviceBuffer&& other) noexcept { Swap(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    Swap(other);
    return *this;
  }
  ~DeviceBuffer() {
    if (data_ != nullptr) free_(data_);
  }

  void* data() const { return data_; }
  int64_t size_bytes() const { return size_bytes_; }

 private:
  void Swap(DeviceBuffer& other) {
    std::swap(data_, other.data_);
    std::swap(size_bytes_, other.size_bytes_);
    std::swap(free_, other.free_);
  }

  void* data_ = nullptr;
  int64_t size_bytes_ = 0;
  std::function<void(void*)> free_;
};

}  // namespace coppice
