"""A LoRA that was trained on tiny (examples/tiny/train_lora.py): its pictures are silhouettes, in any layout."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checker import judge_scene, read
from lora_layouts import LAYOUTS, Factors, Twin, save
from train_lora import COLOUR, blackened
from train_lora import silhouettes as cases

from klein_mlx import KleinPipeline
from klein_mlx.cli.main import main

TRAINED = Path(__file__).parent.parent / "examples" / "tiny" / "silhouettes.safetensors"


def trained() -> Twin:
    """The factors."""
    tensors = mx.load(str(TRAINED))
    assert isinstance(tensors, dict)
    arrays = {name: np.array(array.astype(mx.float32)) for name, array in tensors.items()}
    twin: Twin = {}
    for name, down in arrays.items():
        path, _, kind = name.removeprefix("transformer.").rpartition(".lora_")
        if kind == "A.weight":
            up = arrays[f"transformer.{path}.lora_B.weight"]
            twin[path] = Factors(up, down, float(len(down)))
    return twin


def silhouettes(pipe: KleinPipeline, count: int) -> tuple[float, float]:
    """Of pictures of `count` prompts: the share with all shapes as told but black, and with the colours asked for."""
    black, asked = [], []
    for seed, (words, scene) in enumerate(cases(count, seed=3, held=True)):
        picture = np.asarray(pipe(words, seed=seed).images[0])
        meant = blackened(scene)
        verdict = judge_scene(picture, meant)
        regions = read(picture).regions
        one_colour = all(region.colour == COLOUR for region in regions) and len(regions) == len(scene.shapes)
        black.append(one_colour and verdict["background"] and all(verdict["kinds"]))  # type: ignore[arg-type]
        asked.append(all(judge_scene(picture, scene)["colours"]))  # type: ignore[arg-type]
    return float(np.mean(black)), float(np.mean(asked))


@pytest.mark.parametrize("layout", ["peft", "musubi sparse"])
def test_the_checker_sees_it(layout: str, tmp_path: Path) -> None:
    """23 of 24 pictures are silhouettes with it and none without it, measured; here 5 have to be, and none."""
    file = TRAINED if layout == "peft" else save(tmp_path / "lora.safetensors", *LAYOUTS[layout](trained()))
    pipe = KleinPipeline.from_pretrained("tiny", keep="all")
    if layout == "peft":
        assert silhouettes(pipe, 3) == (0.0, 1.0)
    pipe.load_lora(file, name="silhouettes")
    assert silhouettes(pipe, 5) == (1.0, 0.0)
    pipe.set_lora_scale("silhouettes", 0.0)
    bare = KleinPipeline.from_pretrained("tiny", keep="all")
    words = cases(1)[0][0]
    assert pipe(words, seed=1).images[0].tobytes() == bare(words, seed=1).images[0].tobytes()


def test_the_command_applies_and_reports_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--lora with a scale behind the last colon; another colon belongs to the path."""
    import json

    folder = tmp_path / "a:b"
    folder.mkdir()
    file = folder / "style.safetensors"
    file.write_bytes(TRAINED.read_bytes())
    out = tmp_path / "out.png"
    words = ["generate", "a red circle on a white background", "--model", "tiny", "--seed", "1", "-o", str(out)]
    assert main([*words, "--lora", f"{file}:0.9", "--json"]) == 0
    printed = capsys.readouterr()
    assert "LoRA style: 20 of 20 modules, 0 keys unused, scale 0.9" in printed.err
    report = json.loads(printed.out.splitlines()[-1])
    assert [(lora["name"], lora["file"], lora["scale"]) for lora in report["loras"]] == [
        ("style", "style.safetensors", 0.9)
    ]
    assert len(report["loras"][0]["sha256"]) == 64
    from PIL import Image

    assert [region.colour for region in read(np.asarray(Image.open(out))).regions] == [COLOUR]
