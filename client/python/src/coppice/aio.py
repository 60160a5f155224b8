"""The asyncio client: the same calls as coppice.Client, awaited. One client belongs to one event
loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc
import grpc.aio

from coppice import _channel, _replies, _requests, _routing, chat, types
from coppice.errors import CancelledError, from_rpc_error
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


class AsyncStream:
    """Events of one Generate call: `async for`, or `await collect()`. Closing early cancels the
    call."""

    def __init__(self, call: Any, request: generation_pb2.GenerateRequest, address: str) -> None:
        self._call = call
        self._address = address
        self._closed = False
        self._builder = _replies.GroupBuilder(request)
        self._events = self._iterate()

    @property
    def group(self) -> types.Group:
        """What has arrived so far; complete after the last event."""
        return self._builder.group

    async def _iterate(self) -> AsyncIterator[types.Event]:
        try:
            async for message in self._call:
                event = _replies.event(message)
                if event is not None:
                    self._builder.add(event)
                    yield event
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=self._address, rpc="Generation/Generate") from error
        except asyncio.CancelledError:
            # grpc.aio raises this both when close() ended the call and when the task itself is
            # being cancelled.
            if not self._closed:
                raise
            raise CancelledError(
                "the stream was closed by its reader", rpc="Generation/Generate"
            ) from None

    def __aiter__(self) -> AsyncIterator[types.Event]:
        return self._events

    async def collect(self) -> types.Group:
        """Reads to the end and returns the whole group."""
        async for _ in self._events:
            pass
        return self.group

    def close(self) -> None:
        """Cancels the call if it still runs. Idempotent."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncClient:
    """Asyncio client of one coppiced; arguments, results and errors as in coppice.Client."""

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
            self._channel = grpc.aio.insecure_channel(self.address, options=_channel.OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(
                self.address, credentials, options=_channel.OPTIONS
            )
        self._generation = generation_pb2_grpc.GenerationStub(self._channel)
        self._training = training_pb2_grpc.TrainingStub(self._channel)
        self._cache = cache_pb2_grpc.CacheStub(self._channel)
        self._admin = admin_pb2_grpc.AdminStub(self._channel)

    async def close(self) -> None:
        """Closes the connection; running calls are cancelled."""
        await self._channel.close(grace=None)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _call(
        self,
        rpc: str,
        method: Callable[..., Awaitable[Reply]],
        request: Any,
        timeout: float | None = None,
    ) -> Reply:
        _requests.check_timeout(timeout)
        try:
            return await method(
                request,
                timeout=timeout or self._timeout,
                metadata=_routing.call_metadata(self._metadata, request),
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=self.address, rpc=rpc) from error

    # ---- generation

    async def model(self) -> types.ModelInfo:
        """Facts about the model, asked for once and then remembered."""
        if self._model is None:
            self._model = (await self.status()).model
        return self._model

    async def render_chat(self, messages: Sequence[types.Message], **options: Any) -> str:
        """See Client.render_chat."""
        model = await self.model()
        tokens = {"bos_token": model.bos_token, "eos_token": model.eos_token}
        return chat.render(model.chat_template, messages, **(tokens | options))

    async def _prompt(self, prompt: types.Prompt) -> str | Sequence[int]:
        if not _requests.is_messages(prompt):
            return prompt  # type: ignore[return-value]
        text = await self.render_chat(prompt)  # type: ignore[arg-type]
        return await self.tokenize(
            text, add_special=False
        )  # the template wrote the special tokens itself

    async def generate_stream(
        self, prompt: types.Prompt, **options: Unpack[GenerateOptions]
    ) -> AsyncStream:
        """See Client.generate_stream: `async with await client.generate_stream(..) as stream: async
        for event in ..`."""

        request = _requests.generate_request(await self._prompt(prompt), **options)
        call = self._generation.Generate(
            request,
            timeout=options.get("timeout") or self._timeout,
            metadata=_routing.call_metadata(self._metadata, request),
        )
        return AsyncStream(call, request, self.address)

    async def generate(
        self, prompt: types.Prompt, **options: Unpack[GenerateOptions]
    ) -> types.Group:
        """See Client.generate. Cancelling the task cancels the call."""
        async with await self.generate_stream(prompt, **options) as stream:
            return await stream.collect()

    async def generate_many(
        self, prompts: Sequence[types.Prompt], **options: Unpack[GenerateOptions]
    ) -> list[types.Group]:
        """See Client.generate_many."""
        each = _requests.options_per_prompt(options, len(prompts))
        pairs = zip(prompts, each, strict=True)
        calls = [asyncio.create_task(self.generate(p, **one)) for p, one in pairs]
        try:
            return await asyncio.gather(*calls)
        finally:
            for call in calls:
                call.cancel()

    async def score(
        self,
        groups: Iterable[tuple[Sequence[int], Sequence[Sequence[int]]]],
        *,
        temperature: float | None = None,
        timeout: float | None = None,
    ) -> types.ScoreResult:
        """See Client.score."""
        request = _requests.score_request(groups, temperature)
        reply = await self._call("Generation/Score", self._generation.Score, request, timeout)
        return _replies.score_result(reply, request)

    async def warm(
        self,
        prompt: types.Prompt,
        *,
        cache: types.Cache | None = None,
        request_id: str = "",
        session_id: str = "",
        timeout: float | None = None,
    ) -> types.WarmResult:
        """See Client.warm."""
        request = _requests.warm_request(await self._prompt(prompt), cache, request_id, session_id)
        reply = await self._call("Generation/Warm", self._generation.Warm, request, timeout)
        return types.WarmResult(_replies.usage(reply.usage), reply.policy_version)

    async def abort(self, *, request_id: str | None = None, session_id: str | None = None) -> int:
        """See Client.abort."""
        request = generation_pb2.AbortRequest(request_id=request_id, session_id=session_id)
        return int((await self._call("Generation/Abort", self._generation.Abort, request)).aborted)

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """See Client.tokenize."""
        request = generation_pb2.TokenizeRequest(text=text, add_special=add_special)
        return list(
            (await self._call("Generation/Tokenize", self._generation.Tokenize, request)).token_ids
        )

    async def detokenize(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        """See Client.detokenize."""
        request = generation_pb2.DetokenizeRequest(token_ids=token_ids, skip_special=skip_special)
        return str(
            (await self._call("Generation/Detokenize", self._generation.Detokenize, request)).text
        )

    # ---- training

    async def train_step(
        self,
        groups: Sequence[types.Group | types.TrainGroup],
        rewards: Sequence[Sequence[float]] | None = None,
        *,
        lr: float,
        **options: Unpack[TrainOptions],
    ) -> types.TrainResult:
        """See Client.train_step."""
        request = _requests.train_step_request(groups, rewards, lr, **options)
        reply = await self._call(
            "Training/TrainStep", self._training.TrainStep, request, options.get("timeout")
        )
        return _replies.train_result(reply, request.step_id)

    async def forward_backward(
        self,
        groups: Sequence[types.Group | types.TrainGroup],
        rewards: Sequence[Sequence[float]] | None = None,
        **options: Unpack[BatchOptions],
    ) -> types.TrainResult:
        """See Client.forward_backward."""

        request = _requests.forward_backward_request(groups, rewards, **options)
        reply = await self._call(
            "Training/ForwardBackward",
            self._training.ForwardBackward,
            request,
            options.get("timeout"),
        )
        return _replies.train_result(reply, request.step_id)

    async def optim_step(self, *, lr: float, **options: Unpack[OptimOptions]) -> types.TrainResult:
        """See Client.optim_step."""
        request = _requests.optim_step_request(lr, **options)
        reply = await self._call(
            "Training/OptimStep", self._training.OptimStep, request, options.get("timeout")
        )
        return _replies.optim_result(reply, request.step_id)

    async def save_checkpoint(self, name: str, *, timeout: float | None = None) -> str:
        """See Client.save_checkpoint."""
        request = training_pb2.SaveCheckpointRequest(name=name)
        return str(
            (
                await self._call(
                    "Training/SaveCheckpoint", self._training.SaveCheckpoint, request, timeout
                )
            ).path
        )

    async def load_checkpoint(self, name: str, *, timeout: float | None = None) -> int:
        """See Client.load_checkpoint."""
        request = training_pb2.LoadCheckpointRequest(name=name)
        reply = await self._call(
            "Training/LoadCheckpoint", self._training.LoadCheckpoint, request, timeout
        )
        return int(reply.policy_version)

    async def get_policy(self) -> types.Policy:
        """See Client.get_policy."""
        request = training_pb2.GetPolicyRequest()
        return _replies.policy(
            await self._call("Training/GetPolicy", self._training.GetPolicy, request)
        )

    # ---- cache and life cycle

    async def cache_stats(self) -> types.CacheStats:
        """See Client.cache_stats."""
        reply = await self._call(
            "Cache/GetStats", self._cache.GetStats, cache_pb2.GetStatsRequest()
        )
        return _replies.cache_stats(reply.stats, reply.block_tokens)

    async def flush(self) -> int:
        """See Client.flush."""
        return int(
            (
                await self._call("Cache/Flush", self._cache.Flush, cache_pb2.FlushRequest())
            ).blocks_freed
        )

    async def status(self, *, timeout: float | None = None) -> types.Status:
        """See Client.status."""
        request = admin_pb2.GetStatusRequest()
        return _replies.status(
            await self._call("Admin/GetStatus", self._admin.GetStatus, request, timeout)
        )

    async def pause(self, running: types.RunningRequests = "keep", *, abort: bool = False) -> int:
        """See Client.pause."""
        request = admin_pb2.PauseRequest(running=_requests.running_requests(running), abort=abort)
        return int((await self._call("Admin/Pause", self._admin.Pause, request)).requests)

    async def resume(self) -> int:
        """See Client.resume."""
        return int(
            (
                await self._call("Admin/Resume", self._admin.Resume, admin_pb2.ResumeRequest())
            ).requests
        )

    async def drain(self, *, timeout: float | None = None) -> int:
        """See Client.drain."""
        request = admin_pb2.DrainRequest()
        return int((await self._call("Admin/Drain", self._admin.Drain, request, timeout)).requests)
