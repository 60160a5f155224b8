// MatMulChoices: by which algorithm of cuBLASLt a kind of product runs, as the clock has decided
// once (matmul_contest.h), kept in a text file. Processes with the same file make the same choices,
// so equal inputs give them equal bits. The file belongs to one version of the library and one kind
// of device.
//
// A choice counts once it is in the file: what another process has put there first stands, and what
// cannot be written is not used. A file that is not to grow, or has no write permission, counts as
// it is, and nothing is timed.
//
// Owner: MatMulCache; one thread. Processes are kept apart by a lock on the file's directory, and
// the file is replaced as a whole. Cost: Find a look-up; Keep reads and writes the file.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/ops/ops.h"

namespace coppice::cuda {

struct MatMulChoice {
  // The library's description of an algorithm, which it may be given back as it is.
  std::array<uint64_t, 8> words = {};
  std::string algorithm;  // the same for readers; without spaces, as `kind` of a product
  // A run of the library's own first choice and of this one; 0: not timed, the first stands.
  double first_us = 0, chosen_us = 0;

  bool operator==(const MatMulChoice&) const = default;
};

class MatMulChoices {
 public:
  // Reads the file, or makes it if it grows: FAILED_PRECONDITION if it is not there then. One of
  // another library or device, or broken, is left as it is and not used: a warning. `library` names
  // library and device, in one line.
  static absl::StatusOr<std::unique_ptr<MatMulChoices>> Open(const ops::MatMulCacheFile& file,
                                                             std::string library);

  // For a kind of product, null if there is none. A kind is words with one space between them.
  const MatMulChoice* Find(absl::string_view kind) const;
  // Whether Keep may succeed: else there is nothing to be timed.
  bool takes_more() const { return takes_more_; }
  // Writes the choice unless the file has one by now. Returns what the file has; null if it cannot
  // be written, with one warning.
  const MatMulChoice* Keep(absl::string_view kind, const MatMulChoice& choice);

  int64_t size() const { return static_cast<int64_t>(choices_.size()); }

 private:
  using Map = absl::flat_hash_map<std::string, MatMulChoice>;

  MatMulChoices(std::string path, std::string library)
      : path_(std::move(path)), library_(std::move(library)) {}
  // What the file says: NOT_FOUND, INVALID_ARGUMENT if broken, FAILED_PRECONDITION if of another
  // library or device.
  absl::StatusOr<Map> Read() const;
  absl::Status Write(const Map& choices) const;
  absl::Status Add(absl::string_view kind, const MatMulChoice& choice);

  const std::string path_, library_;
  Map choices_;
  bool takes_more_ = false;
};

}  // namespace coppice::cuda
