"""The routing header: the same function as the router's, on every call with a prompt."""

import json
import pathlib

import pytest
from coppice import _routing

VECTORS = json.loads(
    (pathlib.Path(__file__).parents[1] / "server" / "prefix_hash_vectors.json").read_text()
)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["hash"])
def test_prefix_hash_agrees_with_the_shared_vectors(vector):
    prompt = vector["text"] or vector["token_ids"]
    got = _routing.prefix_hash(prompt, key=vector["key"], namespace=vector["namespace"])
    assert got == vector["hash"]


def header(daemon):
    return dict(daemon.metadata[-1]).get(_routing.HEADER)


def test_calls_with_a_prompt_carry_the_header(client, daemon):
    client.generate([1, 2, 3], max_tokens=1)
    assert header(daemon) == _routing.prefix_hash([1, 2, 3])
    client.warm("hello")
    assert header(daemon) == _routing.prefix_hash("hello")
    client.status()
    assert header(daemon) is None
