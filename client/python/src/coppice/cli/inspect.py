"""`coppice status`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from coppice import types
from coppice.client import Client


def add_commands(commands: Any, where: argparse.ArgumentParser) -> None:
    status = commands.add_parser(
        "status",
        parents=[where],
        help="model, load, cache and memory of the daemon",
        description="Show model, load, cache and memory of the daemon.",
    )
    status.add_argument("--json", action="store_true", help="print one JSON object")
    status.set_defaults(run=run_status)


def _lines(status: types.Status) -> list[tuple[str, str]]:
    model, cache = status.model, status.cache
    mib = {name: f"{size / 2**20:.0f} MiB" for name, size in status.memory.items()}
    return [
        ("daemon", f"coppiced {status.version}, {status.state}, up {status.uptime:.0f} s"),
        ("device", status.device),
        ("model", f"{model.name}: {model.num_parameters / 1e6:.1f} M parameters"),
        ("policy version", str(status.policy_version)),
        ("requests", f"{status.running_requests} running, {status.queued_requests} queued"),
        ("samples", f"{status.running_samples} running"),
        ("rollouts", f"{status.rollouts} kept"),
        (
            "cache blocks",
            f"{cache.free_blocks} free, {cache.leased_blocks} leased, {cache.cached_only_blocks} "
            f"cached, {cache.total_blocks} in all, of {cache.block_tokens} tokens",
        ),
        (
            "cache hits",
            f"{cache.hit_tokens} of {cache.queried_tokens} prompt tokens ({cache.hit_rate:.1%})",
        ),
        ("memory", ", ".join(f"{name} {size}" for name, size in mib.items())),
    ]


def run_status(args: argparse.Namespace) -> int:
    with Client(args.address) as client:
        status = client.status()
    if args.json:
        print(json.dumps(dataclasses.asdict(status)))
    else:
        for name, value in _lines(status):
            print(f"{name:<15} {value}")
    return 0
