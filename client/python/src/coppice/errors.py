"""Errors of every call: one class per gRPC code, each carrying the code and the daemon's own
message."""

from __future__ import annotations

import re

import grpc


class CoppiceError(Exception):
    """A call failed.

    Attributes:
        code: the gRPC status code.
        message: `<what failed>: <want, got>; <what to do>`, as the daemon wrote it.
        rpc: the method, e.g. "Generation/Generate"; empty if the error arose in the client.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str, *, code: grpc.StatusCode | None = None, rpc: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.rpc = rpc
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        where = f" ({self.rpc})" if self.rpc else ""
        return f"{self.code.name}{where}: {self.message}"


class InvalidArgumentError(CoppiceError):
    """The request can never succeed; the message names the field."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class FailedPreconditionError(CoppiceError):
    """The daemon's state does not allow it: stale policy version, no gradients, no tokenizer, or
    the model's numbers leave their type (the same call fails again)."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class NotFoundError(CoppiceError):
    """Unknown rollout or checkpoint."""

    code = grpc.StatusCode.NOT_FOUND


class ResourceExhaustedError(CoppiceError):
    """A queue or the KV memory is full; wait and try again."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(CoppiceError):
    """The daemon is draining or stopping; go to another replica."""

    code = grpc.StatusCode.UNAVAILABLE


class ConnectionFailedError(UnavailableError):
    """No daemon answers at the address, or it went away in the middle of the call.

    Whether a TrainStep that was under way took effect is unknown; repeat it with the same step_id.
    """


class DeadlineExceededError(CoppiceError):
    """The call took longer than its `timeout`; everything that it held in the daemon is free."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class CancelledError(CoppiceError):
    """The caller cancelled; everything that the call held in the daemon is free."""

    code = grpc.StatusCode.CANCELLED


class DataLossError(CoppiceError):
    """A checkpoint on disk is corrupt; or a durable step was applied but is not on disk: repeat it
    with the same step_id to try the disk again."""

    code = grpc.StatusCode.DATA_LOSS


class UnauthenticatedError(CoppiceError):
    """The daemon wants to be told the tenant by a proxy, and the call came without one."""

    code = grpc.StatusCode.UNAUTHENTICATED


class InternalError(CoppiceError):
    """The daemon's device failed; it exits and is restarted."""

    code = grpc.StatusCode.INTERNAL


_CLASSES: dict[grpc.StatusCode, type[CoppiceError]] = {
    cls.code: cls
    for cls in (
        InvalidArgumentError,
        FailedPreconditionError,
        NotFoundError,
        ResourceExhaustedError,
        UnavailableError,
        DeadlineExceededError,
        CancelledError,
        DataLossError,
        UnauthenticatedError,
        InternalError,
    )
}

# What gRPC itself says when the transport fails; the daemon's own UNAVAILABLE never reads like
# this.
_TRANSPORT = re.compile(
    r"failed to connect|connection (reset|refused|closed|dropped)|socket closed|broken pipe|goaway|"
    r"recvmsg|sendmsg|endpoint closing|name resolution|dns|stream removed|keepalive|rst_stream",
    re.IGNORECASE,
)


def from_rpc_error(error: grpc.RpcError, *, address: str, rpc: str) -> CoppiceError:
    """The CoppiceError for what gRPC raised while calling `rpc` at `address`."""
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = (error.details() if hasattr(error, "details") else str(error)) or "no message"
    if code == grpc.StatusCode.UNAVAILABLE and _TRANSPORT.search(details):
        if details.startswith("replica "):  # a router's words, which answers
            return ConnectionFailedError(
                f"{details}; the router at {address} has lost it: try again, or look at its log",
                rpc=rpc,
            )
        return ConnectionFailedError(
            f"cannot reach coppiced at {address}: {details}; check that it runs and listens there, "
            "or give another address",
            rpc=rpc,
        )
    return _CLASSES.get(code, CoppiceError)(details, code=code, rpc=rpc)
