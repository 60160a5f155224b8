"""Keyword options of the calls that the blocking and the asyncio client share; defaults and meaning
in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from coppice import types


class GenerateOptions(TypedDict, total=False):
    """Options of generate, generate_stream and generate_many."""

    n: int  # samples that share the prompt, 1 to Status.limits["max_group_size"]; default 1
    max_tokens: int  # per sample, above 0; default 128
    temperature: float | None  # 0 = greedy; default 1
    top_k: (
        int | None
    )  # truncation, in the order top_k, top_p, min_p after the temperature; default off
    top_p: float | None
    min_p: float | None
    seed: (
        int | None
    )  # sample i draws from (seed, i, position); default drawn by the daemon, see Group.seed
    stop: str | Sequence[str]  # a sample ends with the token that completes one; at most 16
    stop_token_ids: Sequence[int]  # besides the model's own end tokens; at most 64
    ignore_eos: bool  # the model's own end tokens do not stop
    logit_bias: Mapping[int, float] | None  # token id -> bias added to its logit
    logprobs: types.LogprobKind  # default "none"
    top_logprobs: int  # alternatives per token, 0 to 20; needs `logprobs`
    retain: bool  # keep the group in the daemon as a rollout, so that train_step needs rewards only
    return_text: bool  # fill Sample.text; default True, needs a tokenizer
    explain: bool  # fill Group.placement: where a router sent the call, and why
    cache: types.Cache | None
    request_id: str  # for `abort` and the logs
    session_id: str  # for `abort`
    priority: int  # higher first, -1000 to 1000
    timeout: float | None  # seconds


class BatchOptions(TypedDict, total=False):
    """Options of forward_backward."""

    advantages: (
        Sequence[Sequence[Sequence[float] | float]] | None
    )  # [groups][samples], one number or [tokens]
    loss: types.LossKind | types.Loss  # a kind, or a Loss with its knobs; default "grpo"
    step_id: (
        str | None
    )  # unique; a repeat returns the first answer and changes nothing; default drawn
    running: types.RunningRequests  # what happens to requests that are generating; default "drain"
    expected_policy_version: int | None  # FailedPreconditionError if it differs
    max_policy_lag: (
        int  # rollouts older than this many versions are refused; 0 = strictly on-policy
    )
    return_logprobs: bool  # fill TrainResult.samples[i].logprobs
    timeout: float | None  # seconds


class TrainOptions(BatchOptions, total=False):
    """Options of train_step."""

    adam: types.Adam | None  # betas, eps, weight decay, gradient clipping
    durable: bool  # answer only after the step is on disk


class OptimOptions(TypedDict, total=False):
    """Options of optim_step."""

    adam: types.Adam | None
    step_id: str | None
    running: types.RunningRequests
    durable: bool
    expected_policy_version: int | None
    timeout: float | None
