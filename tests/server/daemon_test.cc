// The daemon in this process, on a device that breaks: what callers, probes and the supervisor see.
#include "server/daemon.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "absl/strings/str_cat.h"
#include "coppice/v1/generation.grpc.pb.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "httplib.h"
#include "tests/support/failing_ops.h"
#include "tests/support/raw_call.h"

namespace coppice {
namespace {

// Serves a tiny model in a thread of its own.
class DaemonTest : public testing::Test {
 protected:
  DaemonTest() : port_file_(absl::StrCat(testing::TempDir(), "coppice_", getpid(), ".json")) {
    Config config;
    config.model_geometry = "tiny-llama";
    config.threads = 1;
    config.port = config.http_port = 0;
    config.port_file = port_file_;
    const auto make_ops = [this](const Config& c,
                                 DType) -> absl::StatusOr<std::unique_ptr<ops::Ops>> {
      auto ops = ops::CreateOps(c.device, static_cast<int>(c.threads));
      if (!ops.ok()) return ops.status();
      auto device = std::make_unique<FailingOps>(*std::move(ops));
      device_ = device.get();
      return device;
    };
    daemon_ = std::make_unique<Daemon>(config, make_ops);
    thread_ = std::thread([this] { exit_ = daemon_->Run(); });
    while (!std::filesystem::exists(port_file_)) std::this_thread::yield();
    const nlohmann::json ports = nlohmann::json::parse(std::ifstream(port_file_));
    http_port_ = ports["http"];
    channel_ = grpc::CreateChannel(absl::StrCat("127.0.0.1:", ports["grpc"].get<int>()),
                                   grpc::InsecureChannelCredentials());
  }
  ~DaemonTest() override { std::filesystem::remove(port_file_); }

  const std::string port_file_;
  FailingOps* device_ = nullptr;
  std::unique_ptr<Daemon> daemon_;
  std::thread thread_;
  ExitCode exit_ = ExitCode::kDrained;
  int http_port_ = 0;
  std::shared_ptr<grpc::Channel> channel_;
};

TEST_F(DaemonTest, ADeviceErrorEndsEveryStreamAndTheProcess) {
  // An open watch keeps the server up for its grace, in which a probe can ask.
  RawStream watch(channel_, "/grpc.health.v1.Health/Watch", "");
  ASSERT_EQ(watch.Read(), kServing);
  grpc::ClientContext context;
  const auto generation = v1::Generation::NewStub(channel_);
  v1::GenerateRequest request;
  for (int i = 1; i < 9; ++i) request.mutable_prompt()->mutable_tokens()->add_ids(i);
  request.mutable_sampling()->set_max_tokens(100000);
  request.mutable_sampling()->set_ignore_eos(true);
  const auto stream = generation->Generate(&context, request);
  v1::GenerateEvent event;
  ASSERT_TRUE(stream->Read(&event));

  device_->Fail();

  EXPECT_EQ(watch.Read(), kNotServing);
  const auto probe = httplib::Client("127.0.0.1", http_port_).Get("/healthz");
  ASSERT_TRUE(probe) << "the probe found nobody";
  EXPECT_EQ(probe->status, 503);
  while (stream->Read(&event)) {
  }
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::INTERNAL);
  thread_.join();
  EXPECT_EQ(exit_, ExitCode::kDeviceError);
  EXPECT_EQ(static_cast<int>(exit_), 6);
}

TEST(DaemonStartTest, OpensTheDeviceInTheTypeOfTheCheckpoint) {
  std::optional<DType> asked;
  const auto run = [&asked](const std::string& model, const std::string& gradient_dtype) {
    Config config;
    config.model = std::string(COPPICE_SOURCE_DIR "/tests/parity/golden/tiny/") + model;
    config.device = "cuda";
    config.gradient_dtype = gradient_dtype;
    config.port = config.http_port = 0;
    asked.reset();
    const auto no_device = [&asked](const Config&, DType dtype) {
      asked = dtype;
      return absl::StatusOr<std::unique_ptr<ops::Ops>>(absl::UnimplementedError("no device"));
    };
    return Daemon(config, no_device).Run();
  };
  EXPECT_EQ(run("llama_linear_tied", "bf16"), ExitCode::kDeviceError);
  EXPECT_EQ(asked, DType::kBF16);
  EXPECT_EQ(run("qwen3_tied", "f32"), ExitCode::kDeviceError);
  EXPECT_EQ(asked, DType::kF16);
  EXPECT_EQ(run("qwen3_tied", "bf16"), ExitCode::kBadFlags);
  EXPECT_EQ(asked, std::nullopt);
  EXPECT_EQ(run("absent", "f32"), ExitCode::kModelError);
  EXPECT_EQ(asked, std::nullopt);
}

TEST(DaemonStartTest, AnUnusableCheckpointDirectoryIsABadFlagBeforeAnythingIsLoaded) {
  Config config;
  config.model_geometry = "tiny-llama";
  config.port = config.http_port = 0;
  config.checkpoint_dir = absl::StrCat(testing::TempDir(), "coppice_not_a_dir_", getpid());
  std::ofstream(config.checkpoint_dir) << "a file";
  bool opened = false;
  const auto no_device = [&opened](const Config&, DType) {
    opened = true;
    return absl::StatusOr<std::unique_ptr<ops::Ops>>(absl::UnimplementedError("no device"));
  };
  EXPECT_EQ(Daemon(config, no_device).Run(), ExitCode::kBadFlags);
  EXPECT_FALSE(opened);
  std::filesystem::remove(config.checkpoint_dir);
}

TEST(DaemonStartTest, ADeviceThatCannotRunTheModelIsRefusedAtStart) {
  Config config;
  config.model_geometry = "tiny-llama";
  config.threads = 1;
  config.port = config.http_port = 0;
  config.port_file = absl::StrCat(testing::TempDir(), "coppice_lacks_", getpid(), ".json");
  std::ofstream(config.port_file) << "of an earlier run";
  const auto lacks_attention = [](const Config& c,
                                  DType) -> absl::StatusOr<std::unique_ptr<ops::Ops>> {
    auto ops = ops::CreateOps(c.device, static_cast<int>(c.threads));
    if (!ops.ok()) return ops.status();
    auto device = std::make_unique<FailingOps>(*std::move(ops));
    device->LackAttention();
    return device;
  };
  EXPECT_EQ(Daemon(config, lacks_attention).Run(), ExitCode::kModelError);
  EXPECT_FALSE(std::filesystem::exists(config.port_file)) << "who waits for it would go on";
}

}  // namespace
}  // namespace coppice
