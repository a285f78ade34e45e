"""What a run yields while it works, and what it leaves.

It knows nothing of models: the pipeline fills these in, and its callers read them.
"""

import base64
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
from PIL import Image

from klein_mlx.errors import RequestError
from klein_mlx.images.saving import check_output, encode_image, save_image
from klein_mlx.request import Request

PIECE_SECONDS = 0.25


@dataclass(frozen=True)
class Step:
    """After one denoising step.

    picture: which picture of the request, from 0. index: the step, from 1. of: how many steps. sigma: the noise level
    reached. latents: (1, h, w, C) at that level. preview(): decodes the picture as the model sees it now. sketch(): the
    same without the VAE, an eighth of the side, in no time; None for a VAE whose colours are not known yet.
    """

    picture: int
    index: int
    of: int
    sigma: float
    latents: mx.array
    preview: Callable[[], Image.Image] = field(repr=False)
    sketch: Callable[[], Image.Image | None] = field(repr=False)


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    image: a PIL image; with output_type "np" a (H, W, 3) float32 array in 0..1; with "latent" the denormalized VAE
    latents, an mx.array (latent channels, H/8, W/8) as in diffusers. seed: None if initial latents were given.
    recipe: how it was made, JSON values (see klein_mlx.runtime.recipe).
    """

    index: int
    of: int
    prompt: str | None
    seed: int | None
    image: Any
    recipe: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class KleinOutput:
    """What a call returns.

    images: a list of PIL images; or, by output_type, a (B, H, W, 3) float32 array in 0..1, or an mx.array
    (B, latent channels, H/8, W/8). seeds: of each. notes: what was cut or resized, a line each. seconds: per phase.
    recipes: how each was made, JSON values (see klein_mlx.runtime.recipe). `save` puts them into the files; PIL's own
    `images[0].save` does not, since it writes no text that it is not given.
    """

    images: Any
    seeds: list[int | None]
    notes: list[str]
    seconds: dict[str, float]
    recipes: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def __getitem__(self, index: int) -> Any:
        """As in diffusers, [0] is the images."""
        return (self.images,)[index]

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """The pictures, for a notebook."""
        told = {"text/plain": repr(self)}
        if not isinstance(self.images, list) or not self.images:
            return told
        shown = [base64.b64encode(encode_image(image, ".png")).decode() for image in self.images]
        if len(shown) == 1:
            return {**told, "image/png": shown[0]}
        html = "".join(f'<img style="max-width: 24em; margin: 2px" src="data:image/png;base64,{one}">' for one in shown)
        return {**told, "text/html": html}

    def save(self, path: str | Path, overwrite: bool = False) -> list[Path]:
        """Write the pictures, each with its recipe inside; returns their paths.

        path: ending in .png, .jpg, .jpeg or .webp; of several pictures each gets its number before the suffix.
        Raises RequestError if a file exists and `overwrite` is false, for arrays, and for what the disk refuses.
        """
        if not isinstance(self.images, list):
            raise RequestError("the pictures are arrays; they can be saved with output_type 'pil'")
        path = Path(path)
        numbered = [path.with_name(f"{path.stem}-{number + 1}{path.suffix}") for number in range(len(self.images))]
        paths = [path] if len(self.images) == 1 else numbered
        for one in paths:
            check_output(one, overwrite)
        for one, image, recipe in zip(paths, self.images, self.recipes, strict=True):
            save_image(image, one, overwrite, recipe)
        return paths


class _Closed(BaseException):
    """Raised inside of a run that was closed while it worked."""


class _Pace:
    """Evaluates a phase's parts in pieces of about PIECE_SECONDS. One piece is always started before the one before it
    is waited for: a device that is told of its work only when it has none left stands still meanwhile."""

    def __init__(self) -> None:
        self._size = 1  # parts of a piece
        self._parts = 0  # of the piece that has not started
        self._since = time.perf_counter()  # the last wait ended
        self._behind: tuple[int, tuple[mx.array, ...]] | None = None  # the piece that was started last

    def part_done(self, arrays: tuple[mx.array, ...]) -> None:
        """arrays: what was computed so far, not evaluated."""
        self._parts += 1
        if self._parts < self._size:
            return
        mx.async_eval(*arrays)
        if self._behind is not None:
            count, behind = self._behind
            mx.eval(*behind)
            now = time.perf_counter()
            self._size = max(1, int(PIECE_SECONDS * count / max(now - self._since, 1e-6)))
            self._since = now
        self._behind, self._parts = (self._parts, arrays), 0


class Run:
    """A running request: iterate for its Steps and Pictures; `close()` cancels it.

    request: as checked. notes: lines for the user. seconds: wall time per phase (load, encode, steps, decode).
    watch: may be set before iterating; given a phase's name, it surrounds the phase's work wherever there is some, a
    part's load inside of the phase that needs the part. expected: bytes of memory at each phase's fullest moment, as
    estimated before anything was loaded.
    """

    def __init__(
        self, request: Request, notes: Iterable[str] = (), plan: Any = None, expected: Mapping[str, int] | None = None
    ):
        """plan: the pipeline's; None: nothing is made, the run only holds parts."""
        self.request, self.notes, self.plan, self.expected = request, [*notes], plan, dict(expected or {})
        self.on_phase: Callable[[str], None] = lambda phase: None  # called where a phase begins
        self.seconds: dict[str, float] = {"load": 0.0, "encode": 0.0, "steps": 0.0, "decode": 0.0}
        self.watch: Callable[[str], AbstractContextManager[Any]] = lambda phase: nullcontext()
        self._events: Iterator[Step | Picture] = iter(())
        self._working = self._closed = False
        self._pace = _Pace()

    def start(self, events: Iterator["Step | Picture"]) -> None:
        """Called once by the pipeline, with the generator that does the work."""
        self._events = events

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Step | Picture:
        if self._closed:
            raise StopIteration
        self._working, self._pace = True, _Pace()
        try:
            return next(self._events)
        except _Closed:
            raise StopIteration from None
        finally:
            self._working, self._pace = False, _Pace()

    def close(self) -> None:
        """Stop; what the run held is freed. While the run works (this is another thread, or a callback), it stops
        at the next part of its step."""
        self._closed = True
        close = getattr(self._events, "close", None)
        if close and not self._working:
            close()

    def cancel(self) -> None:
        """Ask from another thread: the iteration ends at the next part, and its thread then calls `close`."""
        self._closed = True

    def part_done(self, *arrays: mx.array) -> None:
        """Called between the parts of a phase (layers, blocks, strips), with what was computed so far.

        Starts to evaluate about every quarter of a second, so that Ctrl-C and `close` are seen soon; where parts are
        short, many go by at once.
        """
        self._pace.part_done(arrays)
        if self._closed:
            raise _Closed

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to a phase, less what `load` took meanwhile."""
        self.on_phase(phase)
        # The parts of another phase take another time: as many as went by at once in the last may now take seconds.
        self._pace = _Pace()
        start, loading = time.perf_counter(), self.seconds["load"]
        try:
            with self.watch(phase):
                yield
        finally:
            self._pace = _Pace()  # it holds arrays
        elapsed = time.perf_counter() - start
        self.seconds[phase] += elapsed - (self.seconds["load"] - loading if phase != "load" else 0.0)
