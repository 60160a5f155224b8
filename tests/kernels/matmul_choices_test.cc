#include "kernels/cuda/matmul_choices.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

namespace coppice::cuda {
namespace {

using testing::HasSubstr;

constexpr char kLibrary[] = "cublaslt 130100, NVIDIA H200, sm_90";

MatMulChoice Choice(uint64_t word, double chosen_us = 90) {
  return {.words = {word, 0, 0xffffffffffffffff, 1},
          .algorithm = "id66.tile20.split1",
          .first_us = 100.25,
          .chosen_us = chosen_us};
}

class MatMulChoicesTest : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = testing::TempDir() + "/matmul_choices_" + std::to_string(getpid());
    std::filesystem::remove_all(directory_);
    ASSERT_TRUE(std::filesystem::create_directory(directory_));
    path_ = directory_ + "/choices.txt";
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  std::unique_ptr<MatMulChoices> Open(const std::string& library = kLibrary) {
    auto choices = MatMulChoices::Open({.path = path_, .grows = true}, library);
    EXPECT_TRUE(choices.ok()) << choices.status();
    return choices.ok() ? *std::move(choices) : nullptr;
  }
  std::string Text() const {
    std::stringstream text;
    text << std::ifstream(path_).rdbuf();
    return text.str();
  }
  void SetText(const std::string& text) const { std::ofstream(path_) << text; }
  // What opens then holds nothing, takes nothing and leaves the file alone.
  void ExpectIgnored(const std::string& library = kLibrary) {
    const std::string before = Text();
    testing::internal::CaptureStderr();
    const auto choices = Open(library);
    const std::string log = testing::internal::GetCapturedStderr();
    EXPECT_THAT(log, HasSubstr("matmul_cache_ignored file=" + path_)) << before;
    ASSERT_NE(choices, nullptr);
    EXPECT_EQ(choices->size(), 0);
    EXPECT_FALSE(choices->takes_more());
    EXPECT_EQ(choices->Keep("m=9", Choice(9)), nullptr);
    EXPECT_EQ(Text(), before);
  }

  std::string directory_, path_;
};

TEST_F(MatMulChoicesTest, AreTheSameForTheNextProcess) {
  auto choices = Open();
  ASSERT_TRUE(choices->takes_more());
  EXPECT_EQ(choices->Find("m=1 n=2"), nullptr);
  ASSERT_NE(choices->Keep("m=1 n=2", Choice(7)), nullptr);
  ASSERT_NE(choices->Keep("m=3 n=2", Choice(8, 0)), nullptr);
  choices = Open();
  ASSERT_EQ(choices->size(), 2);
  EXPECT_EQ(*choices->Find("m=1 n=2"), Choice(7));
  EXPECT_EQ(*choices->Find("m=3 n=2"), Choice(8, 0));
  EXPECT_EQ(choices->Find("m=3 n=3"), nullptr);
}

TEST_F(MatMulChoicesTest, CanBeRead) {
  auto choices = Open();
  EXPECT_THAT(Text(), testing::StartsWith("coppice matmul choices, format 1\n" +
                                          std::string(kLibrary) + "\nend "));
  choices->Keep("m=1 n=2", Choice(7));
  EXPECT_THAT(Text(), HasSubstr("m=1 n=2 : first_us=100.25 chosen_us=90.00 "
                                "algorithm=id66.tile20.split1 words=7,0,ffffffffffffffff,1,0,0,0,0"
                                "\nend "));
}

TEST_F(MatMulChoicesTest, WhatAnotherProcessKeptFirstStands) {
  const auto one = Open(), other = Open();
  EXPECT_EQ(*one->Keep("m=1", Choice(1)), Choice(1));
  EXPECT_EQ(*other->Keep("m=1", Choice(2)), Choice(1));
  EXPECT_EQ(*other->Keep("m=2", Choice(3)), Choice(3));
  EXPECT_EQ(*one->Find("m=1"), Choice(1));
  EXPECT_EQ(Open()->size(), 2);
}

TEST_F(MatMulChoicesTest, ProcessesThatWriteAtOnceLoseNothing) {
  constexpr int kProcesses = 4, kEach = 20;
  for (int process = 0; process < kProcesses; ++process) {
    if (fork() != 0) continue;
    auto choices = MatMulChoices::Open({.path = path_, .grows = true}, kLibrary);
    bool kept = choices.ok();
    for (int i = 0; i < kEach; ++i) {
      const std::string kind = "process=" + std::to_string(process) + " i=" + std::to_string(i);
      kept = kept && (*choices)->Keep(kind, Choice(i)) != nullptr &&
             (*choices)->Keep("i=" + std::to_string(i), Choice(process)) != nullptr;
    }
    _exit(kept ? 0 : 1);
  }
  for (int process = 0; process < kProcesses; ++process) {
    int status = -1;
    wait(&status);
    EXPECT_EQ(status, 0);
  }
  EXPECT_EQ(Open()->size(), kProcesses * kEach + kEach);
}

TEST_F(MatMulChoicesTest, OfAnotherLibraryOrDeviceAreIgnored) {
  Open()->Keep("m=1", Choice(1));
  ExpectIgnored("cublaslt 130200, NVIDIA H200, sm_90");
  ExpectIgnored("cublaslt 130100, NVIDIA A100, sm_80");
  EXPECT_EQ(Open()->size(), 1);
}

TEST_F(MatMulChoicesTest, BrokenOnesAreIgnored) {
  Open()->Keep("m=1", Choice(1));
  const std::string text = Text();
  for (size_t size = 0; size < text.size(); size += 7) {
    SetText(text.substr(0, size));
    ExpectIgnored();
  }
  for (size_t i = 0; i < text.size(); i += 5) {
    std::string changed = text;
    changed[i] ^= 1;
    SetText(changed);
    ExpectIgnored();
  }
  SetText(text);
  EXPECT_EQ(Open()->size(), 1);
}

TEST_F(MatMulChoicesTest, AFileThatIsNotToGrowCountsAsItIs) {
  const ops::MatMulCacheFile file = {.path = path_};
  const auto refused = MatMulChoices::Open(file, kLibrary);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_FALSE(std::filesystem::exists(path_));
  Open()->Keep("m=1", Choice(1));
  const auto choices = *MatMulChoices::Open(file, kLibrary);
  EXPECT_EQ(*choices->Find("m=1"), Choice(1));
  EXPECT_FALSE(choices->takes_more());
  EXPECT_EQ(choices->Keep("m=2", Choice(2)), nullptr);
  EXPECT_EQ(Open()->size(), 1);
}

TEST_F(MatMulChoicesTest, AFileThatMayNotBeWrittenCountsAsItIs) {
  Open()->Keep("m=1", Choice(1));
  ASSERT_EQ(chmod(path_.c_str(), 0444), 0);
  const auto choices = Open();
  EXPECT_FALSE(choices->takes_more());
  EXPECT_EQ(*choices->Find("m=1"), Choice(1));
  EXPECT_EQ(choices->Keep("m=2", Choice(2)), nullptr);
  EXPECT_EQ(choices->Find("m=2"), nullptr);
}

TEST_F(MatMulChoicesTest, AFileThatCannotBeMadeIsRefused) {
  path_ = directory_ + "/absent/choices.txt";
  const auto choices = MatMulChoices::Open({.path = path_, .grows = true}, kLibrary);
  EXPECT_EQ(choices.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(choices.status().message()), HasSubstr("change --matmul_cache"));
}

TEST_F(MatMulChoicesTest, ADirectoryInItsPlaceIsIgnored) {
  ASSERT_TRUE(std::filesystem::create_directory(path_));
  const auto choices = Open();
  ASSERT_NE(choices, nullptr);
  EXPECT_FALSE(choices->takes_more());
}

TEST_F(MatMulChoicesTest, WhatCannotBeWrittenIsNotUsed) {
  const auto choices = Open();
  choices->Keep("m=1", Choice(1));
  std::filesystem::remove_all(directory_);
  testing::internal::CaptureStderr();
  EXPECT_EQ(choices->Keep("m=2", Choice(2)), nullptr);
  EXPECT_THAT(testing::internal::GetCapturedStderr(), HasSubstr("matmul_cache_not_written"));
  EXPECT_EQ(choices->Find("m=2"), nullptr);
  EXPECT_EQ(*choices->Find("m=1"), Choice(1));
  EXPECT_FALSE(choices->takes_more());
}

TEST_F(MatMulChoicesTest, AFileRemovedMeanwhileIsWrittenAnew) {
  const auto choices = Open();
  choices->Keep("m=1", Choice(1));
  std::filesystem::remove(path_);
  EXPECT_NE(choices->Keep("m=2", Choice(2)), nullptr);
  EXPECT_EQ(Open()->size(), 2);
}

}  // namespace
}  // namespace coppice::cuda
