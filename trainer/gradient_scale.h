// GradientScale: the power of two S that gradients are multiplied by from the head on. f16 ends
// below at 6e-8, and derivatives by an activation are of the size of one over the request's
// tokens: unscaled, much of them would vanish. The gradient arena holds S times the gradient until
// the optimizer divides by S, which changes no bit of an f32 that neither over- nor underflows.
// Where a device computes in another type, S is 1.
//
// S = 2^(k + e), at least 1, where 2^k <= 64 / the largest coefficient of a log-prob or an entropy,
// k in [0, 24]: 64 leaves a factor of 1,000 to the largest f16 for what layers add. The first
// request of a step fixes S, since gradients of all its requests are added up; a later one with
// larger coefficients has less room. e <= 0 follows what happened: 2 less after a norm that is not
// finite though the loss is, 1 more after 100 that are. (Rows that no wanted token sees may exceed
// f16 and leave the loss finite: that, too, lowers it.)
//
// Pure arithmetic. Owner and thread: the trainer on the engine thread.
#pragma once

#include <cstdint>

namespace coppice {

class GradientScale {
 public:
  // What steps have taught: of a checkpoint, so that what resumes skips no other steps.
  struct History {
    int64_t exponent = 0;      // e
    int64_t finite_norms = 0;  // in a row, since it changed

    bool Valid() const;  // what steps can have taught
    friend bool operator==(const History&, const History&) = default;
  };

  // Off: always 1.
  explicit GradientScale(bool on) : on_(on) {}

  // Before gradients are computed: S stays as it is if the step has one. 0: whatever is added is
  // zero, which any S fits.
  void Fix(double largest_coefficient);
  // The gradients are gone, consumed or not: the next request fixes S anew.
  void Forget() { fixed_ = false; }
  // Gradients had a finite norm, or not. False if they had not and there was nothing to lower. What
  // is off learns nothing.
  bool Learn(bool finite);

  double value() const { return fixed_ ? value_ : 1; }
  // Whether coefficients, or that it is off, have chosen the value: zeros do not.
  bool chosen() const { return fixed_ || !on_; }
  const History& history() const { return history_; }
  void set_history(const History& history) { history_ = history; }

 private:
  const bool on_;
  bool fixed_ = false;
  double value_ = 1;
  History history_;
};

}  // namespace coppice
