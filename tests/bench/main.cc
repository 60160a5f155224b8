// coppice_bench: see --help (options.cc).
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include "tests/bench/benches.h"
#include "tests/bench/options.h"

namespace coppice::bench {
namespace {

constexpr int kBadArguments = 2;

int Main(const std::vector<absl::string_view>& arguments) {
  const std::map<std::string, absl::Status (*)(const Options&)> subcommands = {
      {"prefill", RunPrefill},          {"decode", RunDecode},
      {"train_step", RunTrainStep},     {"adamw", RunAdamW},
      {"logprob_head", RunLogProbHead}, {"radix", RunRadix},
      {"placement", RunPlacement},      {"attention", RunAttention},
  };
  bool help = false;
  const absl::StatusOr<Options> options = ParseOptions(arguments, help);
  if (!options.ok()) {
    std::cerr << "coppice_bench: " << options.status().message() << "\n";
    return kBadArguments;
  }
  if (help) {
    std::cout << Usage();
    return 0;
  }
  const auto subcommand = subcommands.find(options->subcommand);
  if (subcommand == subcommands.end()) {
    std::cerr << "coppice_bench: unknown subcommand \"" << options->subcommand
              << "\"; see --help\n";
    return kBadArguments;
  }
  const absl::Status status = subcommand->second(*options);
  if (status.ok()) return 0;
  std::cerr << "coppice_bench: " << status.message() << "\n";
  return 1;
}

}  // namespace
}  // namespace coppice::bench

int main(int argc, char** argv) {
  return coppice::bench::Main(std::vector<absl::string_view>(argv + 1, argv + argc));
}
