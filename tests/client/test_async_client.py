"""The asyncio client: the same calls, and cancellation of tasks."""

import asyncio

import coppice
import pytest


def run(daemon, body):
    """Runs `body(client)` in a fresh event loop."""

    async def session():
        async with coppice.AsyncClient(daemon.address, timeout=60) as client:
            return await body(client)

    return asyncio.run(session())


def test_generate_and_train(daemon):
    async def body(client):
        group = await client.generate([{"role": "user", "content": "hi"}], n=2, retain=True)
        return await client.train_step([group], [[0.0, 1.0]], lr=1e-3)

    assert run(daemon, body).policy_version == 1
    assert daemon.requests[-1].groups[0].rollout_id == "rollout-1"


def test_stream_yields_events_as_they_arrive(daemon):
    async def body(client):
        async with await client.generate_stream("hi", max_tokens=2) as stream:
            return [type(event).__name__ async for event in stream]

    assert run(daemon, body) == ["Started", "Chunk", "Chunk", "Finished", "GroupFinished"]


def test_generate_many_runs_together_and_keeps_order(daemon):
    groups = run(daemon, lambda client: client.generate_many(["a", "bb"], max_tokens=1, seed=3))
    assert [(g.seed, g.usage.prompt_tokens) for g in groups] == [(3, 1), (4, 2)]


def test_leaving_a_stream_early_cancels_the_call(daemon):
    daemon.endless = True

    async def body(client):
        async with await client.generate_stream("hi", max_tokens=1) as stream:
            async for event in stream:
                if isinstance(event, coppice.Chunk):
                    break
        with pytest.raises(coppice.CancelledError):
            await stream.collect()

    run(daemon, body)
    assert daemon.cancelled.wait(timeout=30)


def test_cancelling_the_task_cancels_the_call(daemon):
    daemon.endless = True

    async def body(client):
        task = asyncio.create_task(client.generate("hi", max_tokens=1))
        while not daemon.requests:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(daemon, body)
    assert daemon.cancelled.wait(timeout=30)


def test_errors_are_the_same_classes(daemon):
    daemon.stop()

    async def body(client):
        with pytest.raises(coppice.ConnectionFailedError, match=daemon.address):
            await client.status()
        with pytest.raises(coppice.ConnectionFailedError, match=daemon.address):
            await client.generate([1])

    run(daemon, body)


def test_the_remaining_calls(daemon):
    async def body(client):
        assert await client.tokenize("ab") == [97, 98] and await client.detokenize([97]) == "a"
        assert (await client.score([([1], [[2]])])).responses[0][0].logprobs == [-2.0]
        assert (await client.warm("abc")).usage.computed_tokens == 3
        assert await client.abort(session_id="s") == 2
        assert await client.save_checkpoint("a") == "/checkpoints/a"
        assert await client.load_checkpoint("a") == 4
        assert (await client.get_policy()).policy_version == 3
        assert (await client.cache_stats()).block_tokens == 16 and await client.flush() == 5
        assert await client.pause() == 1 and await client.resume() == 1
        assert await client.drain() == 0
        group = coppice.TrainGroup(
            prompt=[1], samples=[coppice.TrainSample(token_ids=[2], reward=1.0)]
        )
        assert (await client.forward_backward([group])).loss == 0.25
        assert (await client.optim_step(lr=0.1)).policy_version == 1

    run(daemon, body)


def test_both_clients_offer_the_same_calls():
    def public(kind):
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(coppice.Client) == public(coppice.AsyncClient)
