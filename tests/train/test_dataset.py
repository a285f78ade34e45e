"""Pictures and captions on disk: every layout gives the same samples, and a fault names the file."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from klein_mlx.errors import RequestError
from klein_mlx.train.dataset import ASPECTS, Order, bucket_of, check_items, read_items, split_held_out
from klein_mlx.train.options import TrainOptions

COLOURS = ("red", "green", "blue")


def picture(path: Path, colour: str, size: tuple[int, int] = (128, 128)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def with_texts(folder: Path) -> TrainOptions:
    for colour in COLOURS:
        picture(folder / f"{colour}.png", colour)
        (folder / f"{colour}.txt").write_text(f"a {colour} field\n")
    return TrainOptions(str(folder), "x.safetensors")


def with_jsonl(folder: Path) -> TrainOptions:
    rows = [{"file_name": picture(folder / f"{c}.png", c).name, "text": f"a {c} field"} for c in COLOURS]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return TrainOptions(str(folder / "metadata.jsonl"), "x.safetensors")


def with_csv(folder: Path) -> TrainOptions:
    rows = [f"{picture(folder / f'{c}.png', c).name},a {c} field" for c in COLOURS]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    return TrainOptions(str(folder), "x.safetensors")


def read(options: TrainOptions) -> list[tuple[Any, ...]]:
    items = check_items(replace(options, resolution=128), 16).items
    return sorted(
        (item.file.stem.removesuffix("_out"), item.caption, item.size, item.digest, item.reference_digests)
        for item in items
    )


@pytest.mark.parametrize("other", [with_jsonl, with_csv])
def test_layouts_give_the_same_samples(other: Callable[[Path], TrainOptions], tmp_path: Path) -> None:
    found = read(with_texts(tmp_path / "a"))
    assert [one[1] for one in found] == ["a blue field", "a green field", "a red field"]
    assert read(other(tmp_path / "b")) == found


def pairs_in_folders(folder: Path) -> TrainOptions:
    options = with_texts(folder)
    for colour in COLOURS:
        picture(folder.parent / "before" / f"{colour}.png", f"dark{colour}")
    return replace(options, references=(str(folder.parent / "before"),))


def pairs_beside(folder: Path) -> TrainOptions:
    for colour in COLOURS:
        picture(folder / f"{colour}_out.png", colour)
        picture(folder / f"{colour}_in.png", f"dark{colour}")
        (folder / f"{colour}_in.txt").write_text(f"a {colour} field")
    return TrainOptions(str(folder), "x.safetensors")


def pairs_in_control(folder: Path) -> TrainOptions:
    options = with_texts(folder)
    for colour in COLOURS:
        picture(folder / "control_1" / f"{colour}.png", f"dark{colour}")
    return options


def pairs_in_jsonl(folder: Path) -> TrainOptions:
    options = with_jsonl(folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row, colour in zip(rows, COLOURS, strict=True):
        picture(folder / f"before_{colour}.png", f"dark{colour}")
        row["reference"] = f"before_{colour}.png"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return options


@pytest.mark.parametrize("other", [pairs_beside, pairs_in_control, pairs_in_jsonl])
def test_edit_pairs_give_the_same_samples(other: Callable[[Path], TrainOptions], tmp_path: Path) -> None:
    found = read(pairs_in_folders(tmp_path / "a" / "after"))
    assert all(len(one[4]) == 1 for one in found)
    assert read(other(tmp_path / "b")) == found


def test_captions(tmp_path: Path) -> None:
    options = with_texts(tmp_path / "a")
    (tmp_path / "a" / "red.txt").unlink()
    (tmp_path / "a" / "blue.txt").write_text("  \n")
    with pytest.raises(RequestError, match="1 of 3 pictures have no caption .*red.png"):
        check_items(options, 16)
    table = check_items(replace(options, prompt="a field", trigger="ohwx"), 16)
    assert [item.caption for item in table.items] == ["ohwx", "ohwx, a green field", "ohwx, a field"]
    assert table.without_caption == 1
    assert [path.name for path in table.empty] == ["blue.png"]
    assert "captions   1 missing: the prompt takes their place" in table.lines()


def test_the_table_tells_what_is_odd(tmp_path: Path) -> None:
    options = with_texts(tmp_path / "a")
    picture(tmp_path / "a" / "twin.png", "red")
    (tmp_path / "a" / "notes.md").write_text("x")
    Image.new("RGBA", (128, 128), (255, 0, 0, 128)).save(tmp_path / "a" / "glass.png")
    table = check_items(replace(options, prompt="a field"), 16)
    lines = "\n".join(table.lines())
    for words in (
        "pictures   5",
        "128 x 128: 5",
        "small      5",
        "duplicates 1",
        "ignored    1 (notes.md)",
        "transparent",
    ):
        assert words in lines


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a: (a / "red.png").write_bytes(b"no"), "red.png cannot be read"),
        (lambda a: (a / "red.png").write_bytes((a / "red.png").read_bytes()[:60]), "red.png cannot be read"),
        (lambda a: picture(a / "red.png", "red", (32, 128)), "red.png is 32 x 128; a side must have 64 pixels"),
        (lambda a: (a / "pink.txt").write_text("x"), "pink.txt is a caption without a picture"),
        (lambda a: (a / "red.txt").write_bytes(b"\xff\xfe"), "red.txt is not UTF-8"),
        (lambda a: picture(a / "red.jpg", "red"), "have the same name"),
        (lambda a: picture(a / "control_1" / "red.png", "red"), "blue.png has no reference of its name"),
        (lambda a: [path.unlink() for path in a.iterdir()], "holds no pictures"),
    ],
)
def test_a_fault_names_the_file(spoil: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    options = with_texts(tmp_path / "a")
    spoil(tmp_path / "a")
    with pytest.raises(RequestError) as error:
        check_items(options, 16)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"file_name": "x.png", "caption": "y"}', "'caption' is not a column"),
        ('{"text": "y"}', "file_name is None"),
        ("[]", "is not a JSON object"),
        ('{"file_name": "red.png", "text": "y", "repeats": 0}', ""),
        ('{"file_name": "red.png", "text": "y", "repeats": "x"}', "repeats is 'x'"),
        ('{"file_name": "red.png", "text": 3}', "text is 3"),
        ('{"file_name": "gone.png", "text": "y"}', "gone.png does not exist"),
        ('{"file_name": "red.png", "text": "y", "reference": "gone.png"}', "gone.png does not exist"),
    ],
)
def test_a_fault_names_the_row(row: str, words: str, tmp_path: Path) -> None:
    options = with_jsonl(tmp_path / "a")
    (tmp_path / "a" / "metadata.jsonl").write_text(row)
    if not words:
        assert len(read_items(options)[0]) == 1
        return
    with pytest.raises(RequestError) as error:
        check_items(options, 16)
    assert words in str(error.value)


def test_data_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is not a folder"):
        read_items(TrainOptions(str(tmp_path / "gone"), "x.safetensors"))


@pytest.mark.parametrize("resolution", [128, 512, 1024])
@pytest.mark.parametrize("aspect", ASPECTS)
def test_buckets(aspect: float, resolution: int) -> None:
    size = (round(4000 * aspect**0.5), round(4000 / aspect**0.5))
    width, height = bucket_of(size, resolution, 16)
    assert width % 16 == height % 16 == 0
    assert width * height <= resolution**2
    assert width * height > 0.7 * resolution**2
    small = bucket_of((200, 150), resolution, 16)
    assert small[0] <= 200
    assert small[1] <= 150


def test_the_order_is_a_function_of_seed_and_number(tmp_path: Path) -> None:
    items = check_items(with_texts(tmp_path / "a"), 16).items
    items = [replace(items[0], repeats=2), *items[1:], *(replace(item, size=(64, 64)) for item in items)]
    one, two = Order(items, 2, 0), Order(items, 2, 0)
    assert one.length == 4
    assert [one(n) for n in (9, 3, 0)] == [two(9), two(3), two(0)]
    for epoch in range(3):
        batches = [one(epoch * one.length + n) for n in range(one.length)]
        assert sorted(sum(batches, [])) == [0, 0, 1, 2, 3, 4, 5]
        assert all(len({items[index].size for index in batch}) == 1 for batch in batches)
    assert [Order(items, 2, 1)(n) for n in range(8)] != [one(n) for n in range(8)]


def test_held_out_pictures_are_not_trained_on(tmp_path: Path) -> None:
    items = check_items(with_texts(tmp_path / "a"), 16).items
    training, held = split_held_out(items, 1, 0)
    assert len(training) == 2
    assert set(training) | set(held) == set(items)
