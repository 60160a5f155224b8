#!/usr/bin/env bash
# Installs everything Coppice needs to build, test and run on Debian 12. Idempotent: asks dpkg first, so a second run
# costs well under a second and needs neither network nor root.
# Usage: deploy/install_deps.sh [--with-prometheus]      (as root, or as a user who may sudo)
#   --with-prometheus   also Prometheus, promtool and shellcheck, for tests/run.sh and deploy/local-cluster.sh; where systemd
#                       runs, Debian's package starts a server on port 9090 of its own, which we do not use
set -euo pipefail

PACKAGES=(
  build-essential cmake ninja-build ccache git pkg-config
  libgrpc++-dev protobuf-compiler protobuf-compiler-grpc libprotobuf-dev libabsl-dev
  prometheus-cpp-dev libspdlog-dev libfmt-dev libdnnl-dev libcpp-httplib-dev nlohmann-json3-dev
  libpcre2-dev libutf8proc-dev libssl-dev libcurl4-openssl-dev zlib1g-dev
  libgtest-dev libgmock-dev libbenchmark-dev
  clang-14 clang-format-14 clang-tidy-14
  python3 python3-venv python3-dev ca-certificates
)
case "${1:-}" in
  '') ;;
  --with-prometheus) PACKAGES+=(prometheus shellcheck) ;;
  *) echo "install_deps: unknown argument $1; want --with-prometheus or nothing" >&2; exit 2 ;;
esac
readonly PACKAGES

missing=()
for package in "${PACKAGES[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  echo "install_deps: ok, all ${#PACKAGES[@]} packages present"
  exit 0
fi

sudo_cmd=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || {
    echo "install_deps: need root to install ${missing[*]}; run as root or install sudo" >&2
    exit 1
  }
  sudo_cmd=(sudo)
fi
echo "install_deps: installing ${#missing[@]} packages: ${missing[*]}"
"${sudo_cmd[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -q
"${sudo_cmd[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
echo "install_deps: ok"
