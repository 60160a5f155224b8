#!/usr/bin/env bash
# Builds and runs every test; the last line is `N passed, N failed`, the exit status 0 only if none failed.
#
# Usage: tests/run.sh [--lane LANE]...     default: release (with lint rules, and cuda-compile where nvcc is present)
#   release       optimised build of everything, all tests: unit, property, parity, end to end, lint rules
#   debug         clang, assertions, -Wthread-safety; all C++ tests but the slow ones
#   asan          address and undefined-behaviour sanitizers; all C++ tests but the slow ones
#   tsan          thread sanitizer; cache, server and trainer tests
#   cuda-compile  compiles the CUDA targets, the portable kernels for sm_80 (needs nvcc)
#   lint          house rules, clang-format and clang-tidy
#   all           every lane
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,12s/^# \{0,1\}//p' "$0"; }

lanes=()
while [ $# -gt 0 ]; do
  case "$1" in
    --lane) [ $# -ge 2 ] || { usage >&2; exit 2; }; lanes+=("$2"); shift 2 ;;
    --lane=*) lanes+=("${1#--lane=}"); shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "run.sh: unknown argument $1" >&2; usage >&2; exit 2 ;;
  esac
done
if [ ${#lanes[@]} -eq 0 ]; then
  lanes=(release)
  command -v nvcc >/dev/null && lanes+=(cuda-compile)
fi
for lane in "${lanes[@]}"; do
  case "$lane" in
    release | debug | asan | tsan | cuda-compile | lint) ;;
    all) lanes=(release debug asan tsan lint); command -v nvcc >/dev/null && lanes+=(cuda-compile); break ;;
    *) echo "run.sh: unknown lane $lane" >&2; usage >&2; exit 2 ;;
  esac
done

deploy/install_deps.sh --with-prometheus
deploy/fetch_model.sh
JOBS=$(nproc)
readonly JOBS
export CCACHE_BASEDIR=$PWD  # equal objects in every lane and clone
readonly LOGS=build/test-logs
mkdir -p "$LOGS"
rm -f "$LOGS"/*.log

# configure_and_build DIR TARGET CMAKE_ARGS...
configure_and_build() {
  local dir=$1 target=$2
  shift 2
  cmake -S . -B "$dir" -G Ninja "$@" >"$LOGS/configure.out" 2>&1 || { cat "$LOGS/configure.out"; return 1; }
  cmake --build "$dir" -j "$JOBS" --target "$target" >"$LOGS/build.out" 2>&1 || {
    grep -E 'error|FAILED|undefined' "$LOGS/build.out" | head -40
    return 1
  }
}

# run_ctest LANE DIR CTEST_ARGS...: keeps the whole log, shows one line a test.
run_ctest() {
  local lane=$1 dir=$2
  shift 2
  (cd "$dir" && ctest -V --output-on-failure "$@") >"$LOGS/$lane.log" 2>&1 || true
  grep -E '^ *[0-9]+/[0-9]+ Test ' "$LOGS/$lane.log" || step "$lane" "lane_finds_its_tests" false
}

# step LANE NAME COMMAND...: a check that is not in ctest, counted as one test.
step() {
  local lane=$1 name=$2 status=Passed
  shift 2
  "$@" || status='***Failed'
  echo "1/1 Test #0: $name ... $status" | tee -a "$LOGS/$lane.log"
}

run_lane() {
  local lane=$1
  echo "== lane $lane"
  case "$lane" in
    release)
      step "$lane-build" build configure_and_build build/release all -DCMAKE_BUILD_TYPE=Release
      step "$lane-venv" python_client tests/make_venv.sh build/venv
      run_ctest "$lane" build/release -j1
      ;;
    debug)
      step "$lane-build" build configure_and_build build/debug all -DCMAKE_BUILD_TYPE=Debug -DCOPPICE_CUDA=OFF \
        -DCMAKE_CXX_COMPILER=clang++-14
      run_ctest "$lane" build/debug -LE 'e2e|lint|slow' -j1
      ;;
    asan)
      step "$lane-build" build configure_and_build build/asan all -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCOPPICE_CUDA=OFF \
        -DCOPPICE_SANITIZE=address
      ASAN_OPTIONS=detect_leaks=1 run_ctest "$lane" build/asan -LE 'e2e|lint|slow' -j1
      ;;
    tsan)
      step "$lane-build" build configure_and_build build/tsan all -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCOPPICE_CUDA=OFF \
        -DCOPPICE_SANITIZE=thread
      # libgomp's barriers are invisible to the sanitizer, so kernels run on one thread here.
      OMP_NUM_THREADS=1 run_ctest "$lane" build/tsan -L '^(cache|trainer|server(/.*)?)$' -LE slow -j1
      ;;
    cuda-compile)
      step "$lane" cuda_compile configure_and_build build/cuda cuda_all -DCMAKE_BUILD_TYPE=Release -DCOPPICE_CUDA=ON
      step "$lane-80" cuda_compile_80 configure_and_build build/cuda-80 portable_kernels -DCMAKE_BUILD_TYPE=Release -DCOPPICE_CUDA=ON \
        -DCMAKE_CUDA_ARCHITECTURES=80 -DCOPPICE_BUILD_TESTS=OFF
      ;;
    lint)
      step "$lane-rules" house_rules tests/lint/check_rules.py
      step "$lane-tidy" clang_tidy tests/lint/run_clang_tidy.sh
      ;;
  esac
}

for lane in "${lanes[@]}"; do run_lane "$lane"; done
python3 tests/count_results.py "$LOGS"/*.log
