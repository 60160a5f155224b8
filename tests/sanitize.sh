#!/usr/bin/env bash
# Runs the op tests under compute-sanitizer, on a machine with a GPU: the cases of each test cut into parts that run side
# by side. The last line is `N runs clean, M not`, the exit status 0 only if M is 0.
#
# Usage: tests/sanitize.sh FOLDER [TOOL]...    FOLDER holds the tests; TOOL: racecheck, memcheck, initcheck (default: all)
#   JOBS=16    runs at a time
#   LIMIT=100  seconds for one run
#   LOGS=DIR   takes the output of each run (default: a new folder under /tmp)
#
# Two minutes on 16 cores. memcheck leaves API errors to the tests, one of which asks for more memory than there is.
# racecheck passes by matmul_test, which runs cuBLASLt alone; hazards that it sees inside of cuBLASLt (in split-k kernels)
# are printed and do not count.
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
BIN=$(cd "$1" && pwd) || exit 2
shift
LOGS=${LOGS:-$(mktemp -d)} LIMIT=${LIMIT:-100}
mkdir -p "$LOGS"
export BIN LOGS LIMIT REQUIRE_CUDA=1

# Tool, test, type, parts that run, parts that its cases are cut into, processes that share its tests. Draws of sampling_test
# repeat, and racecheck needs seconds for each: one part of many has every kind once. tree_attention_test has a part of its
# small cases here, adamw_test fewer steps.
RUNS='
racecheck sampling bf16 1 20000 12
memcheck mlp_block bf16 2 2 1
memcheck mlp_block f16 2 2 1
memcheck row_ops bf16 3 3 1
memcheck row_ops f16 3 3 1
memcheck norm_matmul bf16 3 3 1
memcheck norm_matmul f16 3 3 1
memcheck logprob_head bf16 1 1 1
memcheck logprob_head f16 1 1 1
memcheck matmul bf16 5 5 1
memcheck tree_attention bf16 3 40 1
memcheck tree_attention f16 1 40 1
memcheck adamw bf16 1 2 1
memcheck adamw f16 1 2 1
memcheck sampling bf16 1 100 1
memcheck gated_matmul bf16 1 1 1
memcheck gated_matmul f16 1 1 1
initcheck norm_matmul bf16 3 3 1
initcheck mlp_block bf16 2 2 1
initcheck row_ops bf16 3 3 1
initcheck logprob_head bf16 1 1 1
initcheck tree_attention bf16 3 40 1
initcheck adamw f16 1 2 1
initcheck sampling bf16 1 100 1
initcheck gated_matmul bf16 1 1 1
racecheck tree_attention bf16 3 40 1
racecheck mlp_block bf16 8 8 1
racecheck mlp_block f16 1 8 1
racecheck tree_attention f16 1 40 1
racecheck logprob_head bf16 4 4 1
racecheck norm_matmul bf16 16 16 1
racecheck row_ops bf16 3 3 1
racecheck adamw f16 1 2 1
racecheck gated_matmul bf16 3 3 1
'

# Whether racecheck found something besides accesses of cuBLASLt's kernels to their own memory.
has_hazard() {
  grep '^=========.* access at ' "$1" | grep -qvE ' access at (nvjet|cublas|cutlass)' && return 0
  ! grep -q ' access at ' "$1" && grep -qE 'RACECHECK SUMMARY: [1-9]' "$1"
}
export -f has_hazard

# tool test type part parts shard shards: one line of verdict, seconds, what ran, the tool's summary.
run() {
  local tool=$1 name="$1 $2 $3 part $4 of $5" log begin=$SECONDS verdict=clean status filter='*/1:*Masters*/0-*Masters*/1'
  [ "$7" -eq 1 ] || name+=" shard $6 of $7"
  [ "$3" = f16 ] && filter='*/2:*Masters*/1'
  local command=("$BIN/$2_test" "--gtest_filter=$filter") options=(--error-exitcode 3)
  [ "$2" = tree_attention ] && command=("$BIN/$2_test" tiny "$3" "part=$4/$5")
  [ "$tool" = memcheck ] && options+=(--report-api-errors no)
  [ "$tool" = racecheck ] && options=(--print-limit 0)
  log=$LOGS/${name// /_}.txt
  COPPICE_TEST_PART=$4/$5 GTEST_SHARD_INDEX=$6 GTEST_TOTAL_SHARDS=$7 timeout "$LIMIT" \
    compute-sanitizer --tool "$tool" ${options[@]+"${options[@]}"} "${command[@]}" > "$log" 2>&1
  status=$?
  [ $status -eq 0 ] && grep -q SUMMARY "$log" || verdict="NOT($status)"
  [ "$tool" = racecheck ] && has_hazard "$log" && verdict="NOT(hazards)"
  printf '%s %4d s  %s: %s\n' "$verdict" $((SECONDS - begin)) "$name" "$(grep -h SUMMARY "$log" | tail -n 1 | cut -c 11-)"
}
export -f run

for tool in "$@"; do
  [[ $tool =~ ^(racecheck|memcheck|initcheck)$ ]] || { echo "sanitize.sh: unknown tool $tool" >&2; exit 2; }
done
while read -r tool test type count parts shards; do
  [[ -n $tool && ($# -eq 0 || " $* " == *" $tool "*) ]] || continue
  for ((part = 0; part < count; ++part)); do
    for ((shard = 0; shard < shards; ++shard)); do echo "$tool $test $type $part $parts $shard $shards"; done
  done
done <<< "$RUNS" | xargs -P "${JOBS:-16}" -L 1 bash -c 'run "$@"' run | tee "$LOGS/runs.txt"
not_clean=$(grep -c '^NOT' "$LOGS/runs.txt")
echo "$(grep -c '^clean' "$LOGS/runs.txt") runs clean, $not_clean not"
[ "$not_clean" -eq 0 ]
