"""What people coming from diffusers, mflux or mlx-lm write, and what it is called here."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from klein_mlx.errors import nearest

INSTEAD = {
    "steps": "num_inference_steps",
    "num_steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "true_cfg_scale": "guidance_scale",
    "negative": "negative_prompt",
    "size": "width=1024, height=768",
    "resolution": "width=1024, height=768",
    "n": "num_images_per_prompt",
    "count": "num_images_per_prompt",
    "num_images": "num_images_per_prompt",
    "batch_size": "num_images_per_prompt",
    "seeds": "seed=[7, 8]",
    "images": "image",
    "image_path": "image",
    "reference": "image",
    "image_reference": "image, with init_image for the picture to repaint",
    "mask": "mask_image",
    "image_strength": "strength",
    "lora": "pipe.load_lora(path, scale)",
    "loras": "pipe.load_lora(path, scale)",
    "lora_paths": "pipe.load_lora(path, scale)",
    "lora_scales": "pipe.load_lora(path, scale)",
    "cross_attention_kwargs": "pipe.load_lora(path, scale)",
    "joint_attention_kwargs": "pipe.load_lora(path, scale)",
    "attention_kwargs": "pipe.load_lora(path, scale)",
    "output": "pipe(...).save(path)",
    "negative_prompt_embeds": "negative_prompt",
    "timesteps": "sigmas=[1, 0.75, 0.5, 0.25]",
    "scheduler": "sigmas=[...] in the call; the sampler is Euler's",
    "ip_adapter_image": "image",
    "save": "pipe(...).save(path)",
    "output_path": "pipe(...).save(path)",
    "verbose": "progress=True",
    "adapter_name": "name",
    "weight": "scale",
    "lora_scale": "scale",
    "weight_name": 'the file in path: "owner/name/FILE.safetensors"',
    "subfolder": "the folder itself as the model",
    "offload": 'keep="nothing"',
    "callback": "callback_on_step_end, or pipe.stream(...)",
    "torch_dtype": 'dtype="bfloat16"',
    "low_ram": 'keep="nothing"',
    "bits": "quantize=4",
    "quantization_config": "quantize=4",
    "cache_dir": "the environment variable HF_HOME",
}
LEFT_OUT = {
    "return_dict": "the result always has .images, .seeds and .recipes",
    "callback_on_step_end_tensor_inputs": "callback_on_step_end always gets the latents",
    "text_encoder_out_layers": "the checkpoint says which layers are used",
    "device_map": "MLX uses the GPU by itself",
    "device": "MLX uses the GPU by itself",
    "use_safetensors": "only safetensors and GGUF files are read",
    "safety_checker": "there is none",
    "clip_skip": "the checkpoint says which layers are used",
    "eta": "the sampler is Euler's",
    "caption_upsample_temperature": "prompts are rewritten by klein-mlx --enhance alone",
    "prompt_2": "there is one text encoder",
    "low_cpu_mem_usage": "weights are read only when they are needed",
    "trust_remote_code": "no code of a model is ever run",
}


OPENING = ("quantize", "dtype", "keep", "revision", "token", "local_files_only", "prompt_cache", "variant")
PLACES = {
    **dict.fromkeys((*OPENING, "transformer", "text_encoder", "vae"), "in KleinPipeline.from_pretrained"),
    **dict.fromkeys(("scale", "partial", "folder"), "in pipe.load_lora"),
    **dict.fromkeys(
        ("prompt", "seed", "num_inference_steps", "guidance_scale", "width", "height"), "in the call, pipe(...)"
    ),
}


def instead_of(name: str, known: Iterable[str]) -> str:
    """What to write in place of an unknown argument, as the end of a sentence; "" where nothing is near."""
    if name in PLACES:
        return f"; it belongs {PLACES[name]}"
    if name in INSTEAD:
        used = INSTEAD[name].partition("=")[0]
        return f"; use {INSTEAD[name]}{f' {PLACES[used]}' if used in PLACES and used not in known else ''}"
    if name in LEFT_OUT:
        return f"; leave it out: {LEFT_OUT[name]}"
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""


ATTRIBUTES = {
    "load_lora_weights": "load_lora(path, scale)",
    "load_lora_into_transformer": "load_lora(path, scale)",
    "unload_lora_weights": "unload_lora()",
    "delete_adapters": "unload_lora(name)",
    "set_adapters": "set_lora_scale(name, scale)",
    "get_active_adapters": "the attribute loras",
    "get_list_adapters": "the attribute loras",
    "save_lora_weights": "klein_mlx.train",
    "save_pretrained": "klein-mlx convert MODEL FOLDER",
    "push_to_hub": "klein-mlx convert MODEL FOLDER --upload owner/name",
    "from_single_file": "from_pretrained(model, transformer=file)",
    "from_pipe": "the same pipeline: it edits too, with image=... or init_image=...",
    "enable_lora": "set_lora_scale(name, scale)",
    "disable_lora": "set_lora_scale(name, 0)",
    "enable_adapters": "pipe.set_lora_scale(name, scale)",
    "disable_adapters": "pipe.set_lora_scale(name, 0)",
    "generate": "pipe(prompt)",
    "generate_image": "pipe(prompt)",
    "run": "pipe(prompt)",
    "image_processor": "PIL images, numpy arrays or paths as they are",
    "vae_scale_factor": "config.pixels_per_token: sides are multiples of it",
    "_interrupt": "pipe.stream(...), a loop that can be left",
    "_execution_device": "mlx.core.default_device()",
    "hf_device_map": "mlx.core.default_device()",
    "progress_bar": "pipe(..., progress=True)",
    "encode_prompt": "pipe(..., prompt_embeds=...) for embeddings of your own",
    "scheduler": "pipe(..., sigmas=[...]); the sampler is Euler's",
    "device": "mlx.core.default_device()",
    "components": "from_pretrained(model, transformer=..., text_encoder=..., vae=...)",
}
STRIPS = "the VAE decodes in strips by itself, exactly"
MEMORY = 'memory is planned by itself; keep="nothing" in from_pretrained needs the least'
NEEDLESS = {
    "to": "MLX uses the GPU by itself; dtype is an argument of from_pretrained",
    "cuda": "MLX uses the GPU by itself",
    "set_progress_bar_config": "a bar is shown with progress=True alone",
    "enable_lora_hotswap": "LoRAs can change between pictures",
    "enable_cache": "every step is computed",
    "set_attention_backend": "MLX has an attention kernel of its own",
    "fuse_lora": "a loaded LoRA costs a step next to nothing",
    "unfuse_lora": "unload_lora() restores the weights bit for bit",
    "maybe_free_model_hooks": MEMORY,
    "free_memory": MEMORY,
    "remove_all_hooks": MEMORY,
    "reset_device_map": "MLX uses the GPU by itself",
    "compile": "blocks are compiled by themselves",
    "compile_repeated_blocks": "blocks are compiled by themselves",
    "enable_vae_tiling": STRIPS,
    "enable_vae_slicing": STRIPS,
    "enable_tiling": STRIPS,
    "enable_slicing": STRIPS,
}
COMPONENTS = ("transformer", "text_encoder", "vae")
REPLACED = "components are loaded when needed, and replaced by from_pretrained(model, {}=...)"


class Component:
    """A part of the pipeline as scripts for diffusers name it: what needs nothing there needs nothing here."""

    def __init__(self, name: str):
        self.__dict__["_name"] = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of a copy whose own name is not set yet, too
            raise AttributeError(name)
        if _is_needless(name):
            return _nothing(self, f"pipe.{self._name}.{name}", name)
        hint = f"use {ATTRIBUTES[name]}" if name in ATTRIBUTES else REPLACED.format(self._name)
        raise AttributeError(f"pipe.{self._name} has no attribute {name!r}; {hint}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"pipe.{self._name}.{name} cannot be set; {REPLACED.format(self._name)}")


class Answering(type):
    """The type of a class whose unknown names say what to use instead: KleinPipeline.from_single_file."""

    def __getattr__(cls, name: str) -> Any:
        if name in ATTRIBUTES:
            raise AttributeError(f"{cls.__name__} has no attribute {name!r}; use {ATTRIBUTES[name]}")
        raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")


def _is_needless(name: str) -> bool:
    return name in NEEDLESS or (name.startswith(("enable_", "disable_")) and name not in ATTRIBUTES)


def _nothing(result: Any, called: str, name: str) -> Callable[..., Any]:
    """A method that does nothing, says why in a warning, and returns `result`."""

    def nothing(*args: Any, **kwargs: Any) -> Any:
        logging.getLogger("klein_mlx").warning("%s() does nothing: %s", called, NEEDLESS.get(name, MEMORY))
        return result

    return nothing


def answer(pipe: Any, name: str) -> Any:
    """A method of diffusers' pipelines: where nothing is needed one that says so, and returns the pipeline.

    Raises AttributeError, which says what to use instead, for any other name.
    """
    if name in COMPONENTS:
        return Component(name)
    if _is_needless(name):
        return _nothing(pipe, f"pipe.{name}", name)
    hint = f"; use {ATTRIBUTES[name]}" if name in ATTRIBUTES else ""
    near = "" if hint or name.startswith("_") else nearest(name, [n for n in dir(type(pipe)) if n[0] != "_"])
    raise AttributeError(
        f"{type(pipe).__name__} has no attribute {name!r}{hint or (f'; did you mean {near!r}?' if near else '')}"
    )
