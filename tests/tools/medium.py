"""A random model of 180 million parameters in our own format: heads of klein's size, large enough to measure memory."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

import klein_mlx
from klein_mlx.config import PARTS, ModelConfig, TextEncoderConfig, TransformerConfig, VAEConfig
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


def make(folder: Path) -> Path:
    """Write the checkpoint, bfloat16, the same each time."""
    folder.mkdir()
    numbers = np.random.default_rng(0).standard_normal(1 << 20, np.float32)  # repeated: a new one each takes long
    for part in PARTS:
        weights = {}
        for name, array in tree_flatten(build(part, CONFIG).parameters()):
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
        "is_distilled": True,
        "taps": CONFIG.taps,
        "max_sequence_length": 192,
        "default_size": 256,
        "quantization": {},
        **{part: getattr(CONFIG, part).to_dict() for part in PARTS},
    }
    (folder / "klein.json").write_text(json.dumps(values))
    shutil.copy(TINY / "tokenizer.json", folder)
    return folder
