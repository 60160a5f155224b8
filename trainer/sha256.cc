#include "trainer/sha256.h"

#include <errno.h>
#include <openssl/evp.h>
#include <stdio.h>

#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace coppice {

void Sha256::Free::operator()(evp_md_ctx_st* context) const { EVP_MD_CTX_free(context); }

Sha256::Sha256() : context_(EVP_MD_CTX_new()) {
  CHECK_EQ(EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr), 1);
}

void Sha256::Update(const void* data, int64_t size_bytes) {
  CHECK_EQ(EVP_DigestUpdate(context_.get(), data, static_cast<size_t>(size_bytes)), 1);
}

std::string Sha256::Finish() {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  CHECK_EQ(EVP_DigestFinal_ex(context_.get(), digest, &size), 1);
  return absl::BytesToHexString(absl::string_view(reinterpret_cast<char*>(digest), size));
}

absl::StatusOr<std::string> Sha256OfFile(const std::string& path) {
  const std::unique_ptr<FILE, int (*)(FILE*)> file(fopen(path.c_str(), "rb"), fclose);
  if (file == nullptr) return absl::ErrnoToStatus(errno, absl::StrCat("open ", path));
  std::vector<char> chunk(1 << 20);
  Sha256 hash;
  while (const size_t n = fread(chunk.data(), 1, chunk.size(), file.get())) {
    hash.Update(chunk.data(), static_cast<int64_t>(n));
  }
  if (ferror(file.get()) != 0) return absl::DataLossError(absl::StrCat("read ", path, " failed"));
  return hash.Finish();
}

}  // namespace coppice
