#include "trainer/safetensors_writer.h"

#include <nlohmann/json.hpp>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "trainer/master_weights.h"

namespace coppice {
namespace {

const char* SafetensorsName(DType dtype) {
  if (dtype == DType::kF32) return "F32";
  if (dtype == DType::kF16) return "F16";
  CHECK(dtype == DType::kBF16) << "dtype of a checkpoint tensor: " << Name(dtype);
  return "BF16";
}

DType WrittenType(const TensorToWrite& tensor) {
  return tensor.remainder.present() ? DType::kF32 : tensor.view.dtype;
}

// JSON header, padded with spaces so that the data starts at a multiple of 8 bytes.
std::string Header(const std::vector<TensorToWrite>& tensors) {
  nlohmann::ordered_json root;
  root["__metadata__"] = {{"format", "pt"}};
  int64_t offset = 0;
  for (const TensorToWrite& tensor : tensors) {
    CHECK(tensor.view.contiguous()) << tensor.name;
    const DType dtype = WrittenType(tensor);
    const int64_t end = offset + tensor.view.num_elements() * SizeOf(dtype);
    std::vector<int64_t> shape(tensor.view.shape, tensor.view.shape + tensor.view.rank);
    root[tensor.name] = {
        {"dtype", SafetensorsName(dtype)}, {"shape", shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string header = root.dump();
  header.resize((header.size() + 7) / 8 * 8, ' ');
  return header;
}

absl::StatusOr<std::vector<float>> DownloadMasters(const TensorToWrite& tensor, ops::Ops& ops) {
  const int64_t n = tensor.view.num_elements();
  std::vector<uint16_t> params(n);
  std::vector<int16_t> remainders(n);
  RETURN_IF_ERROR(ops.Download(tensor.view, params.data()));
  RETURN_IF_ERROR(ops.Download(tensor.remainder, remainders.data()));
  std::vector<float> masters(n);
  for (int64_t i = 0; i < n; ++i)
    masters[i] = JoinMaster(tensor.view.dtype, {params[i], remainders[i]});
  return masters;
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
    if (tensor.remainder.present()) {
      ASSIGN_OR_RETURN(const std::vector<float> masters, DownloadMasters(tensor, ops));
      RETURN_IF_ERROR(
          file.Append(masters.data(), static_cast<int64_t>(masters.size() * sizeof(float))));
      continue;
    }
    host.resize(tensor.view.num_bytes());
    RETURN_IF_ERROR(ops.Download(tensor.view, host.data()));
    RETURN_IF_ERROR(file.Append(host.data(), static_cast<int64_t>(host.size())));
  }
  return absl::OkStatus();
}

}  // namespace coppice
