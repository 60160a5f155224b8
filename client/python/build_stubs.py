"""Build hook: generates coppice.v1 (messages and gRPC stubs) from proto/coppice/v1 into the wheel.

The generated files live in a temporary directory only, so that the source tree stays clean.
"""

from __future__ import annotations

import pathlib
import tempfile
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds coppice/v1/*_pb2.py, *_pb2.pyi and *_pb2_grpc.py to the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        proto_root = pathlib.Path(self.root).resolve().parents[1] / "proto"
        protos = sorted(proto_root.glob("coppice/v1/*.proto"))
        if not protos:
            raise FileNotFoundError(
                f"building coppice failed: no .proto files under {proto_root}/coppice/v1; "
                "install from a checkout of the repository: pip install ./client/python"
            )
        self._generated = tempfile.TemporaryDirectory(prefix="coppice-stubs-")
        out = pathlib.Path(self._generated.name)
        generate(proto_root, protos, out)
        for path in sorted(out.glob("coppice/v1/*")):
            build_data["force_include"][str(path)] = f"coppice/v1/{path.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self._generated.cleanup()


def generate(proto_root: pathlib.Path, protos: list[pathlib.Path], out: pathlib.Path) -> None:
    """Runs protoc over `protos` (below `proto_root`); coppice/v1 appears below `out`."""
    import grpc_tools
    from grpc_tools import protoc

    well_known = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    status = protoc.main(
        ["protoc", f"-I{proto_root}", f"-I{well_known}"]
        + [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
        + [str(path) for path in protos]
    )
    if status != 0:
        raise RuntimeError(
            f"building coppice failed: protoc exited with {status} on {proto_root}/coppice/v1"
        )
    (out / "coppice/v1/__init__.py").write_text(
        '"""Generated from proto/coppice/v1: the wire messages."""\n'
    )
