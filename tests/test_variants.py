"""Variants as data: what tells 9b-kv, its rule for references, the reuse that others may ask for, licences, VAEs."""

import logging
from pathlib import Path
from typing import Any

import folders
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from klein_convert.checkpoint import convert_checkpoint
from klein_mlx import CheckpointError, KleinPipeline, RequestError
from klein_mlx.config import VARIANTS, ModelConfig, TextEncoderConfig, TransformerConfig, VAEConfig, gated_notice
from klein_mlx.formats.open import open_model
from klein_mlx.model.layers import swiglu
from klein_mlx.model.sampler import all_ids, join_references, latents_to_tokens
from klein_mlx.model.transformer import Modulation, Rope, Transformer, rope_tables
from klein_mlx.model.velocity import Tables, velocity
from klein_mlx.weights.checkpoint import load_part
from klein_mlx.weights.hub import download

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    module = load_part("transformer", open_model(folders.GOLDEN), mx.float32)
    assert isinstance(module, Transformer)
    return module


def normal(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def test_the_table() -> None:
    assert [v.name for v in VARIANTS] == ["4b", "base-4b", "9b", "base-9b", "9b-kv", "dev"]
    assert {v.name for v in VARIANTS if v.is_gated} == {"9b", "base-9b", "9b-kv", "dev"}
    assert {v.name: (v.steps, v.guidance) for v in VARIANTS if not v.is_distilled} == {
        "base-4b": (50, 4.0),
        "base-9b": (50, 4.0),
        "dev": (50, 4.0),
    }
    assert [v.name for v in VARIANTS if v.embeds_guidance] == ["dev"]


def test_the_pipeline_class_tells_that_references_are_kept(tmp_path: Path) -> None:
    """Its own file says so, and a conversion keeps it; a plain folder does not."""
    folder = folders.copy_model(tmp_path / "kv")

    def rename(values: dict[str, Any]) -> None:
        values["_class_name"] = "Flux2KleinKVPipeline"
        del values["is_distilled"]

    folders.edit_json(folder / "model_index.json", rename)
    config = open_model(folder).config
    assert config.caches_references
    assert config.is_distilled
    copy = convert_checkpoint(folder, tmp_path / "ours")
    assert open_model(copy).config == config
    assert not open_model(folders.GOLDEN).config.caches_references


def test_9b_kv_has_the_dimensions_of_9b() -> None:
    transformer = TransformerConfig(128, 8, 24, 128, 32, 12288, 3.0, (32, 32, 32, 32))
    encoder = TextEncoderConfig(151936, 4096, 12288, 36, 32, 8, 128)
    names = [
        ModelConfig(
            transformer, encoder, VAEConfig((128, 256, 512, 512), 2, 32), True, (9, 18, 27), caches_references=kept
        ).variant.name
        for kept in (False, True)
    ]
    assert names == ["9b", "9b-kv"]


def turn(x: mx.array, rope: Rope) -> mx.array:
    pairs = mx.unflatten(x, -1, (-1, 2))
    return (pairs[..., :1] * rope.first + pairs[..., 1:] * rope.second).flatten(-2)


def masked_velocity(
    model: Transformer, latents: mx.array, references: Any, prompt_embeds: mx.array, sigma: float
) -> mx.array:
    """9b-kv's rule without any memory: one pass over all tokens, a mask, and modulations token by token."""
    h, w = latents.shape[1:3]
    length, count = prompt_embeds.shape[1], references.ids.shape[0]
    ids = all_ids(length, h, w, references)
    rope = rope_tables(ids, model.config.axes_dims_rope, model.config.rope_theta, length)
    total = length + h * w + count
    is_reference = mx.arange(total) >= total - count
    mask = ~(is_reference[:, None] & ~is_reference[None, :])
    now, still = model.modulations(sigma, mx.float32), model.modulations(0.0, mx.float32)

    def blend(a: Modulation, b: Modulation, where: mx.array) -> Modulation:
        return Modulation(*(mx.where(where[:, None], y, x)[None] for x, y in zip(a, b, strict=True)))

    def norm(x: mx.array, mod: Modulation) -> mx.array:
        centred = x - x.mean(-1, keepdims=True)
        return centred * mx.rsqrt(mx.square(centred).mean(-1, keepdims=True) + model.config.eps) * mod.scale + mod.shift

    def heads(x: mx.array) -> mx.array:
        return mx.unflatten(x, -1, (-1, model.config.attention_head_dim))

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        q, k, v = (a.transpose(0, 2, 1, 3) for a in (turn(q, rope), turn(k, rope), v))
        scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
        weights = mx.softmax(mx.where(mask, scores, -1e9), axis=-1)
        return (weights @ v).transpose(0, 2, 1, 3).flatten(2)

    txt = model.txt_in(prompt_embeds)
    img = model.img_in(mx.concatenate([latents_to_tokens(latents), references.tokens], axis=1))
    for block in model.double_blocks:
        mods_img = [blend(a, b, is_reference[length:]) for a, b in zip(now.img, still.img, strict=True)]
        sides = []
        for stream, x, mods in ((block.txt, txt, now.txt), (block.img, img, mods_img)):
            y = norm(x, mods[0])
            q, k, v = (heads(p(y)) for p in (stream.to_q, stream.to_k, stream.to_v))
            sides.append((stream.norm_q(q), stream.norm_k(k), v))
        out = attend(*(mx.concatenate(pair, axis=1) for pair in zip(*sides, strict=True)))
        outs = []
        for stream, x, mods, attention in (
            (block.txt, txt, now.txt, out[:, :length]),
            (block.img, img, mods_img, out[:, length:]),
        ):
            x = x + mods[0].gate * stream.to_out(attention)
            outs.append(
                x + mods[1].gate * stream.mlp_out(swiglu.plain(*mx.split(stream.mlp_in(norm(x, mods[1])), 2, -1)))
            )
        txt, img = outs
    x = mx.concatenate([txt, img], axis=1)
    for block in model.single_blocks:
        mod = blend(now.single, still.single, is_reference)
        y = block.linear_in(norm(x, mod))
        hidden, mlp = block.hidden, block.mlp
        q, k, v, gate, value = mx.split(y, [hidden, 2 * hidden, 3 * hidden, 3 * hidden + mlp], -1)
        attention = attend(block.norm_q(heads(q)), block.norm_k(heads(k)), heads(v))
        x = x + mod.gate * block.linear_out(mx.concatenate([attention, swiglu.plain(gate, value)], -1))
    shift, scale = now.final
    out = model.final_out(norm(x[:, length : length + h * w], Modulation(shift, scale, shift)))
    return mx.unflatten(out, 1, (h, w))


def test_kept_references_against_one_masked_pass(transformer: Transformer) -> None:
    """The same attention rule without a memory gives the same velocity, at the first step and at later ones."""
    config = transformer.config
    references = join_references(
        [normal(1, 4, 5, config.in_channels, seed=1), normal(1, 2, 3, config.in_channels, seed=2)]
    )
    embeds = normal(2, 7, config.joint_attention_dim, seed=3)
    levels = (1.0, 0.7, 0.2)
    tables = Tables(transformer, references, (3, 4), levels, mx.float32, still=True)
    predict = velocity(transformer, embeds, tables, "alone")
    for seed, sigma in enumerate(levels, start=4):
        latents = normal(1, 3, 4, config.in_channels, seed=seed)
        kept = predict(latents, sigma)
        for i in range(2):
            whole = masked_velocity(transformer, latents, references, embeds[i : i + 1], sigma)
            assert mx.abs(kept[i : i + 1] - whole).max().item() <= 1e-4 * mx.abs(whole).max().item()


def test_the_first_step_is_exact_under_reuse(transformer: Transformer) -> None:
    """Reuse changes nothing in the step that is kept from; repeated at the same latents it stays exact, too."""
    config = transformer.config
    references = join_references([normal(1, 4, 5, config.in_channels, seed=1)])
    embeds, latents = normal(1, 7, config.joint_attention_dim, seed=3), normal(1, 3, 4, config.in_channels, seed=4)
    tables = Tables(transformer, references, (3, 4), (0.9, 0.2), mx.float32)
    reused, plain = velocity(transformer, embeds, tables, "first step"), velocity(transformer, embeds, tables)
    wanted = plain(latents, 0.9)
    assert mx.array_equal(reused(latents, 0.9), wanted)
    assert mx.abs(reused(latents, 0.9) - wanted).max().item() <= 1e-4 * mx.abs(wanted).max().item()
    assert mx.abs(reused(latents, 0.2) - plain(latents, 0.2)).max().item() > 1e-3


def test_reuse_on_tiny_says_that_it_is_an_approximation() -> None:
    pipe = KleinPipeline.from_pretrained("tiny", keep="all")
    image = Image.new("RGB", (64, 64), "red")
    asked: dict[str, Any] = {"image": image, "seed": 7}
    exact, reused = pipe(PROMPT, **asked), pipe(PROMPT, reuse_references=True, **asked)
    assert exact.notes == []
    assert reused.notes == ["the references are computed in the first step only: an approximation"]
    assert not np.array_equal(np.asarray(exact.images[0]), np.asarray(reused.images[0]))
    with pytest.raises(RequestError, match="reuse_references needs a reference image, and none is given"):
        pipe(PROMPT, reuse_references=True)


def test_how_far_reuse_goes_on_tiny() -> None:
    """What `Arguments` states: pixels move by under 0.1 of 255 on average."""
    pipe = KleinPipeline.from_pretrained("tiny", keep="all")
    moved = []
    for seed, (colour, change) in enumerate([("red", "make the circle green"), ("blue", "remove the circle")]):
        image = pipe(f"a {colour} circle on a white background", seed=seed).images[0]
        exact, reused = (
            np.asarray(pipe(change, image=image, seed=seed, reuse_references=reuse).images[0]).astype(float)
            for reuse in (False, True)
        )
        moved.append(np.abs(exact - reused).mean())
    assert 0 < np.mean(moved) < 0.1


def test_a_gated_model_says_so_before_its_download(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import huggingface_hub

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    told = []
    for hub_id in ("black-forest-labs/FLUX.2-klein-9b-kv", "black-forest-labs/FLUX.2-klein-4B"):
        with caplog.at_level(logging.WARNING, "klein_mlx"), pytest.raises(CheckpointError, match=hub_id):
            download(hub_id)
        told.append([record.getMessage() for record in caplog.records])
        caplog.clear()
    (notice,), nothing = told
    assert nothing == []
    for words in ("non-commercial", "gated", "huggingface.co/black-forest-labs/FLUX.2-klein-9b-kv", "hf auth login"):
        assert words in notice
    assert "\n" not in notice
    assert gated_notice("black-forest-labs/FLUX.2-klein-base-4B") is None


def test_a_vae_of_its_own(tmp_path: Path) -> None:
    """A folder in place of the model's own: its weights count, the rest is the model's."""
    folder = folders.copy_model(tmp_path / "model")
    own = KleinPipeline.from_pretrained(folders.GOLDEN)

    def double(weights: dict[str, mx.array]) -> None:
        weights["decoder.conv_out.bias"] = weights["decoder.conv_out.bias"] + 0.5

    folders.edit_weights(folder, "vae", double)
    other = KleinPipeline.from_pretrained(folders.GOLDEN, vae=folder / "vae")
    asked: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 1, "seed": 1, "max_sequence_length": 16}
    assert np.array_equal(
        np.array(own(PROMPT, output_type="latent", **asked).images),
        np.array(other(PROMPT, output_type="latent", **asked).images),
    )
    assert not np.array_equal(
        own(PROMPT, output_type="np", **asked).images, other(PROMPT, output_type="np", **asked).images
    )
    with pytest.raises(CheckpointError, match="none"):
        KleinPipeline.from_pretrained(folders.GOLDEN, vae=tmp_path / "none")


def test_the_small_decoder_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In diffusers' files, else in the single one; what the cache holds needs no network."""
    import huggingface_hub

    from klein_mlx.formats import open as formats
    from klein_mlx.formats.open import SMALL_DECODER, find_part
    from klein_mlx.weights.hub import cache_folder

    files = ["config.json", "diffusion_pytorch_model.safetensors", "full_encoder_small_decoder.safetensors"]
    listed, asked = [files, files[2:]], []

    def fetch(hub_id: str, allow_patterns: list[str], local_files_only: bool, **kwargs: Any) -> str:
        if not local_files_only:
            asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(formats, "list_files", lambda hub_id, **options: listed.pop(0))
    assert find_part("vae", SMALL_DECODER) == tmp_path
    assert find_part("vae", SMALL_DECODER) == tmp_path / files[2]
    assert asked == [files[:2], files[2:]]
    told = folders.refusal(lambda: find_part("vae", SMALL_DECODER, local_files_only=True))
    assert f"{SMALL_DECODER}: its vae is not (fully) in {cache_folder()}, and the network is not to be used" in told
    mx.save_safetensors(str(tmp_path / files[2]), {"x": mx.zeros(1)})
    assert find_part("vae", SMALL_DECODER, local_files_only=True) == tmp_path / files[2]
    assert find_part("vae", "./black-forest-labs/x") == Path("black-forest-labs/x")
