from collections.abc import Iterator

import coppice
import pytest
from fake_daemon import FakeDaemon


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    fake = FakeDaemon()
    yield fake
    fake.stop()


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[coppice.Client]:
    with coppice.Client(daemon.address, timeout=60) as connected:
        yield connected
