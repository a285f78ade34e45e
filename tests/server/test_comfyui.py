"""The ComfyUI nodes of examples/comfyui, called as ComfyUI calls them, against a running server of tiny."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving_tools import client, lines, opened, running, until

from klein_mlx.server.serving import Background

torch = pytest.importorskip("torch", reason="ComfyUI's nodes take torch tensors")
pytestmark = pytest.mark.parity
FILE = Path(__file__).parents[2] / "examples" / "comfyui" / "__init__.py"
SMALL = {"width": 64, "height": 64, "steps": 1, "seed": 7, "count": 1}


@pytest.fixture(scope="module")
def nodes() -> Any:
    spec = importlib.util.spec_from_file_location("klein_mlx_client", FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server() -> Iterator[Background]:
    with running() as server:
        yield server


def as_comfy(nodes: Any, name: str, **values: Any) -> Any:
    """A node's first result, by its declarations alone: every required input there, none unknown."""
    node = nodes.NODE_CLASS_MAPPINGS[name]
    inputs = node.INPUT_TYPES()
    assert set(inputs["required"]) <= set(values) <= {*inputs["required"], *inputs["optional"]}
    (found,) = getattr(node(), node.FUNCTION)(**values)
    assert node.RETURN_TYPES == ("IMAGE",)
    return found


def test_pictures_are_those_of_the_server(nodes: Any, server: Background) -> None:
    found = as_comfy(nodes, "KleinGenerate", prompt="a red circle", server=server.url, **{**SMALL, "count": 2})
    assert (found.dtype, tuple(found.shape)) == (torch.float32, (2, 64, 64, 3))
    with client(server) as http:
        body = {"prompt": "a red circle", "width": 64, "height": 64, "steps": 1, "seed": 8}
        image = opened(next(one["image"] for one in lines(http, body) if one["type"] == "image")).convert("RGB")
    assert (found[1] * 255).round().to(torch.uint8).numpy().tobytes() == image.tobytes()


def test_an_edit_takes_every_picture_and_a_mask(nodes: Any, server: Background) -> None:
    blue = torch.zeros(1, 64, 64, 3)
    blue[..., 2] = 0.4
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    values = {"prompt": "make it red", "server": server.url, **SMALL}
    found = as_comfy(nodes, "KleinEdit", image=blue, mask=mask, **values)
    assert found.shape == (1, 64, 64, 3)
    assert torch.equal(found[:, :, :24], blue[:, :, :24])
    assert not torch.equal(found[:, :, 40:], blue[:, :, 40:])
    one, two = (as_comfy(nodes, "KleinEdit", image=blue, more=more, **values) for more in (None, 1 - blue))
    assert not torch.equal(one, two)


def test_zeros_are_the_models_own_values(nodes: Any, server: Background) -> None:
    values = {"width": 0, "height": 0, "steps": 0, "seed": 1, "count": 1}
    assert as_comfy(nodes, "KleinGenerate", prompt="a star", server=server.url, **values).shape == (1, 128, 128, 3)
    wide = torch.rand(1, 64, 128, 3)
    assert as_comfy(nodes, "KleinEdit", image=wide, prompt="a star", server=server.url, **values).shape[1:3] == (
        64,
        128,
    )


def test_pictures_survive_the_way_there(nodes: Any) -> None:
    picture = (torch.arange(64 * 64 * 3).reshape(64, 64, 3) % 256) / 255
    assert torch.equal(nodes.to_tensor(nodes.to_data_uri(picture)), picture)
    with opened(nodes.to_data_uri(torch.ones(8, 8))) as image:
        assert (image.mode, image.getpixel((0, 0))) == ("L", 255)


def test_errors_are_the_servers_words(nodes: Any, server: Background) -> None:
    values = {"prompt": "x", **SMALL}
    with pytest.raises(nodes.KleinError, match="prompt is empty"):
        as_comfy(nodes, "KleinGenerate", **{**values, "prompt": " "}, server=server.url)
    with pytest.raises(nodes.KleinError, match="width is 65"):
        as_comfy(nodes, "KleinGenerate", **{**values, "width": 65}, server=server.url)
    with pytest.raises(nodes.KleinError, match="must be a name in the server's LoRA folder"):
        as_comfy(nodes, "KleinGenerate", **values, server=server.url, loras="none:0.5\n")
    for address in ("file:///etc/passwd", "127.0.0.1:7860", "http://x:y"):
        with pytest.raises(nodes.KleinError, match="it must be an address"):
            as_comfy(nodes, "KleinGenerate", **values, server=address)
    with pytest.raises(nodes.KleinError, match="is klein-mlx serve running there"):
        as_comfy(nodes, "KleinGenerate", **values, server="http://127.0.0.1:1")


def test_cancel_ends_the_run(nodes: Any, server: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Exception):
        pass

    shown: list[int] = []

    def check() -> None:
        if shown:
            raise Interrupted

    management = SimpleNamespace(throw_exception_if_processing_interrupted=check)
    utils = SimpleNamespace(ProgressBar=lambda total: SimpleNamespace(update_absolute=shown.append))
    for name, module in (("comfy", SimpleNamespace()), ("comfy.model_management", management), ("comfy.utils", utils)):
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    with pytest.raises(Interrupted):
        as_comfy(nodes, "KleinGenerate", prompt="x", server=server.url, **{**SMALL, "steps": 900})
    until(lambda: server.shared.jobs.running is None)
    assert len(shown) == 1


def test_a_token_comes_from_the_environment(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(token="a-long-token") as guarded:
        address = guarded.url.partition("?")[0]
        with pytest.raises(nodes.KleinError, match="token"):
            as_comfy(nodes, "KleinGenerate", prompt="x", server=address, **SMALL)
        monkeypatch.setenv("KLEIN_MLX_TOKEN", "a-long-token")
        with pytest.raises(nodes.KleinError, match="prompt is empty"):
            as_comfy(nodes, "KleinGenerate", prompt="", server=address, **SMALL)
