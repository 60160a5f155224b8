"""Client of coppiced, a daemon that serves and trains one language model from the same prompt
state.

    client = coppice.Client("127.0.0.1:7700")
    group = client.generate([{"role": "user", "content": "Sort: 3, 1, 2"}], n=8, max_tokens=16,
    retain=True)
    rewards = [float(sample.text == "1, 2, 3") for sample in group]
    result = client.train_step([group], [rewards], lr=1e-5)
    print(result.policy_version, result.loss, group.usage.cached_tokens)

`coppice.v1` holds the wire messages, generated from proto/coppice/v1 when the package is built.
"""

from coppice.aio import AsyncClient, AsyncStream
from coppice.client import Client, Stream
from coppice.errors import (
    CancelledError,
    ConnectionFailedError,
    CoppiceError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from coppice.types import (
    Adam,
    Cache,
    CacheStats,
    Chunk,
    Event,
    Finished,
    Group,
    GroupFinished,
    Loss,
    Message,
    ModelInfo,
    Placement,
    Policy,
    Prompt,
    Sample,
    SampleStats,
    ScoredResponse,
    ScoreResult,
    Started,
    Status,
    TokenStats,
    TrainGroup,
    TrainResult,
    TrainSample,
    Usage,
    WarmResult,
)

__version__ = "0.1.0"

__all__ = [
    "Adam",
    "AsyncClient",
    "AsyncStream",
    "Cache",
    "CacheStats",
    "CancelledError",
    "Chunk",
    "Client",
    "ConnectionFailedError",
    "CoppiceError",
    "DataLossError",
    "DeadlineExceededError",
    "Event",
    "FailedPreconditionError",
    "Finished",
    "Group",
    "GroupFinished",
    "InternalError",
    "InvalidArgumentError",
    "Loss",
    "Message",
    "ModelInfo",
    "NotFoundError",
    "Placement",
    "Policy",
    "Prompt",
    "ResourceExhaustedError",
    "Sample",
    "SampleStats",
    "ScoreResult",
    "ScoredResponse",
    "Started",
    "Status",
    "Stream",
    "TokenStats",
    "TrainGroup",
    "TrainResult",
    "TrainSample",
    "UnauthenticatedError",
    "UnavailableError",
    "Usage",
    "WarmResult",
]
