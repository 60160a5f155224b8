"""`coppice bench`: open-loop load generator.

Requests start at the times of a Poisson process, whether or not earlier ones have ended, and every
latency counts from the planned start: a daemon that falls behind shows it.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import time
from collections.abc import Sequence
from typing import Any

from coppice import types
from coppice.aio import AsyncClient
from coppice.errors import ConnectionFailedError, CoppiceError

PERCENTILES = (50, 90, 99)


def add_commands(commands: Any, where: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "bench",
        parents=[where],
        help="open-loop load: latency percentiles and throughput",
        description="Send requests at a fixed average rate, whatever the daemon does, and report "
        "latency percentiles and throughput. Prompts are random token ids after a shared prefix.",
    )
    add = parser.add_argument
    add("--rate", type=float, default=1.0, help="requests a second (default %(default)s)")
    add("--requests", type=int, default=20, help="how many (default %(default)s)")
    add("--shared-tokens", type=int, default=256, help="common prefix (default %(default)s)")
    add("--prompt-tokens", type=int, default=64, help="own part of a prompt (default %(default)s)")
    add("--max-tokens", type=int, default=32, help="of each sample (default %(default)s)")
    add("--n", type=int, default=1, help="samples a request (default %(default)s)")
    add("--seed", type=int, default=0, help="of prompts and arrivals (default %(default)s)")
    add("--timeout", type=float, default=120.0, help="seconds a request (default %(default)s)")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


@dataclasses.dataclass
class Trace:
    """Times of one request, seconds after its planned start."""

    first_token: float | None = None
    end: float | None = None
    token_gaps: list[float] = dataclasses.field(default_factory=list)  # between chunks of a sample
    tokens: int = 0
    usage: types.Usage = dataclasses.field(default_factory=types.Usage)
    error: str = ""


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile of a non-empty sequence."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)  # ceiling
    return ordered[max(0, int(rank) - 1)]


def plan(args: argparse.Namespace, vocab_size: int) -> list[tuple[float, list[int]]]:
    """(seconds after the start, prompt token ids) of every request; the same for the same seed."""
    rng = random.Random(args.seed)

    def draw(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    shared, at, requests = draw(args.shared_tokens), 0.0, []
    for _ in range(args.requests):
        requests.append((at, shared + draw(args.prompt_tokens)))
        at += rng.expovariate(args.rate)
    return requests


async def _request(
    client: AsyncClient, args: argparse.Namespace, start: float, prompt: list[int], seed: int
) -> Trace:
    await asyncio.sleep(max(0.0, start - time.monotonic()))
    trace, last = Trace(), dict[int, float]()
    try:
        stream = await client.generate_stream(
            prompt,
            n=args.n,
            max_tokens=args.max_tokens,
            ignore_eos=True,
            seed=seed,
            return_text=False,
            timeout=args.timeout,
        )
        async with stream:
            async for event in stream:
                if not isinstance(event, types.Chunk):
                    continue
                now = time.monotonic()
                if trace.first_token is None:
                    trace.first_token = now - start
                if event.sample in last:
                    trace.token_gaps.append((now - last[event.sample]) / len(event.token_ids))
                last[event.sample] = now
                trace.tokens += len(event.token_ids)
        trace.usage = stream.group.usage
    except ConnectionFailedError:
        raise
    except CoppiceError as error:
        trace.error = error.code.name
    trace.end = time.monotonic() - start
    return trace


async def _drive(args: argparse.Namespace) -> tuple[list[Trace], float]:
    async with AsyncClient(args.address) as client:
        model = await client.model()
        requests = plan(args, model.vocab_size)
        start = time.monotonic()
        calls = [
            asyncio.create_task(_request(client, args, start + at, prompt, args.seed + i))
            for i, (at, prompt) in enumerate(requests)
        ]
        try:
            traces = await asyncio.gather(*calls)
        finally:
            for call in calls:
                call.cancel()
        return traces, time.monotonic() - start


def _milliseconds(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{p}": round(1000 * percentile(values, p), 2) for p in PERCENTILES}


def summarize(traces: Sequence[Trace], seconds: float, args: argparse.Namespace) -> dict[str, Any]:
    """Numbers of a run: latencies in milliseconds, rates a second."""
    good = [trace for trace in traces if not trace.error]
    errors: dict[str, int] = {}
    for trace in traces:
        if trace.error:
            errors[trace.error] = errors.get(trace.error, 0) + 1
    prompt_tokens = sum(trace.usage.prompt_tokens for trace in good)
    computed = sum(trace.usage.computed_tokens for trace in good)
    return {
        "requests": len(traces),
        "errors": errors,
        "rate": args.rate,
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(good) / seconds, 3),
        "completion_tokens_per_second": round(sum(t.tokens for t in good) / seconds, 2),
        "hit_rate": round(1 - computed / prompt_tokens, 4) if prompt_tokens else 0.0,
        "time_to_first_token_ms": _milliseconds([t.first_token for t in good if t.first_token]),
        "inter_token_ms": _milliseconds([gap for t in good for gap in t.token_gaps]),
        "request_ms": _milliseconds([t.end for t in good if t.end]),
    }


def _print_table(summary: dict[str, Any]) -> None:
    for name, value in summary.items():
        if isinstance(value, dict):
            value = "  ".join(f"{key} {number}" for key, number in value.items()) or "none"
        print(f"{name:<29} {value}")


def run(args: argparse.Namespace) -> int:
    if args.rate <= 0 or args.requests < 1 or args.shared_tokens + args.prompt_tokens < 1:
        raise ValueError(
            "bench failed: want --rate > 0, --requests >= 1 and a prompt of >= 1 token"
        )
    traces, seconds = asyncio.run(_drive(args))
    summary = summarize(traces, seconds, args)
    if args.json:
        print(json.dumps(summary))
    else:
        _print_table(summary)
    return 0 if not summary["errors"] else 1
