"""Generation of the real model: templates, sampling, log-probs, the prefix cache."""

import json
import pathlib

import coppice
import pytest
from conftest import LOGPROB_TOLERANCE

LONG = [
    {"role": "system", "content": "You are a careful assistant. " * 30},
    {"role": "user", "content": "What is the capital of France?"},
]
# Made by transformers, see tests/client/make_chat_golden.py.
GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "client/chat_golden.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize(
    "case", GOLDEN["model"], ids=lambda c: f"{c['name']}-{c['add_generation_prompt']}"
)
def test_chat_prompts_equal_those_of_transformers(client, case):
    text = client.render_chat(case["messages"], add_generation_prompt=case["add_generation_prompt"])
    assert text == case["text"]
    assert client.tokenize(text, add_special=False) == case["token_ids"]


def test_the_model_answers(client):
    group = client.generate(LONG, temperature=0.0, max_tokens=16)
    assert "Paris" in group.samples[0].text
    assert group.samples[0].finish_reason in ("stop_token", "length")


def test_text_is_the_tokens_decoded(client):
    sample = client.generate("The sea is", temperature=0.0, max_tokens=12).samples[0]
    assert sample.text == client.detokenize(sample.token_ids, skip_special=True)


def test_the_same_seed_gives_the_same_tokens_and_samples_differ(client):
    first = client.generate(LONG, n=4, max_tokens=12, seed=11)
    again = client.generate(LONG, n=4, max_tokens=12, seed=11)
    other = client.generate(LONG, n=4, max_tokens=12, seed=12)
    tokens = [sample.token_ids for sample in first]
    assert tokens == [sample.token_ids for sample in again]
    assert tokens != [sample.token_ids for sample in other]
    assert len({tuple(ids) for ids in tokens}) > 1


def test_a_drawn_seed_is_returned_and_repeats_the_call(client):
    drawn = client.generate("Once upon a time", max_tokens=8)
    again = client.generate("Once upon a time", max_tokens=8, seed=drawn.seed)
    assert drawn.samples[0].token_ids == again.samples[0].token_ids


def test_score_agrees_with_the_log_probs_of_generate(client):
    group = client.generate(LONG, n=3, max_tokens=12, seed=5, logprobs="raw")
    scored = client.score([(group.prompt_token_ids, [s.token_ids for s in group])])
    assert scored.policy_version == group.policy_version
    for sample, score in zip(group, scored.responses[0], strict=True):
        assert score.logprobs == pytest.approx(sample.logprobs, abs=LOGPROB_TOLERANCE)


def test_a_repeated_prompt_comes_from_the_cache_and_answers_alike(client):
    client.flush()
    cold = client.generate(LONG, temperature=0.0, max_tokens=8)
    warm = client.generate(LONG, temperature=0.0, max_tokens=8)
    again = client.generate(
        LONG, temperature=0.0, max_tokens=8, cache=coppice.Cache(skip_read=True)
    )
    tokens = cold.usage.prompt_tokens
    assert cold.usage.computed_tokens == tokens and cold.usage.cached_tokens == 0
    assert warm.usage.cached_tokens >= tokens - 2 * client.cache_stats().block_tokens
    assert warm.usage.cached_tokens + warm.usage.computed_tokens == tokens
    assert again.usage.cached_tokens == 0 and again.usage.miss_reason == "opted_out"
    assert cold.samples[0].token_ids == warm.samples[0].token_ids == again.samples[0].token_ids


def test_a_group_runs_its_prompt_once(client):
    client.flush()
    group = client.generate(LONG, n=8, max_tokens=4, seed=1)
    assert group.usage.computed_tokens == group.usage.prompt_tokens == len(group.prompt_token_ids)


def test_calls_that_arrive_together_share_one_prefill(client):
    client.flush()
    groups = client.generate_many([LONG] * 4, max_tokens=4, seed=1)
    tokens = groups[0].usage.prompt_tokens
    computed = sum(group.usage.computed_tokens for group in groups)
    spare = client.cache_stats().block_tokens  # the last, partial block is never shared
    assert tokens <= computed <= tokens + 3 * spare


def test_warm_leaves_the_prompt_in_the_cache(client):
    client.flush()
    warmed = client.warm(LONG)
    assert warmed.usage.written_tokens > 0
    used = client.generate(LONG, max_tokens=1).usage
    assert used.cached_tokens >= warmed.usage.written_tokens - client.cache_stats().block_tokens


def test_stop_strings_end_a_sample(client):
    free = client.generate("1, 2, 3, 4,", temperature=0.0, max_tokens=12).samples[0]
    assert " 6" in free.text
    cut = client.generate("1, 2, 3, 4,", temperature=0.0, max_tokens=12, stop=" 6").samples[0]
    assert cut.finish_reason == "stop_string" and len(cut.token_ids) < len(free.token_ids)
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]


def test_logit_bias_and_top_logprobs(client):
    group = client.generate(
        "The", max_tokens=3, temperature=0.0, logit_bias={42: 100.0}, logprobs="raw", top_logprobs=2
    )
    assert group.samples[0].token_ids == [42, 42, 42]
    assert [len(top) for top in group.samples[0].top_logprobs] == [2, 2, 2]


@pytest.mark.parametrize(
    "options, field",
    [
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ],
)
def test_a_bad_option_is_refused_by_name_and_changes_nothing(client, options, field):
    before = client.cache_stats()
    with pytest.raises(coppice.InvalidArgumentError, match=field):
        client.generate("hi", **options)
    assert client.cache_stats() == before


@pytest.mark.parametrize("prompt", ["", [], [10**6], [-1], [5] * 9000])
def test_a_bad_prompt_is_refused(client, prompt):
    with pytest.raises(coppice.InvalidArgumentError):
        client.generate(prompt, max_tokens=1)
