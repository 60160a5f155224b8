#include <algorithm>
#include <cmath>
#include <memory>

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

// One call's arrays, at equal offsets in device scratch and in pinned host memory: [inputs |
// scratch | outputs].
struct Memory {
  ops::SamplingRow* rows = nullptr;
  int32_t* bias_ids = nullptr;
  float* bias_values = nullptr;
  float* raw_values = nullptr;  // device only
  SampleOutput* out = nullptr;
  int32_t* top_ids = nullptr;
  float* top_values = nullptr;
  int64_t inputs_end = 0, end = 0;  // bytes
};

Memory LayOut(int64_t n, int64_t biases, int64_t top, char* base) {
  ScratchCursor cursor(base);
  Memory m;
  m.rows = cursor.Take<ops::SamplingRow>(n);
  m.bias_ids = cursor.Take<int32_t>(biases);
  m.bias_values = cursor.Take<float>(biases);
  m.inputs_end = cursor.size_bytes();
  m.raw_values = cursor.Take<float>(biases);
  m.out = cursor.Take<SampleOutput>(n);
  m.top_ids = cursor.Take<int32_t>(n * top);
  m.top_values = cursor.Take<float>(n * top);
  m.end = cursor.size_bytes();
  return m;
}

class CudaPendingSample final : public ops::PendingSample {
 public:
  // Results arrive in `host`, which lies in `block`, once the block's mark is passed.
  CudaPendingSample(Context& context, const ops::SampleParams& p, const Memory& host,
                    PinnedMemory::Block& block)
      : context_(context), params_(p), host_(host), block_(block) {}
  ~CudaPendingSample() override { PinnedMemory::GiveBack(block_); }

  absl::Status Wait() override {
    RETURN_IF_ERROR(context_.Check(cudaEventSynchronize(block_.passed), "sample"));
    const ops::SampleParams& p = params_;
    const int64_t n = p.logits.dim(0);
    absl::Status status;
    for (int64_t i = 0; i < n; ++i) {
      const SampleOutput& out = host_.out[i];
      if (!out.drawn) {
        p.tokens[i] = -1;
        status.Update(absl::InvalidArgumentError(
            absl::StrCat("sample: logits of row ", i,
                         ": want finite values, got NaN, +inf or only -inf; check the weights and "
                         "the logit bias")));
        continue;
      }
      p.tokens[i] = out.token;
      p.raw_logprobs[i] = out.raw;
      p.sampled_logprobs[i] = out.sampled;
      if (p.tempered_logprobs != nullptr) p.tempered_logprobs[i] = out.tempered;
    }
    std::copy_n(host_.top_ids, n * p.top_logprobs, p.top_ids);
    std::copy_n(host_.top_values, n * p.top_logprobs, p.top_values);
    return status;
  }

 private:
  Context& context_;
  const ops::SampleParams params_;
  const Memory host_;
  PinnedMemory::Block& block_;
};

class NothingPending final : public ops::PendingSample {
  absl::Status Wait() override { return absl::OkStatus(); }
};

absl::Status QueueSample(Context& context, const ops::SampleParams& p, const Memory& m,
                         char* device, char* host) {
  RETURN_IF_ERROR(context.Check(cudaMemcpyAsync(device, host, static_cast<size_t>(m.inputs_end),
                                                cudaMemcpyHostToDevice, context.stream()),
                                "sample inputs"));
  const SampleInputs inputs = {.logits = p.logits.f32(),
                               .n = p.logits.dim(0),
                               .vocab = p.logits.dim(1),
                               .stride = p.logits.stride[0],
                               .rows = m.rows,
                               .bias_ids = m.bias_ids,
                               .bias_values = m.bias_values,
                               .raw_values = m.raw_values,
                               .top_logprobs = p.top_logprobs,
                               .out = m.out,
                               .drawn = p.drawn.present() ? p.drawn.i32() : nullptr,
                               .top_ids = m.top_ids,
                               .top_values = m.top_values};
  const auto launch = context.compute_capability() == 90 ? LaunchSample : LaunchSampleAlone;
  RETURN_IF_ERROR(context.Check(launch(inputs, context.stream()), "sample"));
  // Each array by itself: what lies between them is written by nobody.
  const auto bring = [&](const void* from, int64_t size_bytes) {
    if (size_bytes == 0) return absl::OkStatus();
    return context.Check(
        cudaMemcpyAsync(host + (static_cast<const char*>(from) - device), from,
                        static_cast<size_t>(size_bytes), cudaMemcpyDeviceToHost, context.stream()),
        "sample outputs");
  };
  RETURN_IF_ERROR(bring(m.out, inputs.n * static_cast<int64_t>(sizeof(SampleOutput))));
  RETURN_IF_ERROR(
      bring(m.top_ids, inputs.n * p.top_logprobs * static_cast<int64_t>(sizeof(int32_t))));
  return bring(m.top_values, inputs.n * p.top_logprobs * static_cast<int64_t>(sizeof(float)));
}

}  // namespace

absl::StatusOr<std::unique_ptr<ops::PendingSample>> StartSample(Context& context,
                                                                const ops::SampleParams& p) {
  const int64_t n = p.logits.dim(0), vocab = p.logits.dim(1), top = p.top_logprobs;
  RETURN_IF_ERROR(ops::ShapeCheck("sample")
                      .Tensor("logits", p.logits, DType::kF32, {n, vocab})
                      .Optional("drawn", p.drawn, DType::kI32, {n})
                      .That(vocab > 0, "vocab", "at least 1", vocab)
                      .That(top >= 0 && top <= 20, "top_logprobs", "[0, 20]", top)
                      .status());
  int64_t biases = 0;
  for (int64_t i = 0; i < n; ++i) {
    RETURN_IF_ERROR(CheckRow(p, p.rows[i]));
    biases = std::max<int64_t>(biases, p.rows[i].bias_end);
  }
  if (n == 0) return std::make_unique<NothingPending>();
  const int64_t size_bytes = LayOut(n, biases, top, nullptr).end;
  ASSIGN_OR_RETURN(char* device, context.Scratch(size_bytes));
  PinnedMemory::Block* block = nullptr;
  RETURN_IF_ERROR(context.Check(context.pinned().Take(size_bytes, &block), "sample staging"));
  const Memory host = LayOut(n, biases, top, block->data);
  auto pending = std::make_unique<CudaPendingSample>(context, p, host, *block);
  std::copy_n(p.rows, n, host.rows);
  std::copy_n(p.bias_ids, biases, host.bias_ids);
  std::copy_n(p.bias_values, biases, host.bias_values);
  RETURN_IF_ERROR(QueueSample(context, p, LayOut(n, biases, top, device), device, block->data));
  RETURN_IF_ERROR(context.Check(PinnedMemory::Mark(*block, context.stream()), "sample mark"));
  return pending;
}

}  // namespace coppice::cuda
