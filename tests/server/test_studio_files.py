"""The studio page's files, without a browser: small, all its own, every control named; and how large its drafts are."""

import re
from html.parser import HTMLParser

import pytest

from klein_mlx.server.app import STUDIO, STUDIO_TYPES
from klein_mlx.server.timings import Timings

MAX_BYTES = 60_000


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


def test_modules_are_fetched_at_once_and_not_one_after_another(tags: Tags) -> None:
    ahead = {values["href"] for tag, values in tags.tags if values.get("rel") == "modulepreload"}
    used = {name for path in STUDIO.glob("*.js") for name in re.findall(r'from "(/\w+\.js)"', path.read_text())}
    assert ahead == used


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


@pytest.mark.parametrize(
    ("encode", "step", "decode", "draft"),
    [
        (2.2, 3.6, 0.5, (256, 1)),  # seconds of 256 px on an M1
        (0.25, 0.42, 0.06, (256, 2)),  # M4 Max
        (0.07, 0.12, 0.02, (512, 4)),  # M5 Max
    ],
)
def test_drafts_are_as_large_as_the_machine_makes_at_once(
    encode: float, step: float, decode: float, draft: tuple[int, int]
) -> None:
    timings = Timings()
    before = timings.draft(1024, 4)
    assert (before["side"], before["steps"], before["predicted"]) == (256, 1, None)
    timings.start({"encode": encode, "step": step, "decode": decode})
    found = timings.draft(1024, 4)
    assert (found["side"], found["steps"]) == draft
    for _ in range(12):
        timings.learn((512, 512), 4, {"encode": 0.01, "steps": 0.04, "decode": 0.01})
    found = timings.draft(1024, 4)
    assert (found["side"], found["steps"]) == (512, 4)
