// TextStream: the text of one sample as it grows, with stop strings. Text is held back until it
// cannot be part of a stop string; when one appears, it and everything behind it is cut. Stop
// strings are found across token boundaries. Owner: its Sample, on the engine thread. Cost: O(held
// text * stop strings) a token.
#pragma once

#include <string>
#include <vector>

#include "kernels/model/tokenizer.h"

namespace coppice {

class TextStream {
 public:
  // Borrows the tokenizer. REQUIRES: no stop string is empty.
  TextStream(const Tokenizer* tokenizer, std::vector<std::string> stop_strings);

  // Appends a token; returns the text that became certain. REQUIRES: !stopped().
  std::string Push(int32_t token);
  // The rest, once no token follows. Checks it for stop strings too.
  std::string Finish();
  // A stop string was found.
  bool stopped() const { return stopped_; }

 private:
  std::string Release(const std::string& piece, bool last);

  StreamDecoder decoder_;
  std::vector<std::string> stop_strings_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace coppice
