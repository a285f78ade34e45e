"""The studio page in a headless Chromium: what is typed becomes a picture of the whole text, and all else it does."""

import base64
import os
import shutil
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_tools import npm_install, opened, picture_bytes, running, until

from klein_mlx.server.serving import Background

LORAS = Path(__file__).parents[2] / "examples" / "tiny"  # silhouettes.safetensors
WHOLE = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def server() -> Iterator[Background]:
    with running(hosts=("studio.test",), loras=str(LORAS)) as server:
        yield server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: klein-mlx[server-test]")
    browser = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if browser is None:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser, args=["--no-sandbox", "--host-resolver-rules=MAP studio.test 127.0.0.1"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(server: Background, chromium: Any) -> Iterator[Any]:
    """The page, with the model ready. Afterwards: no error, and no request to another host."""
    context = chromium.new_context()
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: _check(request.url, server.url, problems))
    page.goto(server.url)
    page.locator("#worker", has_text="ready").wait_for(timeout=60_000)
    yield page
    context.close()
    assert problems == []


def _check(url: str, own: str, problems: list[str]) -> None:
    if not url.startswith((own, f"blob:{own}", "data:")):
        problems.append(f"a request to {url}")


def wait_for_results(page: Any, count: int) -> None:
    until(lambda: page.wait_for_timeout(30) or page.locator("#strip img").count() == count, 60)


def prompts(page: Any) -> list[str]:
    """Of the results, the newest first."""
    return page.locator("#strip .words").all_text_contents()


def test_typing_makes_pictures_and_the_last_is_of_the_whole_text(page: Any) -> None:
    page.evaluate(
        """() => {
            window.seen = [];
            const picture = document.getElementById("picture");
            new MutationObserver(() => seen.push(picture.alt)).observe(picture, {attributeFilter: ["alt"]});
        }"""
    )
    page.get_by_label("Describe a picture").press_sequentially(WHOLE[:12], delay=40)
    page.locator("#picture:not([hidden])").wait_for()
    page.get_by_label("Describe a picture").press_sequentially(WHOLE[12:], delay=40)
    until(lambda: page.wait_for_timeout(30) or prompts(page)[:1] == [WHOLE], 60)
    seen = page.evaluate("seen")
    assert seen[-1] == WHOLE
    assert len(set(seen)) > 1, "no picture came while typing"
    lengths = [len(text) for text in seen]
    assert lengths == sorted(lengths), "an older answer was shown"
    assert page.locator("#save").get_attribute("download") == "klein-42.png"
    assert "Seed 42, 128 x 128" in page.locator("#status").text_content()


@pytest.mark.clock
def test_the_page_is_there_within_300_ms(page: Any) -> None:
    page.reload()
    (told,) = page.evaluate("performance.getEntriesByType('navigation').map((one) => one.toJSON())")
    assert told["domContentLoadedEventEnd"] <= 300


@pytest.mark.clock
def test_a_sketch_comes_within_80_ms_of_a_key_and_a_picture_within_250(page: Any) -> None:
    words = "a green star above a yellow circle, then a purple cross !"
    assert len(words) == 57
    page.get_by_label("Describe a picture").fill("a red circle")  # what a draft takes is learned
    wait_for_results(page, 1)
    page.evaluate(
        """() => {
            window.keys = {}, window.sketches = {}, window.pictures = {}, window.order = [];
            const prompt = document.getElementById("prompt"), picture = document.getElementById("picture");
            prompt.addEventListener("input", () => (keys[prompt.value] = performance.now()), true);
            new MutationObserver(() => {
                const seen = picture.src.startsWith("data:") ? sketches : pictures;
                seen[picture.alt] ??= performance.now() - keys[picture.alt];
                order.push(picture.alt.length);
            }).observe(picture, { attributeFilter: ["src"] });
        }"""
    )
    page.get_by_label("Describe a picture").clear()
    page.get_by_label("Describe a picture").press_sequentially(words, delay=120)
    until(lambda: page.wait_for_timeout(30) or prompts(page)[:1] == [words], 60)
    sketches, pictures, order = (page.evaluate(f"{name}") for name in ("sketches", "pictures", "order"))
    assert order == sorted(order), "an older answer was shown"
    assert len(sketches) > 30
    assert statistics.median(sketches.values()) <= 80
    assert statistics.median(pictures.values()) <= 250


def test_results_survive_a_reload_and_fill_with_variations(page: Any) -> None:
    page.get_by_label("Describe a picture").fill("a green star")
    wait_for_results(page, 1)
    page.get_by_role("button", name="Vary").click()
    wait_for_results(page, 5)
    seeds = page.locator("#strip span:not(.words)").all_text_contents()
    assert len({text.partition(",")[0] for text in seeds}) == 5
    page.reload()
    wait_for_results(page, 5)
    page.locator("#strip button").last.click()
    page.locator("#picture[alt='a green star']").wait_for()
    assert page.get_by_label("Seed", exact=True).input_value() == "42"


@pytest.mark.slow
def test_the_last_200_results_are_kept(page: Any) -> None:
    page.evaluate(
        """async () => {
            const { Results } = await import("/results.js"), results = new Results(() => {});
            const board = Object.assign(document.createElement("canvas"), { width: 8, height: 8 });
            const blob = await new Promise((done) => board.toBlob(done));
            const told = { blob, seed: 1, seconds: 0, width: 8, height: 8, recipe: {} };
            for (let index = 0; index < 203; index++) await results.add({ ...told, prompt: `number ${index}` });
        }"""
    )
    page.reload()
    wait_for_results(page, 200)
    found = prompts(page)
    assert (found[0], found[-1]) == ("number 202", "number 3")
    kept = """() => new Promise((done) => {
        indexedDB.open("klein").onsuccess = ({ target }) => {
            const count = target.result.transaction("pictures").objectStore("pictures").count();
            count.onsuccess = () => done(count.result);
        };
    })"""
    until(lambda: page.evaluate(kept) == 200)


def test_a_picture_is_edited_under_a_mask(page: Any) -> None:
    asked: list[dict[str, Any]] = []
    page.on("request", lambda one: asked.append(one.post_data_json) if one.url.endswith("/api/generate") else None)
    file = {"name": "square.png", "mimeType": "image/png", "buffer": picture_bytes("blue")}
    page.locator("#files").set_input_files([file])
    page.get_by_role("img", name="Picture 1").wait_for()
    page.get_by_label("Describe a picture").fill("make it red")
    wait_for_results(page, 1)
    page.get_by_label("How much of the picture before").wait_for()
    assert len(asked[-1]["references"]) == 1
    assert "mask" not in asked[-1]
    page.get_by_role("button", name="Mask: Brush a mask").click()
    page.get_by_role("slider", name="Brush").fill("40")
    page.locator("#brush").focus()
    page.keyboard.press("Space")
    page.get_by_role("button", name="Done").click()
    until(lambda: page.wait_for_timeout(50) or "mask" in asked[-1])
    assert asked[-1]["references"] == []
    assert asked[-1]["init_image"].startswith("up_")
    wait_for_results(page, 2)
    colors = page.evaluate(
        """() => {
            const picture = document.getElementById("picture"), board = document.createElement("canvas");
            [board.width, board.height] = [picture.naturalWidth, picture.naturalHeight];
            const pen = board.getContext("2d");
            pen.drawImage(picture, 0, 0);
            return [...pen.getImageData(2, 2, 1, 1).data];
        }"""
    )
    assert colors == [0, 0, 255, 255]  # outside the mask all is as it was


def test_a_request_of_a_crashed_worker_is_made_once_more(page: Any, server: Background) -> None:
    bodies: list[str] = []

    def crash(route: Any) -> None:
        bodies.append(route.request.post_data)
        if len(bodies) == 1:
            line = '{"type":"error","code":"worker_crashed","message":"the worker process died","param":null}\n'
            route.fulfill(status=200, content_type="application/x-ndjson", body=line)
        else:
            route.continue_()

    page.get_by_label("make it while I type").evaluate("box => { box.checked = false; }")
    page.route("**/api/generate", crash)
    page.get_by_label("Describe a picture").fill("a purple triangle")
    page.keyboard.press("Control+Enter")
    wait_for_results(page, 1)
    assert len(bodies) == 2
    assert bodies[0] == bodies[1]


def test_a_second_crash_is_told_and_not_tried_again(page: Any) -> None:
    bodies: list[str] = []

    def crash(route: Any) -> None:
        bodies.append(route.request.post_data)
        line = '{"type":"error","code":"worker_crashed","message":"the worker process died","param":null}\n'
        route.fulfill(status=200, content_type="application/x-ndjson", body=line)

    page.get_by_label("make it while I type").evaluate("box => { box.checked = false; }")
    page.route("**/api/generate", crash)
    page.get_by_label("Describe a picture").fill("a purple triangle")
    page.keyboard.press("Control+Enter")
    page.locator("#status.bad", has_text="the worker process died").wait_for()
    assert len(bodies) == 2


def test_the_keyboard_reaches_everything_in_order(page: Any) -> None:
    order = []
    page.get_by_label("Describe a picture").focus()
    for _ in range(7):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert order[:6] == ["choose", "seed", "dice", "shape", "SUMMARY", "make"]


def test_a_phone_needs_no_sideways_scrolling(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.get_by_label("Describe a picture").fill("a red circle")
    wait_for_results(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    give(page, "drop", picture_bytes("blue"))
    page.get_by_role("button", name="Mask: Brush a mask").click()
    board, row = (page.locator(f"#masker {name}").bounding_box() for name in (".board", ".row"))
    assert board["x"] >= row["x"]
    assert board["x"] + board["width"] <= row["x"] + row["width"]


def give(page: Any, how: str, *files: bytes) -> None:
    """Drop or paste pictures, as a browser hands them to the page."""
    page.evaluate(
        """([how, files]) => {
            const data = new DataTransfer();
            files.forEach((text, index) => {
                const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
                data.items.add(new File([bytes], `${index}.png`, { type: "image/png" }));
            });
            const same = { bubbles: true, cancelable: true };
            if (how === "drop") document.body.dispatchEvent(new DragEvent("dragover", { ...same, dataTransfer: data }));
            window.over = document.body.className;
            const event = how === "drop"
                ? new DragEvent("drop", { ...same, dataTransfer: data })
                : new ClipboardEvent("paste", { ...same, clipboardData: data });
            document.body.dispatchEvent(event);
        }""",
        [how, [base64.b64encode(data).decode() for data in files]],
    )


def pixel(page: Any, x: float, y: float) -> Any:
    """A pixel of what is seen of the picture, at a part of its width and height."""
    frame = page.locator("#picture")
    with opened(base64.b64encode(frame.screenshot()).decode()) as image:
        return image.convert("RGB").getpixel((int(x * image.width), int(y * image.height)))


def test_pictures_are_dropped_and_pasted_up_to_four(page: Any) -> None:
    page.get_by_label("make it while I type").evaluate("box => { box.checked = false; }")
    taken = """() => {
        const data = new DataTransfer();
        data.setData("text/plain", "a star");
        const event = new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: data });
        return !document.getElementById("prompt").dispatchEvent(event);
    }"""
    assert not page.evaluate(taken), "text may be dropped into a field"
    give(page, "drop", picture_bytes("blue"), picture_bytes("red"))
    assert page.evaluate("over") == "dropping"
    page.get_by_role("img", name="Picture 2").wait_for()
    assert page.evaluate("document.body.className") == ""
    give(page, "paste", picture_bytes("green"))
    page.get_by_role("img", name="Picture 3").wait_for()
    give(page, "drop", picture_bytes("black"), picture_bytes("white"))
    page.locator("#status.bad", has_text="4 pictures are the most").wait_for()
    assert page.locator("#tray img").count() == 4
    page.get_by_role("button", name="Remove picture 2").click()
    give(page, "paste", b"no picture")
    page.locator("#status.bad", has_text="0.png is not a picture").wait_for()
    assert page.locator("#tray img").count() == 3


def white(page: Any) -> int:
    """Pixels of the mask's board in the left half, which the cursor's ring does not reach."""
    return page.evaluate(
        """() => {
            const board = document.getElementById("brush"), half = board.width / 2;
            const { data } = board.getContext("2d").getImageData(0, 0, half, board.height);
            return data.filter((value, index) => index % 4 === 3 && value === 255).length;
        }"""
    )


def test_strokes_of_the_mask_are_taken_back_one_by_one(page: Any) -> None:
    page.get_by_label("make it while I type").evaluate("box => { box.checked = false; }")
    give(page, "drop", picture_bytes("blue"))
    page.get_by_role("button", name="Mask: Brush a mask").click()
    box = page.locator("#brush").bounding_box()
    counts = [white(page)]
    for y in (0.2, 0.5, 0.8):
        page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + y * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.35 * box["width"], box["y"] + y * box["height"], steps=3)
        page.mouse.up()
        counts.append(white(page))
    assert counts == sorted(set(counts)), "every stroke adds to the mask"
    page.get_by_role("button", name="Undo").click()
    page.locator("#brush").focus()
    page.keyboard.press("Control+z")
    assert white(page) < counts[2]
    page.get_by_role("button", name="Clear", exact=True).click()
    page.get_by_role("button", name="Done").click()
    assert page.locator("#tray button").first.text_content() == "Mask"


def test_the_slider_shows_the_picture_before(page: Any) -> None:
    give(page, "drop", picture_bytes("blue", (192, 96)))  # 176 x 96 in tiny's size
    page.get_by_label("Describe a picture").fill("a yellow square")
    wait_for_results(page, 1)
    assert page.get_by_label("Shape").is_disabled()
    sizes = "(id) => { const it = document.getElementById(id); return [it.naturalWidth, it.naturalHeight]; }"
    until(lambda: page.wait_for_timeout(30) or page.evaluate(sizes, "before") == page.evaluate(sizes, "picture"))
    slider = page.get_by_label("How much of the picture before")
    after = pixel(page, 0.25, 0.5)
    slider.fill("50")
    assert pixel(page, 0.25, 0.5) == (0, 0, 255)
    right = pixel(page, 0.75, 0.5)
    slider.fill("0")
    assert pixel(page, 0.25, 0.5) == after
    assert pixel(page, 0.75, 0.5) == right


def test_a_result_is_copied_saved_and_used_as_a_reference(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_label("Describe a picture").fill("a green star")
    wait_for_results(page, 1)
    page.get_by_role("button", name="Copy").click()
    page.locator("#status", has_text="Copied.").wait_for()
    kinds = page.evaluate("navigator.clipboard.read().then((items) => items.flatMap((item) => item.types))")
    assert kinds == ["image/png"]
    with page.expect_download() as download:
        page.get_by_role("link", name="Save PNG").click()
    with opened(base64.b64encode(Path(download.value.path()).read_bytes()).decode()) as image:
        assert "a green star" in image.text["klein_mlx"]  # type: ignore[attr-defined]
    with page.expect_request(lambda one: one.url.endswith("/api/generate")) as asked:
        page.get_by_role("button", name="Use as reference").click()
    assert len(asked.value.post_data_json["references"]) == 1
    page.get_by_role("img", name="Picture 1").wait_for()


def test_a_page_of_another_machine_does_not_say_that_nothing_leaves(server: Background, chromium: Any) -> None:
    context = chromium.new_context()
    page = context.new_page()
    page.goto(server.url)
    assert page.locator("#status").text_content() == "Nothing leaves this machine."
    page.goto(server.url.replace("127.0.0.1", "studio.test"))
    assert page.locator("#status").text_content() == "Pictures are made on the machine that serves this page."
    page.get_by_label("Describe a picture").fill("a red circle")
    wait_for_results(page, 1)
    page.get_by_role("button", name="Copy").click()  # a page without TLS has no clipboard
    page.locator("#status.bad", has_text="use Save PNG").wait_for()
    context.close()


def test_a_worker_that_stays_down_is_told_in_the_banner(page: Any) -> None:
    status = page.evaluate("fetch('/api/status').then((reply) => reply.json())")
    down = {**status, "worker": "down", "reason": "the worker died 3 times"}
    page.route("**/api/status", lambda route: route.fulfill(json=down))
    page.reload()
    page.get_by_role("alert").filter(has_text="the worker died 3 times").wait_for()
    assert "stopped" in page.locator("#worker").text_content()
    page.unroute("**/api/status")
    page.get_by_role("alert").wait_for(state="hidden")


def test_a_slow_picture_is_announced_before_it_starts(page: Any) -> None:
    status = page.evaluate("fetch('/api/status').then((reply) => reply.json())")
    slow = {"encode": 2.2, "step": 3.6, "decode": 0.5, "sketch": 5.8, "seconds": 17.1}
    slow = {**status, "seconds": slow, "draft": {"side": 256, "steps": 1, "predicted": slow}}
    page.route("**/api/status", lambda route: route.fulfill(json=slow))
    page.reload()
    page.locator("#budget", has_text="256 px in 1 step, about 17 s").wait_for()
    page.evaluate(
        """() => {
            window.seen = [];
            const status = document.getElementById("status");
            new MutationObserver(() => seen.push(status.textContent)).observe(status, { childList: true });
        }"""
    )
    page.get_by_label("Describe a picture").fill("a red circle")
    wait_for_results(page, 1)
    assert page.evaluate("seen")[0] == "A picture takes about 17 s on this machine."


def test_what_is_typed_while_the_model_loads_is_made_in_its_own_size(page: Any) -> None:
    status = page.evaluate("fetch('/api/status').then((reply) => reply.json())")
    loading = {**status, "worker": "loading", "model": {"name": "tiny"}}
    page.route("**/api/status", lambda route: route.fulfill(json=loading))
    asked: list[dict[str, Any]] = []
    page.on("request", lambda one: asked.append(one.post_data_json) if one.url.endswith("/api/generate") else None)
    page.reload()
    page.locator("#worker", has_text="loading").wait_for()
    page.get_by_label("Describe a picture").fill("a red circle")
    page.wait_for_timeout(600)
    assert asked == []
    assert page.locator("#status").text_content() == "The model is being loaded ..."
    page.unroute("**/api/status")
    wait_for_results(page, 1)
    assert {(one["width"], one["height"]) for one in asked} == {(128, 128)}


def test_loras_have_sliders(page: Any) -> None:
    page.locator("summary", has_text="More settings").click()
    page.get_by_label("Describe a picture").fill("a red circle")
    wait_for_results(page, 1)
    with page.expect_request(lambda one: one.url.endswith("/api/generate")) as asked:
        page.get_by_label("silhouettes").fill("0.8")
    assert asked.value.post_data_json["lora"] == [{"name": "silhouettes", "scale": 0.8}]
    wait_for_results(page, 2)
    with page.expect_request(lambda one: one.url.endswith("/api/generate")) as asked:
        page.get_by_label("silhouettes").fill("0")
    assert "lora" not in asked.value.post_data_json


def test_escape_stops_the_run(page: Any, server: Background) -> None:
    page.get_by_label("make it while I type").evaluate("box => { box.checked = false; }")
    page.locator("#steps").evaluate("box => { box.value = 100; }")
    page.get_by_label("Describe a picture").fill("a red circle")
    page.keyboard.press("Control+Enter")
    page.locator("#status", has_text="Step").wait_for()
    page.keyboard.press("Escape")
    assert page.locator("#status").text_content() == "Stopped."
    until(lambda: server.shared.jobs.running is None)
    assert page.locator("#strip img").count() == 0


def test_variations_that_are_stopped_leave_no_trace(page: Any, server: Background) -> None:
    """No empty places, not the sketch of a picture that never came, and the focus on a button that works."""
    page.get_by_label("Describe a picture").fill("a red circle")
    wait_for_results(page, 1)
    page.locator("#steps").evaluate("box => { box.value = 100; }")
    page.get_by_role("button", name="Vary").click()
    until(lambda: page.locator("#strip .pending").count() == 4)
    page.locator("#draft", has_text="sketch").wait_for()
    page.get_by_role("button", name="Stop").press("Enter")
    assert page.locator("#status").text_content() == "Stopped."
    assert page.locator("#strip .pending").count() == 0
    assert page.locator("#draft").is_hidden()
    assert page.evaluate("document.getElementById('picture').src === document.getElementById('save').href")
    assert page.evaluate("document.activeElement.id") == "make"
    until(lambda: server.shared.jobs.running is None)


@pytest.mark.slow
def test_a_phone_in_the_network_has_a_token(chromium: Any) -> None:
    with running(host="0.0.0.0", token="a-long-token") as guarded:
        context = chromium.new_context(viewport={"width": 360, "height": 740}, has_touch=True)
        page = context.new_page()
        address = guarded.url.partition("?")[0].replace("0.0.0.0", "127.0.0.1")
        page.goto(address)
        assert "token" in page.content()
        page.goto(f"{address}?token=a-long-token")
        assert "token" not in page.url
        page.get_by_label("Describe a picture").fill("a red circle")
        wait_for_results(page, 1)
        context.close()


@pytest.mark.slow
def test_the_worker_dies_and_the_newest_request_is_made_once_more(page: Any, server: Background) -> None:
    bodies: list[str] = []
    page.on("request", lambda one: bodies.append(one.post_data) if one.url.endswith("/api/generate") else None)
    page.get_by_label("make it while I type").evaluate("box => { box.checked = false; }")
    page.locator("#steps").evaluate("box => { box.value = 90; }")
    page.get_by_label("Describe a picture").fill("a red circle")
    page.keyboard.press("Control+Enter")
    page.locator("#status", has_text="Step").wait_for()
    assert server.shared.worker.pid
    os.kill(server.shared.worker.pid, signal.SIGKILL)
    page.get_by_role("alert").filter(has_text="The model's process died").wait_for()
    wait_for_results(page, 1)
    page.get_by_role("alert").wait_for(state="hidden")
    assert len(bodies) == 2
    assert bodies[0] == bodies[1]


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core, as npm has it."""
    return (npm_install(tmp_path_factory.mktemp("axe"), "axe-core@4") / "axe-core" / "axe.min.js").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("colors", ["light", "dark"])
def test_nothing_keeps_anybody_out(page: Any, axe: str, colors: str) -> None:
    """Every state of the page by the rules of axe-core: contrast, names, roles, order."""
    page.emulate_media(color_scheme=colors, reduced_motion="reduce")
    page.evaluate(axe)
    states = {}

    def check(state: str) -> None:
        found = page.evaluate("axe.run()")["violations"]
        states[state] = [one["id"] for one in found if one["impact"] in ("serious", "critical")]

    check("empty")
    give(page, "drop", picture_bytes("blue"))
    page.get_by_label("Describe a picture").fill("make it red")
    wait_for_results(page, 1)
    for summary in page.locator("summary").all():
        summary.click()
    check("a result")
    page.get_by_role("button", name="Mask: Brush a mask").click()
    check("the mask")
    page.keyboard.press("Escape")
    page.evaluate(
        "document.getElementById('banner').hidden = false; document.getElementById('banner').textContent = 'x'"
    )
    page.evaluate("document.getElementById('status').className = 'bad'")
    page.set_viewport_size({"width": 360, "height": 740})
    check("a banner on a phone")
    assert states == dict.fromkeys(states, [])
