"""Coroutines that share an engine: their requests run together, and leave when they are no longer wanted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from engine import AsyncLLM, BeamSearchParams, EngineDeadError, RequestOutput, SamplingParams
from tests.conftest import tiny_model
from tests.engine.llms import llm_of

LONG = SamplingParams(temperature=1.0, seed=5, max_tokens=40, ignore_eos=True)


@pytest.fixture(params=["encoder_decoder", "decoder_only"])
def served(request: pytest.FixtureRequest) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(llm_of(tiny_model(request.param), max_num_seqs=6))
    yield llm
    llm.shutdown()


def prompt(number: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": [5 + number % 50, *range(4, 6 + number % 7)]}


async def collect(llm: AsyncLLM, number: int, params: Any = LONG, **options: Any) -> list[RequestOutput]:
    return [output async for output in llm.generate(prompt(number), params, **options)]


async def idle(llm: AsyncLLM) -> None:
    for _ in range(500):
        if not llm.llm.engine.has_unfinished_requests():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the engine never came to rest")


def test_outputs_grow_and_are_those_of_generate(served: AsyncLLM) -> None:
    async def work() -> list[list[RequestOutput]]:
        return await asyncio.gather(*(collect(served, i) for i in range(9)))

    expected = served.llm.generate([prompt(i) for i in range(9)], LONG, use_tqdm=False)
    for outputs, right in zip(asyncio.run(work()), expected, strict=True):
        assert outputs[-1].finished and not any(output.finished for output in outputs[:-1])
        assert outputs[-1].outputs == right.outputs
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        assert lengths == sorted(lengths)
        metrics = outputs[-1].metrics
        assert metrics is not None and metrics.first_token_time is not None and metrics.finished_time is not None
        assert metrics.arrival_time < metrics.first_token_time < metrics.finished_time


def test_closing_the_iterator_frees_everything(served: AsyncLLM) -> None:
    async def work() -> None:
        stream = served.generate(prompt(1), SamplingParams(max_tokens=None, ignore_eos=True))
        async for _ in stream:
            break
        await stream.aclose()
        task = asyncio.create_task(collect(served, 2))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle(served)

    asyncio.run(work())
    assert not any(served.llm.engine.cache.pool.holders)


def test_abort_ends_a_request_with_what_there_is(served: AsyncLLM) -> None:
    async def work() -> RequestOutput:
        last = None
        async for output in served.generate(prompt(1), LONG, "mine"):
            if last is None:
                await served.abort("mine")
            last = output
        assert last is not None
        return last

    output = asyncio.run(work())
    assert output.finished and output.outputs[0].finish_reason == "abort"


def test_a_search_and_samples_run_together(served: AsyncLLM) -> None:
    search = BeamSearchParams(3, max_tokens=10)

    async def work() -> list[list[RequestOutput]]:
        return await asyncio.gather(collect(served, 1, search), collect(served, 2), collect(served, 3, search))

    found = asyncio.run(work())
    expected = served.llm.beam_search([prompt(1), prompt(3)], search)
    for outputs, right in zip(found[::2], expected, strict=True):
        assert [c.token_ids for c in outputs[-1].outputs] == [s.token_ids for s in right.sequences]


def test_what_cannot_run_is_a_sentence_and_harms_nobody(served: AsyncLLM) -> None:
    async def work() -> None:
        other = asyncio.create_task(collect(served, 1))
        for bad in ({"prompt_token_ids": [999]}, "text", 5):
            with pytest.raises(ValueError, match=r"\w+ \w+"):
                async for _ in served.generate(bad, LONG):  # type: ignore[arg-type]
                    pass
        await served.abort(5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="priority"):
            await collect(served, 1, priority=2**40)
        first = served.generate(prompt(3), LONG, "same")
        await anext(first)
        with pytest.raises(ValueError, match="in progress"):
            await collect(served, 4, SamplingParams(max_tokens=1), request_id="same")
        assert [output async for output in first][-1].finished and (await other)[-1].finished

    asyncio.run(work())


def test_an_engine_that_fails_says_so_to_all_who_wait(served: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(served.llm.engine.runner, "logits", fail)

    async def work() -> None:
        results = await asyncio.gather(*(collect(served, i) for i in range(3)), return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) and "MemoryError" in str(result) for result in results)
        with pytest.raises(EngineDeadError):
            await collect(served, 1)

    asyncio.run(work())
    with pytest.raises(EngineDeadError):
        served.check_health()
    served.shutdown()
    assert not served.llm.has_unfinished_requests()


def test_no_output_is_lost_whenever_it_comes(served: AsyncLLM) -> None:
    """Consumers that give way between outputs, as those that write to a socket do."""

    async def read(number: int) -> list[int]:
        async for output in served.generate(prompt(number), LONG):
            last = output
            await asyncio.sleep(0)
        return last.outputs[0].token_ids

    async def work() -> list[list[int]]:
        return await asyncio.gather(*(read(i) for i in range(200)))

    expected = served.llm.generate([prompt(i) for i in range(200)], LONG, use_tqdm=False)
    assert asyncio.run(work()) == [output.outputs[0].token_ids for output in expected]


def test_an_id_of_another_caller_does_them_no_harm(served: AsyncLLM) -> None:
    async def work() -> None:
        served.llm.add_request("x", prompt(1), LONG)
        with pytest.raises(ValueError, match="in progress"):
            await collect(served, 2, request_id="x")
        with pytest.raises(ValueError, match="request_id"):
            await collect(served, 2, request_id=5)
        await idle(served)

    asyncio.run(work())
    (output,) = served.llm.step()
    assert output.outputs[0].finish_reason == "length"
