"""The worker process: the only one with MLX, all of which runs in its main thread.

A reader thread takes frames from the server: runs go to the main thread in order, a cancel stops the run that works,
a question is answered at once. The process ends when the server's end of the socket closes. Nothing is printed: its
stdout is stderr.
"""

import io
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klein_mlx.errors import CheckpointError, DoesNotFit, KleinError, RequestError
from klein_mlx.server.frames import HEAD, pack, unpack
from klein_mlx.server.pictures import load_picture, request_field

if TYPE_CHECKING:
    from PIL import Image

    from klein_mlx.pipeline import KleinPipeline

Send = Callable[[dict[str, Any], Sequence[bytes]], None]
GRACE_SECONDS = 2.0  # for a run to stop once the server is gone


class Engine:
    """Runs jobs on a pipeline and reports what happens; used from one thread, but for `cancel`, `estimate` and `loras`.

    send: called with an event (JSON values) and its blobs: start, step, image, then done or error, each with the job's
    id. loras: the folder of LoRAs, or None for the usual one.
    """

    def __init__(self, pipe: "KleinPipeline", send: Send, loras: str | None = None):
        from klein_mlx.formats.lora_metadata import lora_folder

        self.pipe, self.send, self.folder = pipe, send, lora_folder(loras)
        self._lock = threading.Lock()
        self._cancelled: set[str] = set()
        self._job: str | None = None
        self._run: Any = None

    def run(self, job: dict[str, Any], pictures: Sequence[bytes]) -> None:
        """Make a job's pictures. job: {"job": id, "arguments": ..., "pictures": ..., "loras": ..., "previews": ...,
        "format": ..., "quality": ...}, see `klein_mlx.server.jobs.Job`."""
        name = job["job"]
        try:
            with self._lock:
                self._job = name
                self._cancelled &= {name}  # what was cancelled just as it ended is forgotten
            self._pictures(job, self._arguments(job, pictures))
        except KleinError as error:
            self.send({"event": "error", "job": name, **describe_error(error)}, ())
        except Exception as error:
            traceback.print_exc()
            line = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.300}"
            self.send({"event": "error", "job": name, "code": "internal_error", "message": line, "param": None}, ())
        finally:
            with self._lock:
                self._job = self._run = None
                self._cancelled.discard(name)

    def cancel(self, job: str) -> None:
        """Stop a job at the next part of its step, or before it begins; from any thread."""
        with self._lock:
            self._cancelled.add(job)
            if self._job == job and self._run is not None:
                self._run.cancel()

    def estimate(self, job: dict[str, Any]) -> dict[str, Any]:
        """Peak bytes of a request without pictures of its own: {"peak", "machine", "fits"}; from any thread."""
        from klein_mlx.runtime.memory import Work

        references = tuple((int(h), int(w)) for h, w in job.get("references", ()))
        side, config = self.pipe.config.pixels_per_token, self.pipe.config
        work = Work(
            height=job["height"],
            width=job["width"],
            references=references,
            tokens=sum(h // side * (w // side) for h, w in references),
            length=config.max_sequence_length,
        )
        found = self.pipe.parts.estimate(work)
        return {"peak": found.peak, "machine": found.machine, "fits": found.fits}

    def loras(self) -> dict[str, Any]:
        """{"loras": names in the folder}; from any thread."""
        return {"loras": list(lora_files(self.folder))}

    def _arguments(self, job: dict[str, Any], pictures: Sequence[bytes]) -> dict[str, Any]:
        """What `stream` takes, the pictures opened."""
        arguments: dict[str, Any] = dict(job["arguments"])
        for told, data in zip(job["pictures"], pictures, strict=True):
            field = told["field"]
            image = load_picture(data, field)
            if told.get("alpha"):
                image = _repainted(image)
            if field == "image":
                arguments.setdefault("image", []).append(image)
            else:
                arguments[field] = image
        return arguments

    def _pictures(self, job: dict[str, Any], arguments: dict[str, Any]) -> None:
        name, start = job["job"], time.perf_counter()
        self._apply_loras(job["loras"])
        run = self.pipe.stream(**arguments)
        with self._lock:
            self._run = run
            if name in self._cancelled:
                run.cancel()
        try:
            told = {"tokens": self._tokens(run), "image_tokens": self._image_tokens(run)}
            self.send({"event": "start", "job": name, **told, "peak": max(run.expected.values())}, ())
            for event in run:
                elapsed = round(time.perf_counter() - start, 4)
                if hasattr(event, "sketch"):
                    self._step(job, event, elapsed)
                else:
                    self._picture(job, event, elapsed)
        finally:
            run.close()
        stopped = name in self._cancelled
        told = {"seconds": {phase: round(value, 4) for phase, value in run.seconds.items()}, "notes": run.notes}
        size = [run.plan.opened.width, run.plan.opened.height]
        steps = run.request.steps * len(run.request.pictures)
        self.send(
            {"event": "done", "job": name, "cancelled": stopped, "size": size, "steps": steps, **told, **memory()}, ()
        )

    def _step(self, job: dict[str, Any], step: Any, elapsed: float) -> None:
        wanted, count = job["previews"], job["preview_count"]
        image = None
        if wanted != "none" and (count is None or step.index in spread(count, step.of)):
            image = _preview(step, wanted)
        told = {"event": "step", "job": job["job"], "picture": step.picture, "index": step.index, "of": step.of}
        if image is not None:
            told |= {"width": image.width, "height": image.height}
        self.send({**told, "seconds": elapsed}, [_encoded(image, job["preview_format"])] if image is not None else ())

    def _picture(self, job: dict[str, Any], picture: Any, elapsed: float) -> None:
        from klein_mlx.images.saving import encode_image

        data = encode_image(picture.image, job["format"], picture.recipe, job["quality"])
        told = {"event": "image", "job": job["job"], "index": picture.index, "of": picture.of, "seed": picture.seed}
        size = {"width": picture.image.width, "height": picture.image.height}
        self.send({**told, **size, "seconds": elapsed, "recipe": picture.recipe}, [data])

    def _tokens(self, run: Any) -> int:
        """Text tokens of the prompts, padding left out."""
        import mlx.core as mx

        request = run.request
        tokens = self.pipe.tokenizer(list(request.prompts), request.max_sequence_length, request.literal_prompt)
        return int(mx.sum(tokens.attention_mask).item())  # type: ignore[arg-type]

    def _image_tokens(self, run: Any) -> int:
        """Tokens of the references of one picture."""
        side = self.pipe.config.pixels_per_token
        return sum(image.width // side * (image.height // side) for image in run.plan.opened.references)

    def _apply_loras(self, wanted: Sequence[Sequence[Any]]) -> None:
        """Make the pipeline's LoRAs those of a job: (name in the folder, scale) of each."""
        scales = {str(name): scale for name, scale in wanted}
        loaded = {lora.name: lora.scale for lora in self.pipe.loras}
        files = lora_files(self.folder) if scales else {}
        for name in scales:
            if name not in files:
                known = ", ".join(sorted(files)[:5]) or "none"
                raise RequestError(f"lora is {name!r}; it must be a name in the server's LoRA folder ({known})")
        for name in loaded.keys() - scales.keys():
            self.pipe.unload_lora(name)
        for name, scale in scales.items():
            if name not in loaded:
                self.pipe.load_lora(files[name], scale, name)
            elif loaded[name] != scale:
                self.pipe.set_lora_scale(name, scale)


def lora_files(folder: Path) -> dict[str, Path]:
    """The LoRAs of a folder by the names under which a request may ask for them."""
    from klein_mlx.formats.lora_metadata import files_in

    files = files_in(folder) if folder.is_dir() else []
    return {str(path.relative_to(folder).with_suffix("")): path for path in files}


def describe_error(error: KleinError) -> dict[str, Any]:
    """code, message and param of an error that the user can mend."""
    if isinstance(error, CheckpointError):
        return {"code": "model_not_loaded", "message": str(error), "param": None}
    assert isinstance(error, RequestError)
    code = "does_not_fit" if isinstance(error, DoesNotFit) else "invalid_value"
    return {"code": code, "message": str(error), "param": request_field(error)}


def memory() -> dict[str, Any]:
    """Bytes that MLX holds now, and held at most."""
    import mlx.core as mx

    return {"memory": mx.get_active_memory(), "memory_peak": mx.get_peak_memory()}


def spread(count: int, steps: int) -> set[int]:
    """Steps, of 1 to `steps`, after which `count` previews come: evenly, and before the last, which has the picture."""
    return {min(max(1, round(steps * k / (count + 1))), steps - 1) for k in range(1, count + 1)} - {0}


def _preview(step: Any, wanted: str) -> "Image.Image | None":
    """A decoded preview, or, where that does not fit in memory beside the transformer, the sketch."""
    with suppress(DoesNotFit):
        if wanted == "decoded":
            return step.preview()
    return step.sketch()


def _encoded(image: "Image.Image", suffix: str) -> bytes:
    """A preview's file, at the cost of some bytes and of its looks."""
    from klein_mlx.images.saving import FORMATS

    file, kind = io.BytesIO(), FORMATS[suffix]
    fast = {"method": 0} if kind == "WEBP" else {"compress_level": 1} if kind == "PNG" else {}
    image.save(file, format=kind, quality=80, **fast)
    return file.getvalue()


def _repainted(mask: "Image.Image") -> "Image.Image":
    """OpenAI's mask, whose transparent pixels are repainted, as ours, whose white ones are."""
    if not mask.has_transparency_data:
        raise RequestError("mask_image", rule="has no alpha channel; its transparent pixels are those to repaint")
    opaque = mask.convert("RGBA").getchannel("A")
    if opaque.getextrema()[0] > 127:  # type: ignore[operator]
        rule = "is opaque everywhere: nothing would be repainted; make transparent what is to change"
        raise RequestError("mask_image", rule=rule)
    return opaque.point(lambda alpha: 255 - alpha)


def model_facts(pipe: "KleinPipeline") -> dict[str, Any]:
    """What the server tells of the model."""
    from klein_mlx.runtime.memory import machine_memory

    config = pipe.config
    return {
        "variant": config.variant.name,
        "size": config.default_size,
        "multiple": config.pixels_per_token,
        "steps": config.variant.steps,
        "guidance": config.variant.guidance,
        "distilled": config.is_distilled,
        "embedded": config.variant.embeds_guidance,
        "length": config.max_sequence_length,
        "machine": machine_memory(),
        "predicted": predicted(pipe),
    }


def predicted(pipe: "KleinPipeline") -> dict[str, float] | None:
    """Seconds of a 256 x 256 picture on this chip: encode, step, decode; None for a chip that is not known."""
    import mlx.core as mx

    from klein_mlx.bench.predict import find_chip, picture_cost, predict

    chip = find_chip(str(mx.device_info().get("device_name", "")))
    if chip is None:
        return None
    found = predict(
        picture_cost(pipe.config, 256, 256, 1, pipe.dtype, pipe.parts.quantization, device=chip.device),
        chip,
        pipe.dtype,
    )
    return {"encode": found.encode, "step": found.step, "decode": found.decode}


def warm(pipe: "KleinPipeline") -> None:
    """Read all parts, by way of a small run whose picture nobody sees."""
    side = max(64, pipe.config.pixels_per_token)
    run = pipe.stream("warm", height=side, width=side, num_inference_steps=1, seed=0, output_type="latent")
    for _ in run:
        pass


def main(descriptor: int, settings: dict[str, Any]) -> None:
    """The process. descriptor: of the socket to the server. settings: model, pipeline, loras, warm."""
    os.dup2(2, 1)
    channel = socket.socket(fileno=descriptor)
    lock = threading.Lock()

    def send(message: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        with lock:
            channel.sendall(pack(message, blobs))

    try:
        from klein_mlx.paths import cache_folder
        from klein_mlx.pipeline import KleinPipeline
        from klein_mlx.runtime.pictures import Sketcher
        from klein_mlx.weights.bits import from_options

        arguments = dict(settings["pipeline"])
        if bits := arguments.pop("bits", None):
            arguments["quantize"] = from_options(*bits)
        pipe = KleinPipeline.from_pretrained(settings["model"], **arguments)
        folder = cache_folder()
        pipe.sketcher = Sketcher(pipe.source, folder / "sketches" if folder else None)
        engine = Engine(pipe, send, settings["loras"])
        send({"event": "ready", **model_facts(pipe), **memory()})
    except KleinError as error:
        send({"event": "failed", "message": str(error)})
        return
    jobs: queue.SimpleQueue[tuple[dict[str, Any], list[bytes]] | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, engine, jobs, send), daemon=True).start()
    while (job := jobs.get()) is not None:
        if job[0]["do"] == "warm":
            try:
                warm(pipe)
            except KleinError as error:
                sys.stderr.write(f"the model was not loaded ahead: {error}\n")
            continue
        engine.run(*job)


def _read(channel: socket.socket, engine: Engine, jobs: "queue.SimpleQueue[Any]", send: Send) -> None:
    """The reader thread: frames until the server is gone, then the process ends."""
    running = ""
    try:
        with channel.makefile("rb") as file:
            while head := file.read(HEAD.size):
                length, blobs = HEAD.unpack(head)
                message, parts = unpack(file.read(length), file.read(blobs))
                running = message.get("job", running)
                if message["do"] == "cancel":
                    engine.cancel(message["job"])
                elif message["do"] == "ask":
                    answer = engine.estimate(message) if message["what"] == "estimate" else engine.loras()
                    send({"event": "answer", "id": message["id"], **answer}, ())
                else:
                    jobs.put((message, parts))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"the server's messages ended: {error}\n")
    engine.cancel(running)
    jobs.put(None)
    time.sleep(GRACE_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    import json

    main(int(sys.argv[1]), json.loads(sys.argv[2]))
