"""Completion: every option of every parser is in every script, and the shells that are here complete with them."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from klein_mlx.cli.completion import SHELLS, VALUES, given, model_names
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
            for option in action.option_strings:
                spelled = f"-l {option[2:]} " if option.startswith("--") else f"-s {option[1:]} "
                assert (spelled if shell == "fish" else option) in text, (name, option)


def test_what_options_are_completed_with() -> None:
    """Their choices, files for paths, names for models; and the words listed apart are the ones that the code knows."""
    from klein_mlx.runtime.parts import DTYPES, KEPT
    from klein_mlx.weights.bits import parse

    options = {name: option for option in given(command_parser("generate")).options for name in option.names}
    assert options["--model"].kind == "model"
    assert options["--image"].kind == options["--output"].kind == options["--mask"].kind == "file"
    assert options["--keep"].values == tuple(KEPT)
    assert options["--dtype"].values == tuple(DTYPES)
    assert not options["--force"].takes
    assert (options["--seed"].takes, options["--seed"].kind) == (True, None)
    for word in VALUES["quantize"]:
        assert parse(word)
    models = given(command_parser("models")).positional
    assert (models.kind, models.values) == ("model", ("list", "pull", "rm", "path"))


def test_names_of_models(place: Path) -> None:
    names = model_names()
    assert names[:2] == ["tiny", "4b"]
    assert names[-2:] == ["mine", "someone/klein-small"]


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
    ("klein-mlx info 4b-", {"4b-q4", "4b-q8"}),
    ("klein-mlx completion z", {"zsh"}),
]


@pytest.mark.parametrize(("line", "wanted"), CASES)
def test_bash(line: str, wanted: set[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = line.replace("'a fox'", "fox").split()
    (place / "script").write_text(script("bash", capsys))
    code = (
        f"source script; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _klein_mlx; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    bash = [needs("bash"), "--norc", "-c", code]
    done = subprocess.run(bash, capture_output=True, text=True, cwd=place, timeout=20)
    assert done.stderr == ""
    assert set(done.stdout.split()) == wanted


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
    (place / "script").write_text(script("zsh", capsys))
    (place / ".zshrc").write_text("PS1='> '; autoload -Uz compinit; compinit -u -D; source ./script\n")
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
    os.close(ours)
    assert wanted in shown, shown


def test_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err
