"""The blocking client. Safe to share between threads: every call is one RPC on one HTTP/2
connection."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc

from coppice import _channel, _replies, _requests, _routing, chat, types
from coppice.errors import from_rpc_error
from coppice.options import BatchOptions, GenerateOptions, OptimOptions, TrainOptions
from coppice.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    cache_pb2,
    cache_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)

Reply = TypeVar("Reply")


class Stream:
    """Events of one Generate call, as they arrive. Iterate, or take `collect()`; closing early
    cancels the call.

    Use it as a context manager (or call `close`) so that leaving early frees the daemon's memory at
    once.
    """

    def __init__(self, call: Any, request: generation_pb2.GenerateRequest, address: str) -> None:
        self._call = call
        self._address = address
        self._builder = _replies.GroupBuilder(request)
        self._events = self._iterate()

    @property
    def group(self) -> types.Group:
        """What has arrived so far; complete after the last event."""
        return self._builder.group

    def _iterate(self) -> Iterator[types.Event]:
        try:
            for message in self._call:
                event = _replies.event(message)
                if event is not None:
                    self._builder.add(event)
                    yield event
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=self._address, rpc="Generation/Generate") from error

    def __iter__(self) -> Iterator[types.Event]:
        return self._events

    def __next__(self) -> types.Event:
        return next(self._events)

    def collect(self) -> types.Group:
        """Reads to the end and returns the whole group."""
        for _ in self._events:
            pass
        return self.group

    def close(self) -> None:
        """Cancels the call if it still runs. Idempotent."""
        self._call.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Client:
    """Blocking client of one coppiced.

    Args:
        address: host:port of its gRPC server; default $COPPICE_ADDRESS, else 127.0.0.1:7700.
        timeout: seconds that each call may take unless it gives its own; None = no limit.
        metadata: sent with every call, e.g. what an authenticating proxy in front wants.
        credentials: TLS credentials; None = plain text.

    Every method raises a CoppiceError subclass: ConnectionFailedError if nobody answers,
    InvalidArgumentError if the request can never succeed, and so on (coppice.errors). A refused
    call has changed nothing. A train step may have been applied all the same if the connection or
    the deadline ended during it (repeat it with its step_id to find out), and has been applied if a
    durable one raises DataLossError.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        _requests.check_timeout(timeout)
        self.address = _channel.address_or_default(address)
        self._timeout = timeout
        self._metadata = tuple(metadata)
        self._model: types.ModelInfo | None = None
        if credentials is None:
            self._channel = grpc.insecure_channel(self.address, options=_channel.OPTIONS)
        else:
            self._channel = grpc.secure_channel(self.address, credentials, options=_channel.OPTIONS)
        self._generation = generation_pb2_grpc.GenerationStub(self._channel)
        self._training = training_pb2_grpc.TrainingStub(self._channel)
        self._cache = cache_pb2_grpc.CacheStub(self._channel)
        self._admin = admin_pb2_grpc.AdminStub(self._channel)

    def close(self) -> None:
        """Closes the connection; running calls fail with CancelledError. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call(
        self, rpc: str, method: Callable[..., Reply], request: Any, timeout: float | None = None
    ) -> Reply:
        _requests.check_timeout(timeout)
        try:
            return method(
                request,
                timeout=timeout or self._timeout,
                metadata=_routing.call_metadata(self._metadata, request),
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=self.address, rpc=rpc) from error

    # ---- generation

    def model(self) -> types.ModelInfo:
        """Facts about the model, asked for once and then remembered."""
        if self._model is None:
            self._model = self.status().model
        return self._model

    def render_chat(self, messages: Sequence[types.Message], **options: Any) -> str:
        """The prompt text of a conversation under the model's chat template; options as in
        coppice.chat.render."""
        model = self.model()
        tokens = {"bos_token": model.bos_token, "eos_token": model.eos_token}
        return chat.render(model.chat_template, messages, **(tokens | options))

    def _prompt(self, prompt: types.Prompt) -> str | Sequence[int]:
        if not _requests.is_messages(prompt):
            return prompt  # type: ignore[return-value]
        # The template writes the special tokens itself.
        return self.tokenize(self.render_chat(prompt), add_special=False)  # type: ignore[arg-type]

    def generate_stream(self, prompt: types.Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """Starts n samples of one prompt and returns their events as a Stream: Started, then Chunk
        and Finished of all samples interleaved, then one GroupFinished."""
        request = _requests.generate_request(self._prompt(prompt), **options)
        call = self._generation.Generate(
            request,
            timeout=options.get("timeout") or self._timeout,
            metadata=_routing.call_metadata(self._metadata, request),
        )
        return Stream(call, request, self.address)

    def generate(self, prompt: types.Prompt, **options: Unpack[GenerateOptions]) -> types.Group:
        """Generates n samples of one prompt and waits for all of them.

        Args:
            prompt: text, token ids, or chat messages (the model's template is applied).
            **options: see GenerateOptions: n, max_tokens, temperature, seed, stop, logprobs,
            retain, ...

        Returns:
            Group with samples in order of their index; `usage` says what came from the cache.

        Raises:
            InvalidArgumentError, ResourceExhaustedError (queue full), UnavailableError (draining),
            DeadlineExceededError, ConnectionFailedError.
        """
        with self.generate_stream(prompt, **options) as stream:
            return stream.collect()

    def generate_many(
        self, prompts: Sequence[types.Prompt], **options: Unpack[GenerateOptions]
    ) -> list[types.Group]:
        """`generate` for several prompts at once, so that the daemon batches them; groups in order
        of the prompts.

        The options hold for every prompt. If `seed` is given, prompt i uses seed + i. The first
        error cancels the other calls.
        """
        each = _requests.options_per_prompt(options, len(prompts))
        # On an error the stack closes every call before the pool waits for its threads.
        pool = concurrent.futures.ThreadPoolExecutor(max_workers=max(1, len(prompts)))
        with pool, contextlib.ExitStack() as calls:
            streams = [
                calls.enter_context(self.generate_stream(prompt, **one))
                for prompt, one in zip(prompts, each, strict=True)
            ]
            groups = [pool.submit(stream.collect) for stream in streams]
            return [group.result() for group in groups]

    def score(
        self,
        groups: Iterable[tuple[Sequence[int], Sequence[Sequence[int]]]],
        *,
        temperature: float | None = None,
        timeout: float | None = None,
    ) -> types.ScoreResult:
        """Log-probs of given responses through the trainer's own forward; common prefixes are
        computed once.

        Args:
            groups: (prompt token ids, responses' token ids) pairs, no list empty.
            temperature: of the scored distribution, above 0; default 1.
        """
        request = _requests.score_request(groups, temperature)
        reply = self._call("Generation/Score", self._generation.Score, request, timeout)
        return _replies.score_result(reply, request)

    def warm(
        self,
        prompt: types.Prompt,
        *,
        cache: types.Cache | None = None,
        request_id: str = "",
        session_id: str = "",
        timeout: float | None = None,
    ) -> types.WarmResult:
        """Brings a prompt into the prefix cache; returns when its KV exists."""
        request = _requests.warm_request(self._prompt(prompt), cache, request_id, session_id)
        reply = self._call("Generation/Warm", self._generation.Warm, request, timeout)
        return types.WarmResult(_replies.usage(reply.usage), reply.policy_version)

    def abort(self, *, request_id: str | None = None, session_id: str | None = None) -> int:
        """Ends the open requests of that name (give one of the two); returns their number, after
        their memory is free."""
        request = generation_pb2.AbortRequest(request_id=request_id, session_id=session_id)
        return int(self._call("Generation/Abort", self._generation.Abort, request).aborted)

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text; `add_special`: with what the model's post-processor adds, e.g. a bos
        token."""
        request = generation_pb2.TokenizeRequest(text=text, add_special=add_special)
        return list(self._call("Generation/Tokenize", self._generation.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        request = generation_pb2.DetokenizeRequest(token_ids=token_ids, skip_special=skip_special)
        return str(self._call("Generation/Detokenize", self._generation.Detokenize, request).text)

    # ---- training

    def train_step(
        self,
        groups: Sequence[types.Group | types.TrainGroup],
        rewards: Sequence[Sequence[float]] | None = None,
        *,
        lr: float,
        **options: Unpack[TrainOptions],
    ) -> types.TrainResult:
        """One update of the policy: forward, loss, backward, clip, AdamW, version + 1.

        Args:
            groups: what `generate` returned (sent by its rollout id if it was kept with
                retain=True, else by its tokens), or TrainGroups of your own.
            rewards: [groups][samples], turned into advantages per group; or leave it out and give
                `advantages`, or put either into the TrainSamples.
            lr: learning rate, 0 or more.
            **options: see TrainOptions: loss, advantages, adam, step_id, max_policy_lag, ...

        Raises:
            InvalidArgumentError (names group, sample and field), FailedPreconditionError (stale
            policy version), NotFoundError (rollout).
        """
        request = _requests.train_step_request(groups, rewards, lr, **options)
        reply = self._call(
            "Training/TrainStep", self._training.TrainStep, request, options.get("timeout")
        )
        return _replies.train_result(reply, request.step_id)

    def forward_backward(
        self,
        groups: Sequence[types.Group | types.TrainGroup],
        rewards: Sequence[Sequence[float]] | None = None,
        **options: Unpack[BatchOptions],
    ) -> types.TrainResult:
        """Adds to the gradients that `optim_step` applies; arguments as in `train_step`. When
        several calls make one step, give Loss.denominator."""
        request = _requests.forward_backward_request(groups, rewards, **options)
        reply = self._call(
            "Training/ForwardBackward",
            self._training.ForwardBackward,
            request,
            options.get("timeout"),
        )
        return _replies.train_result(reply, request.step_id)

    def optim_step(self, *, lr: float, **options: Unpack[OptimOptions]) -> types.TrainResult:
        """Applies the gradients that have added up; FailedPreconditionError if there are none."""
        request = _requests.optim_step_request(lr, **options)
        reply = self._call(
            "Training/OptimStep", self._training.OptimStep, request, options.get("timeout")
        )
        return _replies.optim_result(reply, request.step_id)

    def save_checkpoint(self, name: str, *, timeout: float | None = None) -> str:
        """Writes weights, optimizer and version under the daemon's checkpoint directory; returns
        the path there."""
        request = training_pb2.SaveCheckpointRequest(name=name)
        return str(
            self._call(
                "Training/SaveCheckpoint", self._training.SaveCheckpoint, request, timeout
            ).path
        )

    def load_checkpoint(self, name: str, *, timeout: float | None = None) -> int:
        """Bit-equal resume; returns the policy version. NotFoundError, DataLossError."""
        request = training_pb2.LoadCheckpointRequest(name=name)
        reply = self._call(
            "Training/LoadCheckpoint", self._training.LoadCheckpoint, request, timeout
        )
        return int(reply.policy_version)

    def get_policy(self) -> types.Policy:
        """Version, parameter count, and what the trainer holds."""
        reply = self._call(
            "Training/GetPolicy", self._training.GetPolicy, training_pb2.GetPolicyRequest()
        )
        return _replies.policy(reply)

    # ---- cache and life cycle

    def cache_stats(self) -> types.CacheStats:
        """Blocks by state, hits and queries."""
        reply = self._call("Cache/GetStats", self._cache.GetStats, cache_pb2.GetStatsRequest())
        return _replies.cache_stats(reply.stats, reply.block_tokens)

    def flush(self) -> int:
        """Drops every cached block that no request holds; returns how many."""
        return int(
            self._call("Cache/Flush", self._cache.Flush, cache_pb2.FlushRequest()).blocks_freed
        )

    def status(self, *, timeout: float | None = None) -> types.Status:
        """Model, limits, memory plan, queue, versions."""
        return _replies.status(
            self._call(
                "Admin/GetStatus", self._admin.GetStatus, admin_pb2.GetStatusRequest(), timeout
            )
        )

    def pause(self, running: types.RunningRequests = "keep", *, abort: bool = False) -> int:
        """Stops generation (training goes on); returns the number of requests affected.

        abort: running requests end at once with what they have and finish_reason "paused".
        """
        request = admin_pb2.PauseRequest(running=_requests.running_requests(running), abort=abort)
        return int(self._call("Admin/Pause", self._admin.Pause, request).requests)

    def resume(self) -> int:
        """Undoes `pause`; returns the number of requests that go on."""
        return int(
            self._call("Admin/Resume", self._admin.Resume, admin_pb2.ResumeRequest()).requests
        )

    def drain(self, *, timeout: float | None = None) -> int:
        """Refuses new work for good; returns when nothing runs: the number of requests that were
        open."""
        return int(
            self._call("Admin/Drain", self._admin.Drain, admin_pb2.DrainRequest(), timeout).requests
        )
