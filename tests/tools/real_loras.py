"""LoRAs as the trainers write them: recorded names, dtypes, shapes and metadata, filled with random numbers.

What each must do to the model is computed here by numpy from the names and factors alone.
"""

import gzip
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from lora_layouts import _IN_DOUBLE, _IN_SINGLE, _QKV, _TOP

RECORDS = Path(__file__).parents[1] / "real" / "loras"
_DTYPES = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}
_ROLE = re.compile(
    r"(.+?)[._](lora_(?:A|B|down|up)|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|alpha|diff|dora_scale|magnitude|"
    r"lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)
_PREFIX = re.compile(
    r"(base_model_model_|diffusion_model_|lora_unet_|lora_transformer_|lycoris_|transformer_(?!blocks))+"
)


def records(name: str) -> dict[str, dict[str, Any]]:
    """Title -> tensors, metadata and, of the trainers', dtype and special values."""
    return json.loads(gzip.decompress((RECORDS / f"{name}.json.gz").read_bytes()))


def write(path: Path, record: dict[str, Any], seed: int = 0, only: str = "") -> dict[str, mx.array]:
    """Write a record as a file of random numbers. only: a pattern that names must have. Returns its tensors."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, spec in record["tensors"].items():
        dtype, shape = (record["dtype"], spec) if "dtype" in record else spec
        if only and not re.search(only, name):
            continue
        special = next((value for end, value in record.get("values", {}).items() if name.endswith(end)), None)
        values = rng.normal(0, 0.1, shape) if special is None else np.full(shape, special)
        if special is None and name.endswith("alpha"):
            values = np.full(shape, 8.0)
        tensors[name] = mx.array(values.astype(np.float32)).astype(_DTYPES[dtype])
    mx.save_safetensors(str(path), tensors, record["metadata"] or {})
    return tensors


class Effect(NamedTuple):
    """What a LoRA adds to one of diffusers' modules: its difference times a vector, and DoRA's magnitude."""

    times: np.ndarray
    magnitude: np.ndarray | None


def vector(columns: int) -> np.ndarray:
    """The vector that differences are multiplied by."""
    return np.random.default_rng(columns).normal(0, 1, columns).astype(np.float32)


def effects(tensors: dict[str, mx.array], metadata: dict[str, str] | None) -> dict[str, Effect]:
    """diffusers' module -> what the file does to it. A fused or split module's rows are put where they belong."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        found = _ROLE.fullmatch(name)
        assert found, name
        groups.setdefault(found[1], {})[found[2]] = np.array(array.astype(mx.float32))
    out: dict[str, Effect] = {}
    for module, factors in groups.items():
        times, magnitude = _times(factors, metadata or {}), _magnitude(factors)
        for path, piece in _targets(module):
            if piece == "all":
                out[path] = Effect(times, magnitude)
            elif piece == "swap":
                out[path] = Effect(np.concatenate(np.split(times, 2)[::-1]), magnitude)
            elif piece.startswith("third"):
                third = int(piece[-1])
                by_rows = magnitude is not None and magnitude.shape[0] > 1
                own = np.split(magnitude, 3)[third] if magnitude is not None and by_rows else magnitude
                out[path] = Effect(np.split(times, 3)[third], own)
            else:  # rows of a fused matrix, put one after the other as the file names them
                before = out[path].times if path in out else times[:0]
                out[path] = Effect(np.concatenate([before, times]), None)
    return out


def _times(factors: dict[str, np.ndarray], metadata: dict[str, str]) -> np.ndarray:
    down, up = (factors.get(a, factors.get(b)) for a, b in (("lora_A", "lora_down"), ("lora_B", "lora_up")))
    alpha = float(factors["alpha"]) if "alpha" in factors else None
    if alpha is None and "lora_adapter_metadata" in metadata:
        alpha = json.loads(metadata["lora_adapter_metadata"])["transformer.lora_alpha"]
    elif alpha is None and "lora_alpha" in metadata:
        alpha = float(metadata["lora_alpha"])
    if down is not None and up is not None:
        return (1 if alpha is None else alpha / len(down)) * (up @ (down @ vector(down.shape[1])))
    if "hada_w1_a" in factors:
        a, b, c, d = (factors[f"hada_w{side}"] for side in ("1_a", "1_b", "2_a", "2_b"))
        assert alpha is not None
        x, total = vector(b.shape[1]), np.zeros(len(a), np.float32)
        for r in range(len(b)):
            for s in range(len(d)):
                total += a[:, r] * c[:, s] * float(b[r] * d[s] @ x)
        return alpha / len(b) * total
    if "lokr_w1" in factors:
        left, right, scale = factors["lokr_w1"], factors.get("lokr_w2"), 1.0
        if right is None:
            assert alpha is not None
            right, scale = factors["lokr_w2_a"] @ factors["lokr_w2_b"], alpha / len(factors["lokr_w2_b"])
        x = vector(left.shape[1] * right.shape[1]).reshape(left.shape[1], right.shape[1])
        return scale * (left @ x @ right.T).reshape(-1)
    return factors["diff"] @ vector(factors["diff"].shape[1])


def _magnitude(factors: dict[str, np.ndarray]) -> np.ndarray | None:
    found = next((factors[n] for n in ("dora_scale", "magnitude", "lora_magnitude_vector") if n in factors), None)
    return found if found is None or found.ndim == 2 else found[:, None]


def _targets(module: str) -> list[tuple[str, str]]:
    """(diffusers' module, which of its rows), by a module's name in anybody's words."""
    name = _PREFIX.sub("", module.replace(".", "_"), count=1)
    block = re.fullmatch(r"(double|single)_blocks_(\d+)_(.+)", name)
    if block:
        kind, index, rest = block.groups()
        if kind == "double":
            split = re.fullmatch(r"((?:img|txt)_attn)_qkv(?:_(\d))?", rest)
            head = f"transformer_blocks.{index}."
            if split:
                paths = [head + path for path in _QKV[f"{split[1]}.qkv"]]
                if split[2]:
                    return [(paths[int(split[2])], "all")]
                return [(path, f"third {i}") for i, path in enumerate(paths)]
            return [(head + next(d for d, b in _IN_DOUBLE.items() if b.replace(".", "_") == rest), "all")]
        head = f"single_transformer_blocks.{index}."
        if rest.startswith("linear1_"):
            return [(head + "attn.to_qkv_mlp_proj", "rows")]
        return [(head + next(d for d, b in _IN_SINGLE.items() if b == rest), "all")]
    if name == "final_layer_adaLN_modulation_1":
        return [("norm_out.linear", "swap")]
    top = next((d for d, b in _TOP.items() if b.replace(".", "_") == name), None)
    if top:
        return [(top, "all")]
    dotted = re.sub(r"transformer_blocks_(\d+)_", r"transformer_blocks.\1.", name)
    fused = re.fullmatch(r"(transformer_blocks\.\d+\.)attn_(added_)?qkv", dotted)
    if fused:
        names = _QKV["txt_attn.qkv" if fused[2] else "img_attn.qkv"]
        return [(fused[1] + path, f"third {i}") for i, path in enumerate(names)]
    dotted = re.sub(r"(ff|ff_context)_activation_proj$", r"\1_linear_in", dotted)
    dotted = re.sub(r"to_qkv_mlp$", "to_qkv_mlp_proj", dotted)
    generic = re.sub(r"blocks\.\d+\.", "blocks.#.", dotted).replace(".", "_")
    index = re.search(r"blocks\.(\d+)\.", dotted)
    for path in _PATHS:
        spellings = (path, path.replace(".timestep_embedder", ""), path.removesuffix(".0"))
        if generic in [spelling.replace(".", "_") for spelling in spellings]:
            return [(path.replace("#", index[1]) if index else path, "all")]
    raise AssertionError(f"{module}: no layout has this name")


_PATHS = (
    *_TOP,
    *(f"transformer_blocks.#.{path}" for path in (*_IN_DOUBLE, *_QKV["img_attn.qkv"], *_QKV["txt_attn.qkv"])),
    *(f"single_transformer_blocks.#.{path}" for path in _IN_SINGLE),
)
