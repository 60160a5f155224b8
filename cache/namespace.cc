#include "cache/namespace.h"

#include <openssl/evp.h>

#include <cstring>

#include "absl/strings/escaping.h"
#include "absl/strings/string_view.h"
#include "kernels/base/check.h"

namespace coppice {
namespace {

// SHA-256 over fields that cannot run into each other: strings carry their length, integers are 8
// bytes, little endian.
class FieldHasher {
 public:
  FieldHasher() : context_(EVP_MD_CTX_new()) {
    CHECK(context_ != nullptr);
    CHECK_EQ(EVP_DigestInit_ex(context_, EVP_sha256(), nullptr), 1);
  }
  FieldHasher(const FieldHasher&) = delete;
  FieldHasher& operator=(const FieldHasher&) = delete;
  ~FieldHasher() { EVP_MD_CTX_free(context_); }

  void AddBytes(const void* data, size_t size) {
    CHECK_EQ(EVP_DigestUpdate(context_, data, size), 1);
  }
  void AddInteger(uint64_t value) {
    uint8_t bytes[8];
    for (int i = 0; i < 8; ++i) bytes[i] = static_cast<uint8_t>(value >> (8 * i));
    AddBytes(bytes, sizeof(bytes));
  }
  void AddString(absl::string_view text) {
    AddInteger(text.size());
    AddBytes(text.data(), text.size());
  }
  BlockHash Finish() {
    BlockHash digest;
    unsigned int size = 0;
    CHECK_EQ(EVP_DigestFinal_ex(context_, digest.data(), &size), 1);
    CHECK_EQ(size, digest.size());
    return digest;
  }

 private:
  EVP_MD_CTX* context_;
};

void AddAllButVersion(const NamespaceFields& fields, FieldHasher& hasher) {
  hasher.AddString(fields.model);
  hasher.AddString(fields.adapter);
  hasher.AddInteger(fields.adapter_version);
  hasher.AddString(fields.kv_layout);
  hasher.AddString(fields.tenant_salt);
}

uint64_t FirstBytes(const BlockHash& digest) {
  uint64_t value;
  std::memcpy(&value, digest.data(), sizeof(value));
  return value;
}

}  // namespace

Namespace MakeNamespace(const NamespaceFields& fields) {
  FieldHasher whole, family, tenant;
  whole.AddString("coppice.namespace");
  AddAllButVersion(fields, whole);
  whole.AddInteger(Raw(fields.policy_version));
  family.AddString("coppice.family");
  AddAllButVersion(fields, family);
  tenant.AddString("coppice.tenant");
  tenant.AddString(fields.tenant_salt);
  return {whole.Finish(), FirstBytes(family.Finish()), FirstBytes(tenant.Finish())};
}

BlockHash ChainBlockHash(const BlockHash& parent, absl::Span<const int32_t> block) {
  FieldHasher hasher;
  hasher.AddBytes(parent.data(), parent.size());
  hasher.AddInteger(block.size());
  hasher.AddBytes(block.data(), block.size() * sizeof(int32_t));
  return hasher.Finish();
}

std::string ShortHex(const BlockHash& digest) {
  return absl::BytesToHexString({reinterpret_cast<const char*>(digest.data()), 8});
}

}  // namespace coppice
