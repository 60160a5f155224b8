#include "tests/bench/options.h"

#include <algorithm>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace coppice::bench {
namespace {

constexpr char kUsage[] =
    R"(usage: coppice_bench SUBCOMMAND [--option value | --option=value]...

Verifies a result, then times it, then prints one JSON object a line:
  bench, shape (the options as given), seconds (median), bound_seconds, bound (what sets it, measured
  in the same run), ratio (bound_seconds / seconds), peer, peer_seconds, device, commit.

Subcommands
  prefill      one forward pass over a prompt into the KV pool, with the logits of its last token
  decode       one token for each of a group of samples of one prompt: forward, logits, greedy sampling
  train_step   one prompt and its responses: forward, loss and backward; then AdamW
  adamw        the gradient norm, and the update of all parameters of the geometry
  logprob_head the head over group * response rows, forward and backward, against its products alone
  radix        match and publish of a prompt in the radix cache (no device)
  placement    choosing one of four replicas for a prompt (no device)
  attention    the attention op over one prompt and its responses, forward and backward

Options
  --geometry NAME      model shape with random weights: smollm2-135m (default), qwen3-4b, tiny-llama,
                       tiny-qwen2, tiny-qwen3
  --prompt N           prompt tokens; default 1000, radix 16384, placement 12000
  --cached N           prefill: prompt tokens whose keys and values are in the pool already (default 0);
                       the timed pass runs the others
  --response N         response tokens of each sample (default 64); decode: tokens it has already
  --group N            samples of the prompt (default 8); prefill and radix use none
  --mode NAME          shared (default): the prompt exists once; flat: each sample has its own, same
                       kernels; kept: train_step from what a prefill has kept of the prompt;
                       ungrouped: decode reads the one stored prompt for each sample anew
  --block_tokens N     tokens in a KV block (default 16)
  --device cpu|cuda    where to run (default cpu)
  --compute_dtype NAME of weights and activations on cuda: bf16 (default), f16
  --matmul_cache FILE  on cuda: which algorithms products run by, what it lacks timed once and kept
                       there; see coppiced --help (default none)
  --threads N          CPU threads, 0 = all cores (default)
  --repeats N          timed runs, of which the median counts (default 5)
  --seed N             of weights and tokens (default 1)
  --bf16_gradients 0|1 train_step: gradients of layers' matrices in bf16, not f32 (default 0)
  --phases 0|1         train_step: also the device's seconds by family of ops (default 0)
  --help               this text
)";

absl::Status SetNumber(absl::string_view name, absl::string_view value, int64_t least,
                       int64_t& out) {
  if (absl::SimpleAtoi(value, &out) && out >= least) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " wants an integer of at least ", least,
                                                 ", got \"", value, "\"; see --help"));
}

absl::Status SetBool(absl::string_view name, absl::string_view value, bool& out) {
  if (value == "0" || value == "1") {
    out = value == "1";
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat(name, " wants 0 or 1, got \"", value, "\"; see --help"));
}

absl::Status Set(absl::string_view name, absl::string_view value, Options& options) {
  if (name == "--geometry") {
    options.geometry = std::string(value);
  } else if (name == "--device") {
    options.device = std::string(value);
  } else if (name == "--matmul_cache") {
    options.matmul_cache = std::string(value);
  } else if (name == "--compute_dtype") {
    for (const DType dtype : {DType::kBF16, DType::kF16}) {
      options.compute_dtype = dtype;
      if (value == coppice::Name(dtype)) return absl::OkStatus();
    }
    return absl::InvalidArgumentError(
        absl::StrCat("--compute_dtype wants bf16 or f16, got \"", value, "\"; see --help"));
  } else if (name == "--mode") {
    for (const Mode mode : {Mode::kShared, Mode::kFlat, Mode::kKept, Mode::kUngrouped}) {
      options.mode = mode;
      if (value == Name(mode)) return absl::OkStatus();
    }
    return absl::InvalidArgumentError(absl::StrCat(
        "--mode wants shared, flat, kept or ungrouped, got \"", value, "\"; see --help"));
  } else if (name == "--prompt") {
    return SetNumber(name, value, 1, options.prompt);
  } else if (name == "--cached") {
    return SetNumber(name, value, 0, options.cached);
  } else if (name == "--response") {
    return SetNumber(name, value, 1, options.response);
  } else if (name == "--group") {
    return SetNumber(name, value, 1, options.group);
  } else if (name == "--block_tokens") {
    return SetNumber(name, value, 1, options.block_tokens);
  } else if (name == "--threads") {
    return SetNumber(name, value, 0, options.threads);
  } else if (name == "--repeats") {
    return SetNumber(name, value, 1, options.repeats);
  } else if (name == "--phases") {
    return SetBool(name, value, options.phases);
  } else if (name == "--bf16_gradients") {
    return SetBool(name, value, options.bf16_gradients);
  } else if (name == "--seed") {
    return SetNumber(name, value, 0, options.seed);
  } else {
    return absl::InvalidArgumentError(absl::StrCat("unknown option \"", name, "\"; see --help"));
  }
  return absl::OkStatus();
}

}  // namespace

std::string Usage() { return kUsage; }

absl::StatusOr<Options> ParseOptions(const std::vector<absl::string_view>& arguments, bool& help) {
  Options options;
  help = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const absl::string_view argument = arguments[i];
    if (argument == "--help" || argument == "-h") {
      help = true;
      return options;
    }
    if (argument.substr(0, 2) != "--") {
      if (!options.subcommand.empty()) {
        return absl::InvalidArgumentError(
            absl::StrCat("one subcommand wanted, got a second, \"", argument, "\"; see --help"));
      }
      options.subcommand = std::string(argument);
      continue;
    }
    const size_t equals = argument.find('=');
    if (equals == absl::string_view::npos && i + 1 == arguments.size()) {
      return absl::InvalidArgumentError(absl::StrCat(argument, " wants a value; see --help"));
    }
    const absl::string_view value =
        equals == absl::string_view::npos ? arguments[++i] : argument.substr(equals + 1);
    RETURN_IF_ERROR(Set(argument.substr(0, equals), value, options));
  }
  if (options.prompt == 0) {
    options.prompt = options.subcommand == "radix"       ? 16384
                     : options.subcommand == "placement" ? 12000
                                                         : 1000;
  }
  if (options.mode == Mode::kKept && options.subcommand != "train_step") {
    return absl::InvalidArgumentError(
        absl::StrCat("--mode=kept is for train_step, got ", options.subcommand, "; see --help"));
  }
  if (options.mode == Mode::kUngrouped && options.subcommand != "decode") {
    return absl::InvalidArgumentError(
        absl::StrCat("--mode=ungrouped is for decode, got ", options.subcommand, "; see --help"));
  }
  return options;
}

}  // namespace coppice::bench
