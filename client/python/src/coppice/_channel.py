"""What the blocking and the asyncio client agree on: channel options, credentials, default
address."""

from __future__ import annotations

import os
from collections.abc import Sequence

DEFAULT_ADDRESS = "127.0.0.1:8700"

# A train step's reply carries log-probs of every token, so the default limit of 4 MiB is too small.
OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 60_000),
]


def address_or_default(address: str | None) -> str:
    """The given address, else $COPPICE_ADDRESS, else 127.0.0.1:8700."""
    return address or os.environ.get("COPPICE_ADDRESS") or DEFAULT_ADDRESS


def call_metadata(token: str | None) -> Sequence[tuple[str, str]]:
    """Metadata of every call: the bearer token that names the tenant, if there is one."""
    token = token or os.environ.get("COPPICE_TOKEN")
    return (("authorization", f"Bearer {token}"),) if token else ()
