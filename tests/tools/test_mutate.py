"""Seeded wrong bytes in every kind of file: refused or read. For more: `tests/tools/mutate.py --count 100000`."""

from pathlib import Path

import mutate
import pytest
from folders import refusal

from klein_mlx.errors import CheckpointError


@pytest.mark.parametrize("name", mutate.KINDS)
def test_no_mutation_is_a_bug(name: str) -> None:
    """A mutation takes some milliseconds."""
    told = mutate.work(name, 1_000_000, 24)
    assert told["bugs"] == []
    assert told["refused"] > 0  # else they change nothing that counts, or everything
    assert told["read"] > 0
    assert told["read"] + told["refused"] == 24


def test_a_bug_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_abort_is_a_bug_and_the_rest_is_done(tmp_path: Path) -> None:
    tallies = {"gguf": mutate.Tally(), "klein.json": mutate.Tally()}
    (tmp_path / "mark").write_text("7")
    jobs = [("klein.json", 0, 3), ("gguf", 5, 9), ("klein.json", 3, 2)]
    out = '{"kind": "klein.json", "read": 1, "refused": 2, "bugs": []}\n'
    rest = mutate._collect(tallies, out, -11, tmp_path / "mark", jobs)
    assert tallies == {"gguf": mutate.Tally(bugs=[(7, "the process ended with -11")]), "klein.json": mutate.Tally(1, 2)}
    assert rest == [("gguf", 8, 6), ("klein.json", 3, 2)]


def test_a_message_is_one_printable_line() -> None:
    """Whatever it quotes: a name in a file may hold what a terminal obeys."""

    def refuse() -> None:
        raise CheckpointError(f"a\x1b[2J\nb\udcff {'x' * 9999} 🦊 end")

    told = refusal(refuse)
    assert told.isprintable()
    assert len(told) < 1100
    assert told.startswith("a\\x1b[2J b\\udcff xxx")
    assert told.endswith("xxx 🦊 end")
