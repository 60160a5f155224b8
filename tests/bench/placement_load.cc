#include "tests/bench/placement_load.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <random>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "server/placement/prefix_hash.h"

namespace coppice::bench {
namespace {

// Seeds of chains, so that loads and kinds of blocks never meet.
constexpr uint64_t kTraceChain = 1, kPromptChain = 2, kSampleChain = 3, kSessionName = 4;

struct Lengths {
  int64_t prompt;
  std::vector<std::vector<int64_t>> outputs;  // [sample][turn]
};

// A long-tailed length with this median, between `least` and `most`.
int64_t DrawLength(std::mt19937_64& rng, double median, int64_t least, int64_t most) {
  std::lognormal_distribution<double> length(std::log(median), 0.6);
  return std::clamp(static_cast<int64_t>(length(rng)), least, most);
}

// Blocks of a transcript of `tokens`: those within the prompt belong to the group, later ones to
// the sample.
std::vector<uint64_t> Transcript(uint64_t group, uint64_t sample, int64_t prompt, int64_t tokens) {
  std::vector<uint64_t> blocks(tokens / kSimBlockTokens);
  uint64_t chain = MixHash(kPromptChain, group);
  for (size_t i = 0; i < blocks.size(); ++i) {
    const bool shared = static_cast<int64_t>(i + 1) * kSimBlockTokens <= prompt;
    chain = MixHash(chain, shared ? kPromptChain : MixHash(kSampleChain, sample));
    blocks[i] = chain;
  }
  return blocks;
}

}  // namespace

absl::StatusOr<SimLoad> ReadTrace(const std::string& path) {
  std::ifstream file(path);
  if (!file) {
    return absl::NotFoundError(
        absl::StrCat("trace not read: want a readable file, got ", path, "; see tests/README.md"));
  }
  SimLoad load{.name = "mooncake", .max_tokens = 2000};
  std::string line;
  for (int64_t number = 1; std::getline(file, line); ++number) {
    const nlohmann::json row = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!row.is_object() || !row["hash_ids"].is_array() || row["hash_ids"].empty()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "trace not read: want an object with hash_ids, got another line ", number, " of ", path));
    }
    SimRequest request;
    request.arrival_s = row["timestamp"].get<double>() / 1000;
    request.prompt_tokens = row["input_length"];
    request.output_tokens = row["output_length"];
    uint64_t chain = kTraceChain;
    for (const auto& id : row["hash_ids"]) {  // 512 tokens: two blocks
      chain = MixHash(chain, id.get<uint64_t>());
      request.blocks.push_back(chain);
      request.blocks.push_back(MixHash(chain, kTraceChain));
    }
    request.prefix_hash = request.blocks[0];
    request.blocks.resize(request.prompt_tokens / kSimBlockTokens);
    load.requests.push_back(std::move(request));
  }
  return load;
}

SimLoad MakeRlLoad(const RlOptions& options) {
  SimLoad load{.name = "rl", .max_tokens = 1024};
  std::mt19937_64 rng(options.seed);
  constexpr int64_t kToolTokens = 192;
  for (int64_t step = 0; step < options.steps; ++step) {
    // Far enough apart that the step before has ended.
    const double start_s = 300.0 * static_cast<double>(step);
    for (int64_t g = 0; g < options.groups; ++g) {
      const uint64_t group = static_cast<uint64_t>(step * options.groups + g);
      const int64_t prompt = DrawLength(rng, 1500, 512, 8192);
      const int64_t output = DrawLength(rng, 300, 16, load.max_tokens);
      const uint64_t home = MixHash(kPromptChain, group);
      const auto first = static_cast<int64_t>(load.requests.size());
      SimRequest turn{.arrival_s = start_s,
                      .prefix_hash = home,
                      .blocks = Transcript(group, 0, prompt, prompt),
                      .prompt_tokens = prompt,
                      .n = options.samples,
                      .output_tokens = output};
      for (int64_t s = 0; s < options.samples; ++s) {
        const std::vector<uint64_t> whole = Transcript(group, s, prompt, prompt + output);
        turn.grown.insert(turn.grown.end(),
                          whole.begin() + static_cast<int64_t>(turn.blocks.size()), whole.end());
      }
      load.requests.push_back(turn);
      for (int64_t s = 0; s < options.samples; ++s) {
        int64_t after = first, tokens = prompt + output;
        for (int64_t t = 1; t < options.turns; ++t) {
          SimRequest next{.arrival_s = 0.5 * static_cast<double>(1 + rng() % 4),
                          .after = after,
                          .prefix_hash = home,
                          .session = MixHash(kSessionName, group * 64 + s)};
          next.prompt_tokens = tokens + kToolTokens;
          next.blocks = Transcript(group, s, prompt, next.prompt_tokens);
          next.output_tokens = DrawLength(rng, 300, 16, load.max_tokens);
          tokens = next.prompt_tokens + next.output_tokens;
          const std::vector<uint64_t> whole = Transcript(group, s, prompt, tokens);
          next.grown.assign(whole.begin() + static_cast<int64_t>(next.blocks.size()), whole.end());
          after = static_cast<int64_t>(load.requests.size());
          load.requests.push_back(std::move(next));
        }
      }
    }
  }
  return load;
}

}  // namespace coppice::bench
