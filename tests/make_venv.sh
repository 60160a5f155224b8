#!/usr/bin/env bash
# Creates (or refreshes) a virtual environment with the Python client and what its tests need. Idempotent: does nothing when
# neither the client nor the protos changed since.
# Usage: tests/make_venv.sh build/venv
set -euo pipefail
cd "$(dirname "$0")/.."
readonly VENV=${1:?usage: tests/make_venv.sh DIRECTORY}
stamp=$(find client/python proto tests/e2e/requirements.txt tests/deploy/requirements.txt \
  -type f \( -name '*.py' -o -name '*.toml' -o -name '*.proto' -o -name '*.txt' \) \
  -not -path '*/build/*' -not -path '*.egg-info/*' -print0 | sort -z | xargs -0 sha256sum | sha256sum)
if [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/stamp" 2>/dev/null)" = "$stamp" ]; then
  echo "make_venv: ok, $VENV is current"
  exit 0
fi
python3 -m venv "$VENV"
"$VENV/bin/pip" install -q --disable-pip-version-check -r tests/e2e/requirements.txt -r tests/deploy/requirements.txt ./client/python
echo "$stamp" >"$VENV/stamp"
echo "make_venv: ok, $VENV"
