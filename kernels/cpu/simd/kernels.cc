// One instruction set's table. Compiled several times, each with its own COPPICE_ISA (a name) and
// COPPICE_LANES.
#include "kernels/cpu/simd/kernels.h"

#include "kernels/cpu/simd/attention_kernels.h"
#include "kernels/cpu/simd/gemm_kernels.h"
#include "kernels/cpu/simd/row_kernels.h"

#define COPPICE_STRING_INNER(x) #x
#define COPPICE_STRING(x) COPPICE_STRING_INNER(x)

namespace coppice::cpu::COPPICE_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    .name = COPPICE_STRING(COPPICE_ISA),
    .dot_gemm = DotGemm,
    .dot = Dot,
    .pack_columns = PackColumns,
    .pack_rows = PackRows,
    .attention_forward = AttentionForward,
    .attention_backward = AttentionBackward,
    .add = Add,
    .rms_norm = RmsNorm,
    .rms_norm_backward = RmsNormBackward,
    .rotate_half = RotateHalf,
    .swiglu = SwiGlu,
    .swiglu_backward = SwiGluBackward,
    .max = MaxOf,
    .exp_shifted = ExpShifted,
    .softmax_stats = FoldSoftmaxStats,
    .softmax_backward = SoftmaxBackward,
    .sum_squares = SumOfSquares,
    .adamw = AdamW,
};

}  // namespace coppice::cpu::COPPICE_ISA
