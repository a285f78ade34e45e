"""The routes of Stable Diffusion web UIs (AUTOMATIC1111) under /sdapi/v1, for clients that speak nothing else.

Such clients hide errors and always send settings of other models: what klein does not do is replaced by its own, and
the reply's `info` says so under "notes".
"""

import base64
import json
import re
import time
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from klein_mlx.options import MAX_BLUR, MAX_SEED, MAX_SIDE, MAX_STEPS, MIN_SIDE
from klein_mlx.server.asks import arguments_of, loras_of, make_job, near, picture, pictures_of, prompt_of
from klein_mlx.server.bodies import read_json
from klein_mlx.server.errors import ApiError
from klein_mlx.server.jobs import FINAL, Job
from klein_mlx.server.openai import check_model
from klein_mlx.server.pictures import open_picture
from klein_mlx.server.replies import job_error, read_events
from klein_mlx.server.settings import MAX_IMAGES

SAMPLER, SCHEDULER = "Euler", "Simple"
SOURCE = "sdapi"
MOST_STEPS = 2  # times a distilled model's own: it was trained for those
NAMES = {  # of our arguments
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "num_images_per_prompt": "batch_size",
    "init_image": "init_images",
    "mask_image": "mask",
    "strength": "denoising_strength",
    "invert_mask": "inpainting_mask_invert",
}
_LORA = re.compile(r"<lora:([^:<>]{1,300})(?::([-+.0-9eE]{1,20}))?(?::[^<>]{0,100})?>")


class WebRequest:
    """A web UI's request, values that suit the model, and notes: a line for each value that was replaced.

    facts: the model's, as `klein_mlx.server.worker.model_facts`.
    """

    def __init__(self, values: Mapping[str, Any], facts: Mapping[str, Any]):
        self.values, self.facts = values, facts
        self.notes: list[str] = []

    def number(self, name: str, default: Any, low: float, high: float, own: Any, kind: type = int) -> Any:
        """A numeric field; `own`, with a note, if it is outside low..high; `default` if it is missing."""
        value = _number(self.values.get(name))
        if value is None:
            return default
        if not isinstance(value, int | float) or not low <= value <= high:
            self.notes.append(f"{name} {str(value)[:40]} is not possible with this model; {own:g} is used")
            return own
        return kind(value)

    def nearest(self, name: str, default: float | None, low: float, high: float, kind: type = int) -> Any:
        """A numeric field; the nearest of low..high, with a note, if it is outside; `default` if it is missing."""
        value = _number(self.values.get(name))
        own = min(max(value, low), high) if isinstance(value, int | float) else default or low
        return self.number(name, default, low, high, own, kind)

    def side(self, name: str) -> int | None:
        """A width or height, rounded to a possible one; None if it is missing."""
        value = _number(self.values.get(name))
        if not isinstance(value, int | float) or not value > 0:
            return None
        side = near(int(min(max(value, MIN_SIDE), MAX_SIDE)))
        if side != value:
            self.notes.append(f"{name} {str(value)[:40]} is not possible with this model; {side} is used")
        return side


def sd_arguments(web: WebRequest) -> tuple[dict[str, Any], list[list[Any]]]:
    """The product's arguments, and the LoRAs, of a web UI's request. Raises ApiError."""
    values, facts = web.values, web.facts
    prompt, loras = _loras_in(prompt_of(values))
    distilled, own = facts["distilled"], facts["steps"]
    most = MOST_STEPS * own if distilled else MAX_STEPS
    guidance = web.number("cfg_scale", None, 1, 1 if distilled else 100, facts["guidance"], float)
    negative = values.get("negative_prompt")
    if negative and ((guidance or facts["guidance"]) <= 1 or facts.get("embedded")):
        web.notes.append("negative_prompt has no effect with this model")
        negative = None
    count = web.number("batch_size", 1, 1, 10**6, 1) * web.number("n_iter", 1, 1, 10**6, 1)
    if count > MAX_IMAGES:
        web.notes.append(f"{count} pictures are requested; {MAX_IMAGES} are made")
    seed = _number(values.get("seed"))
    arguments = {
        "num_inference_steps": web.number("steps", None, 1, most, own),
        "guidance_scale": guidance,
        "negative_prompt": negative if isinstance(negative, str) else None,
        "num_images_per_prompt": min(count, MAX_IMAGES),
        "seed": int(seed) if isinstance(seed, int | float) and 0 <= seed <= MAX_SEED else None,
        "width": web.side("width"),
        "height": web.side("height"),
    }
    sampler = values.get("sampler_name") or values.get("sampler_index")
    if isinstance(sampler, str) and sampler != SAMPLER:
        web.notes.append(f"sampler {sampler[:40]} is not known; {SAMPLER} is used")
    if values.get("enable_hr"):
        web.notes.append("enable_hr has no effect: ask for the full size at once")
    return {"prompt": prompt, **arguments_of(arguments, [])}, loras


def sd_edit(web: WebRequest) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    """Arguments and pictures of img2img. Raises ApiError."""
    values = web.values
    first = values.get("init_images")
    first = first[0] if isinstance(first, list) and first else first
    if not first:
        raise ApiError(400, "init_images is missing; send a picture, as base64", "init_images")
    pictures = [("init_image", picture(first, "init_images", {})), *pictures_of({"mask": values.get("mask")}, {})]
    arguments: dict[str, Any] = {"strength": web.nearest("denoising_strength", 0.75, 0.01, 1, float)}
    if len(pictures) > 1:
        arguments["invert_mask"] = bool(_number(values.get("inpainting_mask_invert")))
        arguments["mask_blur"] = web.nearest("mask_blur", None, 0, MAX_BLUR)
    return arguments_of(arguments, []), pictures


def _number(value: Any) -> Any:
    """Parse a number that a client sent as text; return anything else unchanged."""
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,20}(\.\d{1,20})?", value):
        return float(value) if "." in value else int(value)
    return value


def _loras_in(prompt: str) -> tuple[str, list[list[Any]]]:
    """Split a prompt into its text and its <lora:NAME:SCALE> tags. Raises ApiError."""
    tags = [f"{match[1]}:{match[2] or 1}" for match in _LORA.finditer(prompt)]
    text = _LORA.sub("", prompt).strip() if tags else prompt
    return prompt_of({"prompt": text}), loras_of({"lora": tags})


# ---- requests ----


async def txt2img(request: Request) -> Response:
    """POST txt2img."""
    return await _make(request, edits=False)


async def img2img(request: Request) -> Response:
    """POST img2img."""
    return await _make(request, edits=True)


async def _facts(request: Request) -> dict[str, Any]:
    """The model's facts; starts the worker if it has never run."""
    worker = request.app.state.jobs.worker
    if not worker.facts:
        await worker.ready()
    return worker.facts


async def _make(request: Request, edits: bool) -> Response:
    state = request.app.state
    values = await read_json(request)
    web = WebRequest(values, await _facts(request))
    override = values.get("override_settings")
    try:
        check_model(state.settings, override.get("sd_model_checkpoint") if isinstance(override, dict) else None)
    except ApiError as error:
        web.notes.append(error.message)
    arguments, loras = sd_arguments(web)
    more, pictures = sd_edit(web) if edits else ({}, [])
    job = make_job(arguments | more, pictures, loras=loras, previews="sketch", preview_format=".png")
    job.source = SOURCE
    state.submit(job)
    made: list[dict[str, Any]] = []
    cancelled = True
    async with aclosing(read_events(request, job)) as events:
        async for event in events:
            if event["type"] == "image":
                made.append(event)
            elif event["type"] == "done":
                cancelled, web.notes = False, [*web.notes, *event["notes"]]
            elif event["type"] in FINAL and event["type"] != "cancelled":
                raise job_error(event, NAMES)
    blobs = [event["data"] for event in made]
    if not blobs and job.latest:  # interrupted before the first picture: its last preview
        blobs = [job.latest]
    if cancelled:
        web.notes.append("interrupted")
    images = [base64.b64encode(data).decode() for data in blobs]
    parameters = {name: value for name, value in values.items() if name not in ("init_images", "mask")}
    info = _info(state.settings.name, job, made, web.notes)
    return JSONResponse({"images": images, "parameters": parameters, "info": json.dumps(info)})


def _info(model: str, job: Job, made: list[dict[str, Any]], notes: list[str]) -> dict[str, Any]:
    """The reply's `info`: the values that were used, under a web UI's names."""
    from klein_mlx.images.saving import parameters_text

    recipe = made[0]["recipe"] if made else {}
    seeds = [event["seed"] for event in made]
    prompt = job.spec["arguments"]["prompt"]
    return {
        "prompt": prompt,
        "all_prompts": [prompt] * len(seeds),
        "negative_prompt": job.spec["arguments"].get("negative_prompt", ""),
        "seed": seeds[0] if seeds else -1,
        "all_seeds": seeds,
        "width": made[0]["width"] if made else 0,
        "height": made[0]["height"] if made else 0,
        "steps": recipe.get("steps"),
        "cfg_scale": recipe.get("guidance"),
        "denoising_strength": recipe.get("strength"),
        "sampler_name": SAMPLER,
        "batch_size": len(seeds),
        "sd_model_name": model,
        "infotexts": [parameters_text(event["recipe"]) for event in made],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "notes": notes,
    }


async def progress(request: Request) -> Response:
    """GET progress of the running job, also of one that came by another API."""
    jobs = request.app.state.jobs
    job = jobs.running
    step = job.step if job else {}
    of = step.get("of", 0)
    count = job.spec["arguments"].get("num_images_per_prompt", 1) if job else 0
    done = (step["picture"] + step["index"] / of) / count if step else 0.0
    shows = job and job.source == SOURCE and request.query_params.get("skip_current_image", "").lower() != "true"
    image = job.latest if job and shows else None
    state = {
        "job": job.id if job else "",
        "job_count": count,
        "job_no": step.get("picture", 0),
        "sampling_step": step.get("index", 0),
        "sampling_steps": of,
        "interrupted": False,
        "skipped": False,
    }
    return JSONResponse(
        {
            "progress": min(done, 1.0),
            "eta_relative": round(step["seconds"] * (1 / done - 1), 2) if done else 0.0,
            "state": state,
            "current_image": base64.b64encode(image).decode() if image else None,
            "textinfo": None,
        }
    )


async def interrupt(request: Request) -> Response:
    """POST interrupt or skip: cancel the running job if it came by these routes."""
    jobs = request.app.state.jobs
    if jobs.running is not None and jobs.running.source == SOURCE:
        jobs.cancel(jobs.running)
    return JSONResponse({})


async def options(request: Request) -> Response:
    """GET options; POST options, which may only name the served model."""
    settings = request.app.state.settings
    if request.method == "POST":
        check_model(settings, (await read_json(request)).get("sd_model_checkpoint"))
        return JSONResponse({})
    return JSONResponse({"sd_model_checkpoint": settings.name, "sd_checkpoint_hash": "", "samples_format": "png"})


async def models(request: Request) -> Response:
    """GET sd-models: the served one."""
    name = request.app.state.settings.name
    model = {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
    return JSONResponse([model])


async def samplers(request: Request) -> Response:
    """GET samplers."""
    return JSONResponse([{"name": SAMPLER, "aliases": [SAMPLER.lower()], "options": {}}])


async def schedulers(request: Request) -> Response:
    """GET schedulers."""
    return JSONResponse([{"name": SCHEDULER.lower(), "label": SCHEDULER, "aliases": None}])


async def loras(request: Request) -> Response:
    """GET loras: names for <lora:NAME:1> in a prompt, without paths."""
    answer = await request.app.state.jobs.worker.ask("loras")
    return JSONResponse([{"name": name, "alias": name, "path": name, "metadata": {}} for name in answer["loras"]])


async def png_info(request: Request) -> Response:
    """POST png-info: the generation parameters in a picture's metadata."""
    from klein_mlx.images.saving import metadata_of, parse_parameters

    data = picture((await read_json(request)).get("image"), "image", {})
    with open_picture(data, "image") as image:
        metadata = metadata_of(image.info)
    text = metadata.parameters or ""
    parsed = parse_parameters(text)
    parameters = {"Prompt": parsed["prompt"], "Negative prompt": parsed.get("negative", ""), **parsed["settings"]}
    items = {"parameters": text} if text else {}
    if metadata.recipe is not None:
        items["klein_mlx"] = json.dumps(metadata.recipe)
    return JSONResponse({"info": text, "items": items, "parameters": parameters if text else {}})


async def nothing(request: Request) -> Response:
    """GET of a list that clients request and that is always empty."""
    return JSONResponse([])


EMPTY = ("upscalers", "latent-upscale-modes", "sd-vae", "sd-modules", "hypernetworks", "prompt-styles")
ROUTES = [
    Route(f"/sdapi/v1/{name}", handler, methods=methods)
    for name, handler, methods in (
        ("txt2img", txt2img, ["POST"]),
        ("img2img", img2img, ["POST"]),
        ("progress", progress, ["GET"]),
        ("interrupt", interrupt, ["POST"]),
        ("skip", interrupt, ["POST"]),
        ("options", options, ["GET", "POST"]),
        ("sd-models", models, ["GET"]),
        ("samplers", samplers, ["GET"]),
        ("schedulers", schedulers, ["GET"]),
        ("loras", loras, ["GET"]),
        ("png-info", png_info, ["POST"]),
        *((name, nothing, ["GET"]) for name in EMPTY),
    )
]
