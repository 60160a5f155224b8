// The one table of tolerances. A test names the reason it deviates from equality; no test has a
// number of its own.
#pragma once

namespace coppice::tolerance {

// One fp32 op against the double reference: sums of at most a few thousand terms of size 1, with
// the error growing like sqrt(terms) * 6e-8; relative to the largest value of the tensor.
inline constexpr double kOpForward = 4e-6;
// The same for gradients, which chain two or three such sums and an exp.
inline constexpr double kOpBackward = 1e-5;
// The same on a device that computes in bf16 and sums in f32, with inputs that bf16 holds: one
// rounding of the result, 2^-9 of its size.
inline constexpr double kBf16Forward = 4e-3;
// A product with bias rounds before the bias and after it, and the first may be the larger.
inline constexpr double kBf16Bias = 8e-3;
// Gradients there chain two or three such roundings.
inline constexpr double kBf16Backward = 1e-2;
// The three in f16, which has three bits more: one rounding of the result is 2^-12 of its size.
inline constexpr double kF16Forward = 5e-4;
inline constexpr double kF16Bias = 1e-3;
inline constexpr double kF16Backward = 1.5e-3;
// Central differences in double precision with step 1e-5: truncation about step^2 = 1e-10, rounding
// about 1e-16 / step = 1e-11.
inline constexpr double kFiniteDifferenceStep = 1e-5;
// Elementary functions of simd/vec.h: about two units in the last place.
inline constexpr double kElementary = 2.5e-7;

// A log-prob of size at most 20 as a float, from a softmax whose exp has kElementary.
inline constexpr double kLogProb = 1e-5;

// Gradients of a shared tree against the sum over its sequences, run one by one, fp32 (promise P3).
inline constexpr double kTreeVersusFlat = 1e-5;
// Two ways through a whole model in bf16 (shared or flat, in chunks or at once): both round every
// activation to 2^-9, and the largest difference of any element counts.
inline constexpr double kBf16Model = 5e-2;
// The same in f16: an eighth.
inline constexpr double kF16Model = 6.25e-3;
// Sums of a few dozen terms of size 1 in double precision.
inline constexpr double kDoubleSums = 1e-12;
// Derivatives of a loss against its central differences with kFiniteDifferenceStep; third
// derivatives of exp at ratios of up to 50 and the f32 inputs dominate.
inline constexpr double kLossDerivative = 1e-7;
// An fp32 update of a weight of size 1 by AdamW: a few units in the last place, and the rounding of
// its moments.
inline constexpr double kAdamW = 2e-6;
// Central differences of a whole fp32 model along a gradient: rounding of the loss about 1e-6 /
// step, truncation about step^2 times its third derivative.
inline constexpr double kModelDifferenceStep = 2e-3;
inline constexpr double kModelDifference = 2e-3;
// Logits and gradients against Hugging Face transformers in fp32: two implementations with
// different orders of summation over the depth of a model.
inline constexpr double kParity = 1e-4;

// Log-probs of a sampled token from the decode path against the trainer's forward: the same sums in
// another order and batch, over the depth of a tiny model.
inline constexpr double kSamplerVersusTrainer = 1e-4;
// Share of samples that may differ between batches because the two best candidates of a draw are
// closer than the rounding error.
inline constexpr double kNearTieFraction = 0.05;

// bf16 attention on CUDA against fp32, ||out - want|| / ||want|| per tensor: P, dS and the outputs
// are rounded to bf16 (2^-9 relative each).
inline constexpr double kBf16Attention = 1e-2;
// The same in f16, which rounds to 2^-12: an eighth, rounded up for what it holds as subnormals.
inline constexpr double kF16Attention = 1.5e-3;
// What f32 sums of up to 256 products of size 1 differ by: sums that cancel count from there on.
inline constexpr double kSumsInAttention = 1e-6;

// Log-probs of a real model against fp32 with the same weights, absolute difference: what an
// importance ratio bears. Of every token, whatever the type, and of the mean in bf16. Measured: any
// token 8.5e-3 and 9.9e-3 in f16, 0.099 and 0.133 in bf16, the mean in bf16 8.4e-3.
inline constexpr double kDeviceLogProb = 1e-2;
// The mean in f16: an eighth of what bf16 measured, emulated at 1.1e-3, and what other sums add.
inline constexpr double kF16LogProb = 2e-3;
// Two candidates whose log-probs may each be off by kDeviceLogProb, whatever the type.
inline constexpr double kNearTie = 2e-2;
// Entropy of a softmax over logits of deviation 1, against log(vocab): less by 1/2 on average, i.e.
// by an eighth for a vocabulary of 64.
inline constexpr double kRandomEntropy = 0.2;

// Gradients of a whole model of a few layers in bf16 against fp32, |got - want| / |want| in the
// Euclidean norm, for each tensor: a dozen roundings of 2^-9 on the way, of independent signs.
inline constexpr double kBf16Gradient = 1e-2;
// The same with matrices of gain 1, which pass on every rounding undiminished. Separate sequences
// err as much: measured 0.9 to 2.8e-2 for both.
inline constexpr double kBf16GradientOfLargeWeights = 4e-2;
// Both in f16: a quarter, where roundings alone would be an eighth; emulated at 2e-3 for the first.
inline constexpr double kF16Gradient = 2.5e-3;
inline constexpr double kF16GradientOfLargeWeights = 1e-2;
// Such an error of a shared tree over that of separate sequences, all tensors together: both round
// the same quantities, other bits of them. Of one request 1.00 on average, deviation 0.042 (96
// measured); of three together four of theirs.
inline constexpr double kSharedOverFlat = 1.1;

// Chi-square tests: the probability that a correct sampler fails. Seeds are fixed, so a pass stays
// a pass.
inline constexpr double kChiSquareSignificance = 1e-4;

}  // namespace coppice::tolerance
