// Cases shared out among processes, for tools that slow kernels down a hundredfold (racecheck).
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace coppice {

// This process's share of `all`: every N-th from the I-th on with COPPICE_TEST_PART=I/N in the
// environment, else all of them.
template <typename T>
std::vector<T> Share(const std::vector<T>& all) {
  int part = 0, parts = 1;
  if (const char* text = std::getenv("COPPICE_TEST_PART"))
    std::sscanf(text, "%d/%d", &part, &parts);
  std::vector<T> share;
  for (size_t i = part; i < all.size(); i += parts) share.push_back(all[i]);
  return share;
}

}  // namespace coppice
