#!/usr/bin/env bash
# Runs the op tests under compute-sanitizer, on a machine with GPUs: the cases of each test cut into parts that run side
# by side. The last line is `N runs clean, M not`, the exit status 0 only if M is 0.
#
# Usage: tests/sanitize.sh FOLDER [TOOL]...    FOLDER holds the tests; TOOL: racecheck, memcheck, initcheck, synccheck,
#                                              leaks (default: all)
#   JOBS=N     runs at a time (default: one a core)
#   LIMIT=120  seconds for one run
#   LOGS=DIR   takes the output of each run (default: a new folder under /tmp)
#   CUDA_VISIBLE_DEVICES=A,B   the GPUs, which take runs by turns (default: all)
#
# Minutes on 16 cores and one GPU, half of that on 32 and two. Tests run at their small scale: every kernel and every
# branch, without repeats (tests/support/share.h); tree_attention_test has cases of its own for it
# (tests/kernels/cuda/sanitizer_cases.cuh). memcheck has the whole of those tests that it takes seconds for, and leaves API
# errors to the tests, one of which asks for more memory than there is. `leaks` is memcheck over whole requests of an
# engine, with what they left allocated at the end. sampling_test's kernels have no type; `portable` is the one for devices
# without clusters.
#
# Two kinds of reports are told and do not count. racecheck sees hazards inside of cuBLASLt's kernels that split k (to exclude
# kernels by name makes the tool fail with an illegal address, 2025.3.1; matmul_test, cuBLASLt alone, it does not run).
# initcheck does not follow bulk stores, by which the head's product leaves what ExpsGradientKernel reads.
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,21s/^# \{0,1\}//p' "$0" >&2; exit 2; }
BIN=$(cd "$1" && pwd) || exit 2
shift
LOGS=${LOGS:-$(mktemp -d)} LIMIT=${LIMIT:-120}
mkdir -p "$LOGS"
export BIN LOGS LIMIT REQUIRE_CUDA=1
export LEAK_TESTS='*EngineDeviceTest.LogitsThatAreNoNumbersEndTheirRequestAlone/1:*EngineDeviceTest.MoreThanThePoolHoldsIsRefusedWithTheNumbers/1'

# Tool, test, types, scale, parts that its cases are cut into, processes that share its tests. racecheck, which keeps the
# GPU busy, comes behind the others, which keep cores busy; what takes longest begins.
RUNS='
memcheck row_ops bf16 full 3 1
memcheck norm_matmul bf16 full 3 1
memcheck logprob_head bf16 full 1 1
leaks engine_device bf16 small 1 1
initcheck tree_attention bf16 small 2 1
memcheck tree_attention bf16 small 2 1
racecheck sampling bf16 small 1 12
racecheck tree_attention bf16 small 6 1
initcheck norm_matmul bf16,f16 small 1 1
initcheck logprob_head bf16,f16 small 1 1
initcheck mlp_block bf16,f16 small 1 1
initcheck row_ops bf16,f16 small 1 1
memcheck matmul bf16,f16 small 1 1
initcheck matmul bf16,f16 small 1 1
memcheck gated_matmul bf16,f16 small 1 1
initcheck gated_matmul bf16,f16 small 1 1
memcheck mlp_block bf16,f16 small 1 1
memcheck row_ops f16 small 1 1
memcheck norm_matmul f16 small 1 1
memcheck logprob_head f16 small 1 1
memcheck tree_attention f16 small 1 1
initcheck tree_attention f16 small 1 1
memcheck adamw bf16,f16 small 1 1
initcheck adamw bf16,f16 small 1 1
memcheck sampling bf16,portable small 1 1
initcheck sampling bf16,portable small 1 1
racecheck logprob_head bf16,f16 small 2 1
racecheck norm_matmul bf16,f16 small 2 1
racecheck mlp_block bf16,f16 small 3 1
racecheck tree_attention f16 small 3 1
racecheck row_ops bf16,f16 small 2 1
racecheck gated_matmul bf16,f16 small 1 1
racecheck sampling portable small 1 6
racecheck adamw bf16,f16 small 1 1
synccheck tree_attention bf16,f16 small 1 1
synccheck mlp_block bf16,f16 small 1 1
synccheck norm_matmul bf16,f16 small 1 1
synccheck logprob_head bf16,f16 small 1 1
synccheck gated_matmul bf16,f16 small 1 1
synccheck sampling bf16,portable small 1 1
'

# log: whether tests, or cases, have run.
some_ran() { grep -qE '^\[  PASSED  \] [1-9]|^[1-9][0-9]* cases' "$1"; }

# tool, log: whether the tests passed, and all reports, each of which begins with a line that is not indented, are of the
# two kinds.
reports_are_known() {
  grep -q '^\[  PASSED' "$2" && ! grep -qE '^\[  FAILED|not printed|Internal' "$2" && python3 - "$@" << 'PYTHON'
import re, sys
with open(sys.argv[2], errors="replace") as log:
    lines = re.findall(r"^========= (.*)", log.read(), re.M)
reports = []
for line in lines:
    if line.startswith("    "):
        reports[-1].append(line)
    elif line.strip() and not re.match("COMPUTE-SANITIZER|[A-Z]+ SUMMARY", line):
        reports.append([line])
if sys.argv[1] == "racecheck":
    accesses = [[line for line in report if " access at " in line] for report in reports]
    known = [bool(at) and all(re.search(" access at (void )?(nvjet|cublas|cutlass)", line) for line in at) for at in accesses]
else:
    known = [report[0].startswith("Uninitialized") and any("ExpsGradientKernel" in line for line in report) for report in reports]
sys.exit(0 if known and all(known) else 1)
PYTHON
}
export -f some_ran reports_are_known

# tool, test, type, scale, part, parts, shard, shards, GPU: one line of verdict, seconds, what ran, the tool's summary.
run() {
  local tool=$1 test=$2 type=$3 scale=$4 what="$1 $2 $3 part $5 of $6" log begin=$SECONDS verdict=clean known='' status
  local filter='*/1:*Masters*/0-*Masters*/1' options=(--tool "$tool" --error-exitcode 3)
  [ "$8" -eq 1 ] || what+=" shard $7 of $8"
  [ "$type" = f16 ] && filter='*/2:*Masters*/1'
  [ "$type" = portable ] && export PORTABLE_CUDA=1
  [ "$tool" = leaks ] && filter="$LEAK_TESTS"
  local command=("$BIN/${test}_test" "--gtest_filter=$filter")
  [ "$test" = tree_attention ] && command=("$BIN/${test}_test" sanitizer "$type" "part=$5/$6")
  case $tool in
    memcheck) options+=(--report-api-errors no) ;;
    leaks) options=(--tool memcheck --error-exitcode 3 --leak-check full --report-api-errors no) ;;
    racecheck | initcheck) options+=(--print-limit 0 --num-callers-host 1) ;;
  esac
  log=$LOGS/${what// /_}.txt
  COPPICE_TEST_SCALE=$scale COPPICE_TEST_PART=$5/$6 GTEST_SHARD_INDEX=$7 GTEST_TOTAL_SHARDS=$8 CUDA_VISIBLE_DEVICES=$9 \
    timeout "$LIMIT" compute-sanitizer "${options[@]}" "${command[@]}" > "$log" 2>&1
  status=$?
  [ $status -eq 0 ] && grep -q SUMMARY "$log" && ! grep -q 'SUMMARY: [1-9]' "$log" || verdict="NOT($status)"
  if [[ $verdict != clean && $tool =~ ^(racecheck|initcheck)$ ]] && reports_are_known "$tool" "$log"; then verdict=clean known=', all known'; fi
  [ $verdict != clean ] || some_ran "$log" || verdict='NOT(none)'
  printf '%s %4d s  %s: %s%s\n' "$verdict" $((SECONDS - begin)) "$what" \
    "$(grep -h SUMMARY "$log" | tail -n 1 | cut -c 11-)" "$known"
}
export -f run

for tool in "$@"; do
  [[ $tool =~ ^(racecheck|memcheck|initcheck|synccheck|leaks)$ ]] || { echo "sanitize.sh: unknown tool $tool" >&2; exit 2; }
done
gpus=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd, -)}
IFS=, read -ra gpus <<< "$gpus"
[ ${#gpus[@]} -ge 1 ] || { echo "sanitize.sh: no GPU" >&2; exit 2; }
number=0
while read -r tool test types scale parts shards; do
  [[ -n $tool && ($# -eq 0 || " $* " == *" $tool "*) ]] || continue
  for type in ${types//,/ }; do
    for ((part = 0; part < parts; ++part)); do
      for ((shard = 0; shard < shards; ++shard)); do
        echo "$tool $test $type $scale $part $parts $shard $shards ${gpus[number++ % ${#gpus[@]}]}"
      done
    done
  done
done <<< "$RUNS" | xargs -P "${JOBS:-$(nproc)}" -L 1 bash -c 'run "$@"' run | tee "$LOGS/runs.txt"
not_clean=$(grep -c '^NOT' "$LOGS/runs.txt")
echo "$(grep -c '^clean' "$LOGS/runs.txt") runs clean, $not_clean not"
[ "$not_clean" -eq 0 ]
