#include "server/engine/command_queue.h"

#include <gtest/gtest.h>

#include <memory>
#include <thread>

namespace coppice {
namespace {

using Queue = BoundedQueue<std::unique_ptr<int>>;

TEST(BoundedQueueTest, KeepsOrderAndRefusesBeyondItsCapacity) {
  Queue queue(2);
  EXPECT_EQ(queue.TryPush(std::make_unique<int>(1)), Queue::PushResult::kPushed);
  EXPECT_EQ(queue.TryPush(std::make_unique<int>(2)), Queue::PushResult::kPushed);
  auto third = std::make_unique<int>(3);
  EXPECT_EQ(queue.TryPush(std::move(third)), Queue::PushResult::kFull);
  EXPECT_NE(third, nullptr);  // still the caller's
  const auto items = queue.TakeAll();
  ASSERT_EQ(items.size(), 2u);
  EXPECT_EQ(*items[0], 1);
  EXPECT_EQ(*items[1], 2);
}

TEST(BoundedQueueTest, AClosedQueueRefusesButGivesBackWhatIsInside) {
  Queue queue(2);
  queue.TryPush(std::make_unique<int>(1));
  queue.Close();
  EXPECT_EQ(queue.TryPush(std::make_unique<int>(2)), Queue::PushResult::kClosed);
  EXPECT_EQ(queue.TakeAll().size(), 1u);
}

TEST(BoundedQueueTest, ManyProducersLoseNothing) {
  Queue queue(4000);
  std::vector<std::thread> producers;
  for (int t = 0; t < 4; ++t) {
    producers.emplace_back([&queue, t] {
      for (int i = 0; i < 1000; ++i) queue.TryPush(std::make_unique<int>(t * 1000 + i));
    });
  }
  for (std::thread& producer : producers) producer.join();
  std::vector<int> next(4, 0);
  for (const auto& item : queue.TakeAll()) EXPECT_EQ(*item % 1000, next[*item / 1000]++);
  EXPECT_EQ(next, std::vector<int>(4, 1000));
}

TEST(QueueSlotTest, GivesItsPlaceBackOnce) {
  std::atomic<int64_t> taken{0};
  QueueSlot first = QueueSlot::TryTake(taken, 1);
  EXPECT_TRUE(first);
  EXPECT_FALSE(QueueSlot::TryTake(taken, 1));
  QueueSlot moved = std::move(first);
  moved.Release();
  moved.Release();
  EXPECT_EQ(taken.load(), 0);
}

TEST(DoorbellTest, RemembersARingBeforeTheWait) {
  Doorbell bell;
  bell.Ring();
  bell.Wait(absl::InfiniteDuration());
}

}  // namespace
}  // namespace coppice
