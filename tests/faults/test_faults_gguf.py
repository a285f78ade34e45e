"""Crafted GGUF files given to the real command: refused at once, without a crash, a hang or much memory."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from faults import accepted, refused
from foreign import golden, opened, to_bfl, to_llama_cpp

gguf = pytest.importorskip("gguf")

from test_gguf import CRAFTED, crafted, key, save_gguf, tensor, text  # noqa: E402

# More of them, and what those of test_gguf are not: a file's bytes, and words of the line that refuses it.
MORE = {
    "another magic": (lambda: b"FUGG" + crafted()[4:], "x.gguf: "),
    "2^256 numbers": (lambda: crafted(tensors=[tensor(shape=((1 << 64) - 1,) * 4)]), "a has the shape (184467440737"),
    "a negative array": (lambda: crafted(keys=[key("k", 9, b"\x04\0\0\0" + b"\xff" * 8)]), "an array claims"),
    "arrays in arrays": (lambda: crafted(keys=[key("k", 9, (b"\x09\0\0\0" + b"\x01" + bytes(7)) * 99)]), "of type 9"),
    "a name of 2^62 bytes": (lambda: crafted(tensors=[text("a", 1 << 62)]), "claims 4611686018427387904 bytes"),
    "no tensors": (lambda: crafted(tensors=[]), "is not a model that klein_mlx knows (it holds no tensor ...)"),
    "an alignment of text": (
        lambda: crafted(keys=[key("general.alignment", 8, text("32"))]),
        "its alignment is '32'",
    ),
    "a type of the future": (lambda: crafted(tensors=[tensor(kind=1 << 31)]), "which klein_mlx does not read"),
    "MXFP4": (lambda: crafted(tensors=[tensor(kind=39)]), "(it reads F32, F16, Q4_0"),
    "NVFP4": (lambda: crafted(tensors=[tensor(kind=40)]), "which klein_mlx does not read"),
}


@pytest.mark.parametrize("name", [*CRAFTED, *MORE])
def test_a_crafted_file(tmp_path: Path, name: str) -> None:
    content, words = (CRAFTED | MORE)[name]
    (tmp_path / "x.gguf").write_bytes(content())
    refused("info", "x.gguf", folder=tmp_path, words=["x.gguf: ", words], seconds=10, memory=3 << 29)


@pytest.mark.parametrize(
    ("arch", "name", "words"),
    [
        ("llama", "blk.0.attn_q.weight", "is a language model other than Qwen3"),
        ("wan", "blocks.0.cross_attn.q.weight", "is Wan"),
        ("flux", "double_blocks.0.img_mod.lin.weight", "is FLUX.1"),
    ],
)
def test_another_model(tmp_path: Path, arch: str, name: str, words: str) -> None:
    save_gguf(tmp_path / "x.gguf", {name: mx.zeros((32, 32), mx.bfloat16)}, arch=arch)
    refused("info", "x.gguf", folder=tmp_path, words=words)


@pytest.mark.parametrize("arch", ["flux", "pig", "qwen3", "anything"])
def test_what_counts_is_the_tensors_not_the_architecture(tmp_path: Path, arch: str) -> None:
    """Some converters write "pig" or nothing of use: a klein transformer is one by its names."""
    save_gguf(tmp_path / "x.gguf", to_bfl(golden("transformer")), arch=arch)
    accepted("info", "x.gguf", folder=tmp_path, words="transformer alone")


def test_large_and_small_bfloat16_come_through_the_command(tmp_path: Path) -> None:
    """Through float16, 1e5 would be infinite and 1e-8 zero."""
    weights = to_llama_cpp(golden("text_encoder"))
    values = np.array(weights["blk.0.attn_q.weight"].astype(mx.float32))
    values[0, :3] = 1e5, 1e-8, -3e38
    weights["blk.0.attn_q.weight"] = mx.array(values).astype(mx.bfloat16)
    save_gguf(tmp_path / "x.gguf", weights, arch="qwen3")
    model = Path(__file__).parents[1] / "golden" / "model"
    parts = ("transformer", "text_encoder", "vae")
    files = ["", "/README.md", "/klein.json", "/tokenizer.json", *(f"/{part}.safetensors" for part in parts)]
    told = ("--text-encoder", "x.gguf", "--quiet")
    accepted("convert", model, "ours", *told, folder=tmp_path, changes=[f"+ours{name}" for name in files])
    found = mx.load(str(tmp_path / "ours" / "text_encoder.safetensors"))
    assert isinstance(found, dict)
    right = opened("text_encoder", tmp_path / "x.gguf")["layers.0.self_attn.q_proj.weight"]
    array = found["layers.0.self_attn.q_proj.weight"]
    assert mx.array_equal(array, right)
    assert mx.array_equal(array, mx.array(values).astype(mx.bfloat16))
