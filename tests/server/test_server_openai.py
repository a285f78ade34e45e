"""OpenAI's routes and the web UIs' ones, through the clients that people use, against one running server of tiny."""

import asyncio
import base64
import io
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from serving_tools import client, data_uri, held, opened, picture_bytes, running, until

from klein_mlx.server import native
from klein_mlx.server.serving import Background

openai = pytest.importorskip("openai", reason="the tests' clients are not installed: klein-mlx[server-test]")

LORAS = Path(__file__).resolve().parents[2] / "examples/tiny"
SMALL = {"prompt": "a red circle", "model": "tiny", "size": "64x64"}
ONE_STEP = {"extra_body": {"steps": 1, "seed": 3}}


@pytest.fixture(scope="module")
def server() -> Iterator[Background]:
    with running(loras=str(LORAS), aliases=("mine", "/home/me/mine")) as server:
        yield server


@pytest.fixture
def http(server: Background) -> Iterator[httpx.Client]:
    with client(server) as http:
        yield http


@pytest.fixture
def api(server: Background) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}v1", api_key="any", http_client=httpx.Client(trust_env=False)) as api:
        yield api


def pixels(text: str | None) -> np.ndarray:
    assert text
    return np.asarray(opened(text).convert("RGB"))


def half_mask(size: tuple[int, int] = (128, 128), inverse: bool = False) -> bytes:
    """Transparent in its right half."""
    mask, clear = Image.new("RGBA", size, (0, 0, 0, 255)), (0 if inverse else size[0] // 2)
    mask.paste((0, 0, 0, 0), (clear, 0, clear + size[0] // 2, size[1]))
    file = io.BytesIO()
    mask.save(file, "PNG")
    return file.getvalue()


# ---- OpenAI: generations ----


def test_a_picture_is_that_of_the_command_and_the_next_has_the_next_seed(api: Any, tmp_path: Path) -> None:
    from klein_mlx.cli.main import main

    reply = api.images.generate(**SMALL, n=2, extra_body={"seed": 5, "steps": 2, "guidance": 1.0})
    options = ["--model", "tiny", "--width", "64", "--height", "64", "--steps", "2", "--seed", "6", "--quiet"]
    assert main(["generate", "a red circle", *options, "-o", str(tmp_path / "x.png")]) == 0
    assert np.array_equal(pixels(reply.data[1].b64_json), np.asarray(Image.open(tmp_path / "x.png").convert("RGB")))
    assert [one.seed for one in reply.data] == [5, 6]
    assert not np.array_equal(*(pixels(one.b64_json) for one in reply.data))
    assert (reply.size, reply.output_format, reply.background) == ("64x64", "png", "opaque")
    usage = reply.usage
    assert usage.output_tokens == 2 * 4 * 4  # a token for 16 x 16 pixels
    assert usage.input_tokens_details.image_tokens == 0
    assert usage.input_tokens == usage.input_tokens_details.text_tokens > 3
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


@pytest.mark.parametrize(
    ("size", "made"), [(None, (128, 128)), ("auto", (128, 128)), ("100x71", (96, 64)), ("104x72", (112, 80))]
)
def test_sizes_are_the_nearest_and_stated(api: Any, size: str | None, made: tuple[int, int]) -> None:
    reply = api.images.generate(prompt="a red circle", **({"size": size} if size else {}), **ONE_STEP)
    assert opened(reply.data[0].b64_json).size == made
    assert reply.size == f"{made[0]}x{made[1]}"


def test_formats_and_compression(api: Any) -> None:
    kinds = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
    for kind, name in kinds.items():
        reply = api.images.generate(**SMALL, output_format=kind, **ONE_STEP)
        assert (opened(reply.data[0].b64_json).format, reply.output_format) == (name, kind)
    rough, fine = (
        api.images.generate(**SMALL, output_format="jpeg", output_compression=quality, **ONE_STEP).data[0].b64_json
        for quality in (5, 95)
    )
    assert len(rough) < len(fine)


def test_a_url_holds_for_a_while(
    api: Any, http: httpx.Client, server: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "FILE_SECONDS", 1.0)
    url = api.images.generate(**SMALL, response_format="url", output_format="webp", **ONE_STEP).data[0].url
    assert url.startswith(f"{server.url}api/files/")
    reply = http.get(url)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "image/webp")
    assert Image.open(io.BytesIO(reply.content)).size == (64, 64)
    until(lambda: http.get(url).status_code == 404)
    assert not server.shared.files


def test_loras_by_extra_body_and_unknown_fields(api: Any) -> None:
    def made(**more: Any) -> np.ndarray:
        reply = api.images.generate(**SMALL, extra_body={"steps": 1, "seed": 3, **more})
        return pixels(reply.data[0].b64_json)

    plain, styled = made(), made(loras=[{"name": "silhouettes", "scale": 1.0}])
    assert not np.array_equal(plain, styled)
    assert np.array_equal(plain, made(loras=["silhouettes:0"]))
    assert np.array_equal(plain, made())
    body = {"steps": 1, "other": [1], "ö,\n": 2, "quality": "high", "width": 512, "output_compression": 5}
    reply = api.images.with_raw_response.generate(**SMALL, user="me", extra_body=body)
    assert sorted(reply.headers["x-klein-ignored"].split(", ")) == [
        *("%C3%B6%2C%0A", "other", "output_compression", "quality", "user", "width")
    ]
    assert "x-klein-ignored" not in api.images.with_raw_response.generate(**SMALL, **ONE_STEP).headers
    with pytest.raises(openai.BadRequestError) as error:
        made(loras=["none"])
    assert error.value.param == "loras"


# ---- OpenAI: edits ----


def test_references_are_used_and_counted(api: Any) -> None:
    one, other = (("a.png", picture_bytes(color, (64, 64))) for color in ("red", "blue"))
    body = {"steps": 1, "seed": 3, "loras": [{"name": "silhouettes", "scale": 0}]}
    options = {"prompt": "a circle", "extra_body": body}
    plain, single, both = (
        api.images.generate(size="64x64", **options),
        api.images.edit(image=one, **options),
        api.images.edit(image=[one, other], n=2, **options),
    )
    assert [reply.usage.input_tokens_details.image_tokens for reply in (plain, single, both)] == [0, 16, 32]
    assert [reply.size for reply in (single, both)] == ["64x64", "64x64"]  # the first picture's
    assert len(both.data) == 2
    found = [pixels(reply.data[0].b64_json) for reply in (plain, single, both)]
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(found[1], found[2])


def test_transparent_pixels_are_repainted_and_no_others(api: Any) -> None:
    picture, green = ("a.png", picture_bytes("green")), (0, 128, 0)
    options = {"image": picture, "prompt": "a red circle", "extra_body": {"seed": 1, "mask_blur": 0}}
    right, left = (
        pixels(api.images.edit(mask=("m.png", half_mask(inverse=inverse)), **options).data[0].b64_json)
        for inverse in (False, True)
    )
    for image, kept, painted in ((right, np.s_[:, :64], np.s_[:, 64:]), (left, np.s_[:, 64:], np.s_[:, :64])):
        assert (image[kept] == green).all()
        assert (image[painted] != green).any()


def test_a_mask_belongs_to_the_first_of_several_pictures(api: Any) -> None:
    images = [("a.png", picture_bytes("green")), ("b.png", picture_bytes("blue", (64, 96)))]
    body = {"seed": 1, "mask_blur": 0, "steps": 1}
    reply = api.images.edit(image=images, mask=("m.png", half_mask()), prompt="a circle", extra_body=body)
    image = pixels(reply.data[0].b64_json)
    assert image.shape == (128, 128, 3)
    assert (image[:, :64] == (0, 128, 0)).all()
    assert reply.usage.input_tokens_details.image_tokens == 64 + 24


# ---- OpenAI: streams ----


@pytest.mark.parametrize("count", [0, 3])
def test_partial_pictures_are_spread_over_the_steps(api: Any, count: int) -> None:
    body = {"steps": 8, "seed": 3}
    events = list(api.images.generate(**SMALL, stream=True, partial_images=count, extra_body=body))
    assert [event.type for event in events] == ["image_generation.partial_image"] * count + [
        "image_generation.completed"
    ]
    assert [event.partial_image_index for event in events[:-1]] == list(range(count))
    assert {opened(event.b64_json).size for event in events} == {(64, 64)}
    assert {(event.size, event.output_format, opened(event.b64_json).format) for event in events} == {
        ("64x64", "png", "PNG")
    }
    whole = api.images.generate(**SMALL, extra_body=body)
    assert events[-1].usage.total_tokens == whole.usage.total_tokens
    assert np.array_equal(pixels(events[-1].b64_json), pixels(whole.data[0].b64_json))


def test_a_client_that_leaves_ends_its_run(api: Any, server: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, left = server.shared.jobs, []
    real = jobs.cancel
    monkeypatch.setattr(jobs, "cancel", lambda job: (left.append(job), real(job)))
    impatient = api.with_options(timeout=0.5, max_retries=0)
    for streams in (False, True):
        with pytest.raises(openai.APITimeoutError):
            list(impatient.images.generate(**SMALL, stream=streams, extra_body={"steps": 1000}))
    until(lambda: len(left) == 2 and jobs.running is None, 5)
    assert [job.state for job in left] == ["cancelled"] * 2
    assert all(job.step.get("index", 0) < 1000 for job in left)


def test_the_steps_of_previews() -> None:
    from klein_mlx.server.worker import spread

    assert [sorted(spread(count, 8)) for count in range(4)] == [[], [4], [3, 5], [2, 4, 6]]
    assert [sorted(spread(3, steps)) for steps in (1, 2, 3, 4)] == [[], [1], [1, 2], [1, 2, 3]]


def test_a_step_without_a_preview_leaves_the_one_that_waits() -> None:
    from klein_mlx.server.jobs import Job

    job = Job({})
    for event in ({"index": 1, "data": b"a"}, {"index": 2}, {"index": 3}, {"index": 4, "data": b"b"}, {"index": 5}):
        job.put({"type": "step", **event})
    job.put({"type": "done"})

    async def read() -> list[Any]:
        return [event.get("index") async for event in job.events()]

    assert asyncio.run(read()) == [4, 5, None]


def test_an_edit_streams_each_of_its_pictures(http: httpx.Client) -> None:
    """As curl sends it: repeated fields without brackets, flags and numbers as text."""
    files = [("image", ("a.png", picture_bytes("red", (64, 64)), "image/png"))] * 2
    fields = {"prompt": "a circle", "stream": "true", "partial_images": "1", "n": "2", "steps": "2", "seed": "7"}
    reply = http.post("/v1/images/edits", data=fields, files=files)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line.removeprefix("data: ")) for line in reply.text.split("\n\n") if line]
    kinds = [event["type"].rpartition(".")[2] for event in events]
    assert kinds == ["partial_image", "completed"] * 2
    assert [event["partial_image_index"] for event in events[::2]] == [0, 0]
    assert [event["seed"] for event in events[1::2]] == [7, 8]
    assert events[1]["usage"]["input_tokens_details"]["image_tokens"] == 32


# ---- OpenAI: models, other routes, errors ----


def test_models_and_their_names(api: Any, http: httpx.Client) -> None:
    assert [one.id for one in api.models.list()] == ["tiny", "mine"]  # and no path
    assert api.models.retrieve("mine").id == "mine"
    for name in ("gpt-image-1", "black-forest-labs/FLUX.2-klein-4B"):
        with pytest.raises(openai.NotFoundError) as error:
            api.models.retrieve(name)
        assert (error.value.code, error.value.param) == ("model_not_found", "model")
    for path in ("/v1/models", "/v1/images/generations", "/sdapi/v1/txt2img"):
        reply = http.options(path)
        assert reply.status_code == 200
        assert not any(name.startswith("access-control") for name in reply.headers)
    with pytest.raises(openai.NotFoundError, match="variations are not supported"):
        api.post("/images/variations", cast_to=object, body={"model": "tiny"})


def test_names_of_the_model() -> None:
    from klein_mlx.server.errors import ApiError
    from klein_mlx.server.openai import check_model
    from klein_mlx.server.settings import Settings

    hub = Settings("black-forest-labs/FLUX.2-klein-4B", aliases=("4b", "./local"))
    assert hub.names == ("black-forest-labs/FLUX.2-klein-4B", "4b", "klein-4b")
    for name in (None, *hub.names):
        check_model(hub, name)
    for name in ("gpt-image-1", "", "4B"):
        with pytest.raises(ApiError):
            check_model(hub, name)
        check_model(Settings("tiny", any_model=True), name)
    with pytest.raises(ApiError):
        check_model(Settings("tiny", any_model=True), 5)


PNG = picture_bytes("red", (64, 64))
GENERATIONS: list[tuple[dict[str, Any], int, str | None]] = [  # changes to a good body, status, param
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": " \n"}, 400, "prompt"),
    ({"prompt": ["a"]}, 400, "prompt"),
    ({"prompt": "x" * 32_001}, 400, "prompt"),
    ({"model": "gpt-image-1"}, 404, "model"),
    ({"model": ["tiny"]}, 400, "model"),
    ({"n": 0}, 400, "n"),
    ({"n": 11}, 400, "n"),
    ({"n": 1.5}, 400, "n"),
    ({"n": "2"}, 400, "n"),
    ({"n": True}, 400, "n"),
    ({"size": "1e9x1"}, 400, "size"),
    ({"size": "64"}, 400, "size"),
    ({"size": "-64x64"}, 400, "size"),
    ({"size": 64}, 400, "size"),
    ({"size": "16x16"}, 400, "size"),
    ({"size": "64x99999"}, 400, "size"),
    ({"size": "8192x8192"}, 400, "size"),
    ({"response_format": "path"}, 400, "response_format"),
    ({"output_format": "gif"}, 400, "output_format"),
    ({"output_format": {}}, 400, "output_format"),
    ({"output_compression": 101}, 400, "output_compression"),
    ({"output_compression": "5"}, 400, "output_compression"),
    ({"stream": "yes"}, 400, "stream"),
    ({"stream": True, "partial_images": 4}, 400, "partial_images"),
    ({"stream": True, "steps": 0}, 400, "steps"),
    ({"seed": -1}, 400, "seed"),
    ({"seed": "x"}, 400, "seed"),
    ({"steps": 1001}, 400, "steps"),
    ({"num_inference_steps": 0}, 400, "num_inference_steps"),
    ({"guidance": 101}, 400, "guidance"),
    ({"guidance": [{}]}, 400, "guidance"),
    ({"loras": [{"name": "../x"}]}, 400, "loras"),
    ({"lora": [{"scale": 1}]}, 400, "lora"),
    ({"loras": ["silhouettes"] * 21}, 400, "loras"),
    ({"image": "http://127.0.0.1/x.png"}, 400, "image"),
    ({"image": "/etc/passwd"}, 400, "image"),
    ({"mask": data_uri(half_mask())}, 400, "mask"),
]
EDITS: list[tuple[dict[str, str], list[tuple[str, bytes]], int, str | None]] = [  # fields, files, status, param
    ({}, [], 400, "image"),
    ({}, [("mask", half_mask((64, 64)))], 400, "image"),
    ({"image": "file:///etc/passwd"}, [("x", PNG)], 400, "image"),
    ({}, [("image[]", PNG)] * 11, 400, "image"),
    ({}, [("image", b"<svg xmlns='http://www.w3.org/2000/svg'/>")], 400, "image"),
    ({}, [("image", b"%PDF-1.4")], 400, "image"),
    ({}, [("image", PNG[:40])], 400, "image"),
    ({}, [("image", PNG[:-30])], 400, "image"),
    ({}, [("image", PNG), ("mask", half_mask((64, 64))[:-30])], 400, "mask"),
    ({}, [("image", PNG), ("mask", half_mask())], 400, "mask"),
    ({}, [("image", PNG), ("mask", picture_bytes("white", (64, 64)))], 400, "mask"),
    ({}, [("image", PNG), ("mask", picture_bytes("white", (64, 64), mode="RGBA"))], 400, "mask"),
    ({"n": "two"}, [("image", PNG)], 400, "n"),
    ({"n": "1e400"}, [("image", PNG)], 400, "n"),
    ({"stream": "TRUE"}, [("image", PNG)], 400, "stream"),
    ({"prompt": ""}, [("image", PNG)], 400, "prompt"),
    ({"loras[][name]": "a", "loras[][scale]": "x"}, [("image", PNG)], 400, "loras"),
    ({"size": "auto "}, [("image", PNG)], 400, "size"),
]


def test_bad_bodies(http: httpx.Client, server: Background) -> None:
    finished = server.shared.jobs.finished
    expected, found = [], []
    for changes, status, param in GENERATIONS:
        body = {key: value for key, value in {**SMALL, "steps": 1, **changes}.items() if value is not None}
        expected.append((str(changes)[:80], status, param))
        found.append((str(changes)[:80], *told(http.post("/v1/images/generations", json=body))))
    for fields, files, status, param in EDITS:
        name = f"{fields} {[(field, data[:4]) for field, data in files[:2]]}"
        expected.append((name, status, param))
        parts = [(field, ("../../x.png", data, "image/png")) for field, data in files or [("none", PNG)]]
        found.append((name, *told(http.post("/v1/images/edits", data={"prompt": "a", **fields}, files=parts))))
    assert len(found) >= 40
    assert found == expected
    assert server.shared.jobs.finished - finished < 25  # most of them never were a job


def told(reply: httpx.Response) -> tuple[int, str | None]:
    """Status and param; the error is in OpenAI's shape."""
    if reply.status_code == 200:
        return 200, None
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    return reply.status_code, error["param"]


# ---- web UIs ----

OPEN_WEBUI = {
    "prompt": "a red circle",
    "batch_size": 2,
    "width": 64,
    "height": 64,
    "steps": 50,
    "negative_prompt": "",
    "cfg_scale": 7.0,
    "sampler_name": "DPM++ 2M",
    "scheduler": "Karras",
}
SILLY_TAVERN = {
    "prompt": "a red circle <lora:silhouettes:0.5>",
    "negative_prompt": "ugly",
    "sampler_name": "Euler a",
    "scheduler": "Automatic",
    "steps": 20,
    "cfg_scale": 7,
    "width": 100,
    "height": 64,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 2,
    "hr_additional_modules": [],
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "seed": 7,
    "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_model_checkpoint": "other"},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}


def sd(http: httpx.Client, route: str, body: dict[str, Any]) -> tuple[list[Image.Image], dict[str, Any]]:
    """Pictures and info of a reply."""
    reply = http.post(f"/sdapi/v1/{route}", json=body)
    assert reply.status_code == 200, reply.text
    told = reply.json()
    assert isinstance(told["parameters"], dict)
    return [opened(text) for text in told["images"]], json.loads(told["info"])


def test_open_webui(http: httpx.Client) -> None:
    pictures, info = sd(http, "txt2img", OPEN_WEBUI)
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    assert (info["steps"], info["cfg_scale"], info["sampler_name"]) == (4, 1.0, "Euler")
    assert info["all_seeds"] == [info["seed"], info["seed"] + 1]
    assert len(info["infotexts"]) == 2
    assert [note.split()[0] for note in info["notes"]] == ["cfg_scale", "steps", "sampler"]


def test_silly_tavern(http: httpx.Client, api: Any) -> None:
    pictures, info = sd(http, "txt2img", SILLY_TAVERN)
    assert [picture.size for picture in pictures] == [(96, 64)]
    assert (info["prompt"], info["seed"], info["steps"]) == ("a red circle", 7, 4)
    assert [note.split()[0] for note in info["notes"]] == [
        "model",
        "cfg_scale",
        "negative_prompt",
        "steps",
        "width",
        "sampler",
    ]
    body = {"seed": 7, "loras": ["silhouettes:0.5"]}
    same = api.images.generate(prompt="a red circle", size="96x64", extra_body=body)
    assert np.array_equal(np.asarray(pictures[0].convert("RGB")), pixels(same.data[0].b64_json))


def test_steps_and_sizes_that_klein_can_do_are_followed(http: httpx.Client) -> None:
    for steps in (2, "2"):
        body = {"prompt": "a red circle", "steps": steps, "cfg_scale": 1, "width": 64, "height": 80, "seed": -1}
        pictures, info = sd(http, "txt2img", body)
        assert (pictures[0].size, info["steps"], info["notes"]) == ((64, 80), 2, [])


def test_base_models_take_a_web_uis_guidance() -> None:
    from klein_mlx.server.sdapi import WebRequest, sd_arguments

    facts = {"distilled": False, "steps": 50, "guidance": 4.0}
    body = {"prompt": "a", "steps": 20, "cfg_scale": 7, "negative_prompt": "b", "n_iter": 3, "batch_size": 4}
    web = WebRequest(body, facts)
    arguments, _ = sd_arguments(web)
    assert arguments == {
        "prompt": "a",
        "num_inference_steps": 20,
        "guidance_scale": 7.0,
        "negative_prompt": "b",
        "num_images_per_prompt": 10,
    }
    assert web.notes == ["12 pictures are requested; 10 are made"]


def test_edits_of_web_uis_take_the_nearest_value() -> None:
    """A strength of 0 keeps the picture, as far as can be: no other one does what was meant."""
    from klein_mlx.server.sdapi import WebRequest, sd_edit

    body = {"init_images": data_uri(PNG), "mask": data_uri(PNG)}
    for strength, blur, invert, told in (
        (0, -4, "0", (0.01, 0, False)),
        ("1.5", 10**9, "1", (1.0, 256, True)),
        (None, None, None, (0.75, None, False)),
        ("much", [], 1, (0.75, 0, True)),
    ):
        asked = {"denoising_strength": strength, "mask_blur": blur, "inpainting_mask_invert": invert}
        web = WebRequest(body | asked, {})
        found, _ = sd_edit(web)
        assert (found["strength"], found.get("mask_blur"), found["invert_mask"]) == told
        assert len(web.notes) == (0 if strength is None else 2)


def test_img2img(http: httpx.Client) -> None:
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (64, 0, 128, 128))
    file = io.BytesIO()
    mask.save(file, "PNG")
    picture, green = base64.b64encode(picture_bytes("green")).decode(), (0, 128, 0)
    body = {"prompt": "a red circle", "init_images": [picture], "seed": 1, "denoising_strength": 0.9, "steps": 4}
    (plain,), info = sd(http, "img2img", body)
    assert (plain.size, info["denoising_strength"], info["notes"]) == ((128, 128), 0.9, [])
    for invert, kept, painted in ((0, np.s_[:, :64], np.s_[:, 64:]), (1, np.s_[:, 64:], np.s_[:, :64])):
        masked = {**body, "mask": data_uri(file.getvalue()), "inpainting_mask_invert": invert, "mask_blur": 0}
        image = np.asarray(sd(http, "img2img", masked)[0][0].convert("RGB"))
        assert (image[kept] == green).all()
        assert (image[painted] != green).any()
    for images in ([], ["http://127.0.0.1/x.png"]):
        reply = http.post("/sdapi/v1/img2img", json={**body, "init_images": images})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "init_images")


def test_progress_and_interrupt(http: httpx.Client, server: Background) -> None:
    idle = http.get("/sdapi/v1/progress").json()
    assert (idle["progress"], idle["state"]["job_count"], idle["current_image"]) == (0.0, 0, None)
    results: list[tuple[list[Image.Image], dict[str, Any]]] = []

    def ask() -> None:
        with client(server) as own:
            body = {"prompt": "a red circle", "steps": 8, "width": 512, "height": 512, "n_iter": 10}
            results.append(sd(own, "txt2img", body))

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: server.shared.jobs.running and server.shared.jobs.running.latest)
    with held(server):
        told = http.get("/sdapi/v1/progress").json()
        assert 0 < told["progress"] < 1
        assert (told["state"]["sampling_steps"], told["state"]["job_count"]) == (8, 10)
        assert opened(told["current_image"]).format == "PNG"
        assert http.get("/sdapi/v1/progress?skip_current_image=true").json()["current_image"] is None
        assert http.post("/sdapi/v1/interrupt").json() == {}
    thread.join(30)
    ((pictures, info),) = results
    assert 1 <= len(pictures) < 10
    assert info["notes"][-1] == "interrupted"


def test_what_web_uis_ask_for(http: httpx.Client) -> None:
    def get(name: str) -> Any:
        return http.get(f"/sdapi/v1/{name}").json()

    assert get("sd-models")[0]["title"] == get("options")["sd_model_checkpoint"] == "tiny"
    assert set(get("sd-models")[0]) == {"title", "model_name", "hash", "sha256", "filename", "config"}
    assert get("samplers") == [{"name": "Euler", "aliases": ["euler"], "options": {}}]
    assert get("schedulers")[0]["label"] == "Simple"
    assert [one["name"] for one in get("loras")] == ["silhouettes"]
    assert [one["name"] for one in http.get("/api/loras").json()["loras"]] == ["silhouettes"]
    assert get("upscalers") == get("latent-upscale-modes") == get("sd-vae") == []
    assert http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "mine"}).json() == {}
    assert http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "other"}).status_code == 404


def test_png_info_tells_how_a_picture_was_made(http: httpx.Client) -> None:
    reply = http.post("/sdapi/v1/txt2img", json={"prompt": "a red circle", "width": 64, "height": 64, "seed": 5}).json()
    told = http.post("/sdapi/v1/png-info", json={"image": f"data:image/png;base64,{reply['images'][0]}"}).json()
    assert told["info"] == json.loads(reply["info"])["infotexts"][0]
    assert (told["parameters"]["Prompt"], told["parameters"]["Seed"]) == ("a red circle", "5")
    assert json.loads(told["items"]["klein_mlx"])["seed"] == 5
    plain = http.post("/sdapi/v1/png-info", json={"image": data_uri(PNG)}).json()
    assert plain == {"info": "", "items": {}, "parameters": {}}
    assert http.post("/sdapi/v1/png-info", json={"image": "x"}).json()["error"]["param"] == "image"


# ---- a worker that dies: last, for it costs the server its worker ----


def test_a_run_that_kills_the_worker_is_not_tried_again(api: Any, server: Background) -> None:
    jobs, errors = server.shared.jobs, []
    api.images.generate(**SMALL, **ONE_STEP)
    finished = jobs.finished

    def ask() -> None:
        try:
            api.images.generate(**SMALL, extra_body={"steps": 1000})
        except openai.APIStatusError as error:
            errors.append((error.status_code, error.code, error.response.headers["x-should-retry"]))

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: jobs.running and jobs.running.step)
    os.kill(server.shared.worker.pid or 0, signal.SIGABRT)
    thread.join(30)
    assert errors == [(503, "worker_crashed", "false")]
    api.images.generate(**SMALL, **ONE_STEP)
    assert jobs.finished == finished + 2  # the one that died, and this


def test_an_error_in_a_stream_is_an_object(api: Any, server: Background) -> None:
    events = api.images.generate(**SMALL, stream=True, extra_body={"steps": 1000})
    until(lambda: server.shared.jobs.running and server.shared.jobs.running.step)
    os.kill(server.shared.worker.pid or 0, signal.SIGABRT)
    with pytest.raises(openai.APIError) as error:
        list(events)
    assert "worker process died" in error.value.message
    assert error.value.body["code"] == "worker_crashed"  # type: ignore[index]
