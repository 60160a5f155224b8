"""`coppice generate` and `coppice chat`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from coppice import types
from coppice.client import Client
from coppice.options import GenerateOptions


def add_commands(commands: Any, where: argparse.ArgumentParser) -> None:
    generate = commands.add_parser(
        "generate", parents=[where], help="complete one prompt", description="Complete one prompt."
    )
    generate.add_argument("prompt", help="text; `-` reads standard input")
    generate.add_argument("--raw", action="store_true", help="no chat template: continue the text")
    generate.add_argument("-n", type=int, default=1, help="samples of the prompt (default 1)")
    generate.add_argument("--stop", action="append", default=[], help="stop string; repeatable")
    generate.set_defaults(run=run_generate)
    chat = commands.add_parser(
        "chat", parents=[where], help="hold a conversation", description="Hold a conversation."
    )
    chat.set_defaults(run=run_chat)
    for parser in (generate, chat):
        _add_sampling(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max-tokens", type=int, default=256, help="per sample (default 256)")
    parser.add_argument("--temperature", type=float, help="0 = greedy (default 1)")
    parser.add_argument("--top-k", type=int, help="default off")
    parser.add_argument("--top-p", type=float, help="default off")
    parser.add_argument("--seed", type=int, help="default drawn by the daemon")


def _sampling(args: argparse.Namespace) -> GenerateOptions:
    return {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
    }


def _usage_line(group: types.Group) -> str:
    usage = group.usage
    return (
        f"[prompt {usage.prompt_tokens} tokens, {usage.cached_tokens} cached; "
        f"completion {usage.completion_tokens}; seed {group.seed}; policy {group.policy_version}]"
    )


def _print_live(client: Client, prompt: types.Prompt, options: GenerateOptions) -> types.Group:
    """Prints one sample as it arrives."""
    with client.generate_stream(prompt, **options) as stream:
        for event in stream:
            if isinstance(event, types.Chunk):
                print(event.text, end="", flush=True)
        print(flush=True)
        return stream.group


def run_generate(args: argparse.Namespace) -> int:
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    messages = [{"role": "system", "content": args.system}] if args.system else []
    prompt = text if args.raw else [*messages, {"role": "user", "content": text}]
    options = _sampling(args) | GenerateOptions(n=args.n, stop=args.stop)
    with Client(args.address) as client:
        if args.n == 1:
            group = _print_live(client, prompt, options)
        else:
            group = client.generate(prompt, **options)
            for sample in group:
                print(f"--- sample {sample.index} ({sample.finish_reason})\n{sample.text}")
    print(_usage_line(group), file=sys.stderr)
    return 0


def run_chat(args: argparse.Namespace) -> int:
    messages = [{"role": "system", "content": args.system}] if args.system else []
    with Client(args.address) as client:
        print(f"{client.model().name}; an empty line or end of file ends.", file=sys.stderr)
        while True:
            try:
                text = input("> ")
            except EOFError:
                return 0
            if not text.strip():
                return 0
            messages.append({"role": "user", "content": text})
            group = _print_live(client, messages, _sampling(args))
            print(_usage_line(group), file=sys.stderr)
            messages.append({"role": "assistant", "content": group.samples[0].text})
