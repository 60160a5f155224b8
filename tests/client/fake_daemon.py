"""An in-process gRPC server that answers like coppiced and remembers what it was asked."""

from __future__ import annotations

import threading
from concurrent import futures
from typing import Any

import grpc
from coppice.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    cache_pb2,
    cache_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
    types_pb2,
)

CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
PLACEMENT = generation_pb2.Placement(
    replica="coppice-1",
    reason=generation_pb2.Placement.BALANCE,
    home="coppice-2",
    prefix_hash="00000000000000ab",
    predicted_hit_tokens=256,
    load=100,
    charge=20.5,
    attempts=2,
)


class FakeDaemon:
    """Tokens are the UTF-8 bytes of the text; sample i answers `max_tokens` times token 65 + i.

    Attributes:
        requests: every request received, in order.
        fail_next: (code, message) that the next call gets, once.
        cancelled: set when a client cancels a Generate call.
        endless: Generate repeats its last chunk until the client leaves.
    """

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.fail_next: tuple[grpc.StatusCode, str] | None = None
        self.cancelled = threading.Event()
        self.endless = False
        self.policy_version = 0
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
        for service in (_Generation(self), _Training(self), _Cache(self), _Admin(self)):
            service.register(self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(grace=None).wait()

    def receive(self, request: Any, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        failure, self.fail_next = self.fail_next, None
        if failure is not None:
            context.abort(*failure)


class _Generation(generation_pb2_grpc.GenerationServicer):
    def __init__(self, daemon: FakeDaemon) -> None:
        self._daemon = daemon

    def register(self, server: grpc.Server) -> None:
        generation_pb2_grpc.add_GenerationServicer_to_server(self, server)

    def Generate(self, request: Any, context: grpc.ServicerContext) -> Any:
        daemon = self._daemon
        daemon.receive(request, context)
        context.add_callback(lambda: None if context.code() else daemon.cancelled.set())
        text = request.prompt.text
        prompt = list(text.encode()) or list(request.prompt.tokens.ids)
        usage = types_pb2.Usage(
            prompt_tokens=len(prompt), cached_device_tokens=1, computed_tokens=len(prompt) - 1
        )
        yield _event(
            started=generation_pb2.Started(
                seed=request.sampling.seed or 7,
                prompt_usage=usage,
                policy_version=daemon.policy_version,
                prompt_token_ids=prompt if text else [],
            )
        )
        for _ in range(request.sampling.max_tokens):
            for sample in range(request.n):
                yield _event(chunk=self._chunk(sample, request))
        while daemon.endless and context.is_active():
            yield _event(chunk=self._chunk(0, request))
        for sample in range(request.n):
            yield _event(
                finished=generation_pb2.Finished(
                    sample=sample,
                    reason=generation_pb2.FINISH_REASON_LENGTH,
                    num_tokens=request.sampling.max_tokens,
                )
            )
        usage.completion_tokens = request.n * request.sampling.max_tokens
        rollout = "rollout-1" if request.retain else ""
        group = generation_pb2.GroupFinished(
            usage=usage, rollout_id=rollout, policy_version=daemon.policy_version
        )
        if request.explain_placement:  # as a router would
            group.placement.CopyFrom(PLACEMENT)
        yield _event(group=group)
        context.set_code(grpc.StatusCode.OK)

    def _chunk(self, sample: int, request: Any) -> generation_pb2.TokenChunk:
        token = 65 + sample
        wants_logprobs = request.logprobs > generation_pb2.LOGPROB_MODE_NONE
        top = [generation_pb2.TopLogprobs(token_ids=[token, 1], logprobs=[-0.5, -2.0])]
        return generation_pb2.TokenChunk(
            sample=sample,
            token_ids=[token],
            logprobs=[-0.5] if wants_logprobs else [],
            text=chr(token) if request.return_text else "",
            policy_version=self._daemon.policy_version,
            top_logprobs=top if request.top_logprobs else [],
        )

    def Score(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._daemon.receive(request, context)
        flat = [response for group in request.groups for response in group.responses]
        return generation_pb2.ScoreResponse(
            responses=[
                generation_pb2.ScoredResponse(logprobs=[-float(t) for t in r.ids], entropy=1.5)
                for r in flat
            ],
            policy_version=self._daemon.policy_version,
        )

    def Warm(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._daemon.receive(request, context)
        return generation_pb2.WarmResponse(
            usage=types_pb2.Usage(prompt_tokens=3, computed_tokens=3)
        )

    def Abort(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._daemon.receive(request, context)
        return generation_pb2.AbortResponse(aborted=2)

    def Tokenize(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._daemon.receive(request, context)
        return generation_pb2.TokenizeResponse(token_ids=list(request.text.encode()))

    def Detokenize(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._daemon.receive(request, context)
        return generation_pb2.DetokenizeResponse(text=bytes(request.token_ids).decode())


class _Training(training_pb2_grpc.TrainingServicer):
    def __init__(self, daemon: FakeDaemon) -> None:
        self._daemon = daemon

    def register(self, server: grpc.Server) -> None:
        training_pb2_grpc.add_TrainingServicer_to_server(self, server)

    def TrainStep(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._daemon.receive(request, context)
        self._daemon.policy_version += 1
        return training_pb2.TrainStepResponse(
            policy_version=self._daemon.policy_version,
            loss=0.25,
            grad_norm=1.5,
            metrics={"kl": 0.125},
            tokens=training_pb2.TokenStats(flat=100, unique=20, with_loss=10),
            phases=[training_pb2.PhaseSeconds(phase="forward", seconds=0.5)],
            samples=[training_pb2.SampleResult(logprobs=[-1.0], entropy=0.5, kl=0.0)],
        )

    def ForwardBackward(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._daemon.receive(request, context)
        return training_pb2.ForwardBackwardResponse(policy_version=0, loss=0.25)

    def OptimStep(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._daemon.receive(request, context)
        return training_pb2.OptimStepResponse(policy_version=1, grad_norm=2.0)

    def SaveCheckpoint(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._daemon.receive(request, context)
        return training_pb2.SaveCheckpointResponse(path="/checkpoints/" + request.name)

    def LoadCheckpoint(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._daemon.receive(request, context)
        return training_pb2.LoadCheckpointResponse(policy_version=4)

    def GetPolicy(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._daemon.receive(request, context)
        return training_pb2.GetPolicyResponse(policy_version=3, num_parameters=10)


class _Cache(cache_pb2_grpc.CacheServicer):
    def __init__(self, daemon: FakeDaemon) -> None:
        self._daemon = daemon

    def register(self, server: grpc.Server) -> None:
        cache_pb2_grpc.add_CacheServicer_to_server(self, server)

    def GetStats(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._daemon.receive(request, context)
        stats = cache_pb2.CacheStats(
            total_blocks=10, free_blocks=10, queried_tokens=8, hit_tokens=2
        )
        return cache_pb2.GetStatsResponse(stats=stats, block_tokens=16)

    def Flush(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._daemon.receive(request, context)
        return cache_pb2.FlushResponse(blocks_freed=5)


class _Admin(admin_pb2_grpc.AdminServicer):
    def __init__(self, daemon: FakeDaemon) -> None:
        self._daemon = daemon

    def register(self, server: grpc.Server) -> None:
        admin_pb2_grpc.add_AdminServicer_to_server(self, server)

    def GetStatus(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._daemon.receive(request, context)
        model = admin_pb2.ModelInfo(
            name="fake", vocab_size=256, has_tokenizer=True, chat_template=CHAT_TEMPLATE
        )
        return admin_pb2.GetStatusResponse(
            model=model,
            state=admin_pb2.SERVING_STATE_SERVING,
            limits=admin_pb2.ServerLimits(max_context=128),
            memory=[admin_pb2.MemoryRegion(name="weights", size_bytes=1 << 20)],
        )

    def Pause(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._daemon.receive(request, context)
        return admin_pb2.PauseResponse(requests=1)

    def Resume(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._daemon.receive(request, context)
        return admin_pb2.ResumeResponse(requests=1)

    def Drain(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._daemon.receive(request, context)
        return admin_pb2.DrainResponse(requests=0)


def _event(**kind: Any) -> generation_pb2.GenerateEvent:
    return generation_pb2.GenerateEvent(**kind)
