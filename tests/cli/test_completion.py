"""Completion: every option of every parser is in every script, and the shells that are here complete with them."""

import argparse
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from klein_mlx.cli import completion
from klein_mlx.cli.completion import SHELLS, model_names, whole_parser
from klein_mlx.cli.main import COMMANDS, command_parser, main


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the command `klein-mlx`, three scripts, a picture, and a home without models."""
    program = tmp_path / "klein-mlx"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m klein_mlx.cli.main "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("KLEIN_MLX_HOME", str(tmp_path / "own"))
    (tmp_path / "own" / "models" / "mine").mkdir(parents=True)
    (tmp_path / "hf" / "hub" / "models--someone--klein-small").mkdir(parents=True)
    (tmp_path / "fox.png").touch()
    return tmp_path


@pytest.mark.parametrize("shell", SHELLS)
def test_every_option_of_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    for name in COMMANDS:
        assert name in text
        for action in command_parser(name)._actions:
            for option in action.option_strings if action.help != argparse.SUPPRESS else ():
                spelled = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
                assert (spelled if shell == "fish" else option) in text, (name, option)


def test_what_options_are_completed_with() -> None:
    """Their choices, files for paths, names for models; and the words listed apart are the ones that the code knows."""
    from klein_mlx.runtime.memory import DTYPES
    from klein_mlx.runtime.parts import KEPT
    from klein_mlx.weights.bits import parse

    actions: dict[str, Any] = {name: one for one in whole_parser("a file")._actions for name in one.option_strings}
    assert actions["--model"].complete["bash"] == "_klein_mlx_models"
    assert [actions[name].complete for name in ("--image", "--output", "--mask")] == ["a file"] * 3
    assert set(actions["--keep"].choices) == set(KEPT)
    assert set(actions["--dtype"].choices) == set(DTYPES)
    assert actions["--force"].nargs == 0
    for word in completion.BITS:
        assert parse(word)


def test_without_shtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == "error: completion scripts need shtab: pip install shtab\n"


def test_names_of_models(place: Path) -> None:
    names = model_names()
    assert names[:2] == ["tiny", "4b"]
    assert "mine" in names


def needs(shell: str) -> str:
    found = shutil.which(shell)
    if not found:
        pytest.skip(f"{shell} is not installed")
    return found


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_can_read_it(shell: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = place / f"script.{shell}"
    path.write_text(script(shell, capsys))
    done = subprocess.run([needs(shell), "-n", str(path)], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")


CASES = [
    ("klein-mlx --show", {"--show", "--show-steps"}),
    ("klein-mlx generate --ima", {"--image"}),
    ("klein-mlx inf", {"info"}),
    ("klein-mlx models p", {"pull", "path"}),
    ("klein-mlx 'a fox' --keep t", {"transformer"}),
    ("klein-mlx convert x y --dry", {"--dry-run"}),
    ("klein-mlx -m mi", {"mine"}),
    ("klein-mlx info 4b-", {"4b-1step", "4b-q4", "4b-q8"}),
    ("klein-mlx completion z", {"zsh"}),
]


@pytest.mark.parametrize(("line", "wanted"), CASES)
def test_bash(line: str, wanted: set[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = line.replace("'a fox'", "fox").split()
    (place / "script").write_text(script("bash", capsys))
    code = (
        f"source script; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_klein_mlx; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    bash = [needs("bash"), "--norc", "-c", code]
    done = subprocess.run(bash, capture_output=True, text=True, cwd=place, timeout=20)
    assert done.stderr == ""
    assert set(done.stdout.split()) == wanted


def test_a_model_folder_is_never_code(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder's name is quoted in bash, so that accepting the completion runs nothing."""
    (place / "own" / "models" / "x;touch owned;").mkdir()
    (place / "own" / "models" / "x\nfake").mkdir()
    (place / "script").write_text(script("bash", capsys))
    code = (
        "source script; COMP_WORDS=(klein-mlx -m x); COMP_CWORD=2; _shtab_klein_mlx; "
        'eval "echo ${COMPREPLY[0]}"; echo "${#COMPREPLY[@]}"'
    )
    done = subprocess.run([needs("bash"), "--norc", "-c", code], capture_output=True, text=True, cwd=place, timeout=20)
    assert done.stdout == "x;touch owned;\n1\n"
    assert not (place / "owned").exists()


@pytest.mark.parametrize(("line", "wanted"), CASES)
def test_fish(line: str, wanted: set[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fish = needs("fish")
    (place / "script").write_text(script("fish", capsys))
    code = f'source script; complete -C "{line}"'
    done = subprocess.run([fish, "--no-config", "-c", code], capture_output=True, text=True, cwd=place, timeout=20)
    assert done.stderr == ""
    assert wanted <= {row.partition("\t")[0] for row in done.stdout.splitlines()}


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [("klein-mlx --show-", "--show-steps"), ("klein-mlx inf", "info"), ("klein-mlx -m min", "mine")],
)
def test_zsh(typed: str, wanted: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a terminal: what is typed and a tab become the only word that fits."""
    zsh = needs("zsh")
    (place / "_klein-mlx").write_text(script("zsh", capsys))
    (place / ".zshrc").write_text(f"PS1='> '; fpath=({place} $fpath); autoload -Uz compinit; compinit -u -D\n")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "ZDOTDIR": str(place), "TERM": "xterm"}
    with subprocess.Popen(
        [zsh, "-i"], stdin=theirs, stdout=theirs, stderr=theirs, cwd=place, env=environment, start_new_session=True
    ) as shell:
        os.close(theirs)
        shown, deadline, asked = "", time.monotonic() + 20, False
        while wanted not in shown and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.2)[0]:
                shown += os.read(ours, 4096).decode(errors="replace")
            elif not asked and "> " in shown:
                os.write(ours, f"{typed}\t".encode())
                asked = True
        shell.kill()
        os.close(ours)  # on macOS a process ends only when what it printed was read, or nobody can read it
    assert wanted in shown, shown


def test_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "shell is 'tcsh'" in capsys.readouterr().err
