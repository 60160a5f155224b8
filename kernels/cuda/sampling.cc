#include <cmath>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/families.h"
#include "kernels/cuda/launchers.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cuda {
namespace {

absl::Status CheckRow(const ops::SampleParams& p, const ops::SamplingRow& row) {
  const int64_t vocab = p.logits.dim(1);
  const auto bad = [](absl::string_view what, absl::string_view want, float got) {
    return absl::InvalidArgumentError(
        absl::StrCat("sample: ", what, ": want ", want, ", got ", got, "; fix the request"));
  };
  if (!(row.temperature >= 0 && std::isfinite(row.temperature))) {
    return bad("temperature", "a finite number of at least 0", row.temperature);
  }
  if (!(row.top_p > 0 && row.top_p <= 1)) return bad("top_p", "(0, 1]", row.top_p);
  if (!(row.min_p >= 0 && row.min_p < 1)) return bad("min_p", "[0, 1)", row.min_p);
  for (int32_t b = row.bias_begin; b < row.bias_end; ++b) {
    if (p.bias_ids[b] < 0 || p.bias_ids[b] >= vocab) {
      return bad("logit bias token", "an id of the vocabulary", static_cast<float>(p.bias_ids[b]));
    }
  }
  return absl::OkStatus();
}

struct Memory {
  ops::SamplingRow* rows = nullptr;
  int32_t* bias_ids = nullptr;
  float *bias_values = nullptr, *raw_values = nullptr;
  SampleOutput* out = nullptr;
  int32_t* top_ids = nullptr;
  float* top_values = nullptr;
};

Memory LayOut(int64_t n, int64_t biases, int64_t top, ScratchCursor& cursor) {
  Memory m;
  m.rows = cursor.Take<ops::SamplingRow>(n);
  m.bias_ids = cursor.Take<int32_t>(biases);
  m.bias_values = cursor.Take<float>(biases);
  m.raw_values = cursor.Take<float>(biases);
  m.out = cursor.Take<SampleOutput>(n);
  m.top_ids = cursor.Take<int32_t>(n * top);
  m.top_values = cursor.Take<float>(n * top);
  return m;
}

template <typename T>
absl::Status CopyN(Context& context, T* dst, const T* src, int64_t n, cudaMemcpyKind kind) {
  if (n == 0) return absl::OkStatus();
  return context.Check(cudaMemcpyAsync(dst, src, n * sizeof(T), kind, context.stream()),
                       "sample copy");
}

absl::Status Deliver(const ops::SampleParams& p, const std::vector<SampleOutput>& out) {
  for (size_t i = 0; i < out.size(); ++i) {
    if (!out[i].drawn) {
      return absl::InvalidArgumentError(absl::StrCat("sample: logits of row ", i,
                                                     ": want finite values, got NaN, +inf or only "
                                                     "-inf; check the weights and the logit bias"));
    }
    p.tokens[i] = out[i].token;
    p.raw_logprobs[i] = out[i].raw;
    p.sampled_logprobs[i] = out[i].sampled;
    if (p.tempered_logprobs != nullptr) p.tempered_logprobs[i] = out[i].tempered;
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Sample(Context& context, const ops::SampleParams& p) {
  const int64_t n = p.logits.dim(0), vocab = p.logits.dim(1), top = p.top_logprobs;
  RETURN_IF_ERROR(ops::ShapeCheck("sample")
                      .Tensor("logits", p.logits, DType::kF32, {n, vocab})
                      .That(vocab > 0, "vocab", "at least 1", vocab)
                      .That(top >= 0 && top <= 20, "top_logprobs", "[0, 20]", top)
                      .status());
  int64_t biases = 0;
  for (int64_t i = 0; i < n; ++i) {
    RETURN_IF_ERROR(CheckRow(p, p.rows[i]));
    biases = std::max<int64_t>(biases, p.rows[i].bias_end);
  }
  if (n == 0) return absl::OkStatus();
  ScratchCursor counter(nullptr);
  LayOut(n, biases, top, counter);
  ASSIGN_OR_RETURN(char* base, context.Scratch(counter.size_bytes()));
  ScratchCursor cursor(base);
  const Memory m = LayOut(n, biases, top, cursor);
  RETURN_IF_ERROR(CopyN(context, m.rows, p.rows, n, cudaMemcpyHostToDevice));
  RETURN_IF_ERROR(CopyN(context, m.bias_ids, p.bias_ids, biases, cudaMemcpyHostToDevice));
  RETURN_IF_ERROR(CopyN(context, m.bias_values, p.bias_values, biases, cudaMemcpyHostToDevice));
  const SampleInputs inputs = {.logits = p.logits.f32(),
                               .n = n,
                               .vocab = vocab,
                               .stride = p.logits.stride[0],
                               .rows = m.rows,
                               .bias_ids = m.bias_ids,
                               .bias_values = m.bias_values,
                               .raw_values = m.raw_values,
                               .top_logprobs = p.top_logprobs,
                               .out = m.out,
                               .top_ids = m.top_ids,
                               .top_values = m.top_values};
  RETURN_IF_ERROR(context.Check(LaunchSample(inputs, context.stream()), "sample"));
  std::vector<SampleOutput> out(n);
  RETURN_IF_ERROR(CopyN(context, out.data(), m.out, n, cudaMemcpyDeviceToHost));
  RETURN_IF_ERROR(CopyN(context, p.top_ids, m.top_ids, n * top, cudaMemcpyDeviceToHost));
  RETURN_IF_ERROR(CopyN(context, p.top_values, m.top_values, n * top, cudaMemcpyDeviceToHost));
  RETURN_IF_ERROR(context.Synchronize());
  return Deliver(p, out);
}

}  // namespace coppice::cuda
