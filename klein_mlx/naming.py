"""What a picture's file is called: by the output asked for, or by its prompt and seed."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from klein_mlx.errors import RequestError
from klein_mlx.saving import check_output

MAX_SLUG = 60  # bytes


def slug(prompt: str) -> str:
    """The prompt's words, joined by dashes, in at most MAX_SLUG bytes; "picture" if it has none."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")
    while len(words.encode()) > MAX_SLUG:
        words = words[:-1]
    return words.strip("-") or "picture"


def output_paths(output: Path, seeds: Sequence[int], overwrite: bool) -> list[Path]:
    """One path per seed: the output itself, or with several NAME-SEED; checked before any work."""
    if len(seeds) == 1:
        paths = [output]
    else:
        paths = [output.with_name(f"{output.stem}-{seed}{output.suffix}") for seed in seeds]
    if len(set(paths)) < len(paths):
        raise RequestError("--seed has the same value twice; give different seeds")
    for path in paths:
        check_output(path, overwrite)
    return paths


def free_names(prompt: str, seeds: Sequence[int]) -> list[Path]:
    """slug-seed.png for each, or the first of slug-seed-2.png, ... that does not exist."""
    paths: list[Path] = []
    for seed in seeds:
        path, number = Path(f"{slug(prompt)}-{seed}.png"), 2
        while path in paths or os.path.lexists(path):
            path = Path(f"{slug(prompt)}-{seed}-{number}.png")
            number += 1
        check_output(path, overwrite=False)
        paths.append(path)
    return paths
