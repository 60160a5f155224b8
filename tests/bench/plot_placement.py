#!/usr/bin/env python3
"""Draws and tabulates what placement_sim or fleet_replay printed. Usage: plot_placement.py LINES.jsonl OUT.png; prints a markdown table."""
import json
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

LABELS = {("placement_sim", "rl"): "RL: 8 steps of 64 groups x 8 samples, 3 turns",
          ("placement_sim", "mooncake"): "Mooncake conversation trace, 1 hour",
          ("fleet_replay", "rl"): "Real daemons, RL: 64 groups x 8 samples, 3 turns",
          ("fleet_replay", "mooncake"): "Real daemons, Mooncake trace, lengths divided"}
OURS = ("placement", "router")


def main():
    lines = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
    rows = [line for line in lines if line["bench"] in ("placement_sim", "fleet_replay")]
    loads = list(dict.fromkeys(row["load"] for row in rows))
    print("| load | policy | cached / prompt | of perfect affinity | work max/mean | open max/mean | first token mean, p99 s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        first_token = f"{row['ttft_mean_s']:.2f}, {row['ttft_p99_s']:.1f}" if "ttft_mean_s" in row else "-"
        print(f"| {row['load']} | {row['policy']} | {row['hit_rate']:.3f} | {row['of_perfect_affinity']:.3f} "
              f"| {row['load_max_over_mean']:.3f} | {row['open_load_max_over_mean']:.2f} | {first_token} |")
    figure, axes = pyplot.subplots(2, len(loads), figsize=(5.5 * len(loads), 6), layout="constrained", squeeze=False)
    for column, load in enumerate(loads):
        of_load = [row for row in rows if row["load"] == load]
        names = [row["policy"].replace("_", "\n") for row in of_load]
        colors = ["tab:green" if row["policy"] in OURS else "tab:gray" for row in of_load]
        for axis, key, limit, label in ((axes[0][column], "of_perfect_affinity", 0.95, "cached tokens / perfect affinity"),
                                        (axes[1][column], "load_max_over_mean", 1.25, "load, max / mean of 4 replicas")):
            axis.bar(names, [row[key] for row in of_load], color=colors)
            axis.axhline(limit, color="tab:red", linestyle="--", linewidth=1)
            axis.tick_params(axis="x", labelsize=7)
            axis.set_ylabel(label)
        axes[0][column].set_title(LABELS.get((of_load[0]["bench"], load), load))
    figure.savefig(sys.argv[2], dpi=110)


main()
