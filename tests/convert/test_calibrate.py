"""Codes that know their inputs: the algebra, what calibration gains, and that the presets stay as good as they are."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from folders import GOLDEN, assert_equal, parameters, quantizable_model
from quality import PLAIN_4, Reference, captions, stored_bytes

from klein_convert.calibrate import LEVELS, calibrate, share_out
from klein_convert.checkpoint import convert_checkpoint
from klein_convert.coding import aim, damped, feedback, round_with_feedback
from klein_mlx.bench.predict import klein
from klein_mlx.cli.convert import add_arguments, run
from klein_mlx.cli.options import Parser
from klein_mlx.config import PARTS
from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.formats.open import open_model
from klein_mlx.weights.bits import Quantize, from_options, parse, settle
from klein_mlx.weights.checkpoint import expected, load_part
from klein_mlx.weights.quantize import Quantization, search


def moments(inputs: int, rank: int, seed: int = 0) -> np.ndarray:
    """Of inputs that mostly go together: `rank` common causes, and a tenth of their power of each one's own."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(inputs, rank)) / math.sqrt(rank)
    return (mixing @ mixing.T + 0.1 * np.eye(inputs)).astype(np.float32)


def error(weight: np.ndarray, arrays: Any, h: np.ndarray, bits: int = 4) -> float:
    """The layer's relative error on inputs with these moments."""
    off = np.array(mx.dequantize(*arrays, 64, bits)) - weight
    return math.sqrt(np.sum((off @ h) * off) / np.sum((weight @ h) * weight))


def test_the_factors_make_up_the_moments() -> None:
    h = moments(96, 8)
    mixture, importance = feedback(h)
    unit = np.eye(96) + mixture
    assert np.allclose(np.triu(unit), unit)
    assert np.allclose(unit @ np.diag(importance) @ unit.T, h, atol=1e-4)  # float32, sums of 96 numbers of order 1


@pytest.mark.parametrize(("rank", "most"), [(8, 0.55), (32, 0.75)])
def test_feedback_gains_where_inputs_go_together(rank: int, most: float) -> None:
    """The gain is bounded by the geometric over the arithmetic mean of D, which inputs of lower rank make smaller."""
    weight = np.random.default_rng(1).normal(size=(64, 256)).astype(np.float32)
    h = moments(256, rank)
    coded = round_with_feedback(weight, *feedback(damped(h, 0.01)), 64, 4, mx.float32)
    assert error(weight, coded, h) < most * error(weight, search(mx.array(weight), 64, 4), h)


def test_without_common_causes_it_is_the_search() -> None:
    weight = np.random.default_rng(1).normal(size=(16, 128)).astype(np.float32)
    coded = round_with_feedback(weight, *feedback(np.eye(128, dtype=np.float32)), 64, 4, mx.float32)
    for one, two in zip(coded, search(mx.array(weight), 64, 4), strict=True):
        assert mx.allclose(one.astype(mx.float32), two.astype(mx.float32), rtol=1e-5, atol=1e-5).item()


def test_aim_undoes_a_drift_that_is_linear() -> None:
    """If all inputs have been scaled by 0.9, the weight must grow by 1 / 0.9, as far as damping lets it."""
    weight = np.random.default_rng(1).normal(size=(16, 64)).astype(np.float32)
    x = np.random.default_rng(2).normal(size=(64, 4096)).astype(np.float32)
    now = np.float32(0.9) * x
    aimed = aim(weight, now @ now.T, (x - now) @ now.T)
    assert np.allclose(aimed, weight * (1 + (1 / 0.9 - 1) / 1.1), rtol=0.02, atol=0.02)


@pytest.fixture(scope="module")
def tiny() -> Reference:
    from captions import judged_captions

    prompts = [words for words, _ in judged_captions(2, 11)]
    return Reference(open_model("tiny"), prompts, seed=5000)


@pytest.mark.slow
def test_mixed_4_keeps_the_velocity(tiny: Reference) -> None:
    """Measured over more prompts (tests/quality.py): plain 4 bits 0.220, mixed-4 0.117, calibrated 0.044."""
    plain = tiny.errors(tiny.source, PLAIN_4)["velocity"]
    assert tiny.errors(tiny.source, "mixed-4")["velocity"] < 0.55 * plain
    calibrated = calibrate(tiny.source, "mixed-4", prompts=captions(4), steps=2)
    assert tiny.errors(calibrated, None)["velocity"] < 0.45 * plain
    assert stored_bytes(calibrated, None) <= 1.06 * stored_bytes(tiny.source, PLAIN_4)
    errors = calibrated.info["calibration"]["velocity_errors"]
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    # What every token passes at the very start or end costs most; what only makes the text's queries, next to nothing.
    assert set(list(errors)[:2]) == {"transformer.img_in", "transformer.final_out"}
    layers = calibrated.quantization["transformer"].layers or {}
    assert layers["img_in"].bits > layers["double_blocks.0.img.to_q"].bits


def test_bits_go_where_they_gain_most() -> None:
    """Against every way of sharing out three units' bits: none of the same size is better."""
    errors = {("transformer", name): error for name, error in (("a", 0.5), ("b", 0.1), ("c", 0.02))}
    weights = dict(zip(errors, (100, 300, 600), strict=True))
    bits = share_out(errors, weights, budget=1.055)

    def size(chosen: Sequence[int]) -> float:
        return sum(count * (b + 0.5) for count, b in zip(weights.values(), chosen, strict=True))

    def left(chosen: Sequence[int]) -> float:
        return sum(e**2 * 4.0 ** (4 - b) for e, b in zip(errors.values(), chosen, strict=True))

    assert size(list(bits.values())) <= 1.055 * size([4, 4, 4])
    possible = [chosen for chosen in product(LEVELS, repeat=3) if size(chosen) <= size(list(bits.values()))]
    assert left(list(bits.values())) == min(map(left, possible))


def bytes_of(part: str, quantize: Quantize) -> int:
    """At the published 4B's shapes."""
    config = klein("4b")
    source: Any = SimpleNamespace(config=config, quantization={}, path=Path("4b"))
    quantization = settle(parse(quantize), source).get(part)
    total = 0
    for name, shape in expected(part, config, quantization).items():
        path, _, kind = name.rpartition(".")
        packed = quantization is not None and kind == "weight" and quantization.of(part, path) is not None
        total += math.prod(shape) * (4 if packed else 2)
    return total


def test_mixed_4_has_the_size_of_4_bits() -> None:
    for part in ("transformer", "text_encoder"):
        assert bytes_of(part, "mixed-4") <= 1.06 * bytes_of(part, PLAIN_4)
    whole, plain = (sum(bytes_of(part, asked) for part in PARTS) for asked in ("mixed-4", PLAIN_4))
    assert 0.98 * plain < whole <= 1.06 * plain


def test_a_calibrated_model_converts_and_loads(tmp_path: Path) -> None:
    source: Any = open_model(quantizable_model(tmp_path / "model"))
    source = replace(source, config=replace(source.config, max_sequence_length=40, default_size=64))
    told: list[str] = []
    asked = {"transformer": "4-g32", "text_encoder": 5, "mod_*": "mxfp4"}
    calibrated = calibrate(source, asked, prompts=["a"], steps=1, done=told.append)
    settled = settle(parse(asked), source)
    assert sorted(told) == sorted(path for part in settled.values() for path in part.layers or ())
    finished = open_model(convert_checkpoint(calibrated, tmp_path / "out", verify=True))
    for part in PARTS:
        assert_equal(
            parameters(load_part(part, finished, mx.float32)), parameters(load_part(part, calibrated, mx.float32))
        )
        layers = finished.quantization[part].layers if part in settled else None
        assert layers == (settled[part].layers if part in settled else None)
    with pytest.raises(CheckpointError, match="quantized already; calibration starts from the original"):
        calibrate(finished, {"transformer": 4})
    with pytest.raises(RequestError, match="needs bits to calibrate for"):
        calibrate(source, None)
    with pytest.raises(RequestError, match="at least one prompt"):
        calibrate(source, 4, prompts=[])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        pytest.param(
            ("mixed-4", None, "6"),
            {"single_blocks.0.linear_out": Quantization(6), "mod_img": Quantization(8)},
            marks=pytest.mark.slow,
        ),
        (
            ("mixed-4", 32, None, "none", ["double_blocks.*=mxfp4"]),
            {"double_blocks.0.img.to_q": Quantization(4, 32, "mxfp4")},
        ),
    ],
)
def test_a_preset_shares_out_what_nothing_else_was_asked_for(
    options: tuple[Any, ...], kept: dict[str, Quantization | None]
) -> None:
    source: Any = open_model("tiny")
    source = replace(source, config=replace(source.config, default_size=32))
    found = calibrate(source, from_options(*options), prompts=["a"], steps=1).quantization
    layers = {(part, path): own for part in found for path, own in (found[part].layers or {}).items()}
    for path, own in kept.items():
        got = layers.get(("transformer", path))
        assert (got and (got.bits, got.group_size, got.mode)) == (own and (own.bits, own.group_size, own.mode))
    free = {key: own for key, own in layers.items() if own.mode == "affine" and key[1] not in ("embed_tokens", *kept)}
    assert {own.group_size for own in free.values()} == {options[1] or 64}
    assert len({own.bits for own in free.values()}) > 2


def test_widths_that_no_group_divides_are_refused_first() -> None:
    with pytest.raises(CheckpointError, match="has 160 inputs; 4-bit weights need a multiple of 64"):
        calibrate(open_model(GOLDEN), {"text_encoder": 4})


def test_the_command_calibrates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser()
    add_arguments(parser)
    (tmp_path / "prompts.txt").write_text("a red circle\n\n")
    given = ["tiny", str(tmp_path / "out"), "--quiet", "--transformer-bits", "4", "--calibrate"]
    assert run(parser.parse_args([*given, "--calibrate-prompts", str(tmp_path / "prompts.txt")])) == 0
    assert '"calibration": {\n    "prompts": 1' in (tmp_path / "out" / "klein.json").read_text()
    with pytest.raises(RequestError, match="--calibrate needs --quantize"):
        run(parser.parse_args(["tiny", str(tmp_path / "x"), "--calibrate"]))
    with pytest.raises(RequestError, match="cannot be read as text"):
        run(parser.parse_args([*given, "--calibrate-prompts", str(tmp_path / "none")]))
    capsys.readouterr()
