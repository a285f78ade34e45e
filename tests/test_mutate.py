"""Seeded wrong bytes in every kind of file: refused or read. For more: `python tests/mutate.py --count 100000`."""

import mutate
import pytest
from folders import refusal

from klein_mlx.errors import CheckpointError


def test_no_mutation_is_a_bug() -> None:
    """Each worker process starts once per kind; the mutations themselves take about a millisecond."""
    tallies = mutate.run(2000, first=1_000_000)
    assert not [bug for tally in tallies.values() for bug in tally.bugs]
    assert sum(tally.read + tally.refused for tally in tallies.values()) == 2000
    for name, tally in tallies.items():  # else they change nothing that counts, or everything
        assert tally.refused > 0, name
        assert tally.read > 0, name


def test_a_bug_and_an_abort_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: object) -> None:
        if b"x_embedder" not in path.read_bytes():  # type: ignore[attr-defined]
            raise ZeroDivisionError("here")

    kind = mutate.Kind(mutate._in_folder("transformer/config.json"), lambda path: None, 1, (lambda *_: b"{}",))
    monkeypatch.setitem(mutate.KINDS, "broken", mutate.Kind(kind.make, lambda path: None, 1, kind.ways))
    assert mutate.work("broken", 0, 3) == {"kind": "broken", "read": 3, "refused": 0, "bugs": []}
    calls = []

    def read(path: object) -> None:
        calls.append(path)
        if len(calls) > 2:
            broken(path)

    monkeypatch.setitem(mutate.KINDS, "broken", mutate.Kind(kind.make, read, 1, kind.ways))
    assert mutate.work("broken", 5, 3)["bugs"] == [(6, "ZeroDivisionError: here"), (7, "ZeroDivisionError: here")]
    tally = mutate.Tally()
    jobs: list[object] = []
    mutate._collect(tally, "", -11, mutate.Path("/absent"), 9, "broken", jobs)
    assert tally.bugs == [(-1, "the process ended with -11")]


def test_a_message_is_one_printable_line() -> None:
    """Whatever it quotes: a name in a file may hold what a terminal obeys."""

    def refuse() -> None:
        raise CheckpointError(f"a\x1b[2J\nb\udcff {'x' * 9999} 🦊 end")

    told = refusal(refuse)
    assert told.isprintable()
    assert len(told) < 1100
    assert told.startswith("a\\x1b[2J b\\udcff xxx")
    assert told.endswith("xxx 🦊 end")
