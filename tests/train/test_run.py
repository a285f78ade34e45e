"""A whole run on tiny, a few updates long: checkpoints, resuming to the byte, the cache, the log, faults."""

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import silhouettes
from PIL import Image

from klein_mlx import KleinPipeline
from klein_mlx.cli.main import main
from klein_mlx.errors import KleinError, RequestError
from klein_mlx.paths import TINY_FOLDER
from klein_mlx.train import Checkpoint, Preview, TrainOptions, TrainStep, train
from klein_mlx.train.loop import Done, Notice, Training
from klein_mlx.train.plan import make_plan
from klein_mlx.weights.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return silhouettes.make(tmp_path_factory.mktemp("data") / "pictures", 3)


@pytest.fixture
def options(data: Path, tmp_path: Path) -> TrainOptions:
    out = str(tmp_path / "style.safetensors")
    short: dict[str, Any] = {"steps": 4, "accumulate": 1, "rank": 2, "resolution": 64, "warmup": 2}
    return TrainOptions(str(data), out, "tiny", learning_rate=1e-3, hold_out="1", hold_out_every=2, **short)


def arrays(checkpoint: Path) -> dict[str, mx.array]:
    return mx.load(str(checkpoint / "state.safetensors"))  # type: ignore[return-value]


def same(one: Path, other: Path) -> bool:
    a, b = arrays(one), arrays(other)
    assert a.keys() == b.keys()
    lora = [(path / "lora.safetensors").read_bytes() for path in (one, other)]
    return all(mx.array_equal(a[name], b[name]) for name in a) and lora[0] == lora[1]


def log(folder: Path) -> list[dict[str, Any]]:
    """Without what a clock or another process decides."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("seconds", "peak_gb")} for row in rows]


@pytest.mark.parametrize("more", [{"method": "dora", "ema": 0.9}, {"optimizer": "muon", "flip": True, "batch": 2}])
def test_a_run_in_two_parts_is_the_run(more: dict[str, Any], options: TrainOptions, tmp_path: Path) -> None:
    options = replace(options, **more)
    events = list(train(options))
    assert [event.index for event in events if isinstance(event, TrainStep)] == [1, 2, 3, 4]
    assert isinstance(events[-1], Done)
    assert [event.held_out is not None for event in events if isinstance(event, TrainStep)] == [
        False,
        True,
        False,
        True,
    ]
    whole = options.run_folder
    (tmp_path / "parts").mkdir()
    parts = replace(options, output=str(tmp_path / "parts" / "style.safetensors"))
    training = train(parts)
    for event in training:
        if isinstance(event, TrainStep) and event.index == 2:
            training.close()
    assert [path.name for path in (parts.run_folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert isinstance(list(train(parts, resume=True))[-1], Done)
    assert same(whole / "checkpoints" / "step-00000004", parts.run_folder / "checkpoints" / "step-00000004")
    assert log(whole) == log(parts.run_folder)
    assert len({row["loss"] for row in log(whole)}) == 4


def test_full_training_in_two_parts(options: TrainOptions, tmp_path: Path) -> None:
    options = replace(options, method="full", output=str(tmp_path / "tuned"), dtype="bfloat16", steps=2, hold_out="0")
    list(train(options))
    parts = replace(options, output=str(tmp_path / "parts"))
    training = train(parts)
    for event in training:
        if isinstance(event, TrainStep):
            training.finish()
    list(train(parts, resume=True))
    one, other = (o.run_folder / "checkpoints" / "step-00000002" for o in (options, parts))
    a, b = arrays(one), arrays(other)
    assert all(mx.array_equal(a[name], b[name]) for name in a)
    weights: dict[str, mx.array] = mx.load(str(tmp_path / "tuned" / "transformer.safetensors"))  # type: ignore[assignment]
    assert {array.dtype for array in weights.values()} == {mx.bfloat16}
    assert KleinPipeline.from_pretrained(tmp_path / "tuned")("a red circle", seed=0).images[0].size == (128, 128)
    assert main(["info", str(tmp_path / "tuned")]) == 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_saving_takes_less_than_a_block(method: str, options: TrainOptions, tmp_path: Path) -> None:
    """Of memory, above what there is after the update."""
    transformer = open_checkpoint(TINY_FOLDER).config.transformer
    block = 26 * transformer.hidden_size**2 * 4
    before = 0
    for event in train(replace(options, method=method, output=str(tmp_path / "x.safetensors"), steps=1, hold_out="0")):
        if isinstance(event, TrainStep):
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
        elif isinstance(event, Checkpoint):
            assert mx.get_peak_memory() - before < block


def test_more_steps(options: TrainOptions, capsys: pytest.CaptureFixture[str]) -> None:
    list(train(replace(options, steps=2)))
    assert main(["train", "--resume", str(options.run_folder), "--steps", "3"]) == 0
    assert [row["step"] for row in log(options.run_folder)] == [1, 2, 3]
    assert capsys.readouterr().out.strip() == options.output
    assert main(["train", "--resume", str(options.run_folder), "--rank", "3"]) == 2
    assert "rank is 3, but" in capsys.readouterr().err
    assert main(["train", "--resume", str(options.run_folder), "--steps", "1"]) == 2
    assert "has 3 already" in capsys.readouterr().err


def test_what_is_encoded_is_kept(options: TrainOptions, data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    options = replace(options, data=str(copy), steps=1, run=str(tmp_path / "run"))

    def encoded() -> list[str]:
        shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
        (tmp_path / "run" / "options.toml").unlink(missing_ok=True)
        Path(options.output).unlink(missing_ok=True)
        return [e.text for e in train(options) if isinstance(e, Notice) and e.text.startswith("encoding")]

    assert encoded() == ["encoding   4 captions and 3 pictures"]  # and ""
    assert encoded() == []
    (copy / "00.txt").write_text("another caption")
    assert encoded() == ["encoding   1 captions and 0 pictures"]


def test_a_preview_is_what_generate_draws(options: TrainOptions, tmp_path: Path) -> None:
    options = replace(options, preview=("a red circle",), save_every=2, learning_rate=0.1, seed=7)
    events = list(train(options))
    drawn = [event for event in events if isinstance(event, Preview)]
    steps = [event for event in events if isinstance(event, Checkpoint)]
    assert [preview.step for preview in drawn] == [2, 4]
    out = tmp_path / "again.png"
    words = ["generate", "a red circle", "--model", "tiny", "--seed", "7", "--width", "64", "--height", "64"]
    assert main([*words, "--lora", f"{steps[-1].path / 'lora.safetensors'}:1", "-o", str(out)]) == 0
    with Image.open(out) as image, Image.open(drawn[-1].path or "") as preview:
        assert image.convert("RGB").tobytes() == preview.convert("RGB").tobytes() == drawn[-1].image.tobytes()
    with Image.open(options.run_folder / "previews.png") as sheet:
        assert sheet.size == (128, 64)


def test_a_collapse_is_told(options: TrainOptions) -> None:
    options = replace(options, learning_rate=1.0, warmup=0, steps=12, hold_out_every=1, stop_early=True)
    events = list(train(options))
    warnings = [event.text for event in events if isinstance(event, Notice) and event.is_warning]
    assert "training has collapsed" in warnings[0]
    assert len([event for event in events if isinstance(event, TrainStep)]) < 12


def test_what_is_not_finite_is_skipped(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    from klein_mlx.train import session

    monkeypatch.setattr(session, "norm_of", lambda gradients: mx.array(float("nan")))
    events = list(train(options))
    assert all(event.skipped for event in events if isinstance(event, TrainStep))
    state = arrays(options.run_folder / "checkpoints" / "step-00000004")
    assert not any(mx.any(a).item() for name, a in state.items() if name.endswith(".up") and name.startswith("weight"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_running_update_be_the_last(
    number: signal.Signals, code: int, options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Training._told

    def raising(self: Training, *args: Any) -> TrainStep:
        if self.step == 2:
            signal.raise_signal(number)
        return told(self, *args)

    monkeypatch.setattr(Training, "_told", raising)
    words = ["--model", "tiny", "--resolution", "64", "--rank", "2", "--accumulate", "1", "--hold-out", "0", "--quiet"]
    assert main(["train", options.data, "-o", options.output, "--steps", "9", *words]) == code
    assert [path.name for path in (options.run_folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert not Path(options.output).exists()


def test_a_file_called_stop(options: TrainOptions) -> None:
    events = []
    for event in train(options):
        events.append(event)
        if isinstance(event, TrainStep) and event.index == 2:
            (options.run_folder / "stop").touch()
    assert isinstance(events[-1], Checkpoint)
    assert events[-1].step == 2


def test_only_the_newest_and_the_best_are_kept(options: TrainOptions) -> None:
    list(train(replace(options, save_every=1, keep_last=1)))
    kept = {path.name for path in (options.run_folder / "checkpoints").iterdir()}
    assert "step-00000004" in kept
    assert len(kept) <= 2


def test_keeping_a_class_costs_nothing_at_scale_0(options: TrainOptions) -> None:
    """Before the first update the factors up are zero: the velocity is the model's own, exactly."""
    training = Training(replace(options, trigger="ohwx", keep="shape", dropout=0.0))
    for event in training:
        if isinstance(event, Notice) and event.text.startswith("training"):
            break
    frame: Any = training._events.gi_yieldfrom.gi_frame  # type: ignore[attr-defined]
    session = frame.f_locals["session"]
    sample, captions, _, _ = session._sample(0)
    plain = session._preserving(sample, captions)
    assert session.blockwise.loss(plain) == 0.0
    training.close()


FAULTS: list[tuple[Callable[[Path, TrainOptions], TrainOptions], str]] = [
    (lambda a, o: replace(o, model="nowhere"), "unknown model 'nowhere'"),
    (lambda a, o: replace(o, rank=4000), "rank is 4000"),
    (lambda a, o: replace(o, targets="to_z"), "matches no layer"),
    (lambda a, o: replace(o, output=str(a / "gone" / "x.safetensors"), run=str(a / "r")), "is not a folder"),
    (lambda a, o: replace(o, dtype="float16"), "training is done in bfloat16 or float32"),
    (lambda a, o: replace(o, preview=("x",), preview_model="nowhere", save_every=1), "'nowhere'"),
    (lambda a, o: replace(o, data=str(a)), "holds no pictures"),
]


@pytest.mark.parametrize(("spoil", "words"), FAULTS)
def test_a_fault_is_one_line(
    spoil: Callable[[Path, TrainOptions], TrainOptions], words: str, options: TrainOptions, tmp_path: Path
) -> None:
    with pytest.raises(KleinError) as error:
        list(train(spoil(tmp_path, options)))
    assert words in str(error.value)
    assert not Path(options.output).exists()


def test_nothing_is_overwritten(options: TrainOptions) -> None:
    Path(options.output).write_text("mine")
    with pytest.raises(RequestError, match="exists; give another name"):
        list(train(options))
    Path(options.output).unlink()
    list(train(replace(options, steps=1)))
    Path(options.output).unlink()
    with pytest.raises(RequestError, match="holds a run; continue it with --resume"):
        list(train(options))


def test_a_run_that_failed_at_its_beginning_can_be_begun_again(options: TrainOptions) -> None:
    for spoiled, words in ((replace(options, rank=500), "rank is 500"), (replace(options, targets="x"), "no layer")):
        with pytest.raises(RequestError, match=words):
            make_plan(spoiled)  # before anything is loaded or written
    (options.run_folder).mkdir()
    cache = options.run_folder / "cache"
    cache.write_text("")
    with pytest.raises(RequestError, match="the cache cannot be written to .*cache: "):
        list(train(options))
    cache.unlink()
    list(train(replace(options, rank=3, steps=1)))
    entry = max(cache.glob("*.safetensors"))
    entry.write_bytes(entry.read_bytes()[:-40])
    with pytest.raises(RequestError, match="is damaged; remove it, and go on with --resume"):
        list(train(replace(options, rank=3, steps=9), resume=True))


def test_a_run_in_use(options: TrainOptions) -> None:
    one = train(options)
    next(one)
    with pytest.raises(RequestError, match="holds a run|is in use"):
        next(train(options))
    with pytest.raises(RequestError, match="is in use by another training"):
        next(train(options, resume=True))
    one.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: Image.new("RGB", (128, 128)).save(path), "00.png has changed since it was checked"),
        (lambda path: path.unlink(), "00.png cannot be read: No such file"),
    ],
)
def test_a_picture_that_changes_before_it_is_encoded(
    change: Callable[[Path], Any], words: str, options: TrainOptions, data: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    training = train(replace(options, data=str(copy)))
    next(training)
    change(copy / "00.png")
    with pytest.raises(RequestError, match=words):
        list(training)


def test_a_full_disk_leaves_no_half_checkpoint(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    from klein_mlx.train import runs

    def full(path: str, arrays: Any) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("[save_safetensors] Failed to write: No space left on device")

    monkeypatch.setattr(runs.mx, "save_safetensors", full)
    folder = runs.RunFolder(options.run_folder)
    with pytest.raises(RequestError, match="step-00000003 cannot be written: .*No space left"):
        folder.save(3, {"step": 3}, {}, lambda path: None)
    assert list((options.run_folder / "checkpoints").iterdir()) == []


def test_data_that_changed_before_a_resume(options: TrainOptions, data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    options = replace(options, data=str(copy))
    list(train(replace(options, steps=1)))
    (copy / "00.txt").write_text("another caption")
    with pytest.raises(RequestError, match="has changed since"):
        list(train(options, resume=True))


def test_one_picture_is_enough(options: TrainOptions, data: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    for suffix in ("png", "txt"):
        shutil.copy(data / f"00.{suffix}", tmp_path / "one")
    events = list(train(replace(options, data=str(tmp_path / "one"), steps=1)))
    assert isinstance(events[-1], Done)


def test_a_distilled_model_is_refused(tmp_path: Path) -> None:
    from klein_mlx.config import VARIANTS
    from klein_mlx.train import plan

    variant = next(v for v in VARIANTS if v.name == "4b")
    config: Any = type("Config", (), {"variant": variant, "is_distilled": True})
    options = TrainOptions("x", "x.safetensors", "4b")
    with pytest.raises(RequestError, match="train base-4b, whose LoRAs work on it, or give --anyway"):
        plan.check_variant(config, options)
    plan.check_variant(config, replace(options, anyway=True))


def test_the_command_tells_what_it_would_do(
    options: TrainOptions, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(data), "-o", options.output, "--model", "tiny", "--resolution", "128"]
    assert main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "pictures   3" in out
    assert "held out   1 of 3" in out
    assert "on disk    " in out
    assert "for 4 captions" in out
    assert "TFLOP an update" in out
    assert main([*words, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"event": "plan", "lines": out.splitlines()}
    assert not options.run_folder.exists()
    assert main(["train"]) == 2
    assert "train needs DATA" in capsys.readouterr().err


def test_how_long_a_run_takes_on_a_mac(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiny: 5 blocks of 13 * 192^2 weights that a token meets, two operations each; attention; three passes."""
    found = make_plan(options)
    tokens = found.source.config.max_sequence_length + 16
    work = 3 * 5 * tokens * (2 * 13 * 192**2 + 4 * tokens * 192)
    assert f"time       {work / 1e12:.3g} TFLOP an update" in found.lines()
    ignored = "ignored    hold_out_every: nothing is held out"
    assert ignored not in found.lines()
    assert ignored in make_plan(replace(options, hold_out="0")).lines()
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M3 Max"})
    seconds = work / (14.2e12 * 0.8)
    assert f": {seconds:.2g} s on M3 Max, {4 * seconds / 3600:.2g} hours in all (estimates)" in found.lines()[-2]
