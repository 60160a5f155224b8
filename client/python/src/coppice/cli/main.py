"""The `coppice` command: generate, chat, train-demo, status, bench."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence

from coppice import _channel
from coppice.cli import bench, conversation, inspect, train_demo
from coppice.errors import ConnectionFailedError, CoppiceError

EXIT_FAILED = 1
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """One subcommand a module; each adds its own arguments and its `run`."""
    parser = argparse.ArgumentParser(
        prog="coppice", description="Talk to coppiced, which serves and trains one language model."
    )
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument(
        "--address",
        metavar="HOST:PORT",
        help=f"gRPC address of coppiced; default $COPPICE_ADDRESS, else {_channel.DEFAULT_ADDRESS}",
    )
    where.add_argument(
        "--port-file", metavar="FILE", help="read the address from what coppiced --port_file wrote"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (conversation, train_demo, inspect, bench):
        module.add_commands(commands, where)
    return parser


def resolve_address(args: argparse.Namespace) -> str:
    """--port-file, else --address, else the environment, else the default."""
    if not args.port_file:
        return _channel.address_or_default(args.address)
    with open(args.port_file, encoding="utf-8") as file:
        ports = json.load(file)
    return f"127.0.0.1:{ports['grpc']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 failed, 2 usage, 3 unreachable, 130
    interrupted."""
    args = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        args.address = resolve_address(args)
        return run(args)
    except ConnectionFailedError as error:
        print(f"coppice: {error.message}", file=sys.stderr)
        print(
            "coppice: start a daemon with `coppiced --model=FILE.gguf`, or point --address or "
            "$COPPICE_ADDRESS at a running one",
            file=sys.stderr,
        )
        return EXIT_UNREACHABLE
    except BrokenPipeError:  # the reader of our output left, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (CoppiceError, OSError, ValueError, RuntimeError) as error:
        print(f"coppice: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
