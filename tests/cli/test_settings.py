"""The config file: what goes before what, and errors that name file, line and key."""

import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from klein_mlx.cli.main import main
from klein_mlx.cli.options import TABLE, Parser, add_generate_arguments, typed_options
from klein_mlx.cli.settings import complete, option_value, read_settings
from klein_mlx.errors import RequestError
from klein_mlx.paths import config_folder


def typed(*words: str) -> dict[str, Any]:
    parser = Parser()
    add_generate_arguments(parser)
    return typed_options(parser.parse_args(words))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The config at its usual place."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "klein-mlx").mkdir()
    path = tmp_path / "klein-mlx" / "config.toml"
    path.write_text(
        'revision = "abc"\n'
        'model = "mine"\nsteps = 8\nsize = "3:2"\nquiet = true\n[presets.fast]\nsteps = 2\nguidance = 1\n'
        'max-sequence-length = 20\n[models]\nmine = "~/klein"\n[folders]\nloras = "~/loras"\n'
    )
    return path


def test_what_goes_before_what(config: Path) -> None:
    plain = complete(typed("a fox"))
    assert (plain.prompt, plain.model, plain.num_inference_steps, plain.size, plain.quiet) == (
        "a fox",
        "mine",
        8,
        "3:2",
        True,
    )
    assert (plain.num_images_per_prompt, plain.force, plain.negative_prompt) == (1, False, None)
    assert plain.models == {"mine": str(Path("~/klein").expanduser())}
    assert plain.lora_folder == str(Path("~/loras").expanduser())
    other = complete(typed("a fox", "-m", "tiny"))
    assert (plain.revision, other.revision) == ("abc", None)  # it is of the config's model
    fast = complete(typed("a fox", "--preset", "fast"))
    assert (fast.num_inference_steps, fast.guidance_scale, fast.max_sequence_length, fast.size) == (2, 1.0, 20, "3:2")
    given = complete(typed("a fox", "--preset", "fast", "--steps", "3", "--width", "64", "-m", "tiny"))
    assert (given.num_inference_steps, given.width, given.size, given.model) == (3, 64, None, "tiny")
    assert complete(typed("a fox", "--sigmas", "1,0.5")).num_inference_steps is None
    recipe = complete(typed("a fox"), {"num_inference_steps": 5, "size": None})
    assert (recipe.num_inference_steps, recipe.size, recipe.quiet) == (5, None, True)


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config_folder() == tmp_path / ".config" / "klein-mlx"
    assert read_settings().values == {}
    other = tmp_path / "other.toml"
    other.write_text("steps = 3\n")
    assert complete(typed("a fox", "--config", str(other))).num_inference_steps == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps = 4\nwidth = \n", ":2: Invalid value (column 9)"),
        ("steps = 4\nstep = 5\n", ":2: step is unknown; did you mean steps?"),
        ("\nsteps = 'four'\n", ":2: steps is 'four'; it must be a whole number"),
        ("guidance = true", ":1: guidance is True; it must be a number"),
        ("quiet = 1", ":1: quiet is 1; it must be true or false"),
        ("format = 'gif'", ":1: format is 'gif'; it must be one of png, jpg, jpeg, webp"),
        ("presets = 3", ":1: presets is 3; it must be a table: [presets]"),
        ("[presets]\nfast = 3", ":2: fast is 3; it must be a table: [presets.fast]"),
        ("steps = 1\n[presets.fast]\nsteps = 'x'", ":3: steps is 'x'"),
        ("[presets.fast]\npreset = 'slow'", ":2: preset is unknown"),
        ("[models]\nmine = 3", ":2: mine is 3; it must be a string in quotes"),
        ("[folders]\nphotos = 'x'", ":2: photos is unknown; there are loras, wildcards"),
        ("[preset.fast]\nsteps = 1", ": preset is {'fast': {'steps': 1}}; it must be a string"),
        ("preset = 'fast'", ":1: preset is 'fast'; there are none"),
        ("prompt = 'x'", ":1: prompt is unknown"),
        ("steps = 1\nsteps = 2", ":2: Cannot overwrite a value"),
        ("a = " + "[" * 5000, "config.toml"),
    ],
)
def test_configs_that_are_refused(config: Path, text: str, words: str) -> None:
    config.write_text(text)
    with pytest.raises(RequestError) as refused:
        complete(typed("a fox"))
    assert str(refused.value).startswith(str(config))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_other_refusals(config: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--preset fats is not in the config; did you mean fast"):
        complete(typed("a fox", "--preset", "fats"))
    with pytest.raises(RequestError, match="none.toml cannot be read: No such file"):
        complete(typed("a fox", "--config", str(tmp_path / "none.toml")))
    config.write_bytes(b"steps = 1\n# \xff\n")
    with pytest.raises(RequestError, match="config.toml:2: is not UTF-8"):
        complete(typed("a fox"))


@pytest.mark.parametrize("value", [64, 1.5, True, ["a"], {"a": 1}, 10**400])
def test_a_value_of_any_kind_is_read_or_refused(value: object) -> None:
    """In a config, a line of JSON or a recipe; a path is no number."""
    for own in TABLE.values():
        with suppress(RequestError):
            option_value(own, value)
    if value == 64:
        with pytest.raises(RequestError, match="output is 64; it must be a string"):
            option_value(TABLE["output"], value)


def test_a_config_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.toml")
    with pytest.raises(RequestError, match="is not a regular file"):
        read_settings(tmp_path / "config.toml")


@pytest.mark.parametrize(
    "words",
    [
        *("generate x --model=", "info ''", "generate x -o ''", "convert tiny ''", "generate x --model tiny --vae="),
        *("doctor --only environment -m ''", "bench -m ''", "serve -m ''", "mcp -m ''", "train x -o y -m ''"),
    ],
)
def test_an_empty_name_is_not_the_current_folder(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is ''; it must" in line
    with pytest.raises(RequestError, match="output is ''; it must name a file"):
        option_value(TABLE["output"], "")
