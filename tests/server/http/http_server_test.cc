#include "server/http/http_server.h"

#include <atomic>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "httplib.h"
#include "server/metrics/metrics.h"

namespace coppice {
namespace {

using ::testing::HasSubstr;

class HttpServerTest : public ::testing::Test {
 protected:
  HttpServer::Options Options(int port = 0) {
    HttpServer::Options options;
    options.port = port;
    options.metrics = [this] { return metrics_.Serialize(); };
    options.not_ready_reason = [this] { return std::string(ready_ ? "" : "draining"); };
    return options;
  }

  Metrics metrics_;
  std::atomic<bool> ready_{true};
};

TEST_F(HttpServerTest, ServesMetricsInTextFormat) {
  auto server = HttpServer::Start(Options());
  ASSERT_TRUE(server.ok()) << server.status();
  metrics_.prompt_tokens_queried.Increment(7);

  const auto response = httplib::Client("127.0.0.1", (*server)->port()).Get("/metrics");

  ASSERT_TRUE(response);
  EXPECT_EQ(response->status, 200);
  EXPECT_THAT(response->get_header_value("Content-Type"), HasSubstr("version=0.0.4"));
  EXPECT_THAT(response->body, HasSubstr("coppice_prompt_tokens_total 7"));
  EXPECT_THAT(response->body, HasSubstr("coppice_weight_sync_bytes_total 0"));
}

TEST_F(HttpServerTest, ReadyFollowsTheDaemonAndHealthDoesNot) {
  auto server = HttpServer::Start(Options());
  ASSERT_TRUE(server.ok()) << server.status();
  httplib::Client client("127.0.0.1", (*server)->port());

  EXPECT_EQ(client.Get("/readyz")->status, 200);
  ready_ = false;
  const auto not_ready = client.Get("/readyz");

  EXPECT_EQ(not_ready->status, 503);
  EXPECT_EQ(not_ready->body, "draining\n");
  EXPECT_EQ(client.Get("/healthz")->status, 200);
  EXPECT_EQ(client.Get("/other")->status, 404);
}

TEST_F(HttpServerTest, AFailedProcessIsUnhealthy) {
  HttpServer::Options options = Options();
  std::atomic<bool> healthy{true};
  options.healthy = [&healthy] { return healthy.load(); };
  auto server = HttpServer::Start(std::move(options));
  ASSERT_TRUE(server.ok()) << server.status();
  httplib::Client client("127.0.0.1", (*server)->port());

  EXPECT_EQ(client.Get("/healthz")->status, 200);
  healthy = false;
  EXPECT_EQ(client.Get("/healthz")->status, 503);
}

TEST_F(HttpServerTest, TakenPortIsAnError) {
  auto first = HttpServer::Start(Options());
  ASSERT_TRUE(first.ok()) << first.status();

  const auto second = HttpServer::Start(Options((*first)->port()));

  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("change --http_port"));
}

TEST_F(HttpServerTest, StartsAndStopsAtOnce) {
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(HttpServer::Start(Options()).ok());
}

}  // namespace
}  // namespace coppice
