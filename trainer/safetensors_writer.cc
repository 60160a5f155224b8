#include "trainer/safetensors_writer.h"

#include <nlohmann/json.hpp>

#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

const char* SafetensorsName(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kF16:
      return "F16";
    case DType::kBF16:
      return "BF16";
    case DType::kI32:
    case DType::kU8:
      break;
  }
  CHECK(false) << "dtype of a checkpoint tensor: " << Name(dtype);
  return "";
}

// JSON header, padded with spaces so that the data starts at a multiple of 8 bytes.
std::string Header(const std::vector<TensorToWrite>& tensors) {
  nlohmann::ordered_json root;
  root["__metadata__"] = {{"format", "pt"}};
  int64_t offset = 0;
  for (const TensorToWrite& tensor : tensors) {
    CHECK(tensor.view.contiguous()) << tensor.name;
    const int64_t end = offset + tensor.view.num_bytes();
    std::vector<int64_t> shape(tensor.view.shape, tensor.view.shape + tensor.view.rank);
    root[tensor.name] = {{"dtype", SafetensorsName(tensor.view.dtype)},
                         {"shape", shape},
                         {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string header = root.dump();
  header.resize((header.size() + 7) / 8 * 8, ' ');
  return header;
}

}  // namespace

absl::Status WriteSafetensors(const std::vector<TensorToWrite>& tensors, ops::Ops& ops,
                              DurableFile& file) {
  const std::string header = Header(tensors);
  const uint64_t header_bytes = header.size();  // little-endian, as every machine that we run on
  RETURN_IF_ERROR(file.Append(&header_bytes, sizeof(header_bytes)));
  RETURN_IF_ERROR(file.Append(header.data(), static_cast<int64_t>(header.size())));
  std::vector<char> host;
  for (const TensorToWrite& tensor : tensors) {
    host.resize(tensor.view.num_bytes());
    RETURN_IF_ERROR(ops.Download(tensor.view, host.data()));
    RETURN_IF_ERROR(file.Append(host.data(), static_cast<int64_t>(host.size())));
  }
  return absl::OkStatus();
}

}  // namespace coppice
