"""Folders that the user may not look into: whatever is not needed there is not missed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from faults import command, environment, refused, run_fault

# root may read everything, and its Python may lie where nobody else can: it gives up just that.
PRIVILEGES = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search") if os.getuid() == 0 else ()
pytestmark = pytest.mark.skipif(PRIVILEGES and not shutil.which("setpriv"), reason="root may look into every folder")


@pytest.fixture
def closed(tmp_path: Path) -> dict[str, str]:
    """Places of which none may be read."""
    (tmp_path / "work").mkdir()
    (tmp_path / "closed" / "klein-mlx").mkdir(parents=True)
    (tmp_path / "closed").chmod(0)
    names = ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "HF_HOME", "KLEIN_MLX_HOME")
    return {name: str(tmp_path / "closed") for name in names}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("generate", "a star", "--model", "tiny", "--steps", "1", "--size", "64x64", "-o", "x.png"), 0),
        (("models",), 0),
        (("info", "tiny"), 0),
        (("info", "mine"), 2),
        (("generate", "__colors__ star", "--model", "tiny", "--steps", "1", "-o", "x.png"), 2),
    ],
)
def test_unreadable_places(tmp_path: Path, closed: dict[str, str], words: tuple[str, ...], code: int) -> None:
    done = subprocess.run(
        [*PRIVILEGES, *command(*words)],
        cwd=tmp_path / "work",
        env=environment(closed),
        capture_output=True,
        text=True,
    )
    (tmp_path / "closed").chmod(0o700)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, done.stderr
    assert done.stderr.count("error: ") == (code == 2)


def test_links_that_lead_to_themselves(tmp_path: Path) -> None:
    """As the place to write to, and as the Hub's cache."""
    (tmp_path / "hub").symlink_to("hub")
    refused("convert", "tiny", "hub", "--dry-run", folder=tmp_path, words="error: hub: ")
    refused("convert", "tiny", "hub/x", folder=tmp_path, words="error: hub/x: ")
    outcome = run_fault("models", folder=tmp_path, changes={"HF_HOME": str(tmp_path)})
    assert (outcome.code, outcome.errors) == (0, [])
