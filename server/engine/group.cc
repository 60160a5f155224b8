#include "server/engine/group.h"

#include <algorithm>

namespace coppice {

int64_t Group::unfinished() const {
  return std::count_if(samples.begin(), samples.end(),
                       [](const Sample& s) { return s.state != Sample::State::kFinished; });
}

std::vector<int32_t> Group::Path(int32_t sample) const {
  std::vector<int32_t> path;
  path.reserve(PathLength(sample));
  path.insert(path.end(), request.prompt.begin(), request.prompt.end());
  path.insert(path.end(), samples[sample].tokens.begin(), samples[sample].tokens.end());
  return path;
}

int64_t Group::PathLength(int32_t sample) const {
  return static_cast<int64_t>(request.prompt.size() + samples[sample].tokens.size());
}

bool Group::HasTokenInFlight(int32_t sample) const {
  return samples[sample].state == Sample::State::kDecoding &&
         samples[sample].kv_tokens == PathLength(sample);
}

std::vector<BlockId> Stem::Blocks() const {
  std::vector<BlockId> blocks = lease.blocks();
  blocks.insert(blocks.end(), own.ids().begin(), own.ids().end());
  return blocks;
}

std::vector<BlockId> SampleBlocks(const Sample& sample, int64_t block_tokens) {
  std::vector<BlockId> blocks = sample.stem->Blocks();
  blocks.resize(sample.stem->num_tokens() / block_tokens);
  blocks.insert(blocks.end(), sample.own.ids().begin(), sample.own.ids().end());
  return blocks;
}

}  // namespace coppice
