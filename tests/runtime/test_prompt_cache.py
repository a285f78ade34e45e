"""Prompt embeddings on disk: a prompt that comes again, also in another process, loads no encoder."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from klein_mlx import KleinPipeline, RequestError
from klein_mlx.runtime import encodings as prompt_cache
from klein_mlx.runtime.encodings import PromptCache

PROMPT = "a red circle left of a blue square"


def made(folder: Path | None, prompt: str = PROMPT, **options: Any) -> tuple[Any, list[str], list[str]]:
    """A new pipeline's picture, the parts that were loaded for it, and the run's notes."""
    pipe = KleinPipeline.from_pretrained("tiny", keep="nothing", prompt_cache=folder, **options)
    loads: list[str] = []
    load = pipe.parts._load

    def counted(name: str) -> Any:
        loads.append(name)
        return load(name)

    pipe.parts._load = counted  # type: ignore[method-assign]
    out = pipe(prompt, seed=7, num_inference_steps=1, width=64, height=64)
    return np.asarray(out.images[0]), loads, out.notes


def test_a_prompt_that_comes_again_loads_no_encoder(tmp_path: Path) -> None:
    """The same picture; another prompt, dtype or number of bits is another entry."""
    folder = tmp_path / "prompts"
    first, loads, _ = made(folder)
    assert loads == ["text_encoder", "transformer", "vae"]
    (entry,) = folder.iterdir()
    assert PROMPT not in entry.read_bytes().decode("latin-1")
    again, loads, notes = made(folder)
    assert loads == ["transformer", "vae"]
    assert notes == []
    assert np.array_equal(again, first)
    for change in ({"prompt": "a green star"}, {"dtype": "bfloat16"}, {"quantize": 4}):
        assert "text_encoder" in made(folder, **change)[1]
    assert len(list(folder.iterdir())) == 4
    assert "text_encoder" in made(None)[1]


def test_the_same_bits_by_other_scales_are_another_entry(tmp_path: Path) -> None:
    """mixed-4 searches for its scales; the same bits asked for layer by layer are MLX's own codes."""
    folders = []
    for quantize in ("mixed-4", {"text_encoder": 4, "embed_tokens": 6}):
        pipe = KleinPipeline.from_pretrained("tiny", prompt_cache=tmp_path, quantize=quantize)
        assert pipe.encodings.cache is not None
        folders.append(pipe.encodings.cache.path(PROMPT, 64))
        assert pipe.parts.quantization["text_encoder"].layers is not None
    assert folders[0] != folders[1]


def test_another_version_encodes_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path)
    monkeypatch.setattr(prompt_cache, "version", lambda: "999.0")
    assert "text_encoder" in made(tmp_path)[1]


def test_another_process_finds_it(tmp_path: Path) -> None:
    made(tmp_path, dtype="float32")
    code = (
        "import mlx.core as mx\n"
        "mx.set_default_device(mx.cpu)\n"  # as here: another device's embeddings are other entries
        "from klein_mlx import KleinPipeline\n"
        f"pipe = KleinPipeline.from_pretrained('tiny', keep='all', dtype='float32', prompt_cache={str(tmp_path)!r})\n"
        f"pipe({PROMPT!r}, seed=7, num_inference_steps=1, width=64, height=64)\n"
        "print(sorted(pipe.parts.loaded))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "['transformer', 'vae']\n"


@pytest.mark.parametrize("how", ["cut short", "a bit", "no header", "another entry"])
def test_a_damaged_entry_is_not_used(tmp_path: Path, how: str) -> None:
    """The prompt is encoded anew, that is said, and the entry is whole again."""
    first, _, _ = made(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    wrong = {"cut short": whole[:-100], "a bit": whole[:-1] + bytes([whole[-1] ^ 1]), "no header": b"<html>"}
    path.write_bytes(wrong.get(how, whole))
    if how == "another entry":
        mx.save_safetensors(str(path), {"embeds": mx.zeros((1, 3, 5))})
    again, loads, notes = made(tmp_path)
    assert "text_encoder" in loads
    (note,) = notes
    assert note.startswith("the prompt is encoded anew: ")
    assert np.array_equal(again, first)
    assert path.read_bytes() == whole


def test_the_folder_stays_within_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was used longest ago goes first; nothing but entries is ever removed."""
    cache = PromptCache(tmp_path, {"encoder": 1})
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    embeds = mx.ones((1, 4, 8))
    for number, prompt in enumerate("abc"):
        cache.write(prompt, 4, embeds)
        os.utime(cache.path(prompt, 4), (number, number))
    assert cache.read("a", 4, (1, 4, 8), mx.float32) is not None  # used: now b is the oldest
    monkeypatch.setattr(prompt_cache, "MAX_BYTES", 3 * cache.path("a", 4).stat().st_size)
    cache.write("d", 4, embeds)
    assert [cache.path(prompt, 4).exists() for prompt in "abcd"] == [True, False, True, True]
    assert other.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 4


def test_a_folder_that_cannot_be_written_costs_no_picture(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    _, _, notes = made(tmp_path / "file" / "below")
    assert any("embeddings were not kept" in note for note in notes)
    with pytest.raises(RequestError, match="which is not a folder"):
        made(tmp_path / "file")


def test_a_literal_prompt_is_never_the_other_one(tmp_path: Path) -> None:
    """The same words with and without `literal_prompt` are two prompts, whichever comes first."""
    pipe = KleinPipeline.from_pretrained("tiny", prompt_cache=tmp_path)

    def picture(pipe: KleinPipeline, literal: bool) -> np.ndarray:
        options: Any = {"seed": 7, "num_inference_steps": 1, "width": 64, "height": 64, "literal_prompt": literal}
        return np.asarray(pipe("a red circle<|im_end|>", **options).images[0])

    literal, plain = picture(pipe, True), picture(pipe, False)
    assert not np.array_equal(literal, plain)
    later = KleinPipeline.from_pretrained("tiny", prompt_cache=tmp_path)
    assert np.array_equal(picture(later, True), literal)
    assert np.array_equal(picture(later, False), plain)


@pytest.mark.parametrize("kept", [False, True])
def test_a_prompt_that_was_encoded_is_known(kept: bool, tmp_path: Path) -> None:
    """In this process, and on disk; with marks of the model's own it is another one when they are to be text."""
    asked: dict[str, Any] = {"seed": 7, "num_inference_steps": 1, "width": 64, "height": 64}
    pipe = KleinPipeline.from_pretrained("tiny", prompt_cache=tmp_path if kept else None)
    for prompt in (PROMPT, "a star <|im_end|>"):
        assert not pipe.encodings.knows(pipe.stream(prompt, **asked).request)
        pipe(prompt, **asked)
    if kept:
        pipe = KleinPipeline.from_pretrained("tiny", prompt_cache=tmp_path)
    for prompt in (PROMPT, "a star <|im_end|>"):
        assert pipe.encodings.knows(pipe.stream(prompt, **asked).request)
    assert pipe.encodings.knows(pipe.stream(PROMPT, literal_prompt=True, **asked).request)
    assert not pipe.encodings.knows(pipe.stream("a star <|im_end|>", literal_prompt=True, **asked).request)
