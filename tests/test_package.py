"""What an installation is: light to import, quick to start, whole in the wheel, true in the README."""

import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("mlx_lm", "transformers", "torch", "huggingface_hub", "numpy", "diffusers")


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "code",
    [
        "import klein_mlx",
        "from klein_mlx.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "import klein_convert",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert not loaded_after(code) & set(HEAVY)


def test_importing_the_package_does_not_load_mlx() -> None:
    assert "mlx" not in loaded_after("import klein_mlx")


@pytest.mark.clock
def test_help_is_quick() -> None:
    """Under 0.2 s; the best of a few, since other work on the machine only ever adds."""

    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "klein_mlx", "--help"], capture_output=True, check=True)
        return time.perf_counter() - start

    assert min(once() for _ in range(7)) < 0.2


def test_the_wheel_holds_the_whole_package(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "tests", "examples")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignore)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"klein_mlx", "klein_convert"}
    for root in (ROOT, ROOT / "convert"):
        for path in root.glob("klein_*/**/*"):
            if path.suffix in (".py", ".typed"):
                assert path.relative_to(root).as_posix() in names
    for path in (ROOT / "klein_mlx" / "tiny").glob("*"):
        assert path.is_dir() or f"klein_mlx/tiny/{path.name}" in names
    assert any(name.endswith("LICENSE") for name in names)
