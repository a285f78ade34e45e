"""A run by itself: it can be closed at any time, also while it works, and evaluates in pieces meanwhile."""

import threading
import time
from collections.abc import Callable, Iterator

import mlx.core as mx
import pytest

from klein_mlx import KleinPipeline
from klein_mlx.request import check
from klein_mlx.runtime.run import PIECE_SECONDS, Run, Step


@pytest.fixture(scope="module")
def pipe() -> KleinPipeline:
    return KleinPipeline.from_pretrained("tiny", keep="all")


def working(pipe: KleinPipeline, work: Callable[[Run], Iterator[Step]]) -> Run:
    run = Run(check(pipe.config, prompt="a red circle"))
    run.start(work(run))
    return run


def test_a_run_is_closed_between_parts_of_a_step(pipe: KleinPipeline) -> None:
    """From another thread, while it works: what it held is freed, and iterating it ends without an error."""
    freed, parts, started = threading.Event(), [], threading.Event()

    def work(run: Run) -> Iterator[Step]:
        try:
            for _ in range(10_000):
                run.part_done(mx.ones((2,)) + 1)
                parts.append(1)
                started.set()
                time.sleep(0.001)
            yield from ()
        finally:
            freed.set()

    run = working(pipe, work)
    events: list[object] = []
    thread = threading.Thread(target=lambda: events.extend(run))
    thread.start()
    assert started.wait(5)
    run.close()
    thread.join(5)
    assert freed.is_set()
    assert events == []
    assert len(parts) < 10_000
    assert list(run) == []


def test_pieces_are_as_long_as_they_should_be(pipe: KleinPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short parts go by many at once; long ones are evaluated one by one."""
    evaluated: list[int] = []
    now = 0.0
    monkeypatch.setattr("klein_mlx.runtime.run.time.perf_counter", lambda: now)

    def work(seconds: float, count: int) -> Callable[[Run], Iterator[Step]]:
        def run_parts(run: Run) -> Iterator[Step]:
            nonlocal now
            for number in range(count):
                now += seconds
                run.part_done(mx.array(1))
                if run._waiting == 0:
                    evaluated.append(number)
            yield from ()

        return run_parts

    list(working(pipe, work(PIECE_SECONDS, 3)))
    assert evaluated == [0, 1, 2]
    evaluated.clear()
    list(working(pipe, work(PIECE_SECONDS / 40.5, 100)))
    assert evaluated == [0, 40, 80]


def test_two_runs_share_the_parts() -> None:
    """Steps of two open runs, turn by turn: one transformer for both, freed when the second has done with it."""
    pipe = KleinPipeline.from_pretrained("tiny", keep="nothing")
    alone = [step.latents for step in pipe.stream("a red circle", seed=7) if isinstance(step, Step)]
    first, second = (pipe.stream("a red circle", seed=7) for _ in range(2))
    next(first)
    shared = pipe.parts.loaded["transformer"]
    next(second)
    assert pipe.parts.loaded["transformer"] is shared
    rest = [step.latents for step in first if isinstance(step, Step)]
    assert mx.array_equal(rest[-1], alone[-1])
    assert pipe.parts.loaded["transformer"] is shared
    assert mx.array_equal([step.latents for step in second if isinstance(step, Step)][-1], alone[-1])
    assert not pipe.parts.loaded
