"""A random model in our own format: 180 million parameters with heads of klein's size, large enough to measure memory;
or the true 4B."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

import klein_mlx
from klein_mlx.config import PARTS, ModelConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from klein_mlx.formats.lora import shapes_of
from klein_mlx.weights.checkpoint import build

TINY = Path(klein_mlx.__file__).parent / "tiny"
VOCABULARY = json.loads((TINY / "klein.json").read_text())["text_encoder"]["vocab_size"]
CONFIG = ModelConfig(
    TransformerConfig(128, 2, 4, 128, 8, 1536, 3.0, (32, 32, 32, 32)),
    TextEncoderConfig(VOCABULARY, 512, 1536, 8, 8, 4, 128),
    VAEConfig((64, 128, 128, 128), 2, 32),
    True,
    (2, 4, 6),
)


KLEIN_4B = ModelConfig(
    TransformerConfig(128, 5, 20, 128, 24, 7680, 3.0, (32, 32, 32, 32)),
    TextEncoderConfig(151936, 2560, 9728, 36, 32, 8, 128),
    VAEConfig((128, 256, 512, 512), 2, 32),
    False,
    (9, 18, 27),
)


def make(folder: Path, config: ModelConfig = CONFIG, size: int = 256, length: int = 192) -> Path:
    """Write the checkpoint, bfloat16, the same each time. size: of its pictures, by default. length: of a text."""
    folder.mkdir()
    numbers = np.random.default_rng(0).standard_normal(1 << 20, np.float32)  # repeated: a new one each takes long
    for part in PARTS:
        weights = {}
        for name, array in tree_flatten(build(part, config).parameters()):
            shape = array.shape  # type: ignore[union-attr]
            kind = name.rpartition(".")[2]
            ones = kind == "latent_var" or ("norm" in name and kind == "weight")
            values = np.full(shape, float(ones), np.float32)
            if len(shape) > 1:
                values = np.resize(numbers, shape) / np.sqrt(np.prod(shape[1:]))
            weights[name] = mx.array(values).astype(mx.float32 if "latent" in name else mx.bfloat16)
        mx.save_safetensors(str(folder / f"{part}.safetensors"), weights)
    values = {
        "format_version": 1,
        "variant": "medium",
        "is_distilled": config.is_distilled,
        "taps": config.taps,
        "max_sequence_length": length,
        "default_size": size,
        "quantization": {},
        **{part: getattr(config, part).to_dict() for part in PARTS},
    }
    (folder / "klein.json").write_text(json.dumps(values))
    shutil.copy(TINY / "tokenizer.json", folder)
    return folder


def adapter(path: Path, kind: str, part: str, config: ModelConfig = CONFIG) -> Path:
    """Write a LoRA of rank 16, a DoRA, or whole differences, for every matrix of a model's part."""
    tensors = {}
    for name, shape in shapes_of(config, part).items():
        if len(shape) != 2 or name == "embed_tokens":
            continue
        module = name if part == "transformer" else f"text_encoder.model.{name}"
        if kind == "difference":
            tensors[f"{module}.diff"] = mx.full(shape, 1e-3, mx.bfloat16)
            continue
        tensors[f"{module}.lora_A.weight"] = mx.full((16, shape[1]), 1e-2, mx.bfloat16)
        tensors[f"{module}.lora_B.weight"] = mx.full((shape[0], 16), 1e-2, mx.bfloat16)
        if kind == "DoRA":
            tensors[f"{module}.dora_scale"] = mx.ones((shape[0], 1), mx.bfloat16)
    mx.save_safetensors(str(path), tensors)
    return path
