// The daemon as its operator sees it: flags, exit codes, ports, probes, signals, crashes.
#include <signal.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coppice/v1/generation.grpc.pb.h"
#include "coppice/v1/training.grpc.pb.h"
#include "gmock/gmock.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "gtest/gtest.h"
#include "httplib.h"
#include "nlohmann/json.hpp"
#include "tests/support/daemon_process.h"
#include "tests/support/raw_call.h"

namespace coppice {
namespace {

using ::testing::HasSubstr;

class CoppicedTest : public ::testing::Test {
 protected:
  CoppicedTest() {
    directory_ = std::filesystem::temp_directory_path() /
                 absl::StrCat("coppiced_test_", getpid(), "_",
                              ::testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::create_directories(directory_);
  }
  ~CoppicedTest() override { std::filesystem::remove_all(directory_); }

  static std::unique_ptr<DaemonProcess> Run(std::vector<std::string> args) {
    return std::make_unique<DaemonProcess>(COPPICED_BINARY, std::move(args));
  }
  // A tiny random model on free ports, plus `args`.
  static std::unique_ptr<DaemonProcess> Serve(std::vector<std::string> args = {}) {
    args.insert(args.begin(), {"--model_geometry=tiny-llama", "--seed=7", "--threads=1", "--port=0",
                               "--http_port=0"});
    return Run(std::move(args));
  }
  static std::shared_ptr<grpc::Channel> Channel(const DaemonProcess& daemon) {
    return grpc::CreateChannel(absl::StrCat("127.0.0.1:", daemon.grpc_port()),
                               grpc::InsecureChannelCredentials());
  }

  static v1::GenerateRequest Request(int max_tokens) {
    v1::GenerateRequest request;
    for (int id = 1; id <= 20; ++id) request.mutable_prompt()->mutable_tokens()->add_ids(id);
    request.mutable_sampling()->set_max_tokens(max_tokens);
    request.mutable_sampling()->set_seed(3);
    request.mutable_sampling()->set_ignore_eos(true);
    return request;
  }
  static std::vector<int32_t> Tokens(grpc::ClientReader<v1::GenerateEvent>& reader) {
    std::vector<int32_t> tokens;
    v1::GenerateEvent event;
    while (reader.Read(&event)) {
      const auto& ids = event.chunk().token_ids();
      tokens.insert(tokens.end(), ids.begin(), ids.end());
    }
    return tokens;
  }
  static std::vector<int32_t> Generate(const DaemonProcess& daemon, int max_tokens) {
    grpc::ClientContext context;
    auto reader = v1::Generation::NewStub(Channel(daemon))->Generate(&context, Request(max_tokens));
    std::vector<int32_t> tokens = Tokens(*reader);
    EXPECT_TRUE(reader->Finish().ok());
    return tokens;
  }

  static v1::TrainStepRequest Step(const std::string& id) {
    v1::TrainStepRequest request;
    request.set_step_id(id);
    request.set_durable(true);
    request.mutable_optim()->set_learning_rate(0.01f);
    request.set_return_logprobs(true);
    v1::Group* group = request.add_groups();
    for (int i = 1; i <= 8; ++i) group->mutable_prompt()->add_ids(i);
    for (int s = 0; s < 2; ++s) {
      v1::Sample* sample = group->add_samples();
      for (int i = 0; i < 4; ++i) sample->mutable_token_ids()->add_ids(10 + i * (s + 1));
      sample->set_reward(static_cast<float>(s));
    }
    return request;
  }
  static v1::TrainStepResponse Train(const DaemonProcess& daemon,
                                     const v1::TrainStepRequest& step) {
    grpc::ClientContext context;
    v1::TrainStepResponse response;
    const grpc::Status status =
        v1::Training::NewStub(Channel(daemon))->TrainStep(&context, step, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response;
  }

  static int Ready(const DaemonProcess& daemon) {
    const auto response = httplib::Client("127.0.0.1", daemon.http_port()).Get("/readyz");
    return response ? response->status : 0;
  }

  std::filesystem::path directory_;
};

TEST_F(CoppicedTest, BadFlagsExitWithTwo) {
  auto daemon = Run({"--no_such_flag"});
  EXPECT_EQ(daemon->Wait(), 2);
  EXPECT_THAT(daemon->log(), HasSubstr("--no_such_flag: want a flag that exists"));
  EXPECT_EQ(Run({"--model_geometry=tiny-llama", "--port=99999"})->Wait(), 2);
  EXPECT_EQ(Run({})->Wait(), 2);
}

TEST_F(CoppicedTest, HelpAndVersionExitWithZero) {
  auto help = Run({"--help"});
  EXPECT_EQ(help->Wait(), 0);
  EXPECT_THAT(help->log(), HasSubstr("--drain_timeout_s"));
  EXPECT_EQ(Run({"--version"})->Wait(), 0);
}

TEST_F(CoppicedTest, BadModelsExitWithThree) {
  auto absent = Run({"--model=/no/such/model.gguf", "--port=0", "--http_port=0"});
  EXPECT_EQ(absent->Wait(), 3);
  EXPECT_THAT(absent->log(), HasSubstr("load_failed"));
  const std::string garbage = directory_ / "garbage.gguf";
  std::ofstream(garbage) << "GGUF but not really";
  EXPECT_EQ(Run({"--model=" + garbage, "--port=0", "--http_port=0"})->Wait(), 3);
  auto too_small = Serve({"--kv_blocks=1"});
  EXPECT_EQ(too_small->Wait(), 3);
  EXPECT_THAT(too_small->log(), HasSubstr("raise --kv_bytes or --kv_blocks"));
}

TEST_F(CoppicedTest, TakenPortsExitWithFour) {
  auto first = Serve();
  ASSERT_TRUE(first->AwaitReady()) << first->log();
  auto rpc = Run({"--model_geometry=tiny-llama", "--http_port=0",
                  absl::StrCat("--port=", first->grpc_port())});
  EXPECT_EQ(rpc->Wait(), 4);
  EXPECT_THAT(rpc->log(), HasSubstr("change --port"));
  auto http = Run({"--model_geometry=tiny-llama", "--port=0",
                   absl::StrCat("--http_port=", first->http_port())});
  EXPECT_EQ(http->Wait(), 4);
  EXPECT_THAT(http->log(), HasSubstr("change --http_port"));
  EXPECT_EQ(Ready(*first), 200) << "the first one was disturbed";
}

TEST_F(CoppicedTest, PortFileNamesThePorts) {
  const std::string path = directory_ / "ports.json";
  auto daemon = Serve({"--port_file=" + path});
  ASSERT_TRUE(daemon->AwaitReady()) << daemon->log();
  const nlohmann::json ports = nlohmann::json::parse(std::ifstream(path));
  EXPECT_EQ(ports["grpc"], daemon->grpc_port());
  EXPECT_EQ(ports["http"], daemon->http_port());
}

TEST_F(CoppicedTest, AnswersHealthChecksAndReflection) {
  auto daemon = Serve();
  ASSERT_TRUE(daemon->AwaitReady()) << daemon->log();
  EXPECT_EQ(Ready(*daemon), 200);
  EXPECT_TRUE(HealthServing(Channel(*daemon)));
  EXPECT_TRUE(HealthServing(Channel(*daemon), "coppice.v1.Training"));
  EXPECT_FALSE(HealthServing(Channel(*daemon), "coppice.v1.NoSuchService"));
  const std::string services = ListServices(Channel(*daemon));
  for (const char* name : {"Generation", "Training", "Cache", "Admin"}) {
    EXPECT_THAT(services, HasSubstr(absl::StrCat("coppice.v1.", name)));
  }
}

// On a GPU in f16; the CPU says that it does not.
TEST_F(CoppicedTest, ServesAndTrainsWithF16) {
  const char* device = std::getenv("COPPICE_DEVICE");
  const bool cuda = device != nullptr && device == std::string("cuda");
  const auto daemon = Serve({"--compute_dtype=f16"});
  const std::string loaded = daemon->AwaitLine("model_loaded");
  EXPECT_THAT(loaded, HasSubstr(cuda ? "compute_dtype=f16 because=\"--compute_dtype\""
                                     : "compute_dtype=f32 because=\"device cpu\""));
  ASSERT_TRUE(daemon->AwaitReady());
  EXPECT_EQ(daemon->log().find("compute_dtype_ignored want=f16") == std::string::npos, cuda);
  EXPECT_EQ(Generate(*daemon, 8).size(), 8u);
  v1::TrainStepRequest step = Step("step");
  step.set_durable(false);
  const v1::TrainStepResponse trained = Train(*daemon, step);
  EXPECT_FALSE(trained.skipped()) << trained.skip_reason();
  EXPECT_EQ(trained.metrics().at("gradient_scale") > 1, cuda);
  EXPECT_EQ(Generate(*daemon, 8).size(), 8u);
}

TEST_F(CoppicedTest, SigtermDrainsARunningStream) {
  auto daemon = Serve();
  ASSERT_TRUE(daemon->AwaitReady()) << daemon->log();
  grpc::ClientContext context;
  auto stub = v1::Generation::NewStub(Channel(*daemon));
  auto reader = stub->Generate(&context, Request(2000));
  v1::GenerateEvent event;
  ASSERT_TRUE(reader->Read(&event));

  daemon->Signal(SIGTERM);
  ASSERT_FALSE(daemon->AwaitLine("drain_started").empty());

  // The engine says so once it drains; readiness and health were changed before that.
  ASSERT_FALSE(daemon->AwaitLine(" draining ").empty());
  EXPECT_EQ(Ready(*daemon), 503);
  EXPECT_FALSE(HealthServing(Channel(*daemon)));
  EXPECT_EQ(Tokens(*reader).size(), 2000u);
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(daemon->Wait(), 0);
  EXPECT_THAT(daemon->log(), HasSubstr("stopped drained=yes"));
}

TEST_F(CoppicedTest, SecondSignalStopsAtOnce) {
  auto daemon = Serve();
  ASSERT_TRUE(daemon->AwaitReady()) << daemon->log();
  grpc::ClientContext context;
  auto stub = v1::Generation::NewStub(Channel(*daemon));
  auto reader = stub->Generate(&context, Request(4000));
  v1::GenerateEvent event;
  ASSERT_TRUE(reader->Read(&event));

  daemon->Signal(SIGTERM);
  ASSERT_FALSE(daemon->AwaitLine("drain_started").empty());
  daemon->Signal(SIGINT);

  EXPECT_LT(Tokens(*reader).size(), 4000u);
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(daemon->Wait(), 5);
}

TEST_F(CoppicedTest, DrainTimeoutEndsOpenRequests) {
  auto daemon = Serve({"--drain_timeout_s=0"});
  ASSERT_TRUE(daemon->AwaitReady()) << daemon->log();
  grpc::ClientContext context;
  auto stub = v1::Generation::NewStub(Channel(*daemon));
  auto reader = stub->Generate(&context, Request(4000));
  v1::GenerateEvent event;
  ASSERT_TRUE(reader->Read(&event));
  daemon->Signal(SIGTERM);
  Tokens(*reader);
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(daemon->Wait(), 5);
}

TEST_F(CoppicedTest, DurableStepSurvivesKill) {
  const std::string checkpoints = "--checkpoint_dir=" + directory_.string();
  v1::TrainStepResponse first;
  std::vector<int32_t> trained;
  {
    auto daemon = Serve({checkpoints});
    ASSERT_TRUE(daemon->AwaitReady()) << daemon->log();
    first = Train(*daemon, Step("step-1"));
    EXPECT_EQ(first.policy_version(), 1u);
    trained = Generate(*daemon, 32);
    daemon->Signal(SIGKILL);
    EXPECT_EQ(daemon->Wait(), -SIGKILL);
  }
  auto daemon = Serve({checkpoints});
  ASSERT_TRUE(daemon->AwaitReady()) << daemon->log();
  EXPECT_EQ(Generate(*daemon, 32), trained) << "other weights than before the crash";

  const v1::TrainStepResponse again = Train(*daemon, Step("step-1"));

  EXPECT_TRUE(again.repeated_step());
  EXPECT_EQ(again.policy_version(), 1u);
  EXPECT_EQ(again.loss(), first.loss());
  EXPECT_EQ(Train(*daemon, Step("step-2")).policy_version(), 2u);
  daemon->Signal(SIGTERM);
  EXPECT_EQ(daemon->Wait(), 0);
}

}  // namespace
}  // namespace coppice
