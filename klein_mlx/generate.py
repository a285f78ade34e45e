"""`klein-mlx generate`: a request from the options, its pictures into files, their paths on stdout."""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klein_mlx.errors import RequestError
from klein_mlx.options import add_generate_arguments as add_arguments

if TYPE_CHECKING:
    from klein_mlx.events import Run
    from klein_mlx.pipeline import KleinPipeline

__all__ = ["add_arguments", "run"]


def _slug(prompt: str) -> str:
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")
    while len(words.encode()) > 60:
        words = words[:-1]
    return words.strip("-") or "picture"


def _output_paths(args: argparse.Namespace, run: "Run") -> list[Path]:
    """One path per picture; checked before any work."""
    from klein_mlx.images import check_output

    pictures = run.request.pictures
    if args.output is None:
        return _free_names(_slug(args.prompt), [seed for _, seed in pictures])
    if len(pictures) == 1:
        paths = [args.output]
    else:
        stem, suffix = args.output.stem, args.output.suffix
        paths = [args.output.with_name(f"{stem}-{seed}{suffix}") for _, seed in pictures]
    if len(set(paths)) < len(paths):
        raise RequestError("--seed has the same value twice; give different seeds")
    for path in paths:
        check_output(path, args.force)
    return paths


def _free_names(slug: str, seeds: Sequence[int]) -> list[Path]:
    """slug-seed.png for each, or the first of slug-seed-2.png, ... that does not exist."""
    from klein_mlx.images import check_output

    paths: list[Path] = []
    for seed in seeds:
        path, number = Path(f"{slug}-{seed}.png"), 2
        while path in paths or os.path.lexists(path):
            path = Path(f"{slug}-{seed}-{number}.png")
            number += 1
        check_output(path, overwrite=False)
        paths.append(path)
    return paths


def _say(args: argparse.Namespace, line: str) -> None:
    if not args.quiet:
        print(line, file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """Make the pictures that the parsed options ask for. Returns the exit code; raises KleinError."""
    if args.prompt is None:
        raise RequestError('no prompt is given; for example: klein-mlx generate "a red fox in the snow"')
    if args.output is not None:
        from klein_mlx.images import check_output

        check_output(args.output, args.force or args.count > 1 or len(args.seed or ()) > 1)
    pipe, run = _open(args)
    paths = _output_paths(args, run)
    edit = run.request.edit
    if edit and (edit.mask_image is not None or edit.extends) and any(p.suffix.lower() != ".png" for p in paths):
        _say(args, f"{paths[0].suffix} changes every pixel a little; .png keeps those that are not painted exactly")
    seeds = ", ".join(str(seed) for seed in run.request.seeds)
    untold = args.seed is None and args.output is not None and not args.json  # by no name, option or result
    if not args.quiet or untold:
        print(f"seed {seeds}" if len(run.request.seeds) == 1 else f"seeds {seeds}", file=sys.stderr)
    files = []
    for image, path in zip(_pictures(args, run), paths, strict=True):
        from klein_mlx.images import save_image, save_image_free

        if args.output is None:
            path = save_image_free(image, path)
        else:
            save_image(image, path, args.force)
        files.append(str(path))
        if not args.json:
            print(path, flush=True)
    if args.json:
        print(json.dumps(_report(pipe, run, files)), flush=True)
    return 0


def _open(args: argparse.Namespace) -> "tuple[KleinPipeline, Run]":
    from klein_mlx.convert import SMALL_DECODER
    from klein_mlx.pipeline import KleinPipeline

    if args.small_decoder and args.vae:
        raise RequestError("--small-decoder and --vae both name a VAE; give one of them")
    if args.quiet:
        logging.getLogger("klein_mlx").setLevel(logging.ERROR)
    pipe = KleinPipeline.from_pretrained(
        args.model,
        quantize=args.quantize,
        dtype=args.dtype,
        keep=args.keep,
        revision=args.revision,
        local_files_only=args.offline,
        vae=SMALL_DECODER if args.small_decoder else args.vae,
        transformer=args.transformer,
        text_encoder=args.text_encoder,
    )
    run = pipe.stream(
        args.prompt,
        image=args.image,
        large_reference=args.large_reference,
        reuse_references=args.reuse_references,
        init_image=args.init_image,
        strength=args.strength,
        mask_image=args.mask,
        mask_blur=args.mask_blur,
        invert_mask=args.invert_mask,
        padding_mask_crop=args.mask_crop,
        extend=args.extend,
        init_reference=args.init_reference,
        width=args.width,
        height=args.height,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        negative_prompt=args.negative,
        batch_guidance=args.batch_guidance,
        num_images_per_prompt=args.count,
        seed=args.seed[0] if args.seed and len(args.seed) == 1 else args.seed,
        max_sequence_length=args.max_sequence_length,
    )
    return pipe, run


def _pictures(args: argparse.Namespace, run: "Run") -> Any:
    """The run's images as they are finished, with a progress bar over all steps and the notes as they come."""
    from tqdm import tqdm

    from klein_mlx.events import Picture

    total = run.request.steps * len(run.request.pictures)
    told = 0
    with tqdm(total=total, desc="steps", disable=args.quiet or not sys.stderr.isatty(), leave=False) as bar:
        for event in run:
            for note in run.notes[told:]:
                bar.write(note, file=sys.stderr) if not args.quiet else None
            told = len(run.notes)
            if isinstance(event, Picture):
                yield event.image
            else:
                bar.update()


def _report(pipe: "KleinPipeline", run: "Run", files: list[str]) -> dict[str, Any]:
    import mlx.core as mx

    return {
        "files": files,
        "seeds": [seed for _, seed in run.request.pictures],
        "model": pipe.config.variant.name,
        "steps": run.request.steps,
        "keep": pipe.parts.keep,
        "notes": run.notes,
        "seconds": {phase: round(seconds, 3) for phase, seconds in run.seconds.items()},
        "peak_memory": mx.get_peak_memory(),
    }
