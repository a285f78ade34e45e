"""LoRAs that cannot be applied, given to the real command: class L."""

import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from faults import ROOT, TINY, accepted, refused

SILHOUETTES = ROOT / "examples" / "tiny" / "silhouettes.safetensors"
Tensors = dict[str, mx.array]


def factors(rows: int, columns: int, name: str, rank: int = 2) -> Tensors:
    return {f"{name}.lora_A.weight": mx.ones((rank, columns)), f"{name}.lora_B.weight": mx.ones((rows, rank))}


TO_Q = "transformer.transformer_blocks.0.attn.to_q"
FITTING = factors(192, 192, TO_Q)  # tiny's hidden size
A, B = f"{TO_Q}.lora_A.weight", f"{TO_Q}.lora_B.weight"


def without(name: str) -> Tensors:
    return {key: array for key, array in FITTING.items() if key != name}


BAD: dict[str, tuple[Tensors, str]] = {
    "9B": (factors(4096, 4096, TO_Q), "is a LoRA for FLUX.2 [klein] 9B (hidden size 4096)"),
    "dev": (factors(18432, 6144, "lora_unet_double_blocks_0_img_attn_qkv"), "is a LoRA for FLUX.2 [dev]"),
    "FLUX.1": (factors(21504, 3072, "lora_unet_single_blocks_0_linear1"), "is a LoRA for FLUX.1"),
    "SDXL": (factors(320, 320, "lora_unet_down_blocks_0_attentions_0_proj_in"), "Stable Diffusion or SDXL"),
    "nothing that fits": ({"some.other.weight": mx.ones((2, 2))}, "some.other.weight"),
    "an unused key": ({**FITTING, "some.other.weight": mx.ones((2, 2))}, "some.other.weight"),
    "only A": (without(B), "lora_A"),
    "only B": (without(A), "lora_B"),
    "ranks that differ": ({A: mx.ones((2, 192)), B: mx.ones((192, 3))}, "rank"),
    "a NaN": ({A: mx.full((2, 192), float("nan")), B: mx.ones((192, 2))}, "NaN"),
    "alpha NaN": ({**FITTING, f"{TO_Q}.alpha": mx.array(float("nan"))}, "alpha"),
    "alpha 0": ({**FITTING, f"{TO_Q}.alpha": mx.array(0.0)}, "alpha"),
    "OFT": ({f"{TO_Q}.oft_R.weight": mx.ones((2, 4, 4))}, "OFT"),
    "no tensors": ({}, "lora.safetensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_refused(tmp_path: Path, name: str) -> None:
    tensors, words = BAD[name]
    mx.save_safetensors(str(tmp_path / "lora.safetensors"), tensors)
    with_it = ("--lora", "lora.safetensors", "-o", "out.png", *TINY)
    refused("generate", "a star", *with_it, folder=tmp_path, words=words)


def pickled(folder: Path) -> None:
    (folder / "lora.pt").write_bytes(b"\x80\x04K\x01." + bytes(64))


def page(folder: Path) -> None:
    (folder / "page.safetensors").write_bytes(b"<!DOCTYPE html><html>404</html>")


def cut(folder: Path) -> None:
    (folder / "cut.safetensors").write_bytes(SILHOUETTES.read_bytes()[:9000])


def two(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / "loras" / name).mkdir(parents=True)
        (folder / "loras" / name / "style.safetensors").write_bytes(SILHOUETTES.read_bytes())


@pytest.mark.parametrize(
    ("make", "given", "words"),
    [
        (None, "none.safetensors", "none.safetensors"),
        (None, ".", "."),
        (pickled, "lora.pt", "pickle"),
        (page, "page.safetensors", "web page"),
        (cut, "cut.safetensors", "bytes short"),
        (None, f"{SILHOUETTES}:nan", "nan"),
        (None, f"{SILHOUETTES}:inf", "inf"),
        (None, f"{SILHOUETTES}:strong", "what follows, ':strong', is not a scale; write FILE:0.8"),
        (None, f"{SILHOUETTES}:1,{SILHOUETTES}:1", "--lora once for each file"),
        (two, "nowhere", "nowhere"),
    ],
)
def test_paths_that_are_refused(tmp_path: Path, make: Callable[[Path], None] | None, given: str, words: str) -> None:
    if make is not None:
        make(tmp_path)
    where = ("--lora", given, "--lora-folder", "loras", "--offline", "-o", "out.png")
    refused("generate", "a star", *where, *TINY, folder=tmp_path, words=words)


@pytest.mark.slow
def test_the_same_twice_twenty_at_once_and_odd_scales(tmp_path: Path) -> None:
    """All work: scale 0 is no LoRA to the byte, since its recipe is left out as well."""
    given = os.fspath(SILHOUETTES)
    plain = ("a star", *TINY, "--no-metadata")
    accepted("generate", *plain, "-o", "none.png", folder=tmp_path, changes=["+none.png"])
    for name, loras in {
        "zero": [f"{given}:0"],
        "undone": [given, f"{given}:-1"],
        "twenty": [f"{given}:0.05"] * 20,
        "strong": [f"{given}:100"],
    }.items():
        options = [word for lora in loras for word in ("--lora", lora)]
        accepted("generate", *plain, *options, "-o", f"{name}.png", folder=tmp_path, changes=[f"+{name}.png"])
    assert (tmp_path / "zero.png").read_bytes() == (tmp_path / "none.png").read_bytes()
    assert (tmp_path / "twenty.png").read_bytes() != (tmp_path / "none.png").read_bytes()
