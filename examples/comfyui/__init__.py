"""ComfyUI nodes that make and edit pictures with a running `klein-mlx serve`.

Copy this folder into ComfyUI's custom_nodes as klein_mlx_client. It needs nothing that ComfyUI does not have; the model
runs in the server, on this machine or another. A server with a token: set KLEIN_MLX_TOKEN where ComfyUI starts, so that
no workflow file holds it.
"""

import base64
import io
import json
import os
from collections.abc import Generator
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image

SERVER = "http://127.0.0.1:7860"
SECONDS = 600.0  # without a word from the server


class KleinError(RuntimeError):
    """What the server refuses, in its words."""


def to_data_uri(picture: torch.Tensor) -> str:
    """A PNG of (H, W, 3) or, for masks, (H, W); float, 0 to 1."""
    values = (picture.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def to_tensor(uri: str) -> torch.Tensor:
    """(H, W, 3) float32, 0 to 1."""
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)


def events(server: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """The server's events for a request. Leaving the iteration closes the connection, which cancels the run."""
    try:
        parts = urlsplit(server.strip())
        kind, port = {"http": HTTPConnection, "https": HTTPSConnection}[parts.scheme], parts.port
    except (KeyError, ValueError):
        raise KleinError(f"server is {server!r}; it must be an address such as {SERVER}") from None
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get("KLEIN_MLX_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    with closing(kind(parts.hostname or "", port, timeout=SECONDS)) as connection:
        try:
            connection.request("POST", "/api/generate", json.dumps(body), headers)
            reply = connection.getresponse()
            if reply.status != 200:
                raise KleinError(_reason(reply.read(1 << 16), f"{server} answers with status {reply.status}"))
            for line in reply:
                yield json.loads(line)
        except (OSError, HTTPException, ValueError) as error:
            raise KleinError(f"{server} cannot be used ({error}); is klein-mlx serve running there?") from None


def _reason(data: bytes, otherwise: str) -> str:
    try:
        return str(json.loads(data)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return otherwise


def make(server: str, body: dict[str, Any]) -> torch.Tensor:
    """Its pictures, (B, H, W, 3) float32, 0 to 1. Raises KleinError; ComfyUI's Cancel ends the run."""
    bar, made = _Bar(), []
    with closing(events(server, {"previews": "none", **{k: v for k, v in body.items() if v is not None}})) as found:
        for event in found:
            bar.check()
            if event["type"] == "step":
                bar.show((event["picture"] * event["of"] + event["index"]) / event["of"], body["n"])
            elif event["type"] == "image":
                made.append(to_tensor(event["image"]))
            elif event["type"] == "done":
                return torch.stack(made)
            elif event["type"] in ("error", "cancelled", "superseded"):
                raise KleinError(event.get("message") or f"the run was {event['type']}")
    raise KleinError(f"{server} ended before the picture was done")


class _Bar:
    """ComfyUI's progress bar and its Cancel, where this runs within ComfyUI."""

    def __init__(self) -> None:
        try:
            from comfy.model_management import (  # type: ignore[import-not-found]
                throw_exception_if_processing_interrupted,
            )
            from comfy.utils import ProgressBar  # type: ignore[import-not-found]

            self.check, self._bar = throw_exception_if_processing_interrupted, ProgressBar(1000)
        except ImportError:
            self.check, self._bar = lambda: None, None

    def show(self, done: float, total: int) -> None:
        if self._bar is not None:
            self._bar.update_absolute(round(1000 * done / total))


def _number(default: int, low: int, high: int, step: int = 1) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": default, "min": low, "max": high, "step": step}


TEXT = ("STRING", {"multiline": True, "default": ""})
LINE = ("STRING", {"default": SERVER})
SETTINGS = {
    "width": _number(0, 0, 4096, 16),  # 0: the model's, or the picture's
    "height": _number(0, 0, 4096, 16),
    "steps": _number(0, 0, 100),  # 0: the model's
    "seed": _number(42, 0, 2**64 - 1),
    "count": _number(1, 1, 10),
    "server": LINE,
}


def _body(prompt: str, width: int, height: int, steps: int, seed: int, count: int, loras: str) -> dict[str, Any]:
    names = [name.strip() for name in loras.splitlines() if name.strip()]
    sizes = {"width": width or None, "height": height or None, "steps": steps or None}
    return {"prompt": prompt, **sizes, "seed": seed, "n": count, "lora": names or None}


class KleinGenerate:
    """Pictures from a prompt. loras: a line each, NAME or NAME:STRENGTH, of the server's LoRA folder."""

    CATEGORY, FUNCTION, RETURN_TYPES = "klein_mlx", "generate", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"prompt": TEXT, **SETTINGS}, "optional": {"loras": TEXT}}

    def generate(
        self, prompt: str, width: int, height: int, steps: int, seed: int, count: int, server: str, loras: str = ""
    ) -> tuple[torch.Tensor]:
        return (make(server, _body(prompt, width, height, steps, seed, count, loras)),)


class KleinEdit:
    """A picture changed by an instruction. image: (B, H, W, 3), the first is changed, the others are references, as is
    more. mask: white is repainted, all else stays as it is."""

    CATEGORY, FUNCTION, RETURN_TYPES = "klein_mlx", "edit", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        optional = {"mask": ("MASK",), "more": ("IMAGE",), "loras": TEXT}
        return {"required": {"image": ("IMAGE",), "prompt": TEXT, **SETTINGS}, "optional": optional}

    def edit(
        self,
        image: torch.Tensor,
        prompt: str,
        width: int,
        height: int,
        steps: int,
        seed: int,
        count: int,
        server: str,
        mask: torch.Tensor | None = None,
        more: torch.Tensor | None = None,
        loras: str = "",
    ) -> tuple[torch.Tensor]:
        pictures = [to_data_uri(one[..., :3]) for batch in (image, more) if batch is not None for one in batch]
        body = _body(prompt, width, height, steps, seed, count, loras)
        if mask is None:
            return (make(server, {**body, "references": pictures}),)
        white = to_data_uri(mask if mask.ndim == 2 else mask[0])
        masked = {"init_image": pictures[0], "init_reference": True, "mask": white, "references": pictures[1:]}
        return (make(server, {**body, **masked}),)


NODE_CLASS_MAPPINGS = {"KleinGenerate": KleinGenerate, "KleinEdit": KleinEdit}
NODE_DISPLAY_NAME_MAPPINGS = {"KleinGenerate": "klein: generate", "KleinEdit": "klein: edit"}
