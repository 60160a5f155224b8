"""What the blocking and the asyncio client agree on: channel options and the default address."""

from __future__ import annotations

import os

DEFAULT_ADDRESS = "127.0.0.1:7700"

# A train step's reply carries log-probs of every token, so the default limit of 4 MiB is too small.
OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]


def address_or_default(address: str | None) -> str:
    """The given address, else $COPPICE_ADDRESS, else 127.0.0.1:7700."""
    return address or os.environ.get("COPPICE_ADDRESS") or DEFAULT_ADDRESS
