"""One list: every field of the options is known, under its own name, wherever options are read."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from klein_mlx.cli.main import command_parser
from klein_mlx.cli.options import KEYS, TABLE, RunOptions
from klein_mlx.cli.prompts import Job, read_jobs
from klein_mlx.options import USER_OPTIONS

VALUES = {int: 1, float: 1.0, bool: True, list: [1.0, 0.5]}


def test_parsers_are_the_fields() -> None:
    """Their flags, their Python names as other spellings, and a place in the help; `again` takes them too."""
    for command in ("generate", "again"):
        parser = command_parser(command)
        flags = parser._option_string_actions
        told = parser.all_help()
        for name, own in TABLE.items():
            for flag in (own.flag, *own.short, f"--{name.replace('_', '-')}"):
                assert flags[str(flag)].dest == name
            assert f"{own.flag} " in told or f"{own.flag}\n" in told or f"{own.flag}," in told, name
    assert set(USER_OPTIONS) - set(TABLE) == {
        *("generator", "callback_on_step_end", "progress", "latents", "prompt_embeds", "output_type")
    }


@pytest.mark.parametrize("name", [name for name, own in TABLE.items() if not own.per_run and name != "prompt"])
def test_a_line_of_a_prompt_file_takes_every_option_of_a_picture(name: str, tmp_path: Path) -> None:
    own = TABLE[name]
    value = own.choices[0] if own.choices else VALUES.get(own.kind, "x")
    path = tmp_path / "prompts.jsonl"
    for key in (own.key, name):
        assert KEYS[key] == name
        path.write_text(json.dumps({"prompt": "a fox", key: value}))
        (job,) = read_jobs(RunOptions(prompt_file=str(path)))
        assert isinstance(job, Job), job
        wanted = [value] if own.many else own.kind(value)
        assert getattr(job.options, name) == wanted


def test_nothing_else_is_an_option() -> None:
    assert {one.name for one in fields(RunOptions)} - set(TABLE) - set(USER_OPTIONS) == {"models", "wildcards"}
    assert replace(RunOptions(), seed=[3]).seeds == [3]
