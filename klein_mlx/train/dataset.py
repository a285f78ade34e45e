"""Pictures and captions on disk as a list of samples: read, checked and sorted into sizes before anything is loaded.

Three layouts: pictures with text files of the same name; a metadata.jsonl or .csv; edit pairs, whose references lie in
folders of their own, in control_1 to control_3, or beside the picture as NAME_in and NAME_out.
"""

import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from klein_mlx.errors import RequestError
from klein_mlx.images.reading import load_image, prepare_reference
from klein_mlx.train.options import TrainOptions

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".tif", ".tiff", ".bmp", ".jp2", ".ppm", ".tga", ".qoi"}
METADATA = ("metadata.jsonl", "metadata.csv")
ASPECTS = tuple(2 ** (k / 5) for k in range(-5, 6))  # width / height, 1:2 to 2:1
MIN_SIDE = 64
_THREADS = 4
_COLUMNS = {"file_name", "text", "reference", "references", "repeats"}


@dataclass(frozen=True)
class Item:
    """A sample. size: of its bucket, (width, height), and reference_sizes likewise, once the pictures were opened.

    digest: of the picture's bytes, reference_digests of its references'.
    """

    file: Path
    caption: str | None
    references: tuple[Path, ...] = ()
    repeats: int = 1
    size: tuple[int, int] = (0, 0)
    reference_sizes: tuple[tuple[int, int], ...] = ()
    digest: str = ""
    reference_digests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """The samples, ready to be encoded, and what a user should know of them.

    small: pictures smaller than the resolution, which are not enlarged. duplicates: (file, file it equals). ignored:
    files in the folder that are neither pictures nor captions.
    """

    items: tuple[Item, ...]
    without_caption: int
    empty: tuple[Path, ...]
    small: tuple[Path, ...]
    duplicates: tuple[tuple[Path, Path], ...]
    notes: tuple[str, ...]
    ignored: tuple[Path, ...]

    @property
    def digest(self) -> str:
        """Of everything that training sees of the data."""
        parts = [(i.digest, i.caption, i.reference_digests, i.repeats, i.size) for i in self.items]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def lines(self) -> list[str]:
        """For a person."""
        buckets = Counter(item.size for item in self.items)
        sizes = ", ".join(f"{w} x {h}: {count}" for (w, h), count in sorted(buckets.items()))
        pairs = sum(bool(item.references) for item in self.items)
        told = [f"pictures   {len(self.items)}{f', {pairs} with references' if pairs else ''}", f"sizes      {sizes}"]
        if self.without_caption:
            told.append(f"captions   {self.without_caption} missing: the prompt takes their place")
        for word, files in (("empty", self.empty), ("small", self.small), ("ignored", self.ignored)):
            if files:
                more = {"empty": "captions", "small": "not enlarged", "ignored": "no pictures"}[word]
                told.append(f"{word:<10} {len(files)} ({files[0].name}{' ...' * (len(files) > 1)}): {more}")
        if self.duplicates:
            one, other = self.duplicates[0]
            told.append(f"duplicates {len(self.duplicates)} ({one.name} is {other.name})")
        return [*told, *(f"note       {note}" for note in self.notes)]


def read_items(options: TrainOptions) -> tuple[list[Item], list[Path]]:
    """The samples that the data's files name, and files that mean nothing here. Raises RequestError."""
    place = Path(options.data)
    if place.is_file() and place.suffix in (".jsonl", ".csv"):
        items, ignored = _of_metadata(place), []
    elif not place.is_dir():
        raise RequestError(f"data is {options.data!r}, which is not a folder, nor a .jsonl or .csv file")
    else:
        listed = [place / name for name in METADATA if (place / name).is_file()]
        items, ignored = (_of_metadata(listed[0]), []) if listed else _of_folder(place)
    if options.references:
        folders = [Path(folder) for folder in options.references]
        items = [replace(item, references=tuple(_same_name(item.file, folder) for folder in folders)) for item in items]
    if not items:
        raise RequestError(f"data is {options.data!r}, which holds no pictures ({', '.join(sorted(SUFFIXES))})")
    return items, ignored


def check_items(options: TrainOptions, multiple: int) -> Table:
    """Open every picture, decide its size, caption it. multiple: pixels per token. Raises RequestError."""
    items, ignored = read_items(options)
    without = [item for item in items if item.caption is None]
    if without and options.prompt is None:
        raise RequestError(
            f"{len(without)} of {len(items)} pictures have no caption ({without[0].file}): "
            "write it in a .txt file of the same name, or give one for all with --prompt"
        )
    empty = tuple(item.file for item in items if item.caption is not None and not item.caption)
    with ThreadPoolExecutor(_THREADS) as pool:
        opened = list(pool.map(lambda item: _opened(item, options.resolution, multiple), items))
    seen: dict[str, Path] = {}
    duplicates = []
    for item, _, _ in opened:
        if item.digest in seen:
            duplicates.append((item.file, seen[item.digest]))
        seen.setdefault(item.digest, item.file)
    captioned = tuple(replace(item, caption=_caption(item, options)) for item, _, _ in opened)
    notes = tuple(note for _, notes, _ in opened for note in notes)
    small = tuple(item.file for item, _, is_small in opened if is_small)
    return Table(captioned, len(without), empty, small, tuple(duplicates), notes, tuple(ignored))


def _caption(item: Item, options: TrainOptions) -> str:
    caption = options.prompt if item.caption is None else item.caption
    caption = (caption or "").strip()
    word = options.trigger
    if not word or word in caption:
        return caption
    return f"{word}, {caption}" if caption else word


# ---- files ----


def _of_folder(folder: Path) -> tuple[list[Item], list[Path]]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    texts = {path.stem: path for path in files if path.suffix.lower() == ".txt"}
    stems = Counter(path.stem for path in pictures)
    twins = [path for path in pictures if stems[path.stem] > 1]
    if twins:
        raise RequestError(f"{twins[0]} and {twins[1].name} have the same name; a caption must belong to one picture")
    outs = {path.stem.removesuffix("_out"): path for path in pictures if path.stem.endswith("_out")}
    ins = {path.stem.removesuffix("_in"): path for path in pictures if path.stem.endswith("_in")}
    if ins and outs:
        items, used = _of_pairs(ins, outs, texts)
        odd = [path for path in pictures if path not in ins.values() and path not in outs.values()]
        if odd:
            raise RequestError(f"{odd[0]} is neither NAME_in nor NAME_out, as the other pictures beside it")
    else:
        controls = [folder / f"control_{k}" for k in (1, 2, 3) if (folder / f"control_{k}").is_dir()]
        used = {path.stem for path in pictures}
        items = [
            Item(path, _text(texts.get(path.stem)), tuple(_same_name(path, control) for control in controls))
            for path in pictures
        ]
    lonely = sorted(set(texts) - used)
    if lonely:
        raise RequestError(f"{texts[lonely[0]]} is a caption without a picture of its name")
    return items, [path for path in files if path not in pictures and path.suffix.lower() != ".txt"]


def _of_pairs(ins: dict[str, Path], outs: dict[str, Path], texts: dict[str, Path]) -> tuple[list[Item], set[str]]:
    """NAME_in, NAME_out and a caption NAME_in.txt, NAME_out.txt or NAME.txt."""
    alone = sorted(set(ins) ^ set(outs))
    if alone:
        path, other = (ins[alone[0]], "out") if alone[0] in ins else (outs[alone[0]], "in")
        raise RequestError(f"{path} has no {alone[0]}_{other} beside it")
    used = {f"{name}{end}" for name in ins for end in ("_in", "_out", "")}
    named = {name: [texts[f"{name}{end}"] for end in ("_in", "_out", "") if f"{name}{end}" in texts] for name in ins}
    items = [Item(outs[name], _text(next(iter(named[name]), None)), (ins[name],)) for name in sorted(ins)]
    return items, used


def _same_name(file: Path, folder: Path) -> Path:
    """The picture of the same name in another folder."""
    if not folder.is_dir():
        raise RequestError(f"references names {str(folder)!r}, which is not a folder")
    exact = folder / file.name
    if exact.is_file():
        return exact
    found = sorted(p for p in folder.iterdir() if p.stem == file.stem and p.suffix.lower() in SUFFIXES)
    if not found:
        raise RequestError(f"{file} has no reference of its name in {folder}")
    return found[0]


def _text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except OSError as error:
        raise RequestError(f"caption {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"caption {path} is not UTF-8; save it as UTF-8") from None


def _of_metadata(path: Path) -> list[Item]:
    """Rows of file_name, text, reference or references, repeats."""
    items = []
    for number, row in _rows(path):
        where = f"{path}:{number}"
        unknown = sorted(set(row) - _COLUMNS)
        if unknown:
            raise RequestError(f"{where}: {unknown[0]!r} is not a column; there are {', '.join(sorted(_COLUMNS))}")
        name, text, repeats = row.get("file_name"), row.get("text"), row.get("repeats") or 1
        if not isinstance(name, str) or not name:
            raise RequestError(f"{where}: file_name is {name!r:.60}; it must name a picture")
        if text is not None and not isinstance(text, str):
            raise RequestError(f"{where}: text is {text!r:.60}; it must be a caption")
        references = row.get("references") or row.get("reference") or ()
        if isinstance(references, str):
            references = [one.strip() for one in references.split(";")] if path.suffix == ".csv" else [references]
        if not isinstance(references, list | tuple) or not all(isinstance(r, str) and r for r in references):
            raise RequestError(f"{where}: references is {references!r:.60}; it must be file names")
        try:
            repeats = int(repeats)
        except (TypeError, ValueError):
            repeats = 0
        if not 1 <= repeats <= 1000:
            raise RequestError(f"{where}: repeats is {row.get('repeats')!r:.60}; it must be a count from 1 to 1000")
        caption = None if text is None else " ".join(text.split())
        folder = path.parent
        items.append(Item(folder / name, caption, tuple(folder / one for one in references), repeats))
    return items


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"data {path} cannot be read: {error}") from None
    if path.suffix == ".csv":
        for number, row in enumerate(csv.DictReader(text.splitlines()), 2):
            if None in row:
                raise RequestError(f"{path}:{number}: has more fields than the first line names")
            yield number, {str(key): value for key, value in row.items() if value != ""}
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise RequestError(f"{path}:{number}: is not a JSON object")
        yield number, row


# ---- pictures ----


def bucket_of(size: tuple[int, int], resolution: int, multiple: int) -> tuple[int, int]:
    """(width, height) of the bucket of a picture: of the nearest of 11 aspects, at most resolution squared pixels,
    sides that are multiples of a token, and never larger than the picture."""
    width, height = size
    aspect = min(ASPECTS, key=lambda a: abs(math.log(width / height / a)))
    root = math.sqrt(aspect)
    side = min(resolution, width / root, height * root)
    fitting = (int(side * root + 1e-6) // multiple * multiple, int(side / root + 1e-6) // multiple * multiple)
    return max(fitting[0], multiple), max(fitting[1], multiple)


def _opened(item: Item, resolution: int, multiple: int) -> tuple[Item, list[str], bool]:
    """The item with its sizes and digests, notes, and whether its picture is smaller than the resolution."""
    image, notes = load_image(item.file, "picture")
    if min(image.size) < MIN_SIDE:
        raise RequestError(f"{item.file} is {image.width} x {image.height}; a side must have {MIN_SIDE} pixels")
    size = bucket_of(image.size, resolution, multiple)
    whole = bucket_of((image.width << 10, image.height << 10), resolution, multiple)
    is_small = size[0] * size[1] < whole[0] * whole[1]
    sizes = []
    for path in item.references:
        reference, more = load_image(path, "reference")
        notes += more
        sizes.append(fit_reference(reference, image.size, size, resolution, multiple, path).size)
    digests = tuple(file_digest(path) for path in item.references)
    ready = replace(item, size=size, reference_sizes=tuple(sizes), digest=file_digest(item.file))
    return replace(ready, reference_digests=digests), notes, is_small


def file_digest(path: Path) -> str:
    """sha256 of a picture's bytes. Raises RequestError if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise RequestError(f"picture {path} cannot be read: {error.strerror}") from None


def fit_picture(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scaled to cover a bucket, and cropped from the centre."""
    width, height = size
    scale = max(width / image.width, height / image.height)
    cover = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if cover != image.size:
        image = image.resize(cover, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def fit_reference(
    image: Image.Image,
    picture: tuple[int, int],
    size: tuple[int, int],
    resolution: int,
    multiple: int,
    path: Path,
) -> Image.Image:
    """A reference as it is encoded: cut as its picture is where both have one size, so that their pixels still lie on
    each other; else by the product's own rules, at most resolution squared pixels."""
    if image.size == picture:
        return fit_picture(image, size)
    try:
        return prepare_reference(image, multiple, resolution**2)[0]
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


# ---- order ----


class Order:
    """Which samples each micro-batch has: a pure function of the seed and the micro-batch's number.

    An epoch shows every sample `repeats` times, in micro-batches of samples of one size.
    """

    def __init__(self, items: Sequence[Item], batch: int, seed: int):
        self._seed, self._batch = seed, batch
        self._groups: dict[Any, list[int]] = {}
        for index, item in enumerate(items):
            self._groups.setdefault((item.size, item.reference_sizes), []).extend([index] * item.repeats)
        self.length = sum(-(-len(group) // batch) for group in self._groups.values())
        self._epoch, self._batches = -1, [[0]]

    def __call__(self, number: int) -> list[int]:
        """The indices of the items of micro-batch `number`, from 0."""
        epoch, place = divmod(number, self.length)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[place]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        import random

        draw = random.Random(f"order/{self._seed}/{epoch}")
        batches = []
        for _, group in sorted(self._groups.items()):
            shuffled = sorted(group)
            draw.shuffle(shuffled)
            batches += [shuffled[i : i + self._batch] for i in range(0, len(shuffled), self._batch)]
        draw.shuffle(batches)
        return batches


def split_held_out(items: Sequence[Item], count: int, seed: int) -> tuple[list[Item], list[Item]]:
    """(to train on, held out): some drawn by the seed."""
    import random

    chosen = set(random.Random(f"held-out/{seed}").sample(range(len(items)), count))
    return [i for n, i in enumerate(items) if n not in chosen], [items[n] for n in sorted(chosen)]
