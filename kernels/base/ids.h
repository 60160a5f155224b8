// Strong integer ids. An enum class cannot be mixed up with a count or with another id; convert
// with Raw().
#pragma once

#include <cstdint>
#include <type_traits>

namespace coppice {

enum class BlockId : int32_t {};  // index of a KV block in the pool
enum class RequestId : uint64_t {
};  // one accepted Generate / Score / Warm call, unique per process
enum class PolicyVersion : uint64_t {};  // number of committed updates of the weights

template <typename E>
constexpr std::underlying_type_t<E> Raw(E id) {
  return static_cast<std::underlying_type_t<E>>(id);
}

constexpr PolicyVersion Next(PolicyVersion v) { return PolicyVersion{Raw(v) + 1}; }

}  // namespace coppice
