#include "cache/namespace.h"

#include <functional>
#include <vector>

#include "gtest/gtest.h"

namespace coppice {
namespace {

const NamespaceFields kFields = {"model", PolicyVersion{3}, "adapter", 5, "f32/16", "salt"};

TEST(NamespaceTest, EqualFieldsGiveEqualNamespaces) {
  EXPECT_EQ(MakeNamespace(kFields), MakeNamespace(kFields));
}

TEST(NamespaceTest, EveryFieldMatters) {
  const std::vector<std::function<void(NamespaceFields&)>> changes = {
      [](NamespaceFields& f) { f.model += "x"; },
      [](NamespaceFields& f) { f.policy_version = PolicyVersion{4}; },
      [](NamespaceFields& f) { f.adapter.clear(); },
      [](NamespaceFields& f) { f.adapter_version = 6; },
      [](NamespaceFields& f) { f.kv_layout += "x"; },
      [](NamespaceFields& f) { f.tenant_salt += "x"; },
  };
  std::vector<Namespace> seen = {MakeNamespace(kFields)};
  for (const auto& change : changes) {
    NamespaceFields fields = kFields;
    change(fields);
    const Namespace changed = MakeNamespace(fields);
    for (const Namespace& other : seen) EXPECT_FALSE(changed == other);
    seen.push_back(changed);
  }
}

TEST(NamespaceTest, FieldsCannotRunIntoEachOther) {
  const NamespaceFields a{.model = "ab", .adapter = "c"}, b{.model = "a", .adapter = "bc"};
  EXPECT_FALSE(MakeNamespace(a) == MakeNamespace(b));
}

TEST(NamespaceTest, FamilyIgnoresTheVersionAndTenantAllButTheSalt) {
  NamespaceFields next = kFields;
  next.policy_version = PolicyVersion{4};
  EXPECT_EQ(MakeNamespace(next).family, MakeNamespace(kFields).family);
  next.adapter += "x";
  EXPECT_NE(MakeNamespace(next).family, MakeNamespace(kFields).family);
  EXPECT_EQ(MakeNamespace(next).tenant, MakeNamespace(kFields).tenant);
  next.tenant_salt += "x";
  EXPECT_NE(MakeNamespace(next).tenant, MakeNamespace(kFields).tenant);
}

TEST(NamespaceTest, ChainedHashDependsOnEveryBlockBefore) {
  const BlockHash root = MakeNamespace(kFields).digest;
  const std::vector<int32_t> a = {1, 2}, b = {3, 4}, c = {1, 5};
  const BlockHash ab = ChainBlockHash(ChainBlockHash(root, a), b);
  EXPECT_EQ(ab, ChainBlockHash(ChainBlockHash(root, a), b));
  EXPECT_NE(ab, ChainBlockHash(ChainBlockHash(root, c), b));
  EXPECT_NE(ab, ChainBlockHash(root, b));
  EXPECT_NE(ab, ChainBlockHash(ChainBlockHash(MakeNamespace({}).digest, a), b));
}

TEST(NamespaceTest, ShortHexIsTheFirstEightBytes) {
  BlockHash digest{};
  digest[0] = 0xab;
  digest[7] = 0x01;
  digest[8] = 0xff;
  EXPECT_EQ(ShortHex(digest), "ab00000000000001");
}

// SHA-256 of the documented encoding, computed by Python's hashlib (see the comment's command): the
// chain is a format that other tiers and processes rely on, so it must not drift.
//   python3 -c "import hashlib,struct;
//   print(hashlib.sha256(bytes(32)+struct.pack('<Qii',2,1,-1)).hexdigest())"
TEST(NamespaceTest, ChainedHashIsStable) {
  const std::vector<int32_t> block = {1, -1};
  EXPECT_EQ(ShortHex(ChainBlockHash(BlockHash{}, block)), "c02b7da91d5b1271");
}

}  // namespace
}  // namespace coppice
