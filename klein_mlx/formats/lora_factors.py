"""One foreign module's factors as changes of ours: checked, scaled by alpha, cut by rows.

Each kind of adapter (LoRA, LoHa, LoKr, full differences, DoRA over any of them) becomes one delta, a bias, a magnitude.

Source: PEFT (tuners/lora, loha, lokr) and LyCORIS for what the factors mean; both multiply by alpha / rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import mlx.core as mx

from klein_mlx.errors import CheckpointError
from klein_mlx.formats.lora_keys import PIECES, Target
from klein_mlx.formats.names import HALVES, THIRDS
from klein_mlx.weights.lora import Change, Delta, Full, Kronecker, LowRank, Rows, take_rows
from klein_mlx.weights.safetensors import FLOATS, Entry

LOW_RANK = ("up", "down")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_KINDS = {
    "LoRA": {*LOW_RANK, "mid"},
    "LoRA of an embedding": {"embedding_up", "embedding_down"},
    "LoHa": {*LOHA, "hada_t1", "hada_t2"},
    "LoKr": {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"},
    "full difference": {"diff"},
}
_FLOAT8 = "F8_E4M3"
_FACTOR_DTYPES = (*FLOATS, _FLOAT8)
_ALPHA_DTYPES = (*FLOATS, _FLOAT8, "I64", "I32", "I16", "I8", "U8")
_NO_FACTORS = ("alpha", "magnitude", "diff_b", "up_bias")
_MAX_STRENGTH = 1e4  # of alpha / rank; LyCORIS writes 1e10 where it means "not used"


@dataclass(frozen=True)
class Stated:
    """What the file's metadata says of a module's strength; a tensor `.alpha` goes before it.

    alpha, rank: None where nothing is stated. by_root: divided by the rank's root (rsLoRA).
    """

    alpha: float | None = None
    rank: int | None = None
    by_root: bool = False


@dataclass(frozen=True)
class Group:
    """The tensors of one foreign module, by their role. name: as in the file; where: the file, for messages."""

    where: str
    name: str
    entries: Mapping[str, Entry]
    arrays: Mapping[str, mx.array]

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {self.name[:100]}: {what}")


def check_group(group: Group) -> None:
    """Refuse what is malformed by its header: factors without their others, ranks that differ, strange dtypes."""
    has = set(group.entries)
    pairs = (("up", "down", "lora_B (up)", "lora_A (down)"), ("embedding_up", "embedding_down", "B", "A"))
    for one, other, name_one, name_other in pairs:
        if (one in has) != (other in has):
            there, lacking = (name_one, name_other) if one in has else (name_other, name_one)
            raise group.fail(f"has {there} and no {lacking}: the file is incomplete")
    if any(role.startswith("hada") for role in has) and (lacking := [role for role in LOHA if role not in has]):
        raise group.fail(f"is a LoHa without {lacking[0]}: the file is incomplete")
    if any(role.startswith("lokr") for role in has):
        for side in ("lokr_w1", "lokr_w2"):
            both = {f"{side}_a", f"{side}_b"}
            if not ({side} & has or both <= has):
                raise group.fail(f"is a LoKr without {side}: the file is incomplete")
            if side in has and both & has:
                raise group.fail(f"has {side} and factors of it; klein_mlx reads one of them")
    kinds = [word for word, marks in _KINDS.items() if has & marks]
    if len(kinds) > 1:
        raise group.fail(f"has a {' and a '.join(kinds)}; klein_mlx reads one per module")
    if has <= {"alpha", "up_bias"}:
        raise group.fail(f"has {' and '.join(sorted(has))}, and no factors: the file is incomplete")
    for role, entry in group.entries.items():
        allowed = _ALPHA_DTYPES if role == "alpha" else _FACTOR_DTYPES
        if entry.dtype not in allowed:
            raise group.fail(f"{role} has dtype {entry.dtype}; klein_mlx reads {', '.join(allowed[:3])}")
        if 0 in entry.shape:
            raise group.fail(f"{role} has shape {entry.shape}: it is empty")


def weight_shape(group: Group) -> tuple[int, ...] | None:
    """The shape of the weight that the group changes, told from its factors; None if none of them tells."""
    shapes = {role: _flat_shape(entry.shape) for role, entry in group.entries.items()}
    two = {role for role, shape in shapes.items() if len(shape) == 2}
    if {"up", "down"} <= two:
        if "mid" in shapes and shapes["mid"] != (shapes["up"][1], shapes["down"][0]):
            raise group.fail(f"its core has shape {shapes['mid']}; it must be {(shapes['up'][1], shapes['down'][0])}")
        if "mid" not in shapes and shapes["up"][1] != shapes["down"][0]:
            raise group.fail(
                f"lora_A has rank {shapes['down'][0]}, lora_B has {shapes['up'][1]}; they must be the same"
            )
        return shapes["up"][0], shapes["down"][1]
    if {"embedding_up", "embedding_down"} <= two:
        if shapes["embedding_up"][1] != shapes["embedding_down"][0]:
            raise group.fail(f"its ranks differ: {shapes['embedding_down']} and {shapes['embedding_up']}")
        return shapes["embedding_down"][1], shapes["embedding_up"][0]
    if set(LOHA) <= two:
        return _loha_shape(group, shapes)
    if any(role.startswith("lokr") for role in shapes):
        left, right = _side(group, shapes, "lokr_w1", None), _side(group, shapes, "lokr_w2", "lokr_t2")
        return left[0] * right[0], left[1] * right[1]
    if "diff" in shapes:
        return shapes["diff"]
    factors = {role: shape for role, shape in shapes.items() if role not in _NO_FACTORS}
    if factors:
        role, shape = next((item for item in factors.items() if len(item[1]) != 2), next(iter(factors.items())))
        raise group.fail(f"its {role} has shape {shape}; factors must be matrices")
    return None


def _flat_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the 1 x 1 kernel that convolutions have."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _loha_shape(group: Group, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    found = set()
    for n in (1, 2):
        a, b, kernel = shapes[f"hada_w{n}_a"], shapes[f"hada_w{n}_b"], shapes.get(f"hada_t{n}")
        if kernel is None:
            found.add((a[0], b[1]))
            fits = a[1] == b[0]
        else:
            found.add((a[1], b[1]))
            fits = kernel == (a[0], b[0])
        if not fits:
            raise group.fail(f"its ranks differ: hada_w{n}_a is {a}, hada_w{n}_b is {b}")
    if len(found) > 1:
        raise group.fail(f"its two products have different shapes: {sorted(found)}")
    return found.pop()


def _side(group: Group, shapes: Mapping[str, tuple[int, ...]], side: str, kernel: str | None) -> tuple[int, int]:
    whole = shapes.get(side)
    if whole is None:
        a, b = shapes[f"{side}_a"], shapes[f"{side}_b"]
        cored = kernel is not None and kernel in shapes
        fits = len(a) == len(b) == 2 and (shapes[kernel] == (a[0], b[0]) if cored and kernel else a[1] == b[0])
        if not fits:
            raise group.fail(f"its ranks differ: {side}_a is {a}, {side}_b is {b}")
        whole = (a[1], b[1]) if cored else (a[0], b[1])
    if len(whole) != 2:
        raise group.fail(f"{side} has shape {whole}; it must be a matrix")
    return whole  # type: ignore[return-value]


def rank_of(entries: Mapping[str, Entry]) -> int | None:
    """The rank by which alpha is divided; None for what has no rank, and no alpha then."""
    roles = ("down", "embedding_down", "lokr_w2_b", "lokr_w1_b", "hada_w1_b")
    return next((entries[role].shape[0] for role in roles if role in entries), None)


def alpha_of(group: Group) -> float | None:
    """The file's own alpha; None if there is none. CheckpointError for one that is no number over 0."""
    if "alpha" not in group.entries:
        return None
    if math.prod(group.entries["alpha"].shape) != 1:
        raise group.fail(f"alpha has shape {group.entries['alpha'].shape}; it must be one number")
    alpha = float(group.arrays["alpha"].astype(mx.float32).reshape(()).item())  # type: ignore[arg-type]
    if not math.isfinite(alpha) or alpha <= 0:
        raise group.fail(f"alpha is {alpha:g}; it must be a number over 0")
    return alpha


def stated_alpha(group: Group, stated: Stated) -> float | None:
    """The alpha that counts: the file's own before the metadata's; None where none does, and the strength is 1.

    A LoKr of two whole factors has none of its own: what stands there is anything (ai-toolkit's 1e10 in float16 is
    infinite). PEFT, which writes no alpha beside the factors, divides its own by the rank all the same.
    """
    if rank_of(group.entries) is not None:
        own = alpha_of(group)
        return stated.alpha if own is None else own
    peft = stated.rank and "lokr_w1" in group.entries and "alpha" not in group.entries
    return stated.alpha if peft else None


def strength(group: Group, stated: Stated) -> float:
    """What the product of the factors is multiplied by."""
    alpha, rank = stated_alpha(group, stated), rank_of(group.entries) or stated.rank
    if alpha is None or rank is None:
        return 1.0
    by_root = stated.by_root and "alpha" not in group.entries
    factor = alpha / (math.sqrt(rank) if by_root else rank)
    if factor > _MAX_STRENGTH:
        raise group.fail(f"alpha is {alpha:g} at rank {rank}: {factor:g} times its factors; is the file damaged?")
    return factor


def from_float8(array: mx.array, dtype: str) -> mx.array:
    """Bytes that stand for 8-bit floats as bfloat16, which holds all of their values; any other array as it is."""
    return mx.from_fp8(array, dtype=mx.bfloat16) if dtype == _FLOAT8 else array


def _delta(group: Group, factor: float) -> Delta | None:
    a = {role: array.reshape(_flat_shape(array.shape)) for role, array in group.arrays.items()}
    if "up" in a:
        down = a["down"]
        if "mid" in a:
            down = a["mid"].astype(mx.float32) @ down.astype(mx.float32)
        return LowRank(a["up"], down, factor)
    if "embedding_up" in a:
        return LowRank(a["embedding_down"].T, a["embedding_up"].T, factor)
    if "hada_w1_a" in a:
        return _loha(a, factor)
    if "lokr_w1" in a or "lokr_w1_a" in a:
        left = a["lokr_w1"] if "lokr_w1" in a else _product(a["lokr_w1_a"], a["lokr_w1_b"])
        if "lokr_w2" in a:
            return Kronecker(left, a["lokr_w2"], factor)
        return Kronecker(left, _cored(a.get("lokr_t2"), a["lokr_w2_a"], a["lokr_w2_b"]), factor)
    return Full(a["diff"]) if "diff" in a else None


def _product(one: mx.array, other: mx.array) -> mx.array:
    return one.astype(mx.float32) @ other.astype(mx.float32)


def _cored(core: mx.array | None, a: mx.array, b: mx.array) -> mx.array:
    """a @ b; with Tucker's core, a.T @ core @ b."""
    return _product(a, b) if core is None else _product(_product(a.T, core), b)


def _loha(a: Mapping[str, mx.array], factor: float) -> LowRank:
    """(A1 B1) * (A2 B2), elementwise, as one product: its columns are all pairs of columns."""
    ups, downs = [], []
    for n in (1, 2):
        up, down = a[f"hada_w{n}_a"].astype(mx.float32), a[f"hada_w{n}_b"].astype(mx.float32)
        if f"hada_t{n}" in a:
            up, down = up.T, _product(a[f"hada_t{n}"], down)
        ups.append(up)
        downs.append(down)
    up = (ups[0][:, :, None] * ups[1][:, None, :]).flatten(1)
    down = (downs[0][:, None, :] * downs[1][None, :, :]).flatten(0, 1)
    return LowRank(up, down, factor)


def make_changes(
    group: Group, targets: tuple[Target, ...], rows: int, ours: tuple[int, ...], stated: Stated
) -> dict[str, Change]:
    """What the group does to each of its targets. rows: of the foreign weight, all targets' together; ours: the shape
    of one target's weight."""
    factor = strength(group, stated)
    delta = _delta(group, factor)
    bias = group.arrays.get("diff_b")
    if "up_bias" in group.arrays:
        added = factor * group.arrays["up_bias"].astype(mx.float32)
        bias = added if bias is None else bias + added
    magnitude = _magnitude(group, rows)
    if targets[0].layout in PIECES:
        if magnitude is not None:
            raise group.fail("is a DoRA of a piece of a matrix, which klein_mlx does not read")
        return {targets[0].path: _place(delta, bias, piece_rows(targets[0].layout, ours), ours[0])}
    changes = {}
    for target in targets:
        taken = _rows(target.layout, rows)
        own = Change(delta, bias, magnitude)
        if taken is not None:
            own = Change(
                None if delta is None else _cut(delta, target.layout, taken),
                None if bias is None else take_rows(bias, taken),
                magnitude if magnitude is None or magnitude.shape[0] == 1 else take_rows(magnitude, taken),
            )
        changes[target.path] = own
    if magnitude is not None and magnitude.shape[0] == 1 and len(changes) > 1:
        together = tuple((path, own.delta) for path, own in changes.items() if own.delta is not None)
        changes = {path: replace(own, together=together) for path, own in changes.items()}
    return changes


def piece_rows(layout: str, ours: tuple[int, ...]) -> tuple[int, int]:
    """Which rows of a single block's fused matrix are a piece's: q, k and v are as many as its columns."""
    index = PIECES.index(layout)
    return index * ours[1], (index + 1) * ours[1] if index < 3 else ours[0]


def _place(delta: Delta | None, bias: mx.array | None, rows: tuple[int, int], whole: int) -> Change:
    """A change of some rows of a weight that has `whole` of them."""
    around = (rows[0], whole - rows[1])

    def pad(array: mx.array) -> mx.array:
        return mx.pad(array, [around, *((0, 0) for _ in array.shape[1:])])

    if isinstance(delta, LowRank):
        delta = replace(delta, up=pad(delta.up))
    elif delta is not None:
        delta = Full(pad(delta.dense()))
    return Change(delta, None if bias is None else pad(bias))


def _magnitude(group: Group, rows: int) -> mx.array | None:
    """DoRA's, as (out, 1) or (1, in)."""
    magnitude = group.arrays.get("magnitude")
    if magnitude is None:
        return None
    shape = weight_shape(group)
    if shape is None:
        raise group.fail("has a DoRA magnitude and no factors: the file is incomplete")
    if magnitude.size == rows and magnitude.shape[:1] == (rows,):
        return magnitude.reshape(rows, 1)
    if magnitude.shape == (1, shape[1]):
        return magnitude
    raise group.fail(f"its DoRA magnitude has shape {magnitude.shape}; it must be ({rows}, 1) or (1, {shape[1]})")


def _rows(layout: str, rows: int) -> Rows | None:
    """Which rows of the foreign weight are ours; None: all, in their order."""
    if layout in THIRDS:
        third = rows // 3
        start = THIRDS.index(layout) * third
        return ((start, start + third),)
    return ((rows // 2, rows), (0, rows // 2)) if layout == HALVES else None


def _cut(delta: Delta, layout: str, rows: Rows) -> Delta:
    """The rows' part of a delta. A fused q, k, v that was trained apart (musubi) has three ranks one after the other,
    each with its own rows: of these only the own third is kept."""
    cut = delta.cut(rows)
    if not isinstance(cut, LowRank) or layout not in THIRDS or cut.rank % 3:
        return cut
    index, rank = THIRDS.index(layout), cut.rank // 3
    own = slice(index * rank, (index + 1) * rank)
    others = mx.concatenate([cut.up[:, : own.start], cut.up[:, own.stop :]], axis=1)
    if (others != 0).any().item():
        return cut
    return LowRank(cut.up[:, own], cut.down[own], cut.factor)
