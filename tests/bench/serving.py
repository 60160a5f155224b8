#!/usr/bin/env python3
"""Tokens a second through the real daemon and gRPC: groups of samples over prompts of random token ids, all sent at once.

Starts coppiced, warms it up, then drives it from several client processes, and prints one JSON object with the keys of
coppice_bench. `seconds` is from the first request sent to the last token received. shape.gpu_busy is the share of that time in
which NVML saw a kernel run (mean of its samples), shape.run_share the share of the engine's steps spent on building, queueing
and awaiting device work. Needs the package `coppice` (tests/make_venv.sh), and nvidia-ml-py for gpu_busy.

Usage: serving.py COPPICED [--device cuda] [--geometry qwen3-4b] [--groups 64] [--n 8] [--prompt 1000] [--response 256] [--flag=...]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import pathlib
import random
import subprocess
import tempfile
import threading
import time
import urllib.request

import coppice

READY_TIMEOUT_S = 300


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coppiced", help="the daemon's binary")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--geometry", default="qwen3-4b")
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--commit", default="unknown", help="of the daemon, for the record")
    parser.add_argument("--flag", action="append", default=[], help="one more flag of the daemon, e.g. --flag=--kv_bytes=8GiB")
    return parser.parse_args()


@contextlib.contextmanager
def serving(args: argparse.Namespace):
    """Address of the daemon and URL of its metrics."""
    with tempfile.TemporaryDirectory() as directory:
        ports = pathlib.Path(directory, "ports.json")
        flags = [
            f"--device={args.device}", f"--model_geometry={args.geometry}", "--port=0", "--http_port=0", f"--port_file={ports}",
            f"--max_running_samples={args.groups * args.n}", f"--max_batch_rows={max(4096, args.groups * args.n)}",
            f"--max_context={args.prompt + args.response + 16}", *args.flag,
        ]
        with subprocess.Popen([args.coppiced, *flags]) as daemon:
            try:
                deadline = time.monotonic() + READY_TIMEOUT_S
                while not ports.exists():
                    if daemon.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError("coppiced did not become ready")
                    time.sleep(0.1)
                found = json.loads(ports.read_text())
                yield f"127.0.0.1:{found['grpc']}", f"http://127.0.0.1:{found['http']}/metrics"
            finally:
                daemon.terminate()


def prompts_of(args: argparse.Namespace, seed: int, groups: range, vocab: int) -> list[list[int]]:
    prompts = []
    for group in groups:
        rng = random.Random(seed * 1_000_003 + group)
        prompts.append([rng.randrange(vocab) for _ in range(args.prompt)])
    return prompts


def client_process(address, args, seed, groups, response, start, results) -> None:
    """Its share of the groups, sent once all processes are ready."""
    with coppice.Client(address, timeout=600) as client:
        prompts = prompts_of(args, seed, groups, client.model().vocab_size)
        start.wait()
        done = client.generate_many(
            prompts, n=args.n, max_tokens=response, ignore_eos=True, return_text=False, seed=seed
        )
        end = time.monotonic()
        results.put((end, sum(len(sample.token_ids) for group in done for sample in group)))


def drive(address: str, args: argparse.Namespace, seed: int, response: int, busy: BusySampler | None = None) -> tuple[float, int]:
    """Seconds and tokens of one load; `busy` runs from the first request sent to the last token received."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(args.processes + 1), context.Queue()
    shares = [range(i, args.groups, args.processes) for i in range(args.processes)]
    processes = [
        context.Process(target=client_process, args=(address, args, seed, share, response, start, results))
        for share in shares
    ]
    for process in processes:
        process.start()
    start.wait()
    begin = time.monotonic()
    with busy or contextlib.nullcontext():
        found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return max(end for end, _ in found) - begin, sum(tokens for _, tokens in found)


class BusySampler:
    """Mean of NVML's utilization while it runs; None without NVML."""

    def __init__(self) -> None:
        self._samples: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "BusySampler":
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._stop.set()
        self._thread.join()

    def share(self) -> float | None:
        return round(sum(self._samples) / len(self._samples) / 100, 3) if self._samples else None

    def _run(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            device = pynvml.nvmlDeviceGetHandleByIndex(0)
        except Exception:  # no library or no driver: no samples
            return
        while not self._stop.wait(0.05):
            self._samples.append(pynvml.nvmlDeviceGetUtilizationRates(device).gpu)


def scrape(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def main() -> None:
    args = arguments()
    with serving(args) as (address, metrics_url):
        drive(address, args, seed=1, response=8)
        before = scrape(metrics_url)
        sampler = BusySampler()
        seconds, tokens = drive(address, args, seed=2, response=args.response, busy=sampler)
        after = scrape(metrics_url)
        with coppice.Client(address) as client:
            device = client.status().device

    def spent(name: str) -> float:
        return after[name] - before[name]

    steps = spent("coppice_engine_step_seconds_count")
    step_seconds = spent("coppice_engine_step_seconds_sum")
    print(json.dumps({
        "bench": "serving",
        "shape": {
            "geometry": args.geometry, "groups": args.groups, "group": args.n, "prompt": args.prompt, "response": args.response,
            "tokens_per_second": round(tokens / seconds, 1), "gpu_busy": sampler.share(), "steps": steps,
            "step_ms": round(1e3 * step_seconds / steps, 3),
            "run_share": round(spent("coppice_engine_run_seconds_sum") / step_seconds, 3),
            "flags": args.flag,
        },
        "seconds": round(seconds, 3), "bound_seconds": None, "bound": None, "ratio": None, "peer": None, "peer_seconds": None,
        "device": device, "commit": args.commit,
    }))


if __name__ == "__main__":
    main()
