#!/usr/bin/env bash
# clang-tidy with the checks of .clang-tidy as errors, a file a core at a time: 4 to 5 s each.
# Usage: tests/lint/run_clang_tidy.sh [FILE.cc...]     default: all C++ sources of ours
set -euo pipefail
cd "$(dirname "$0")/../.."
cmake -S . -B build/tidy -G Ninja -DCMAKE_CXX_COMPILER=clang++-14 -DCOPPICE_CUDA=OFF -DCOPPICE_BUILD_TESTS=OFF >/dev/null
cmake --build build/tidy --target proto >/dev/null
if [ $# -eq 0 ]; then
  mapfile -t sources < <(git ls-files 'kernels/**/*.cc' 'cache/*.cc' 'trainer/*.cc' 'server/**/*.cc' 'server/*.cc' |
    grep -v '^kernels/cuda/')
  set -- "${sources[@]}"
fi
printf '%s\0' "$@" | xargs -0 -P "$(nproc)" -n 1 clang-tidy-14 -p build/tidy --quiet 2> >(grep -v " warnings generated" >&2)
