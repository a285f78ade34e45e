"""Prompts that vary, sizes as people say them, names made of templates: pure functions, their rules and refusals."""

import random
from collections import Counter
from pathlib import Path

import pytest

from klein_mlx.cli.batch import Named, plan_names, slug
from klein_mlx.cli.options import parse_size
from klein_mlx.cli.prompts import expand, is_template
from klein_mlx.errors import RequestError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "colours.txt").write_text("\ufeff# three\nred\n\n2::{dark|light} blue\n green \n", encoding="utf-8")
    (tmp_path / "loop.txt").write_text("__loop__\n")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\n")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    return tmp_path


def test_every_option_is_drawn_and_the_seed_decides(folder: Path) -> None:
    template = "a {red|{dark|light} blue|} fox, __colours__"
    prompts = [expand(template, seed, [folder]) for seed in range(300)]
    assert prompts == [expand(template, seed, [folder]) for seed in range(300)]
    first = {prompt.split(" fox")[0] for prompt in prompts}
    assert first == {"a red", "a dark blue", "a light blue", "a "}
    assert {prompt.split(", ")[1] for prompt in prompts} == {"red", "dark blue", "light blue", "green"}


def test_weights() -> None:
    """A share of 2000 draws within 5 standard deviations of its weight's."""
    counts = Counter(expand("{3::a|b|0::c}", seed, []) for seed in range(2000))
    assert set(counts) == {"a", "b"}
    assert abs(counts["a"] - 1500) < 5 * (2000 * 0.75 * 0.25) ** 0.5


@pytest.mark.parametrize(
    "text",
    ['{"scene": "a fox", "style": {"light": "dusk"}}', "a {b} c", "a { b", "a } b", "snake_case __ x __", "plain"],
)
def test_what_is_text_stays_text(text: str) -> None:
    assert expand(text, 1, []) == text


def test_escapes() -> None:
    template = r"\{a\|b\} \_\_x\_\_ \\ {c\|d|c\|d}"
    assert is_template(template)
    assert expand(template, 1, []) == r"{a|b} __x__ \ c|d"
    assert not is_template('{"a": "b"}')


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("a {b|c", "opens at column 3 ('{b|c') has no closing brace"),
        (r"\{ a {b|{c}", "opens at column 6"),
        ("a {2$$b|c}", "a choice of several, {2$$...}; a choice takes one of its options"),
        ("a { 1-2$$ and $$b|c}", "a choice of several, { 1-2$$...}"),
        ("__../../etc/passwd__", "__../../etc/passwd__ is not a valid name; it must be letters, digits, - and _"),
        ("__a/b__", "__a/b__ is not a valid name"),
        ("__none__", "has no file none.txt in "),
        ("__loop__", "name each other without end"),
        ("__bad__", "it is not UTF-8"),
        ("__empty__", "has no line"),
    ],
)
def test_templates_that_are_refused(folder: Path, template: str, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        expand(template, 1, [folder])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_any_text_ends(folder: Path) -> None:
    """Random texts of the special characters: expanded or refused, never stuck."""
    draw = random.Random(3)
    outcomes = set()
    for _ in range(3000):
        text = "".join(draw.choice("{}|\\_:2a ") for _ in range(draw.randrange(30)))
        try:
            expand(text, 1, [folder])
            outcomes.add("expanded")
        except RequestError:
            outcomes.add("refused")
    assert outcomes == {"expanded", "refused"}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1024x768", (1024, 768)),
        ("1000 X 768", (1000, 768)),  # exact, for the request to judge
        ("16:9", (1360, 768)),
        ("1:1", (1024, 1024)),
        ("1mp", (1024, 1024)),
        ("2mp", (1456, 1456)),
        ("9:16,2mp", (1088, 1936)),
        ("2.39:1", (1568, 656)),
    ],
)
def test_sizes(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text, 16, 1024) == size


def test_sizes_are_near_what_was_asked() -> None:
    """Sides are multiples, and shape and area within what one multiple of the shorter side can change."""
    for aspect in (1, 4 / 3, 3 / 2, 16 / 9, 21 / 9, 3):
        for megapixels in (0.25, 0.5, 1, 2, 4):
            width, height = parse_size(f"{aspect:.4f}:1,{megapixels}mp", 16, 1024)
            step = 16 / min(width, height)
            assert width % 16 == height % 16 == 0
            assert abs(width / height / aspect - 1) <= step
            assert abs(width * height / (megapixels * 2**20) - 1) <= step


@pytest.mark.parametrize("text", ["", "0:1", "16:9:1", "0mp", "x", "100", "9:1", "1024x", "nan:1"])
def test_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="^--size is "):
        parse_size(text, 16, 1024)


def named(output: str | None, seed: int = 7, prompt: str = "a red/../fox") -> Named:
    return Named(None if output is None else Path(output), prompt, seed, "tiny", 4)


def names(*wanted: Named) -> list[str]:
    return [str(name.path) for name in plan_names(wanted, ".png", False)]


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names(named(None), named(None)) == ["a-red-fox-7.png", "a-red-fox-7-2.png"]
    assert names(named("x.png")) == ["x.png"]
    assert names(named("x.png"), named("x.png", 8)) == ["x-7.png", "x-8.png"]
    assert names(named("x.png"), named("x.png", prompt="b")) == ["x-1.png", "x-2.png"]
    assert names(named("{index}-{slug}-{seed}-{model}-{steps}.webp")) == ["1-a-red-fox-7-tiny-4.webp"]
    assert names(named("{{{seed}}}.png")) == ["{7}.png"]
    (dated,) = names(named("{date}_{time}.png"))
    assert len(dated) == len("2026-01-31_12-59-59.png")


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (("{sed}.png",), "has the field {sed}; there are {slug}, {seed}, {index}"),
        (("{.png",), "has a brace alone"),
        (("{slug}.png", "{slug}.png"), "would hold several pictures; add {seed} or {index}"),
        (("x.png", "x.png"), "--seed has the same value twice"),
        (("none/{seed}.png",), "output folder none does not exist"),
        (("{seed}.gif",), "must end in .png"),
    ],
)
def test_names_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outputs: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError) as refused:
        names(*(named(output) for output in outputs))
    assert words in str(refused.value)


def test_slugs() -> None:
    assert slug("🦊🦊") == "picture"
    assert slug("../../etc/passwd\0") == "etc-passwd"
    assert len(slug("長い" * 200).encode()) <= 60
