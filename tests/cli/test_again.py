"""`again` and `show`: the same pixels from a picture's own recipe, and what is said where that cannot be."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from test_cli import PROMPT, TINY, klein

import klein_mlx
from klein_mlx.images.saving import read_metadata, save_image

STEP = ("--steps", "1", "--seed", "7", "--quiet")


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a picture to edit, and a mask."""
    Image.effect_noise((96, 80), 90).convert("RGB").save(tmp_path / "in.png")
    mask = Image.new("L", (96, 80), 255)
    mask.paste(0, (0, 0, 96, 40))
    mask.save(tmp_path / "mask.png")
    return tmp_path


@pytest.mark.parametrize(
    ("suffix", "arguments"),
    [
        (".png", ("--size", "3:2")),
        (".jpg", ("--sigmas", "1,0.6")),
        (".webp", ("-i", "in.png", "-i", "mask.png", "--reuse-references")),
        (".png", ("--init-image", "in.png", "--mask", "mask.png", "--mask-blur", "2", "--mask-crop", "8")),
        (".jpg", ("--init-image", "in.png", "--extend", "left=16,bottom=32")),
        (".webp", ("--init-image", "in.png", "--strength", "0.3", "-i", "mask.png", "-q", "8")),
    ],
)
def test_the_same_pixels(folder: Path, suffix: str, arguments: tuple[str, ...]) -> None:
    """And the same file, since a recipe that is made again is the same recipe."""
    step = STEP[2:] if "--sigmas" in arguments else STEP
    first = klein(*TINY, PROMPT, *step, *arguments, "-o", f"a{suffix}", cwd=folder)
    assert first.returncode == 0, first.stderr
    again = klein("again", f"a{suffix}", "-o", f"b{suffix}", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert pixels(folder / f"a{suffix}") == pixels(folder / f"b{suffix}")
    assert (folder / f"a{suffix}").read_bytes() == (folder / f"b{suffix}").read_bytes()


def test_a_recipe_holds_no_folder_and_no_name(folder: Path) -> None:
    deep = folder / "secret-user" / "deep"
    deep.mkdir(parents=True)
    shutil.move(folder / "in.png", deep / "in.png")
    shutil.copytree(Path(klein_mlx.__file__).parent / "tiny", deep / "model", ignore=shutil.ignore_patterns("__*"))
    for suffix in (".png", ".jpg", ".webp"):
        output = deep / f"out{suffix}"
        arguments = ("-m", deep / "model", "-i", deep / "in.png", "--init-image", deep / "in.png", "-o", output)
        done = klein("generate", PROMPT, *STEP, *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
        content = output.read_bytes()
        for secret in ("secret-user", str(folder), str(Path.home()), "/deep"):
            assert secret.encode() not in content
            assert secret.encode("utf-16-be") not in content
        recipe = read_metadata(output).recipe
        assert recipe
        assert recipe["image"][0]["name"] == "in.png"
        assert recipe["model"]["name"] == "model"
    nameless = klein("again", "secret-user/deep/out.png", "-o", "b.png", cwd=folder)
    assert nameless.stderr == "error: the picture was made with the model in a folder 'model'; give it with --model\n"
    found = klein("again", "out.png", "-o", "b.png", cwd=deep)
    assert found.returncode == 0, found.stderr
    assert pixels(deep / "b.png") == pixels(deep / "out.png")


def test_overrides(folder: Path) -> None:
    assert klein(*TINY, "a star", *STEP, "-i", "in.png", "-o", "a.png", cwd=folder).returncode == 0
    arguments = ("--seed", "8", "--size", "64x96", "--prompt", "a {red} cross", "-o", "b.png")
    done = klein("again", "a.png", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    direct = ("-i", "in.png", "--steps", "1", "--seed", "8", "--size", "64x96", "-o", "c.png")
    assert klein(*TINY, "a {red} cross", *direct, cwd=folder).returncode == 0
    assert (folder / "b.png").read_bytes() == (folder / "c.png").read_bytes()
    (folder / "new").mkdir()
    shutil.move(folder / "in.png", folder / "new" / "renamed.png")
    lost = klein("again", "a.png", "-o", "d.png", cwd=folder)
    assert lost.returncode == 2
    assert lost.stderr.startswith("error: a.png was made with 'in.png' (sha256 ")
    assert lost.stderr.endswith("neither beside the picture nor in the current folder; give it with --image\n")
    given = klein("again", "a.png", "-i", "new/renamed.png", "-o", "d.png", cwd=folder)
    assert given.returncode == 0, given.stderr
    assert pixels(folder / "d.png") == pixels(folder / "a.png")


def test_loras(folder: Path) -> None:
    """Found by their digest beside the picture, their scales kept."""
    shutil.copy(Path(__file__).parents[2] / "examples" / "tiny" / "silhouettes.safetensors", folder / "s.safetensors")
    step = (*STEP, "--lora", "s.safetensors:0.75")
    assert klein(*TINY, "a red circle", *step, "-o", "a.png", cwd=folder).returncode == 0
    again = klein("again", "a.png", "-o", "b.png", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()
    recipe = read_metadata(folder / "a.png").recipe
    assert recipe
    assert [(lora["file"], lora["scale"]) for lora in recipe["loras"]] == [("s.safetensors", 0.75)]
    (folder / "s.safetensors").unlink()
    lost = klein("again", "a.png", "-o", "c.png", cwd=folder)
    assert lost.stderr.startswith("error: a.png was made with the LoRA 's.safetensors' (sha256 ")
    assert "give it with --lora" in lost.stderr


def test_another_model_is_told(folder: Path) -> None:
    recipe = {"recipe": 1, "prompt": "a star", "seed": 1, "steps": 1, "model": {"id": "tiny", "fingerprint": "00"}}
    save_image(Image.new("RGB", (8, 8)), folder / "x.png", recipe=recipe)
    done = klein("again", "x.png", "-o", "y.png", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "the model is not the one that made the picture: its fingerprint differs"


def test_the_variant_is_kept(folder: Path) -> None:
    """One that the files do not tell: with another, the same recipe is another picture, or none."""
    negative = ("--variant", "base-4b", "--negative", "blue")
    assert klein(*TINY, PROMPT, *STEP, *negative, "-o", "a.png", cwd=folder).returncode == 0
    again = klein("again", "a.png", "-o", "b.png", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()
    model = klein("again", "a.png", "-m", "tiny", "--negative", "", "-o", "c.png", cwd=folder)
    assert model.stderr.splitlines()[:2] == [
        "the picture was made with --variant base-4b",
        "made with 1 steps and guidance 4; tiny's own are 4 and 1",
    ]
    part = (*TINY, PROMPT, *STEP, *negative, "--vae", "tiny/vae.safetensors")
    shutil.copytree(Path(klein_mlx.__file__).parent / "tiny", folder / "tiny")
    assert klein(*part, "-o", "d.png", cwd=folder).returncode == 0
    lost = klein("again", "d.png", "-o", "e.png", cwd=folder)
    assert "give them: --vae vae.safetensors, --variant base-4b" in lost.stderr


def test_no_metadata(folder: Path) -> None:
    assert klein(*TINY, "a star", *STEP, "--no-metadata", "-o", "a.png", cwd=folder).returncode == 0
    with Image.open(folder / "a.png") as image:
        assert image.info == {}
    again = klein("again", "a.png", cwd=folder)
    assert again.stderr == "error: a.png has no recipe of klein-mlx inside; klein-mlx show says what it has\n"
    shown = klein("show", "a.png", cwd=folder)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith("error: a.png has no recipe")


def test_show(folder: Path) -> None:
    klein(*TINY, "a star\x1b[31m, 赤い 🦊", *STEP, "-i", "in.png", "-o", "a.webp", cwd=folder)
    shown = klein("show", "a.webp", cwd=folder)
    assert shown.returncode == 0, shown.stderr
    assert "\x1b" not in shown.stdout
    for words in (
        "a star\\x1b[31m, 赤い 🦊",
        "tiny (tiny, fingerprint ",
        "in.png sha256 ",
        "klein_mlx 0.",
        ", mlx 0.",
    ):
        assert words in shown.stdout
    report = json.loads(klein("show", "--json", "a.webp", cwd=folder).stdout)
    assert report["prompt"] == "a star\x1b[31m, 赤い 🦊"
    assert report["image"][0]["name"] == "in.png"
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "a cat\nSteps: 20, Seed: 5")
    Image.new("RGB", (8, 8)).save(folder / "foreign.png", pnginfo=info)
    foreign = klein("show", "foreign.png", cwd=folder)
    assert foreign.stdout.splitlines()[0] == "no recipe of klein-mlx; what another program wrote:"
    assert "Steps   20" in foreign.stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": 99}, "its recipe was written by a newer klein-mlx"),
        ({"model": None}, "its recipe names no model"),
        ({"model": {"id": "/etc"}}, "its recipe names the model '/etc'; give one with --model"),
        ({"model": {"id": "tiny"}, "steps": "four"}, "its recipe is damaged: steps is 'four'"),
        ({"model": {"id": "tiny"}, "steps": 10**9}, "--steps is 1000000000; it must be a whole number from 1 to 1000"),
        (
            {"model": {"id": "tiny"}, "image": ["x"]},
            "was made with a picture that was not a file; give it with --image",
        ),
        ({"model": {"id": "tiny"}, "given": ["latents"]}, "was made with latents given in Python"),
        ({"model": {"id": "tiny"}, "loras": [7]}, "its recipe is damaged: a LoRA is 7"),
        ({"model": {"id": "tiny"}, "negative": ["x"]}, "its recipe is damaged: negative is ['x']"),
    ],
)
def test_recipes_from_anyone(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    """What a stranger's picture asks for is checked as if it were typed; it names no file and writes none."""
    recipe = {"recipe": 1, "klein_mlx": "0.1.0", "prompt": "a star", "seed": 1, "output": "/tmp/x.png", **changes}
    save_image(Image.new("RGB", (8, 8)), tmp_path / "x.png", recipe=recipe)
    done = klein("again", "x.png", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_in_python(tmp_path: Path) -> None:
    from klein_mlx import KleinPipeline

    pipe = KleinPipeline.from_pretrained("tiny")
    out = pipe(["a star", "a cross"], seed=[3, 5], num_inference_steps=1)
    assert [(r["prompt"], r["seed"]) for r in out.recipes] == [(p, s) for p in ("a star", "a cross") for s in (3, 5)]
    paths = out.save(tmp_path / "x.png")
    assert [path.name for path in paths] == ["x-1.png", "x-2.png", "x-3.png", "x-4.png"]
    found = read_metadata(paths[2]).recipe
    assert found
    assert found == out.recipes[2]
    assert found["schedule"][-1] == 0
    assert found["model"] == {"variant": "tiny", "id": "tiny", "fingerprint": pipe.recorder.fingerprint}
    given = pipe(prompt="a star", latents=__import__("numpy").zeros((1, 64, 8, 8), "float32"), num_inference_steps=1)
    assert (given.recipes[0]["seed"], given.recipes[0]["given"]) == (None, ["latents"])


def test_literal_prompt_is_told_kept_and_made_again(folder: Path) -> None:
    """A mark of the model's own in a prompt is told; as text it makes another picture, and the recipe says so."""
    prompt = "a star<|im_end|>"
    plain = klein(*TINY, prompt, *STEP[:-1], "-o", "plain.png", cwd=folder)
    assert "<|im_end|> is a mark of the model's own; --literal-prompt makes it text" in plain.stderr
    literal = klein(*TINY, prompt, *STEP[:-1], "--literal-prompt", "-o", "literal.png", cwd=folder)
    assert literal.returncode == 0, literal.stderr
    assert "mark of the model" not in literal.stderr
    assert pixels(folder / "plain.png") != pixels(folder / "literal.png")
    assert klein("again", "literal.png", "-o", "same.png", cwd=folder).returncode == 0
    assert (folder / "literal.png").read_bytes() == (folder / "same.png").read_bytes()


def test_show_goes_on_after_a_picture_that_says_nothing(folder: Path) -> None:
    assert klein(*TINY, PROMPT, *STEP, "-o", "z.png", cwd=folder).returncode == 0
    (folder / "junk.png").write_bytes(b"junk")
    shown = klein("show", "in.png", "none.png", "junk.png", "z.png", "--json", cwd=folder)
    assert shown.returncode == 2
    assert json.loads(shown.stdout)["file"] == "z.png"
    assert [line.split(":")[0] for line in shown.stderr.splitlines()] == ["error"] * 3
    for name in ("in.png", "none.png", "junk.png"):
        assert name in shown.stderr


def test_a_second_prompt_is_an_option(folder: Path) -> None:
    done = klein("again", "z.png", "a cat", cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert "another prompt is --prompt (see klein-mlx again --help)" in done.stderr
