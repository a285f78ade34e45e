"""`klein-mlx info MODEL`: what a model or a file is, without reading its weights."""

import argparse
import re
from pathlib import Path
from typing import Any

from klein_mlx.cli.options import BITS, IMAGES, add_options, asked_bits, parse_size, refuse_alone, typed_options
from klein_mlx.cli.output import cleaned, say, say_json
from klein_mlx.errors import CheckpointError, RequestError, human_bytes
from klein_mlx.options import MAX_REFERENCES, integer
from klein_mlx.train.options import METHODS, TrainOptions, make_options

RANK = TrainOptions.rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `klein-mlx info` takes."""
    about = 'a folder, a Hub id, a short name, "tiny", or a file: a model or a component, a LoRA, a picture'
    parser.add_argument("model", nargs="?", metavar="MODEL", help=about)
    parser.add_argument("-m", "--model", dest="named", help=argparse.SUPPRESS)
    parser.add_argument("--verify", action="store_true", help="read every file and compare it with its recorded sha256")
    add_options(
        parser, ("yes", "offline", "size"), size="estimate the memory of a picture of this size: 1024x768, 16:9, 2mp"
    )
    references = "include N one-megapixel reference images in the estimate"
    parser.add_argument("--references", type=int, default=0, metavar="N", help=references)
    add_options(parser, ("dtype", "keep", "variant", *BITS))
    parser.add_argument("--train", action="store_true", help="estimate the memory of training it, on a Mac")
    parser.add_argument("--rank", type=int, metavar="N", help=f"with --train: rank of the LoRA (default: {RANK})")
    methods = {"choices": METHODS, "help": "with --train: what is trained (default: lora)"}
    parser.add_argument("--method", **methods)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Print what a model or a file is. Returns the exit code; raises KleinError."""
    from klein_mlx.cli.download import Consent, obtain
    from klein_mlx.formats.describe import describe, format_description, verify
    from klein_mlx.formats.open import open_any
    from klein_mlx.formats.part import PartFile

    typed_options(args)
    if args.model is not None and args.named is not None:
        raise RequestError(f"a model is given twice, {args.model[:40]!r} and with --model; give one of them")
    args.model = args.named if args.model is None else args.model
    if args.model is None:
        raise RequestError("klein-mlx info needs MODEL; for example: klein-mlx info tiny")
    _check_used(args)
    if args.train:
        return _training(args)
    if (code := _other(args)) is not None:
        return code
    if not args.verify and (published := _published(args)) is not None:
        return _report_published(published, args)
    own = {"variant": args.variant, "local_files_only": bool(args.offline)}
    source = open_any(obtain(args.model, consent=Consent(args.offline, args.yes), tokenizer=False), **own)
    if args.variant and isinstance(source, PartFile):
        raise RequestError(f"--variant needs a whole model, and {args.model} is a {source.part}")
    description = describe(source)
    if args.size is not None:
        description["memory"] = _memory(source, args)
    if args.verify:
        description["verified"] = verify(source)
    if args.json:
        say_json(description)
    else:
        say(*format_description(cleaned(description)).split("\n"))
    return 0


def _check_used(args: argparse.Namespace) -> None:
    """RequestError for an option that would decide nothing."""
    given = [name for name in ("references", "dtype", "keep", *BITS) if getattr(args, name)]
    if args.train and args.verify:
        raise RequestError("--verify reads files, and --train estimates without them; give one of them")
    unused = [name for name in given if name not in ("references", "dtype", "quantize")] if args.train else given
    if unused and (args.train or args.size is None):
        why = "for the estimate of memory; add --size"
        if args.train:
            why = "not for --train, " + (
                "which quantizes all parts alike; use --quantize" if unused[0] in BITS else "which decides it by itself"
            )
        raise RequestError(f"--{unused[0].replace('_', '-')} is {why}")
    for name in ("rank", "method"):
        if getattr(args, name) is not None and not args.train:
            raise RequestError(f"--{name} is for the estimate of training; add --train")
    refuse_alone(vars(args), vars(args))


def _published(args: argparse.Namespace) -> Any:
    """A published model that is not on disk, by its dimensions alone; None for any other."""
    from klein_mlx.cli.bench import source_without_files
    from klein_mlx.config import published
    from klein_mlx.formats.open import open_cached
    from klein_mlx.paths import own_names

    found = published(args.model, own_names())
    if found is None or found.hub_id is None:
        return None
    try:
        open_cached(found.hub_id)
        return None
    except CheckpointError:
        return source_without_files(found.hub_id, args.variant)


def _report_published(source: Any, args: argparse.Namespace) -> int:
    from klein_mlx.formats.describe import heading, memory_line

    variant = source.config.variant
    d = {"variant": variant.name, "family": variant.family, "path": None, "licence": variant.licence}
    d |= {"is_distilled": variant.is_distilled, "steps": variant.steps, "guidance": variant.guidance}
    if args.size is not None:
        d["memory"] = _memory(source, args)
    if args.json:
        say_json(d)
        return 0
    say(
        heading(variant.family, variant.name, variant.is_distilled, variant.steps, variant.guidance),
        f"  not on this machine; klein-mlx models pull {source.path}",
        f"  license  {variant.licence}",
        *([memory_line(d["memory"])] if "memory" in d else []),
    )
    return 0


def _other(args: argparse.Namespace) -> int | None:
    """What fits a file that is not a model: a picture's recipe, a LoRA's description; None for anything else."""
    path = Path(args.model)
    if not path.is_file():
        return None
    if path.suffix.lower() in IMAGES:
        from klein_mlx.cli import show

        _refuse_model_s(args, "a picture")
        return show.run(argparse.Namespace(picture=[args.model], json=args.json))
    if path.suffix == ".safetensors" and _is_lora(path):
        from klein_mlx.cli import lora

        _refuse_model_s(args, "a LoRA")
        return lora.run(argparse.Namespace(words=[args.model], lora_folder=None, offline=True, json=args.json))
    return None


def _refuse_model_s(args: argparse.Namespace, what: str) -> None:
    """RequestError for an option that only a model has a use for."""
    if given := next((name for name in ("verify", "size", "variant") if getattr(args, name)), None):
        raise RequestError(f"--{given} needs a model, and {args.model} is {what}")


def _is_lora(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return any(re.search(r"lora|lokr|loha|hada_w", name, re.IGNORECASE) for name in file.keys())
    except (SafetensorError, OSError):
        return False


def _memory(source: Any, args: argparse.Namespace) -> dict[str, Any]:
    from klein_mlx.formats.part import PartFile
    from klein_mlx.runtime.memory import Work, chosen_device, compute_dtype, estimate
    from klein_mlx.weights.bits import settle

    if isinstance(source, PartFile):
        raise RequestError(f"--size needs a whole model, and {args.model} is a {source.part}")
    multiple = source.config.pixels_per_token
    (width, height), references = _asked_size(args, source.config)
    count = len(references)
    work = Work(
        height,
        width,
        references,
        count * (1024 // multiple) ** 2,
        source.config.max_sequence_length,
        memories=int(source.config.caches_references),
    )
    dtype = compute_dtype(args.dtype)
    found = estimate(source, work, dtype, settle(asked_bits(args), source), args.keep, device=chosen_device())
    return {
        "width": width,
        "height": height,
        "dtype": str(dtype).removeprefix("mlx.core."),
        "keep": found.keep,
        "phases": dict(found.phases),
        "machine": found.machine,
        "fits": found.fits,
    }


def _asked_size(args: argparse.Namespace, config: Any) -> tuple[tuple[int, int], tuple[tuple[int, int], ...]]:
    """--size and the sizes of --references, (width, height). Raises RequestError."""
    from klein_mlx.request import check_area, check_side

    multiple = config.pixels_per_token
    width, height = parse_size(args.size, multiple, config.default_size)
    check_side("width", width, multiple)
    check_side("height", height, multiple)
    check_area(width, height)
    return (width, height), ((1024, 1024),) * integer("--references", args.references, 0, MAX_REFERENCES)


def _training(args: argparse.Namespace) -> int:
    """What training a model would take of a Mac's memory, for plain and quantized weights."""
    import mlx.core as mx

    from klein_mlx.cli.bench import source_without_files
    from klein_mlx.model.layers import Gpu
    from klein_mlx.train.memory import estimate_training, mac_for
    from klein_mlx.train.plan import training_dtype
    from klein_mlx.weights.bits import parse, settle

    source = source_without_files(args.model, args.variant)
    args.size = args.size or "512"
    if args.size.isdecimal():  # as a run's resolution is given
        args.size = f"{args.size}x{args.size}"
    size, references = _asked_size(args, source.config)
    args.method, args.rank = args.method or METHODS[0], RANK if args.rank is None else args.rank
    full = args.method == "full"
    values = {"data": "-", "output": "-" if full else "-.safetensors", "method": args.method, "rank": args.rank}
    dtype = training_dtype(mx.bfloat16 if args.dtype is None else args.dtype)
    asked = [args.quantize] if args.quantize or source.quantization else [None, *([] if full else ["8", "4"])]
    rows = []
    for bits in asked:
        options = make_options(values | ({"bits": bits} if bits else {}))
        found = estimate_training(source, options, dtype, settle(parse(bits), source), size, references, Gpu())
        rows.append({"bits": bits, "phases": dict(found.phases), "peak": found.peak, "mac": mac_for(found.peak)})
    what = "all weights" if full else f"{'DoRA' if args.method == 'dora' else 'LoRA'} of rank {args.rank}"
    if args.json:
        say_json({"model": args.model, "method": args.method, "rank": args.rank, "size": size, "training": rows})
        return 0
    shown = f", {len(references)} reference{'s' * (len(references) > 1)}" * bool(references)
    say(f"{args.model}: {what}, {size[0]} x {size[1]}{shown}")
    say("memory, estimated: pictures and captions are encoded first, and leave")
    say(f"{'bits':<8}{'pictures':>10}{'captions':>10}{'training':>10}  fits a Mac of")
    for row in rows:
        told = "".join(f"{human_bytes(row['phases'][name]):>10}" for name in ("pictures", "captions", "training"))
        say(f"{row['bits'] or '-':<8}{told}  {row['mac'] or 'none'}{' GB' * bool(row['mac'])}")
    return 0
