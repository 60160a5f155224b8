"""Cancelling, aborting, pausing, draining, and a daemon that goes away."""

import asyncio
import threading
import urllib.request

import coppice
import pytest

ENDLESS = {"max_tokens": 2000, "ignore_eos": True, "return_text": False}


def leased_blocks_become(client, want):
    """Asks until the daemon says `want`: the engine frees a cancelled call in its next step."""
    return any(client.cache_stats().leased_blocks == want for _ in range(20000))


def test_cancelling_a_stream_frees_its_blocks(client):
    with client.generate_stream("Count: 1, 2,", n=4, **ENDLESS) as stream:
        for event in stream:
            if isinstance(event, coppice.Chunk):
                break
        assert client.cache_stats().leased_blocks > 0
    assert leased_blocks_become(client, 0)
    status = client.status()
    assert status.running_requests == 0 and status.running_samples == 0


def test_abort_ends_a_call_by_name_with_what_it_has(client):
    with client.generate_stream("Count: 1, 2,", request_id="long", **ENDLESS) as stream:
        events = iter(stream)
        while not isinstance(next(events), coppice.Chunk):
            pass
        assert client.abort(request_id="long") == 1
        group = stream.collect()
    assert group.samples[0].finish_reason == "aborted" and group.samples[0].token_ids
    assert client.abort(request_id="long") == 0
    assert leased_blocks_become(client, 0)


def test_a_deadline_ends_a_call_and_frees_its_blocks(client):
    with pytest.raises(coppice.DeadlineExceededError):
        client.generate("Count: 1, 2,", timeout=0.5, **ENDLESS)
    assert leased_blocks_become(client, 0)


def test_pause_holds_samples_and_resume_finishes_them_alike(client):
    options = {"max_tokens": 24, "ignore_eos": True, "seed": 2}
    alone = client.generate("The sea is", **options)
    with client.generate_stream("The sea is", **options) as stream:
        events = iter(stream)
        while not isinstance(next(events), coppice.Chunk):
            pass
        client.pause()
        assert client.status().state == "paused"
        client.resume()
        assert stream.collect().samples[0].token_ids == alone.samples[0].token_ids


def test_asyncio_calls_run_together(daemon):
    async def session():
        async with coppice.AsyncClient(daemon.address, timeout=300) as client:
            prompts = [f"Say {i}:" for i in range(6)]
            groups = await client.generate_many(prompts, n=2, max_tokens=6, seed=1)
            task = asyncio.create_task(client.generate("Count: 1, 2,", **ENDLESS))
            while (await client.status()).running_requests == 0:
                pass
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while (await client.cache_stats()).leased_blocks:
                pass
            result = await client.train_step(
                groups[:1], [[1.0, 0.0]], lr=1e-6, max_policy_lag=10**6
            )
            return groups, result

    groups, result = asyncio.run(session())
    assert [len(group) for group in groups] == [2] * 6
    assert result.policy_version >= 1


def test_metrics_show_the_hits(daemon, client):
    for _ in range(2):
        client.generate(
            "A prompt that is long enough for one block of the cache, twice.", max_tokens=1
        )
    with urllib.request.urlopen(daemon.metrics_url, timeout=30) as response:
        text = response.read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    hits = {name: float(v) for name, v in values.items() if "prompt_tokens_hit_total" in name}
    assert sum(hits.values()) > 0
    assert float(values["coppice_weight_sync_bytes_total"]) == 0


def test_a_killed_daemon_is_a_connection_error_in_every_call(start):
    victim = start("--kv_blocks=600")
    with coppice.Client(victim.address, timeout=60) as client:
        with client.generate_stream("Count: 1, 2,", **ENDLESS) as stream:
            events = iter(stream)
            while not isinstance(next(events), coppice.Chunk):
                pass
            victim.kill()
            with pytest.raises(coppice.ConnectionFailedError, match=victim.address):
                stream.collect()
        with pytest.raises(coppice.ConnectionFailedError, match=victim.address):
            client.status()


def test_sigterm_drains_refuses_and_exits_with_zero(start):
    daemon = start("--kv_blocks=600", "--drain_timeout_s=600")
    with coppice.Client(daemon.address, timeout=600) as client:
        with client.generate_stream("The sea is", max_tokens=40, ignore_eos=True) as stream:
            events = iter(stream)
            while not isinstance(next(events), coppice.Chunk):
                pass
            exit_code = []
            waiter = threading.Thread(target=lambda: exit_code.append(daemon.terminate()))
            waiter.start()
            assert len(stream.collect().samples[0].token_ids) == 40
        waiter.join()
        assert exit_code == [0]
        with pytest.raises(coppice.UnavailableError):
            client.generate("hi", max_tokens=1)
