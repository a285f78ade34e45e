"""Every command block (```sh) and every ```python block of README and docs runs, on tiny, as it stands.

What needs a download or a Mac is marked ```text there. The quick start is run from a clean checkout by .ci/run.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from klein_mlx.options import USER_OPTIONS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the blocks that run, in order."""
    text = re.sub(r"^## Quick start.*?(?=^## )", "", page.read_text(), flags=re.S | re.M)
    return re.findall(r"^```(sh|python)\n(.*?)^```", text, flags=re.S | re.M)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_what_a_page_shows_runs(page: Path, tmp_path: Path) -> None:
    command = tmp_path / "bin" / "klein-mlx"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m klein_mlx "$@"\n')
    command.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(ROOT / "examples" / "tiny" / "silhouettes.safetensors", work)
    environment = {
        **os.environ,
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "convert")]),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
    }
    for language, text in blocks(page):
        words = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(words, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not link.startswith("https://"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_argument_is_told() -> None:
    text = (ROOT / "docs" / "python.md").read_text()
    assert re.findall(r"^\| `(\w+)` \| (?:`(\S+)`)? ?\|", text, flags=re.M) == [
        (name, own.flag or "") for name, own in USER_OPTIONS.items()
    ]


def test_the_first_page_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 10_000
    assert text.count("\n") <= 200
