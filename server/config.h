// Config: every flag of coppiced, once. Defaults are here; names, ranges and help texts are the
// table in config.cc.
//
// Sources, strongest first: `--name=value` or `--name value` (true also `--name`), the
// environment variable COPPICE_<NAME>, the default. A bad flag is INVALID_ARGUMENT naming flag,
// want and got.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/dtype.h"

namespace coppice {

struct Config {
  std::string role = "daemon";
  // Model
  std::string model;
  std::string model_geometry;
  // Device
  std::string device = "cpu";
  int64_t threads = 0;
  bool deterministic = false;
  std::string compute_dtype = "auto";
  std::string matmul_cache;
  bool matmul_cache_grows = false;
  // Network
  std::string host = "127.0.0.1";
  int64_t port = 7700;
  int64_t http_port = 7701;
  std::string port_file;
  int64_t max_message_bytes = int64_t{256} << 20;
  int64_t stream_events = 256;
  bool trust_tenant_header = false;
  // Memory
  int64_t kv_bytes = 0;
  int64_t kv_blocks = 0;
  double kv_fraction = 0;
  int64_t block_tokens = 16;
  // Scheduling
  int64_t max_context = 0;
  int64_t max_batch_rows = 512;
  int64_t max_running_samples = 256;
  std::string overlap = "auto";
  int64_t max_queued_requests = 1024;
  int64_t max_group_size = 256;
  int64_t max_reader_stall_s = 60;
  // Training
  int64_t max_train_rows = 16384;
  int64_t activation_bytes = 0;
  std::string gradient_dtype = "f32";
  int64_t max_rollouts = 4096;
  int64_t prompt_state_bytes = 0;
  int64_t max_step_records = 1024;
  std::string checkpoint_dir;
  // Router
  std::string replicas;
  std::string replica_dns;
  int64_t replica_dns_interval_s = 5;
  std::string leader;
  int64_t health_interval_ms = 1000;
  int64_t health_timeout_ms = 1000;
  int64_t eject_after = 3;
  int64_t first_byte_timeout_s = 300;
  // Process
  uint64_t seed = 0;
  std::string log_level = "info";
  int64_t drain_timeout_s = 30;
  bool help = false;
  bool version = false;

  DType GradientDType() const { return gradient_dtype == "bf16" ? DType::kBF16 : DType::kF32; }
  // What `overlap` means for this device.
  bool OverlapsSteps() const { return overlap == "auto" ? device == "cuda" : overlap == "true"; }
};

// The value of an environment variable, if set.
using GetEnv = std::function<std::optional<std::string>(const std::string& name)>;

// `args` without the program's name.
absl::StatusOr<Config> ParseConfig(const std::vector<std::string>& args, const GetEnv& get_env);

// What --help prints: every flag with type, default, range and meaning, by group.
std::string HelpText();

// One line "name=value ..." of all flags, as printed at start.
std::string ToString(const Config& config);

}  // namespace coppice
