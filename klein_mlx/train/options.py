"""Everything that a training run can be asked, as one frozen dataclass; the flags and the TOML's keys are its fields.

Knows no arrays and imports nothing heavy: the command builds its parser from it.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from klein_mlx.errors import RequestError, nearest, short
from klein_mlx.options import integer, is_number

METHODS = ("lora", "dora", "full")
SIGMAS = ("uniform", "logit-normal", "shifted", "weighted", "content", "style")
OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
SCHEDULES = ("constant", "cosine")
FORMATS = ("diffusers", "comfy", "both")
ROUNDINGS = ("stochastic", "kahan", "nearest")
MAX_HELD_OUT = 16
# What may differ when a run is resumed: nothing of these changes an update.
FREE = (
    "steps",
    "save_every",
    "keep_last",
    "preview",
    "preview_model",
    "preview_every",
    "stop_early",
    "backend",
    "format",
)
_PATHS = ("data", "output")


def _option(default: Any, help: str, choices: tuple[str, ...] = (), **more: Any) -> Any:
    """A field whose metadata make its flag: help, choices, metavar; many: it takes one or more values."""
    metadata = {"help": help, "choices": choices, **more}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainOptions:
    """A training run. Paths are texts; None is decided from the rest by `checked`, which raises RequestError."""

    data: str = _option(MISSING, "a folder of pictures with captions, or a metadata.jsonl or .csv", positional=True)
    output: str = _option(
        MISSING, "the LoRA to write, NAME.safetensors; with full training a folder", short=("-o",), metavar="FILE"
    )
    model: str = _option(
        "base-4b", "the base model to train: a name, a folder, a Hub id", short=("-m",), metavar="MODEL"
    )
    run: str | None = _option(None, "the run's own folder (default: the output's name with .run)", metavar="DIR")
    method: str = _option("lora", "what is trained", METHODS)
    rank: int = _option(16, "rank of the LoRA or DoRA")
    targets: str = _option(
        "all", "layers with an adapter: all (of the blocks), attention, or a pattern such as *.to_v", metavar="LAYERS"
    )
    bits: str | None = _option(
        None, "quantize the frozen model while loading: 8, 4, mxfp4 ...", short=("-q",), metavar="BITS"
    )
    dtype: str | None = _option(
        None, "dtype to compute in: bfloat16 or float32 (default: as in generate)", metavar="DTYPE"
    )
    anyway: bool = _option(False, "train a distilled model; its base variant is made for this")

    prompt: str | None = _option(None, "the caption of every picture that has none", metavar="TEXT")
    trigger: str | None = _option(None, "word to put before each caption", metavar="WORD")
    references: tuple[str, ...] = _option(
        (), "folders of reference pictures with the same names", many=True, metavar="DIR"
    )
    resolution: int = _option(512, "scale pictures to at most this side squared; a multiple of 16", metavar="PIXELS")
    flip: bool = _option(False, "show each picture mirrored half of the time")
    dropout: float = _option(0.05, "share of samples whose caption is left out", metavar="SHARE")
    keep: str | None = _option(
        None, "preserve what the model makes of this word in the trigger's place", metavar="CLASS"
    )

    steps: int = _option(500, "updates in total")
    batch: int = _option(1, "samples of one size in a micro-batch")
    accumulate: int | None = _option(None, "micro-batches per update (default: 4; full training 1)")
    learning_rate: float | None = _option(None, "learning rate (default: 1e-4; full training 1e-5)", metavar="RATE")
    optimizer: str | None = _option(None, "optimizer (default: adamw; full training adafactor)", OPTIMIZERS)
    weight_decay: float = _option(1e-4, "weight decay of adamw, lion and muon", metavar="DECAY")
    schedule: str = _option("constant", "schedule of the learning rate", SCHEDULES)
    warmup: int = _option(10, "updates over which the learning rate rises")
    clip: float = _option(
        1.0, "largest norm of the gradients: of all together; of each tensor in full training", metavar="NORM"
    )
    sigmas: str = _option("uniform", "how noise levels are drawn", SIGMAS)
    rounding: str = _option("stochastic", "rounding of bfloat16 weights in full training", ROUNDINGS)
    ema: float | None = _option(None, "write the moving average of what is trained, such as 0.99", metavar="DECAY")
    seed: int = _option(0, "seed of order, noise and first weights")

    hold_out: str = _option(
        "5%", "pictures kept apart to measure the loss on: a count or a share; 0: none", metavar="COUNT"
    )
    hold_out_every: int = _option(100, "updates between measurements", metavar="N")
    preview: tuple[str, ...] = _option((), "prompts to draw while training", many=True, metavar="PROMPT")
    preview_model: str | None = _option(
        None, "model that draws the previews (default: the distilled partner, if on disk)", metavar="MODEL"
    )
    preview_every: int | None = _option(
        None, "updates between previews (default: at most a tenth of the time)", metavar="N"
    )
    save_every: int = _option(250, "updates between checkpoints", metavar="N")
    keep_last: int = _option(4, "checkpoints kept besides the best", metavar="N")
    stop_early: bool = _option(False, "stop when training has collapsed")
    format: str = _option("diffusers", "layout of the LoRA file; both: comfy's in NAME.comfy.safetensors", FORMATS)
    backend: str = _option("ring", "link between several machines: ring or jaccl", ("ring", "jaccl", "any"))

    @property
    def run_folder(self) -> Path:
        """Checkpoints, cache, log and previews."""
        path = Path(self.output)
        return Path(self.run) if self.run else path.with_name(f"{path.name.removesuffix('.safetensors')}.run")

    def checked(self) -> Self:
        """Every None that depends on the method decided, every value in its range. Raises RequestError."""
        self._check_types()
        full = self.method == "full"
        options = replace(
            self,
            accumulate=(1 if full else 4) if self.accumulate is None else self.accumulate,
            learning_rate=(1e-5 if full else 1e-4) if self.learning_rate is None else self.learning_rate,
            optimizer=("adafactor" if full else "adamw") if self.optimizer is None else self.optimizer,
        )
        options._check_ranges()
        return options

    def _check_types(self) -> None:
        for one in fields(self):
            value, kind = getattr(self, one.name), kind_of(one)
            if value is None and "None" in kind:
                continue
            choices = one.metadata["choices"]
            if choices and value not in choices:
                raise RequestError(f"{one.name} is {short(value)}; it must be one of {', '.join(choices)}")
            if kind.startswith("str") and (not isinstance(value, str) or not value.strip()):
                raise RequestError(f"{one.name} is {short(value)}; it must be a string")
            if kind == "bool" and not isinstance(value, bool):
                raise RequestError(f"{one.name} is {short(value)}; it must be true or false")
            texts = value if isinstance(value, tuple) else (None,)
            if kind.startswith("tuple") and not all(isinstance(text, str) and text.strip() for text in texts):
                raise RequestError(f"{one.name} is {short(value)}; it must be a list of strings")

    def _check_ranges(self) -> None:
        whole = {"steps": 10**7, "batch": 256, "rank": 4096, "hold_out_every": 10**7, "save_every": 10**7}
        whole |= {"accumulate": 4096, "keep_last": 10**4, "preview_every": 10**7}
        for name, most in whole.items():
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), 1, most)
        integer("warmup", self.warmup, 0, 10**7)
        integer("seed", self.seed, 0, 2**63 - 1)
        if integer("resolution", self.resolution, 64, 2048) % 16:
            low = self.resolution // 16 * 16
            raise RequestError(f"resolution is {self.resolution}; it must be a multiple of 16: {low} or {low + 16}")
        _between("learning_rate", self.learning_rate, 0, 1, "over 0 and at most 1", open_low=True)
        _between("dropout", self.dropout, 0, 1, "from 0 to 1")
        _between("weight_decay", self.weight_decay, 0, 1, "from 0 to 1")
        _between("clip", self.clip, 0, 1e6, "over 0", open_low=True)
        if self.ema is not None:
            _between("ema", self.ema, 0, 1 - 1e-9, "over 0 and under 1, such as 0.99", open_low=True)
        self.held_out_of(1)
        if self.keep and (not self.trigger or self.method != "lora"):
            raise RequestError(f"keep is {self.keep!r}; it needs a trigger and the method lora")
        if self.bits and self.method == "full":
            raise RequestError(f"bits is {self.bits!r}; full training changes the weights, which cannot be quantized")
        if self.method != "full" and Path(self.output).suffix != ".safetensors":
            raise RequestError(f"output is {self.output!r}; a LoRA's name ends in .safetensors")

    def unused(self) -> dict[str, str]:
        """The options that decide nothing beside the others, and why."""
        full = self.method == "full"
        idle = {
            "full training has no adapters": ("rank", "targets", "format") * full,
            "it is for full training": ("rounding",) * (not full),
            "adafactor has none; give another optimizer": ("weight_decay",) * (self.optimizer == "adafactor"),
            "nothing is held out": ("hold_out_every",) * (not self.held_out_of(100)),
            "there is no preview": ("preview_model", "preview_every") * (not self.preview),
        }
        return {name: why for why, names in idle.items() for name in names}

    def held_out_of(self, count: int) -> int:
        """How many of so many pictures are held out: at least 1 and at most 16, and one is left to train on."""
        match = re.fullmatch(r"(\d{1,7})|(\d{1,3}(?:\.\d+)?)%", str(self.hold_out).strip())
        if not match or (match[2] and float(match[2]) >= 100):
            raise RequestError(
                f"hold_out is {short(self.hold_out)}; it must be a count such as 4, or a share such as 5%"
            )
        asked = int(match[1]) if match[1] else float(match[2]) / 100 * count
        wanted = 0 if not asked else max(1, min(MAX_HELD_OUT, round(asked)))
        return max(0, min(wanted, count - 1))

    def to_toml(self) -> str:
        """One line a field; what is None is left out."""
        lines = ((one.name, getattr(self, one.name)) for one in fields(self))
        return "".join(f"{name} = {_toml(value)}\n" for name, value in lines if value is not None)


def table() -> dict[str, Field[Any]]:
    """The fields by name."""
    return {one.name: one for one in fields(TrainOptions)}


def kind_of(one: Field[Any]) -> str:
    """A field's type in words: int, float | None, tuple ..."""
    return getattr(one.type, "__name__", str(one.type))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The options in a TOML file. Raises RequestError that names the file and the key."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"config {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"config {path}: {error}") from None
    known = table()
    for name in values:
        if name not in known:
            near = nearest(name, known)
            raise RequestError(f"config {path}: {name!r} is not an option{f'; did you mean {near}?' if near else ''}")
    return {name: _typed(known[name], value, str(path)) for name, value in values.items()}


def stored_values(run: str | Path) -> dict[str, Any]:
    """The options of the run in a folder. Raises RequestError where there is none."""
    path = Path(run) / "options.toml"
    if not path.is_file():
        raise RequestError(f"{run} holds no run to resume ({path.name} is missing)")
    return read_toml(path)


def make_options(values: Mapping[str, Any]) -> TrainOptions:
    """Options of values by field name, checked. Raises RequestError."""
    missing = [one.name for one in fields(TrainOptions) if one.default is MISSING and values.get(one.name) is None]
    if missing:
        words = {"data": "DATA, a folder of pictures", "output": "-o NAME.safetensors"}
        raise RequestError(f"train needs {words[missing[0]]}")
    return TrainOptions(**{n: v for n, v in values.items() if v is not None}).checked()


def with_paths_made_absolute(options: TrainOptions) -> TrainOptions:
    """As they are recorded in the run folder: it may be resumed from elsewhere."""
    paths = {name: os.path.abspath(value) for name in _PATHS if (value := getattr(options, name))}
    folders = tuple(os.path.abspath(folder) for folder in options.references)
    return replace(options, **paths, references=folders, run=str(options.run_folder.absolute()))


def _typed(one: Field[Any], value: Any, where: str) -> Any:
    kind = kind_of(one)
    if kind.startswith("tuple"):
        value = tuple(value) if isinstance(value, list) else (value,)
    elif kind.startswith("float") and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    elif kind.startswith("str") and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # bits = 4, hold_out = 2
    wanted = {"int": int, "flo": float, "str": str, "boo": bool, "tup": tuple}[kind[:3]]
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", tuple: "a list"}
        raise RequestError(f"config {where}: {one.name} is {short(value)}; it must be {words[wanted]}")
    return value


def _between(name: str, value: Any, low: float, high: float, words: str, open_low: bool = False) -> None:
    if not is_number(value) or not low <= value <= high or (open_low and value == low):
        raise RequestError(f"{name} is {short(value)}; it must be {words}")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        import json

        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
