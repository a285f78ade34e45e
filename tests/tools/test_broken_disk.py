"""Commands on a file system that fails at a seeded call. For more: `tests/tools/broken_disk.py --count 2000`."""

from pathlib import Path

import broken_disk
import pytest


def test_no_failing_call_is_a_bug() -> None:
    ends, bugs = broken_disk.work(7_000_000, 20)
    assert bugs == []
    assert set(ends) == {0, 2}  # some failures are of files that a command can do without
    assert sum(ends.values()) == 20


def test_a_bug_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(words: list[str]) -> int:
        with open("old.png", "wb") as file:
            file.write(b"half")
            file.write(b"whole")
        return 0

    monkeypatch.setattr(broken_disk, "klein_mlx", careless)
    for fails, what in ((0, "a traceback: OSError"), (2, "a traceback"), (None, "old.png is not whole")):
        (tmp_path / "old.png").write_bytes(b"a picture")
        disk = broken_disk.Disk(fails)
        code, told = broken_disk.run([], tmp_path, disk)
        assert broken_disk.wrong([], tmp_path, b"a picture", code, told).startswith(what)
    assert disk.calls == 4  # open, two writes, close
