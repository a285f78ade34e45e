"""The way to diffusers for the tests that need it: imported late, so that collecting the tests stays fast."""

import importlib
import warnings
from typing import Any

import pytest


def import_reference() -> Any:
    """The module `parity_reference`, or a skipped test where torch or diffusers is missing."""
    for name in ("torch", "transformers", "diffusers"):
        pytest.importorskip(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others say while they are imported is not ours
        importlib.import_module("random_models")
        return importlib.import_module("parity_reference")
