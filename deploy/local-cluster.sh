#!/usr/bin/env bash
# A cluster on this machine: a router, three replicas of coppiced on the CPU, and Prometheus with our rules. Stops on Ctrl-C.
#
# Usage: deploy/local-cluster.sh [options] [-- FLAGS OF THE REPLICAS]     as root, or as a user who may sudo
#   --model PATH           default: SmolLM2-135M-Instruct, fetched
#   --geometry NAME        random weights of a named shape instead, see coppiced --help
#   --replicas N           default 3
#   --port N               of the router, default 7700; 0 = any free one
#   --prometheus-port N    default 9090; 0 = any free one
#   --out DIR              logs and state, default build/local-cluster; new, empty or of an earlier cluster, which is removed
#   --coppiced PATH        use this daemon, and install and build nothing
#
# Addresses are in DIR/cluster.json once all of it is ready. A replica that ends is started again on its port, as a kubelet
# would. SIGHUP to this script (its id is in cluster.json) restarts the replicas one by one. Ctrl-C or SIGTERM drains all and
# ends with 0; a second one ends open requests.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; }
die() { echo "local-cluster: $1" >&2; exit 1; }

model='' geometry='' replicas=3 port=7700 prometheus_port=9090 out='' coppiced=''
while [ $# -gt 0 ]; do
  case "$1" in
    --) shift; break ;;
    -h | --help) usage; exit 0 ;;
    --model | --geometry | --replicas | --port | --prometheus-port | --out | --coppiced)
      [ $# -ge 2 ] || { echo "local-cluster: $1 wants a value" >&2; exit 2; }
      name=${1#--}
      value=$2
      case "$name" in model | out | coppiced) value=$(realpath -m -- "$2") ;; esac
      printf -v "${name//-/_}" '%s' "$value"
      shift 2
      ;;
    *) echo "local-cluster: unknown argument $1" >&2; usage >&2; exit 2 ;;
  esac
done
for number in "$replicas" "$port" "$prometheus_port"; do
  [[ "$number" =~ ^[0-9]+$ ]] || { echo "local-cluster: want a number, got '$number'" >&2; exit 2; }
done
[ "$replicas" -gt 0 ] || { echo 'local-cluster: --replicas: want at least 1, got 0' >&2; exit 2; }
[ -z "$model" ] || [ -z "$geometry" ] || { echo 'local-cluster: want one of --model and --geometry, got both' >&2; exit 2; }
readonly FLAGS=("$@") START_TIMEOUT_S=120
cd "$(dirname "$0")/.."
out=${out:-build/local-cluster}

declare -A pid=()         # of replica-0 ..., router, prometheus
declare -A replica_port=()  # "gRPC HTTP" by name, the same over a restart
stops=0 restart_asked=''

# --- processes

spawn() { # NAME COMMAND...: in a session of its own, so that Ctrl-C reaches this script only; ends when this script does
  local name=$1
  shift
  : >>"$out/$name/log"
  setsid setpriv --pdeathsig KILL "$@" >>"$out/$name/log" 2>&1 9>&- &
  pid[$name]=$!
}

alive() { kill -0 "${pid[$1]:-0}" 2>/dev/null; }

await() { # NAME WHAT COMMAND...: until the command succeeds
  local name=$1 what=$2 deadline=$((SECONDS + START_TIMEOUT_S))
  shift 2
  until "$@"; do
    alive "$name" || { tail -n 20 "$out/$name/log" >&2; die "$name ended before $what"; }
    [ "$SECONDS" -lt "$deadline" ] || { tail -n 20 "$out/$name/log" >&2; die "$name: no $what after $START_TIMEOUT_S s"; }
    [ "$stops" -eq 0 ] || return 0
    sleep 0.05
  done
}

ports_of() { # NAME: "gRPC HTTP" out of its port file
  sed -E 's/.*"grpc": ([0-9]+), "http": ([0-9]+).*/\1 \2/' "$out/$1/ports.json"
}

http_get() ( # PORT PATH: the body of the answer
  exec 3<>"/dev/tcp/127.0.0.1/$1" && printf 'GET %s HTTP/1.0\r\n\r\n' "$2" >&3 && sed '1,/^\r$/d' <&3
) 2>/dev/null

# --- replicas

start_replica() { # NAME
  local grpc http
  read -r grpc http <<<"${replica_port[$1]:-0 0}"
  rm -f "$out/$1/ports.json"
  spawn "$1" "$coppiced" "${model_flag[@]}" --host=127.0.0.1 --port="$grpc" --http_port="$http" \
    --port_file="$out/$1/ports.json" --threads="$threads" ${FLAGS[@]+"${FLAGS[@]}"}
}

port_file_there() { [ -s "$out/$1/ports.json" ]; }  # a replica that is ready; a router that listens

router_ready() { [ "$(http_get "${router_ports#* }" /readyz)" = ready ]; }

router_sees() { # NAME
  http_get "${router_ports#* }" /metrics | grep -qx "coppice_router_replica_up{replica=\"$1\"} 1"
}

restart_replica() { # NAME: after it ended
  echo "local-cluster: starting $1 again"
  start_replica "$1"
  await "$1" "being ready" port_file_there "$1"
  await router "seeing $1 again" router_sees "$1"
}

rolling_restart() {
  restart_asked=''
  local name
  for name in "${names[@]}"; do
    [ "$stops" -eq 0 ] || return 0
    echo "local-cluster: draining $name"
    kill -TERM "${pid[$name]}"
    until ! alive "$name"; do wait "${pid[$name]}" || true; done
    restart_replica "$name"
  done
  echo 'local-cluster: all replicas restarted'
}

# --- the rest

start_router() {
  local list=() name
  for name in "${names[@]}"; do list+=("$name=127.0.0.1:${replica_port[$name]% *}"); done
  mkdir -p "$out/router"
  spawn router "$coppiced" --role=router --replicas="$(IFS=,; echo "${list[*]}")" --host=127.0.0.1 --port="$port" --http_port=0 \
    --port_file="$out/router/ports.json"
  await router "its ports" port_file_there router
  router_ports=$(ports_of router)
  await router "being ready" router_ready
}

start_prometheus() {
  mkdir -p "$out/prometheus"
  cp deploy/prometheus/{prometheus,alerts}.yaml "$out/prometheus/"
  local name separator='[' targets="$out/prometheus/targets.json"
  : >"$targets"
  for name in "${names[@]}" router; do
    local ports=$router_ports
    [ "$name" = router ] || ports=${replica_port[$name]}
    printf '%s{"targets": ["127.0.0.1:%s"], "labels": {"component": "%s", "pod": "%s"}}' "$separator" "${ports#* }" "${name%-*}" \
      "$name" >>"$targets"
    separator=$',\n '
  done
  echo ']' >>"$targets"
  spawn prometheus prometheus --config.file="$out/prometheus/prometheus.yaml" --storage.tsdb.path="$out/prometheus/data" \
    --web.listen-address="127.0.0.1:$prometheus_port"
  await prometheus "being ready" grep -q 'Server is ready' "$out/prometheus/log"
  prometheus_port=$(sed -nE 's/.*msg="Listening on" address=127.0.0.1:([0-9]+).*/\1/p' "$out/prometheus/log")
}

announce() { # by rename: readers see all of it or nothing
  local name separator=''
  {
    printf '{"pid": %s, "router": "127.0.0.1:%s", "router_http": "127.0.0.1:%s", "prometheus": "http://127.0.0.1:%s", "replicas": [' \
      $$ "${router_ports% *}" "${router_ports#* }" "$prometheus_port"
    for name in "${names[@]}"; do
      printf '%s{"name": "%s", "grpc": "127.0.0.1:%s", "http": "127.0.0.1:%s"}' "$separator" "$name" "${replica_port[$name]% *}" \
        "${replica_port[$name]#* }"
      separator=', '
    done
    echo ']}'
  } >"$out/cluster.json.tmp"
  mv "$out/cluster.json.tmp" "$out/cluster.json"
  echo "local-cluster: ready, router 127.0.0.1:${router_ports% *}, Prometheus http://127.0.0.1:$prometheus_port, logs in $out;" \
    "Ctrl-C stops"
}

supervise() {
  local name
  while [ "$stops" -eq 0 ]; do
    sleep 1 9>&- &  # for a signal that came just before
    wait -n "${pid[@]}" $! || true
    [ "$stops" -eq 0 ] || break
    [ -z "$restart_asked" ] || rolling_restart
    for name in router prometheus; do
      alive "$name" || { tail -n 20 "$out/$name/log" >&2; die "$name ended"; }
    done
    for name in "${names[@]}"; do
      [ "$stops" -ne 0 ] || alive "$name" || restart_replica "$name"
    done
  done
}

stop_all() { # the router first: then nobody is refused by a replica that drains
  echo 'local-cluster: stopping'
  local group name status failed=0
  for group in router "${names[*]}" prometheus; do
    for name in $group; do ! alive "$name" || kill -TERM "${pid[$name]}"; done
    for name in $group; do
      [ -n "${pid[$name]:-}" ] || continue
      status=0
      while :; do
        wait "${pid[$name]}" && status=0 || status=$?
        alive "$name" || break
      done
      [ "$status" -eq 0 ] || { echo "local-cluster: $name ended with $status, want 0" >&2; failed=1; }
    done
  done
  return "$failed"
}

on_stop() {
  stops=$((stops + 1))
  local name
  [ "$stops" -eq 1 ] || for name in "${!pid[@]}"; do kill -TERM "${pid[$name]}" 2>/dev/null || true; done
}

finish() {
  local name
  for name in "${!pid[@]}"; do kill -KILL "${pid[$name]}" 2>/dev/null || true; done
  rm -f "$out/cluster.json"
}

# --- what is needed

# Only below a directory with the lock is anything removed.
if [ ! -e "$out/local-cluster.lock" ] && [ -n "$(ls -A "$out" 2>/dev/null)" ]; then
  die "--out $out is not empty and has no local-cluster.lock: not the directory of a cluster; empty it or choose another"
fi
if [ -z "$coppiced" ]; then
  coppiced=build/release/coppiced
  export CCACHE_BASEDIR=$PWD
  deploy/install_deps.sh --with-prometheus
  cmake -S . -B build/release -G Ninja -DCMAKE_BUILD_TYPE=Release >/dev/null
  cmake --build build/release --target coppiced -j "$(nproc)"
fi
command -v prometheus >/dev/null || die 'no prometheus: run deploy/install_deps.sh --with-prometheus'
if [ -n "$geometry" ]; then
  model_flag=(--model_geometry="$geometry")
else
  model_flag=(--model="${model:-$(deploy/fetch_model.sh | tail -n 1)}")
fi
threads=$(($(nproc) / replicas))
[ "$threads" -gt 0 ] || threads=1
names=()
for ((i = 0; i < replicas; ++i)); do names+=("replica-$i"); done
mkdir -p "$out"
exec 9>"$out/local-cluster.lock"
flock -n 9 || die "another cluster runs in $out; choose another --out"
rm -rf "$out"/{replica-*,router,prometheus,cluster.json}

# --- the cluster

trap finish EXIT
trap 'exit 1' INT TERM HUP
for name in "${names[@]}"; do
  mkdir -p "$out/$name"
  start_replica "$name"
done
for name in "${names[@]}"; do
  await "$name" "being ready" port_file_there "$name"
  replica_port[$name]=$(ports_of "$name")
done
start_router
start_prometheus
trap on_stop INT TERM
trap 'restart_asked=yes' HUP
announce
supervise
stop_all
