// SHA-256 of a stream of bytes (FIPS 180-4, OpenSSL's implementation).
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

struct evp_md_ctx_st;

namespace coppice {

class Sha256 {
 public:
  Sha256();
  void Update(const void* data, int64_t size_bytes);
  // 64 lower-case hex digits; the object is spent.
  std::string Finish();

 private:
  struct Free {
    void operator()(evp_md_ctx_st* context) const;
  };
  std::unique_ptr<evp_md_ctx_st, Free> context_;
};

// Digest of a whole file. NOT_FOUND or the error of the file system.
absl::StatusOr<std::string> Sha256OfFile(const std::string& path);

}  // namespace coppice
