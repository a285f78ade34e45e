"""Modules that say that they run on the CPU do, and every name on that list is there."""

from pathlib import Path

import conftest
import pytest


@pytest.mark.parametrize("name", conftest.ON_CPU)
def test_the_list_names_what_there_is(name: str) -> None:
    assert (conftest.HERE / name).exists()


def test_a_module_is_found_by_its_path() -> None:
    here = Path(conftest.HERE)
    assert conftest.on_cpu(here / "model" / "test_vae.py")
    assert conftest.on_cpu(here / "test_pipeline.py")
    assert not conftest.on_cpu(here / "images" / "test_saving.py")
    assert not conftest.on_cpu(here / "cli" / "test_cli.py")
