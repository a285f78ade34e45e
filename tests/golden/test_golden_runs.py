"""From prompt to picture against Flux2KleinPipeline: the latents after every step and the picture in 8 bits."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from golden import cases, files, port
from golden.files import MODEL, load


@pytest.fixture(scope="module")
def model() -> Iterator[port.Port]:
    with mx.stream(mx.cpu):  # the tolerances are the CPU's
        yield port.Port(MODEL)


@pytest.mark.parametrize("name", cases.RUNS)
def test_run(model: port.Port, name: str):
    """Two prompts at once, the empty prompt, a cut prompt, one reference (cropped, and deciding the size), two
    references, and guidance. 5e-4 of the largest latent in float32; pixels may differ by one of 255."""
    golden = load("runs", name)
    ours = port.run(model, name, golden["noise"])
    errors = [port.error(a, b) for a, b in zip(ours["latents"], golden["latents"], strict=True)]
    assert len(errors) == cases.RUNS[name].steps
    assert max(errors) <= 5e-4, errors
    difference = ours["images"].astype(int) - golden["images"]
    assert np.abs(difference).max() <= 1
    assert np.mean(difference != 0) < 1e-2


def test_noise_is_the_committed_one():
    """The seeds still make the noise that the golden files hold."""
    for name in cases.RUNS:
        golden = load("runs", name)["noise"]
        np.testing.assert_array_equal(cases.noise(name, golden.shape[1]), golden)


def test_golden_files_are_small():
    """Under 5 MB in all, and finite."""
    paths = [p for p in files.HERE.rglob("*") if p.suffix in (".safetensors", ".json", ".jinja")]
    assert sum(p.stat().st_size for p in paths) < 5e6
    for name in files.FILES:
        for key, value in files.load(name).items():
            assert np.isfinite(value).all(), (name, key)
