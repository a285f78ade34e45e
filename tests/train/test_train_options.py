"""The options of a training run: one list for flags, TOML keys and fields; every bad value is one line."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from klein_mlx.cli.main import command_parser
from klein_mlx.errors import RequestError
from klein_mlx.train.options import TrainOptions, make_options, read_toml

GOOD: dict[str, Any] = {"data": "pictures", "output": "style.safetensors"}


def test_flags_are_keys_are_fields(tmp_path: Path) -> None:
    names = {one.name for one in fields(TrainOptions)}
    flags = {action.dest for action in command_parser("train")._actions}
    assert flags - names == {"help", "config", "resume", "dry_run", "json", "quiet", "yes"}
    assert names <= flags
    options = replace(
        make_options(GOOD),
        **{"run": "r", "bits": "4", "dtype": "float32", "prompt": 'say "x"\n', "trigger": "ohwx", "keep": "dog"},
        **{"references": ("a", "b"), "ema": 0.99, "preview": ("one",), "preview_model": "4b", "preview_every": 5},
    ).checked()
    path = tmp_path / "run.toml"
    path.write_text(options.to_toml())
    assert set(read_toml(path)) == names
    assert make_options(read_toml(path)) == options


def test_what_is_typed_goes_before_the_file(tmp_path: Path) -> None:
    from klein_mlx.cli.train import _options

    path = tmp_path / "run.toml"
    path.write_text('data = "pictures"\noutput = "a.safetensors"\nsteps = 7\nrank = 8\nbits = 4\nlearning_rate = 1\n')
    options = _options(
        command_parser("train").parse_args(["--config", str(path), "--rank", "2", "--preview", "x", "y"])
    )
    assert (options.steps, options.rank, options.bits, options.preview) == (7, 2, "4", ("x", "y"))
    assert isinstance(options.learning_rate, float)


def test_a_name_that_anybody_knows_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that Python resumes the run by it; the user's own names are recorded as what they mean."""
    from klein_mlx.cli.train import _obtained

    monkeypatch.setenv("KLEIN_MLX_HOME", str(tmp_path))
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "a.png").touch()
    args = command_parser("train").parse_args([])
    for name, recorded in (("tiny", "tiny"), ("klein-Tiny", "klein-Tiny"), ("mine", str(tmp_path / "models" / "mine"))):
        options = make_options({**GOOD, "data": str(tmp_path), "model": name})
        assert _obtained(options, args).model == recorded


def test_defaults_depend_on_the_method() -> None:
    lora, full = make_options(GOOD), make_options({**GOOD, "output": "tuned", "method": "full"})
    assert (lora.accumulate, lora.learning_rate, lora.optimizer) == (4, 1e-4, "adamw")
    assert (full.accumulate, full.learning_rate, full.optimizer) == (1, 1e-5, "adafactor")


@pytest.mark.parametrize(
    ("values", "unused"),
    [
        ({}, {"rounding", "preview_model", "preview_every"}),
        (
            {"preview": ("x",), "hold_out": "0", "optimizer": "adafactor"},
            {"rounding", "hold_out_every", "weight_decay"},
        ),
        (
            {"method": "full", "output": "tuned", "preview": ("x",)},
            {"rank", "targets", "format", "weight_decay"},
        ),
        ({"method": "full", "output": "tuned", "preview": ("x",), "optimizer": "lion"}, {"rank", "targets", "format"}),
    ],
)
def test_which_options_decide_nothing(values: dict[str, Any], unused: set[str]) -> None:
    assert set(make_options({**GOOD, **values}).unused()) == unused


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be over 0"),
        ({"learning_rate": -1e-4}, "learning_rate is -0.0001"),
        ({"learning_rate": 1e3}, "learning_rate is 1000.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"rank": 0}, "rank is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"resolution": 500}, "resolution is 500; it must be a multiple of 16: 496 or 512"),
        ({"resolution": 16}, "resolution is 16"),
        ({"batch": 0}, "batch is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"hold_out": "100%"}, "hold_out is '100%'"),
        ({"hold_out": "some"}, "hold_out is 'some'; it must be a count such as 4, or a share such as 5%"),
        ({"keep": "dog"}, "it needs a trigger"),
        ({"keep": "dog", "trigger": "x", "method": "dora"}, "and the method lora"),
        ({"sigmas": "cosine"}, "must be one of uniform"),
        ({"optimizer": "sgd"}, "must be one of adamw"),
        ({"output": "style.bin"}, "a LoRA's name ends in .safetensors"),
        ({"method": "full", "output": "tuned", "bits": "4"}, "which cannot be quantized"),
        ({"flip": 1}, "flip is 1; it must be true or false"),
        ({"seed": -1}, "seed is -1"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"trigger": "  "}, "trigger is "),
    ],
)
def test_a_bad_value_is_one_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as error:
        make_options({**GOOD, **values})
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz = 3", "'stepz' is not an option; did you mean steps?"),
        ('steps = "many"', "steps is 'many'; it must be a whole number"),
        ("flip = 1", "flip is 1; it must be true or false"),
        ("steps = [", "run.toml: "),
    ],
)
def test_a_bad_file_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(RequestError) as error:
        read_toml(tmp_path / "run.toml")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("asked", "of", "held"), [("5%", 24, 1), ("5%", 1, 0), ("5%", 1000, 16), ("0", 24, 0), ("4", 24, 4), ("9", 3, 2)]
)
def test_how_many_are_held_out(asked: str, of: int, held: int) -> None:
    assert make_options({**GOOD, "hold_out": asked}).held_out_of(of) == held


def test_the_help_needs_no_mlx() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from klein_mlx.cli.main import command_parser as p; p('train'); print('mlx.core' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
