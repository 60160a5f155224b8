"""Updates of the real policy through the client."""

import coppice
import pytest
from conftest import LOGPROB_TOLERANCE

PROMPT = [{"role": "user", "content": "Name a colour."}]
LR = 1e-5


def rollout(client, **options):
    return client.generate(
        PROMPT, n=4, max_tokens=6, seed=3, logprobs="as_sampled", retain=True, **options
    )


def test_a_step_raises_the_version_and_the_next_answer_is_the_new_policys(client):
    before = client.get_policy().policy_version
    client.generate(PROMPT, max_tokens=1)
    group = rollout(client)
    result = client.train_step([group], [[1.0, 0.0, 0.5, 0.0]], lr=LR, return_logprobs=True)
    assert result.policy_version == before + 1 and not result.skipped
    assert result.grad_norm > 0 and result.tokens.unique < result.tokens.flat
    after = rollout(client)
    assert after.policy_version == before + 1
    assert {v for sample in after for v in sample.policy_versions} == {before + 1}
    assert after.usage.cached_tokens == 0 and after.usage.miss_reason == "policy_version"
    # On-policy: the trainer's log-probs are the sampler's.
    for sample, stats in zip(group, result.samples, strict=True):
        assert stats.logprobs == pytest.approx(sample.logprobs, abs=LOGPROB_TOLERANCE)


def test_a_step_makes_the_rewarded_response_likelier(client):
    group = rollout(client)
    responses = [sample.token_ids for sample in group]
    rewarded = next(i for i, ids in enumerate(responses) if responses.count(ids) == 1)
    prompt = group.prompt_token_ids
    before = client.score([(prompt, responses)]).responses[0]
    rewards = [float(i == rewarded) for i in range(len(responses))]
    client.train_step([group], [rewards], lr=LR)
    after = client.score([(prompt, responses)]).responses[0]
    assert sum(after[rewarded].logprobs) > sum(before[rewarded].logprobs)


def test_a_repeated_step_id_returns_the_first_answer(client):
    group = rollout(client)
    first = client.train_step([group], [[1.0, 0.0, 0.0, 0.0]], lr=LR, step_id="once")
    again = client.train_step([group], [[1.0, 0.0, 0.0, 0.0]], lr=LR, step_id="once")
    assert again.repeated and not first.repeated
    assert again.policy_version == first.policy_version == client.get_policy().policy_version
    assert again.loss == first.loss


def test_gradients_of_two_calls_make_one_version(client):
    before = client.get_policy().policy_version
    groups = [rollout(client), rollout(client)]
    for group in groups:
        half = client.forward_backward(
            [group], [[1.0, 0.0, 0.0, 0.0]], loss=coppice.Loss(denominator=8)
        )
        assert half.policy_version == before
    assert client.get_policy().pending_gradients
    assert client.optim_step(lr=LR).policy_version == before + 1
    with pytest.raises(coppice.FailedPreconditionError):
        client.optim_step(lr=LR)


def test_a_checkpoint_brings_the_old_answers_back(client):
    client.save_checkpoint("before")
    version = client.get_policy().policy_version
    greedy = client.generate(PROMPT, temperature=0.0, max_tokens=8, logprobs="raw")
    client.train_step([rollout(client)], [[1.0, 0.0, 0.0, 0.0]], lr=1e-3)
    assert client.load_checkpoint("before") == version
    again = client.generate(PROMPT, temperature=0.0, max_tokens=8, logprobs="raw")
    assert again.samples[0].token_ids == greedy.samples[0].token_ids
    assert again.samples[0].logprobs == greedy.samples[0].logprobs


@pytest.mark.parametrize(
    "options, field",
    [
        ({"advantages": [[1.0, [1.0] * 99, 0.0, 0.0]]}, "advantages"),
        ({"rewards": [[float("nan"), 0.0, 0.0, 0.0]]}, "reward"),
        ({"rewards": [[1.0, 0.0, 0.0, 0.0]], "lr": -1.0}, "learning_rate"),
    ],
)
def test_a_bad_step_is_refused_by_name_and_changes_nothing(client, options, field):
    group = rollout(client)
    before = client.get_policy()
    with pytest.raises(coppice.InvalidArgumentError, match=field):
        client.train_step([group], **({"lr": LR} | options))
    assert client.get_policy() == before


def test_unknown_rollouts_and_stale_versions_are_refused(client):
    group = rollout(client)
    sample = coppice.TrainSample(rollout_sample=0, reward=1.0)
    with pytest.raises(coppice.NotFoundError):
        client.train_step([coppice.TrainGroup(rollout_id="nobody", samples=[sample])], lr=LR)
    rewards = [[1.0, 0.0, 0.0, 0.0]]
    with pytest.raises(coppice.FailedPreconditionError):
        client.train_step([group], rewards, lr=LR, expected_policy_version=10**6)
    client.train_step([group], rewards, lr=LR)
    with pytest.raises(coppice.FailedPreconditionError):
        client.train_step([group], rewards, lr=LR)
    assert client.train_step([group], rewards, lr=LR, max_policy_lag=1).grad_norm > 0
