"""Modules that say that they run on the CPU do, and every name on that list is there."""

import importlib.util
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from klein_mlx.model import layers


def _conftest() -> Any:
    """The one beside this file; a folder's own has the same name."""
    spec = importlib.util.spec_from_file_location("devices", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


conftest = _conftest()


@pytest.mark.parametrize("name", sorted({*conftest.ON_CPU, *conftest.COMPILED}))
def test_the_list_names_what_there_is(name: str) -> None:
    assert (conftest.HERE / name).exists()


def test_compiling_is_heard(request: pytest.FixtureRequest) -> None:
    """This module is on neither list: it computes as the machine does, or as is asked."""
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    assert layers.here().compiles == (on_gpu or request.config.getoption("--compiled"))


def test_a_module_is_found_by_its_path() -> None:
    here = Path(conftest.HERE)
    assert conftest.on_cpu(here / "model" / "test_vae.py")
    assert conftest.on_cpu(here / "test_pipeline.py")
    assert not conftest.on_cpu(here / "images" / "test_saving.py")
    assert not conftest.on_cpu(here / "cli" / "test_cli.py")
