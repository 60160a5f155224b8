#include "server/config.h"

#include <map>

#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace coppice {
namespace {

using ::testing::HasSubstr;

absl::StatusOr<Config> Parse(const std::vector<std::string>& args,
                             const std::map<std::string, std::string>& environment = {}) {
  return ParseConfig(args, [&environment](const std::string& name) -> std::optional<std::string> {
    const auto it = environment.find(name);
    return it == environment.end() ? std::nullopt : std::optional<std::string>(it->second);
  });
}

void ExpectBad(const std::vector<std::string>& args, const std::string& message) {
  const auto config = Parse(args);
  ASSERT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(config.status().message()), HasSubstr(message));
}

TEST(ConfigTest, TakesBothFormsAndBooleans) {
  const auto config = Parse({"--model=m.gguf", "--port", "0", "--trust_tenant_header",
                             "--kv_bytes=2GiB", "--seed=18446744073709551615"});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->model, "m.gguf");
  EXPECT_EQ(config->port, 0);
  EXPECT_TRUE(config->trust_tenant_header);
  EXPECT_EQ(config->kv_bytes, int64_t{2} << 30);
  EXPECT_EQ(config->seed, UINT64_MAX);
  EXPECT_EQ(config->host, "127.0.0.1");
}

TEST(ConfigTest, ABooleanTakesTheWordBehindItIfThatIsOne) {
  EXPECT_FALSE(Parse({"--deterministic", "false", "--model=m"})->deterministic);
  EXPECT_TRUE(Parse({"--deterministic", "true", "--model=m"})->deterministic);
  EXPECT_EQ(Parse({"--deterministic", "--model", "true"})->model, "true");
  ExpectBad({"--deterministic", "no", "--model=m"}, "want --name=value, got \"no\"");
}

TEST(ConfigTest, AMatMulCacheThatGrowsWantsAFile) {
  EXPECT_TRUE(Parse({"--matmul_cache=f", "--matmul_cache_grows", "--model=m"})->matmul_cache_grows);
  ExpectBad({"--matmul_cache_grows", "--model=m"}, "want a file with --matmul_cache_grows");
}

TEST(ConfigTest, CommandLineWinsOverEnvironment) {
  const auto config = Parse({"--threads=3"}, {{"COPPICE_MODEL", "m"},
                                              {"COPPICE_THREADS", "7"},
                                              {"COPPICE_VERSION", "1.2"},
                                              {"COPPICE_PORT", "9"}});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->model, "m");
  EXPECT_EQ(config->threads, 3);
  EXPECT_EQ(config->port, 9);
  EXPECT_FALSE(config->version);
}

TEST(ConfigTest, ErrorsNameFlagWantAndGot) {
  ExpectBad({"--modle=x"}, "--modle: want a flag that exists");
  ExpectBad({"model"}, "want --name=value, got \"model\"");
  ExpectBad({"--model"}, "--model: want a value");
  ExpectBad({"--model=m", "--port=65536"}, "--port: want an integer in [0, 65535], got \"65536\"");
  ExpectBad({"--model=m", "--port=x"}, "--port: want an integer");
  ExpectBad({"--model=m", "--kv_bytes=2GB"}, "--kv_bytes: want bytes (or KiB, MiB, GiB)");
  ExpectBad({"--model=m", "--kv_bytes=9999999999GiB"}, "--kv_bytes");
  ExpectBad({"--model=m", "--device=tpu"}, "--device: want cpu or cuda, got \"tpu\"");
  ExpectBad({"--model=m", "--trust_tenant_header=maybe"}, "want true or false");
  ExpectBad({"--model=m", "--seed=-1"}, "--seed: want an integer >= 0");
  ExpectBad({"--model=m", "--max_reader_stall_s=0"},
            "--max_reader_stall_s: want an integer in [1,");
  for (const char* tokens : {"--block_tokens=4", "--block_tokens=24"}) {
    ExpectBad({"--model=m", "--device=cuda", tokens}, "a power of two, at least 8");
    EXPECT_TRUE(Parse({"--model=m", tokens}).ok());
  }
  ExpectBad({"--model=m", "--gradient_dtype=f16"}, "want f32 or bf16");
  ExpectBad({"--model=m", "--compute_dtype=f32"}, "--compute_dtype: want auto or bf16 or f16");
  const std::vector<std::string> f16 = {"--model=m", "--device=cuda", "--compute_dtype=f16"};
  EXPECT_TRUE(Parse(f16).ok());
  ExpectBad({f16[0], f16[1], f16[2], "--gradient_dtype=bf16"}, "want f32 with --compute_dtype=f16");
  EXPECT_TRUE(Parse({"--model=m", "--device=cuda", "--gradient_dtype=bf16"}).ok());
  ExpectBad({}, "exactly one of --model and --model_geometry");
  ExpectBad({"--model=m", "--model_geometry=tiny-llama"}, "exactly one of");
  ExpectBad({"--model=m", "--kv_bytes=1", "--kv_blocks=1"}, "one of --kv_bytes, --kv_blocks");
  ExpectBad({"--model=m", "--kv_bytes=1", "--kv_fraction=0.5"}, "one of --kv_bytes, --kv_blocks");
  ExpectBad({"--model=m", "--kv_fraction=1.5"}, "--kv_fraction: want a number in [0, 1]");
  ExpectBad({"--model=m", "--kv_fraction=nan"}, "--kv_fraction: want a number in [0, 1]");
  ExpectBad({"--model=m", "--port=8000", "--http_port=8000"}, "another port");
}

TEST(ConfigTest, StepsOverlapOnAGpuUnlessToldOtherwise) {
  const auto overlaps = [](const std::string& device, const std::string& overlap) {
    const auto config = Parse({"--model=m", "--device=" + device, "--overlap=" + overlap});
    EXPECT_TRUE(config.ok()) << config.status();
    return config.ok() && config->OverlapsSteps();
  };
  EXPECT_TRUE(overlaps("cuda", "auto"));
  EXPECT_FALSE(overlaps("cpu", "auto"));
  EXPECT_FALSE(overlaps("cuda", "false"));
  EXPECT_TRUE(overlaps("cpu", "true"));
}

TEST(ConfigTest, KubernetesServiceLinksAreExplained) {
  const auto config = Parse({"--model=m"}, {{"COPPICE_PORT", "tcp://10.0.0.1:7700"}});
  EXPECT_THAT(std::string(config.status().message()), HasSubstr("enableServiceLinks: false"));
}

TEST(ConfigTest, HelpListsEveryFlagOfTheStartLine) {
  const std::string help = HelpText();
  EXPECT_TRUE(Parse({"--help"})->help);
  const std::string line = ToString(Config());
  int flags = 0;
  for (size_t begin = 0; begin < line.size();) {
    const size_t equals = line.find('=', begin);
    EXPECT_THAT(help, HasSubstr("\n  --" + line.substr(begin, equals - begin) + "  ("));
    ++flags;
    const size_t space = line.find(' ', equals);
    begin = space == std::string::npos ? line.size() : space + 1;
  }
  EXPECT_GT(flags, 25);
  for (const absl::string_view text : absl::StrSplit(help, '\n')) EXPECT_LE(text.size(), 100u);
  EXPECT_THAT(help, HasSubstr("--max_message_bytes  (bytes, KiB, MiB or GiB, in [4096, 2147483647],"
                              " default 256MiB)"));
}

}  // namespace
}  // namespace coppice
