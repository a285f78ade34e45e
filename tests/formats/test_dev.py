"""FLUX.2 [dev]: its readers, its tokenizer, its guidance, and what it refuses. Parity has the numbers."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from dev_model import SPECIAL, dev_to_bfl, make, tokenizer
from folders import GOLDEN, assert_equal, read_weights, refusal, weight_file
from foreign import Weights, save, to_llama_cpp
from test_float4 import Writer
from test_gguf import save_gguf

from klein_convert.checkpoint import convert_checkpoint
from klein_convert.export import export_diffusers
from klein_mlx import KleinPipeline
from klein_mlx.bench.predict import klein
from klein_mlx.config import resolve
from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.formats import part
from klein_mlx.formats.describe import describe, format_description
from klein_mlx.formats.lora import ARCHITECTURES, read_lora
from klein_mlx.formats.open import open_model
from klein_mlx.model.tokenizer import MISTRAL, SYSTEM_MESSAGE, Tokenizer
from klein_mlx.request import check
from klein_mlx.weights.checkpoint import Source, load_part
from klein_mlx.weights.hub import download

DEV = "black-forest-labs/FLUX.2-dev"


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "dev")


def weights_of(source: Source, name: str) -> Weights:
    found = source.weights(name)
    arrays = {name: weight if isinstance(weight, mx.array) else weight.load() for name, weight in found.items()}
    # A GGUF's vectors are float32.
    return {name: array.astype(mx.bfloat16) if array.dtype == mx.float32 else array for name, array in arrays.items()}


def theirs(dev: Path, name: str) -> Weights:
    return read_weights(weight_file(dev, name))


@pytest.mark.parametrize("prefix", ["model.language_model.", "model."])
def test_diffusers_folder(dev: Path, tmp_path: Path, prefix: str) -> None:
    """Read under each prefix, converted and read again: one model. The encoder's last layer and vision are left out."""
    source, other = open_model(dev), open_model(make(tmp_path / "other", prefix))
    assert source.config == other.config
    assert (source.config.text_encoder.model_type, source.config.taps) == ("mistral", (1, 2, 3))
    assert (source.config.text_encoder.rope_theta, source.config.text_encoder.rms_norm_eps) == (1e9, 1e-5)
    assert (source.config.variant.steps, source.config.variant.guidance, source.config.variant.passes) == (50, 4.0, 1)
    ours = open_model(convert_checkpoint(source, tmp_path / "ours", quantize={"transformer": 4}))
    assert ours.config == source.config
    for model in (other, ours):
        assert_equal(weights_of(source, "text_encoder"), weights_of(model, "text_encoder"))
    assert ours.quantization["transformer"].of("transformer", "double_blocks.0.img.to_q")
    with pytest.raises(CheckpointError, match="own format only"):
        export_diffusers(source, tmp_path / "theirs")


def test_the_transformers_files(dev: Path, tmp_path: Path) -> None:
    """BFL's names, ComfyUI's prefix, GGUF, NVFP4 and FP8, told by their headers."""
    weights = theirs(dev, "transformer")
    right = weights_of(open_model(dev), "transformer")
    bfl = dev_to_bfl(weights)
    paths = [
        save(tmp_path / "a.safetensors", bfl),
        save(tmp_path / "b.safetensors", dev_to_bfl(weights, "model.diffusion_model.")),
        save_gguf(tmp_path / "c.gguf", bfl),
    ]
    for path in paths:
        source = open_model(dev, parts={"transformer": path})
        assert source.config.transformer.guidance_embeds
        assert_equal(weights_of(source, "transformer"), right)
    for kind in ("nvfp4", "F8_E4M3"):
        writer = Writer(bfl, lambda name, kind=kind: "bf16" if "guidance_in" in name else kind)
        path = writer.save(tmp_path / f"{kind}.safetensors", writer.metadata())
        plain = save(tmp_path / f"{kind}-plain.safetensors", writer.values)
        found, wanted = (open_model(dev, parts={"transformer": p}) for p in (path, plain))
        assert_equal(weights_of(found, "transformer"), weights_of(wanted, "transformer"))


def test_the_encoders_files(dev: Path, tmp_path: Path) -> None:
    """transformers' names with and without a prefix, ComfyUI's with its tokenizer inside, llama.cpp's with q and k
    interleaved."""
    right = weights_of(open_model(dev), "text_encoder")
    plain = {n.removeprefix("language_"): a for n, a in theirs(dev, "text_encoder").items()}
    plain = {n: a for n, a in plain.items() if n.startswith("model.")}
    plain = {n.replace("model.model.", "model."): a for n, a in plain.items()}
    heads = open_model(dev).config.text_encoder.head_dim

    def permuted(name: str, array: mx.array) -> mx.array:
        if ".attn_q." not in name and ".attn_k." not in name:
            return array
        rows = np.arange(array.shape[0]).reshape(-1, 2, heads // 2).swapaxes(1, 2).reshape(-1)
        return array[mx.array(rows)]

    llama = {name: permuted(name, array) for name, array in to_llama_cpp(plain).items()}
    for path in (
        save(tmp_path / "a.safetensors", {**plain, "tekken_model": mx.zeros(3, mx.uint8)}),
        save(tmp_path / "b.safetensors", theirs(dev, "text_encoder")),
        save_gguf(tmp_path / "c.gguf", llama, arch="llama"),
    ):
        assert_equal(weights_of(open_model(dev, parts={"text_encoder": path}), "text_encoder"), right)


def test_single_files(dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three files and Mistral's tokenizer beside them are a model; without it, what is missing is told."""
    whole = open_model(dev)
    monkeypatch.setattr(part, "MISTRAL", whole.config.text_encoder)
    monkeypatch.setitem(part.ENCODERS, ("mistral", whole.config.text_encoder.hidden_size), "Mistral, small")
    monkeypatch.setitem(part.KLEIN, "vae", replace(part.KLEIN["vae"], norm_num_groups=4))
    file = save(tmp_path / "x.safetensors", dev_to_bfl(theirs(dev, "transformer")))
    others = {name: weight_file(dev, name) for name in ("text_encoder", "vae")}
    told = refusal(lambda: open_model(file, parts=others, local_files_only=True))
    assert "put Mistral-Small's tokenizer.json beside it" in told
    (tmp_path / "tokenizer.json").write_bytes(whole.tokenizer_file.read_bytes())
    model = open_model(file, parts=others)
    assert model.config == whole.config
    assert_equal(weights_of(model, "transformer"), weights_of(whole, "transformer"))


def test_the_hub(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Its short names, and what is said before its download."""
    assert {resolve(name) for name in ("dev", "FLUX.2-dev", "flux2-dev", "black-forest-labs/flux.2-DEV")} == {DEV}
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda hub_id, **_: asked.append(hub_id) or "x")
    with caplog.at_level("WARNING", "klein_mlx"):
        download(DEV)
    assert "license FLUX non-commercial (gated). Accept it once on huggingface.co" in caplog.text
    assert asked == [DEV]


def test_parts_of_klein_and_of_dev_do_not_mix(dev: Path) -> None:
    told = refusal(lambda: open_model(GOLDEN, parts={"transformer": weight_file(dev, "transformer")}))
    assert "the text encoder is a qwen3; the transformer is FLUX.2 [dev], which needs Mistral-Small" in told
    told = refusal(lambda: open_model(dev, parts={"transformer": weight_file(GOLDEN, "transformer")}))
    assert "the text encoder is a mistral; the transformer is FLUX.2 [klein], which needs Qwen3" in told
    told = refusal(lambda: open_model(dev, parts={"text_encoder": weight_file(GOLDEN, "text_encoder")}))
    assert "is a qwen3, the encoder of another model" in told


def test_pictures(dev: Path) -> None:
    """One pass, in which the guidance scale counts; a negative prompt has no use."""
    pipe = KleinPipeline.from_pretrained(dev)
    options = {"num_inference_steps": 1, "width": 64, "height": 64, "seed": 3, "output_type": "np"}
    two, four = (pipe("a fox", guidance_scale=scale, **options) for scale in (2.0, 4.0))  # type: ignore[arg-type]
    assert np.abs(two.images - four.images).max() > 1e-3
    assert (pipe("a fox", **options).images == four.images).all()  # type: ignore[arg-type]
    assert (check(pipe.config, "x", guidance_scale=4.0).passes, four.recipes[0]["guidance"]) == (1, 4.0)
    with pytest.raises(RequestError, match="negative_prompt has no use"):
        check(pipe.config, "x", negative_prompt="y")
    with pytest.raises(RequestError, match="needs two passes"):
        check(pipe.config, "x", batch_guidance=True)


def test_padding_sees_nothing(dev: Path) -> None:
    """What padding becomes depends on no prompt, and not on how much of it there is."""
    encoder = load_part("text_encoder", open_model(dev), mx.float32)
    ids = mx.array([[6, 6, 6, 1, 40, 41], [6, 1, 50, 51, 52, 53]])
    states = np.array(encoder(ids, ids != 6))
    padding = states[0, 0]
    assert np.allclose(states[0, :3], padding, atol=1e-6)
    assert np.allclose(states[1, 0], padding, atol=1e-6)
    alone = np.array(encoder(ids[:1, 3:], mx.ones((1, 3), mx.bool_)))
    assert np.allclose(states[0, 3:], alone[0], atol=1e-4)  # positions count from the padding, and only relatively


def test_template_and_padding() -> None:
    tokens = Tokenizer(tokenizer(), 512, layout=MISTRAL)(["fox", "a [IMG]fox", "x" * 900], 200)
    ids, mask = np.array(tokens.input_ids), np.array(tokens.attention_mask)
    words = dict(enumerate(SPECIAL))
    shown = "".join(words.get(i, "") for i in ids[0])
    assert shown.lstrip("<pad>") == "s>[SYSTEM_PROMPT][/SYSTEM_PROMPT][INST][/INST]"
    assert mask[0].tolist() == sorted(mask[0].tolist())  # padding first
    assert mask[1].sum() == mask[0].sum() + 2  # "a " more; [IMG] is dropped
    assert (tokens.cut[:2], tokens.cut[2] > 0, bool(mask[2].all())) == ([0, 0], True, True)
    assert ids[2][0] == 1  # the end is cut
    assert SYSTEM_MESSAGE.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"normalizer": {"type": "NFC"}}, "its normalizer is 'NFC', not None"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{}, {}]}}, "not Tekken's split"),
        ({"added_tokens": []}, "<pad> is not a single token; dev needs Mistral-Small-3.2's tokenizer.json"),
    ],
)
def test_another_tokenizer(change: dict[str, object], told: str) -> None:
    assert told in refusal(lambda: Tokenizer({**tokenizer(), **change}, 512, layout=MISTRAL))


def one(rows: int, columns: int, path: str) -> dict[str, mx.array]:
    return {f"{path}.lora_A.weight": mx.ones((2, columns)), f"{path}.lora_B.weight": mx.ones((rows, 2))}


def test_loras(dev: Path, tmp_path: Path) -> None:
    """dev's load on dev, guidance and all; klein's are refused there, and dev's on klein, each by what it is."""
    config = open_model(dev).config
    both = one(64, 256, "diffusion_model.guidance_in.in_layer") | one(64, 64, "diffusion_model.guidance_in.out_layer")
    lora = read_lora(save(tmp_path / "a.safetensors", both), config)
    assert set(lora.changes["transformer"]) == {"guidance_in.linear_1", "guidance_in.linear_2"}
    size, true = ARCHITECTURES["FLUX.2 [dev]"].transformer.hidden_size, klein("dev")
    q = "transformer.transformer_blocks.0.attn.to_q"
    path = save(tmp_path / "b.safetensors", one(size, size, q))
    assert read_lora(path, true).changes["transformer"].keys() == {"double_blocks.0.img.to_q"}
    told = refusal(lambda: read_lora(path, klein("9b")))
    assert "is a LoRA for FLUX.2 [dev] (hidden size 6144); this model is klein 9b (hidden size 4096)" in told
    for name, hidden in (("4B", 3072), ("9B", 4096)):
        path = save(tmp_path / f"{name}.safetensors", one(hidden, hidden, q))
        told = refusal(lambda path=path: read_lora(path, true))
        assert f"LoRA for FLUX.2 [klein] {name} (hidden size {hidden}); this model is FLUX.2 [dev]" in told


def test_the_published_sizes() -> None:
    config = klein("dev")
    assert (config.variant.name, config.taps, config.transformer.joint_attention_dim) == ("dev", (10, 20, 30), 15360)
    assert config.variant.is_gated


def test_describe(dev: Path) -> None:
    found = describe(open_model(dev))
    assert (found["steps"], found["guidance"]) == (50, 4.0)
    assert format_description(found).startswith("FLUX.2 [dev], ")
