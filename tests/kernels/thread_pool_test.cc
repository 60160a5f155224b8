#include "kernels/cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <numeric>

namespace coppice::cpu {
namespace {

TEST(ThreadPoolTest, RunsEveryItemOnceOnAThreadOfThePool) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.num_threads(), threads);
    for (const int64_t n : {0, 1, 2, 7, 1000}) {
      std::vector<int> runs(n, 0);
      std::vector<int> thread_of(n, -1);
      pool.Run(n, [&](int64_t item, int thread) {
        ++runs[item];
        thread_of[item] = thread;
      });
      for (int64_t i = 0; i < n; ++i) {
        EXPECT_EQ(runs[i], 1);
        EXPECT_GE(thread_of[i], 0);
        EXPECT_LT(thread_of[i], threads);
      }
    }
  }
}

// Loops of all sizes in quick succession: a worker that comes late must not touch the next loop
// with an old item.
TEST(ThreadPoolTest, LateWorkersNeverRunAnOldItem) {
  ThreadPool pool(4);
  std::vector<int64_t> sums(64);
  for (int64_t loop = 0; loop < 20000; ++loop) {
    const int64_t n = loop % 5 == 0 ? 50 : 2 + loop % 3;
    pool.Run(n, [&](int64_t item, int) { sums[item] = loop * 100 + item; });
    for (int64_t i = 0; i < n; ++i) ASSERT_EQ(sums[i], loop * 100 + i);
  }
}

// A thread's own memory needs no lock: two items never run on one thread at once.
TEST(ThreadPoolTest, ThreadsKeepTheirOwnScratch) {
  ThreadPool pool(3);
  std::vector<int64_t> sums(3 * 16, 0);
  pool.Run(10000, [&](int64_t item, int thread) { sums[thread * 16] += item; });
  EXPECT_EQ(std::accumulate(sums.begin(), sums.end(), int64_t{0}), 10000 * 9999 / 2);
}

TEST(ThreadPoolTest, EndsWhileWorkersSleepOrSpin) {
  for (int i = 0; i < 200; ++i) {
    ThreadPool pool(3);
    if (i % 2 == 0) pool.Run(4, [](int64_t, int) {});
  }
}

}  // namespace
}  // namespace coppice::cpu
