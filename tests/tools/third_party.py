"""Models that mflux, mlx-gen, mlx-lm and comfy-kitchen write themselves: what each computes with them, and what we do.

Each program wants an environment of its own, outside CI, beside klein_mlx and what it needs. mflux and mlx-gen are both
called mflux there, and take turns: `python -m venv X; X/bin/pip install mflux; X/bin/python tests/tools/third_party.py
[WORD ...]` prints the rows of the programs that X has, those whose names have one of the words. A small model with
random weights is quantized and saved by the program's own code, ours opens what it finds, and results are compared
in float32. The exit code is 1 where one differs by over its bound, or a layer has other bits than the program gave it.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

for _folder in (".", "..", "../..", "../../convert", "../golden"):
    sys.path.append(str(Path(__file__).parent / _folder))

BOUND = 1e-4  # of the largest value: float32 sums in another order
_GRID = (4, 4)  # tokens of the picture
_TEXT = 6  # tokens of the prompt

Result = tuple[float, str]  # the largest difference, relative to the largest value; how it is stored, as we tell it


def difference(ours: Any, theirs: Any) -> float:
    ours, theirs = (np.asarray(a.astype(mx.float32) if isinstance(a, mx.array) else a) for a in (ours, theirs))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# ---- mflux and mlx-gen: whole models ----


def _odd_bits(path: str) -> int | None:
    """Of a mixed pack: the attention's outputs and every encoder's embedding wider, the first layers left whole."""
    if path in ("x_embedder", "context_embedder"):
        return None
    return 8 if path.endswith(("to_out", "embed_tokens", "v_proj")) else 4


def mflux_case(bits: int | None, mixed: bool = False) -> Callable[[Path], Result]:
    def run(folder: Path) -> Result:
        from mflux.models.common.config.model_config import ModelConfig  # type: ignore[import-not-found]
        from mflux.models.common.weights.saving.model_saver import ModelSaver  # type: ignore[import-not-found]
        from mflux.models.flux2.model.flux2_text_encoder.qwen3_text_encoder import (  # type: ignore[import-not-found]
            Qwen3TextEncoder,
        )
        from mflux.models.flux2.model.flux2_transformer.transformer import (  # type: ignore[import-not-found]
            Flux2Transformer,
        )
        from mflux.models.flux2.model.flux2_vae.vae import Flux2VAE  # type: ignore[import-not-found]
        from mflux.models.flux2.weights.flux2_weight_definition import (  # type: ignore[import-not-found]
            Flux2KleinWeightDefinition,
        )

        ModelConfig.precision = mx.float32
        mx.random.seed(1)
        sizes = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 192}
        encoder = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 28, "intermediate_size": 128}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
        model = SimpleNamespace(
            transformer=Flux2Transformer(**sizes), text_encoder=Qwen3TextEncoder(**encoder, **heads), vae=Flux2VAE()
        )
        model.vae.bn.running_mean, model.vae.bn.running_var = (
            mx.random.normal((128,)),
            1 + mx.random.uniform(shape=(128,)),
        )
        for part in (model.transformer, model.text_encoder, model.vae):
            part.update(tree_map(lambda array: array.astype(mx.bfloat16), part.parameters()))
            if bits:
                usual = Flux2KleinWeightDefinition.quantization_predicate
                nn.quantize(part, bits=bits, class_predicate=_mixed(usual) if mixed else usual)
        ModelSaver.save_model(model, bits, str(folder), Flux2KleinWeightDefinition)
        for part in (model.transformer, model.text_encoder, model.vae):
            part.update(tree_map(_widened, part.parameters()))
        return _compare_model(folder, model)

    return run


def _widened(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if array.dtype == mx.bfloat16 else array


def _mixed(usual: Callable[[str, Any], bool]) -> Callable[[str, Any], Any]:
    def choose(path: str, module: Any) -> Any:
        own = _odd_bits(path)
        return usual(path, module) and own is not None and {"bits": own, "group_size": 64}

    return choose


def _compare_model(folder: Path, model: Any) -> Result:
    """Velocity, embeddings and pixels of mflux's modules, against ours of the folder that they were saved to."""
    from folders import GOLDEN
    from port import Port, position_ids, rope_of

    from klein_mlx.model import sampler as grids

    (folder / "tokenizer").mkdir(exist_ok=True)
    shutil.copy(GOLDEN / "tokenizer" / "tokenizer.json", folder / "tokenizer")
    port = Port(folder)
    tokens, embeds = mx.random.normal((1, _GRID[0] * _GRID[1], 128)), mx.random.normal((1, _TEXT, 192))
    txt_ids, img_ids = grids.text_ids(_TEXT), position_ids(_GRID)
    right = model.transformer(tokens, embeds, mx.array(0.75), img_ids, txt_ids)
    ours = port.part("transformer")
    rope = rope_of(port, np.array(txt_ids), np.array(img_ids))
    velocity = ours(tokens, ours.embed_text(embeds), ours.modulations(0.75, mx.float32), rope, tokens.shape[1])
    ids, mask = mx.array([[3, 7, 11, 2, 9, 9]]), mx.array([[1, 1, 1, 1, 0, 0]])
    right_embeds = model.text_encoder.get_prompt_embeds(ids, mask)[:, :4]
    found = port.part("text_encoder")(ids, mask == 1)[:, :4]
    z = mx.random.normal((1, 4, 4, 32))
    model.vae.decode_mode = getattr(model.vae, "DECODE_LEGACY", None)
    pixels = model.vae.decode(z.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    scaled = z / model.vae.scaling_factor + model.vae.shift_factor
    pairs = ((velocity, right), (found, right_embeds), (port.part("vae").decode(scaled), pixels))
    stored = port.source.quantization
    for part, quantization in stored.items():
        _check_bits(part, quantization, getattr(model, part))
    told = stored["transformer"].told() if stored else "whole"
    return max(difference(ours, theirs) for ours, theirs in pairs), told


def _check_bits(part: str, quantization: Any, theirs: nn.Module) -> None:
    """RuntimeError unless as many layers have each width as the program has given it."""
    widths = sorted(
        m.bits for _, m in theirs.named_modules() if isinstance(m, nn.QuantizedLinear | nn.QuantizedEmbedding)
    )
    ours = sorted(layer.bits for layer in quantization.layers.values())
    unread = 0 if part != "text_encoder" else len(widths) - len(ours)  # layers above the last tap
    if len(widths) - unread != len(ours) or not set(ours) <= set(widths):
        raise RuntimeError(f"{part}: {ours} for {widths}")


# ---- mlx-lm: encoders ----


def mlx_lm_case(
    bits: int, group_size: int, mode: str = "affine", recipe: str | None = None
) -> Callable[[Path], Result]:
    def run(folder: Path) -> Result:
        from folders import quantizable_model, read_weights, weight_file
        from mlx_lm import utils
        from mlx_lm.convert import mixed_quant_predicate_builder
        from mlx_lm.models.base import create_attention_mask
        from mlx_lm.models.qwen3 import Model, ModelArgs

        from klein_mlx.formats.open import open_model
        from klein_mlx.weights.checkpoint import load_part

        base = quantizable_model(folder / "base")
        values = json.loads((base / "text_encoder" / "config.json").read_text())
        values |= {"rope_theta": 1e6, "tie_word_embeddings": True}
        qwen = Model(ModelArgs.from_dict(values))
        qwen.load_weights(list(qwen.sanitize(read_weights(weight_file(base, "text_encoder"))).items()))
        predicate = mixed_quant_predicate_builder(recipe, qwen, group_size) if recipe else None
        qwen, values = utils.quantize_model(qwen, values, group_size, bits, mode=mode, quant_predicate=predicate)
        saved = folder / "saved"
        saved.mkdir()
        utils.save_model(saved, qwen)
        utils.save_config(values, saved / "config.json")
        source = open_model(base, parts={"text_encoder": saved})
        ids = mx.array([[3, 7, 11, 2]])
        found = load_part("text_encoder", source, mx.float32)(ids, mx.ones(ids.shape, mx.bool_))
        qwen.update(tree_map(_widened, qwen.parameters()))
        decoder: Any = qwen.model
        hidden, states = decoder.embed_tokens(ids), []
        mask = create_attention_mask(hidden, None)
        for layer in decoder.layers:
            hidden = layer(hidden, mask)
            states.append(hidden)
        right = mx.concatenate([states[tap - 1] for tap in source.config.taps], axis=-1)
        return difference(found, right), source.quantization["text_encoder"].told()

    return run


# ---- comfy-kitchen: FP8 and NVFP4 transformers ----


def comfy_case(kind: str) -> Callable[[Path], Result]:
    def run(folder: Path) -> Result:
        import comfy_kitchen as kitchen  # type: ignore[import-not-found]
        import torch
        from folders import GOLDEN
        from foreign import golden, to_bfl
        from safetensors.torch import save_file

        from klein_mlx.formats.open import open_model

        stored, right, layers = {}, {}, {}
        for name, array in to_bfl(golden("transformer")).items():
            tensor = torch.from_numpy(np.array(array.astype(mx.float32))).to(torch.bfloat16)
            if not name.endswith(".weight") or "blocks" not in name:
                stored[name] = tensor
                continue
            layer = name.removesuffix(".weight")
            layers[layer] = {"format": "nvfp4" if kind == "nvfp4" else "float8_e4m3fn"}
            top = tensor.abs().max().float()
            if kind == "nvfp4":
                scale = top / (448 * 6)
                codes, blocks = kitchen.quantize_nvfp4(tensor, scale)
                stored |= {name: codes, f"{layer}.weight_scale": blocks, f"{layer}.weight_scale_2": scale}
                right[name] = kitchen.dequantize_nvfp4(codes, scale, blocks, torch.float32)[: tensor.shape[0]]
            else:
                scale = top / 448
                codes = kitchen.quantize_per_tensor_fp8(tensor, scale)
                stored |= {name: codes, f"{layer}.weight_scale": scale}
                right[name] = kitchen.dequantize_per_tensor_fp8(codes, scale, torch.float32)
        metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
        path = folder / "x.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path, metadata)
        source: Any = open_model(GOLDEN, parts={"transformer": path})
        arrays = source.parts["transformer"].tensors.arrays()
        names = {name.replace("_norm.scale", "_norm.weight"): name for name in right}
        worst = max(difference(arrays[ours].astype(mx.float32), right[theirs]) for ours, theirs in names.items())
        return worst, source.parts["transformer"].format

    return run


def cases() -> Iterator[tuple[str, float, Callable[[Path], Result]]]:
    """Name, bound, and what makes the files and compares, of the programs that are installed."""
    if find_spec("mflux"):
        name = "mlx-gen" if find_spec("mlxgen") else "mflux"
        yield f"{name}: whole", BOUND, mflux_case(None)
        for bits in (3, 4, 6, 8):
            yield f"{name}: {bits} bits", BOUND, mflux_case(bits)
        yield f"{name}: 4 and 8 bits, some layers whole", BOUND, mflux_case(4, mixed=True)
    if find_spec("mlx_lm"):
        for bits, group_size in ((2, 32), (3, 64), (4, 32), (4, 64), (6, 32), (8, 64)):
            yield f"mlx-lm: {bits} bits, groups of {group_size}", BOUND, mlx_lm_case(bits, group_size)
        for mode, (bits, group_size) in {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}.items():
            yield f"mlx-lm: {mode}", BOUND, mlx_lm_case(bits, group_size, mode)
        for recipe in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"):
            yield f"mlx-lm: {recipe}", BOUND, mlx_lm_case(4, 64, recipe=recipe)
    if find_spec("comfy_kitchen"):
        for kind in ("fp8", "nvfp4"):
            yield f"comfy-kitchen: {kind}", 2**-8, comfy_case(kind)  # one rounding to bfloat16


def main() -> int:
    from klein_mlx.formats.part import KLEIN

    failed, groups = 0, KLEIN["vae"]
    print(f"{'file':45} {'difference':>10}  read as")
    for name, bound, case in cases():
        if not any(word in name for word in sys.argv[1:] or [""]):
            continue
        KLEIN["vae"] = groups if "mflux" in name or "mlx-gen" in name else replace(groups, norm_num_groups=4)
        with tempfile.TemporaryDirectory() as folder, redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            worst, told = case(Path(folder))
        right = worst < bound
        print(f"{name:45} {worst:10.1e}  {told}{'' if right else '  WRONG'}", flush=True)
        failed += not right
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
