"""Trains the `tiny` checkpoint from nothing: one command, seeded, resumable.

    python examples/tiny/make.py --out DIR [--start FOLDER]

Stages run one after the other, each as its own script; a stage whose result is there is skipped, a killed one resumes.
At the end DIR/tiny is a folder in diffusers' layout for Flux2KleinPipeline.from_pretrained, and DIR/tiny/figures.json
says what was measured. `--export-only` writes that folder from what is there.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# stage: (script, what shows that it is done)
STAGES = {
    "vae": ("train_vae.py", "vae/config.json"),
    "text_encoder": ("train_text_encoder.py", "text_encoder/config.json"),
    "pool": ("pool.py", "pool.pt"),
    "student": ("train_student.py", "student.done"),
}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}
INDEX = {
    "_class_name": "Flux2KleinPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}


def run_stage(name: str, out: Path, seed: int, more: list[str]) -> None:
    """Run one stage unless its mark is there, and say how long it took."""
    script, mark = STAGES[name]
    if (out / mark).exists():
        print(f"{name}: done before", flush=True)
        return
    start = time.monotonic()
    subprocess.run([sys.executable, str(HERE / script), "--out", str(out), "--seed", str(seed), *more], check=True)
    if mark.endswith(".done"):
        (out / mark).touch()
    print(f"{name}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


def export(out: Path, destination: Path) -> None:
    """Gather the student's folder in diffusers' layout."""
    scratch = destination.with_name(destination.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(out / part, scratch / part)
    shutil.copytree(out / "student", scratch / "transformer")
    for config in scratch.glob("*/config.json"):
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2) + "\n")
    (scratch / "scheduler").mkdir()
    (scratch / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    from text import LENGTH
    from train_text_encoder import TAPS

    # The last three are for klein-mlx, which finds them nowhere else; diffusers ignores them with a warning.
    ours = {"text_encoder_out_layers": list(TAPS), "max_sequence_length": LENGTH, "default_size": 128}
    index = {**INDEX, "is_distilled": True, **ours}
    (scratch / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.rmtree(destination, ignore_errors=True)
    scratch.rename(destination)


def stage_minutes(out: Path) -> dict[str, float]:
    """Minutes of every stage, from the last line of its log."""
    minutes = {}
    for log in sorted(out.glob("*.log")):
        times = re.findall(r"^\[ *([\d.]+) min\]", log.read_text(), re.MULTILINE)
        if times and log.stem in STAGES:
            minutes[log.stem] = float(times[-1])
    return minutes


def measure(out: Path, folder: Path, prompts: int, edits: int, seeds: list[int]) -> None:
    """Evaluate an exported student with 4 steps and guidance 1, and write figures.json into it."""
    command = [sys.executable, str(HERE / "evaluate.py"), "--folder", str(folder), "--pipeline", "4"]
    command += ["--prompts", str(prompts), "--edits", str(edits), "--seeds", *map(str, seeds)]
    subprocess.run(command, check=True)
    figures = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").unlink()
    figures = {"training_minutes": stage_minutes(out), **figures}
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="a diffusers folder whose VAE is kept, the rest trained on")
    parser.add_argument("--steps", type=int, default=1900, help="updates of the student; from nothing it takes more")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--export-only", action="store_true")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.start is not None and not (chosen.out / "vae").exists():
        shutil.copytree(chosen.start / "vae", chosen.out / "vae")
    student = ["--steps", str(chosen.steps)]
    student += ["--start", str(chosen.start / "transformer")] if chosen.start is not None else []
    encoder = ["--steps", "1500", "--start", str(chosen.start)] if chosen.start is not None else []
    if not chosen.export_only:
        for stage in STAGES:
            run_stage(stage, chosen.out, chosen.seed, {"student": student, "text_encoder": encoder}.get(stage, []))
    export(chosen.out, chosen.out / "tiny")
    measure(chosen.out, chosen.out / "tiny", chosen.prompts, chosen.edits, chosen.seeds)
