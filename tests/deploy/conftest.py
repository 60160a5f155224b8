"""The deployed things as their own tools see them: Helm, kubernetes-validate, hadolint, promtool, and the daemon."""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess
from typing import Any

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/coppice"
VALUES = ("values-cpu.yaml", "values-gpu.yaml")


def pytest_addoption(parser: pytest.Parser) -> None:
    default = ROOT / "build/release/coppiced"
    parser.addoption("--coppiced", default=str(default), help=f"the daemon, default {default}")


@dataclasses.dataclass
class Result:
    """A finished command."""

    code: int
    stdout: str
    stderr: str


def run(*command: object, **options: Any) -> Result:
    """Runs a command to its end, within two minutes."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=120, **options
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def coppiced(request: pytest.FixtureRequest) -> str:
    """Path of the daemon."""
    return str(request.config.getoption("--coppiced"))


class Helm:
    """The real helm on the chart."""

    def __init__(self, binary: pathlib.Path) -> None:
        self.binary = binary

    def lint(self, *args: object) -> Result:
        return run(self.binary, "lint", "--strict", CHART, *args)

    def template(self, *args: object, namespace: str = "rl") -> Result:
        return run(self.binary, "template", "coppice", CHART, "--namespace", namespace, *args)

    def notes(self, *args: object) -> Result:
        return run(self.binary, "install", "coppice", CHART, "--dry-run=client", *args)

    def render(self, *args: object) -> list[dict[str, Any]]:
        """The manifests; fails the test if Helm refuses."""
        result = self.template(*args)
        assert result.code == 0, result.stderr
        return [document for document in yaml.safe_load_all(result.stdout) if document]


@pytest.fixture(scope="session")
def helm() -> Helm:
    """The real Helm, fetched if need be."""
    fetched = run(ROOT / "tests/deploy/fetch_helm.sh")
    assert fetched.code == 0, fetched.stderr
    return Helm(ROOT / fetched.stdout.split()[-1])
