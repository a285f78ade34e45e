"""The runner of faults itself: it sees what a command prints, leaves, breaks and takes."""

import sys
from pathlib import Path

import faults
import pytest
import zygote
from faults import ROOT, TINY, accepted, refused, run_fault


def test_a_refusal_is_one_line_that_leaves_nothing(tmp_path: Path) -> None:
    outcome = refused("info", "absent/model", "--offline-x", folder=tmp_path, words="--offline-x")
    assert outcome.seconds < faults.SECONDS
    with pytest.raises(AssertionError):
        refused("info", "tiny", folder=tmp_path, words="tiny")
    with pytest.raises(AssertionError):
        refused("info", folder=tmp_path, words="another thing")


def test_a_success_leaves_just_what_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "old.png").write_text("mine")
    accepted("generate", "a star", "-o", "new.png", *TINY, folder=tmp_path, words="new.png", changes=["+new.png"])
    (tmp_path / "new.png").unlink()
    with pytest.raises(AssertionError):
        accepted("generate", "a star", "-o", "new.png", *TINY, folder=tmp_path)
    with pytest.raises(AssertionError):
        accepted("generate", "a star", "-o", "old.png", *TINY, folder=tmp_path)


def program(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command be this program of Python's."""
    words = [sys.executable, "-c", text]
    monkeypatch.setattr(zygote, "run", lambda arguments, **where: zygote.spawn(words, **where))


def test_changes_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("1")
    (tmp_path / "c").write_text("1")
    (tmp_path / "d").symlink_to("a")
    program("import os; open('a/b', 'w').write('2'); os.remove('c'); os.remove('d'); os.mkdir('e')", monkeypatch)
    assert run_fault(folder=tmp_path).changes == ("!a/b", "+e", "-c", "-d")


def test_a_hang_and_too_much_memory_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program("import time; time.sleep(60)", monkeypatch)
    with pytest.raises(AssertionError, match="hangs after 0.3 s"):
        run_fault(folder=tmp_path, seconds=0.3)
    program("import resource; print(resource.getrlimit(resource.RLIMIT_AS)[0]); bytes(1 << 30)", monkeypatch)
    outcome = run_fault(folder=tmp_path, memory=1 << 30)
    if outcome.stdout.strip() == str(1 << 30):  # not on macOS
        assert "MemoryError" in outcome.stderr
        assert outcome.code == 1


def test_the_tree_s_own_command_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program("import klein_mlx, os; print(klein_mlx.__file__, 'HF_TOKEN' in os.environ)", monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "x")
    assert run_fault(folder=tmp_path).stdout.split() == [str(ROOT / "klein_mlx" / "__init__.py"), "False"]
    assert run_fault(folder=tmp_path, changes={"HF_TOKEN": "y"}).stdout.split()[1] == "True"
