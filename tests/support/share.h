// Cases shared out among processes, and fewer of them, for tools that slow kernels down a
// hundredfold (tests/sanitize.sh).
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace coppice {

struct TestPart {
  int index = 0, count = 1;
};
// I/N of COPPICE_TEST_PART in the environment, else 0/1: everything.
inline TestPart ThisPart() {
  TestPart part;
  if (const char* text = std::getenv("COPPICE_TEST_PART"))
    std::sscanf(text, "%d/%d", &part.index, &part.count);
  return part;
}

// This process's share of `all`: every N-th from the I-th on.
template <typename T>
std::vector<T> Share(const std::vector<T>& all) {
  const TestPart part = ThisPart();
  std::vector<T> share;
  for (size_t i = part.index; i < all.size(); i += part.count) share.push_back(all[i]);
  return share;
}

// COPPICE_TEST_SCALE=small: each kernel and each branch once.
inline bool SmallScale() {
  const char* scale = std::getenv("COPPICE_TEST_SCALE");
  return scale != nullptr && std::strcmp(scale, "small") == 0;
}

// `few`, cases or their number, must leave no kernel and no branch out that `all` reaches.
template <typename T>
T Scaled(T all, T few) {
  return SmallScale() ? few : all;
}

// Times to repeat the same, to see that it gives equal bits or to see what is rare.
inline int Repeats(int times) { return Scaled(times, 2); }

}  // namespace coppice
