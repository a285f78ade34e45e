"""Imports only go down: each module may import the rows below its own, and nothing of tests or examples."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the top. A name stands for klein_mlx.<name>; "convert" for everything in that folder.
ROWS = [
    {"convert.__main__", "completion"},
    {"cli"},
    {"again", "show"},
    {"generate", "repl", "benchmark", "convert.command", "convert.info_command", "convert.lora_command", "models"},
    {"batch"},
    {"prompts", "viewing"},
    {"settings", "progress", "asked", "measuring", "peers"},
    {"download"},
    {"pipeline", "options"},
    {"loras"},
    {"encodings", "decoding", "sketch", "recipe", "enhance"},
    {"parts", "velocity", "prediction"},
    {"memory", "prompt_cache"},
    {"applied"},
    {"convert"},
    {"fetch"},
    {"hub"},
    {
        "checkpoint",
        "quantize",
        "bits",
        "bit_options",
        "conditioning",
        "weights",
        "opening",
        "cost",
        "chips",
        "rows",
    },
    {"lora_options"},
    {"branch", "lora"},
    {"text_encoder", "transformer", "vae"},
    {"convolution", "residual", "rope"},
    {"group_norm"},
    {
        "strips",
        "tokenizer",
        "latents",
        "sampler",
        "images",
        "naming",
        "sheet",
        "sizes",
        "wildcards",
        "masks",
        "events",
        "fusion",
        "limits",
        "linear",
        "rounding",
        "feedback",
    },
    {"saving"},
    {"metadata"},
    {"aliases", "places", "shells", "terminal", "config", "errors", "request", "edits", "checks", "arguments", "given"},
]
PURE = {"text_encoder", "transformer", "vae"}  # arrays and their config: no paths, no pictures
SAME_ROW = {  # allowed within a row, because it goes one way only
    "checkpoint": {"quantize", "weights", "rows"},
    "rows": {"weights"},
    "quantize": {"weights"},
    "bits": {"checkpoint", "quantize"},
    "bit_options": {"bits"},
    "feedback": {"rounding"},
    "rounding": {"fusion"},
    "request": {"config", "errors", "edits", "checks"},
    "edits": {"errors", "checks"},
    "checks": {"errors"},
    "given": {"errors"},
    "masks": {"images"},
    "config": {"errors"},
    "aliases": {"config", "errors"},
    "tokenizer": set(),
}


def modules() -> dict[str, Path]:
    found = {path.stem: path for path in (ROOT / "klein_mlx").glob("*.py") if path.stem != "__init__"}
    found |= {f"convert.{path.stem}": path for path in (ROOT / "convert").glob("*.py")}
    return found


def row_of(name: str) -> int:
    top = name if any(name in row for row in ROWS) else name.split(".")[0]
    rows = [index for index, row in enumerate(ROWS) if top in row]
    assert rows, f"{name} stands in no row: add it to ROWS, where it belongs"
    return rows[0]


def imported(path: Path) -> set[str]:
    """The package's modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import; imports are absolute"
            full = [node.module or ""]
            if node.module in ("klein_mlx", "klein_mlx.convert"):
                full = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in full:
            if name.startswith("klein_mlx."):
                names.add(name.removeprefix("klein_mlx."))
            assert not name.startswith(("tests", "examples", "convert")), f"{path.name} imports {name}"
    return {name for name in names if name.split(".")[0] in {m.split(".")[0] for m in modules()}}


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_down(name: str) -> None:
    own = name.split(".")[0]
    for other in imported(modules()[name]):
        top = other.split(".")[0]
        if top == own == "convert":
            continue
        allowed = row_of(other) > row_of(name) or top in SAME_ROW.get(own, set())
        assert allowed, f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize("name", sorted(PURE))
def test_models_know_only_arrays(name: str) -> None:
    """No paths, pictures or prompts in the model files, whatever their imports are called."""
    tree = ast.parse(modules()[name].read_text())
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    assert roots <= {"mlx", "klein_mlx", "math", "typing", "numpy", "collections", "itertools"}, roots
    assert imported(modules()[name]) <= {
        "config",
        "fusion",
        "linear",
        "residual",
        "rope",
        "convolution",
        "group_norm",
        "strips",
    }


def test_convert_is_the_top_level_folder() -> None:
    link = ROOT / "klein_mlx" / "convert"
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == (ROOT / "convert").resolve()
