"""What a model argument may be: "tiny", a folder, or a repository of the Hub."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from folders import GOLDEN, copy_model, refusal, weight_file
from foreign import all_in_one
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects

from klein_mlx.cli.download import Consent, obtain
from klein_mlx.cli.main import main
from klein_mlx.config import PARTS
from klein_mlx.formats import open as detect
from klein_mlx.formats.diffusers import STEMS
from klein_mlx.formats.lora_metadata import find_lora
from klein_mlx.formats.open import TOKENIZER_FILES, choose_part, hub_part, open_model
from klein_mlx.formats.part import KLEIN
from klein_mlx.weights.hub import list_files, plan_download, wanted, wanted_files

# ---- what a model argument may be ----


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nonsense", "use 'tiny', a folder, a Hub id"),
        ("", "model is ''; it must name a model, a file or a folder"),
        ("a b/c", "use 'tiny'"),
        ("./absent", "absent: no such file or folder"),
        ("/absent/model", "/absent/model: no such file or folder"),
        ("a/b/c", "a/b/c: no such file or folder"),
        ("owner/", "no such file or folder"),
        (Path("owner/name"), "no such file or folder"),
        ("x" * 5000, "use 'tiny'"),
        ("x\0y", "use 'tiny'"),
    ],
)
def test_a_model_that_cannot_be_is_told(model: str | Path, message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal(lambda: open_model(model))


def test_a_folder_of_something_else_is_told(tmp_path: Path) -> None:
    assert "has neither klein.json nor model_index.json" in refusal(lambda: open_model(tmp_path))
    assert "is one part of a model" in refusal(lambda: open_model(GOLDEN / "vae"))
    assert "is a JSON file, not weights" in refusal(lambda: open_model(GOLDEN / "model_index.json"))


def test_a_missing_embedded_checkpoint_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(detect, "TINY_FOLDER", tmp_path)
    assert "the embedded checkpoint is not in this installation" in refusal(lambda: open_model("tiny"))


# ---- the Hub ----


def test_only_the_tree_of_a_repository_is_fetched() -> None:
    shards = [f"text_encoder/model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    files = [
        "model_index.json",
        "LICENSE.md",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        *shards,
        "text_encoder/model.safetensors.index.json",
        "vae/diffusion_pytorch_model.safetensors",
        "tokenizer/tokenizer.json",
        "klein.json",
        "tokenizer.json",
        "transformer.safetensors",
        "transformer-00001-of-00002.safetensors",
        "transformer.safetensors.index.json",
    ]
    others = [
        "flux-2-klein-4b.safetensors",
        "README.md",
        "teaser.png",
        "vae/diffusion_pytorch_model.bin",
        "x/a.safetensors",
    ]
    assert list(filter_repo_objects(files + others, allow_patterns=wanted())) == files
    fewer = wanted(["vae"])
    assert "transformer.safetensors" not in filter_repo_objects(files, allow_patterns=fewer)
    assert "text_encoder/model.safetensors.index.json" in filter_repo_objects(files, allow_patterns=fewer)


def test_what_would_come_twice_is_left_out() -> None:
    plain = [f"{part}/{STEMS[part]}.safetensors" for part in PARTS]
    shards = ["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"]
    halves = [f"transformer/{STEMS['transformer']}.fp16.safetensors", *(f"text_encoder/{name}" for name in shards)]
    assert wanted_files([*halves, *plain]) == plain
    assert wanted_files(halves) == halves
    packed = [
        "transformer-packed-mflux/quantization_config.json",
        f"transformer-packed-mflux/{STEMS['vae']}.safetensors",
    ]
    assert wanted_files(packed) == packed
    assert wanted_files([*packed, *plain]) == plain


WHOLE = ["model_index.json", "README.md", "transformer/config.json", "transformer/a.safetensors", "vae/a.safetensors"]
GGUFS = ["x-Q4_0.gguf", "x-Q8_0-00001-of-00002.gguf", "x-Q8_0-00002-of-00002.gguf", "README.md"]
QWEN = ["config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors", "tokenizer.json"]
PACKED = ["transformer-q/a.safetensors", "b.safetensors"]
OURS = ["klein.json", "tokenizer.json", "vae.safetensors"]
COMFY = ["split_files/vae/flux2-vae.safetensors", "split_files/diffusion_models/a.safetensors"]


@pytest.mark.parametrize(
    ("part", "names", "file", "chosen", "opened"),
    [
        ("transformer", WHOLE, None, WHOLE[2:4], "transformer"),
        ("transformer", PACKED, None, PACKED[:1], "transformer-q"),
        ("text_encoder", QWEN, None, QWEN[:3], ""),
        ("vae", [*OURS, "x.safetensors"], None, OURS, ""),
        ("transformer", ["flux.safetensors", "README.md"], None, ["flux.safetensors"], "flux.safetensors"),
        ("transformer", GGUFS, "x-Q4_0.gguf", GGUFS[:1], GGUFS[0]),
        ("transformer", GGUFS, "x-Q8_0-00002-of-00002.gguf", GGUFS[1:3], GGUFS[2]),
        ("text_encoder", GGUFS[1:], None, GGUFS[1:3], GGUFS[1]),
        ("vae", COMFY, "flux2-vae.safetensors", COMFY[:1], COMFY[0]),
    ],
)
def test_a_part_is_found_in_a_repository(
    part: str, names: list[str], file: str | None, chosen: list[str], opened: str
) -> None:
    assert choose_part(part, names, "owner/name", file) == (chosen, opened)


def test_several_files_are_listed_and_absent_ones_told() -> None:
    told = refusal(lambda: choose_part("transformer", GGUFS, "owner/name"))
    assert told.startswith(
        "owner/name: holds 3 files of weights; name the transformer among them: owner/name/x-Q4_0.gguf,"
    )
    told = refusal(lambda: choose_part("transformer", GGUFS, "owner/name", "y.gguf"))
    assert told.startswith("owner/name: has no files 'y.gguf'; it holds owner/name/x-Q4_0.gguf, ")
    assert "holds no weights" in refusal(lambda: choose_part("vae", ["README.md"], "owner/name"))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("4b", ("black-forest-labs/FLUX.2-klein-4B", None)),
        ("owner/name", ("owner/name", None)),
        ("owner/name/a/b.gguf", ("owner/name", "a/b.gguf")),
        ("models/missing.safetensors", None),
        ("./owner/name", None),
        ("owner/name/folder", None),
        ("missing", None),
    ],
)
def test_what_is_a_part_on_the_hub(value: str, found: tuple[str, str | None] | None) -> None:
    assert hub_part(value) == found


def test_a_part_by_name(monkeypatch: Any, tmp_path: Path) -> None:
    """ "tiny", and a file of a repository, which is fetched alone."""
    tiny = open_model("tiny")
    assert open_model("tiny", parts={"transformer": "tiny"}).config == tiny.config
    served = tmp_path / "a" / "x.safetensors"
    served.parent.mkdir()
    shutil.copy(weight_file(GOLDEN, "vae"), served)
    hub = FakeHub(hub_errors.LocalEntryNotFoundError("not there"), tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.setattr(detect, "list_files", lambda hub_id, **options: ["a/x.safetensors", "b.safetensors"])
    source = open_model(GOLDEN, parts={"vae": "owner/name/x.safetensors"})
    assert (source.files(["vae"])[-1], hub.calls[-1]["allow_patterns"]) == (served, ["a/x.safetensors"])


class FakeHub:
    """Stands in for snapshot_download: answers in turn, and remembers how it was called."""

    def __init__(self, *answers: Any):
        self.answers, self.calls = list(answers), []

    def __call__(self, hub_id: str, **options: Any) -> str:
        self.calls.append(options)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)


def test_the_cache_comes_first_and_the_network_only_for_what_it_lacks(tmp_path: Path, monkeypatch: Any) -> None:
    hub = FakeHub(GOLDEN)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    source = open_model("owner/name", revision="abc", token="t")
    assert [call["local_files_only"] for call in hub.calls] == [True]
    assert (hub.calls[0]["revision"], hub.calls[0]["token"]) == ("abc", "t")
    assert source.info["source"]["name"] == "owner/name"

    partial = copy_model(tmp_path / "partial")
    weight_file(partial, "vae").unlink()
    hub = FakeHub(partial, GOLDEN)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert open_model("owner/name").path == GOLDEN
    assert [call["local_files_only"] for call in hub.calls] == [True, False]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", FakeHub(partial))
    assert "is missing" in refusal(lambda: open_model("owner/name", local_files_only=True))


def _http(kind: type, status: int) -> Exception:
    return kind("first line\nsecond", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (_http(hub_errors.GatedRepoError, 403), "is gated: accept its license"),
        (_http(hub_errors.RepositoryNotFoundError, 404), "no such repository"),
        (_http(hub_errors.RevisionNotFoundError, 404), "has no revision 'abc'"),
        (_http(hub_errors.HfHubHTTPError, 401), "refused your token"),
        (_http(hub_errors.HfHubHTTPError, 503), "the Hub has a problem (it answered 503)"),
        (_http(hub_errors.HfHubHTTPError, 429), "too many requests"),
        (_http(hub_errors.HfHubHTTPError, 418), "the Hub answered 418"),
        (hub_errors.LocalEntryNotFoundError("not there"), "the network is not to be used: drop --offline"),
        (hub_errors.OfflineModeIsEnabled("no"), "cannot reach huggingface.co (no): check your connection"),
        (OSError(28, "No space left on device"), "is full; free some space, or set HF_HOME to a larger disk"),
        (PermissionError(13, "denied"), "is not writable for you; set HF_HOME"),
        (ConnectionError("no route"), "cannot reach huggingface.co (no route): check your connection"),
        (ConnectionError("[SSL: CERTIFICATE_VERIFY_FAILED] x"), "TLS certificate"),
        (OSError("Consistency check failed: file should be 3"), "the connection broke in the middle of a file"),
        (hub_errors.FileMetadataError("missing X-Repo-Commit"), "what answered is not the Hub"),
        (RuntimeError("else"), "the download failed (RuntimeError: else); check the network and try again"),
    ],
)
def test_a_failing_download_is_told_with_its_remedy(error: Exception, message: str, monkeypatch: Any) -> None:
    hub = FakeHub(hub_errors.LocalEntryNotFoundError("not there"), error)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    told = refusal(lambda: open_model("owner/name", revision="abc"))
    assert told.startswith("owner/name: ")
    assert message in told


def test_a_revision_of_what_is_on_this_disk_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be ignored, and the picture be another's than the one that was asked for."""
    (tmp_path / "lora.safetensors").touch()
    for model in ("tiny", "klein-Tiny", str(tmp_path), tmp_path):
        told = refusal(lambda: open_model(model, revision="abc"))  # noqa: B023
        assert told == f"revision is 'abc'; {model} is on this disk: only models on the Hub have one"
    for lora in (tmp_path / "lora.safetensors", "lora"):
        told = refusal(lambda: find_lora(lora, folder=tmp_path, revision="abc"))  # noqa: B023
        assert told.startswith(f"revision is 'abc'; {tmp_path / 'lora.safetensors'} is on this disk")
    for words in (["a star", "-m", "tiny"], ["convert", "tiny", str(tmp_path / "new")]):
        assert main([*words, "--revision", "abc"]) == 2
        assert (
            capsys.readouterr().err
            == "error: revision is 'abc'; tiny is on this disk: only models on the Hub have one\n"
        )


def test_a_model_that_is_one_file_of_a_repository(monkeypatch: Any, tmp_path: Path) -> None:
    """Fetched by its name; Qwen3's tokenizer comes from another."""
    commit = tmp_path / "snapshots" / "abc"
    file = all_in_one(commit / "checkpoints" / "all.safetensors")
    hub = FakeHub(*[hub_errors.LocalEntryNotFoundError("not there"), commit] * 2)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.setattr(detect, "list_files", lambda hub_id, **options: ["checkpoints/all.safetensors", "b.gguf"])
    monkeypatch.setitem(KLEIN, "vae", replace(KLEIN["vae"], norm_num_groups=4))
    source = open_model("owner/name/all.safetensors", revision="abc")
    assert [call["allow_patterns"] for call in hub.calls[1::2]] == [[f"checkpoints/{file.name}"], [TOKENIZER_FILES[0]]]
    assert [call["revision"] for call in hub.calls] == ["abc", "abc", None, None]
    assert (source.path, source.info["source"]["name"]) == (file, "all.safetensors")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "vae/..\\..\\x", "C:/x", "vae//x", "", 7])
def test_a_repository_lists_a_path_that_leads_out_of_it(name: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing decides where files are looked for and written; the library raises ValueError at best."""

    class Api:
        def __init__(self, token: str | None) -> None: ...

        def list_repo_files(self, hub_id: str, revision: str | None) -> list[object]:
            return [name]

        def model_info(self, hub_id: str, **_: object) -> SimpleNamespace:
            return SimpleNamespace(gated=False, siblings=[SimpleNamespace(rfilename=name, size=1)], card_data=None)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    for ask in (list_files, plan_download):
        told = refusal(lambda ask=ask: ask("a/b"))
        assert "a/b: lists a file named" in told
        assert "which is not a path inside of it" in told


def test_the_command_fetches_that_file_and_a_tokenizer(monkeypatch: Any, tmp_path: Path) -> None:
    file = all_in_one(tmp_path / "checkpoints" / "all.safetensors")
    here: dict[str, Any] = {}

    def snapshot(hub_id: str, **options: Any) -> str:
        if hub_id not in here:
            raise hub_errors.LocalEntryNotFoundError("not there")
        return str(tmp_path)

    def bring(hub_id: str, choice: Any, **options: Any) -> None:
        here[hub_id] = choice(["checkpoints/all.safetensors", "b.gguf"]) if callable(choice) else choice

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr("klein_mlx.cli.download.bring", bring)
    name = "owner/name/all.safetensors"
    told = refusal(lambda: open_model(obtain(name, consent=Consent(offline=True)), local_files_only=True))
    assert told.startswith("owner/name: its model is not (fully) in ")
    assert obtain(name, tokenizer=False) == str(file)
    assert here == {"owner/name": ["checkpoints/all.safetensors"]}
    assert obtain(name) == str(file)
    assert here[detect.TOKENIZER_REPOSITORY] == ["tokenizer/tokenizer.json"]
