"""What goes into and comes out of the calls. Token ids are plain ints, log-probs natural
logarithms, times seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

Message: TypeAlias = Mapping[str, Any]
"""One chat turn: {"role": "system" | "user" | "assistant" | ..., "content": str, ...}."""

Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""Text (tokenized by the daemon as it is), token ids, or chat messages (the model's template is
applied here)."""

LogprobKind = Literal["none", "raw", "as_sampled"]
"""raw: of the model, temperature 1, nothing truncated. as_sampled: of the distribution that was
drawn from."""

FinishReason = Literal[
    "stop_token", "stop_string", "length", "aborted", "context_full", "paused", "unfinished"
]
PlacementReason = Literal["home", "session", "prefix", "balance"]
RunningRequests = Literal["drain", "retract", "keep"]
LossKind = Literal[
    "cross_entropy", "importance_sampling", "ppo", "grpo", "dapo", "dr_grpo", "gspo", "cispo"
]
AdvantageKind = Literal["given", "group_normalized", "group_centered", "leave_one_out"]
Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant", "sum"]
KlEstimator = Literal["k1", "k2", "k3"]


@dataclasses.dataclass(frozen=True)
class Cache:
    """How a request uses the prefix cache. Never changes an answer, only its cost.

    Attributes:
        skip_read: compute the whole prompt again.
        skip_write: leave nothing in the cache.
        key: routing hint, at most 256 bytes.
        priority: 0-100, default 35; lower is evicted first.
        ttl: seconds until the prompt's blocks expire, default never.
    """

    skip_read: bool = False
    skip_write: bool = False
    key: str = ""
    priority: int | None = None
    ttl: float | None = None


@dataclasses.dataclass(frozen=True)
class Usage:
    """Where the prompt's tokens came from; the prompt of a group counts once.

    `prompt_tokens == cached_tokens + joined_tokens + computed_tokens`, always.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0  # from any tier of the prefix cache
    cached_by_tier: Mapping[str, int] = dataclasses.field(
        default_factory=dict
    )  # device, host, disk, remote
    joined_tokens: int = 0  # computed by another request in flight, which this one waited for
    computed_tokens: int = 0
    written_tokens: int = 0  # newly in the cache
    miss_reason: str = (
        ""  # why the first uncached token was not cached; empty if nothing was missed
    )
    completion_tokens: int = 0  # of all samples


@dataclasses.dataclass(frozen=True)
class Started:
    """First event: the call was admitted."""

    seed: int  # given or drawn: with it the call can be repeated
    prompt_usage: Usage
    policy_version: int
    prompt_token_ids: list[int]  # [prompt tokens] if the prompt was text, else empty


@dataclasses.dataclass(frozen=True)
class Chunk:
    """New tokens of one sample, all drawn under one policy version."""

    sample: int
    token_ids: list[int]  # [tokens]
    logprobs: list[float]  # [tokens], or empty if not asked for
    text: str  # whole characters; may lag behind the tokens
    policy_version: int
    top_logprobs: list[dict[int, float]]  # [tokens] of token id -> log-prob, best first; or empty


@dataclasses.dataclass(frozen=True)
class Finished:
    """One sample has ended."""

    sample: int
    reason: FinishReason
    num_tokens: int  # the stop token included


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a router sent the call, and why. Load is counted in decode tokens."""

    replica: str
    reason: PlacementReason
    home: str  # first by hash alone, among the replicas that could take it
    prefix_hash: str
    predicted_hit_tokens: int
    load: float  # of the replica, before the call
    charge: float  # what the call adds to it
    attempts: int  # replicas tried, this one included


@dataclasses.dataclass(frozen=True)
class GroupFinished:
    """Last event: all samples have ended."""

    usage: Usage
    rollout_id: str  # empty unless retained
    policy_version: int
    placement: Placement | None = None  # from a router, if asked for with explain=True


Event: TypeAlias = Started | Chunk | Finished | GroupFinished


@dataclasses.dataclass
class Sample:
    """One completion of a group."""

    index: int
    token_ids: list[int] = dataclasses.field(
        default_factory=list
    )  # [tokens], the stop token included
    text: str = ""
    logprobs: list[float] = dataclasses.field(
        default_factory=list
    )  # [tokens], or empty if not asked for
    top_logprobs: list[dict[int, float]] = dataclasses.field(
        default_factory=list
    )  # [tokens], or empty
    finish_reason: FinishReason = "unfinished"
    policy_versions: list[int] = dataclasses.field(default_factory=list)  # [tokens]

    @property
    def policy_version(self) -> int:
        """The version that drew the first token; `policy_versions` has one per token."""
        return self.policy_versions[0] if self.policy_versions else 0


@dataclasses.dataclass
class Group:
    """One prompt and its n samples; iterating yields the samples."""

    prompt_token_ids: list[int]
    samples: list[Sample]
    usage: Usage = dataclasses.field(default_factory=Usage)
    seed: int = 0
    policy_version: int = 0  # at the end of the call
    rollout_id: str = ""  # empty unless retained
    placement: Placement | None = None  # from a router, if asked for with explain=True
    logprob_kind: LogprobKind = "none"

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)


@dataclasses.dataclass(frozen=True)
class TrainSample:
    """One response to train on: `token_ids`, or `rollout_sample` inside a TrainGroup with a
    rollout_id.

    Per-token sequences have one entry per response token, or are None.
    """

    token_ids: Sequence[int] | None = None  # [tokens], at least one
    rollout_sample: int | None = None  # index in the rollout
    reward: float | None = None  # turned into advantages per group, see Loss.advantage
    advantages: Sequence[float] | float | None = None  # one for the sample, or [tokens]
    old_logprobs: Sequence[float] | None = None  # default: the update's own, detached (on-policy)
    sampler_logprobs: Sequence[float] | None = None  # for truncated importance sampling
    ref_logprobs: Sequence[float] | None = None  # for a KL term
    loss_mask: Sequence[float] | None = None  # default 1; 0 for tool output inside a transcript
    weight: float | None = None  # default 1


@dataclasses.dataclass(frozen=True)
class TrainGroup:
    """Samples whose rewards are compared, after a common prompt (token ids) or a kept rollout."""

    samples: Sequence[TrainSample]
    prompt: Sequence[int] | None = None  # [prompt tokens], at least one
    rollout_id: str = ""


@dataclasses.dataclass(frozen=True)
class Loss:
    """The loss of an update; None means the daemon's default for the kind
    (proto/coppice/v1/training.proto)."""

    kind: LossKind = "grpo"
    clip_low: float | None = None  # (0, 1), default 0.2: the ratio's lower bound is 1 - clip_low
    clip_high: float | None = None  # > 0, default 0.2
    clip_dual: float | None = None  # > 1; bounds the loss of negative advantages
    kl: KlEstimator | None = None  # needs ref_logprobs
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    temperature: float | None = None  # default 1; use the one that the samples were drawn with
    advantage: AdvantageKind | None = None
    aggregation: Aggregation | None = None
    denominator: float | None = None  # global, over all micro-batches
    importance_cap: float | None = None  # truncated importance sampling, e.g. 2


@dataclasses.dataclass(frozen=True)
class Adam:
    """AdamW besides the learning rate; None means the daemon's default (0.9, 0.95, 1e-8, 0, clip at
    1)."""

    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    weight_decay: float = 0.0
    grad_clip_norm: float | None = None  # 0 = off


@dataclasses.dataclass(frozen=True)
class TokenStats:
    """What an update ran."""

    flat: int = 0  # sum of the sequences' lengths
    unique: int = 0  # rows run; unique / flat is the saving
    prompt_forward_skipped: int = 0
    with_loss: int = 0


@dataclasses.dataclass(frozen=True)
class SampleStats:
    """Of one trained sample."""

    logprobs: list[float]  # [tokens] if asked for, at the loss temperature
    entropy: float  # nats, mean over tokens with loss
    kl: float  # nats, mean estimate against ref_logprobs


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Answer of train_step, forward_backward (version unchanged, no grad_norm) and optim_step (no
    loss)."""

    policy_version: int
    loss: float = 0.0
    grad_norm: float = 0.0  # before clipping
    skipped: bool = False  # the gradient norm was not finite: nothing changed
    skip_reason: str = ""
    metrics: Mapping[str, float] = dataclasses.field(
        default_factory=dict
    )  # pg_loss, kl, clip_low, ratio_max, ...
    tokens: TokenStats = TokenStats()
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)  # phase -> seconds
    samples: list[SampleStats] = dataclasses.field(default_factory=list)  # in request order
    repeated: bool = False  # answered from the record of an earlier call with this step_id
    step_id: str = ""


@dataclasses.dataclass(frozen=True)
class ScoredResponse:
    """Log-probs of one given response."""

    logprobs: list[float]  # [response tokens]
    entropy: float  # nats, mean over the response


@dataclasses.dataclass(frozen=True)
class ScoreResult:
    responses: list[list[ScoredResponse]]  # [groups][responses]
    policy_version: int


@dataclasses.dataclass(frozen=True)
class WarmResult:
    usage: Usage
    policy_version: int


@dataclasses.dataclass(frozen=True)
class Policy:
    policy_version: int  # number of committed updates
    num_parameters: int
    optimizer_state: bool
    pending_gradients: bool


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """`free_blocks + leased_blocks + cached_only_blocks == total_blocks`; token counts are since
    start."""

    total_blocks: int
    free_blocks: int
    leased_blocks: int
    cached_only_blocks: int
    num_nodes: int
    num_namespaces: int
    evicted_blocks: int
    published_blocks: int
    queried_tokens: int
    hit_tokens: int
    block_tokens: int

    @property
    def hit_rate(self) -> float:
        """hit / queried tokens, 0 before the first query."""
        return self.hit_tokens / self.queried_tokens if self.queried_tokens else 0.0


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    name: str
    description: str
    architecture: str
    num_parameters: int
    num_layers: int
    hidden: int
    vocab_size: int
    max_positions: int
    has_tokenizer: bool
    chat_template: str  # jinja2; empty if the model ships none
    bos_token: str
    eos_token: str
    bos_token_id: int | None
    eos_token_ids: list[int]


@dataclasses.dataclass(frozen=True)
class Status:
    model: ModelInfo
    state: str  # serving, paused, draining
    device: str
    version: str
    policy_version: int
    queued_requests: int
    running_requests: int
    running_samples: int
    rollouts: int
    cache: CacheStats
    memory: Mapping[str, int]  # region -> bytes
    limits: Mapping[str, int]  # max_context, max_group_size, ...
    uptime: float  # seconds
