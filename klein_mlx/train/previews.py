"""Pictures while training: drawn by the product's own pipeline with the LoRA as it is in the checkpoint's file."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL import Image

from klein_mlx.config import TINY
from klein_mlx.errors import CheckpointError
from klein_mlx.formats.open import open_model
from klein_mlx.images.saving import save_image
from klein_mlx.pipeline import KleinPipeline
from klein_mlx.train.plan import Plan, partner
from klein_mlx.weights.checkpoint import Source

SHARE = 0.1  # of the time
BASE_STEPS = 20
FLAT = 2.0  # a picture whose standard deviation, of 255, is less shows nothing


@dataclass(frozen=True)
class Preview:
    """A picture of one of the prompts after `step` updates; path: where it was written."""

    image: Image.Image
    prompt: str
    step: int = 0
    path: Path | None = None


class Previews:
    """Draws and collects them."""

    def __init__(self, plan: Plan, folder: Path):
        self._plan, self._folder = plan, folder
        self._source: Source | None = None
        self.seconds = 0.0  # spent so far

    def is_due(self, step: int, elapsed: float) -> bool:
        """Whether to draw after `step` updates, at a checkpoint or where it was asked for. elapsed: seconds so far."""
        options = self._plan.options
        if not options.preview:
            return False
        if options.preview_every:
            return step % options.preview_every == 0 or step == options.steps
        return step == options.steps or self.seconds <= SHARE * elapsed

    @property
    def source(self) -> Source:
        """The model that draws: as asked for; of a base model the distilled partner if it is on disk; else itself."""
        if self._source is None:
            options, own = self._plan.options, self._plan.source
            name = options.preview_model or (partner(own.config) if options.method != "full" else None)
            self._source = own
            if name:
                try:
                    self._source = open_model(name, local_files_only=options.preview_model is None)
                except CheckpointError:
                    if options.preview_model:
                        raise
        return self._source

    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call, besides the prompt."""
        options = self._plan.options
        found: dict[str, Any] = {"seed": options.seed, "width": options.resolution, "height": options.resolution}
        config = self.source.config
        return found if config.is_distilled or config.variant is TINY else found | {"num_inference_steps": BASE_STEPS}

    def draw(self, step: int, checkpoint: Path) -> Iterator[Preview]:
        """Every prompt's picture with what a checkpoint holds."""
        start = time.perf_counter()
        full = self._plan.options.method == "full"
        if full:
            source = open_model(self._plan.options.model, parts={"transformer": checkpoint / "transformer.safetensors"})
            pipe = KleinPipeline(source, dtype=self._plan.dtype, keep="nothing")
        else:
            same = self.source is self._plan.source
            bits = self._plan.options.bits if same else None
            pipe = KleinPipeline(self.source, quantize=bits, dtype=self._plan.dtype, keep="nothing")
            pipe.load_lora(checkpoint / "lora.safetensors")
        for number, prompt in enumerate(self._plan.options.preview, 1):
            output = pipe(prompt, **self.arguments())
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"step-{step:08}-{number}.png"
            save_image(output.images[0], path, True, output.recipes[0])
            yield Preview(output.images[0], prompt, step, path)
        self._sheet()
        mx.clear_cache()
        self.seconds += time.perf_counter() - start

    def _sheet(self) -> None:
        """previews.png: a row for each prompt, a column for each step."""
        files = sorted(self._folder.glob("step-*-*.png"))
        steps = sorted({path.name.split("-")[1] for path in files})
        rows = range(1, len(self._plan.options.preview) + 1)
        side = self._plan.options.resolution
        sheet = Image.new("RGB", (side * len(steps), side * len(rows)), "white")
        for column, step in enumerate(steps):
            for row in rows:
                path = self._folder / f"step-{step}-{row}.png"
                if path.exists():
                    with Image.open(path) as image:
                        sheet.paste(image, (side * column, side * (row - 1)))
        save_image(sheet, self._folder.parent / "previews.png", True)


def is_flat(image: Image.Image) -> bool:
    """Whether a picture is of one colour: what a collapsed model draws."""
    from PIL import ImageStat

    return max(ImageStat.Stat(image).stddev) < FLAT
