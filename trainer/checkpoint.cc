#include "trainer/checkpoint.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status_macros.h"
#include "kernels/model/arena_fill.h"
#include "kernels/model/safetensors.h"
#include "trainer/hf_config.h"
#include "trainer/master_weights.h"
#include "trainer/safetensors_writer.h"
#include "trainer/sha256.h"

namespace coppice {
namespace {

constexpr int kFormat = 1;
constexpr char kManifestFile[] = "checkpoint.json";
constexpr char kConfigFile[] = "config.json";
constexpr char kWeightsFile[] = "model.safetensors";
constexpr char kOptimizerFile[] = "optimizer.safetensors";
constexpr char kFirstMoment[] = "m.";
constexpr char kSecondMoment[] = "v.";
constexpr char kOtherModel[] = "; load one of this model, or start with that one's --model";

// Tensors of an arena laid out as the weights, by prefixed Hugging Face names.
std::vector<TensorToWrite> Named(const ModelConfig& config, TensorView flat,
                                 const std::string& prefix) {
  const Parameters mapped = MapParameters(config, flat.data, flat.dtype);
  std::vector<TensorToWrite> tensors;
  for (const NamedTensor& tensor : HfTensors(config, mapped)) {
    tensors.push_back({prefix + tensor.name, tensor.view});
  }
  return tensors;
}

// The weights; with an optimizer that completes them to f32 masters, the masters.
std::vector<TensorToWrite> WeightTensors(const CheckpointView& view) {
  std::vector<TensorToWrite> tensors = Named(view.config, view.params.flat, "");
  if (view.optimizer == nullptr || !view.optimizer->remainder().present()) return tensors;
  const std::vector<TensorToWrite> remainders = Named(view.config, view.optimizer->remainder(), "");
  for (size_t i = 0; i < tensors.size(); ++i) tensors[i].remainder = remainders[i].view;
  return tensors;
}

std::vector<TensorToWrite> OptimizerTensors(const ModelConfig& config, TensorView m, TensorView v) {
  std::vector<TensorToWrite> tensors = Named(config, m, kFirstMoment);
  for (TensorToWrite& tensor : Named(config, v, kSecondMoment)) {
    tensors.push_back(std::move(tensor));
  }
  return tensors;
}

absl::Status CheckReplaceable(const std::string& directory) {
  std::error_code error;
  if (!std::filesystem::exists(directory, error)) return absl::OkStatus();
  if (std::filesystem::exists(directory + "/" + kManifestFile, error)) return absl::OkStatus();
  if (std::filesystem::is_directory(directory, error) &&
      std::filesystem::is_empty(directory, error)) {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(absl::StrCat(
      "checkpoint refused: ", directory, " exists and is not a checkpoint; choose another path"));
}

// Collects the manifest while files are written.
class CheckpointWriter {
 public:
  CheckpointWriter(AtomicDirectory& directory, ops::Ops& ops) : directory_(directory), ops_(ops) {}

  absl::Status WriteText(const char* name, const std::string& text) {
    ASSIGN_OR_RETURN(const std::unique_ptr<DurableFile> file, directory_.CreateFile(name));
    RETURN_IF_ERROR(file->Append(text.data(), static_cast<int64_t>(text.size())));
    return Record(name, *file);
  }
  absl::Status WriteTensors(const char* name, const std::vector<TensorToWrite>& tensors) {
    ASSIGN_OR_RETURN(const std::unique_ptr<DurableFile> file, directory_.CreateFile(name));
    RETURN_IF_ERROR(WriteSafetensors(tensors, ops_, *file));
    return Record(name, *file);
  }
  const nlohmann::ordered_json& files() const { return files_; }

 private:
  absl::Status Record(const char* name, DurableFile& file) {
    ASSIGN_OR_RETURN(const FileDigest digest, file.Finish());
    files_.push_back(
        {{"name", name}, {"size_bytes", digest.size_bytes}, {"sha256", digest.sha256}});
    return absl::OkStatus();
  }

  AtomicDirectory& directory_;
  ops::Ops& ops_;
  nlohmann::ordered_json files_ = nlohmann::ordered_json::array();
};

absl::Status Damaged(const std::string& path, absl::string_view what) {
  return absl::DataLossError(
      absl::StrCat("checkpoint ", path, " is damaged: ", what, "; load another one"));
}

// The checked content of checkpoint.json.
struct Manifest {
  uint64_t policy_version = 0;
  int64_t optimizer_steps = 0;
  GradientScale::History scale;
  std::vector<std::pair<std::string, FileDigest>> files;

  bool Has(absl::string_view name) const {
    for (const auto& [file, digest] : files) {
      if (file == name) return true;
    }
    return false;
  }
};

absl::StatusOr<Manifest> ParseManifest(const std::string& path, const std::string& text) {
  const nlohmann::json root = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  const auto is = [](const nlohmann::json& object, const char* key, auto predicate) {
    return object.is_object() && object.contains(key) && predicate(object.at(key));
  };
  const auto number = [](const nlohmann::json& v) { return v.is_number_unsigned(); };
  const auto integer = [](const nlohmann::json& v) { return v.is_number_integer(); };
  const auto string = [](const nlohmann::json& v) { return v.is_string(); };
  const auto array = [](const nlohmann::json& v) { return v.is_array(); };
  if (!is(root, "format", number) || !is(root, "policy_version", number) ||
      !is(root, "optimizer_steps", number) || !is(root, "files", array)) {
    return Damaged(path, "not a manifest");
  }
  if (root.at("format") != kFormat) {
    return absl::InvalidArgumentError(absl::StrCat("checkpoint ", path, ": want format ", kFormat,
                                                   ", got ", root.at("format").dump()));
  }
  Manifest manifest{.policy_version = root.at("policy_version").get<uint64_t>(),
                    .optimizer_steps = root.at("optimizer_steps").get<int64_t>()};
  if (root.contains("gradient_scale")) {
    const nlohmann::json& scale = root.at("gradient_scale");
    if (is(scale, "exponent", integer) && is(scale, "finite_norms", integer)) {
      manifest.scale = {.exponent = scale.at("exponent").get<int64_t>(),
                        .finite_norms = scale.at("finite_norms").get<int64_t>()};
    }
    if (manifest.scale == GradientScale::History{} || !manifest.scale.Valid()) {
      return Damaged(path, "bad gradient_scale");
    }
  }
  for (const nlohmann::json& file : root.at("files")) {
    if (!is(file, "name", string) || !is(file, "size_bytes", number) ||
        !is(file, "sha256", string)) {
      return Damaged(path, "bad entry of files");
    }
    manifest.files.emplace_back(
        file.at("name").get<std::string>(),
        FileDigest{file.at("size_bytes").get<int64_t>(), file.at("sha256").get<std::string>()});
  }
  return manifest;
}

absl::StatusOr<Manifest> ReadManifest(const std::string& directory) {
  const std::string path = absl::StrCat(directory, "/", kManifestFile);
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    return absl::NotFoundError(absl::StrCat("no checkpoint at ", directory, ": want a ",
                                            kManifestFile, "; check the path"));
  }
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  ASSIGN_OR_RETURN(const Manifest manifest, ParseManifest(path, text));
  if (!manifest.Has(kWeightsFile)) return Damaged(path, "it lists no weights");
  return manifest;
}

absl::Status VerifyFiles(const std::string& directory, const Manifest& manifest) {
  for (const auto& [name, want] : manifest.files) {
    const std::string path = absl::StrCat(directory, "/", name);
    std::error_code error;
    const uintmax_t size = std::filesystem::file_size(path, error);
    if (error) {
      return Damaged(path, absl::StrCat("want ", want.size_bytes, " bytes, got ", error.message()));
    }
    if (size != static_cast<uintmax_t>(want.size_bytes)) {
      return Damaged(path, absl::StrCat("want ", want.size_bytes, " bytes, got ", size));
    }
    ASSIGN_OR_RETURN(const std::string sha256, Sha256OfFile(path));
    if (sha256 != want.sha256) {
      return Damaged(path, absl::StrCat("want sha256 ", want.sha256, ", got ", sha256));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckShapes(const std::vector<TensorToWrite>& want, const TensorSource& source,
                         const std::string& path) {
  for (const TensorToWrite& tensor : want) {
    const std::vector<int64_t> shape(tensor.view.shape, tensor.view.shape + tensor.view.rank);
    const absl::StatusOr<std::vector<int64_t>> got = source.Shape(tensor.name);
    const std::string found = got.ok() ? absl::StrJoin(*got, "x") : "none";
    if (got.ok() && *got == shape) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("checkpoint ", path, " is of another model: tensor ", tensor.name, " wants ",
                     absl::StrJoin(shape, "x"), ", got ", found, kOtherModel));
  }
  if (source.Names().size() == want.size()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("checkpoint ", path, " is of another model: want ",
                                                 want.size(), " tensors, got ",
                                                 source.Names().size(), kOtherModel));
}

absl::Status ReadTensors(const std::vector<TensorToWrite>& tensors, const TensorSource& source,
                         ops::Ops& ops) {
  if (!tensors.empty() && tensors[0].view.dtype != DType::kF32) {  // converts
    std::vector<NamedTensor> named;
    named.reserve(tensors.size());
    for (const TensorToWrite& tensor : tensors) named.push_back({tensor.name, tensor.view, false});
    const auto rows = [&](size_t index, int64_t begin, int64_t end, float* out) {
      return source.ReadRows(named[index].name, begin, end, out);
    };
    return FillTensors(named, rows, ops);
  }
  std::vector<float> host;
  for (const TensorToWrite& tensor : tensors) {
    host.resize(tensor.view.num_elements());
    RETURN_IF_ERROR(source.ReadRows(tensor.name, 0, tensor.view.dim(0), host.data()));
    RETURN_IF_ERROR(ops.Upload(host.data(), tensor.view));
  }
  return absl::OkStatus();
}

// INVALID_ARGUMENT if a weight is larger than f16 can say.
absl::Status CheckFitF16(const std::vector<TensorToWrite>& tensors, const TensorSource& source) {
  std::vector<float> host;
  for (const TensorToWrite& tensor : tensors) {
    host.resize(tensor.view.num_elements());
    RETURN_IF_ERROR(source.ReadRows(tensor.name, 0, tensor.view.dim(0), host.data()));
    RETURN_IF_ERROR(CheckF16Range(tensor.name, host));
  }
  return absl::OkStatus();
}

// f32 masters into 16-bit weights and their remainders.
absl::Status ReadMasters(const std::vector<TensorToWrite>& tensors, const TensorSource& source,
                         ops::Ops& ops) {
  std::vector<float> masters;
  std::vector<uint16_t> params;
  std::vector<int16_t> remainders;
  for (const TensorToWrite& tensor : tensors) {
    const int64_t n = tensor.view.num_elements();
    masters.resize(n);
    params.resize(n);
    remainders.resize(n);
    RETURN_IF_ERROR(source.ReadRows(tensor.name, 0, tensor.view.dim(0), masters.data()));
    for (int64_t i = 0; i < n; ++i) {
      const MasterParts parts = SplitMaster(tensor.view.dtype, masters[i]);
      params[i] = parts.param;
      remainders[i] = parts.remainder;
    }
    RETURN_IF_ERROR(ops.Upload(params.data(), tensor.view));
    RETURN_IF_ERROR(ops.Upload(remainders.data(), tensor.remainder));
    RETURN_IF_ERROR(ops.Synchronize());  // the host's copies are used again
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status WriteCheckpoint(const CheckpointView& view, absl::string_view directory, ops::Ops& ops,
                             WriteBoundary boundary) {
  RETURN_IF_ERROR(CheckReplaceable(std::string(directory)));
  ASSIGN_OR_RETURN(const std::unique_ptr<AtomicDirectory> target,
                   AtomicDirectory::Create(directory, std::move(boundary)));
  CheckpointWriter writer(*target, ops);
  RETURN_IF_ERROR(
      writer.WriteText(kConfigFile, HfConfigJson(view.config, ops.Info().compute_dtype)));
  RETURN_IF_ERROR(writer.WriteTensors(kWeightsFile, WeightTensors(view)));
  if (view.optimizer != nullptr) {
    RETURN_IF_ERROR(writer.WriteTensors(
        kOptimizerFile, OptimizerTensors(view.config, view.optimizer->m(), view.optimizer->v())));
  }
  nlohmann::ordered_json manifest = {
      {"format", kFormat},
      {"policy_version", Raw(view.version)},
      {"optimizer_steps", view.optimizer == nullptr ? 0 : view.optimizer->num_steps()},
      {"files", writer.files()}};
  if (view.scale != GradientScale::History{}) {
    manifest["gradient_scale"] = {{"exponent", view.scale.exponent},
                                  {"finite_norms", view.scale.finite_norms}};
  }
  RETURN_IF_ERROR(writer.WriteText(kManifestFile, manifest.dump(2) + "\n"));
  return target->Commit();
}

absl::StatusOr<std::unique_ptr<CheckpointReader>> CheckpointReader::Open(
    const ModelConfig& config, absl::string_view directory) {
  const std::string path(directory);
  ASSIGN_OR_RETURN(const Manifest manifest, ReadManifest(path));
  RETURN_IF_ERROR(VerifyFiles(path, manifest));
  std::unique_ptr<CheckpointReader> reader(new CheckpointReader(config));
  reader->version_ = PolicyVersion{manifest.policy_version};
  reader->optimizer_steps_ = manifest.optimizer_steps;
  reader->scale_ = manifest.scale;

  const TensorView shape_only = View1D(nullptr, DType::kF32, NumParameterElements(config));
  const std::string weights = absl::StrCat(path, "/", kWeightsFile);
  ASSIGN_OR_RETURN(reader->weights_, OpenSafetensors(weights));
  RETURN_IF_ERROR(CheckShapes(Named(config, shape_only, ""), *reader->weights_, weights));
  if (!manifest.Has(kOptimizerFile)) return reader;
  const std::string moments = absl::StrCat(path, "/", kOptimizerFile);
  ASSIGN_OR_RETURN(reader->optimizer_, OpenSafetensors(moments));
  RETURN_IF_ERROR(
      CheckShapes(OptimizerTensors(config, shape_only, shape_only), *reader->optimizer_, moments));
  return reader;
}

absl::Status CheckpointReader::ReadWeights(const Parameters& params, const Optimizer* optimizer,
                                           ops::Ops& ops) const {
  const std::vector<TensorToWrite> tensors = WeightTensors({config_, params, optimizer, version_});
  if (params.flat.dtype == DType::kF16) RETURN_IF_ERROR(CheckFitF16(tensors, *weights_));
  return tensors[0].remainder.present() ? ReadMasters(tensors, *weights_, ops)
                                        : ReadTensors(tensors, *weights_, ops);
}

absl::Status CheckpointReader::ReadOptimizer(Optimizer& optimizer, ops::Ops& ops) const {
  RETURN_IF_ERROR(
      ReadTensors(OptimizerTensors(config_, optimizer.m(), optimizer.v()), *optimizer_, ops));
  optimizer.set_num_steps(optimizer_steps_);
  return absl::OkStatus();
}

}  // namespace coppice
