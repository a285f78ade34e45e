"""The rooms, from the top: a file may import its own room and the rows below, never above; and three nevers."""

import ast
from pathlib import Path

import mlx.core as mx
import pytest
from path_of_a_prompt import paths

ROOT = Path(__file__).parent.parent
ROWS = [
    {"__main__"},
    {"cli"},
    {"server", "train"},
    {"bench", "klein_convert"},
    {"pipeline"},
    {"runtime"},
    {"formats"},
    {"weights"},
    {"model", "images"},
    {"request"},
    {"config", "options"},
    {"paths", "porting"},
    {"errors"},
]
FILES = {
    ".".join(path.relative_to(root).with_suffix("").parts): path
    for root in (ROOT, ROOT / "convert")
    for path in root.glob("klein_*/**/*.py")
}


def room(module: str) -> str:
    """klein_mlx.cli.main -> cli; klein_convert.writer -> klein_convert."""
    parts = module.split(".")
    if parts[-1] == "__main__":
        return "__main__"
    return parts[0] if parts[0] == "klein_convert" else parts[1] if len(parts) > 1 else "klein_mlx"


def row(name: str) -> int:
    return next(index for index, names in enumerate(ROWS) if name in names)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("name", sorted(n for n in FILES if not n.endswith("__init__")))
def test_imports_only_go_down(name: str) -> None:
    own = room(name)
    for module in imports(FILES[name]):
        assert module.split(".")[0] not in ("tests", "examples", "convert"), f"{name} imports {module}"
        if not module.startswith(("klein_mlx", "klein_convert")):
            continue
        other = room(module)
        if other == "klein_convert":
            assert own in ("klein_convert", "__main__") or name == "klein_mlx.cli.convert", f"{name} imports {module}"
        if other != own:
            assert row(other) > row(own), f"{name} imports {module}, which is above it"


@pytest.mark.parametrize(
    ("where", "never"),
    [("model", {"pathlib", "PIL", "json", "os"}), ("images", {"mlx"})],
)
def test_a_room_never_knows(where: str, never: set[str]) -> None:
    for name, path in FILES.items():
        if room(name) == where:
            assert not {m for m in imports(path) for n in never if m == n or m.startswith(n + ".")}, name


def test_only_the_command_prints() -> None:
    for name, path in FILES.items():
        if room(name) != "cli" and not name.endswith("__main__"):
            calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
            assert not any(isinstance(call, ast.Name) and call.id == "print" for call in calls), name


@pytest.mark.skipif(mx.default_device().type == mx.DeviceType.gpu, reason="a GPU's blocks are compiled")
def test_a_prompt_passes_few_files() -> None:
    """docs/architecture.md has the figures; tests/benchmarks/path_of_a_prompt.py shows which files and calls."""
    bounds = {"command-line prompt": (30, 2450, 645), "API call": (22, 2300, 575), "warm call": (18, 1600, 390)}
    for name, path in paths().items():
        found = len(path.files), sum(path.calls.values()), path.switches
        assert all(one <= most for one, most in zip(found, bounds[name], strict=True)), (name, found)
