"""The architecture as data: frozen dataclasses read from a checkpoint's own config.json files.

Every dimension comes from those files. `VARIANTS` only holds what no file states (default steps, guidance, hub id,
licence), and the variant is told from the dimensions and `is_distilled`, never from a name.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

from klein_mlx.errors import CheckpointError, nearest

PARTS = ("transformer", "text_encoder", "vae")
KLEIN_TAPS = (9, 18, 27)
EMBEDDED_GUIDANCE = 4.0  # dev's default scale
TAPS = {"qwen3": KLEIN_TAPS, "mistral": (10, 20, 30)}  # by the text encoder's model_type
# By model_type and hidden size.
ENCODERS = {("qwen3", 2560): "Qwen3-4B", ("qwen3", 4096): "Qwen3-8B", ("mistral", 5120): "Mistral-Small-3.2"}
_ADDRESS = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?!datasets/|spaces/)([\w.-]+/[\w.-]+)"
    r"(?:/(?:blob|resolve)/[^/]+/(.+\.(?:safetensors|gguf)))?",
    re.ASCII,
)
TIME_SHIFTS, MAX_SHIFT = ("exponential", "linear"), 1e6


class _FromDict:
    """Reading and writing a config as the JSON object that diffusers or transformers would write."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config.json") -> Self:
        """Build from a parsed config.json. Unknown keys are ignored; missing or bad ones raise CheckpointError."""
        known: dict[str, Any] = {}
        for field in fields(cls):  # type: ignore[arg-type]
            if field.name not in values:
                continue
            known[field.name] = _checked(values[field.name], field.type, f"{where}: {field.name}")
        try:
            return cls(**known)
        except TypeError as error:
            missing = str(error).split("missing", 1)[-1].strip()
            raise CheckpointError(f"{where}: missing {missing}; is this a FLUX.2 [klein] config?") from None

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}  # type: ignore[call-overload]


def _checked(value: Any, kind: Any, what: str) -> Any:
    """`value` if it has the annotated type (int, float, bool, tuple of ints, or None where allowed)."""
    if value is None and kind == tuple[int, ...] | None:
        return None
    if kind in (tuple[int, ...], tuple[int, ...] | None):
        items = list(value) if isinstance(value, list | tuple) else [None]
        if not all(type(i) is int and 0 < i < 1 << 20 for i in items) or not 0 < len(items) < 64:
            raise CheckpointError(f"{what} is {value!r}; it must be a list of positive integers")
        return tuple(items)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str:
        if value not in TAPS:
            raise CheckpointError(f"{what} is {value!r:.60}; it must be {' or '.join(TAPS)}")
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1 << 40:
        if kind is float:
            return float(value)
        if kind is int and isinstance(value, int) and value < 1 << 30:
            return value
    raise CheckpointError(f"{what} is {value!r}; it must be of type {getattr(kind, '__name__', kind)}, not negative")


@dataclass(frozen=True)
class TransformerConfig(_FromDict):
    """Flux2Transformer2DModel's config.json. `in_channels` counts a token's channels (4 x the VAE's)."""

    in_channels: int
    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    mlp_ratio: float
    axes_dims_rope: tuple[int, ...]
    rope_theta: float = 2000.0
    eps: float = 1e-6
    timestep_guidance_channels: int = 256
    guidance_embeds: bool = False

    @cached_property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @cached_property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)


@dataclass(frozen=True)
class TextEncoderConfig(_FromDict):
    """config.json of Qwen3, or of Mistral-Small, whose language model is its `text_config`.

    model_type: decides the encoder's class, the tokenizer's layout and the default taps: a key of TAPS.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    model_type: str = "qwen3"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config.json") -> Self:
        """As the parent's; `rope_theta` may also stand inside `rope_parameters` (transformers 5)."""
        if isinstance(inner := values.get("text_config"), Mapping):
            values = {"model_type": "mistral", **inner}
        rope = values.get("rope_parameters")
        if isinstance(rope, Mapping):
            values = {"rope_theta": rope.get("rope_theta", 1e6), **values}
        absent = [name for name in ("rope_theta", "rms_norm_eps") if name not in values]
        if absent and values.get("model_type") == "mistral":
            raise CheckpointError(f"{where}: missing {absent[0]}; is this Mistral-Small's config?")
        return super().from_dict(values, where)


@dataclass(frozen=True)
class VAEConfig(_FromDict):
    """AutoencoderKLFlux2's config.json."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int = 32
    in_channels: int = 3
    out_channels: int = 3
    decoder_block_out_channels: tuple[int, ...] | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    batch_norm_eps: float = 1e-4

    @cached_property
    def scale_factor(self) -> int:
        """Pixels per latent along one side (8 for klein)."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class Variant:
    """What no config.json states. Dimensions, `is_distilled` and `caches_references` tell which one a checkpoint is.

    dimensions: the transformer's hidden size, double blocks and single blocks. caches_references: as ModelConfig's.
    text_length, size: text positions and pixels of a side by default. edits: whether pictures may be given to it.
    embeds_guidance: the guidance scale is an input of the transformer, so a step is one pass.
    """

    name: str
    hub_id: str | None
    dimensions: tuple[int, int, int]
    is_distilled: bool
    steps: int
    guidance: float
    licence: str
    caches_references: bool = False
    text_length: int = 512
    size: int = 1024
    edits: bool = True
    embeds_guidance: bool = False

    @property
    def is_gated(self) -> bool:
        return self.licence == _NON_COMMERCIAL

    @property
    def passes(self) -> int:
        """Of the transformer in a step, at the default guidance."""
        return 2 if self.guidance > 1 and not self.embeds_guidance else 1

    @property
    def family(self) -> str:
        """Which FLUX.2 it is, in BFL's words."""
        return f"FLUX.2 [{'dev' if self.embeds_guidance else 'klein'}]"


_4B, _9B, _DEV = (3072, 5, 20), (4096, 8, 24), (6144, 8, 48)
_APACHE = "Apache-2.0"
_NON_COMMERCIAL = "FLUX non-commercial (gated)"

VARIANTS = (
    Variant("4b", "black-forest-labs/FLUX.2-klein-4B", _4B, True, 4, 1.0, _APACHE),
    Variant("base-4b", "black-forest-labs/FLUX.2-klein-base-4B", _4B, False, 50, 4.0, _APACHE),
    Variant("9b", "black-forest-labs/FLUX.2-klein-9B", _9B, True, 4, 1.0, _NON_COMMERCIAL),
    Variant("base-9b", "black-forest-labs/FLUX.2-klein-base-9B", _9B, False, 50, 4.0, _NON_COMMERCIAL),
    Variant("9b-kv", "black-forest-labs/FLUX.2-klein-9b-kv", _9B, True, 4, 1.0, _NON_COMMERCIAL, True),
    Variant(
        "dev", "black-forest-labs/FLUX.2-dev", _DEV, False, 50, EMBEDDED_GUIDANCE, _NON_COMMERCIAL, embeds_guidance=True
    ),
)
UNLISTED = {  # any other size: a toy, a test, a fine-tune with other dimensions
    True: Variant("distilled", None, (0, 0, 0), True, 4, 1.0, "not stated"),
    False: Variant("base", None, (0, 0, 0), False, 50, 4.0, "not stated"),
}
# The same of dev.
EMBEDDED = Variant("embedded", None, (0, 0, 0), False, 50, EMBEDDED_GUIDANCE, "not stated", embeds_guidance=True)
TINY = Variant("tiny", None, (0, 0, 0), True, 4, 1.0, _APACHE)
# A transformer for the 4B's encoder and VAE, trained on text to image at 512 x 512.
ONE_STEP = Variant(
    "4b-1step", "epfl-vita/flux2-klein-1step-rdm", _4B, True, 1, 1.0, _APACHE, text_length=232, size=512, edits=False
)
NAMED = {row.name: row for row in (TINY, ONE_STEP)}  # which dimensions and configs do not tell


@dataclass(frozen=True)
class ModelConfig:
    """One checkpoint's three parts, and what belongs to none of them.

    taps: the encoder layers after which hidden states are taken (9, 18, 27 of klein's 36).
    max_sequence_length: text positions the transformer attends to, padding included (512 for klein).
    default_size: pixels of a side when nothing else is asked for (1024 for klein).
    caches_references: the model was trained to see references that see only each other, as 9b-kv was.
    time_shift: how the noise levels are shifted: one of TIME_SHIFTS by the empirical mu, or a constant shift.
    """

    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    vae: VAEConfig
    is_distilled: bool
    taps: tuple[int, ...]
    max_sequence_length: int = 512
    default_size: int = 1024
    variant_name: str | None = None
    caches_references: bool = False
    time_shift: str | float = "exponential"

    def __post_init__(self) -> None:
        t, e, v = self.transformer, self.text_encoder, self.vae
        _require(
            t.in_channels == 4 * v.latent_channels, "transformer in_channels", t.in_channels, 4 * v.latent_channels
        )
        kind = "mistral" if t.guidance_embeds else "qwen3"
        own = ENCODERS.get((e.model_type, e.hidden_size))
        needed = ENCODERS.get((kind, t.joint_attention_dim // max(len(self.taps), 1)))
        if own and needed and own != needed:
            sizes = " and ".join(v.name for v in VARIANTS if v.dimensions[0] == t.hidden_size)
            raise CheckpointError(f"the text encoder is {own}; {sizes or 'this transformer'} needs {needed}")
        if e.model_type != kind:
            which = "[dev], which needs Mistral-Small" if t.guidance_embeds else "[klein], which needs Qwen3"
            raise CheckpointError(f"the text encoder is a {e.model_type}; the transformer is FLUX.2 {which}")
        wanted = len(self.taps) * e.hidden_size
        _require(t.joint_attention_dim == wanted, "transformer joint_attention_dim", t.joint_attention_dim, wanted)
        _check_rope(t)
        _check_groups(v)
        if t.guidance_embeds and self.is_distilled:
            raise CheckpointError("both guidance_embeds (FLUX.2 [dev]) and is_distilled are true: one is wrong")
        if not self.taps or list(self.taps) != sorted(set(self.taps)) or not 0 < self.taps[0] <= self.taps[-1]:
            raise CheckpointError(f"the tapped layers are {self.taps}; they must be at least 1 and increasing")
        if self.taps[-1] > e.num_hidden_layers:
            raise CheckpointError(f"layer {self.taps[-1]} is tapped, but the text encoder has {e.num_hidden_layers}")

    @cached_property
    def variant(self) -> Variant:
        """The row of the table that these dimensions are."""
        if self.variant_name in NAMED:
            return NAMED[self.variant_name]
        t = self.transformer
        sizes = t.hidden_size, t.num_layers, t.num_single_layers
        mine = sizes, self.is_distilled, self.caches_references, t.guidance_embeds
        own = [v for v in VARIANTS if (v.dimensions, v.is_distilled, v.caches_references, v.embeds_guidance) == mine]
        return own[0] if own else EMBEDDED if t.guidance_embeds else UNLISTED[self.is_distilled]

    @cached_property
    def pixels_per_token(self) -> int:
        """The side of a token in pixels (16 for klein); widths and heights are multiples of it."""
        return 2 * self.vae.scale_factor


def settle_variant(config: ModelConfig, name: str) -> ModelConfig:
    """The config as that of a variant that its files do not tell.

    Raises CheckpointError for a name that is no variant's, or whose dimensions are others.
    """
    rows = {row.name: row for row in (*VARIANTS, ONE_STEP)}
    if name not in rows:
        raise CheckpointError(f"variant is {name!r:.60}; it must be one of {', '.join(rows)}")
    variant, t = rows[name], config.transformer
    fitting = [
        row.name for row in rows.values() if row.dimensions == (t.hidden_size, t.num_layers, t.num_single_layers)
    ]
    if (fitting and name not in fitting) or variant.embeds_guidance != t.guidance_embeds:
        fitting = fitting or [EMBEDDED.name if t.guidance_embeds else "klein"]
        raise CheckpointError(f"variant is {name!r}, and the transformer has the sizes of {' or '.join(fitting)}")
    own = {"variant_name": name, "max_sequence_length": variant.text_length, "default_size": variant.size}
    others = {"variant_name": None}
    if config.variant_name == ONE_STEP.name:
        others |= {"max_sequence_length": variant.text_length, "default_size": variant.size}
    return replace(
        config,
        is_distilled=variant.is_distilled,
        caches_references=variant.caches_references,
        **(own if name in NAMED else others),
    )


def named_variant(text: str) -> str | None:
    """The variant that a name, as `flux-2-klein-base-4b-fp8`, speaks of: grounds for a note, never for a decision."""
    _, klein, tail = re.sub(r"[^a-z0-9]", "", text.lower()).partition("klein")
    size = re.search(r"[49]b", tail)
    if not klein or "1step" in tail:
        return ONE_STEP.name if klein else None
    if not size:
        return None
    base, kv = "base" in tail, "9bkv" in tail
    return f"{'base-' * base}{size[0]}{'-kv' * (kv and not base)}"


class Alias(NamedTuple):
    """A repository of the Hub. note: one line for lists and before a download."""

    hub_id: str
    note: str


# Quantized with mflux and uploaded by others; their names are known from public pages, their files were not tried here.
_UNVERIFIED = "quantized and uploaded by others; not verified by klein-mlx"

ALIASES = {
    **{row.name: Alias(row.hub_id, f"Black Forest Labs, {row.licence}") for row in VARIANTS if row.hub_id},
    ONE_STEP.name: Alias(ONE_STEP.hub_id or "", f"EPFL VITA, {ONE_STEP.licence}; a transformer for 4b's other parts"),
    "4b-q4": Alias("mlx-community/flux2-klein-4b-4bit", _UNVERIFIED),
    "4b-q8": Alias("mlx-community/flux2-klein-4b-8bit", _UNVERIFIED),
}

# Repositories that hold a transformer alone -> that of its text encoder, VAE and tokenizer.
BASES = {ONE_STEP.hub_id or "": VARIANTS[0].hub_id or ""}
TRANSFORMER_FILE = "model.safetensors"  # of such a repository


def resolve(model: str, own: Mapping[str, str] | None = None) -> str:
    """The model that a name stands for; a name that is no alias comes back as it is.

    own: the user's aliases, which come before those of the package and may stand for one of them, a hub id or a folder.
    The package's are known in any case and with the model's name before them: klein-4b, FLUX.2-klein-4B; Hub ids of
    theirs in any case.
    """
    model = (own or {}).get(model, model)
    plain = re.sub(r"^(flux\.?2-)?klein-|^flux\.?2-(?=dev$)", "", model.lower())
    same = (name for name, alias in ALIASES.items() if alias.hub_id.lower() == plain)
    known = plain if plain in ALIASES or plain == "tiny" else next(same, None)
    if known is None or (known != model and os.path.exists(model)):
        return model
    return ALIASES[known].hub_id if known in ALIASES else known


def published(model: str, own: Mapping[str, str] | None = None) -> Variant | None:
    """The published variant that a name stands for; None where it is a path on this disk, or any other model."""
    hub_id = None if os.path.lexists(model) else resolve(model, own)
    return next((row for row in (*VARIANTS, ONE_STEP) if hub_id and row.hub_id == hub_id), None)


def suggestion(model: str, own: Mapping[str, str] | None = None) -> str:
    """ " (did you mean ...?)" for a word that is nearly an alias, else nothing."""
    near = nearest(model, ["tiny", *ALIASES, *(own or {})])
    return f" (did you mean {near}?)" if near else ""


def refuse_address(text: str) -> None:
    """Raise CheckpointError for the address of a repository's page, or of a file in it: a Hub id names it."""
    if found := _ADDRESS.match(text):
        hub_id = "/".join(filter(None, found.groups()))
        raise CheckpointError(f"{text:.200} is an address; give its Hub id, {hub_id}")


def gated_notice(hub_id: str) -> str | None:
    """One line on a repository whose license must be accepted before it can be fetched; None for all others."""
    for variant in VARIANTS:
        if variant.is_gated and variant.hub_id and variant.hub_id.lower() == hub_id.lower():
            return (
                f"{hub_id}: license {variant.licence}. Accept it once on huggingface.co/{hub_id}, then give a token: "
                "`hf auth login`, or HF_TOKEN, or token= in Python"
            )
    return None


def default_taps(num_hidden_layers: int, model_type: str = "qwen3") -> tuple[int, ...]:
    """The tapped layers of an encoder whose files state none: its kind's, whatever is left out above the last of them.

    They are a default argument of diffusers' pipeline. Encoders with fewer layers, which these do not fit, are
    tapped at the same fractions of their depth.
    """
    if num_hidden_layers >= TAPS[model_type][-1]:
        return TAPS[model_type]
    return tuple(num_hidden_layers * k // 4 for k in (1, 2, 3))


def _check_rope(t: TransformerConfig) -> None:
    axes = t.axes_dims_rope
    if len(axes) != 4 or any(dim % 2 for dim in axes) or sum(axes) != t.attention_head_dim:
        raise CheckpointError(
            f"axes_dims_rope is {axes}; it must be four even numbers that add up to the head's {t.attention_head_dim}"
        )
    if t.rope_theta <= 0:
        raise CheckpointError(f"rope_theta is {t.rope_theta:g}; it must be over 0")


def _check_groups(v: VAEConfig) -> None:
    channels = (*v.block_out_channels, *(v.decoder_block_out_channels or ()))
    if v.norm_num_groups < 1 or any(c % v.norm_num_groups for c in channels):
        raise CheckpointError(f"norm_num_groups is {v.norm_num_groups}; it must divide the VAE's channels {channels}")
    if len(v.block_out_channels) > 8:
        raise CheckpointError(
            f"block_out_channels has {len(v.block_out_channels)} levels; klein's has 4, at most 8 work"
        )


def _require(holds: bool, what: str, value: int, right: int) -> None:
    if not holds:
        raise CheckpointError(f"{what} is {value}, but the other parts need {right}: these parts do not fit together")
