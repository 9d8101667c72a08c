"""`engine --workload serving`: the same requests for everybody, when each gets what, and what is wrong where not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.tools.profiling import GPT2, T5, options
from tools.profile import engine, serving, serving_traffic, workers
from tools.profile.__main__ import command
from tools.profile.serving import Server
from tools.profile.serving_traffic import FEWEST, MOST, Requests, Served
from tools.profile.serving_worker import Traffic, serve_batches


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "REST", 0)
    monkeypatch.setattr(engine, "SHAPES", {"gpt2": GPT2, "t5": T5})
    monkeypatch.setattr(serving, "CHECKED", 3)
    monkeypatch.setattr(serving_traffic, "MOST", 16)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("shape", ["gpt2", "t5"])
def test_continuous_and_static_batches_serve_the_same_requests_beside_transformers(shape: str) -> None:
    chosen = options(against=["transformers"], shapes=[shape], batches=[2, 4], requests=6, max_num_seqs=3)
    report = serving.run(chosen)
    assert report.failures == []
    assert [(row["arrivals"], row["who"], row["precision"]) for row in report.rows] == [
        ("at once", "tandem", "int8"),
        ("2 x saturation", "tandem", "int8"),
        ("2 x saturation", "tandem static", "int8"),
        ("2 x saturation", "transformers", "fp32"),
    ]
    for row in report.rows:
        assert row["note"] == ""
        assert all(float(row[name] or 0) > 0 for name in ("tokens/s", "x ours", "done/s", "first s", "latency 99%"))
        assert row["batch"] == 3 if row["who"] == "tandem" else row["batch"] in (2, 4)
    at_once, ours, *_ = report.rows
    assert at_once["arrivals/s"] is None
    assert ours["arrivals/s"] == 2 * float(at_once["done/s"] or 0)


def test_requests_are_the_same_every_time_and_as_long_as_they_say() -> None:
    requests = Requests.draw(400, 3000)
    assert requests == Requests.draw(400, 3000)
    assert (min(map(len, requests.prompts)), max(map(len, requests.prompts))) == (20, 100)
    assert min(requests.lengths) == FEWEST and 240 < max(requests.lengths) <= MOST
    middle = sum(length <= math.sqrt(FEWEST * MOST) for length in requests.lengths) / 400
    assert middle == pytest.approx(0.5, abs=0.1)  # log-uniform
    assert requests.arrivals(None) == [0.0] * 400
    assert requests.arrivals(4)[0] == 0
    assert requests.arrivals(4)[-1] == pytest.approx(100, rel=0.2)
    some = requests.some(3, most_tokens=5)
    assert (len(some.prompts), max(some.lengths), some.times) == (3, 5, requests.times[:3])


def test_figures_are_of_the_time_from_arrival_to_tokens() -> None:
    served = Served(arrivals=[1.0, 2.0], first=[2.0, 4.0], last=[3.0, 6.0], tokens=[[7] * 4, [7] * 6], others=0.25)
    assert (served.makespan, served.speed, served.rate) == (5, 2, 0.4)
    figures = served.figures()
    assert (figures["first s"], figures["first 50%"], figures["latency s"], figures["% others"]) == (1.5, 1.5, 3, 25)
    assert figures["latency 99%"] == pytest.approx(3.98)


def test_a_static_batch_takes_who_is_there_and_runs_to_its_longest() -> None:
    asked: list[tuple[int, int]] = []

    class Peer:
        def generate(self, prompts: list[list[int]], length: int) -> list[list[int]]:
            asked.append((len(prompts), length))
            return [[prompt[0]] * length for prompt in prompts]

    traffic = Traffic([[1], [2], [3], [4]], [3, 5, 2, 4], [0, 0, 0, 0.05])
    serve_batches(Peer(), traffic, most=2)
    assert asked == [(2, 5), (1, 2), (1, 4)]
    answer = traffic.answer()
    assert answer["tokens"] == [[1] * 3, [2] * 5, [3] * 2, [4] * 4]
    assert answer["first"] == answer["last"]
    assert answer["first"][3] >= 0.05


def test_who_gets_too_few_tokens_has_not_been_served() -> None:
    traffic = Traffic([[1]], [3], [0.0])
    traffic.note(0, [5, 5])
    assert traffic.first and not traffic.last
    with pytest.raises(ValueError, match="request 0 did not get its 3 tokens"):
        traffic.answer()


def test_tokens_of_ours_that_change_with_the_batch_are_a_failure() -> None:
    def served(token: int) -> Served:
        return Served([0.0], [1.0], [2.0], [[token]], 0.0)

    ours = serving.Contender("tandem", "int8")
    at_once, static = Server(ours, static=False, runs=[served(1)]), Server(ours, runs=[served(1), served(2)])
    broken = Server(ours, failed="no room")
    peer = Server(serving.Contender("ctranslate2", "int8"), runs=[served(3)])
    found = serving.failures("tiny, int8", [at_once, static, broken, peer])
    assert found == [
        "tiny, int8: tandem static's tokens depend on when requests arrive",
        "tiny, int8: tandem static could not be measured: no room",
    ]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--workload", "resting"], "resting"),
        (["--workload", "serving", "--prompt", "8"], "engine's serving takes no --prompt"),
        (["--workload", "serving", "--requests", "0"], "--requests"),
        (["--workload", "beams", "--max-num-seqs", "8"], "engine's beams takes no --max-num-seqs"),
        (["--workload", "copying", "--against", "transformers"], "transformers"),
        (["--workload", "copying", "--shape", "/no/such/model"], "/no/such/model"),
        (["--requests", "8"], "engine's decode takes no --requests"),
    ],
)
def test_what_a_workload_does_not_take_is_one_line(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[Any]
) -> None:
    assert command(["engine", *arguments]) == 2
    error = capsys.readouterr().err
    assert named in error and len(error.splitlines()) == 1


def test_another_operation_has_no_workloads(capsys: pytest.CaptureFixture[Any]) -> None:
    assert command(["load", "--workload", "serving"]) == 2
    assert "load takes no --workload" in capsys.readouterr().err
