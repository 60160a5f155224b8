#include "server/config.h"

#include <algorithm>
#include <cstdlib>
#include <variant>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

enum class Unit { kNone, kBytes };

struct Flag {
  const char* group;
  const char* name;
  std::variant<std::string Config::*, int64_t Config::*, uint64_t Config::*, double Config::*,
               bool Config::*>
      field;
  const char* help;
  // Integers:
  int64_t min = 0, max = INT64_MAX;
  Unit unit = Unit::kNone;
  // Strings: the allowed values, if not any.
  std::vector<std::string> choices = {};
};

constexpr absl::string_view kCommandLineOnly = "Command line only";
constexpr int64_t kMaxPort = 65535;
constexpr int64_t kMaxCount = int64_t{1} << 30;

const std::vector<Flag>& Flags() {
  static const auto* flags = new std::vector<Flag>{
      {"Role",
       "role",
       &Config::role,
       "daemon: serves and trains a model. router: passes calls on to daemons; uses the flags of "
       "Network, Router and Process, and no model.",
       0,
       0,
       Unit::kNone,
       {"daemon", "router"}},
      {"Model", "model", &Config::model,
       "GGUF file, or Hugging Face directory with config.json and *.safetensors. This or "
       "--model_geometry is required."},
      {"Model", "model_geometry", &Config::model_geometry,
       "Random weights of a named shape, for tests and benchmarks: tiny-llama, tiny-qwen2, "
       "tiny-qwen3, smollm2-135m, qwen3-4b. No tokenizer."},
      {"Device",
       "device",
       &Config::device,
       "Where the model runs.",
       0,
       0,
       Unit::kNone,
       {"cpu", "cuda"}},
      {"Device", "threads", &Config::threads, "CPU threads of the model; 0 = all cores.", 0, 4096},
      {"Device", "deterministic", &Config::deterministic,
       "A token's numbers depend on its own prefix alone, bit for bit: cached or not, whatever "
       "else is in the batch. Costs speed on cuda, checked at start; cpu is always so."},
      {.group = "Device",
       .name = "compute_dtype",
       .field = &Config::compute_dtype,
       .help =
           "Of weights, activations and KV blocks on cuda; cpu computes in f32 whatever this "
           "says. auto: what a checkpoint of ours names; bf16 if it or its config.json is in "
           "bf16, f16 if it is in f16, f32 or quantised, bf16 for --model_geometry. A quantised "
           "copy of a bf16 model, or one saved on cpu, says nothing of it: set bf16 if requests "
           "end without numbers. f16 rounds eight times finer but ends at 65504: a weight beyond "
           "is refused, an activation beyond ends its request and perhaps others of its batch, "
           "gradients are scaled. f16 excludes --gradient_dtype=bf16.",
       .choices = {"auto", "bf16", "f16"}},
      {"Device", "matmul_cache", &Config::matmul_cache,
       "File that says by which of cuBLASLt's algorithms the larger matrix products run on cuda; "
       "what it lacks runs by the library's first choice. Processes with the same file have the "
       "same bits. It must be there unless it grows. One of another library or device, or broken, "
       "is not used. Measure your load with and without: alone, products took 3 to 8 percent less "
       "time on an H200, a train step and serving of 64 groups of 8 the same. Empty: the library's "
       "first choice. Not used with --deterministic."},
      {"Device", "matmul_cache_grows", &Config::matmul_cache_grows,
       "Make the file of --matmul_cache, or add to it: a kind of product that it lacks is timed "
       "when first run, for up to a second, and hundreds come with the numbers of rows of a mixed "
       "load. For a rehearsal of that load, not for service."},
      {"Network", "host", &Config::host,
       "Address to listen on, gRPC and HTTP. There is no authentication: beyond loopback put a "
       "proxy in front."},
      {"Network", "port", &Config::port, "gRPC port; 0 = any free one, see the ready line.", 0,
       kMaxPort},
      {"Network", "http_port", &Config::http_port,
       "Port of /metrics, /healthz, /readyz; 0 = any free one.", 0, kMaxPort},
      {"Network", "port_file", &Config::port_file,
       "File that gets {\"grpc\": port, \"http\": port, \"pid\": id} once ready, written at once; "
       "removed at start."},
      {"Network", "max_message_bytes", &Config::max_message_bytes,
       "Largest gRPC message, in and out.", 4096, INT32_MAX, Unit::kBytes},
      {"Network", "stream_events", &Config::stream_events,
       "Events that wait for a slow reader before its request is paused.", 1, kMaxCount},
      {"Network", "trust_tenant_header", &Config::trust_tenant_header,
       "Take the tenant from the x-coppice-tenant metadata, which an authenticating proxy must "
       "set; calls of Generation, Training and Cache without it are refused. Admin needs none: "
       "keep tenants away from it. Off: one tenant."},
      {"Memory", "kv_bytes", &Config::kv_bytes,
       "Memory for KV blocks; 0 = what 16 full contexts need, at most 1 GiB but never less than "
       "one context.",
       0, INT64_MAX, Unit::kBytes},
      {"Memory", "kv_blocks", &Config::kv_blocks,
       "Number of KV blocks, instead of --kv_bytes; 0 = by --kv_bytes.", 0, INT32_MAX},
      {"Memory", "kv_fraction", &Config::kv_fraction,
       "KV blocks, instead of --kv_bytes, as a share of the device memory that weights, workspace, "
       "scratch, gradients and optimizer leave free; training's activations get the rest. 0 = by "
       "--kv_bytes.",
       0, 1},
      {"Memory", "block_tokens", &Config::block_tokens,
       "Token positions in a KV block: the unit of sharing. On cuda a power of two, at least 8.", 1,
       1024},
      {"Scheduling", "max_context", &Config::max_context,
       "Most tokens of prompt and completion; 0 = the model's own limit.", 0, kMaxCount},
      {"Scheduling", "max_batch_rows", &Config::max_batch_rows,
       "Tokens of one engine step; longer prompts are prefilled in chunks.", 8, kMaxCount},
      {"Scheduling", "max_running_samples", &Config::max_running_samples,
       "Samples decoded at the same time.", 1, kMaxCount},
      {.group = "Scheduling",
       .name = "overlap",
       .field = &Config::overlap,
       .help = "true: queue a decoding step before the one before it is read, so that a GPU does "
               "not wait for the host; same tokens, an answer that ends costs one row more. auto: "
               "true for cuda.",
       .choices = {"auto", "true", "false"}},
      {"Scheduling", "max_queued_requests", &Config::max_queued_requests,
       "Requests that may wait; more are refused with RESOURCE_EXHAUSTED at once.", 1, kMaxCount},
      {"Scheduling", "max_group_size", &Config::max_group_size, "Largest n of a Generate call.", 1,
       kMaxCount},
      {"Scheduling", "max_reader_stall_s", &Config::max_reader_stall_s,
       "Seconds for which a reader may leave no room for another token before its stream ends with "
       "RESOURCE_EXHAUSTED and its blocks are free.",
       1, 86400},
      {"Training", "max_train_rows", &Config::max_train_rows,
       "Unique tokens in one training pass; more is split into micro-batches, and less where that "
       "saves recomputing.",
       1, kMaxCount},
      {"Training", "activation_bytes", &Config::activation_bytes,
       "Memory for activations of one training pass; decides what is kept, what is recomputed and "
       "what is cut. 0 = half of the memory that is free at start; on cuda all of it but what "
       "gradients, optimizer and scratch need.",
       0, INT64_MAX, Unit::kBytes},
      {.group = "Training",
       .name = "gradient_dtype",
       .field = &Config::gradient_dtype,
       .help =
           "Of the gradients of layers' matrices. bf16: half of their memory, which activations "
           "may use, rounded once more for every micro-batch.",
       .choices = {"f32", "bf16"}},
      {"Training", "max_rollouts", &Config::max_rollouts,
       "Rollouts kept for training by id, in host memory: 8 bytes a token drawn, 4 a token of the "
       "prompt. The oldest goes first.",
       1, kMaxCount},
      {"Training", "prompt_state_bytes", &Config::prompt_state_bytes,
       "Device memory for states of the prompts of retained requests, with which training under "
       "the same policy skips their forward pass; the oldest goes first. For long prompts: each "
       "such group trains in a pass of its own. 0 = off.",
       0, INT64_MAX, Unit::kBytes},
      {"Training", "max_step_records", &Config::max_step_records,
       "Answers kept so that a repeated step_id gets the first one, in host memory: 4 bytes a "
       "token if log-probs were asked for.",
       1, kMaxCount},
      {"Training", "checkpoint_dir", &Config::checkpoint_dir,
       "Directory of named checkpoints, created if absent. Durable steps are kept in its "
       "subdirectory durable, a name that no checkpoint may have, and are resumed at start. "
       "Empty: both are refused."},
      {"Router", "replicas", &Config::replicas,
       "NAME=HOST:PORT,... or HOST:PORT,...: the daemons, by names that stay when addresses "
       "change. This or --replica_dns is required."},
      {"Router", "replica_dns", &Config::replica_dns,
       "HOST:PORT of a headless service: the daemons are all its addresses, named by DNS. If it "
       "names only some, the others wait; if it names none, names are the addresses."},
      {"Router", "replica_dns_interval_s", &Config::replica_dns_interval_s,
       "Seconds between two resolutions of --replica_dns.", 1, 3600},
      {"Router", "leader", &Config::leader,
       "Name of the daemon that trains. Empty: the first by name of those found at the start. It "
       "is never replaced while the router runs."},
      {"Router", "health_interval_ms", &Config::health_interval_ms,
       "Milliseconds between two health checks.", 10, 3600000},
      {"Router", "health_timeout_ms", &Config::health_timeout_ms,
       "Milliseconds that a health check may take.", 10, 3600000},
      {"Router", "eject_after", &Config::eject_after,
       "Failed health checks in a row after which a daemon gets no calls and loses its open ones.",
       1, 1000},
      {"Router", "first_byte_timeout_s", &Config::first_byte_timeout_s,
       "Seconds that a call may wait for the first message of its answer before another daemon is "
       "asked; 0 = no limit. Training, Score, Pause and Drain have none.",
       0, 86400},
      {"Process", "seed", &Config::seed,
       "Of drawn sampling seeds and random weights; 0 = drawn seeds come from the system."},
      {"Process",
       "log_level",
       &Config::log_level,
       "Least severe lines to log.",
       0,
       0,
       Unit::kNone,
       {"info", "warning", "error"}},
      {"Process", "drain_timeout_s", &Config::drain_timeout_s,
       "Seconds that running requests get after SIGTERM.", 0, 86400},
      {"Command line only", "help", &Config::help, "Print this text."},
      {"Command line only", "version", &Config::version, "Print the version."},
  };
  return *flags;
}

const Flag* Find(absl::string_view name) {
  for (const Flag& flag : Flags()) {
    if (name == flag.name) return &flag;
  }
  return nullptr;
}

absl::Status BadFlag(absl::string_view source, absl::string_view want, absl::string_view got) {
  return absl::InvalidArgumentError(absl::StrCat("bad flag: ", source, ": want ", want, ", got \"",
                                                 got, "\"; see coppiced --help"));
}

std::string Range(const Flag& flag) {
  return absl::StrCat("[", flag.min, ", ",
                      flag.max == INT64_MAX ? "unlimited" : absl::StrCat(flag.max), "]");
}

// "512", "512KiB", "64MiB", "2GiB".
bool ParseBytes(absl::string_view text, int64_t* out) {
  int shift = 0;
  if (absl::ConsumeSuffix(&text, "KiB")) shift = 10;
  if (absl::ConsumeSuffix(&text, "MiB")) shift = 20;
  if (absl::ConsumeSuffix(&text, "GiB")) shift = 30;
  int64_t number = 0;
  if (!absl::SimpleAtoi(text, &number) || number < 0 || number > (INT64_MAX >> shift)) return false;
  *out = number << shift;
  return true;
}

// Assigns the text of one flag; `source` says where it came from ("--port" or "COPPICE_PORT").
struct Setter {
  const Flag& flag;
  const std::string& source;
  const std::string& text;
  Config& config;

  absl::Status operator()(std::string Config::*field) const {
    if (!flag.choices.empty() && !std::count(flag.choices.begin(), flag.choices.end(), text)) {
      return BadFlag(source, absl::StrJoin(flag.choices, " or "), text);
    }
    config.*field = text;
    return absl::OkStatus();
  }
  absl::Status operator()(int64_t Config::*field) const {
    int64_t value = 0;
    const bool parsed =
        flag.unit == Unit::kBytes ? ParseBytes(text, &value) : absl::SimpleAtoi(text, &value);
    if (!parsed || value < flag.min || value > flag.max) {
      const char* kind = flag.unit == Unit::kBytes ? "bytes (or KiB, MiB, GiB)" : "an integer";
      return BadFlag(source, absl::StrCat(kind, " in ", Range(flag)), text);
    }
    config.*field = value;
    return absl::OkStatus();
  }
  absl::Status operator()(uint64_t Config::*field) const {
    if (!absl::SimpleAtoi(text, &(config.*field))) return BadFlag(source, "an integer >= 0", text);
    return absl::OkStatus();
  }
  absl::Status operator()(double Config::*field) const {
    double value = 0;
    if (!absl::SimpleAtod(text, &value) || !(value >= static_cast<double>(flag.min)) ||
        !(value <= static_cast<double>(flag.max))) {
      return BadFlag(source, absl::StrCat("a number in ", Range(flag)), text);
    }
    config.*field = value;
    return absl::OkStatus();
  }
  absl::Status operator()(bool Config::*field) const {
    if (!absl::SimpleAtob(text, &(config.*field))) return BadFlag(source, "true or false", text);
    return absl::OkStatus();
  }
};

absl::Status Set(const Flag& flag, const std::string& source, const std::string& text,
                 Config& config) {
  return std::visit(Setter{flag, source, text, config}, flag.field);
}

std::string EnvName(const Flag& flag) {
  return absl::StrCat("COPPICE_", absl::AsciiStrToUpper(flag.name));
}

absl::Status ReadEnvironment(const GetEnv& get_env, Config& config) {
  for (const Flag& flag : Flags()) {
    if (flag.group == kCommandLineOnly) continue;
    const std::string name = EnvName(flag);
    const std::optional<std::string> text = get_env(name);
    if (!text) continue;
    absl::Status status = Set(flag, name, *text, config);
    if (status.ok()) continue;
    // Kubernetes sets <SERVICE>_PORT in every pod beside a service of that name.
    if (text->rfind("tcp://", 0) != 0) return status;
    return BadFlag(
        name, "a port (this is a Kubernetes service link: set enableServiceLinks: false)", *text);
  }
  return absl::OkStatus();
}

absl::Status ReadArgs(const std::vector<std::string>& args, Config& config) {
  for (size_t i = 0; i < args.size(); ++i) {
    absl::string_view arg = args[i];
    if (!absl::ConsumePrefix(&arg, "--")) return BadFlag(args[i], "--name=value", args[i]);
    const size_t equals = arg.find('=');
    const absl::string_view name = arg.substr(0, equals);
    const Flag* flag = Find(name);
    const std::string source = absl::StrCat("--", name);
    if (flag == nullptr) return BadFlag(source, "a flag that exists", args[i]);
    std::string text;
    if (equals != absl::string_view::npos) {
      text = std::string(arg.substr(equals + 1));
    } else if (std::holds_alternative<bool Config::*>(flag->field)) {
      const bool given = i + 1 < args.size() && (args[i + 1] == "true" || args[i + 1] == "false");
      text = given ? args[++i] : "true";
    } else if (i + 1 < args.size()) {
      text = args[++i];
    } else {
      return BadFlag(source, "a value", "");
    }
    RETURN_IF_ERROR(Set(*flag, source, text, config));
  }
  return absl::OkStatus();
}

absl::Status CheckRouter(const Config& config) {
  if (config.replicas.empty() == config.replica_dns.empty()) {
    return BadFlag("--replicas", "exactly one of --replicas and --replica_dns with --role=router",
                   config.replicas.empty() ? "" : config.replicas + " and " + config.replica_dns);
  }
  if (config.model.empty() && config.model_geometry.empty()) return absl::OkStatus();
  return BadFlag("--model", "none with --role=router", config.model + config.model_geometry);
}

absl::Status CheckModel(const Config& config) {
  if (!config.replicas.empty() || !config.replica_dns.empty()) {
    return BadFlag("--replicas", "none without --role=router",
                   config.replicas + config.replica_dns);
  }
  if (config.model.empty() != config.model_geometry.empty()) return absl::OkStatus();
  return BadFlag("--model", "exactly one of --model and --model_geometry",
                 config.model.empty() ? "" : config.model + " and " + config.model_geometry);
}

absl::Status CheckTogether(const Config& config) {
  if (config.help || config.version) return absl::OkStatus();
  RETURN_IF_ERROR(config.role == "router" ? CheckRouter(config) : CheckModel(config));
  if ((config.kv_bytes > 0) + (config.kv_blocks > 0) + (config.kv_fraction > 0) > 1) {
    return BadFlag("--kv_blocks", "one of --kv_bytes, --kv_blocks and --kv_fraction",
                   absl::StrCat(config.kv_blocks));
  }
  const int64_t tokens = config.block_tokens;
  if (config.device == "cuda" && (tokens < 8 || (tokens & (tokens - 1)) != 0)) {
    return BadFlag("--block_tokens", "a power of two, at least 8, with --device=cuda",
                   absl::StrCat(tokens));
  }
  if (config.device == "cuda" && config.compute_dtype == "f16" && config.gradient_dtype == "bf16") {
    return BadFlag("--gradient_dtype", "f32 with --compute_dtype=f16", config.gradient_dtype);
  }
  if (config.matmul_cache_grows && config.matmul_cache.empty()) {
    return BadFlag("--matmul_cache", "a file with --matmul_cache_grows", "");
  }
  if (config.port != 0 && config.port == config.http_port) {
    return BadFlag("--http_port", "another port than --port", absl::StrCat(config.http_port));
  }
  return absl::OkStatus();
}

struct Printer {
  const Config& config;
  std::string operator()(std::string Config::*field) const { return config.*field; }
  std::string operator()(int64_t Config::*field) const { return absl::StrCat(config.*field); }
  std::string operator()(uint64_t Config::*field) const { return absl::StrCat(config.*field); }
  std::string operator()(double Config::*field) const { return absl::StrCat(config.*field); }
  std::string operator()(bool Config::*field) const { return config.*field ? "true" : "false"; }
};

// "256MiB", as ParseBytes reads it.
std::string BytesText(int64_t bytes) {
  static constexpr const char* kUnits[] = {"", "KiB", "MiB", "GiB"};
  int unit = 0;
  for (; unit < 3 && bytes > 0 && bytes % 1024 == 0; ++unit) bytes /= 1024;
  return absl::StrCat(bytes, kUnits[unit]);
}

// Words in lines of at most 100 columns, each behind `indent` spaces.
std::string Wrapped(absl::string_view text, size_t indent) {
  constexpr size_t kColumns = 100;
  std::string lines;
  size_t column = kColumns;
  for (const absl::string_view word : absl::StrSplit(text, ' ')) {
    if (column + 1 + word.size() > kColumns) {
      absl::StrAppend(&lines, lines.empty() ? "" : "\n", std::string(indent, ' '), word);
      column = indent + word.size();
    } else {
      absl::StrAppend(&lines, " ", word);
      column += 1 + word.size();
    }
  }
  return lines;
}

// "integer in [0, 65535], default 7700".
std::string Domain(const Flag& flag) {
  const Config defaults;
  const std::string value = flag.unit == Unit::kBytes
                                ? BytesText(defaults.*std::get<int64_t Config::*>(flag.field))
                                : std::visit(Printer{defaults}, flag.field);
  const std::string type =
      std::holds_alternative<bool Config::*>(flag.field)       ? "true or false"
      : std::holds_alternative<uint64_t Config::*>(flag.field) ? "integer >= 0"
      : std::holds_alternative<double Config::*>(flag.field)
          ? absl::StrCat("number in ", Range(flag))
      : !std::holds_alternative<std::string Config::*>(flag.field)
          ? absl::StrCat(flag.unit == Unit::kBytes ? "bytes, KiB, MiB or GiB, in " : "integer in ",
                         Range(flag))
      : flag.choices.empty() ? "text"
                             : absl::StrJoin(flag.choices, " or ");
  return absl::StrCat(type, ", default ", value.empty() ? "none" : value);
}

}  // namespace

absl::StatusOr<Config> ParseConfig(const std::vector<std::string>& args, const GetEnv& get_env) {
  Config config;
  RETURN_IF_ERROR(ReadEnvironment(get_env, config));
  RETURN_IF_ERROR(ReadArgs(args, config));
  RETURN_IF_ERROR(CheckTogether(config));
  return config;
}

std::string HelpText() {
  std::string text =
      "coppiced: serves and trains one language model from the same prompt state.\n"
      "\n"
      "Usage: coppiced --model=PATH [--flag=value ...]\n"
      "       coppiced --role=router --replicas=HOST:PORT,... [--flag=value ...]\n"
      "Flags can also be set by the environment variable COPPICE_<FLAG>; the command line "
      "wins.\n"
      "Exit codes: 0 drained, 1 system error, 2 bad flags, 3 model not loaded, 4 port "
      "taken,\n"
      "5 stopped while requests were open (second signal, or --drain_timeout_s over), 6 no device, "
      "or it\nfailed.\n";
  absl::string_view group;
  for (const Flag& flag : Flags()) {
    if (group != flag.group) absl::StrAppend(&text, "\n", flag.group, "\n");
    group = flag.group;
    absl::StrAppend(&text, "  --", flag.name, "  (", Domain(flag), ")\n", Wrapped(flag.help, 6),
                    "\n");
  }
  return text;
}

std::string ToString(const Config& config) {
  std::string line;
  for (const Flag& flag : Flags()) {
    if (flag.group == kCommandLineOnly) continue;
    const std::string value = std::visit(Printer{config}, flag.field);
    absl::StrAppend(&line, line.empty() ? "" : " ", flag.name, "=", value.empty() ? "\"\"" : value);
  }
  return line;
}

}  // namespace coppice
