#!/usr/bin/env bash
# Makes tests/parity/golden anew with the versions of requirements.txt; a second run changes no byte of the tokenizer files and
# rounding errors only in the others.
# Usage: tests/parity/make_golden.sh [PYTHON]      PYTHON: an interpreter that has the requirements; default: a venv in build/
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-}
if [ -z "$python" ]; then
  python3 -m venv build/golden-venv
  build/golden-venv/bin/pip install -q -r tests/parity/requirements.txt
  python=build/golden-venv/bin/python
fi
deploy/fetch_model.sh
"$python" tests/parity/golden_tokenizers.py
"$python" tests/parity/golden_models.py
du -sh tests/parity/golden
