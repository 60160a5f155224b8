// Writes small model files for tests: GGUF and safetensors from parts, each of which a test may
// spoil.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "kernels/model/model_config.h"

namespace coppice {

// A directory that goes away with the object.
class TempDirectory {
 public:
  TempDirectory();
  TempDirectory(const TempDirectory&) = delete;
  TempDirectory& operator=(const TempDirectory&) = delete;
  ~TempDirectory();
  // Writes `bytes` to a file of this name and returns its path.
  std::string Write(absl::string_view name, absl::string_view bytes) const;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Little-endian bytes of a value.
template <typename T>
std::string Bytes(T value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof(value));
}
std::string FloatBytes(const std::vector<float>& values);

struct TestTensor {
  std::string name;
  std::string type;            // safetensors dtype; empty in GGUF
  uint32_t ggml_type = 0;      // GGUF only
  std::vector<int64_t> shape;  // row-major
  std::string data;
};

class GgufBuilder {
 public:
  GgufBuilder& Uint32(absl::string_view key, uint32_t value);
  GgufBuilder& Float32(absl::string_view key, float value);
  GgufBuilder& String(absl::string_view key, absl::string_view value);
  GgufBuilder& Strings(absl::string_view key, const std::vector<std::string>& values);
  GgufBuilder& Int32s(absl::string_view key, const std::vector<int32_t>& values);
  GgufBuilder& Tensor(TestTensor tensor);
  GgufBuilder& Version(uint32_t version);
  std::string Build() const;

 private:
  GgufBuilder& Entry(absl::string_view key, uint32_t type, absl::string_view value);

  uint32_t version_ = 3;
  uint64_t num_metadata_ = 0;
  std::string metadata_;
  std::vector<TestTensor> tensors_;
};

// Bytes of a safetensors file with this header and data.
std::string SafetensorsBytes(absl::string_view header, absl::string_view data);
// A well-formed file of F32 tensors.
std::string SafetensorsBytes(const std::vector<TestTensor>& tensors);

// All tensors of a model in F32 under Hugging Face's names, element i of each being i / 1000.
std::vector<TestTensor> HfTestTensors(const ModelConfig& config);
// A whole small Llama in GGUF: metadata, weights of every stored type (bf16 if wanted), tokenizer
// of a few tokens.
GgufBuilder SmallLlamaGguf(bool with_bf16 = true);
// config.json of a two-layer model of this type that the HfTestTensors of ParseHfConfig's result
// fit.
std::string SmallConfigJson(absl::string_view model_type);

}  // namespace coppice
