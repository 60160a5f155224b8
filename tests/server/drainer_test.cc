#include "server/drainer.h"

#include "gtest/gtest.h"
#include "tests/support/fake_engine.h"

namespace coppice {
namespace {

TEST(DrainerTest, ARefusalIsNotTheEndAndIsAskedAgain) {
  FakeEngine engine;
  int ended = 0;
  Drainer drainer(engine, [&ended] { ++ended; });
  engine.control_status = absl::ResourceExhaustedError("commands: want room, got none; retry");
  for (int asked = 1; asked <= 3; ++asked) {
    drainer.Ask();
    EXPECT_EQ(engine.drains, asked);
    EXPECT_FALSE(drainer.drained());
  }
  EXPECT_EQ(ended, 0);

  engine.control_status = absl::OkStatus();
  drainer.Ask();
  drainer.Ask();  // is answered already

  EXPECT_TRUE(drainer.drained());
  EXPECT_EQ(engine.drains, 4);
  EXPECT_EQ(ended, 1);
}

}  // namespace
}  // namespace coppice
