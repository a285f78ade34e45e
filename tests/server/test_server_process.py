"""The process model: no MLX in the server, a worker that may die, a bounded queue, sessions, clients that leave."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from serving_tools import SMALL, client, data_uri, held, lines, opened, picture_bytes, resident, running, until

from klein_mlx.cli.output import log_as_notes
from klein_mlx.cli.serve import log_to_stderr
from klein_mlx.server.serving import Background


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Background]:
    folder = tmp_path_factory.mktemp("loras")
    for name in ("style.safetensors", "deep/style.safetensors", ".hidden.safetensors", "style.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    with running(loras=str(folder)) as server:
        yield server


@pytest.fixture
def http(server: Background) -> Iterator[httpx.Client]:
    with client(server) as http:
        yield http


def kinds(events: list[dict]) -> list[str]:
    return [event["type"] for event in events]


def test_the_command_serves_without_mlx_and_ends_at_once(tmp_path) -> None:
    code = (
        "import sys, threading, urllib.request, os, signal\n"
        "from klein_mlx.cli import main, serve\n"
        "import klein_mlx.server.serving as serving\n"
        "def ready(url):\n"
        "    def look():\n"
        "        page = urllib.request.urlopen(url).read()\n"
        "        import klein_mlx.images.saving\n"  # as web UIs' routes do
        "        mlx = [m for m in sys.modules if m == 'mlx' or m.startswith(('mlx.', 'mlx_lm'))]\n"
        "        print(len(page), mlx, flush=True)\n"
        "        sys.stdin.readline()\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    threading.Thread(target=look).start()\n"
        "real = serving.serve\n"
        "serving.serve = lambda settings, _: real(settings, ready)\n"
        "sys.exit(main.main(['serve', '--demo', '--port', '0']))\n"
    )
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as served:
        assert served.stdout
        size, modules = served.stdout.readline().split(maxsplit=1)
        taken = resident(served.pid)
        _, errors = served.communicate("\n", timeout=60)
    assert int(size) > 20
    assert modules == "[]\n"
    if sys.platform == "linux":  # 45; macOS counts what processes share
        assert taken < 60
    assert served.returncode == 128 + signal.SIGTERM, errors


def test_a_line_of_the_log_is_written_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("klein_mlx")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "level", log.level)
    log_as_notes()
    log_to_stderr(quiet=False)
    log.info("a picture")
    assert re.fullmatch(r"[\d:]{8} a picture\n", capsys.readouterr().err)


@contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen, httpx.Client]]:
    """A `klein-mlx serve --demo` of its own, and a client."""
    words = [sys.executable, "-m", "klein_mlx", "serve", "--demo", "--port", "0", "--quiet", *options]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as served:
        try:
            assert served.stdout
            with httpx.Client(base_url=served.stdout.readline().strip(), timeout=30, trust_env=False) as http:
                yield served, http
        finally:
            served.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_ends_answers_those_who_wait(number: signal.Signals) -> None:
    replies: dict[str, httpx.Response] = {}
    body = {"prompt": "a red circle", "steps": 1000}

    def ask(path: str, **more: Any) -> None:
        replies[path] = http.post(path, json=body | more)

    streams, waits = "/v1/images/generations?", "/v1/images/generations"
    asks = {streams: {"stream": True, "partial_images": 3}, waits: {}, "/sdapi/v1/txt2img": {}, "/api/generate": {}}
    with process() as (served, http):
        threads = []
        for count, (path, more) in enumerate(asks.items()):
            threads.append(threading.Thread(target=ask, args=(path,), kwargs=more))
            threads[-1].start()
            until(lambda c=count: (told := http.get("/api/status").json())["running"] and told["queue"] == c)
        until(lambda: http.get("/api/status").json()["running"].get("index"))
        start = time.monotonic()
        served.send_signal(number)
        served.wait(10)
        assert time.monotonic() - start < 3
        for thread in threads:
            thread.join(10)
    streamed, waiting, web, native = map(replies.__getitem__, asks)
    assert streamed.status_code == native.status_code == 200
    error = {"message": "the server is shutting down", "type": "server_error", "param": None, "code": "shutting_down"}
    assert json.loads(streamed.text.strip().rpartition("data: ")[2]) == {"error": error}
    assert json.loads(native.text.splitlines()[-1])["code"] == "shutting_down"
    for reply in (waiting, web):
        assert (reply.status_code, reply.json()) == (503, {"error": error})
        assert reply.headers["x-should-retry"] == "false"


def test_a_server_that_ends_while_its_model_loads_answers_too() -> None:
    replies: list[httpx.Response] = []
    with process() as (served, http):
        paths = ("/api/loras", "/sdapi/v1/loras")
        threads = [threading.Thread(target=lambda path=path: replies.append(http.get(path))) for path in paths]
        for thread in threads:
            thread.start()
        until(lambda: http.get("/healthz").json()["worker"] == "loading")
        served.terminate()
        served.wait(3)
        for thread in threads:
            thread.join(10)
    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in replies] == [(503, "shutting_down")] * 2


def test_a_picture_is_the_pipelines_own(http: httpx.Client) -> None:
    from klein_mlx import KleinPipeline

    events = lines(http, {"prompt": "a red circle", "seed": 5, "steps": 2, "width": 96, "height": 64})
    assert [kind for kind in kinds(events) if kind != "step"] == ["queued", "start", "image", "done"]
    assert 1 <= kinds(events).count("step") <= 2  # a slow reader gets fewer
    told = next(event for event in events if event["type"] == "image")
    assert told["seed"] == 5
    assert told["recipe"]["prompt"] == "a red circle"
    made = KleinPipeline.from_pretrained("tiny")("a red circle", seed=5, num_inference_steps=2, width=96, height=64)
    assert np.array_equal(np.asarray(opened(told["image"]).convert("RGB")), np.asarray(made.images[0]))


def test_several_pictures_of_one_request_have_the_next_seeds(http: httpx.Client) -> None:
    events = lines(http, {"prompt": "a blue square", "seed": 7, "n": 3, **SMALL})
    assert [event["seed"] for event in events if event["type"] == "image"] == [7, 8, 9]


def test_a_mask_keeps_what_is_black(http: httpx.Client) -> None:
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (64, 0, 128, 128))
    file = __import__("io").BytesIO()
    mask.save(file, "PNG")
    body = {"init_image": data_uri(picture_bytes("green")), "mask": data_uri(file.getvalue()), "mask_blur": 0}
    event = next(e for e in lines(http, {"prompt": "a red circle", "seed": 1, **body}) if e["type"] == "image")
    pixels = np.asarray(opened(event["image"]).convert("RGB"))
    assert (pixels[:, :64] == (0, 128, 0)).all()
    assert not (pixels[:, 64:] == (0, 128, 0)).all()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "x" * 32_001}, "prompt"),
        ({"n": 11}, "n"),
        ({"n": 10_000}, "n"),
        ({"output_type": "np"}, "output_type"),
        ({"latents": [1]}, "latents"),
        ({"references": ["http://127.0.0.1/x.png"]}, "references"),
        ({"references": ["file:///etc/passwd"]}, "references"),
        ({"references": ["/etc/passwd"]}, "references"),
        ({"references": [data_uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>")]}, "references"),
        ({"references": [data_uri(b"%PDF-1.4")]}, "references"),
        ({"mask": 5}, "mask"),
        ({"format": "gif"}, "format"),
        ({"previews": "all"}, "previews"),
        ({"session": ""}, "session"),
        ({"lora": [{"name": "x", "scale": "a"}]}, "lora"),
        ({"steps": {"a": 1}}, "steps"),
    ],
)
def test_bad_fields_are_named_before_anything_runs(http: httpx.Client, fields: dict, param: str) -> None:
    reply = http.post("/api/generate", json={"prompt": "a red circle", **fields})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"width": 17}, "width"), ({"steps": 0}, "steps"), ({"seed": -1}, "seed"), ({"lora": ["none"]}, "lora")],
)
def test_what_the_model_refuses_is_an_error_in_the_stream(http: httpx.Client, fields: dict, param: str) -> None:
    event = lines(http, {"prompt": "a red circle", **fields})[-1]
    assert (event["type"], event["code"], event["param"]) == ("error", "invalid_value", param)


def engine_events(monkeypatch, *jobs: dict) -> list[dict]:
    """What the worker's engine sends for jobs, in this process."""
    from klein_mlx import KleinPipeline
    from klein_mlx.server.asks import make_job
    from klein_mlx.server.worker import Engine

    events: list[dict] = []
    engine = Engine(KleinPipeline.from_pretrained("tiny"), lambda event, blobs: events.append(event))
    for number, (arguments, pictures) in enumerate(job.values() for job in jobs):
        job = make_job(arguments, pictures)
        engine.run({"job": str(number), **job.spec}, job.pictures)
    return events


def test_what_does_not_fit_is_refused_with_a_plan(monkeypatch) -> None:
    monkeypatch.setattr("klein_mlx.runtime.memory.machine_memory", lambda: 1_000_000)
    (event,) = engine_events(monkeypatch, {"arguments": {"prompt": "a red circle"}, "pictures": ()})
    assert (event["event"], event["code"]) == ("error", "does_not_fit")
    assert "needs" in event["message"]


def test_a_prompt_and_a_reference_are_encoded_once(monkeypatch) -> None:
    import klein_mlx.runtime.encodings as encodings

    counts: Counter[str] = Counter()
    for name in ("encode_prompt", "encode_reference"):
        real = getattr(encodings, name)

        def counted(*args, name=name, real=real):
            counts[name] += 1
            return real(*args)

        monkeypatch.setattr(encodings, name, counted)
    picture = [("image", picture_bytes("blue", (64, 64)))]
    arguments = {"height": 64, "width": 64, "num_inference_steps": 1}
    jobs = [{"arguments": {"prompt": "red", **arguments, "seed": seed}, "pictures": picture} for seed in range(3)]
    events = engine_events(monkeypatch, *jobs)
    assert [event["event"] for event in events].count("done") == 3
    assert counts == {"encode_prompt": 1, "encode_reference": 1}


def test_the_queue_is_bounded_and_everything_in_it_is_served_once(http: httpx.Client, server: Background) -> None:
    lines(http, {"prompt": "a red circle", **SMALL})
    replies: list[httpx.Response] = []

    def ask(number: int) -> None:
        with client(server) as own:
            replies.append(own.post("/api/generate", json={"prompt": f"a red circle {number}", **SMALL}))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    with held(server):
        threads[0].start()
        until(lambda: server.shared.jobs.running)
        for thread in threads[1:]:
            thread.start()
        until(lambda: len(replies) == 23)
        assert len(server.shared.jobs.batch) == 16
    for thread in threads:
        thread.join(60)
    assert Counter(reply.status_code for reply in replies) == {200: 17, 429: 23}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in replies if reply.status_code == 429)
    assert all(reply.text.count('"type":"image"') == 1 for reply in replies if reply.status_code == 200)


def test_the_newest_request_of_a_session_replaces_the_others(http: httpx.Client, server: Background) -> None:
    results: dict[int, list[dict]] = {}

    def ask(number: int) -> None:
        with client(server) as own:
            body = {"prompt": f"a red circle {number}", "session": "page", "steps": 400 if number < 3 else 1}
            results[number] = lines(own, body)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for number, thread in enumerate(threads):
        thread.start()
        until(
            lambda number=number: (job := server.shared.jobs.running) and f"{number}" in job.spec["arguments"]["prompt"]
        )
    for thread in threads:
        thread.join(30)
    assert [results[number][-1]["type"] for number in range(4)] == ["superseded"] * 3 + ["done"]


def test_live_jobs_go_first_but_starve_no_other() -> None:
    from klein_mlx.server.jobs import Job, Jobs
    from klein_mlx.server.process import Worker
    from klein_mlx.server.settings import Settings

    order = []

    async def work() -> None:
        jobs = Jobs(Worker(Settings("tiny")), 16)
        for number in range(3):
            jobs.batch.append(Job({}, id=f"batch{number}"))
        for number in range(9):
            jobs.live.append(Job({}, id=f"live{number}", session=str(number)))
        for _ in range(12):
            job = await jobs._next()
            assert job
            order.append(job.id[:-1])

    import asyncio

    asyncio.run(work())
    assert order == ["live"] * 4 + ["batch"] + ["live"] * 4 + ["batch"] + ["live"] + ["batch"]


def test_a_client_that_leaves_ends_its_run(http: httpx.Client, server: Background) -> None:
    jobs = server.shared.jobs
    with http.stream("POST", "/api/generate", json={"prompt": "a red circle", "steps": 1000}) as reply:
        events = reply.iter_lines()
        next(events)
        until(lambda: jobs.running and jobs.running.step)
        job = jobs.running
    until(lambda: jobs.running is None, 5)
    assert job is not None
    assert job.state == "cancelled"
    assert job.step["index"] < 1000
    assert lines(http, {"prompt": "a red circle", **SMALL})[-1]["type"] == "done"


def test_a_job_can_be_cancelled_by_its_id(http: httpx.Client, server: Background) -> None:
    with (
        client(server) as other,
        http.stream("POST", "/api/generate", json={"prompt": "a red circle", "steps": 1000}) as reply,
    ):
        name = reply.headers["x-klein-job"]
        assert other.delete(f"/api/jobs/{name}").status_code == 200
        assert list(reply.iter_lines())[-1] == '{"type":"cancelled"}'
        assert other.delete("/api/jobs/none").status_code == 404


def test_a_slow_reader_gets_fewer_previews() -> None:
    from klein_mlx.server.jobs import Job

    job = Job({})
    for index in range(100):
        job.put({"type": "step", "index": index, "data": b"x"})
    job.put({"type": "done"})
    job.put({"type": "step", "index": 100})

    async def read() -> list[dict]:
        return [event async for event in job.events()]

    import asyncio

    assert asyncio.run(read()) == [{"type": "step", "index": 99, "data": b"x"}, {"type": "done"}]


def test_a_dead_worker_costs_its_job_and_a_new_one_serves_the_rest(http: httpx.Client, server: Background) -> None:
    lines(http, {"prompt": "a red circle", **SMALL})
    shared, waiting = server.shared, []
    before = shared.worker.starts

    def wait() -> None:
        with client(server) as own:
            waiting.extend(lines(own, {"prompt": "a blue square", **SMALL}))

    thread = threading.Thread(target=wait)
    with http.stream("POST", "/api/generate", json={"prompt": "a red circle", "steps": 1000}) as reply:
        events = reply.iter_lines()
        next(events)
        until(lambda: shared.jobs.running and shared.jobs.running.step)
        thread.start()
        until(lambda: shared.jobs.batch)
        os.kill(shared.worker.pid, signal.SIGABRT)
        *_, last = events
    assert '"code":"worker_crashed"' in last
    thread.join(30)
    assert waiting[-1]["type"] == "done"
    assert shared.worker.starts == before + 1


def test_a_worker_that_dies_thrice_in_a_minute_stays_away() -> None:
    with running() as server, client(server) as http:
        worker = server.shared.worker
        killed: list[int | None] = [None]
        for _ in range(3):
            http.get("/")
            until(lambda: worker.state in ("loading", "ready") and worker.pid not in killed)
            killed.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)
            until(lambda: worker.pid not in killed[-1:])
        until(lambda: worker.state == "down")
        reply = http.post("/api/generate", json={"prompt": "a red circle"})
        assert reply.status_code == 503
        assert reply.headers["x-should-retry"] == "false"
        assert "died 3 times" in reply.json()["error"]["message"]
        assert http.get("/healthz").status_code == 200


def test_an_idle_worker_is_unloaded_and_comes_back() -> None:
    with running(idle_seconds=0.2) as server, client(server) as http:
        assert server.shared.worker.state == "off"  # nothing is loaded before it is needed
        assert lines(http, {"prompt": "a red circle", **SMALL})[-1]["type"] == "done"
        until(lambda: server.shared.worker.state == "off", 5)
        assert lines(http, {"prompt": "a red circle", **SMALL})[-1]["type"] == "done"


def test_a_model_that_cannot_be_read_is_told(tmp_path) -> None:
    with running(model=str(tmp_path)) as server, client(server) as http:
        event = lines(http, {"prompt": "a red circle"})[-1]
        assert (event["type"], event["code"]) == ("error", "model_not_loaded")
        assert http.post("/api/estimate", json={}).json()["error"]["code"] == "model_not_loaded"


def test_status_models_estimate_and_uploads(http: httpx.Client, server: Background) -> None:
    lines(http, {"prompt": "a red circle", **SMALL})
    status = http.get("/api/status").json()
    assert (status["worker"], status["queue"], status["model"]["variant"]) == ("ready", 0, "tiny")
    assert status["seconds"]["seconds"] > 0
    assert http.get("/api/models").json()["models"][0]["name"] == "tiny"
    assert http.get("/api/loras").json() == {"loras": [{"name": "deep/style"}, {"name": "style"}]}
    small, large = (http.post("/api/estimate", json={"width": s, "height": s}).json() for s in (128, 1024))
    assert 0 < small["peak_gb"] < large["peak_gb"]
    assert small["fits"]
    assert 0 < small["seconds"] < large["seconds"]
    assert http.post("/api/estimate", json={"width": "a"}).json()["error"]["param"] == "width"
    up = http.post("/api/uploads", files={"file": ("../../x.png", picture_bytes(), "image/png")}).json()
    assert (up["width"], up["height"]) == (128, 128)
    assert lines(http, {"prompt": "a blue circle", "references": [up["id"]], **SMALL})[-1]["type"] == "done"
    for _ in range(70):
        server.shared.uploads.add(b"x")
    assert len(server.shared.uploads) == 64
    assert http.post("/api/generate", json={"prompt": "x", "references": [up["id"]]}).status_code == 400


def test_the_gallery_holds_finished_pictures_only(tmp_path) -> None:
    from klein_mlx.images.saving import read_metadata

    (tmp_path / "secret.png").write_bytes(b"x")
    with running(save=tmp_path) as server, client(server) as http:
        lines(http, {"prompt": "<script>", "draft": True, **SMALL})
        lines(http, {"prompt": "<script>", **SMALL})
        names = http.get("/api/gallery").json()["pictures"]
        assert len(names) == 1
        reply = http.get(f"/api/gallery/{names[0]}")
        assert reply.headers["content-type"] == "image/png"
        recipe = read_metadata(tmp_path / names[0]).recipe
        assert recipe is not None
        assert recipe["prompt"] == "<script>"
        (tmp_path / "20260101-000000-00000000.png").symlink_to(tmp_path / "secret.png")
        wrong = (
            "secret.png",
            ".hidden",
            "..%2fsecret.png",
            "%2e%2e/x",
            "a%00b",
            "..%5cx",
            "%252e%252e",
            "//etc/passwd",
        )
        for name in (*wrong, "20260101-000000-00000000.png"):
            assert http.get(f"/api/gallery/{name}").status_code == 404, name
