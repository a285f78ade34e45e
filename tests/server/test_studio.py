"""The studio page: its files, and, in a headless Chromium, that what is typed becomes a picture of the whole text."""

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from serving_tools import picture_bytes, running, until

from klein_mlx.server.app import STUDIO, STUDIO_TYPES
from klein_mlx.server.serving import Background

MAX_BYTES = 60_000
WHOLE = "a red circle left of a blue square"


class Tags(HTMLParser):
    """All tags of a page, and the text within script and style."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style"):
            self.inline += data.strip()


@pytest.fixture
def tags() -> Tags:
    parser = Tags()
    parser.feed((STUDIO / "index.html").read_text())
    return parser


def test_the_page_is_small_and_all_of_it_is_served() -> None:
    files = list(STUDIO.iterdir())
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.suffix for path in files} <= set(STUDIO_TYPES)


def test_the_policy_lets_all_of_the_page_through(tags: Tags) -> None:
    assert tags.inline == ""
    for tag, values in tags.tags:
        assert tag != "style"
        assert not [name for name in values if name == "style" or name.startswith("on")], tag
        for name in ("src", "href"):
            if value := values.get(name):
                assert value[0] == "/"
                assert (STUDIO / value[1:]).is_file(), value


def test_nothing_names_another_host() -> None:
    for path in STUDIO.iterdir():
        found = re.findall(r"https?://[^\s\"']+|@import|url\(", path.read_text())
        assert set(found) <= {"http://www.w3.org/2000/svg"}, path.name


def test_every_control_has_a_name(tags: Tags) -> None:
    labelled = {values["for"] for tag, values in tags.tags if tag == "label" and "for" in values}
    text = (STUDIO / "index.html").read_text()
    wrapped = " ".join(re.findall(r"<label.*?</label>", text, re.DOTALL))
    for tag, values in tags.tags:
        if tag in ("input", "select", "textarea"):
            name = values["id"]
            assert name in labelled or f'id="{name}"' in wrapped or values.get("aria-label"), name


def test_every_element_that_the_modules_use_is_in_the_page(tags: Tags) -> None:
    ids = {values["id"] for _, values in tags.tags if "id" in values}
    for path in STUDIO.glob("*.js"):
        text = path.read_text()
        used = set(re.findall(r'\bat\("([\w-]+)"\)|\bon\("([\w-]+)", "', text))
        assert {one or other for one, other in used} <= ids, path.name


@pytest.fixture(scope="module")
def server() -> Iterator[Background]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: klein-mlx[server-test]")
    browser = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if browser is None:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
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
    page.get_by_label("Describe a picture").press_sequentially(WHOLE, delay=40)
    wait_for_results(page, 1)
    seen = page.evaluate("seen")
    assert seen[-1] == WHOLE
    assert len(set(seen)) > 1, "no picture came while typing"
    lengths = [len(text) for text in seen]
    assert lengths == sorted(lengths), "an older answer was shown"
    assert prompts(page) == [WHOLE]
    assert page.locator("#save").get_attribute("download") == "klein-42.png"
    assert "Seed 42, 128 x 128" in page.locator("#status").text_content()


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

    page.route("**/api/generate", crash)
    page.get_by_label("Describe a picture").fill("a purple triangle")
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
