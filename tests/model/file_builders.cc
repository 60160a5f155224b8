#include "tests/model/file_builders.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/substitute.h"
#include "kernels/base/check.h"
#include "kernels/model/parameters.h"

namespace coppice {
namespace {

constexpr uint32_t kUint32 = 4, kInt32 = 5, kFloat32 = 6, kString = 8, kArray = 9;
constexpr size_t kAlignment = 32;

std::string GgufString(absl::string_view text) {
  return absl::StrCat(Bytes<uint64_t>(text.size()), text);
}

std::string PaddedTo(std::string bytes, size_t alignment) {
  bytes.resize((bytes.size() + alignment - 1) / alignment * alignment, '\0');
  return bytes;
}

}  // namespace

TempDirectory::TempDirectory() {
  std::string name = (std::filesystem::temp_directory_path() / "coppice_test_XXXXXX").string();
  CHECK(mkdtemp(name.data()) != nullptr) << name;
  path_ = name;
}

TempDirectory::~TempDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::string TempDirectory::Write(absl::string_view name, absl::string_view bytes) const {
  const std::string path = absl::StrCat(path_, "/", name);
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  CHECK(out.good()) << path;
  return path;
}

std::string FloatBytes(const std::vector<float>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
}

GgufBuilder& GgufBuilder::Entry(absl::string_view key, uint32_t type, absl::string_view value) {
  absl::StrAppend(&metadata_, GgufString(key), Bytes(type), value);
  ++num_metadata_;
  return *this;
}

GgufBuilder& GgufBuilder::Uint32(absl::string_view key, uint32_t value) {
  return Entry(key, kUint32, Bytes(value));
}

GgufBuilder& GgufBuilder::Float32(absl::string_view key, float value) {
  return Entry(key, kFloat32, Bytes(value));
}

GgufBuilder& GgufBuilder::String(absl::string_view key, absl::string_view value) {
  return Entry(key, kString, GgufString(value));
}

GgufBuilder& GgufBuilder::Strings(absl::string_view key, const std::vector<std::string>& values) {
  std::string bytes = Bytes(kString) + Bytes<uint64_t>(values.size());
  for (const std::string& value : values) bytes += GgufString(value);
  return Entry(key, kArray, bytes);
}

GgufBuilder& GgufBuilder::Int32s(absl::string_view key, const std::vector<int32_t>& values) {
  std::string bytes = Bytes(kInt32) + Bytes<uint64_t>(values.size());
  for (const int32_t value : values) bytes += Bytes(value);
  return Entry(key, kArray, bytes);
}

GgufBuilder& GgufBuilder::Tensor(TestTensor tensor) {
  tensors_.push_back(std::move(tensor));
  return *this;
}

GgufBuilder& GgufBuilder::Version(uint32_t version) {
  version_ = version;
  return *this;
}

std::string GgufBuilder::Build() const {
  std::string out = absl::StrCat("GGUF", Bytes(version_), Bytes<uint64_t>(tensors_.size()),
                                 Bytes(num_metadata_), metadata_);
  std::string data;
  for (const TestTensor& t : tensors_) {
    absl::StrAppend(&out, GgufString(t.name), Bytes(static_cast<uint32_t>(t.shape.size())));
    for (size_t i = t.shape.size(); i-- > 0;) out += Bytes<uint64_t>(t.shape[i]);
    absl::StrAppend(&out, Bytes(t.ggml_type), Bytes<uint64_t>(data.size()));
    data = PaddedTo(data + t.data, kAlignment);
  }
  return PaddedTo(out, kAlignment) + data;
}

std::string SafetensorsBytes(absl::string_view header, absl::string_view data) {
  return absl::StrCat(Bytes<uint64_t>(header.size()), header, data);
}

std::string SafetensorsBytes(const std::vector<TestTensor>& tensors) {
  std::vector<std::string> entries;
  std::string data;
  for (const TestTensor& t : tensors) {
    entries.push_back(absl::StrCat("\"", t.name, "\":{\"dtype\":\"", t.type, "\",\"shape\":[",
                                   absl::StrJoin(t.shape, ","), "],\"data_offsets\":[", data.size(),
                                   ",", data.size() + t.data.size(), "]}"));
    data += t.data;
  }
  return SafetensorsBytes(absl::StrCat("{", absl::StrJoin(entries, ","), "}"), data);
}

std::vector<TestTensor> HfTestTensors(const ModelConfig& config) {
  std::vector<TestTensor> out;
  for (const NamedTensor& t : HfTensors(config, MapParameters(config, nullptr, DType::kF32))) {
    std::vector<float> values(t.view.num_elements());
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i) / 1000;
    out.push_back({.name = t.name,
                   .type = "F32",
                   .shape = {t.view.shape, t.view.shape + t.view.rank},
                   .data = FloatBytes(values)});
  }
  return out;
}

std::string SmallConfigJson(absl::string_view model_type) {
  return absl::Substitute(
      R"({"model_type": "$0", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4,
          "num_key_value_heads": 2, "intermediate_size": 32, "vocab_size": 11, "rope_theta": 500.0,
          "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": [2, 3]})",
      model_type);
}

GgufBuilder SmallLlamaGguf(bool with_bf16) {
  GgufBuilder b;
  b.String("general.architecture", "llama").String("general.name", "small");
  b.Uint32("llama.block_count", 1).Uint32("llama.embedding_length", 32);
  b.Uint32("llama.attention.head_count", 4).Uint32("llama.attention.head_count_kv", 2);
  b.Uint32("llama.feed_forward_length", 32).Uint32("llama.context_length", 64);
  b.Float32("llama.attention.layer_norm_rms_epsilon", 1e-5f);
  b.String("tokenizer.ggml.model", "gpt2").String("tokenizer.ggml.pre", "smollm");
  b.Strings("tokenizer.ggml.tokens", {"<s>", "a", "b", "ab"});
  b.Int32s("tokenizer.ggml.token_type", {3, 1, 1, 1}).Strings("tokenizer.ggml.merges", {"a b"});
  b.Uint32("tokenizer.ggml.eos_token_id", 0).String("tokenizer.chat_template", "{{ messages }}");
  const auto add = [&](const char* name, uint32_t type, std::vector<int64_t> shape, size_t bytes) {
    b.Tensor({.name = name,
              .type = "",
              .ggml_type = type,
              .shape = std::move(shape),
              .data = std::string(bytes, '\1')});
  };
  add("token_embd.weight", 8, {4, 32}, 4 * 34);                            // Q8_0
  add("blk.0.attn_norm.weight", 0, {32}, 32 * 4);                          // F32
  add("blk.0.attn_q.weight", 3, {32, 32}, 32 * 20);                        // Q4_1
  add("blk.0.attn_k.weight", 2, {16, 32}, 16 * 18);                        // Q4_0
  add("blk.0.attn_v.weight", 1, {16, 32}, 16 * 64);                        // F16
  add("blk.0.attn_output.weight", with_bf16 ? 30 : 1, {32, 32}, 32 * 64);  // BF16
  add("blk.0.ffn_norm.weight", 0, {32}, 32 * 4);
  add("blk.0.ffn_gate.weight", 3, {32, 32}, 32 * 20);
  add("blk.0.ffn_up.weight", 3, {32, 32}, 32 * 20);
  add("blk.0.ffn_down.weight", 3, {32, 32}, 32 * 20);
  add("output_norm.weight", 0, {32}, 32 * 4);
  return b;
}

}  // namespace coppice
