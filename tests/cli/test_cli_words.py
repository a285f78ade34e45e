"""Which subcommand the words of a command line mean, and what is suggested for those that mean none."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from klein_mlx.cli import hints
from klein_mlx.cli.main import COMMANDS, choose, command_parser, main, top_help
from klein_mlx.errors import RequestError, nearest


@pytest.mark.parametrize(
    ("given", "name", "words"),
    [
        (["a red fox"], "generate", ["a red fox"]),
        (["fox"], "generate", ["fox"]),
        (["winter"], "generate", ["winter"]),
        (["generate", "info"], "generate", ["info"]),
        (["--seed", "7", "a fox"], "generate", ["--seed", "7", "a fox"]),
        (["-m", "tiny"], "generate", ["-m", "tiny"]),
        ([], "generate", []),
        (["info", "tiny"], "info", ["tiny"]),
        (["info tiny"], "generate", ["info tiny"]),
        (["日本"], "generate", ["日本"]),
    ],
)
def test_the_subcommand(given: list[str], name: str, words: list[str]) -> None:
    assert choose(given) == (name, words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["inof", "tiny"], "'inof' is not a command; did you mean: klein-mlx info?"),
        (["Convrt"], "did you mean: klein-mlx convert?"),
        (["genrate", "a fox"], "did you mean: klein-mlx generate?"),
        (["--model", "tiny", "info"], "options come after the command: klein-mlx info"),
        (["--model", "tiny", "infoo"], "did you mean: klein-mlx info?"),
        (["--wdith", "128", "a fox"], "did you mean --width? (see klein-mlx generate --help)"),
        (["--sede=3", "a fox"], "did you mean --seed?"),
        (["a", "red", "fox"], "unrecognized arguments: red fox; put the prompt in quotes"),
        (["pull", "4b"], "did you mean: klein-mlx models pull NAME?"),
        (["img2img"], 'did you mean: klein-mlx "PROMPT" -i FILE?'),
        (["interactive"], "did you mean: klein-mlx? (for a picture: klein-mlx generate interactive)"),
        (["a fox", "--cfg=3"], "--cfg=3; use --guidance (see klein-mlx generate --help)"),
        (["a fox", "--image_path", "a.png"], "use --image, once for each"),
        (["a fox", "--denoise", "0.5"], "use --init-image and --strength"),
        (["a fox", "--diffusion-model", "x.gguf"], "use --transformer"),
        (["a fox", "--precision", "half"], "use --dtype"),
        (["a fox", "--fast"], "unrecognized arguments: --fast (see klein-mlx generate --help)"),
        (["a fox", "--device", "mps"], "leave it out: MLX uses the GPU by itself"),
        (["a fox", "-i", "a.png", "b.png"], "repeat the option for every file: -i a.png -i b.png"),
        (["bench", "--cfg", "3"], "unrecognized arguments: --cfg 3 (see klein-mlx bench --help)"),
        (["bench", "-n", "3"], "unrecognized arguments: -n 3; use --runs"),
        (["bench", "tiny"], "name a model with --model tiny"),
        (["convert", "-m", "tiny", "-o", "x"], "use klein-mlx convert SOURCE DESTINATION"),
        (["convert", "tiny", "x", "-q"], "--quantize needs a value: BITS"),
        (["convert", "tiny"], "klein-mlx convert needs DESTINATION"),
        (["doctor", "--dtype"], "--dtype needs a value: DTYPE"),
        (["info"], "klein-mlx info needs MODEL; for example: klein-mlx info tiny"),
        (["info", "tiny", "-m", "4b"], "a model is given twice, 'tiny' and with --model"),
        (["info", "tiny", "4b"], "unrecognized arguments: 4b (see klein-mlx info --help)"),
        (["info", "x.gguf"], "x.gguf: no such file"),
        (["info", "https://huggingface.co/owner/name/tree/main"], "is an address; give its Hub id, owner/name"),
        (["info", "tiny", "-W", "64"], "use --size 1024x768"),
        (["info", "https://hf.co/owner/name/blob/main/a/x.gguf?x=1"], "give its Hub id, owner/name/a/x.gguf"),
        (["info", "https://huggingface.co/datasets/owner/name"], "no such file or folder"),
        (["x", "-m", "https://huggingface.co/owner/name", "--offline"], "give its Hub id, owner/name"),
        (["x", "-m", "tiny", "--vae", "huggingface.co/owner/name/tree/main"], "give its Hub id, owner/name"),
        (
            ["x", "-m", "tiny", "--vae", "hf.co/owner/name/resolve/main/x.safetensors"],
            "Hub id, owner/name/x.safetensors",
        ),
        (
            ["x", "-m", "tiny", "--lora", "hf.co/owner/name/resolve/main/x.safetensors"],
            "give its Hub id, owner/name/x.safetensors",
        ),
        (["serve", "--api-key", "x"], "use --token"),
        (["train", "x", "--lr", "1"], "use --learning-rate"),
        (["train", "x", "--low-ram"], "--low-ram; use --bits 4 (see"),
        (["train", "absent", "-o", "x.safetensors"], "data is 'absent', which is not a folder"),
        (["train", ".", "-o", "x.safetensors", "-m", "4b"], "is distilled and would lose its few steps; train base-4b"),
        (["completion", "powershell"], "shell is 'powershell'; it must be one of bash, zsh, fish, models"),
        (["lora", "info"], "klein-mlx lora info needs one LORA"),
        (["info", "tiny", "--jsno"], "did you mean --json? (see klein-mlx info --help)"),
        (["info", "tiny", "--qqqqqq"], "unrecognized arguments: --qqqqqq (see klein-mlx info --help)"),
    ],
)
def test_slips(given: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line with what was probably meant, exit code 2, and no model is opened."""
    assert main(given) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert words in told.err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["convert", "tiny", "out", "--dry-run", "--upload", "nope"], "upload is 'nope'; it must be owner/name"),
        (
            ["convert", "tiny", "out", "--dry-run", "--variant", "foo"],
            "variant is 'foo'; it must be one of tiny, 4b-1step",
        ),
        (["convert", "tiny", "out", "--dry-run", "--group-size", "32"], "--group-size is 32, but nothing is quantized"),
        (["convert", "tiny", "out", "--dry-run", "--variant", "dev"], "variant is 'dev', and the transformer has the"),
        (["convert", "tiny", "out", "--lora-folder", "."], "--lora-folder is given, and no LoRA; add --lora FILE"),
        (["bench", "--model", "tiny", "--group-size", "32"], "--group-size is 32, but nothing is quantized"),
        (["bench", "--predict", "M3", "--keep", "all"], "--keep is not for --predict, which runs nothing; leave it"),
        (["bench", "--predict", "--runs", "3"], "--runs is not for --predict, which runs nothing; leave it out"),
        (["bench", "--tune", "--json", "-s", "2"], "--steps is not for --tune, which times kernels alone"),
        (["info", "tiny", "--size", "64x64", "--group-size", "32"], "--group-size is 32, but nothing is quantized"),
        (["info", "4b", "--train", "--verify"], "--verify reads files, and --train estimates without them"),
        (["info", "4b", "--train", "--dtype", "float16"], "training is done in bfloat16 or float32"),
        (["serve", "-m", "tiny", "--dtype", "foo"], "--dtype is 'foo'; it must be one of bfloat16, float32, float16"),
        (["serve", "--demo", "--keep", "foo"], "--keep is 'foo'; it must be one of all, transformer, nothing"),
        (["serve", "--demo", "--quiet", "--log-prompts"], "writes to the log, which --quiet silences; give one of"),
        (
            ["train", "x", "-o", "y", "--method", "full", "--rank", "4"],
            "--rank decides nothing here: full training",
        ),
        (
            ["train", "x", "-o", "y", "--method", "full", "--weight-decay", "0"],
            "--weight-decay decides nothing here: adafactor has none; give another optimizer",
        ),
        (["train", "x", "-o", "y.safetensors", "--preview-every", "5"], "--preview-every decides nothing here: there"),
        (["models", "--revision", "x"], "--revision is for pull and path"),
        (["models", "rm", "4b", "--revision", "x"], "rm deletes a model with all of its revisions"),
        (["models", "path", "tiny", "--revision", "x"], "only models on the Hub have one"),
    ],
)
def test_what_would_be_refused_or_ignored_is_told_first(
    given: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dry run refuses what the run would; an option that does nothing is no option."""
    assert main(given) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert words in told.err


@pytest.mark.parametrize("option", [["--verify"], ["--size", "64x64"], ["--variant", "4b"]])
def test_info_refuses_what_only_a_model_has(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, lora = tmp_path / "x.png", tmp_path / "x.safetensors"
    Image.new("RGB", (8, 8)).save(picture)
    save_file({"img_in.lora_A.weight": np.zeros((1, 4), np.float32)}, str(lora))
    for path, what in ((picture, "a picture"), (lora, "a LoRA")):
        assert main(["info", str(path), *option]) == 2
        assert capsys.readouterr().err == f"error: {option[0]} needs a model, and {path} is {what}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_hint_names_options_that_the_command_has(name: str) -> None:
    known = command_parser(name)._option_string_actions
    tables = (hints._USE, hints._LEFT_OUT, *hints._OF_COMMANDS.values())
    for word in {word for table in tables for row in table for word in row.split()} - set(known):
        hint = hints.option_hint(word, known, name)
        if "klein-mlx" not in hint:
            assert set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", hint)) <= set(known), (word, hint)


def test_a_slip_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="klein-mlx convert"):
        choose(["convetr"])


def test_words_that_mean_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["models", "LS"], ["info", "-m", "TINY"], ["doctor", "--help-all"], ["-V"]):
        assert main(given) == 0, given
    assert "check that this mac" in capsys.readouterr().out.lower()


@pytest.mark.parametrize("given", [["--help"], ["-h"], ["help"]])
def test_help_names_every_command(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 0
    told = capsys.readouterr().out
    assert told == top_help()
    assert all(f"\n  {name} " in told for name in COMMANDS)
    assert max(map(len, told.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # for Python 3.14, as in a terminal
    told = command_parser(name).format_help()
    assert told.startswith(f"usage: klein-mlx {name}")
    assert "\nexamples:\n  klein-mlx " in told


def test_nearest() -> None:
    assert nearest("modles", ["models", "info"]) == "models"
    assert nearest("zebra", ["models", "info"]) is None
