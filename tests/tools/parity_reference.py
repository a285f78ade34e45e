"""The reference: diffusers' and transformers' own classes run on a folder, their tensors as numpy arrays.

Needs torch. Every function returns tensors by name in diffusers' layouts (pictures and latents are channels first);
`make_golden.py` writes them to files and the parity tests make them again.
"""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline, compute_empirical_mu
from golden import cases
from PIL import Image

Tensors = dict[str, np.ndarray]


def load(folder: Path, dtype: torch.dtype = torch.float32, is_distilled: bool = True) -> Any:
    """The pipeline in `folder`, ready and quiet."""
    pipe = Flux2KleinPipeline.from_pretrained(str(folder), dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    pipe.register_to_config(is_distilled=is_distilled)
    return pipe


def taps(pipe: Any) -> tuple[int, ...]:
    """The layers that the pipeline taps by itself; fractions for encoders too shallow for them, where it fails."""
    own = inspect.signature(pipe.encode_prompt).parameters["text_encoder_out_layers"].default
    layers = pipe.text_encoder.config.num_hidden_layers
    return own if layers > own[-1] else (layers // 4, layers // 2, 3 * layers // 4)


@torch.no_grad()
def text(pipe: Any) -> Tensors:
    """input_ids, attention_mask and prompt_embeds: every prompt at the short length, two of them at klein's 512."""
    out: Tensors = {}
    seen: dict[str, torch.Tensor] = {}
    hook = pipe.text_encoder.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    wanted: dict[str, tuple[tuple[str, ...], int]] = {"short": (cases.PROMPTS, cases.SHORT)}
    wanted["long"] = (tuple(cases.PROMPTS[i] for i in cases.LONG_PROMPTS), cases.LONG)
    for name, (prompts, length) in wanted.items():
        embeds, ids = pipe.encode_prompt(list(prompts), max_sequence_length=length, text_encoder_out_layers=taps(pipe))
        out[f"{name}.input_ids"] = _numpy(seen["input_ids"]).astype(np.int32)
        out[f"{name}.attention_mask"] = _numpy(seen["attention_mask"]).astype(np.int32)
        out[f"{name}.prompt_embeds"] = _numpy(embeds)
        out[f"{name}.txt_ids"] = _numpy(ids[0]).astype(np.int32)
    hook.remove()
    return out


@torch.no_grad()
def transformer(pipe: Any, embeds: np.ndarray) -> Tensors:
    """Inputs, every block's outputs and the velocity: two prompts without references, one with two references.

    embeds: (2, L, D), the text encoder's output for two prompts.
    """
    channels = pipe.transformer.config.in_channels
    h, w = cases.GRID
    noise = torch.from_numpy(cases.normal((2, channels, h, w), seed=11))
    img_ids = pipe._prepare_latent_ids(noise)
    tokens = pipe._pack_latents(noise)
    out = _run_transformer(pipe, "plain", tokens, img_ids, torch.from_numpy(embeds), 0.8123)
    refs = [
        torch.from_numpy(cases.normal((1, channels, *grid), seed=12 + i))
        for i, grid in enumerate(cases.REFERENCE_GRIDS)
    ]
    ref_tokens = torch.cat([pipe._pack_latents(r) for r in refs], dim=1)
    ref_ids = pipe._prepare_image_ids(refs)
    tokens = torch.cat([tokens[:1], ref_tokens], dim=1)
    ids = torch.cat([img_ids[:1], ref_ids], dim=1)
    return out | _run_transformer(pipe, "references", tokens, ids, torch.from_numpy(embeds[:1]), 0.3137)


def _run_transformer(
    pipe: Any,
    name: str,
    tokens: torch.Tensor,
    img_ids: torch.Tensor,
    embeds: torch.Tensor,
    sigma: float,
    guidance: float | None = None,
) -> Tensors:
    model = pipe.transformer
    tokens, embeds = tokens.to(model.dtype), embeds.to(model.dtype)
    txt_ids = pipe._prepare_text_ids(embeds)
    out = {"tokens": tokens, "prompt_embeds": embeds, "img_ids": img_ids[0].int(), "txt_ids": txt_ids[0].int()}
    blocks: dict[str, torch.Tensor] = {}
    hooks = [block.register_forward_hook(_keep_double(blocks, i)) for i, block in enumerate(model.transformer_blocks)]
    hooks += [b.register_forward_hook(_keep_single(blocks, i)) for i, b in enumerate(model.single_transformer_blocks)]
    sigma = float(np.float32(sigma))
    timestep = torch.full((len(tokens),), sigma * 1000).to(model.dtype)
    velocity = model(
        hidden_states=tokens,
        encoder_hidden_states=embeds,
        timestep=timestep / 1000,
        guidance=None if guidance is None else torch.full((len(tokens),), guidance),
        img_ids=img_ids,
        txt_ids=txt_ids,
        return_dict=False,
    )[0]
    for hook in hooks:
        hook.remove()
    out |= blocks | {"velocity": velocity, "sigma": torch.tensor([sigma])}
    return {f"{name}.{key}": _numpy(value) for key, value in out.items()}


def _keep_double(blocks: dict[str, torch.Tensor], i: int):
    def keep(module, args, output):
        blocks[f"double.{i}.txt"], blocks[f"double.{i}.img"] = output

    return keep


def _keep_single(blocks: dict[str, torch.Tensor], i: int):
    def keep(module, args, output):
        blocks[f"single.{i}"] = output

    return keep


@torch.no_grad()
def small_inputs(pipe: Any) -> Tensors:
    """The first block of each kind, and the last layer alone, on inputs of about 1e-3: there LayerNorm's eps shows."""
    model = pipe.transformer
    hidden = model.inner_dim
    ids = [pipe._prepare_text_ids(torch.zeros(1, 5, 1))[0], pipe._prepare_latent_ids(torch.zeros(1, 1, 2, 3))[0]]
    rope = model.pos_embed(torch.cat(ids))
    temb = model.time_guidance_embed(torch.tensor([500.0]), None)
    txt, img = (torch.from_numpy(cases.normal((1, n, hidden), seed=n)) * 1e-3 for n in (5, 6))
    mods = (model.double_stream_modulation_img(temb), model.double_stream_modulation_txt(temb))
    out = {"txt": txt, "img": img, "txt_ids": ids[0].int(), "img_ids": ids[1].int(), "sigma": torch.tensor([0.5])}
    out["double.txt"], out["double.img"] = model.transformer_blocks[0](img, txt, *mods, rope)
    single_mod = model.single_stream_modulation(temb)
    out["single"] = model.single_transformer_blocks[0](torch.cat([txt, img], dim=1), None, single_mod, rope)
    tokens = torch.from_numpy(cases.normal((1, 6, model.config.in_channels), seed=7)) * 0.02
    out["tokens"] = tokens
    out["final"] = model.proj_out(model.norm_out(model.x_embedder(tokens), temb))
    return {f"small.{key}": _numpy(value) for key, value in out.items()}


@torch.no_grad()
def modulations(pipe: Any) -> Tensors:
    """The three modulation vectors at several noise levels, in the pipeline's dtype: shows how sigma is rounded."""
    model = pipe.transformer
    sigmas = torch.tensor(cases.BFLOAT16_SIGMAS)
    timestep = (sigmas * 1000).to(model.dtype) / 1000
    temb = model.time_guidance_embed(timestep.to(model.dtype) * 1000, None)
    return {
        "sigmas": _numpy(sigmas),
        "img": _numpy(model.double_stream_modulation_img(temb)),
        "txt": _numpy(model.double_stream_modulation_txt(temb)),
        "single": _numpy(model.single_stream_modulation(temb)),
    }


@torch.no_grad()
def vae(pipe: Any) -> Tensors:
    """A picture encoded (latent mean; patchified and normalised), and latents denormalised and decoded."""
    pixels = np.stack([cases.picture(96, 160, seed) for seed in (21, 22)])
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(pipe.vae.dtype) / 127.5 - 1
    z = pipe.vae.encode(image).latent_dist.mode()
    normal = pipe._encode_vae_image(image, generator=None)
    latents = torch.from_numpy(cases.normal((1, 4 * z.shape[1], *cases.GRID), seed=23)).to(pipe.vae.dtype)
    mean, std = pipe.vae.bn.running_mean, torch.sqrt(pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps)
    denormal = pipe._unpatchify_latents(latents * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1))
    decoded = pipe.vae.decode(denormal, return_dict=False)[0]
    out = {"z": z, "normalised": normal, "latents": latents, "denormalised": denormal, "decoded": decoded}
    return {"pixels": pixels} | {key: _numpy(value) for key, value in out.items()} | {"decoded_8bit": _bytes(decoded)}


def run(pipe: Any, name: str) -> Tensors:
    """One of `cases.RUNS`: the noise, the sigmas, the latents after every step, and the picture in 8 bits."""
    case = cases.RUNS[name]
    noise = cases.noise(name, pipe.transformer.config.in_channels)
    steps: list[torch.Tensor] = []

    def keep(_pipe, _step, _timestep, kwargs):
        steps.append(kwargs["latents"])
        return kwargs

    images = [Image.fromarray(picture) for picture in cases.references(name)]
    result = pipe(
        image=images or None,
        prompt=[cases.PROMPTS[i] for i in case.prompts],
        height=case.height,
        width=case.width,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance,
        latents=torch.from_numpy(noise),
        max_sequence_length=case.length,
        text_encoder_out_layers=taps(pipe),
        callback_on_step_end=keep,
    )
    return {
        f"{name}.noise": noise,
        f"{name}.sigmas": _numpy(pipe.scheduler.sigmas),
        f"{name}.latents": _numpy(torch.stack(steps)),  # (steps, B, tokens, channels)
        f"{name}.images": np.stack([np.asarray(image) for image in result.images]),
    }


def runs(pipe: Any, names: tuple[str, ...] = tuple(cases.RUNS)) -> Tensors:
    """All of `names`; the guided one as the undistilled (base) model."""
    out: Tensors = {}
    for name in names:
        pipe.register_to_config(is_distilled=cases.RUNS[name].guidance == 1.0)
        out |= run(pipe, name)
    pipe.register_to_config(is_distilled=True)
    return out


def schedule(pipe: Any) -> Tensors:
    """mu over token counts and numbers of steps, and the sigmas of a few schedules."""
    out: Tensors = {}
    out["mu"] = np.array([[compute_empirical_mu(t, n) for n in cases.MU_STEPS] for t in cases.MU_TOKENS])
    for tokens, steps in cases.SCHEDULES:
        mu = compute_empirical_mu(tokens, steps)
        pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        out[f"sigmas.{tokens}.{steps}"] = _numpy(pipe.scheduler.sigmas)
    return out


def everything(folder: Path) -> dict[str, Tensors]:
    """All golden tensors of the model in `folder`, by file."""
    pipe = load(folder)
    embeds = text(pipe)
    return {
        "text": embeds,
        "transformer": transformer(pipe, embeds["short.prompt_embeds"][[0, 2]]) | small_inputs(pipe),
        "vae": vae(pipe),
        "runs": runs(pipe),
        "schedule": schedule(pipe),
        "bfloat16": modulations(load(folder, torch.bfloat16)),
    }


def _bytes(decoded: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, rounded as the pipeline's image processor does."""
    unit = (decoded.float() * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return (unit * 255).round().astype(np.uint8)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy() if tensor.is_floating_point() else tensor.numpy()
