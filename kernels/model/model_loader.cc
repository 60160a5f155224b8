#include "kernels/model/model_loader.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <optional>
#include <set>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status_macros.h"
#include "kernels/model/arena_fill.h"
#include "kernels/model/gguf_model.h"
#include "kernels/model/json_fields.h"
#include "kernels/model/mapped_file.h"
#include "kernels/model/safetensors.h"

namespace coppice {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMaxConfigBytes = int64_t{1} << 20;
constexpr int64_t kMaxTokenizerBytes = int64_t{256} << 20;

std::string ShapeText(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

// Every tensor of the model is there in its shape, and nothing else that would change its answers.
absl::Status CheckTensors(const std::vector<NamedTensor>& tensors, const TensorSource& source,
                          bool tied_head) {
  absl::flat_hash_set<std::string> known;
  for (const NamedTensor& t : tensors) {
    ASSIGN_OR_RETURN(const std::vector<int64_t> got, source.Shape(t.name));
    const std::vector<int64_t> want(t.view.shape, t.view.shape + t.view.rank);
    if (got != want) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", t.name, ": want shape ", ShapeText(want), ", got ",
                       ShapeText(got), "; the weights do not belong to this configuration"));
    }
    known.insert(t.name);
  }
  for (const std::string& name : source.Names()) {
    const bool harmless =
        absl::EndsWith(name, "rotary_emb.inv_freq") || (tied_head && name == "lm_head.weight");
    if (!harmless && !known.contains(name)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "tensor ", name, ": unknown in this architecture; the weights do not belong to it"));
    }
  }
  return absl::OkStatus();
}

absl::Status LoadWeights(const TensorSource& source, ops::Ops& ops, Model& model) {
  const DType dtype = ops.Info().compute_dtype;
  // Shapes first: a file of the wrong model costs no allocation.
  const std::vector<NamedTensor> shapes =
      HfTensors(model.config, MapParameters(model.config, nullptr, dtype));
  RETURN_IF_ERROR(CheckTensors(shapes, source, model.config.tied_head));
  const int64_t bytes = NumParameterElements(model.config) * SizeOf(dtype);
  ASSIGN_OR_RETURN(model.arena, ops.Allocate(bytes, "weights"));
  model.params = MapParameters(model.config, model.arena.data(), dtype);
  const std::vector<NamedTensor> tensors = HfTensors(model.config, model.params);
  const auto read = [&](size_t index, int64_t row_begin, int64_t row_end, float* out) {
    const NamedTensor& t = tensors[index];
    RETURN_IF_ERROR(source.ReadRows(t.name, row_begin, row_end, out));
    const float* end = out + (row_end - row_begin) * t.view.stride[0];
    if (std::all_of(static_cast<const float*>(out), end,
                    [](float x) { return std::isfinite(x); })) {
      return absl::OkStatus();
    }
    return absl::DataLossError(
        absl::StrCat("tensor ", t.name,
                     ": want finite weights, got inf or nan; fetch the model "
                     "again"));
  };
  return FillTensors(tensors, read, ops);
}

// Of matrices: norms are stored in f32 whatever the rest has.
absl::StatusOr<std::set<StoredType>> StoredTypes(const TensorSource& source) {
  std::set<StoredType> types;
  for (const std::string& name : source.Names()) {
    ASSIGN_OR_RETURN(const std::vector<int64_t> shape, source.Shape(name));
    ASSIGN_OR_RETURN(const StoredType type, source.Type(name));
    if (shape.size() > 1) types.insert(type);
  }
  return types;
}

absl::StatusOr<ComputeType> ComputeTypeOf(const TensorSource& source) {
  ASSIGN_OR_RETURN(const std::set<StoredType> types, StoredTypes(source));
  const auto name = [](std::string* out, StoredType t) { absl::StrAppend(out, Name(t)); };
  return ComputeType{
      .dtype = types.count(StoredType::kBF16) > 0 ? DType::kBF16 : DType::kF16,
      .because = absl::StrCat("weights stored as ", absl::StrJoin(types, ", ", name))};
}

absl::StatusOr<ComputeType> ComputeTypeOfGguf(const std::string& path) {
  ASSIGN_OR_RETURN(const std::unique_ptr<GgufFile> file, GgufFile::Open(path));
  ASSIGN_OR_RETURN(const ModelConfig config, ParseGgufConfig(*file));
  ASSIGN_OR_RETURN(const std::unique_ptr<TensorSource> source, MakeGgufTensorSource(*file, config));
  return ComputeTypeOf(*source);
}

// What one of our checkpoints was computed in; nothing if the field is absent.
absl::StatusOr<std::optional<ComputeType>> NamedComputeType(const nlohmann::json& root) {
  std::string name;
  RETURN_IF_ERROR(ReadString(root, kComputeTypeField, name));
  if (name.empty()) return std::nullopt;
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    if (name == Name(dtype)) {
      return ComputeType{dtype, absl::StrCat(kComputeTypeField, " ", name, " in config.json")};
    }
  }
  return absl::InvalidArgumentError(absl::StrCat("config.json: ", kComputeTypeField,
                                                 ": want bf16 or f16, got ", name,
                                                 "; give --compute_dtype"));
}

// transformers 5 writes "dtype", before it "torch_dtype".
absl::StatusOr<ComputeType> ComputeTypeOfHfDirectory(const std::string& directory) {
  const std::string path = directory + "/config.json";
  ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxConfigBytes));
  ASSIGN_OR_RETURN(const nlohmann::json root, ParseJsonObject(text, path));
  ASSIGN_OR_RETURN(const std::optional<ComputeType> named, NamedComputeType(root));
  if (named.has_value()) return *named;
  for (const char* key : {"dtype", "torch_dtype"}) {
    std::string dtype;
    RETURN_IF_ERROR(ReadString(root, key, dtype));
    if (dtype == "bfloat16") {
      return ComputeType{DType::kBF16, absl::StrCat(key, " bfloat16 in config.json")};
    }
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<TensorSource> source, OpenSafetensorsDirectory(directory));
  return ComputeTypeOf(*source);
}

absl::StatusOr<Model> LoadGguf(const std::string& path, ops::Ops& ops) {
  ASSIGN_OR_RETURN(const std::unique_ptr<GgufFile> file, GgufFile::Open(path));
  Model model;
  ASSIGN_OR_RETURN(model.config, ParseGgufConfig(*file));
  ASSIGN_OR_RETURN(const std::unique_ptr<TensorSource> source,
                   MakeGgufTensorSource(*file, model.config));
  RETURN_IF_ERROR(LoadWeights(*source, ops, model));
  RETURN_IF_ERROR(file->Read("tokenizer.chat_template", model.chat_template));
  std::string tokenizer_model;
  RETURN_IF_ERROR(file->Read("tokenizer.ggml.model", tokenizer_model));
  if (!tokenizer_model.empty()) {
    ASSIGN_OR_RETURN(model.tokenizer, Tokenizer::FromGguf(*file));
  }
  return model;
}

// generation_config.json may list more stop tokens than config.json.
absl::Status AddGenerationEos(const std::string& directory, ModelConfig& config) {
  const std::string path = directory + "/generation_config.json";
  std::error_code ignored;
  if (!fs::exists(path, ignored)) return absl::OkStatus();
  ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxConfigBytes));
  ASSIGN_OR_RETURN(const nlohmann::json root, ParseJsonObject(text, path));
  const nlohmann::json* eos = FindField(root, "eos_token_id");
  if (eos == nullptr) return absl::OkStatus();
  for (const nlohmann::json& id : eos->is_array() ? *eos : nlohmann::json::array({*eos})) {
    if (!id.is_number_integer() || id < 0 || id >= config.vocab) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": eos_token_id: want ids in [0, ", config.vocab, ")"));
    }
    const int32_t token = id.get<int32_t>();
    auto& list = config.eos_tokens;
    if (std::find(list.begin(), list.end(), token) == list.end()) list.push_back(token);
  }
  return absl::OkStatus();
}

// chat_template.jinja, or the entry of tokenizer_config.json: a string, or a list of named ones.
absl::Status ReadChatTemplate(const std::string& directory, std::string& chat_template) {
  std::error_code ignored;
  const std::string jinja = directory + "/chat_template.jinja";
  if (fs::exists(jinja, ignored)) {
    ASSIGN_OR_RETURN(chat_template, ReadTextFile(jinja, kMaxConfigBytes));
    return absl::OkStatus();
  }
  const std::string path = directory + "/tokenizer_config.json";
  if (!fs::exists(path, ignored)) return absl::OkStatus();
  ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxTokenizerBytes));
  ASSIGN_OR_RETURN(const nlohmann::json root, ParseJsonObject(text, path));
  const nlohmann::json* field = FindField(root, "chat_template");
  if (field == nullptr) return absl::OkStatus();
  if (!field->is_array()) return ReadString(root, "chat_template", chat_template);
  for (const nlohmann::json& entry : *field) {
    std::string name;
    RETURN_IF_ERROR(ReadString(entry, "name", name));
    if (name == "default") RETURN_IF_ERROR(ReadString(entry, "template", chat_template));
  }
  return absl::OkStatus();
}

absl::StatusOr<Model> LoadHfDirectory(const std::string& directory, ops::Ops& ops) {
  Model model;
  ASSIGN_OR_RETURN(const std::string config,
                   ReadTextFile(directory + "/config.json", kMaxConfigBytes));
  ASSIGN_OR_RETURN(model.config, ParseHfConfig(config));
  model.config.name = fs::path(directory).lexically_normal().filename().string();
  RETURN_IF_ERROR(AddGenerationEos(directory, model.config));
  ASSIGN_OR_RETURN(const std::unique_ptr<TensorSource> source, OpenSafetensorsDirectory(directory));
  RETURN_IF_ERROR(LoadWeights(*source, ops, model));
  RETURN_IF_ERROR(ReadChatTemplate(directory, model.chat_template));
  const std::string tokenizer = directory + "/tokenizer.json";
  std::error_code ignored;
  if (fs::exists(tokenizer, ignored)) {
    ASSIGN_OR_RETURN(const std::string text, ReadTextFile(tokenizer, kMaxTokenizerBytes));
    ASSIGN_OR_RETURN(model.tokenizer, Tokenizer::FromJson(text));
  }
  return model;
}

// NOT_FOUND if there is nothing.
absl::StatusOr<bool> IsDirectory(absl::string_view path) {
  const std::string text(path);
  std::error_code ignored;
  if (fs::is_directory(text, ignored)) return true;
  if (fs::exists(text, ignored)) return false;
  return absl::NotFoundError(absl::StrCat(
      "model ", text, " does not exist; give a GGUF file or a Hugging Face directory"));
}

}  // namespace

absl::StatusOr<ComputeType> ComputeTypeOf(absl::string_view path) {
  ASSIGN_OR_RETURN(const bool directory, IsDirectory(path));
  return directory ? ComputeTypeOfHfDirectory(std::string(path))
                   : ComputeTypeOfGguf(std::string(path));
}

absl::StatusOr<Model> LoadModel(absl::string_view path, ops::Ops& ops) {
  ASSIGN_OR_RETURN(const bool directory, IsDirectory(path));
  return directory ? LoadHfDirectory(std::string(path), ops) : LoadGguf(std::string(path), ops);
}

}  // namespace coppice
