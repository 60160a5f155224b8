"""The header by which a router, or any ring hash in between, finds the replica that has a prompt.

The same function as PrefixHash in server/placement/prefix_hash.h; the vectors in
tests/server/prefix_hash_vectors.json bind the two.
"""

from __future__ import annotations

import array
import hashlib
import struct
import sys
from collections.abc import Sequence
from typing import Any

from coppice.v1 import generation_pb2

HEADER = "x-coppice-prefix-hash"
TENANT_HEADER = "x-coppice-tenant"
_VERSION = b"coppice-prefix-1"
_TOKENS = 256
_TEXT_BYTES = 1024


def prefix_hash(prompt: str | Sequence[int], *, key: str = "", namespace: str = "") -> str:
    """16 hexadecimal digits that name the home of a prompt: of `key` if there is one, else of the
    prompt's first 256 tokens or 1024 bytes. `namespace` is the tenant, if the daemons tell any
    apart."""
    if key:
        kind, content = b"k", key.encode()
    elif isinstance(prompt, str) and prompt:
        kind, content = b"s", prompt.encode()[:_TEXT_BYTES]
    else:
        ids = array.array("i", [] if isinstance(prompt, str) else prompt[:_TOKENS])
        if sys.byteorder == "big":
            ids.byteswap()
        kind, content = b"t", ids.tobytes()
    tenant = namespace.encode()
    start = _VERSION + struct.pack("<I", len(tenant)) + tenant
    return hashlib.sha256(start + kind + content).digest()[:8].hex()


def call_metadata(metadata: tuple[tuple[str, str], ...], request: Any) -> tuple[Any, ...]:
    """`metadata` for this request: with the header if the request has a prompt, unless the caller
    gave one."""
    if not isinstance(request, (generation_pb2.GenerateRequest, generation_pb2.WarmRequest)):
        return metadata
    given = dict(metadata)
    if HEADER in given:
        return metadata
    prompt = request.prompt
    ids = list(prompt.tokens.ids[:_TOKENS])
    ids += prompt.suffix.ids[: _TOKENS - len(ids)]
    namespace = given.get(TENANT_HEADER, "")
    value = prefix_hash(prompt.text or ids, key=request.cache.key, namespace=namespace)
    return (*metadata, (HEADER, value))
