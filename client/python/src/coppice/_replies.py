"""coppice.v1 replies to Python values, for the blocking and the asyncio client alike. No I/O."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, cast

from coppice import types
from coppice.v1 import admin_pb2, cache_pb2, generation_pb2, training_pb2, types_pb2


def _enum_name(wrapper: Any, prefix: str, value: int) -> str:
    return str(wrapper.Name(value))[len(prefix) :].lower()


def usage(message: types_pb2.Usage) -> types.Usage:
    tiers = {
        "device": message.cached_device_tokens,
        "host": message.cached_host_tokens,
        "disk": message.cached_disk_tokens,
        "remote": message.cached_remote_tokens,
    }
    reason = _enum_name(types_pb2.MissReason, "MISS_REASON_", message.miss_reason)
    return types.Usage(
        prompt_tokens=message.prompt_tokens,
        cached_tokens=sum(tiers.values()),
        cached_by_tier=tiers,
        joined_tokens=message.joined_tokens,
        computed_tokens=message.computed_tokens,
        written_tokens=message.written_tokens,
        miss_reason="" if reason == "unspecified" else reason,
        completion_tokens=message.completion_tokens,
    )


def _chunk(message: generation_pb2.TokenChunk) -> types.Chunk:
    return types.Chunk(
        sample=message.sample,
        token_ids=list(message.token_ids),
        logprobs=list(message.logprobs),
        text=message.text,
        policy_version=message.policy_version,
        top_logprobs=[
            dict(zip(top.token_ids, top.logprobs, strict=True)) for top in message.top_logprobs
        ],
    )


def _placement(message: generation_pb2.Placement) -> types.Placement:
    reason = _enum_name(generation_pb2.Placement.Reason, "", message.reason)
    return types.Placement(
        replica=message.replica,
        reason=cast(types.PlacementReason, reason),
        home=message.home,
        prefix_hash=message.prefix_hash,
        predicted_hit_tokens=message.predicted_hit_tokens,
        load=message.load,
        charge=message.charge,
        attempts=message.attempts,
    )


def event(message: generation_pb2.GenerateEvent) -> types.Event | None:
    """None for an event kind that this client does not know."""
    kind = message.WhichOneof("event")
    if kind == "started":
        started = message.started
        return types.Started(
            seed=started.seed,
            prompt_usage=usage(started.prompt_usage),
            policy_version=started.policy_version,
            prompt_token_ids=list(started.prompt_token_ids),
        )
    if kind == "chunk":
        return _chunk(message.chunk)
    if kind == "finished":
        reason = _enum_name(generation_pb2.FinishReason, "FINISH_REASON_", message.finished.reason)
        return types.Finished(
            sample=message.finished.sample,
            reason=cast(types.FinishReason, reason),
            num_tokens=message.finished.num_tokens,
        )
    if kind == "group":
        group = message.group
        placement = _placement(group.placement) if group.HasField("placement") else None
        return types.GroupFinished(
            usage(group.usage), group.rollout_id, group.policy_version, placement
        )
    return None


class GroupBuilder:
    """Folds the events of one Generate call into a Group."""

    def __init__(self, request: generation_pb2.GenerateRequest) -> None:
        kind = _enum_name(generation_pb2.LogprobMode, "LOGPROB_MODE_", request.logprobs)
        self.group = types.Group(
            prompt_token_ids=list(request.prompt.tokens.ids),
            samples=[types.Sample(index=i) for i in range(request.n)],
            logprob_kind=cast(types.LogprobKind, kind),
        )

    def add(self, item: types.Event) -> None:
        group = self.group
        if isinstance(item, types.Started):
            group.seed = item.seed
            group.usage = item.prompt_usage
            group.policy_version = item.policy_version
            if item.prompt_token_ids:
                group.prompt_token_ids = item.prompt_token_ids
        elif isinstance(item, types.Chunk):
            sample = group.samples[item.sample]
            sample.token_ids += item.token_ids
            sample.logprobs += item.logprobs
            sample.top_logprobs += item.top_logprobs
            sample.text += item.text
            sample.policy_versions += [item.policy_version] * len(item.token_ids)
        elif isinstance(item, types.Finished):
            group.samples[item.sample].finish_reason = item.reason
        else:
            group.usage = item.usage
            group.rollout_id = item.rollout_id
            group.placement = item.placement
            group.policy_version = item.policy_version


def _phases(phases: Iterable[training_pb2.PhaseSeconds]) -> dict[str, float]:
    return {phase.phase: phase.seconds for phase in phases}


def train_result(
    message: training_pb2.TrainStepResponse | training_pb2.ForwardBackwardResponse, step_id: str
) -> types.TrainResult:
    stepped = message if isinstance(message, training_pb2.TrainStepResponse) else None
    tokens = message.tokens
    return types.TrainResult(
        policy_version=message.policy_version,
        loss=message.loss,
        grad_norm=stepped.grad_norm if stepped else 0.0,
        skipped=stepped.skipped if stepped else False,
        skip_reason=stepped.skip_reason if stepped else "",
        metrics=dict(message.metrics),
        tokens=types.TokenStats(
            tokens.flat, tokens.unique, tokens.prompt_forward_skipped, tokens.with_loss
        ),
        phases=_phases(message.phases),
        samples=[types.SampleStats(list(s.logprobs), s.entropy, s.kl) for s in message.samples],
        repeated=message.repeated_step,
        step_id=step_id,
    )


def optim_result(message: training_pb2.OptimStepResponse, step_id: str) -> types.TrainResult:
    return types.TrainResult(
        policy_version=message.policy_version,
        grad_norm=message.grad_norm,
        skipped=message.skipped,
        skip_reason=message.skip_reason,
        phases=_phases(message.phases),
        repeated=message.repeated_step,
        step_id=step_id,
    )


def score_result(
    message: generation_pb2.ScoreResponse, request: generation_pb2.ScoreRequest
) -> types.ScoreResult:
    flat = iter(message.responses)
    nested = []
    for group in request.groups:
        rows = [next(flat) for _ in group.responses]
        nested.append([types.ScoredResponse(list(row.logprobs), row.entropy) for row in rows])
    return types.ScoreResult(responses=nested, policy_version=message.policy_version)


def policy(message: training_pb2.GetPolicyResponse) -> types.Policy:
    return types.Policy(
        policy_version=message.policy_version,
        num_parameters=message.num_parameters,
        optimizer_state=message.optimizer_state,
        pending_gradients=message.pending_gradients,
    )


def cache_stats(stats: cache_pb2.CacheStats, block_tokens: int) -> types.CacheStats:
    names = [
        field.name for field in dataclasses.fields(types.CacheStats) if field.name != "block_tokens"
    ]
    return types.CacheStats(
        **{name: getattr(stats, name) for name in names}, block_tokens=block_tokens
    )


def _model_info(model: admin_pb2.ModelInfo) -> types.ModelInfo:
    return types.ModelInfo(
        name=model.name,
        description=model.description,
        architecture=model.architecture,
        num_parameters=model.num_parameters,
        num_layers=model.num_layers,
        hidden=model.hidden,
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
        has_tokenizer=model.has_tokenizer,
        chat_template=model.chat_template,
        bos_token=model.bos_token,
        eos_token=model.eos_token,
        bos_token_id=model.bos_token_id if model.HasField("bos_token_id") else None,
        eos_token_ids=list(model.eos_token_ids),
    )


def status(message: admin_pb2.GetStatusResponse) -> types.Status:
    limits = message.limits
    return types.Status(
        model=_model_info(message.model),
        state=_enum_name(admin_pb2.ServingState, "SERVING_STATE_", message.state),
        device=message.device,
        version=message.version,
        policy_version=message.policy_version,
        queued_requests=message.queued_requests,
        running_requests=message.running_requests,
        running_samples=message.running_samples,
        rollouts=message.rollouts,
        cache=cache_stats(message.cache, message.block_tokens),
        memory={region.name: region.size_bytes for region in message.memory},
        limits={field.name: getattr(limits, field.name) for field in limits.DESCRIPTOR.fields},
        uptime=message.uptime.seconds + message.uptime.nanos / 1e9,
    )
