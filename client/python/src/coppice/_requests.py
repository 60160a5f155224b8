"""Python values to coppice.v1 requests, for the blocking and the asyncio client alike. No I/O.

An option that was not given stays absent, so that the daemon's default holds.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

from google.protobuf import duration_pb2

from coppice import options, types
from coppice.errors import InvalidArgumentError
from coppice.v1 import generation_pb2, training_pb2, types_pb2


def _enum(wrapper: Any, prefix: str, name: str, field: str) -> Any:
    """The enum value `prefix + NAME`; InvalidArgumentError lists the choices otherwise."""
    try:
        return wrapper.Value(prefix + name.upper())
    except ValueError:
        names = [key[len(prefix) :].lower() for key in wrapper.keys()]
        choices = ", ".join(key for key in names if not key.endswith("unspecified"))
        raise InvalidArgumentError(f"{field}: want one of {choices}, got {name!r}") from None


def _seconds(value: float) -> duration_pb2.Duration:
    nanos = round(value * 1e9)
    return duration_pb2.Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)


def check_timeout(timeout: float | None) -> None:
    if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
        raise InvalidArgumentError(f"timeout: want finite seconds above 0, got {timeout}")


def _prompt(ids_or_text: str | Sequence[int]) -> types_pb2.Prompt:
    if isinstance(ids_or_text, str):
        return types_pb2.Prompt(text=ids_or_text)
    return types_pb2.Prompt(tokens=types_pb2.TokenIds(ids=ids_or_text))


def is_messages(value: types.Prompt) -> bool:
    return not isinstance(value, str) and len(value) > 0 and isinstance(value[0], Mapping)


def _cache_control(cache: types.Cache | None) -> types_pb2.CacheControl | None:
    if cache is None:
        return None
    control = types_pb2.CacheControl(
        skip_read=cache.skip_read, skip_write=cache.skip_write, key=cache.key
    )
    if cache.priority is not None:
        control.priority = cache.priority
    if cache.ttl is not None:
        control.ttl.CopyFrom(_seconds(cache.ttl))
    return control


def generate_request(
    ids_or_text: str | Sequence[int],
    *,
    n: int = 1,
    max_tokens: int = 128,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    logit_bias: Mapping[int, float] | None = None,
    logprobs: types.LogprobKind = "none",
    top_logprobs: int = 0,
    retain: bool = False,
    return_text: bool = True,
    explain: bool = False,
    cache: types.Cache | None = None,
    request_id: str = "",
    session_id: str = "",
    priority: int = 0,
    timeout: float | None = None,
) -> generation_pb2.GenerateRequest:
    """`timeout` travels beside the request; here it is only checked, as in the builders below."""
    check_timeout(timeout)
    return generation_pb2.GenerateRequest(
        request_id=request_id,
        prompt=_prompt(ids_or_text),
        n=n,
        sampling=generation_pb2.SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            max_tokens=max_tokens,
            stop_token_ids=stop_token_ids,
            stop_strings=[stop] if isinstance(stop, str) else stop,
            ignore_eos=ignore_eos,
            logit_bias=logit_bias,
        ),
        logprobs=_enum(generation_pb2.LogprobMode, "LOGPROB_MODE_", logprobs, "logprobs"),
        top_logprobs=top_logprobs,
        cache=_cache_control(cache),
        session_id=session_id,
        priority=priority,
        retain=retain,
        return_text=return_text,
        explain_placement=explain,
    )


def _adam_params(lr: float, adam: types.Adam | None) -> training_pb2.AdamParams:
    adam = adam or types.Adam()
    return training_pb2.AdamParams(
        learning_rate=lr,
        beta1=adam.beta1,
        beta2=adam.beta2,
        eps=adam.eps,
        weight_decay=adam.weight_decay,
        grad_clip_norm=adam.grad_clip_norm,
    )


def _loss_config(loss: types.LossKind | types.Loss) -> training_pb2.LossConfig:
    loss = loss if isinstance(loss, types.Loss) else types.Loss(kind=loss)
    config = training_pb2.LossConfig(
        kind=_enum(training_pb2.LossConfig.Kind, "", loss.kind, "loss"),
        clip=training_pb2.Clip(low=loss.clip_low, high=loss.clip_high, dual=loss.clip_dual),
        entropy_coef=loss.entropy_coef,
        temperature=loss.temperature,
        denominator=loss.denominator,
        importance_cap=loss.importance_cap,
    )
    if loss.kl is not None or loss.kl_coef:
        config.kl.coef = loss.kl_coef
        if loss.kl is not None:
            config.kl.estimator = _enum(training_pb2.Kl.Estimator, "", loss.kl, "kl")
    if loss.advantage is not None:
        config.advantage = _enum(training_pb2.LossConfig.Advantage, "", loss.advantage, "advantage")
    if loss.aggregation is not None:
        config.aggregation = _enum(
            training_pb2.LossConfig.Aggregation, "", loss.aggregation, "aggregation"
        )
    return config


def running_requests(name: types.RunningRequests) -> Any:
    return _enum(types_pb2.RunningRequests, "RUNNING_REQUESTS_", name, "running")


def _as_train_group(group: types.Group | types.TrainGroup) -> types.TrainGroup:
    """A generated group by its rollout if it was kept, else by its tokens."""
    if isinstance(group, types.TrainGroup):
        return group
    if group.rollout_id:
        kept = [types.TrainSample(rollout_sample=sample.index) for sample in group.samples]
        return types.TrainGroup(samples=kept, rollout_id=group.rollout_id)
    if not group.prompt_token_ids:
        raise InvalidArgumentError(
            "train_step failed: a group has no prompt tokens; generate it with retain=True"
        )
    use_logprobs = group.logprob_kind == "as_sampled"
    return types.TrainGroup(
        prompt=group.prompt_token_ids,
        samples=[
            types.TrainSample(
                token_ids=s.token_ids, sampler_logprobs=s.logprobs if use_logprobs else None
            )
            for s in group.samples
        ],
    )


def _train_sample(
    sample: types.TrainSample, reward: float | None, advantages: Sequence[float] | float | None
) -> training_pb2.Sample:
    reward = sample.reward if reward is None else reward
    advantages = sample.advantages if advantages is None else advantages
    if isinstance(advantages, (int, float)):
        advantages = [advantages]
    message = training_pb2.Sample(
        advantages=advantages,
        reward=reward,
        old_logprobs=sample.old_logprobs,
        sampler_logprobs=sample.sampler_logprobs,
        ref_logprobs=sample.ref_logprobs,
        loss_mask=sample.loss_mask,
        weight=sample.weight,
    )
    if sample.token_ids is not None:
        message.token_ids.ids.extend(sample.token_ids)
    elif sample.rollout_sample is not None:
        message.rollout_sample = sample.rollout_sample
    return message


def _check_nested(
    name: str, groups: Sequence[types.TrainGroup], values: Sequence[Sequence[Any]] | None
) -> None:
    if values is None:
        return
    want, got = [len(group.samples) for group in groups], [len(row) for row in values]
    if want != got:
        raise InvalidArgumentError(
            f"{name}: want one row per group with one value per sample {want}, got {got}"
        )


def _train_groups(
    groups: Sequence[types.Group | types.TrainGroup],
    rewards: Sequence[Sequence[float]] | None,
    advantages: Sequence[Sequence[Sequence[float] | float]] | None,
) -> list[training_pb2.Group]:
    """The groups with `rewards[g][i]` or `advantages[g][i]` laid over what the samples carry
    themselves."""
    native = [_as_train_group(group) for group in groups]
    _check_nested("rewards", native, rewards)
    _check_nested("advantages", native, advantages)
    out = []
    for g, group in enumerate(native):
        message = training_pb2.Group()
        if group.rollout_id:
            message.rollout_id = group.rollout_id
        elif group.prompt is not None:
            message.prompt.ids.extend(group.prompt)
        for i, sample in enumerate(group.samples):
            reward = None if rewards is None else float(rewards[g][i])
            message.samples.append(
                _train_sample(sample, reward, None if advantages is None else advantages[g][i])
            )
        out.append(message)
    return out


def score_request(
    groups: Iterable[tuple[Sequence[int], Sequence[Sequence[int]]]], temperature: float | None
) -> generation_pb2.ScoreRequest:
    return generation_pb2.ScoreRequest(
        groups=[
            generation_pb2.ScoreGroup(
                prompt=types_pb2.TokenIds(ids=prompt_ids),
                responses=[types_pb2.TokenIds(ids=response) for response in responses],
            )
            for prompt_ids, responses in groups
        ],
        temperature=temperature,
    )


def options_per_prompt(
    shared: options.GenerateOptions, num_prompts: int
) -> list[options.GenerateOptions]:
    """The options of each call of generate_many: prompt i draws from seed + i."""
    each = [shared.copy() for _ in range(num_prompts)]
    seed = shared.get("seed")
    if seed is not None:
        for i, one in enumerate(each):
            one["seed"] = seed + i
    return each


def _new_step_id() -> str:
    return f"step-{uuid.uuid4()}"


def forward_backward_request(
    groups: Sequence[types.Group | types.TrainGroup],
    rewards: Sequence[Sequence[float]] | None,
    *,
    advantages: Sequence[Sequence[Sequence[float] | float]] | None = None,
    loss: types.LossKind | types.Loss = "grpo",
    step_id: str | None = None,
    running: types.RunningRequests = "drain",
    expected_policy_version: int | None = None,
    max_policy_lag: int = 0,
    return_logprobs: bool = False,
    timeout: float | None = None,
) -> training_pb2.ForwardBackwardRequest:
    check_timeout(timeout)
    return training_pb2.ForwardBackwardRequest(
        step_id=step_id or _new_step_id(),
        groups=_train_groups(groups, rewards, advantages),
        loss=_loss_config(loss),
        running=running_requests(running),
        expected_policy_version=expected_policy_version,
        max_policy_lag=max_policy_lag,
        return_logprobs=return_logprobs,
    )


def optim_step_request(
    lr: float,
    *,
    adam: types.Adam | None = None,
    step_id: str | None = None,
    running: types.RunningRequests = "drain",
    durable: bool = False,
    expected_policy_version: int | None = None,
    timeout: float | None = None,
) -> training_pb2.OptimStepRequest:
    check_timeout(timeout)
    return training_pb2.OptimStepRequest(
        step_id=step_id or _new_step_id(),
        optim=_adam_params(lr, adam),
        running=running_requests(running),
        durable=durable,
        expected_policy_version=expected_policy_version,
    )


def train_step_request(
    groups: Sequence[types.Group | types.TrainGroup],
    rewards: Sequence[Sequence[float]] | None,
    lr: float,
    *,
    adam: types.Adam | None = None,
    durable: bool = False,
    **batch: Unpack[options.BatchOptions],
) -> training_pb2.TrainStepRequest:
    half = forward_backward_request(groups, rewards, **batch)
    return training_pb2.TrainStepRequest(
        step_id=half.step_id,
        groups=half.groups,
        loss=half.loss,
        optim=_adam_params(lr, adam),
        running=half.running,
        durable=durable,
        expected_policy_version=(
            half.expected_policy_version if half.HasField("expected_policy_version") else None
        ),
        max_policy_lag=half.max_policy_lag,
        return_logprobs=half.return_logprobs,
    )


def warm_request(
    ids_or_text: str | Sequence[int], cache: types.Cache | None, request_id: str, session_id: str
) -> generation_pb2.WarmRequest:
    return generation_pb2.WarmRequest(
        prompt=_prompt(ids_or_text),
        cache=_cache_control(cache),
        request_id=request_id,
        session_id=session_id,
    )
