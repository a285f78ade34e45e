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
    """Short parts go by many at once; long ones are evaluated one by one, each while the one before it is computed."""
    now, seconds = 0.0, 0.0
    started: list[int] = []
    awaited: list[int] = []

    def wait(array: mx.array) -> None:
        nonlocal now
        last = awaited[-1] if awaited else -1
        awaited.append(int(array.item()))
        now += (awaited[-1] - last) * seconds

    monkeypatch.setattr("klein_mlx.runtime.run.time.perf_counter", lambda: now)
    monkeypatch.setattr("klein_mlx.runtime.run.mx.async_eval", lambda array: started.append(int(array.item())))
    monkeypatch.setattr("klein_mlx.runtime.run.mx.eval", wait)

    def work(count: int) -> Callable[[Run], Iterator[Step]]:
        def run_parts(run: Run) -> Iterator[Step]:
            for number in range(count):
                run.part_done(mx.array(number))
            yield from ()

        return run_parts

    seconds = PIECE_SECONDS
    list(working(pipe, work(4)))
    assert (started, awaited) == ([0, 1, 2, 3], [0, 1, 2])
    started.clear()
    awaited.clear()
    seconds = PIECE_SECONDS / 40.5
    list(working(pipe, work(130)))
    assert (started, awaited) == ([0, 1, 41, 81, 121], [0, 1, 41, 81])


def test_nothing_is_held_after_a_phase(pipe: KleinPipeline) -> None:
    """What a phase evaluated last is let go, also where the phase fails."""
    run = Run(check(pipe.config, prompt="a red circle"))
    before = mx.get_active_memory()

    def broken(array: mx.array) -> None:
        run.part_done(array)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), run.timed("steps"):
        broken(mx.zeros((1 << 20,)) + 1)
    mx.synchronize()
    assert mx.get_active_memory() - before < 1 << 20


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
