"""Damaged and foreign weight files given to the real command: one line that says what is wrong, and nothing written."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from faults import TINY, accepted, refused
from folders import GOLDEN, copy_model, edit_json, edit_weights, raw_safetensors, shard, weight_file
from foreign import golden, save, to_bfl
from test_weights import BROKEN

from klein_mlx.config import PARTS
from klein_mlx.errors import CheckpointError
from klein_mlx.weights.safetensors import read_header

OWN = Path(__file__).parents[2] / "klein_mlx" / "tiny"
_ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

# Beside those of test_weights: a file's bytes, and words of the line that refuses it.
MORE = {
    "truncated by a third": (raw_safetensors({"a": _ENTRY}, bytes(5)), "is 3 bytes short"),
    "offsets that are negative": (raw_safetensors({"a": _ENTRY | {"data_offsets": [-8, 0]}}, bytes(8)), "is damaged"),
    "a zip that is a checkpoint": (b"PK\x03\x04" + bytes(9999), "is a PyTorch pickle, which can run code"),
    "an old pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(999), "is a PyTorch pickle"),
    "SQLite, as Draw Things has it": (b"SQLite format 3\x00" + bytes(4080), "is an SQLite file (Draw Things"),
    "JSON": (b'{"model_type": "qwen3"}' + bytes(99), "is a JSON file, not weights"),
    "nothing but zeros": (bytes(4096), "is damaged"),
}


@pytest.mark.parametrize("name", [*BROKEN, *MORE])
def test_a_broken_file(tmp_path: Path, name: str) -> None:
    content, words = (BROKEN | MORE)[name]
    (tmp_path / "x.safetensors").write_bytes(content)
    words = words if name != "GGUF" else "is a damaged GGUF file"  # a file alone is told by its first bytes
    refused("info", "x.safetensors", folder=tmp_path, words=["x.safetensors: ", words])


@pytest.mark.parametrize("length", [1 << 63, 100 << 30])
def test_a_header_s_length_costs_neither_time_nor_memory(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + bytes(64))
    with pytest.raises(CheckpointError):
        read_header(path)
    refused("info", path.name, folder=tmp_path, words="not a safetensors file", memory=3 << 29)


# ---- whole models ----


def _truncate(model: Path) -> None:
    path = sorted(shard(model, "text_encoder").parent.glob("*.safetensors"))[1]
    os.truncate(path, path.stat().st_size * 2 // 3)


def _other_revision(model: Path) -> None:
    shard(model, "transformer")
    first, second = sorted((model / "transformer").glob("*.safetensors"))
    shutil.copy(first, second)


def _tensor_in_two_shards(model: Path) -> None:
    index = shard(model, "transformer")
    first, second = sorted(index.parent.glob("*.safetensors"))
    weights = mx.load(str(second))
    assert isinstance(weights, dict)
    extra = mx.load(str(first))
    assert isinstance(extra, dict)
    name = sorted(extra)[0]
    mx.eval(weights, extra)
    mx.save_safetensors(str(second), {**weights, name: extra[name]}, {"format": "pt"})


def _index(**weight_map: Any) -> Callable[[Path], Any]:
    def edit(model: Path) -> None:
        names = {name.replace("__", "."): value for name, value in weight_map.items()}
        edit_json(shard(model, "vae"), lambda values: values["weight_map"].update(names))

    return edit


def _replace(part: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def edit(model: Path) -> None:
        path = weight_file(model, part)
        path.unlink()
        make(path)

    return edit


def _weights(part: str, edit: Callable[[dict[str, mx.array]], Any]) -> Callable[[Path], Any]:
    return lambda model: edit_weights(model, part, edit)


QUERY = "transformer_blocks.0.attn.to_q.weight"
MLP_IN = "transformer_blocks.0.ff.linear_in.weight"
MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard cut short": (_truncate, "bytes short: an incomplete download or copy; get it again"),
    "a shard of another revision": (_other_revision, "get both again"),
    "a tensor in two shards": (_tensor_in_two_shards, "is in it, unlike diffusion_pytorch_model.safetensors.index"),
    "an index with ../": (_index(bn__running_mean="../x.safetensors"), "names the shard '../x.safetensors'"),
    "an index with an absolute path": (_index(bn__running_mean="/etc/passwd"), "names the shard '/etc/passwd'"),
    "an index with a number": (_index(bn__running_mean=7), "names the shard 7"),
    "an index with a shard that is missing": (_index(bn__running_mean="y.safetensors"), "y.safetensors: is missing"),
    "an index without a map": (lambda model: shard(model, "vae").write_text("{}"), "has no weight_map"),
    "a missing key": (_weights("transformer", lambda w: w.pop(QUERY)), f"1 missing ({QUERY})"),
    "an extra key": (_weights("vae", lambda w: w.update(extra=mx.zeros(3))), "1 unknown (extra)"),
    "a wrong shape": (_weights("transformer", lambda w: w.update({QUERY: w[QUERY][:-1]})), "it must be (64, 64)"),
    "a transposed weight": (_weights("transformer", lambda w: w.update({MLP_IN: w[MLP_IN].T})), MLP_IN),
    "F64": (
        _replace(
            "vae",
            lambda p: p.write_bytes(
                raw_safetensors({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8))
            ),
        ),
        "missing",
    ),
    "a folder in place of a file": (_replace("vae", lambda path: path.mkdir()), "is not a regular file"),
    "a pipe in place of a file": (_replace("vae", lambda path: os.mkfifo(path)), "is not a regular file"),
    "a link to /dev/zero": (_replace("vae", lambda path: path.symlink_to("/dev/zero")), "is not a regular file"),
    "a broken link": (_replace("vae", lambda path: path.symlink_to("nowhere")), "is missing (a broken link)"),
    "a pickle alone": (
        _replace("vae", lambda path: path.with_name("diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")),
        "pickles can run code when opened and are not read",
    ),
    "a web page": (_replace("vae", lambda path: path.write_text("<!DOCTYPE html><html>")), "is a web page"),
    "an LFS pointer": (
        _replace("vae", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n")),
        "is a Git LFS pointer, not the weights: run `git lfs pull`",
    ),
    "no config": (lambda model: (model / "vae" / "config.json").unlink(), "config.json: is missing"),
    "a config of another model": (
        lambda model: edit_json(
            model / "transformer" / "config.json", lambda v: v.update(_class_name="WanTransformer")
        ),
        "_class_name is 'WanTransformer'; FLUX.2 [klein] has 'Flux2Transformer2DModel'",
    ),
    "a config of 10^9 layers": (
        lambda model: edit_json(model / "transformer" / "config.json", lambda v: v.update(num_layers=10**9)),
        "a config asks for 1000000000 layers; klein_mlx builds 1024 at most",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_damaged_model(tmp_path: Path, name: str) -> None:
    damage, words = MODELS[name]
    damage(copy_model(tmp_path / "model"))
    refused("info", "model", folder=tmp_path, words=words)


def test_f64_in_a_matrix(tmp_path: Path) -> None:
    model = copy_model(tmp_path / "model")
    header = {}
    data = b""
    for name, array in golden("vae").items():
        dtype, size = ("F64", 8) if name == "decoder.conv_in.weight" else ("F32", 4)
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.size * size],
        }
        data += bytes(array.size * size)
    weight_file(model, "vae").write_bytes(raw_safetensors(header, data))
    refused(
        "info", "model", folder=tmp_path, words="decoder.conv_in.weight has dtype F64; it must be BF16 or F16 or F32"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("command", ["generate", "convert"])
def test_a_weight_that_is_no_number(tmp_path: Path, command: str, value: float) -> None:
    model = copy_model(tmp_path / "model")

    def damage(weights: dict[str, mx.array]) -> None:
        array = np.array(weights["model.layers.1.mlp.up_proj.weight"].astype(mx.float32))
        array[3, 5] = value
        weights["model.layers.1.mlp.up_proj.weight"] = mx.array(array).astype(mx.bfloat16)

    edit_weights(model, "text_encoder", damage)
    words = ["layers.1.mlp.up_proj.weight", "holds NaN or infinity", "get it again"]
    if command == "convert":
        refused("convert", "model", "ours", folder=tmp_path, words=words)
    else:
        refused("generate", "a star", "-o", "x.png", *TINY[2:], "--model", "model", folder=tmp_path, words=words)


def test_a_matrix_of_zeros_is_told(tmp_path: Path) -> None:
    """It is no fault that a computer can be sure of: the conversion goes on."""
    model = copy_model(tmp_path / "model")
    edit_weights(model, "transformer", lambda w: w.update({QUERY: mx.zeros_like(w[QUERY])}))
    files = ["", "/README.md", "/klein.json", "/tokenizer.json", *(f"/{part}.safetensors" for part in PARTS)]
    words = "warning: double_blocks.0.img.to_q.weight is all zeros: is the source complete?"
    accepted("convert", "model", "ours", folder=tmp_path, words=words, changes=[f"+ours{name}" for name in files])


def test_apple_double_files_are_ignored(tmp_path: Path) -> None:
    model = copy_model(tmp_path / "model")
    for part in PARTS:
        path = weight_file(model, part)
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07")
        (model / part / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
    accepted("info", "model", folder=tmp_path)


def test_nothing_of_a_model_s_folder_is_run(tmp_path: Path) -> None:
    model = copy_model(tmp_path / "model")
    code = "open('canary', 'w').close()\n"
    told = {"auto_map": {"AutoModel": "evil.Model"}, "model_file": "evil.py", "trust_remote_code": True}
    for part in PARTS:
        (model / part / "evil.py").write_text(code)
        edit_json(
            model / part / "config.json", lambda values: values.update(told, _attn_implementation_internal="evil")
        )
    (model / "evil.py").write_text(code)
    (model / "pipeline.py").write_text(code)
    edit_json(model / "model_index.json", lambda values: values.update(told))
    options = ("-o", "x.png", *TINY[2:], "--model", "model")
    accepted("generate", "a star", *options, folder=tmp_path, changes=["+x.png"])


# ---- files of other models ----


def _sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A bfloat16 file of any size, which takes no room."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    path.write_bytes(raw_safetensors(header))
    os.truncate(path, path.stat().st_size + end)
    return path


def _bfl(hidden: int, doubles: int, singles: int, text: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a FLUX.2 transformer in BFL's names."""
    h, m = hidden, 3 * hidden
    shapes: dict[str, tuple[int, ...]] = {
        "img_in.weight": (h, 128),
        "txt_in.weight": (h, text),
        "time_in.in_layer.weight": (h, 256),
        "time_in.out_layer.weight": (h, h),
        "double_stream_modulation_img.lin.weight": (6 * h, h),
        "double_stream_modulation_txt.lin.weight": (6 * h, h),
        "single_stream_modulation.lin.weight": (3 * h, h),
        "final_layer.adaLN_modulation.1.weight": (2 * h, h),
        "final_layer.linear.weight": (128, h),
    }
    for i in range(doubles):
        for stream in ("img", "txt"):
            shapes |= {
                f"double_blocks.{i}.{stream}_attn.qkv.weight": (3 * h, h),
                f"double_blocks.{i}.{stream}_attn.proj.weight": (h, h),
                f"double_blocks.{i}.{stream}_attn.norm.query_norm.scale": (128,),
                f"double_blocks.{i}.{stream}_attn.norm.key_norm.scale": (128,),
                f"double_blocks.{i}.{stream}_mlp.0.weight": (2 * m, h),
                f"double_blocks.{i}.{stream}_mlp.2.weight": (h, m),
            }
    for i in range(singles):
        shapes |= {
            f"single_blocks.{i}.linear1.weight": (3 * h + 2 * m, h),
            f"single_blocks.{i}.linear2.weight": (h, h + m),
            f"single_blocks.{i}.norm.query_norm.scale": (128,),
            f"single_blocks.{i}.norm.key_norm.scale": (128,),
        }
    return shapes


def test_a_9b_transformer_given_to_a_4b_model(tmp_path: Path) -> None:
    """The encoder does not fit it: told with both sizes, from headers alone."""
    (tmp_path / "here").mkdir()
    path = _sparse(tmp_path / "9b.safetensors", _bfl(4096, 8, 24, 12288))
    here, big = tmp_path / "here", {"memory": 64 << 30}  # address space; a file is mapped while its header is read
    accepted("info", path, folder=here, words="of FLUX.2 [klein] 9b", **big)
    if sys.platform == "linux":  # macOS limits no address space
        refused("info", path, folder=here, words="may take no more memory")
    words = ["these parts do not fit together", "FLUX.2 [klein] 9b"]
    options = ("--transformer", path, *TINY[2:], "-o", "x.png")
    refused("generate", "a star", "--model", "tiny", *options, folder=here, words=words, **big)


def test_dev_is_told_from_its_header(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    path, here = _sparse(tmp_path / "x.safetensors", {**_bfl(6144, 8, 48, 15360), **_GUIDANCE}), tmp_path / "here"
    accepted("info", path, folder=here, words="transformer alone, of FLUX.2 [dev]", memory=256 << 30)
    words = ["x.safetensors (of FLUX.2 [dev])", "these parts do not fit together"]
    options = ("--transformer", path, *TINY[2:], "-o", "x.png")
    refused("generate", "a star", "--model", "tiny", *options, folder=here, words=words, memory=256 << 30)


_GUIDANCE = {"guidance_in.in_layer.weight": (6144, 256), "guidance_in.out_layer.weight": (6144, 6144)}
STRANGERS = {
    "FLUX.1": ({"double_blocks.0.img_mod.lin.weight": (8, 8), "img_in.weight": (3072, 64)}, "is FLUX.1; "),
    "Qwen-Image": ({"transformer_blocks.0.img_mod.1.weight": (8, 8)}, "is Qwen-Image; "),
    "Wan": ({"blocks.0.cross_attn.q.weight": (8, 8)}, "is Wan; "),
    "Stable Diffusion 3": ({"joint_blocks.0.x_block.attn.qkv.weight": (8, 8)}, "is Stable Diffusion 3; "),
    "T5": ({"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (8, 8)}, "is a T5 encoder; "),
    "a language model": (
        {"model.layers.0.self_attn.q_proj.weight": (8, 8)},
        "is a language model other than Qwen3 and Mistral-Small; ",
    ),
    "FLUX.1's VAE": ({"encoder.down.0.block.0.norm1.weight": (128,)}, "without the latent statistics of FLUX.2's"),
    "none that is known": ({"a.b.c": (8,)}, "is not a model that klein_mlx knows (it holds a.b.c ...)"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_another_model_is_named(tmp_path: Path, name: str) -> None:
    shapes, words = STRANGERS[name]
    _sparse(tmp_path / "x.safetensors", shapes)
    refused("info", "x.safetensors", folder=tmp_path, words=[words, "" if "VAE" in name else "FLUX.2 [klein]"])


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_pickle_is_never_opened(tmp_path: Path, suffix: str) -> None:
    """What unpickling would run is a file that appears; `refused` sees that none does."""
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return (open, ("canary", "w"))

    (tmp_path / f"model{suffix}").write_bytes(pickle.dumps(Evil(), protocol=4))
    words = "is a PyTorch pickle, which can run code when opened; klein_mlx reads safetensors"
    refused("info", f"model{suffix}", folder=tmp_path, words=words)


@pytest.mark.parametrize(("dtype", "words"), [("F8_E5M2", "stored as F8_E5M2")])
def test_a_small_type_that_says_too_little(tmp_path: Path, dtype: str, words: str) -> None:
    save(tmp_path / "x.safetensors", to_bfl(golden("transformer")))
    content = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entry = header["double_blocks.0.img_attn.qkv.weight"]
    entry |= {"dtype": dtype, "shape": [entry["shape"][0], entry["shape"][1] * 2]}
    (tmp_path / "x.safetensors").write_bytes(raw_safetensors(header, content[8 + length :]))
    refused("info", "x.safetensors", folder=tmp_path, words=["double_blocks.0.img_attn.qkv.weight", words, "bf16"])


# ---- our own format ----


def _settings(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return lambda model: edit_json(model / "klein.json", edit)


def _quantized(**values: Any) -> Callable[[Path], Any]:
    told = {"bits": 4, "group_size": 64, "mode": "affine", **values}
    return _settings(lambda v: v.update(quantization={"transformer": told}))


def _vocabulary(model: Path) -> None:
    """A sound tokenizer with more tokens than the encoder has rows."""
    path = model / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"] += [{**values["added_tokens"][-1], "id": 400_000, "content": "<|new|>"}]
    path.write_text(json.dumps(values))


CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "7 bits": (_quantized(bits=7), "quantization bits is 7; klein_mlx reads 1, 2, 3, 4, 5, 6, 8"),
    "bits as text": (_quantized(bits="4"), "quantization bits is '4'"),
    "groups of 1": (_quantized(group_size=1), "quantization group_size is 1; klein_mlx reads 32, 64, 128"),
    "a mode x": (_quantized(mode="x"), "quantization mode is 'x'; klein_mlx reads affine, mxfp4"),
    "a layer that is not there": (
        _quantized(layers={"nowhere.to_q": {"bits": 4, "group_size": 64, "mode": "affine"}}),
        "nowhere.to_q",
    ),
    "bits that the weights do not have": (_quantized(), "transformer.safetensors"),
    "format 2": (_settings(lambda v: v.update(format_version=2)), "format 2 is newer than this klein_mlx reads"),
    "an unknown variant's sizes": (
        _settings(lambda v: v["transformer"].update(num_attention_heads=0)),
        "no model has these dimensions",
    ),
    "a tokenizer cut short": (lambda model: os.truncate(model / "tokenizer.json", 900), "tokenizer.json"),
    "a tokenizer of another model": (_vocabulary, "tokenizer.json"),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_damaged_checkpoint(tmp_path: Path, name: str) -> None:
    damage, words = CHECKPOINTS[name]
    shutil.copytree(OWN, tmp_path / "model", ignore=shutil.ignore_patterns("__*"))
    damage(tmp_path / "model")
    options = ("-o", "x.png", *TINY[2:], "--model", "model")
    refused("generate", "a star", *options, folder=tmp_path, words=words)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    model = copy_model(tmp_path / "model")
    weight_file(model, "vae").chmod(0)
    refused("info", "model", folder=tmp_path, words="cannot be read (Permission denied)")


def test_the_golden_model_that_the_damaged_ones_are_made_of_is_sound(tmp_path: Path) -> None:
    assert GOLDEN.is_dir()
    accepted("info", copy_model(tmp_path / "model"), folder=tmp_path, words="FLUX.2 [klein]")
