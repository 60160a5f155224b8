// SmolLM2-135M from its GGUF: logits, greedy tokens and every gradient agree with transformers,
// which reads the same file.
#include <gtest/gtest.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "tests/parity/golden.h"
#include "tests/parity/model_run.h"
#include "tests/support/tolerances.h"

namespace coppice {
namespace {

class SmolLm2ParityTest : public testing::Test {
 protected:
  GoldenArrays golden_{GoldenPath("smollm2.safetensors")};
  ModelRun run_{SmolLm2Path()};
};

TEST_F(SmolLm2ParityTest, LogitsAgreeInEveryRow) {
  constexpr int64_t kDigest = 1 + kDigestProjections + kDigestEntries;
  const int64_t vocab = run_.model().config.vocab;
  for (int i = 0; golden_.Has(absl::StrCat("logits.", i, ".tokens")); ++i) {
    const auto tokens = golden_.Tokens(absl::StrCat("logits.", i, ".tokens"));
    const auto digests = golden_.Floats(absl::StrCat("logits.", i, ".rows"));
    const std::vector<float> logits = run_.Logits(tokens);
    for (size_t row = 0; row < tokens.size(); ++row) {
      const std::vector<float> want(digests.begin() + row * kDigest,
                                    digests.begin() + (row + 1) * kDigest);
      const std::vector<double> got = Digest(logits.data() + row * vocab, vocab);
      EXPECT_LT(DigestRelativeError(got, want), tolerance::kParity)
          << "prompt " << i << " row " << row;
    }
    if (!golden_.Has(absl::StrCat("logits.", i, ".last"))) continue;
    const std::vector<float> last(logits.end() - vocab, logits.end());
    EXPECT_LT(RelativeError(last, golden_.Floats(absl::StrCat("logits.", i, ".last"))),
              tolerance::kParity);
  }
}

TEST_F(SmolLm2ParityTest, GreedyContinuationsAreIdentical) { ExpectGreedyParity(run_, golden_); }

TEST_F(SmolLm2ParityTest, EveryGradientAgrees) {
  const Parameters& gradients = run_.GroupGradients(golden_);
  for (const NamedTensor& t : HfTensors(run_.model().config, gradients)) {
    const std::vector<double> got = Digest(t.view.f32(), t.view.num_elements());
    EXPECT_LT(DigestRelativeError(got, golden_.Floats("grad_digest." + t.name)), tolerance::kParity)
        << t.name;
  }
}

}  // namespace
}  // namespace coppice
