"""The blocking client against a scripted daemon: what it sends, what it makes of the replies."""

import coppice
import grpc
import pytest
from coppice.v1 import generation_pb2, training_pb2, types_pb2


def test_generate_collects_all_samples_of_a_group(client, daemon):
    group = client.generate("hi", n=2, max_tokens=3, logprobs="raw", top_logprobs=2, retain=True)
    assert [sample.token_ids for sample in group] == [[65] * 3, [66] * 3]
    assert [sample.text for sample in group] == ["AAA", "BBB"]
    assert group.samples[1].logprobs == [-0.5] * 3
    assert group.samples[1].top_logprobs[0] == {66: -0.5, 1: -2.0}
    assert group.samples[0].finish_reason == "length"
    assert group.samples[0].policy_versions == [0, 0, 0]
    assert group.prompt_token_ids == list(b"hi")
    assert group.rollout_id == "rollout-1" and group.seed == 7 and len(group) == 2
    assert group.usage.cached_tokens == 1 and group.usage.completion_tokens == 6


def test_a_placement_is_there_if_asked_for(client, daemon):
    assert client.generate("hi", max_tokens=1).placement is None
    assert not daemon.requests[-1].explain_placement
    assert client.generate("hi", max_tokens=1, explain=True).placement == coppice.Placement(
        replica="coppice-1",
        reason="balance",
        home="coppice-2",
        prefix_hash="00000000000000ab",
        predicted_hit_tokens=256,
        load=100,
        charge=20.5,
        attempts=2,
    )


def test_absent_options_stay_absent_on_the_wire(client, daemon):
    client.generate([1, 2], max_tokens=1)
    sampling = daemon.requests[-1].sampling
    for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
        assert not sampling.HasField(name), name
    assert not daemon.requests[-1].HasField("cache")


def test_every_option_reaches_the_wire(client, daemon):
    client.generate(
        [1, 2],
        n=2,
        max_tokens=1,
        temperature=0.0,
        top_k=5,
        top_p=0.5,
        min_p=0.25,
        seed=0,
        stop=["x", "y"],
        stop_token_ids=[9],
        ignore_eos=True,
        logit_bias={3: -1.0},
        logprobs="as_sampled",
        return_text=False,
        cache=coppice.Cache(skip_read=True, priority=0, ttl=1.5, key="k"),
        request_id="r",
        session_id="s",
        priority=-3,
    )
    request = daemon.requests[-1]
    sampling = request.sampling
    assert sampling.HasField("temperature") and sampling.temperature == 0
    assert sampling.HasField("seed") and sampling.seed == 0
    assert (sampling.top_k, sampling.top_p, sampling.min_p) == (5, 0.5, 0.25)
    assert list(sampling.stop_strings) == ["x", "y"] and list(sampling.stop_token_ids) == [9]
    assert sampling.ignore_eos and dict(sampling.logit_bias) == {3: -1.0}
    assert request.logprobs == generation_pb2.LOGPROB_MODE_AS_SAMPLED and not request.return_text
    assert request.cache.skip_read and request.cache.HasField("priority")
    assert (request.cache.ttl.seconds, request.cache.ttl.nanos) == (1, 500_000_000)
    assert (request.request_id, request.session_id, request.priority) == ("r", "s", -3)


def test_an_unknown_option_is_a_type_error(client):
    with pytest.raises(TypeError, match="max_token"):
        client.generate("hi", max_token=3)


def test_messages_go_through_the_template_and_are_tokenized_without_specials(client, daemon):
    group = client.generate([{"role": "user", "content": "hi"}], max_tokens=1)
    assert bytes(group.prompt_token_ids).decode() == "<user>hi<assistant>"
    tokenize = next(r for r in daemon.requests if isinstance(r, generation_pb2.TokenizeRequest))
    assert tokenize.HasField("add_special") and not tokenize.add_special


def test_stream_yields_events_in_order_and_keeps_the_group(client):
    with client.generate_stream("hi", n=1, max_tokens=2) as stream:
        kinds = [type(event).__name__ for event in stream]
    assert kinds == ["Started", "Chunk", "Chunk", "Finished", "GroupFinished"]
    assert stream.group.samples[0].text == "AA"


def test_leaving_a_stream_early_cancels_the_call(client, daemon):
    daemon.endless = True
    with client.generate_stream("hi", max_tokens=1) as stream:
        for event in stream:
            if isinstance(event, coppice.Chunk):
                break
    assert daemon.cancelled.wait(timeout=30)
    with pytest.raises(coppice.CancelledError):
        stream.collect()


def test_generate_many_keeps_order_and_spreads_the_seed(client, daemon):
    groups = client.generate_many(["a", "bb", "ccc"], max_tokens=1, seed=10)
    assert [group.usage.prompt_tokens for group in groups] == [1, 2, 3]
    assert [group.seed for group in groups] == [10, 11, 12]
    assert client.generate_many([]) == []


def test_a_refused_prompt_cancels_the_other_calls_of_generate_many(client, daemon):
    daemon.endless = True

    class FirstThenBad(list):
        def __iter__(self):
            yield self[0]
            while not daemon.requests:
                pass
            yield self[1]

    with pytest.raises(TypeError):
        client.generate_many(FirstThenBad(["a", 5]), max_tokens=1)
    assert daemon.cancelled.wait(timeout=30)


def test_score_regroups_the_flat_reply(client):
    result = client.score([([1], [[2, 3], [4]]), ([5], [[6]])])
    assert [[row.logprobs for row in group] for group in result.responses] == [
        [[-2.0, -3.0], [-4.0]],
        [[-6.0]],
    ]


def test_train_step_names_a_kept_rollout_and_sends_rewards_only(client, daemon):
    group = client.generate("hi", n=2, max_tokens=2, retain=True)
    result = client.train_step([group], [[0.0, 1.0]], lr=1e-3)
    request = daemon.requests[-1]
    assert request.step_id == result.step_id != ""
    assert request.groups[0].rollout_id == "rollout-1"
    assert [s.rollout_sample for s in request.groups[0].samples] == [0, 1]
    assert [s.reward for s in request.groups[0].samples] == [0.0, 1.0]
    assert request.groups[0].samples[0].HasField("reward")
    assert request.loss.kind == training_pb2.LossConfig.GRPO
    assert not request.HasField("expected_policy_version")
    assert (result.policy_version, result.loss, result.grad_norm) == (1, 0.25, 1.5)
    assert result.metrics == {"kl": 0.125} and result.phases == {"forward": 0.5}
    assert result.tokens.flat / result.tokens.unique == 5
    assert result.samples[0].logprobs == [-1.0]


def test_train_step_sends_tokens_of_a_group_that_was_not_kept(client, daemon):
    group = client.generate("hi", n=2, max_tokens=2, logprobs="as_sampled")
    client.train_step([group], advantages=[[-1.0, [0.5, 1.0]]], lr=1e-3)
    sent = daemon.requests[-1].groups[0]
    assert list(sent.prompt.ids) == list(b"hi")
    assert [list(s.token_ids.ids) for s in sent.samples] == [[65, 65], [66, 66]]
    assert [list(s.advantages) for s in sent.samples] == [[-1.0], [0.5, 1.0]]
    assert list(sent.samples[0].sampler_logprobs) == [-0.5, -0.5]


def test_train_step_passes_every_knob(client, daemon):
    sample = coppice.TrainSample(
        token_ids=[1, 2],
        advantages=0.5,
        old_logprobs=[-1.0, -1.0],
        ref_logprobs=[-2.0, -2.0],
        loss_mask=[1.0, 0.0],
        weight=2.0,
    )
    loss = coppice.Loss(
        kind="dapo",
        clip_low=0.1,
        clip_high=0.28,
        clip_dual=3.0,
        kl="k2",
        kl_coef=0.5,
        entropy_coef=0.25,
        temperature=0.5,
        advantage="given",
        aggregation="constant",
        denominator=64.0,
        importance_cap=2.0,
    )
    client.train_step(
        [coppice.TrainGroup(prompt=[7], samples=[sample])],
        lr=0.5,
        loss=loss,
        adam=coppice.Adam(beta1=0.0, weight_decay=0.125, grad_clip_norm=0.0),
        step_id="mine",
        running="keep",
        durable=True,
        expected_policy_version=0,
        max_policy_lag=2,
        return_logprobs=True,
    )
    request = daemon.requests[-1]
    wire = request.loss
    assert wire.kind == training_pb2.LossConfig.DAPO
    assert (wire.clip.low, wire.clip.high, wire.clip.dual) == pytest.approx((0.1, 0.28, 3.0))
    assert (wire.kl.estimator, wire.kl.coef) == (training_pb2.Kl.K2, 0.5)
    assert (wire.entropy_coef, wire.temperature, wire.importance_cap) == (0.25, 0.5, 2.0)
    assert wire.advantage == training_pb2.LossConfig.GIVEN
    assert wire.aggregation == training_pb2.LossConfig.CONSTANT and wire.denominator == 64
    assert request.optim.HasField("beta1") and request.optim.HasField("grad_clip_norm")
    assert not request.optim.HasField("beta2") and request.optim.weight_decay == 0.125
    assert (request.step_id, request.durable, request.max_policy_lag) == ("mine", True, 2)
    assert request.running == types_pb2.RUNNING_REQUESTS_KEEP and request.return_logprobs
    assert request.HasField("expected_policy_version")
    sent = request.groups[0].samples[0]
    assert (list(sent.advantages), list(sent.loss_mask), sent.weight) == ([0.5], [1.0, 0.0], 2.0)
    assert list(sent.old_logprobs) == [-1.0, -1.0] and list(sent.ref_logprobs) == [-2.0, -2.0]


def test_two_steps_get_two_ids(client):
    group = coppice.TrainGroup(prompt=[1], samples=[coppice.TrainSample(token_ids=[2], reward=1.0)])
    assert client.train_step([group], lr=0.0).step_id != client.train_step([group], lr=0.0).step_id


def test_rewards_of_the_wrong_shape_are_refused_before_the_wire(client, daemon):
    group = client.generate("hi", n=2, max_tokens=1)
    before = len(daemon.requests)
    with pytest.raises(coppice.InvalidArgumentError, match=r"rewards: want .*\[2\], got \[1\]"):
        client.train_step([group], [[1.0]], lr=1e-3)
    assert len(daemon.requests) == before


def test_an_unknown_choice_lists_the_choices(client):
    with pytest.raises(coppice.InvalidArgumentError, match="want one of .*grpo.*, got 'gpro'"):
        client.train_step([coppice.TrainGroup(prompt=[1], samples=[])], lr=0.0, loss="gpro")


def test_gradient_accumulation_in_two_calls(client, daemon):
    group = coppice.TrainGroup(prompt=[1], samples=[coppice.TrainSample(token_ids=[2], reward=1.0)])
    assert client.forward_backward([group], loss=coppice.Loss(denominator=4)).loss == 0.25
    result = client.optim_step(lr=1e-3)
    assert (result.policy_version, result.grad_norm) == (1, 2.0)


def test_the_remaining_calls(client):
    assert client.tokenize("ab") == [97, 98] and client.detokenize([97, 98]) == "ab"
    assert client.warm("abc").usage.computed_tokens == 3
    assert client.abort(request_id="r") == 2
    assert client.save_checkpoint("a") == "/checkpoints/a" and client.load_checkpoint("a") == 4
    assert client.get_policy().num_parameters == 10
    assert client.cache_stats().hit_rate == 0.25 and client.flush() == 5
    assert client.pause() == 1 and client.resume() == 1 and client.drain() == 0
    status = client.status()
    assert status.state == "serving" and status.limits["max_context"] == 128
    assert status.memory == {"weights": 1 << 20} and status.model.bos_token_id is None


@pytest.mark.parametrize(
    "code, error",
    [
        (grpc.StatusCode.INVALID_ARGUMENT, coppice.InvalidArgumentError),
        (grpc.StatusCode.FAILED_PRECONDITION, coppice.FailedPreconditionError),
        (grpc.StatusCode.NOT_FOUND, coppice.NotFoundError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, coppice.ResourceExhaustedError),
        (grpc.StatusCode.UNAVAILABLE, coppice.UnavailableError),
        (grpc.StatusCode.DATA_LOSS, coppice.DataLossError),
        (grpc.StatusCode.INTERNAL, coppice.InternalError),
        (grpc.StatusCode.UNAUTHENTICATED, coppice.UnauthenticatedError),
        (grpc.StatusCode.UNIMPLEMENTED, coppice.CoppiceError),
    ],
)
def test_a_status_becomes_its_error_class(client, daemon, code, error):
    for call in (client.get_policy, lambda: client.generate("hi", max_tokens=1)):
        daemon.fail_next = (code, "queue full: want room, got none; retry")
        with pytest.raises(error) as caught:
            call()
        assert caught.value.code == code
        assert caught.value.message == "queue full: want room, got none; retry"
        assert not isinstance(caught.value, coppice.ConnectionFailedError)


def test_nobody_at_the_address_is_a_connection_error_that_names_it(daemon):
    daemon.stop()
    with coppice.Client(daemon.address) as client:
        with pytest.raises(coppice.ConnectionFailedError, match=daemon.address):
            client.status()
        with pytest.raises(coppice.ConnectionFailedError, match=daemon.address):
            client.generate([1], max_tokens=1)


def test_a_replica_that_a_router_lost_is_not_taken_for_the_router(client, daemon):
    daemon.fail_next = (grpc.StatusCode.UNAVAILABLE, "replica b: Socket closed")
    with pytest.raises(coppice.ConnectionFailedError, match="^UNAVAILABLE .*: replica b: Socket"):
        client.get_policy()


def test_a_deadline_is_an_error_of_its_own(client, daemon):
    daemon.endless = True
    with pytest.raises(coppice.DeadlineExceededError):
        client.generate("hi", max_tokens=1, timeout=0.05)
    with pytest.raises(coppice.InvalidArgumentError, match="timeout"):
        client.generate("hi", timeout=0.0)


def test_metadata_goes_with_every_call(daemon):
    with coppice.Client(daemon.address, metadata=[("authorization", "Bearer x")]) as client:
        client.get_policy()
        client.generate("hi", max_tokens=1)
    assert [m["authorization"] for m in daemon.metadata] == ["Bearer x", "Bearer x"]
