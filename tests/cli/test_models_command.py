"""`klein-mlx models`: what it finds, fetches and deletes, with a hub that runs here and an empty home."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, Hub, hub
from huggingface_hub import constants

from klein_mlx.cli.completion import model_names
from klein_mlx.cli.main import main
from klein_mlx.paths import cache_folder, models_folder, own_model, own_models, own_names, state_folder

TINY = Path(__file__).parents[2] / "klein_mlx" / "tiny"
NAMES = ["klein.json", "text_encoder.safetensors", "tokenizer.json", "transformer.safetensors", "vae.safetensors"]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub with tiny as owner/name, for this process and the ones that it starts."""
    with hub(TINY) as server:
        for name, value in server.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("KLEIN_MLX_HOME", str(tmp_path / "own"))
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        yield server


class Told:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self.capsys = capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        code = main(["models", *words])
        told = self.capsys.readouterr()
        assert "Traceback" not in told.err
        return code, told.out, told.err


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    return Told(capsys)


def listed(told: Told) -> dict[str, dict[str, Any]]:
    code, out, err = told("--json")
    assert (code, err) == (0, "")
    return {entry["name"]: entry for entry in map(json.loads, out.splitlines())}


def test_pull_list_path_and_rm(served: Hub, told: Told, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "hub" / "models--owner--name"
    snapshot = folder / "snapshots" / COMMIT
    assert list(listed(told)) == ["tiny"]
    assert told("path", "owner/name")[2] == (
        "error: owner/name is not (fully) downloaded; run: klein-mlx models pull owner/name\n"
    )
    code, out, err = told("pull", "owner/name")
    assert (code, out) == (0, f"{snapshot}\n")
    assert "owner/name is not on this machine yet." in err
    served.asked.clear()
    assert told("pull", "owner/name") == (0, f"{snapshot}\n", "")
    assert told("path", "owner/name") == (0, f"{snapshot}\n", "")
    assert served.asked == [], "what is whole needs no network"
    entry = listed(told)["owner/name"]
    assert (entry["where"], entry["variant"], entry["bits"], entry["whole"]) == ("hub", "tiny", [], True)
    assert entry["bytes"] == sum(
        served.size(f"{part}.safetensors") for part in ("transformer", "text_encoder", "vae")
    ) + (served.size("klein.json") + served.size("tokenizer.json"))
    assert entry["last_used"] > 1.7e9
    code, out, err = told()
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["NAME", "tiny", "owner/name"]
    assert "9.9 MB  just now" in out
    assert "4b-q4 (mlx-community/flux2-klein-4b-4bit)" in err

    code, _, err = told("rm", "owner/name")
    assert (code, err.count("\n")) == (2, 1)
    assert "not a terminal, so cannot ask; add --yes to delete" in err
    assert snapshot.is_dir()
    code, out, _ = told("rm", "owner/name", "--yes", "--json")
    assert (code, json.loads(out)["freed"]) == (0, pytest.approx(entry["bytes"], abs=4096))  # and the cache's own notes
    assert not folder.exists()
    assert list(listed(told)) == ["tiny"]


def test_pieces_of_a_download_can_be_deleted(served: Hub, told: Told, tmp_path: Path) -> None:
    blobs = tmp_path / "home" / "hub" / "models--owner--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc.incomplete").write_bytes(b"x" * 1000)
    code, out, _ = told("rm", "owner/name", "--yes", "--json")
    assert (code, json.loads(out)["freed"]) == (0, 1000)
    assert not blobs.parent.exists()


def test_models_of_ones_own(served: Hub, told: Told, tmp_path: Path) -> None:
    """A folder of the models' folder is named without its path, listed, and deleted, unless it is something else."""
    own = tmp_path / "own" / "models"
    shutil.copytree(TINY, own / "mine", ignore=shutil.ignore_patterns("__*"))
    (own / "notes").mkdir()
    (own / "link").symlink_to(TINY)
    entries = listed(told)
    assert (entries["mine"]["where"], entries["mine"]["variant"]) == ("folder", "tiny")
    assert entries["notes"]["whole"] is False
    assert told("path", "mine")[1] == f"{own / 'mine'}\n"
    asked = ["a star", "--model", "mine", "--steps", "1", "--width", "64", "--height", "64"]
    assert main([*asked, "-o", str(tmp_path / "x.png"), "--quiet"]) == 0
    told.capsys.readouterr()
    assert "notes is not a model; delete it yourself" in told("rm", "notes", "-y")[2]
    assert "is a link; delete it yourself" in told("rm", "link", "-y")[2]
    assert told("rm", "mine", "-y")[0] == 0
    assert sorted(path.name for path in own.iterdir()) == ["link", "notes"]
    assert (TINY / "klein.json").exists()
    assert served.asked == []


def test_names_from_the_config(served: Hub, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[models] names folders, hub ids and other short names, for every command; a config that is broken names none."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    config = tmp_path / "klein-mlx" / "config.toml"
    config.parent.mkdir()
    config.write_text(f'steps = 4\n[models]\nhome = "{TINY}"\nthere = "owner/name"\nbig = "9b"\n')
    assert own_names() == {"home": str(TINY), "there": "owner/name", "big": "9b"}
    assert main(["info", "home", "--json"]) == 0
    assert json.loads(told.capsys.readouterr().out)["variant"] == "tiny"
    assert told("pull", "there")[0] == 0
    assert told("path", "there")[1].endswith(f"{COMMIT}\n")
    assert "FLUX.2-klein-9B is not (fully) downloaded" in told("path", "big")[2]
    assert {"home", "there", "big"} <= set(model_names())
    assert "did you mean there?" in told("path", "theer")[2]
    config.write_text("[models\n")
    assert own_names() == {}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("pull",), "pull needs a model; for example: klein-mlx models pull 4b"),
        (("list", "4b"), "list takes no model; for one of them: klein-mlx info 4b"),
        (("pull", "4bb"), "'4bb' is not a model on the Hub (did you mean 4b?)"),
        (("pull", "other/name"), "other/name: no such repository"),
        (("rm", "tiny"), "tiny is built in and cannot be removed"),
        (("pull", "tiny"), "tiny is built in; there is nothing to download"),
        (("rm", "owner/name", "-y"), "owner/name is not on this machine; klein-mlx models lists what is"),
        (("rm", "..", "-y"), "'..' is not a model on the Hub"),
        (("path", "9b"), "black-forest-labs/FLUX.2-klein-9B is not (fully) downloaded; run: klein-mlx models pull 9b"),
        (("lst",), "action is 'lst'; it must be one of list, pull, rm, path"),
    ],
)
def test_what_is_refused(served: Hub, told: Told, words: tuple[str, ...], line: str) -> None:
    code, out, err = told(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert line in err


def test_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KLEIN_MLX_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_folder() == tmp_path / ".local/share/klein-mlx/models"
    assert state_folder() == tmp_path / ".local/state/klein-mlx"
    assert cache_folder() == tmp_path / ".cache/klein-mlx"
    assert own_models() == []
    monkeypatch.setenv("XDG_STATE_HOME", "/elsewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert state_folder() == Path("/elsewhere/klein-mlx")
    assert cache_folder() == tmp_path / ".cache/klein-mlx"
    (tmp_path / ".local/share/klein-mlx/models/a").mkdir(parents=True)
    assert [path.name for path in own_models()] == ["a"]
    assert own_model("a") == own_models()[0]
    assert own_model("b") is own_model("../models/a") is own_model("..") is None
