"""Make klein_mlx/bench/reference.safetensors again: `python tests/golden/make_reference.py` (needs torch).

What diffusers makes of the embedded model `tiny`, exported to its layout, in float32 on the CPU; `klein-mlx doctor`
compares every Mac with it. Once with tiny's own weights, once ("4-bit") with its 4-bit weights, dequantized to float32.
Inputs that random numbers made stand in the file too.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tools"), str(HERE.parent)]

import parity_reference as oracle  # noqa: E402
from golden import cases  # noqa: E402

from klein_convert.checkpoint import convert_checkpoint  # noqa: E402
from klein_convert.export import export_diffusers  # noqa: E402
from klein_mlx.bench import reference  # noqa: E402
from klein_mlx.formats.names import diffusers_name, to_theirs  # noqa: E402
from klein_mlx.formats.open import open_model  # noqa: E402

TAPS = (1, 2, 3)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_diffusers(open_model("tiny"), folder / "whole")
        pipe = oracle.load(folder / "whole")
        inputs = _inputs(pipe)
        tensors = inputs | {f"whole.{key}": value for key, value in _outputs(pipe, inputs).items()}
        convert_checkpoint("tiny", folder / "quantized", quantize=4)
        _dequantize(pipe, folder / "quantized")
        tensors |= {f"4-bit.{key}": value for key, value in _outputs(pipe, inputs).items()}
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, reference.FILE)
    print(f"{reference.FILE.stat().st_size:,} bytes, {len(tensors)} tensors")


def _inputs(pipe: Any) -> dict[str, np.ndarray]:
    channels = pipe.transformer.config.in_channels
    h, w = reference.GRID
    return {
        "noise": cases.normal((1, channels, h, w), seed=11),  # of 40 seeds the one whose pictures rounding moves least
        "picture.0": cases.picture(64, 80, seed=2),
        "picture.1": cases.picture(80, 64, seed=3),
    }


@torch.no_grad()
def _outputs(pipe: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By the names of `reference.STAGES`; latents and pixels with their channels last."""
    seen: dict[str, torch.Tensor] = {}
    hook = pipe.text_encoder.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    length = reference.LENGTH
    embeds, txt_ids = pipe.encode_prompt(
        list(reference.PROMPTS), max_sequence_length=length, text_encoder_out_layers=TAPS
    )
    hook.remove()
    noise = torch.from_numpy(inputs["noise"])
    velocity = pipe.transformer(
        hidden_states=pipe._pack_latents(noise),
        encoder_hidden_states=embeds[:1],
        timestep=torch.tensor([np.float32(reference.SIGMA)]),
        img_ids=pipe._prepare_latent_ids(noise),
        txt_ids=txt_ids[:1],
        return_dict=False,
    )[0]
    pictures = [Image.fromarray(inputs[f"picture.{i}"]) for i in range(2)]
    pixels = torch.from_numpy(inputs["picture.0"])[None].permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = _run(pipe, noise)
    grid = latents.reshape(1, *reference.GRID, -1).permute(0, 3, 1, 2)
    std = torch.sqrt(pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).view(1, -1, 1, 1)
    z = pipe._unpatchify_latents(grid * std + pipe.vae.bn.running_mean.view(1, -1, 1, 1))
    decoded = pipe.vae.decode(z, return_dict=False)[0]
    arrays = {
        "embeddings": embeds,
        "velocity": velocity,
        "latents": latents,
        "encoded latents": pipe._encode_vae_image(pixels, generator=None).permute(0, 2, 3, 1),
        "pixels": decoded.permute(0, 2, 3, 1),
        "edit": _run(pipe, noise, image=pictures),
        "guidance": _run(pipe, noise, is_distilled=False, guidance_scale=reference.GUIDANCE),
    }
    ids = {"ids": seen["input_ids"].numpy().astype(np.int32)}
    return ids | {key: value.float().numpy() for key, value in arrays.items()}


def _run(pipe: Any, noise: torch.Tensor, is_distilled: bool = True, **options: Any) -> torch.Tensor:
    """The latents after the steps, (1, tokens, channels)."""
    steps: list[torch.Tensor] = []

    def keep(_pipe: Any, _step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        steps.append(kwargs["latents"])
        return kwargs

    pipe.register_to_config(is_distilled=is_distilled)
    h, w = reference.GRID
    pipe(
        prompt=reference.PROMPTS[0],
        height=16 * h,
        width=16 * w,
        num_inference_steps=reference.STEPS,
        latents=noise,
        max_sequence_length=reference.LENGTH,
        text_encoder_out_layers=TAPS,
        callback_on_step_end=keep,
        **options,
    )
    return steps[-1]


def _dequantize(pipe: Any, folder: Path) -> None:
    """Put the checkpoint's quantized weights, as float32, into the pipeline."""
    source = open_model(folder)
    for part, quantization in source.quantization.items():
        weights, theirs = dict(source.weights(part)), {}
        for name in [n for n in weights if n.endswith(".scales")]:
            path = name.removesuffix(".scales")
            own = quantization.of(part, path)
            packed, scales, biases = (weights.get(f"{path}.{kind}") for kind in ("weight", "scales", "biases"))
            assert own is not None
            wide = [a.astype(mx.float32) for a in (scales, biases)]  # type: ignore[union-attr]
            weight = mx.dequantize(packed, *wide, own.group_size, own.bits, own.mode)  # type: ignore[arg-type]
            key, layout = diffusers_name(part, f"{path}.weight")
            theirs[key] = torch.from_numpy(np.array(to_theirs(layout, weight)))
        missed = getattr(pipe, part).load_state_dict(theirs, strict=False)
        assert theirs, part
        assert not missed.unexpected_keys, missed.unexpected_keys


if __name__ == "__main__":
    main()
