"""What people coming from diffusers, mflux or mlx-lm write, and what it is called here."""

from collections.abc import Iterable

from klein_mlx.errors import nearest

SEEDS = "use seed=7, or seed=[7, 8]; generator=torch.Generator().manual_seed(7) gives diffusers' noise"
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
    "variant": "the files say what they are",
    "safety_checker": "there is none",
    "low_cpu_mem_usage": "weights are read only when they are needed",
    "trust_remote_code": "no code of a model is ever run",
}


def instead_of(name: str, known: Iterable[str]) -> str:
    """What to write in place of an unknown argument, as the end of a sentence; "" where nothing is near."""
    if name in INSTEAD:
        return f"; use {INSTEAD[name]}"
    if name in LEFT_OUT:
        return f"; leave it out: {LEFT_OUT[name]}"
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""
