#!/usr/bin/env bash
# clang-tidy over all C++ sources of ours with the checks of .clang-tidy as errors; two files at a time.
set -euo pipefail
cd "$(dirname "$0")/../.."
cmake -S . -B build/tidy -G Ninja -DCMAKE_CXX_COMPILER=clang++-14 -DCOPPICE_CUDA=OFF -DCOPPICE_BUILD_TESTS=OFF >/dev/null
cmake --build build/tidy --target proto >/dev/null
git ls-files 'kernels/**/*.cc' 'cache/*.cc' 'trainer/*.cc' 'server/**/*.cc' 'server/*.cc' | grep -v '^kernels/cuda/' |
  xargs -P "$(nproc)" -n 1 clang-tidy-14 -p build/tidy --quiet
