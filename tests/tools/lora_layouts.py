"""Random LoRAs for the golden model, and every layout in which they are found, made without the converter's tables.

A `Twin` maps diffusers' module paths to factors; each writer of LAYOUTS says them in somebody's names.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from folders import GOLDEN, read_weights, weight_file
from foreign import BFL

Tensors = dict[str, np.ndarray]
Metadata = dict[str, str]


class Factors(NamedTuple):
    """alpha / rank * up @ down."""

    up: np.ndarray
    down: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def delta(self) -> np.ndarray:
        return self.alpha / self.rank * self.up @ self.down


Twin = dict[str, Factors]

_TOP = {**BFL, "norm_out.linear": "final_layer.adaLN_modulation.1"}
_IN_DOUBLE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_IN_SINGLE = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
_QKV = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def linear_shapes(part: str = "transformer") -> dict[str, tuple[int, ...]]:
    """diffusers' (or transformers') path of every linear layer -> its weight's shape."""
    weights = read_weights(weight_file(GOLDEN, part))
    found = {n.removesuffix(".weight"): a.shape for n, a in weights.items() if a.ndim == 2 and n.endswith(".weight")}
    return {name: shape for name, shape in found.items() if "embed_tokens" not in name and "lm_head" not in name}


def make_twin(seed: int = 0, rank: int = 3, alpha: float = 4.5, share_qkv: bool = True) -> Twin:
    """Factors for every linear layer of the golden transformer, as large as its weights; q, k and v share `down`,
    as they do in a fused layer's LoRA, or each has its own (`share_qkv=False`)."""
    rng = np.random.default_rng(seed)
    twin: Twin = {}
    shared: dict[str, np.ndarray] = {}
    for path, (rows, columns) in sorted(linear_shapes().items()):
        down = rng.normal(0, columns**-0.5, (rank, columns)).astype(np.float32)
        fused = next((f"{path.split('attn.')[0]}{name}" for name, own in _QKV.items() if path.endswith(own)), None)
        if fused and share_qkv and path.startswith("transformer_blocks"):
            down = shared.setdefault(fused, down)
        twin[path] = Factors(rng.normal(0, 0.5, (rows, rank)).astype(np.float32), down, alpha)
    return twin


def merged_folder(folder: Path, deltas: Tensors, part: str = "transformer") -> Path:
    """The golden model with `deltas` (diffusers' path -> difference) added to its weights, in float32."""
    import shutil

    shutil.copytree(GOLDEN, folder)
    path = weight_file(folder, part)
    weights = {name: array.astype(mx.float32) for name, array in read_weights(path).items()}
    for name, delta in deltas.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + mx.array(delta.astype(np.float32))
    path.unlink()
    mx.save_safetensors(str(path), weights, {"format": "pt"})
    return folder


def deltas(twin: Twin) -> Tensors:
    return {path: factors.delta for path, factors in twin.items()}


def bfl_name(path: str) -> str:
    """BFL's name of diffusers' module; that of a q, k or v stays for `fuse`."""
    if path in _TOP:
        return _TOP[path]
    kind, number, rest = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", path).groups()  # type: ignore[union-attr]
    names = _IN_SINGLE if kind else _IN_DOUBLE
    return f"{kind or 'double_'}blocks.{number}.{names[rest]}"


def to_bfl(twin: Twin, sparse: bool = False) -> Twin:
    """The same in BFL's names and matrices: q, k and v fused, the final shift before the scale.

    sparse: as musubi trains them apart, three ranks in one, each with rows of its own.
    """
    out: Twin = {}
    for path, factors in twin.items():
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", path)
        fused = next((name for name, own in _QKV.items() if block and block[2] in own), None)
        if path == "norm_out.linear":
            scale, shift = np.split(factors.up, 2)
            out[bfl_name(path)] = factors._replace(up=np.concatenate([shift, scale]))
        elif fused is None:
            out[bfl_name(path)] = factors
        elif block and block[2] == _QKV[fused][0]:
            own = [twin[f"transformer_blocks.{block[1]}.{name}"] for name in _QKV[fused]]
            out[f"double_blocks.{block[1]}.{fused}"] = _fuse(own, sparse)
    return out


def _fuse(own: list[Factors], sparse: bool) -> Factors:
    if not sparse:
        assert all((f.down == own[0].down).all() for f in own)
        return own[0]._replace(up=np.concatenate([f.up for f in own]))
    rank, rows = own[0].rank, own[0].up.shape[0]
    up = np.zeros((3 * rows, 3 * rank), np.float32)
    for i, factors in enumerate(own):
        up[i * rows : (i + 1) * rows, i * rank : (i + 1) * rank] = factors.up
    return Factors(up, np.concatenate([f.down for f in own]), 3 * own[0].alpha)


def written(twin: Twin, prefix: str, down: str, up: str, alpha: bool, joint: str = ".") -> Tensors:
    """The tensors; without alpha keys the strength goes into `up`."""
    tensors: Tensors = {}
    for path, factors in twin.items():
        name = prefix + path.replace(".", joint)
        tensors[f"{name}.{down}"] = factors.down
        tensors[f"{name}.{up}"] = factors.up if alpha else factors.up * np.float32(factors.alpha / factors.rank)
        if alpha:
            tensors[f"{name}.alpha"] = np.array(factors.alpha, np.float32)
    return tensors


AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")


def _peft(twin: Twin) -> tuple[Tensors, Metadata]:
    return written(twin, "transformer.", *AB, alpha=False), {}


def _adapter_metadata(twin: Twin, by_root: bool) -> tuple[Tensors, Metadata]:
    """diffusers' own: one alpha for all, a pattern for those that differ (here every second)."""
    first = next(iter(twin.values()))
    root = first.rank**0.5 if by_root else first.rank
    config: dict[str, Any] = {
        "r": first.rank,
        "lora_alpha": first.alpha / first.rank * root,
        "use_rslora": by_root,
        "target_modules": list(twin),
    }
    config["alpha_pattern"] = {path: 2 * config["lora_alpha"] for path in list(twin)[::2]}
    values = {f"transformer.{key}": value for key, value in config.items()}
    tensors: Tensors = {}
    for index, (path, factors) in enumerate(twin.items()):
        tensors[f"transformer.{path}.lora_A.weight"] = factors.down
        tensors[f"transformer.{path}.lora_B.weight"] = factors.up / np.float32(1 if index % 2 else 2)
    return tensors, {"lora_adapter_metadata": json.dumps(values)}


def _mflux(twin: Twin) -> tuple[Tensors, Metadata]:
    names = {p: p.replace(".timestep_embedder.", ".").removesuffix(".0") for p in twin}
    return written({names[p]: f for p, f in twin.items()}, "transformer.", *AB, alpha=False), {"mflux_version": "0.16"}


def _full(twin: Twin) -> tuple[Tensors, Metadata]:
    return {f"diffusion_model.{p}.diff": f.delta.astype(np.float32) for p, f in to_bfl(twin).items()}, {}


LAYOUTS: dict[str, Callable[[Twin], tuple[Tensors, Metadata]]] = {
    "peft": _peft,
    "adapter metadata": lambda t: _adapter_metadata(t, by_root=False),
    "rslora": lambda t: _adapter_metadata(t, by_root=True),
    "diffsynth": lambda t: (written(t, "", "lora_A.default.weight", "lora_B.default.weight", alpha=False), {}),
    "ai-toolkit": lambda t: (written(to_bfl(t), "diffusion_model.", *AB, alpha=False), {}),
    "comfyui": lambda t: (written(to_bfl(t), "diffusion_model.", *DOWN_UP, alpha=False), {}),
    "comfyui alpha": lambda t: (written(to_bfl(t), "diffusion_model.", *DOWN_UP, alpha=True), {}),
    "kohya": lambda t: (written(to_bfl(t), "lora_unet_", *DOWN_UP, alpha=True, joint="_"), {}),
    "musubi sparse": lambda t: (written(to_bfl(t, True), "lora_unet_", *DOWN_UP, alpha=True, joint="_"), {}),
    "peft dump": lambda t: (written(to_bfl(t), "base_model.model.", *AB, alpha=False), {}),
    "bare bfl": lambda t: (written(to_bfl(t), "", *AB, alpha=False), {}),
    "mflux": _mflux,
    "onetrainer": lambda t: (written(t, "lora_transformer_", *DOWN_UP, alpha=True, joint="_"), {}),
    "old diffusers": lambda t: (written(t, "transformer.", "lora.down.weight", "lora.up.weight", alpha=False), {}),
    "full difference": _full,
}
# Whose q, k and v each have a `down` of their own.
APART = ("peft", "adapter metadata", "rslora", "diffsynth", "musubi sparse", "mflux", "onetrainer")


def save(path: Path, tensors: Tensors, metadata: Metadata | None = None) -> Path:
    """Write a safetensors file."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, str(path), metadata)
    return path
