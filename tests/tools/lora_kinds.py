"""Adapters of other kinds than plain LoRA for the golden model: LoHa, LoKr, DoRA, full differences.

Each maker returns a file's tensors, in BFL's names with fused q, k, v or in diffusers', and the weights that the model
must then have: diffusers' path -> difference, by numpy alone.
"""

import re
from collections.abc import Callable

import mlx.core as mx
import numpy as np
from folders import GOLDEN, read_weights, weight_file
from lora_layouts import _QKV, Tensors, linear_shapes, make_twin, to_bfl

Made = tuple[Tensors, Tensors]
BFL_PREFIX = "diffusion_model."


def bfl_weights() -> Tensors:
    """The golden transformer's matrices in BFL's names, float32."""
    weights = {n: np.array(a.astype(mx.float32)) for n, a in read_weights(weight_file(GOLDEN, "transformer")).items()}
    from foreign import to_bfl as rename

    renamed = rename({name: mx.array(array) for name, array in weights.items()})
    return {n.removesuffix(".weight"): np.array(a) for n, a in renamed.items() if a.ndim == 2}


def to_diffusers(bfl: Tensors) -> Tensors:
    """Differences of BFL's matrices as differences of diffusers'."""
    back = {}
    names = {v: k for k, v in {path: _bfl_path(path) for path in linear_shapes()}.items() if v}
    for name, delta in bfl.items():
        fused = re.fullmatch(r"double_blocks\.(\d+)\.((?:img|txt)_attn\.qkv)", name)
        if fused:
            thirds = np.split(delta, 3)
            back |= {f"transformer_blocks.{fused[1]}.{p}": d for p, d in zip(_QKV[fused[2]], thirds, strict=True)}
        elif name == "final_layer.adaLN_modulation.1":
            shift, scale = np.split(delta, 2)
            back["norm_out.linear"] = np.concatenate([scale, shift])
        else:
            back[names[name]] = delta
    return back


def _bfl_path(path: str) -> str | None:
    from lora_layouts import bfl_name

    return None if re.search(r"attn\.(to_[qkv]|add_[qkv]_proj)$", path) else bfl_name(path)


def _random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)


def loha(tucker: bool = False) -> Made:
    rng, tensors, out = np.random.default_rng(1), {}, {}
    for name, weight in bfl_weights().items():
        (rows, columns), rank, alpha = weight.shape, 3, 2.0
        products = []
        for n in (1, 2):
            a, b = 2 * _random(rng, rows, rank), 3 * _random(rng, rank, columns)
            tensors[f"{BFL_PREFIX}{name}.hada_w{n}_b"] = b
            if tucker:
                core = _random(rng, rank, rank)
                tensors[f"{BFL_PREFIX}{name}.hada_t{n}"] = core[:, :, None, None]
                tensors[f"{BFL_PREFIX}{name}.hada_w{n}_a"] = a.T
                products.append(a @ core @ b)
            else:
                tensors[f"{BFL_PREFIX}{name}.hada_w{n}_a"] = a
                products.append(a @ b)
        tensors[f"{BFL_PREFIX}{name}.alpha"] = np.array(alpha, np.float32)
        out[name] = alpha / rank * products[0] * products[1]
    return tensors, to_diffusers(out)


def _factor(size: int, wanted: int) -> int:
    return max(f for f in range(1, wanted + 1) if size % f == 0)


def lokr(kind: str, out_factor: int = 8) -> Made:
    """kind: "full", "factored" (right), "both" (sides factored) or "tucker". Thirds of fused weights cut its blocks."""
    rng, tensors, out = np.random.default_rng(2), {}, {}
    for name, weight in bfl_weights().items():
        (rows, columns), rank, alpha = weight.shape, 2, 3.0
        a, b = _factor(rows, out_factor), _factor(columns, 4)
        left, scale = 2 * _random(rng, a, b), 1.0 if kind == "full" else alpha / rank
        if kind == "both":
            one, two = _random(rng, a, rank), 2 * _random(rng, rank, b)
            tensors |= {f"{name}.lokr_w1_a": one, f"{name}.lokr_w1_b": two}
            left = one @ two
        else:
            tensors[f"{name}.lokr_w1"] = left
        c, d = rows // a, columns // b
        one, two, core = _random(rng, c, rank), 3 * _random(rng, rank, d), _random(rng, rank, rank)
        if kind == "full":
            right = one @ two
            tensors[f"{name}.lokr_w2"] = right
        elif kind == "tucker":
            right = one @ core @ two
            tensors |= {f"{name}.lokr_w2_a": one.T, f"{name}.lokr_w2_b": two}
            tensors[f"{name}.lokr_t2"] = core[:, :, None, None]
        else:
            right = one @ two
            tensors |= {f"{name}.lokr_w2_a": one, f"{name}.lokr_w2_b": two}
        # LyCORIS writes this number where alpha is not used.
        tensors[f"{name}.alpha"] = np.array(9999999999 if kind == "full" else alpha, np.float32)
        out[name] = scale * np.kron(left, right)
    return {BFL_PREFIX + name: array for name, array in tensors.items()}, to_diffusers(out)


def lokr_in_diffusers_names() -> Made:
    """As SimpleTuner writes them: underscores, one by one, the last layer's halves in diffusers' order."""
    rng, tensors, out = np.random.default_rng(3), {}, {}
    for path, (rows, columns) in linear_shapes().items():
        left, right = 2 * _random(rng, 4, 2), 2 * _random(rng, rows // 4, columns // 2)
        name = "lycoris_" + path.replace(".", "_")
        tensors |= {f"{name}.lokr_w1": left, f"{name}.lokr_w2": right, f"{name}.alpha": np.array(1e10, np.float32)}
        out[path] = np.kron(left, right)
    return tensors, out


def dora(spelling: str, axis: int) -> Made:
    """spelling: "lora_magnitude_vector" (PEFT's names) or "dora_scale" (BFL's, fused). axis: along which norms are
    taken: 1 for a magnitude per row, 0 for one per column."""
    rng = np.random.default_rng(4)
    twin, prefix = make_twin(seed=7), "transformer."
    weights = {p: np.array(a.astype(mx.float32)) for p, a in read_weights(weight_file(GOLDEN, "transformer")).items()}
    weights = {path.removesuffix(".weight"): array for path, array in weights.items()}
    if spelling == "dora_scale":
        twin, weights, prefix = to_bfl(twin), bfl_weights(), BFL_PREFIX
    tensors, out = {}, {}
    for name, factors in twin.items():
        changed = weights[name] + factors.delta
        norms = np.linalg.norm(changed, axis=axis, keepdims=True)
        magnitude = (norms * rng.uniform(0.5, 1.5, norms.shape)).astype(np.float32)
        out[name] = changed * magnitude / norms - weights[name]
        tensors[f"{prefix}{name}.lora_A.weight"] = factors.down
        tensors[f"{prefix}{name}.lora_B.weight"] = factors.up
        tensors[f"{prefix}{name}.alpha"] = np.array(factors.alpha, np.float32)
        tensors[f"{prefix}{name}.{spelling}"] = magnitude[:, 0] if spelling != "dora_scale" else magnitude
    return tensors, to_diffusers(out) if spelling == "dora_scale" else out


def norms() -> Made:
    """Differences of q's and k's norms, in BFL's names, beside one of a matrix."""
    rng = np.random.default_rng(5)
    width = read_weights(weight_file(GOLDEN, "transformer"))["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    change = {path: rng.normal(0, 0.5, width).astype(np.float32) for path in ("q", "k", "added")}
    tensors = {
        "double_blocks.0.img_attn.norm.query_norm.scale.diff": change["q"],
        "double_blocks.0.txt_attn.norm.key_norm.diff": change["added"],
        "single_blocks.1.norm.key_norm.w_norm": change["k"],
    }
    out = {
        "transformer_blocks.0.attn.norm_q": change["q"],
        "transformer_blocks.0.attn.norm_added_k": change["added"],
        "single_transformer_blocks.1.attn.norm_k": change["k"],
    }
    return {BFL_PREFIX + name: array for name, array in tensors.items()}, out


KINDS: dict[str, Callable[[], Made]] = {
    "loha": loha,
    "loha tucker": lambda: loha(tucker=True),
    "lokr": lambda: lokr("full"),
    "lokr factored": lambda: lokr("factored"),
    "lokr both factored": lambda: lokr("both"),
    "lokr tucker": lambda: lokr("tucker"),
    "lokr diffusers": lokr_in_diffusers_names,
    "dora peft": lambda: dora("lora_magnitude_vector", 1),
    "dora_scale rows": lambda: dora("dora_scale", 1),
    "dora_scale columns": lambda: dora("dora_scale", 0),
    "norms": norms,
}
