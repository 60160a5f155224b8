"""`coppice train-demo`: a GRPO loop on a verifiable task, from an empty cache to a reward curve."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import time
import urllib.request
from collections.abc import Sequence
from typing import Any

from coppice import types
from coppice.cli.plot import plot_rewards
from coppice.cli.tasks import TASKS, Question, Task
from coppice.client import Client

MIN_STEPS_TO_JUDGE = 6  # first three against last three


def add_commands(commands: Any, where: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "train-demo",
        parents=[where],
        help="train the model on a verifiable task with GRPO",
        description="Train the model on a verifiable task with GRPO, and show what sharing the "
        "prompt saves. Fails unless the reward rises.",
    )
    add = parser.add_argument
    add("--task", choices=sorted(TASKS), default="number-reversal", help="default %(default)s")
    add("--steps", type=int, default=12, help="rounds of the loop (default %(default)s)")
    add("--updates", type=int, default=2, help="policy updates a step (default %(default)s)")
    add("--prompts", type=int, default=6, help="questions a step (default %(default)s)")
    add("--n", type=int, default=8, help="samples a question (default %(default)s)")
    add("--max-tokens", type=int, default=16, help="of a reply (default %(default)s)")
    add("--lr", type=float, default=2e-5, help="learning rate (default %(default)s)")
    add("--warmup", type=int, default=3, help="steps of linear warm-up (default %(default)s)")
    add("--seed", type=int, default=0, help="of questions and samples (default %(default)s)")
    add("--metrics-url", help="the daemon's /metrics; default: from --port-file, else not read")
    add("--plot", metavar="PNG", help="write the reward curve here")
    add("--summary", metavar="JSON", help="write every step's numbers here")
    parser.set_defaults(run=run)


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One line of the demo."""

    step: int
    reward: float  # mean over all samples
    exact: float  # share of samples with reward 1
    loss: float
    kl: float  # nats a token, k3 against the policy that drew the samples
    clip: float  # share of tokens whose ratio was clipped
    grad_norm: float
    gap: float  # nats a token: |log-prob of the update - of the sampler|, where both are one policy
    prompt_tokens: int
    cached_tokens: int  # prompt tokens that were not computed: from the cache, or joined in flight
    tokens_run: int
    tokens_flat: int
    seconds: dict[str, float]  # by phase
    policy_version: int


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# The KL against the policy that drew the samples is measured, not optimized.
LOSS = types.Loss(kind="grpo", kl="k3", kl_coef=0.0)


def train_group(group: types.Group, rewards: Sequence[float]) -> types.TrainGroup:
    """The kept rollout with its rewards; the daemon knows the log-probs that it was drawn with."""
    return types.TrainGroup(
        rollout_id=group.rollout_id,
        samples=[
            types.TrainSample(
                rollout_sample=sample.index,
                reward=reward,
                ref_logprobs=sample.logprobs,
            )
            for sample, reward in zip(group, rewards, strict=True)
        ],
    )


def logprob_gap(groups: Sequence[types.Group], update: types.TrainResult) -> float:
    """Mean |log-prob of the update - of the sampler| over the tokens that `update` trained first:
    both were computed with the same weights, so only rounding is left."""
    drawn = [logprob for group in groups for sample in group for logprob in sample.logprobs]
    trained = [logprob for sample in update.samples for logprob in sample.logprobs]
    return mean([abs(a - b) for a, b in zip(trained, drawn[: len(trained)], strict=True)])


def make_record(
    step: int,
    groups: Sequence[types.Group],
    rewards: Sequence[Sequence[float]],
    updates: Sequence[types.TrainResult],
    generate_seconds: float,
) -> StepRecord:
    """Means over samples and updates; sums of tokens and seconds."""
    flat = [reward for row in rewards for reward in row]
    seconds = {"generate": generate_seconds}
    for update in updates:
        for phase, spent in update.phases.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent

    def metric(*names: str) -> float:
        return mean([sum(update.metrics.get(name, 0.0) for name in names) for update in updates])

    return StepRecord(
        step=step,
        reward=mean(flat),
        exact=mean([float(reward == 1.0) for reward in flat]),
        loss=mean([update.loss for update in updates]),
        kl=metric("kl"),
        clip=metric("clip_low", "clip_high"),
        grad_norm=mean([update.grad_norm for update in updates]),
        gap=logprob_gap(groups, updates[0]),
        prompt_tokens=sum(group.usage.prompt_tokens for group in groups),
        cached_tokens=sum(g.usage.cached_tokens + g.usage.joined_tokens for g in groups),
        tokens_run=sum(update.tokens.unique for update in updates),
        tokens_flat=sum(update.tokens.flat for update in updates),
        seconds=seconds,
        policy_version=updates[-1].policy_version,
    )


class Demo:
    """Draws questions, generates, grades, trains."""

    def __init__(self, client: Client, task: Task, args: argparse.Namespace) -> None:
        self._client = client
        self._task = task
        self._args = args
        self._rng = random.Random(args.seed)

    def step(self, step: int) -> StepRecord:
        """One round: generate with the current policy, grade, then update it in mini-batches."""
        args = self._args
        questions = [self._task.draw(self._rng) for _ in range(args.prompts)]
        begin = time.monotonic()
        groups = self._client.generate_many(
            [question.messages for question in questions],
            n=args.n,
            max_tokens=args.max_tokens,
            seed=self._rng.getrandbits(48),
            logprobs="as_sampled",
            retain=True,
        )
        generate_seconds = time.monotonic() - begin
        rewards = [
            [self._task.reward(question, sample.text) for sample in group]
            for question, group in zip(questions, groups, strict=True)
        ]
        lr = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
        updates = self._update(groups, rewards, lr)
        return make_record(step, groups, rewards, updates, generate_seconds)

    def _update(
        self, groups: Sequence[types.Group], rewards: Sequence[Sequence[float]], lr: float
    ) -> list[types.TrainResult]:
        """One train step per mini-batch; from the second on, another policy drew the samples."""
        batch = [train_group(group, row) for group, row in zip(groups, rewards, strict=True)]
        size = -(-len(batch) // self._args.updates)  # ceiling
        results = []
        for begin in range(0, len(batch), size):
            result = self._client.train_step(
                batch[begin : begin + size],
                loss=LOSS,
                lr=lr,
                max_policy_lag=self._args.updates - 1,
                return_logprobs=True,
            )
            if result.skipped:
                raise RuntimeError(
                    f"train-demo failed: an update was skipped: {result.skip_reason}"
                )
            results.append(result)
        return results

    def show(self, label: str, question: Question) -> None:
        """One greedy completion."""
        group = self._client.generate(
            question.messages, temperature=0.0, max_tokens=self._args.max_tokens
        )
        reply = group.samples[0].text
        asked = question.messages[-1]["content"]
        print(
            f"{label} (policy {group.policy_version}): {asked!r} -> {reply!r}, "
            f"reward {self._task.reward(question, reply):.2f}, want {question.answer!r}"
        )


def format_line(record: StepRecord, num_steps: int) -> str:
    phases = " ".join(f"{name} {seconds:.2f}" for name, seconds in record.seconds.items())
    return (
        f"step {record.step + 1:2d}/{num_steps} reward {record.reward:.3f} "
        f"exact {record.exact:.2f} loss {record.loss:+.4f} kl {record.kl:.5f} "
        f"clip {record.clip:.3f} grad {record.grad_norm:.2f} gap {record.gap:.1e} "
        f"| cached {record.cached_tokens}/{record.prompt_tokens} prompt tokens "
        f"| run/flat {record.tokens_run}/{record.tokens_flat} | s: {phases}"
    )


def scrape_hit_rate(url: str) -> float:
    """Prompt tokens that came from the cache or from a prefill in flight / prompt tokens queried,
    from /metrics."""
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()

    def total(name: str) -> float:
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        if not found:
            raise RuntimeError(f"reading {url} failed: no metric {name}")
        return sum(float(value) for value in found)

    queried = total("coppice_prompt_tokens_total")
    hit = total("coppice_prompt_tokens_hit_total") + total("coppice_prompt_tokens_joined_total")
    return hit / queried if queried else 0.0


def metrics_url(args: argparse.Namespace) -> str | None:
    if args.metrics_url:
        return str(args.metrics_url)
    if not args.port_file:
        return None
    with open(args.port_file, encoding="utf-8") as file:
        return f"http://127.0.0.1:{json.load(file)['http']}/metrics"


def report(records: Sequence[StepRecord], args: argparse.Namespace) -> int:
    """Hit rate, files, and the last line; 1 if the reward did not rise."""
    first = mean([record.reward for record in records[:3]])
    last = mean([record.reward for record in records[-3:]])
    url = metrics_url(args)
    hit_rate = scrape_hit_rate(url) if url else None
    if url:
        print(f"hit rate from {url}: {hit_rate:.3f}")
    dedup = sum(r.tokens_flat for r in records) / sum(r.tokens_run for r in records)
    summary = {
        "reward_first": round(first, 4),
        "reward_last": round(last, 4),
        "cached_tokens": sum(record.cached_tokens for record in records),
        "hit_rate": None if hit_rate is None else round(hit_rate, 4),
        "dedup": round(dedup, 2),
    }
    if args.plot:
        rewards, exact = [r.reward for r in records], [r.exact for r in records]
        plot_rewards(f"GRPO on {args.task}", rewards, exact, args.plot)
        print(f"reward curve: {args.plot}")
    if args.summary:
        with open(args.summary, "w", encoding="utf-8") as file:
            json.dump({**summary, "steps": [dataclasses.asdict(r) for r in records]}, file)
    print(" ".join(f"{name}={value}" for name, value in summary.items()))
    if len(records) >= MIN_STEPS_TO_JUDGE and last <= first:
        raise RuntimeError(
            f"train-demo failed: want the mean reward of the last 3 steps above {first:.3f}, that "
            f"of the first 3, got {last:.3f}; try more --steps"
        )
    return 0


def run(args: argparse.Namespace) -> int:
    # Only this command needs the demo extra.
    from tqdm import tqdm

    task = TASKS[args.task]
    held_out = task.draw(random.Random("held out"))
    records: list[StepRecord] = []
    if min(args.steps, args.updates, args.prompts) < 1:
        raise ValueError("train-demo failed: want --steps, --updates and --prompts of at least 1")
    with Client(args.address, timeout=600) as client:
        demo = Demo(client, task, args)
        demo.show("before", held_out)
        with tqdm(total=args.steps, unit="step", desc=args.task) as bar:
            for step in range(args.steps):
                records.append(demo.step(step))
                bar.update()
                tqdm.write(format_line(records[-1], args.steps))
        demo.show("after", held_out)
    return report(records, args)
