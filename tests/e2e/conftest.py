"""Starts the real coppiced with SmolLM2-135M-Instruct on free ports of loopback."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator

import coppice
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
READY_TIMEOUT_S = 120
# Two ways of computing one log-prob, batched decode and the trainer's forward: in fp32, or with
# activations in 16 bits, at worst bf16. COPPICE_DEVICE is the daemon's own flag: it runs these tests on a GPU.
LOGPROB_TOLERANCE = 0.1 if os.environ.get("COPPICE_DEVICE") == "cuda" else 1e-3


def pytest_addoption(parser: pytest.Parser) -> None:
    default = ROOT / "build/release/coppiced"
    parser.addoption("--coppiced", default=str(default), help=f"the daemon, default {default}")


class Daemon:
    """A running coppiced. `log` is its standard error and output."""

    def __init__(self, binary: str, model: str, directory: pathlib.Path, *flags: str) -> None:
        ports = directory / "ports.json"
        self.log = directory / "coppiced.log"
        command = [binary, f"--model={model}", "--port=0", "--http_port=0", f"--port_file={ports}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*command, *flags], stdout=log, stderr=log)
        self._wait_until_ready(ports)
        found = json.loads(ports.read_text())
        self.address = f"127.0.0.1:{found['grpc']}"
        self.metrics_url = f"http://127.0.0.1:{found['http']}/metrics"

    def _wait_until_ready(self, ports: pathlib.Path) -> None:
        exited = threading.Event()
        threading.Thread(target=lambda: (self.process.wait(), exited.set()), daemon=True).start()
        for _ in range(READY_TIMEOUT_S * 10):
            if ports.exists():
                return
            if exited.wait(timeout=0.1):
                raise RuntimeError(f"coppiced ended before it was ready:\n{self.log.read_text()}")
        self.kill()
        raise RuntimeError(f"coppiced not ready after {READY_TIMEOUT_S} s:\n{self.log.read_text()}")

    def kill(self) -> None:
        """SIGKILL, as a crash would look from outside."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """SIGTERM; the exit code after the drain."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait()


@pytest.fixture(scope="session")
def model() -> str:
    """Path of the GGUF, fetched if need be."""
    fetched = subprocess.run(
        [ROOT / "deploy/fetch_model.sh"], check=True, capture_output=True, text=True
    )
    return str(ROOT / fetched.stdout.split()[-1])


@pytest.fixture(scope="session")
def start(
    request: pytest.FixtureRequest, model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Daemon]]:
    """Starts a daemon with extra flags; all are stopped in the end."""
    binary = request.config.getoption("--coppiced")
    daemons: list[Daemon] = []

    def start_one(*flags: str) -> Daemon:
        daemons.append(Daemon(binary, model, tmp_path_factory.mktemp("coppiced"), *flags))
        return daemons[-1]

    yield start_one
    for daemon in daemons:
        if daemon.process.poll() is None:
            daemon.kill()


@pytest.fixture(scope="session")
def daemon(start: Callable[..., Daemon], tmp_path_factory: pytest.TempPathFactory) -> Daemon:
    """One daemon for all tests that neither stop it nor depend on its policy version."""
    return start(f"--checkpoint_dir={tmp_path_factory.mktemp('checkpoints')}")


@pytest.fixture
def client(daemon: Daemon) -> Iterator[coppice.Client]:
    with coppice.Client(daemon.address, timeout=300) as connected:
        yield connected
