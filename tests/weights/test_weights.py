"""Files on disk: one clear line for each that is damaged, missing, or something else under a weight file's name."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from folders import GOLDEN, copy_model, edit_json, raw_safetensors, refusal, shard, weight_file

from klein_mlx.config import PARTS
from klein_mlx.formats.open import open_model
from klein_mlx.weights.checkpoint import load_part
from klein_mlx.weights.safetensors import is_finite, open_weights, read_header, read_json


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A fault must be told at once; a hang (an opened pipe) ends as a failure."""

    def stop(*_: object) -> None:
        raise TimeoutError("hangs")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_model(tmp_path / "model")


# ---- safetensors files ----

_ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
_WHOLE = raw_safetensors({"a": _ENTRY}, bytes(8))
BROKEN = {
    "payload cut short": (_WHOLE[:-3], "is 3 bytes short: an incomplete download or copy"),
    "header cut short": (_WHOLE[:20], "is cut short"),
    "header of 2^63 bytes": ((1 << 63).to_bytes(8, "little") + bytes(64), "not a safetensors file"),
    "header of 100 GiB": ((100 << 30).to_bytes(8, "little") + bytes(64), "not a safetensors file"),
    "empty": (b"", "has 0 bytes"),
    "seven bytes": (bytes(7), "has 7 bytes"),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
    "web page, indented": (b"\n  <html>" + bytes(99), "is a web page"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a Git LFS pointer"),
    "pickle": (b"PK\x03\x04" + bytes(99), "is a PyTorch pickle"),
    "GGUF": (b"GGUF" + bytes(99), "is a GGUF file"),
    "broken JSON": (raw_safetensors('{"a": '), "is damaged"),
    "a list": (raw_safetensors("[1, 2]"), "is damaged"),
    "deep nesting": (raw_safetensors('{"a":' * 100_000), "is damaged"),
    "overlap": (raw_safetensors({"a": _ENTRY, "b": _ENTRY | {"data_offsets": [4, 12]}}, bytes(12)), "is damaged"),
    "hole": (raw_safetensors({"a": _ENTRY, "b": _ENTRY | {"data_offsets": [12, 20]}}, bytes(20)), "is damaged"),
    "trailing bytes": (_WHOLE + bytes(5), "is damaged"),
    "reversed offsets": (raw_safetensors({"a": _ENTRY | {"data_offsets": [8, 0]}}, bytes(8)), "is damaged"),
    "offsets past the end": (raw_safetensors({"a": _ENTRY | {"data_offsets": [0, 1 << 62]}}, bytes(8)), "bytes short"),
    "negative shape": (raw_safetensors({"a": _ENTRY | {"shape": [-1, -2]}}, bytes(8)), "is damaged"),
    "overflowing shape": (raw_safetensors({"a": _ENTRY | {"shape": [1 << 32, 1 << 32]}}, bytes(8)), "is damaged"),
    "shape of other bytes": (raw_safetensors({"a": _ENTRY | {"shape": [3]}}, bytes(8)), "is damaged"),
    "unknown dtype": (raw_safetensors({"a": _ENTRY | {"dtype": "F99"}}, bytes(8)), "is damaged"),
    "metadata of numbers": (raw_safetensors({"a": _ENTRY, "__metadata__": {"x": 1}}, bytes(8)), "is damaged"),
    "the same key twice": (
        raw_safetensors(
            f'{{"a":{json.dumps(_ENTRY)},"a":{json.dumps(_ENTRY | {"data_offsets": [8, 16]})}}}', bytes(16)
        ),
        "is damaged",
    ),
}


def test_the_sound_file_that_the_broken_ones_are_made_of_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(_WHOLE)
    assert read_header(tmp_path / "x.safetensors")["a"].shape == (2,)


@pytest.mark.parametrize("length", [640, 1152, 0x3C20, 0x13C])
def test_a_sound_file_may_begin_as_a_pickle_or_a_web_page_does(tmp_path: Path, length: int) -> None:
    """The first bytes are the header's length, which may be any number."""
    path = tmp_path / "x.safetensors"
    text = json.dumps({"a": _ENTRY})
    path.write_bytes(raw_safetensors(text + " " * (length - len(text)), bytes(8)))
    assert path.read_bytes()[0] in b"\x80 <"
    assert read_header(path)["a"].shape == (2,)
    os.truncate(path, path.stat().st_size - 3)
    assert refusal(lambda: read_header(path)).endswith("is 3 bytes short: an incomplete download or copy; get it again")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told(folder: Path, name: str) -> None:
    content, message = BROKEN[name]
    path = weight_file(folder, "vae")
    path.unlink()
    path.write_bytes(content)
    told = refusal(lambda: load_part("vae", open_model(folder), mx.float32))
    assert told.startswith(f"{path}: ")
    assert message in told
    assert len(told) < 400 + len(str(path))


def _directory(path: Path) -> None:
    path.mkdir()


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_directory, "is not a regular file"),
        (_fifo, "is not a regular file"),
        (_dangling, "is missing (a broken link)"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
        (lambda path: None, "is missing, and so is model.safetensors.index.json"),
    ],
)
def test_what_is_not_a_file_is_told(folder: Path, make: Callable[[Path], None], message: str) -> None:
    path = weight_file(folder, "text_encoder")
    path.unlink()
    make(path)
    assert refusal(lambda: open_model(folder).weights("text_encoder")) == f"{path}: {message}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_told(folder: Path) -> None:
    weight_file(folder, "vae").chmod(0)
    assert "cannot be read" in refusal(lambda: open_model(folder).weights("vae"))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_never_read(folder: Path, name: str) -> None:
    weight_file(folder, "transformer").rename(folder / "transformer" / name)
    told = refusal(lambda: open_model(folder).weights("transformer"))
    assert f"holds {name}" in told
    assert "pickles can run code" in told


def test_apple_double_files_are_ignored(folder: Path) -> None:
    for part in PARTS:
        path = weight_file(folder, part)
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07")
        path.with_name(f"._{path.stem}.bin").write_bytes(b"\x00\x05\x16\x07")
        assert load_part(part, open_model(folder), mx.float32)


# ---- shards ----


def test_shards_load_as_the_whole_file_does(folder: Path) -> None:
    shard(folder, "transformer", 3)
    whole, sharded = open_model(GOLDEN).weights("transformer"), open_model(folder).weights("transformer")
    assert whole.keys() == sharded.keys()
    assert all(mx.array_equal(whole[name], sharded[name]).item() for name in whole)


def _point(name: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values["weight_map"].update({"model.norm.weight": name})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_point("../x.safetensors"), "names the shard '../x.safetensors'"),
        (_point("/etc/x.safetensors"), "names the shard '/etc/x.safetensors'"),
        (_point("sub/x.safetensors"), "names the shard 'sub/x.safetensors'"),
        (_point("x.bin"), "names the shard 'x.bin'"),
        (_point("x\0.safetensors"), "names the shard"),
        (_point(7), "names the shard 7"),
        (_point("absent.safetensors"), "absent.safetensors: is missing"),
        (lambda values: values.pop("weight_map"), "has no weight_map"),
        (lambda values: values.update(weight_map=[]), "has no weight_map"),
        (lambda values: values["weight_map"].pop("model.norm.weight"), "model.norm.weight is in it, unlike"),
        (lambda values: values["weight_map"].update(x="model-00001-of-00002.safetensors"), "x is not in it, unlike"),
    ],
)
def test_a_wrong_index_is_told(folder: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit_json(shard(folder, "text_encoder"), edit)
    assert message in refusal(lambda: open_model(folder).weights("text_encoder"))


def test_a_file_beside_an_index_is_ambiguous(folder: Path) -> None:
    single = weight_file(folder, "vae").read_bytes()
    shard(folder, "vae")
    weight_file(folder, "vae").write_bytes(single)
    assert "holds both" in refusal(lambda: open_model(folder).weights("vae"))


# ---- JSON ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"[1]", "holds a JSON list"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[" * 200_000, "is not valid JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "is not valid JSON"),
    ],
)
@pytest.mark.parametrize("name", ["model_index.json", "vae/config.json"])
def test_broken_json_is_told(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    told = refusal(lambda: open_model(folder))
    assert told.startswith(f"{folder / name}: {message}")


def test_a_pipe_or_a_folder_in_place_of_json_is_told(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", folder):
        assert refusal(lambda path=path: read_json(path)) == f"{path}: is not a regular file"


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_what_is_no_number_is_found_wherever_it_is(dtype: mx.Dtype) -> None:
    largest = mx.finfo(dtype).max
    array = mx.array([0.0, -0.0, largest, -largest, 1e-40, -1.0] * 50).astype(dtype).reshape(12, 25)
    assert is_finite(array).item()
    assert is_finite(array.T).item()
    for value in (float("nan"), float("inf"), -float("inf")):
        damaged = mx.array(array)
        damaged[7, 3] = value
        assert not is_finite(damaged).item()
        assert not is_finite(damaged.T[1:]).item()
    assert is_finite(mx.array([1, 2])).item()
    assert is_finite(mx.zeros((0,), dtype)).item()


def test_files_of_too_many_tensors_are_refused_at_once(tmp_path: Path) -> None:
    """Before they are parsed: a header of 1.2 million tensors takes minutes otherwise."""
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(f'"a{i}":{entry}' for i in range(100_001)) + "}").encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "claims 100001 tensors; klein_mlx reads 100000 at most" in refusal(lambda: read_header(path))
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"a{i}": "model.safetensors" for i in range(100_001)}}))
    assert "names 100001 tensors; klein_mlx reads 100000 at most" in refusal(lambda: open_weights(tmp_path, "x"))
