#include "tests/support/staged_ops.h"

#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/float16.h"
#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

constexpr int64_t kGuard = 64;        // elements before and after
constexpr uint8_t kGuardByte = 0x5a;  // a finite number in every type

// The device twins of one op's tensors.
class Staging {
 public:
  explicit Staging(ops::Ops& ops, int64_t row_multiple = 1)
      : ops_(ops), row_multiple_(row_multiple) {}

  // Replaces a host view by its twin of type f (default: the device's compute type) or as it is.
  Staging& In(TensorView& t) { return Add(t, Compute(t), false); }
  Staging& Out(TensorView& t) { return Add(t, Compute(t), true); }
  Staging& InAs(TensorView& t, DType dtype) { return Add(t, dtype, false); }
  Staging& OutAs(TensorView& t, DType dtype) { return Add(t, dtype, true); }

  // Copies outputs back; the op's status first, then what guards say.
  absl::Status Finish(absl::Status op) {
    RETURN_IF_ERROR(op);
    for (const Twin& twin : twins_) RETURN_IF_ERROR(Return(twin));
    return absl::OkStatus();
  }

 private:
  struct Twin {
    TensorView host, device;
    bool output = false;
    DeviceBuffer buffer;
    std::vector<char> sent;
    TensorView whole;  // guards included, u8
  };

  DType Compute(const TensorView& t) const {
    return t.dtype == DType::kF32 ? ops_.Info().compute_dtype : t.dtype;
  }

  // Offsets of element (row, column) in both layouts; a row is everything but the outermost
  // dimension.
  template <typename Fn>
  static void ForElements(const Twin& t, const Fn& fn) {
    int64_t width = 1;
    for (int i = 1; i < t.host.rank; ++i) width *= t.host.shape[i];
    for (int64_t row = 0; row < t.host.shape[0]; ++row) {
      for (int64_t c = 0; c < width; ++c) {
        fn(row * t.host.stride[0] + c, kGuard + row * t.device.stride[0] + c);
      }
    }
  }

  Staging& Add(TensorView& t, DType dtype, bool output) {
    if (!t.present() || t.data == nullptr) return *this;
    for (Twin& twin : twins_) {
      if (twin.host.data != t.data || twin.device.dtype != dtype || twin.host.rank != t.rank)
        continue;
      twin.output |= output;
      t = twin.device;
      return *this;
    }
    Twin twin = {.host = t, .device = t, .output = output};
    twin.device.dtype = dtype;
    if (t.rank > 1)
      twin.device.stride[0] = (t.stride[0] + row_multiple_ - 1) / row_multiple_ * row_multiple_;
    Send(twin);
    t = twin.device;
    twins_.push_back(std::move(twin));
    return *this;
  }

  void Send(Twin& t) {
    int64_t span = 0;
    ForElements(t, [&](int64_t, int64_t to) { span = std::max(span, to + 1 - kGuard); });
    const int64_t size = SizeOf(t.device.dtype);
    t.sent.assign((span + 2 * kGuard) * size, static_cast<char>(kGuardByte));
    ForElements(t, [&](int64_t from, int64_t to) { Convert(t, from, to); });
    t.buffer = std::move(ops_.Allocate(static_cast<int64_t>(t.sent.size()), "staged")).value();
    t.whole = View1D(t.buffer.data(), DType::kU8, static_cast<int64_t>(t.sent.size()));
    CHECK_OK(ops_.Upload(t.sent.data(), t.whole));
    t.device.data = static_cast<char*>(t.buffer.data()) + kGuard * size;
  }
  static bool Converts(const Twin& t) {
    return t.host.dtype == DType::kF32 && SizeOf(t.device.dtype) == 2;
  }
  static void Convert(Twin& t, int64_t from, int64_t to) {
    if (Converts(t)) {
      const uint16_t bits = Bits16FromFloat(t.device.dtype, t.host.f32()[from]);
      std::memcpy(t.sent.data() + to * 2, &bits, 2);
    } else {
      const int64_t size = SizeOf(t.host.dtype);
      std::memcpy(t.sent.data() + to * size, t.host.as<char>() + from * size, size);
    }
  }

  absl::Status Return(const Twin& t) {
    std::vector<char> got(t.sent.size());
    RETURN_IF_ERROR(ops_.Download(t.whole, got.data()));
    const int64_t size = SizeOf(t.device.dtype);
    std::vector<char> outside = got;
    ForElements(
        t, [&](int64_t, int64_t to) { std::memset(outside.data() + to * size, kGuardByte, size); });
    for (size_t i = 0; i < outside.size(); ++i) {
      if (outside[i] != static_cast<char>(kGuardByte)) {
        return absl::InternalError(absl::StrCat("a tensor was overrun at byte ", i));
      }
    }
    if (!t.output) return absl::OkStatus();
    ForElements(t, [&](int64_t from, int64_t to) {
      if (Converts(t)) {
        uint16_t bits = 0;
        std::memcpy(&bits, got.data() + to * 2, 2);
        t.host.f32()[from] = FloatFrom16(t.device.dtype, bits);
      } else {
        std::memcpy(t.host.as<char>() + from * size, got.data() + to * size, size);
      }
    });
    return absl::OkStatus();
  }

  ops::Ops& ops_;
  const int64_t row_multiple_;
  std::vector<Twin> twins_;
};

constexpr int64_t kAttentionRows = 8;  // row strides of attention are multiples of 16 bytes

}  // namespace

absl::Status StagedOps::Copy(TensorView src, TensorView dst) {
  Staging s(*ops_);
  s.InAs(src, src.dtype).OutAs(dst, dst.dtype);
  return s.Finish(ops_->Copy(src, dst));
}
absl::Status StagedOps::Embedding(const ops::EmbeddingParams& params) {
  ops::EmbeddingParams p = params;
  Staging s(*ops_);
  s.In(p.ids).In(p.table).OutAs(p.out, residual_dtype_);
  return s.Finish(ops_->Embedding(p));
}
absl::Status StagedOps::EmbeddingBackward(const ops::EmbeddingBackwardParams& params) {
  ops::EmbeddingBackwardParams p = params;
  Staging s(*ops_);
  s.In(p.ids).In(p.d_out).OutAs(p.d_table, DType::kF32);
  return s.Finish(ops_->EmbeddingBackward(p));
}
absl::Status StagedOps::GatherRows(const ops::GatherRowsParams& params) {
  ops::GatherRowsParams p = params;
  Staging s(*ops_);
  s.InAs(p.src, residual_dtype_).In(p.indices).OutAs(p.out, residual_dtype_);
  return s.Finish(ops_->GatherRows(p));
}
absl::Status StagedOps::ScatterAddRows(const ops::ScatterAddRowsParams& params) {
  ops::ScatterAddRowsParams p = params;
  Staging s(*ops_);
  s.In(p.src).In(p.indices).Out(p.dst);
  return s.Finish(ops_->ScatterAddRows(p));
}
absl::Status StagedOps::RmsNorm(const ops::RmsNormParams& params) {
  ops::RmsNormParams p = params;
  Staging s(*ops_);
  s.InAs(p.x, residual_dtype_).In(p.weight).Out(p.out).OutAs(p.rstd, DType::kF32);
  return s.Finish(ops_->RmsNorm(p));
}
absl::Status StagedOps::RmsNormBackward(const ops::RmsNormBackwardParams& params) {
  ops::RmsNormBackwardParams p = params;
  Staging s(*ops_);
  s.In(p.d_out)
      .InAs(p.x, residual_dtype_)
      .In(p.weight)
      .InAs(p.rstd, DType::kF32)
      .Out(p.d_x)
      .OutAs(p.d_weight, DType::kF32)
      .Out(p.out);
  return s.Finish(ops_->RmsNormBackward(p));
}
absl::Status StagedOps::MatMul(const ops::MatMulParams& params) {
  ops::MatMulParams p = params;
  const bool f32 = (p.trans_a || p.addend.present()) && !p.bias.present();
  const DType wide = f32 ? DType::kF32 : ops_->Info().compute_dtype;
  const DType c = p.c.dtype == DType::kF32 ? wide : p.c.dtype;
  Staging s(*ops_);
  s.In(p.a).In(p.b).In(p.bias).InAs(p.addend, c).OutAs(p.c, c);
  return s.Finish(ops_->MatMul(p));
}
absl::Status StagedOps::SumRows(const ops::SumRowsParams& params) {
  ops::SumRowsParams p = params;
  Staging s(*ops_);
  s.In(p.x).OutAs(p.out, DType::kF32);
  return s.Finish(ops_->SumRows(p));
}
absl::Status StagedOps::QkNormRope(const ops::QkNormRopeParams& params) {
  ops::QkNormRopeParams p = params;
  Staging s(*ops_);
  s.In(p.q_in).In(p.k_in).In(p.v).In(p.q_norm).In(p.k_norm).InAs(p.rope, DType::kF32);
  s.Out(p.q_out).Out(p.k_out).Out(p.pages.k).Out(p.pages.v);
  return s.Finish(ops_->QkNormRope(p));
}
absl::Status StagedOps::QkNormRopeBackward(const ops::QkNormRopeBackwardParams& params) {
  ops::QkNormRopeBackwardParams p = params;
  Staging s(*ops_);
  s.In(p.d_q_out).In(p.d_k_out).In(p.q_in).In(p.k_in).In(p.q_norm).In(p.k_norm).InAs(p.rope,
                                                                                     DType::kF32);
  s.Out(p.d_q_in).Out(p.d_k_in).OutAs(p.d_q_norm, DType::kF32).OutAs(p.d_k_norm, DType::kF32);
  return s.Finish(ops_->QkNormRopeBackward(p));
}
absl::Status StagedOps::TreeAttention(const ops::TreeAttentionParams& params) {
  ops::TreeAttentionParams p = params;
  Staging s(*ops_, kAttentionRows), dense(*ops_);
  s.In(p.q).In(p.k).In(p.v).In(p.context.k).In(p.context.v).Out(p.out);
  std::vector<float> lse(p.lse.num_elements());  // the device wants it dense
  const TensorView host_lse = p.lse;
  if (p.lse.present()) p.lse = View2D(lse.data(), DType::kF32, p.lse.dim(0), p.lse.dim(1));
  dense.OutAs(p.lse, DType::kF32);
  RETURN_IF_ERROR(s.Finish(ops_->TreeAttention(p)));
  RETURN_IF_ERROR(dense.Finish(absl::OkStatus()));
  for (int64_t i = 0; i < static_cast<int64_t>(lse.size()); ++i) {
    host_lse.f32()[i / host_lse.dim(1) * host_lse.stride[0] + i % host_lse.dim(1)] = lse[i];
  }
  return absl::OkStatus();
}
absl::Status StagedOps::TreeAttentionBackward(const ops::TreeAttentionBackwardParams& params) {
  ops::TreeAttentionBackwardParams p = params;
  Staging s(*ops_, kAttentionRows), dense(*ops_);
  s.In(p.q).In(p.k).In(p.v).In(p.context.k).In(p.context.v).In(p.out).In(p.d_out);
  s.Out(p.d_q)
      .Out(p.d_k)
      .Out(p.d_v)
      .OutAs(p.d_context.k, DType::kF32)
      .OutAs(p.d_context.v, DType::kF32);
  std::vector<float> lse(p.lse.num_elements());
  for (int64_t i = 0; i < static_cast<int64_t>(lse.size()); ++i) {
    lse[i] = p.lse.f32()[i / p.lse.dim(1) * p.lse.stride[0] + i % p.lse.dim(1)];
  }
  p.lse = View2D(lse.data(), DType::kF32, p.lse.dim(0), p.lse.dim(1));
  dense.InAs(p.lse, DType::kF32);
  RETURN_IF_ERROR(s.Finish(ops_->TreeAttentionBackward(p)));
  return dense.Finish(absl::OkStatus());
}
absl::Status StagedOps::SwiGlu(const ops::SwiGluParams& params) {
  ops::SwiGluParams p = params;
  Staging s(*ops_);
  s.In(p.gate_up).Out(p.out);
  return s.Finish(ops_->SwiGlu(p));
}
absl::Status StagedOps::SwiGluBackward(const ops::SwiGluBackwardParams& params) {
  ops::SwiGluBackwardParams p = params;
  Staging s(*ops_);
  s.In(p.gate_up).In(p.d_out).Out(p.d_gate_up);
  if (p.out.present()) s.Out(p.out);
  return s.Finish(ops_->SwiGluBackward(p));
}
absl::Status StagedOps::MatMulSwiGlu(const ops::MatMulSwiGluParams& params) {
  ops::MatMulSwiGluParams p = params;
  Staging s(*ops_);
  s.In(p.a).In(p.b).Out(p.gate_up).Out(p.out);
  return s.Finish(ops_->MatMulSwiGlu(p));
}
absl::Status StagedOps::MatMulSwiGluBackward(const ops::MatMulSwiGluBackwardParams& params) {
  ops::MatMulSwiGluBackwardParams p = params;
  Staging s(*ops_);
  s.In(p.d_y).In(p.b).In(p.gate_up).Out(p.d_gate_up).Out(p.out);
  return s.Finish(ops_->MatMulSwiGluBackward(p));
}
absl::Status StagedOps::NormMatMul(const ops::NormMatMulParams& params) {
  ops::NormMatMulParams p = params;
  Staging s(*ops_);
  s.InAs(p.norm.x, residual_dtype_).In(p.norm.weight).Out(p.norm.out);
  s.OutAs(p.norm.rstd, DType::kF32).In(p.b).In(p.bias).Out(p.c);
  return s.Finish(ops_->NormMatMul(p));
}
absl::Status StagedOps::NormSwiGlu(const ops::NormSwiGluParams& params) {
  ops::NormSwiGluParams p = params;
  Staging s(*ops_);
  s.InAs(p.norm.x, residual_dtype_).In(p.norm.weight).Out(p.norm.out);
  s.OutAs(p.norm.rstd, DType::kF32).In(p.b).Out(p.gate_up).Out(p.out);
  return s.Finish(ops_->NormSwiGlu(p));
}
absl::Status StagedOps::MlpBlock(const ops::MlpBlockParams& params) {
  ops::MlpBlockParams p = params;
  Staging s(*ops_);
  s.In(p.attn_out).In(p.o).InAs(p.input, residual_dtype_).In(p.down);
  s.OutAs(p.mlp.norm.x, residual_dtype_).In(p.mlp.norm.weight).Out(p.mlp.norm.out);
  s.In(p.mlp.b).Out(p.mlp.gate_up).Out(p.mlp.out).OutAs(p.output, residual_dtype_);
  s.OutAs(p.next.norm.x, residual_dtype_).In(p.next.norm.weight).Out(p.next.norm.out);
  s.In(p.next.b).In(p.next.bias).Out(p.next.c);
  if (p.rotate.plan != nullptr) {
    // Heads are columns of next.c there, too.
    const auto heads = [&](const TensorView& t) {
      const int64_t first = t.f32() - params.next.c.f32();
      return p.next.c.Cols(first, first + t.dim(1) * t.dim(2)).SplitHeads(t.dim(1), t.dim(2));
    };
    ops::QkNormRopeParams& r = p.rotate;
    r.q_in = r.q_out = heads(r.q_in), r.k_in = r.k_out = heads(r.k_in), r.v = heads(r.v);
    s.In(r.q_norm).In(r.k_norm).InAs(r.rope, DType::kF32).Out(r.pages.k).Out(r.pages.v);
  }
  return s.Finish(ops_->MlpBlock(p));
}
absl::Status StagedOps::LogProbHead(const ops::LogProbHeadParams& params) {
  ops::LogProbHeadParams p = params;
  Staging s(*ops_);
  s.In(p.hidden).In(p.weight).OutAs(p.kept, DType::kU8);
  return s.Finish(ops_->LogProbHead(p));
}
absl::Status StagedOps::LogProbHeadBackward(const ops::LogProbHeadBackwardParams& params) {
  ops::LogProbHeadBackwardParams p = params;
  Staging s(*ops_);
  s.In(p.hidden).In(p.weight).Out(p.d_hidden).OutAs(p.d_weight, DType::kF32);
  s.OutAs(p.kept, DType::kU8);
  return s.Finish(ops_->LogProbHeadBackward(p));
}
absl::StatusOr<std::unique_ptr<ops::PendingSample>> StagedOps::StartSample(
    const ops::SampleParams& params) {
  class Done final : public ops::PendingSample {
    absl::Status Wait() override { return absl::OkStatus(); }
  };
  ops::SampleParams p = params;
  Staging s(*ops_);
  s.InAs(p.logits, DType::kF32).Out(p.drawn);
  RETURN_IF_ERROR(s.Finish(ops_->Sample(p)));
  return std::make_unique<Done>();
}
absl::Status StagedOps::CopyBlocks(const ops::CopyBlocksParams& params) {
  ops::CopyBlocksParams p = params;
  Staging s(*ops_);
  s.Out(p.pool);
  return s.Finish(ops_->CopyBlocks(p));
}
absl::StatusOr<double> StagedOps::SumSquares(TensorView x) {
  Staging s(*ops_);
  s.InAs(x, x.dtype);
  absl::StatusOr<double> sum = ops_->SumSquares(x);
  RETURN_IF_ERROR(s.Finish(sum.status()));
  return sum;
}
absl::Status StagedOps::AdamW(const ops::AdamWParams& params) {
  ops::AdamWParams p = params;
  Staging s(*ops_);
  s.OutAs(p.param, p.param.dtype)
      .Out(p.master_remainder)
      .InAs(p.grad, p.grad.dtype)
      .OutAs(p.m, DType::kF32);
  s.OutAs(p.v, DType::kF32).In(p.decay_mask);
  return s.Finish(ops_->AdamW(p));
}

}  // namespace coppice
