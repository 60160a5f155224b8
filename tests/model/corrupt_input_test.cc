// Thousands of seeded mutations and truncations of every kind of model file: an error or a model,
// never a crash, and memory in proportion to the file.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <random>

#include "absl/strings/str_cat.h"
#include "kernels/model/mapped_file.h"
#include "kernels/model/model_loader.h"
#include "tests/model/file_builders.h"

namespace coppice {
namespace {

// One to four spoilt places: a random byte, a flipped bit, a run of 0xff or 0x00, a deleted or
// repeated range, a cut.
std::string Mutate(std::string bytes, std::mt19937& rng) {
  const auto below = [&](size_t n) { return n == 0 ? 0 : rng() % n; };
  for (size_t n = 1 + below(4); n > 0; --n) {
    const size_t at = below(bytes.size()), run = std::min<size_t>(1 + below(9), bytes.size() - at);
    switch (below(7)) {
      case 0:
        if (at < bytes.size()) bytes[at] = static_cast<char>(rng());
        break;
      case 1:
        if (at < bytes.size()) bytes[at] = static_cast<char>(bytes[at] ^ 1 << below(8));
        break;
      case 2:
        bytes.replace(at, run, run, '\xff');
        break;
      case 3:
        bytes.replace(at, run, run, '\0');
        break;
      case 4:
        bytes.erase(at, run);
        break;
      case 5:
        bytes.insert(at, bytes.substr(below(bytes.size()), run));
        break;
      default:
        if (below(4) == 0) bytes.resize(at);
    }
  }
  return bytes;
}

class CorruptInputTest : public testing::Test {
 protected:
  // Runs `load` on mutations of `good`, most of them near its start where the structure is.
  template <typename Load>
  void Run(const std::string& good, int rounds, const Load& load) {
    ASSERT_TRUE(load(good).ok()) << load(good);
    int errors = 0;
    for (int seed = 1; seed <= rounds; ++seed) {
      SCOPED_TRACE(absl::StrCat("seed ", seed));
      std::mt19937 rng(static_cast<uint32_t>(seed));
      const size_t head = seed % 4 == 0 ? good.size() : std::min<size_t>(good.size(), 1500);
      const absl::Status status = load(Mutate(good.substr(0, head), rng) + good.substr(head));
      if (status.ok()) continue;
      ++errors;
      EXPECT_FALSE(status.message().empty());
    }
    EXPECT_GT(errors, rounds / 4);
  }

  absl::Status LoadGguf(const std::string& bytes) {
    return Load(directory_.Write("m.gguf", bytes));
  }
  absl::Status LoadDirectory() { return Load(directory_.path()); }
  absl::Status Load(const std::string& path) {
    const absl::Status type = ComputeTypeOf(path).status();
    const absl::Status model = LoadModel(path, *ops_).status();
    EXPECT_TRUE(type.ok() || !model.ok()) << type;
    return model;
  }
  void WriteDirectory(const char* type) {
    directory_.Write("config.json", SmallConfigJson(type));
    directory_.Write("model.safetensors",
                     SafetensorsBytes(HfTestTensors(*ParseHfConfig(SmallConfigJson(type)))));
  }

  TempDirectory directory_;
  std::unique_ptr<ops::Ops> ops_ = *ops::CreateOps("cpu");
};

TEST_F(CorruptInputTest, Gguf) {
  Run(SmallLlamaGguf().Build(), 3000, [&](const std::string& bytes) { return LoadGguf(bytes); });
}

TEST_F(CorruptInputTest, EveryTruncationOfAGgufIsAnError) {
  const std::string good = SmallLlamaGguf().Build();
  for (size_t size = 0; size < good.size(); size += size < 2000 ? 3 : 97) {
    EXPECT_FALSE(LoadGguf(good.substr(0, size)).ok()) << size;
  }
}

TEST_F(CorruptInputTest, Safetensors) {
  WriteDirectory("qwen3");
  const std::string good = *ReadTextFile(directory_.path() + "/model.safetensors", 1 << 24);
  Run(good, 3000, [&](const std::string& bytes) {
    directory_.Write("model.safetensors", bytes);
    return LoadDirectory();
  });
}

TEST_F(CorruptInputTest, EveryTruncationOfASafetensorsIsAnError) {
  WriteDirectory("llama");
  const std::string good = *ReadTextFile(directory_.path() + "/model.safetensors", 1 << 24);
  for (size_t size = 0; size < good.size(); size += size < 2500 ? 7 : 997) {
    directory_.Write("model.safetensors", good.substr(0, size));
    EXPECT_FALSE(LoadDirectory().ok()) << size;
  }
}

TEST_F(CorruptInputTest, ShardIndex) {
  WriteDirectory("llama");
  std::string map;
  for (const TestTensor& t : HfTestTensors(*ParseHfConfig(SmallConfigJson("llama")))) {
    absl::StrAppend(&map, map.empty() ? "" : ",", "\"", t.name, "\":\"model.safetensors\"");
  }
  Run(absl::StrCat(R"({"weight_map":{)", map, "}}"), 1000, [&](const std::string& bytes) {
    directory_.Write("model.safetensors.index.json", bytes);
    return LoadDirectory();
  });
}

TEST_F(CorruptInputTest, Config) {
  Run(SmallConfigJson("qwen2"), 3000,
      [](const std::string& bytes) { return ParseHfConfig(bytes).status(); });
}

TEST_F(CorruptInputTest, Tokenizer) {
  const auto good = ReadTextFile(
      absl::StrCat(COPPICE_SOURCE_DIR, "/tests/parity/golden/tokenizers/llama3_style.json"),
      1 << 24);
  ASSERT_TRUE(good.ok());
  Run(*good, 1000, [](const std::string& bytes) {
    const auto tokenizer = Tokenizer::FromJson(bytes);
    if (tokenizer.ok()) {
      const std::string text = "Hello <mask> w\xc3\xb6rld \xff 123<|im_end|>";
      (*tokenizer)->Decode((*tokenizer)->Encode(text, true), false);
    }
    return tokenizer.status();
  });
}

TEST_F(CorruptInputTest, DeeplyNestedJsonIsAnError) {
  for (const char* open : {"[", "{\"a\":"}) {
    std::string text;
    for (int i = 0; i < 200000; ++i) text += open;
    EXPECT_FALSE(ParseHfConfig(text).ok());
    EXPECT_FALSE(Tokenizer::FromJson(text).ok());
  }
}

// A few hundred bytes that claim much must not be believed. Runs last: the peak covers the whole
// process.
TEST_F(CorruptInputTest, MemoryStaysInProportionToTheFiles) {
  for (const uint32_t huge : {1u << 20, 1u << 24, 0x7fffffffu, 0xffffffffu}) {
    GgufBuilder b;
    b.String("general.architecture", "llama");
    for (const char* key : {"block_count", "embedding_length", "attention.head_count",
                            "feed_forward_length", "context_length"}) {
      b.Uint32(absl::StrCat("llama.", key), huge);
    }
    EXPECT_FALSE(LoadGguf(b.Build()).ok());
  }
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  EXPECT_LT(usage.ru_maxrss, 1 << 20) << "KiB";
}

}  // namespace
}  // namespace coppice
