#!/usr/bin/env python3
"""Reward curves of `coppice train-demo` runs side by side: a PNG, and one JSON object a step and run for the record.

Each run is NAME=SUMMARY, the file that `train-demo --summary` wrote. The second panel shows the mean |log-prob gap| between sampler
and update of each step, where both used the same weights. Needs matplotlib.

Usage: training_curve.py cuda=cuda.json cpu=cpu.json --png curve.png --jsonl curve.jsonl
"""

from __future__ import annotations

import argparse
import json
import pathlib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=SUMMARY")
    parser.add_argument("--png", required=True)
    parser.add_argument("--jsonl", required=True)
    args = parser.parse_args()
    runs = {}
    for run in args.runs:
        name, path = run.split("=", 1)
        runs[name] = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["steps"]

    with open(args.jsonl, "w", encoding="utf-8") as file:
        for name, steps in runs.items():
            for step in steps:
                file.write(json.dumps({"run": name, **step}) + "\n")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rewards, gaps) = pyplot.subplots(2, 1, figsize=(7, 6), layout="constrained", sharex=True)
    for name, steps in runs.items():
        numbers = [step["step"] + 1 for step in steps]
        rewards.plot(numbers, [step["reward"] for step in steps], marker=".", label=name)
        gaps.semilogy(numbers, [max(step["gap"], 1e-9) for step in steps], marker=".", label=name)
    rewards.set(ylabel="mean reward", ylim=(0, 1.05), title="GRPO on number-reversal, SmolLM2-135M, same seeds")
    gaps.set(xlabel="step", ylabel="mean |log-prob gap|, nats")
    for axes in (rewards, gaps):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(args.png, dpi=110)


if __name__ == "__main__":
    main()
