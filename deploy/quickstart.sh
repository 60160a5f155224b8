#!/usr/bin/env bash
# From a bare checkout to a trained policy: installs what is missing, builds a release of coppiced, fetches
# SmolLM2-135M-Instruct, starts the daemon on loopback, runs `coppice train-demo` against it and stops it again.
#
# Usage: deploy/quickstart.sh [--seed N] [--steps N]      as root, or as a user who may sudo
#   --seed N    of questions and samples (default 0)
#   --steps N   policy updates (default: what `coppice train-demo` takes)
# Flags of coppiced are read from the environment: COPPICE_DEVICE=cuda trains on a GPU, where nvcc is installed.
#
# Idempotent; everything it writes is under build/. The last line is
#   quickstart: ok reward_first=.. reward_last=.. cached_tokens=.. hit_rate=.. dedup=..
# Anything wrong exits non-zero with the reason, and shows the daemon's log if it is to blame.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; }

demo_args=()
while [ $# -gt 0 ]; do
  case "$1" in
    --seed | --steps)
      [[ "${2:-}" =~ ^[0-9]+$ ]] || { echo "quickstart: $1 wants a number, got '${2:-}'" >&2; exit 2; }
      demo_args+=("$1" "$2")
      shift 2
      ;;
    -h | --help) usage; exit 0 ;;
    *) echo "quickstart: unknown argument $1" >&2; usage >&2; exit 2 ;;
  esac
done

readonly BUILD=build/release
export CCACHE_BASEDIR=$PWD
readonly VENV=build/venv
readonly OUT=build/quickstart
readonly START_TIMEOUT_S=120
stage='starting'
daemon=''
mkdir -p "$OUT"
rm -f "$OUT"/*

finish() {
  local status=$?
  [ -z "$daemon" ] || kill -KILL "$daemon" 2>/dev/null || true
  [ "$status" -ne 0 ] || return 0
  echo "quickstart: failed while $stage (exit $status)" >&2
  if [ -s "$OUT/coppiced.log" ]; then
    echo "quickstart: the last lines of $OUT/coppiced.log:" >&2
    tail -n 25 "$OUT/coppiced.log" >&2
  fi
}
trap finish EXIT

# quietly LOG COMMAND...: output goes to a file, and to the screen only if the command fails.
quietly() {
  local log=$1 status=0
  shift
  "$@" >"$log" 2>&1 || status=$?
  [ "$status" -eq 0 ] || { tail -n 40 "$log" >&2; return "$status"; }
}

say() { stage=$1; echo "quickstart: $1"; }

install_client() { # skipped when neither the client nor the protos changed
  local stamp
  stamp=$(find client/python proto -type f \( -name '*.py' -o -name '*.toml' -o -name '*.proto' \) -print0 |
    sort -z | xargs -0 sha256sum | sha256sum)
  [ "$(cat "$VENV/quickstart.stamp" 2>/dev/null)" != "$stamp" ] || return 0
  python3 -m venv "$VENV"
  "$VENV/bin/pip" install -q --disable-pip-version-check './client/python[demo]'
  echo "$stamp" >"$VENV/quickstart.stamp"
}

start_daemon() { # MODEL; any free ports, read back from the port file
  "$BUILD/coppiced" --model="$1" --host=127.0.0.1 --port=0 --http_port=0 --port_file="$OUT/ports.json" \
    >"$OUT/coppiced.log" 2>&1 &
  daemon=$!
  local deadline=$((SECONDS + START_TIMEOUT_S))
  until [ -s "$OUT/ports.json" ]; do
    kill -0 "$daemon" 2>/dev/null || { daemon=''; echo "quickstart: coppiced ended before it was ready" >&2; return 1; }
    [ "$SECONDS" -lt "$deadline" ] || { echo "quickstart: coppiced not ready after $START_TIMEOUT_S s" >&2; return 1; }
    sleep 0.1
  done
}

stop_daemon() {
  local status=0
  kill -TERM "$daemon"
  wait "$daemon" || status=$?
  daemon=''
  [ "$status" -eq 0 ] || echo "quickstart: coppiced exited with $status after SIGTERM, want 0" >&2
  return "$status"
}

say 'installing packages'
deploy/install_deps.sh
say 'configuring the build'
quietly "$OUT/configure.log" cmake -S . -B "$BUILD" -G Ninja -DCMAKE_BUILD_TYPE=Release
say 'building coppiced (minutes the first time)'
quietly "$OUT/build.log" cmake --build "$BUILD" --target coppiced -j "$(nproc)"
built=$SECONDS
say 'installing the Python client'
quietly "$OUT/client.log" install_client
say 'fetching the model'
model=$(deploy/fetch_model.sh | tail -n 1)
say 'starting coppiced'
start_daemon "$model"
say 'training'
"$VENV/bin/coppice" train-demo --port-file "$OUT/ports.json" --plot "$OUT/reward.png" --summary "$OUT/summary.json" \
  ${demo_args[@]+"${demo_args[@]}"} | tee "$OUT/demo.log"
say 'stopping coppiced'
stop_daemon
echo "quickstart: $((SECONDS - built)) s after the build; files are in $OUT"
echo "quickstart: ok $(tail -n 1 "$OUT/demo.log")"
