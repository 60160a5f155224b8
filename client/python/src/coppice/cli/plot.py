"""The reward curve as a PNG."""

from __future__ import annotations

from collections.abc import Sequence


def plot_rewards(title: str, rewards: Sequence[float], exact: Sequence[float], path: str) -> None:
    """Writes mean reward and share of exact answers per step to `path`; needs the `demo` extra."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = range(1, len(rewards) + 1)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, rewards, marker="o", label="mean reward")
    axes.plot(steps, exact, marker=".", linestyle="--", label="exact answers")
    axes.set(xlabel="step", ylabel="per sample, 0 to 1", ylim=(0, 1.05), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
