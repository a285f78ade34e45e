"""Stage 2: the tokenizer and the text encoder, a four-layer Qwen3, on captions and instructions.

    python examples/tiny/train_text_encoder.py --out DIR [--start FOLDER]

Two losses: the next token, and linear probes that read the whole scene (or the edit) from the three taps of the last
token, which has seen all of the prompt. The encoder is frozen afterwards. Writes DIR/tokenizer, DIR/text_encoder.
With `--start` it goes on from the tokenizer and text encoder of a diffusers folder, at a third of the rate.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import Wording, caption, combine_instruction, instruction, place_of
from text import LENGTH, VOCABULARY, Prompts, save_tokenizer, train_tokenizer
from torch import Tensor, nn
from training import Log, MovingAverage, Optimisers, decayed, save_state
from transformers import Qwen3Config, Qwen3ForCausalLM
from world import COLOURS, EDIT_KINDS, KINDS, PLACES, RADIUS, Edit, Scene, random_edit, random_scene

HIDDEN = 128
TAPS = (1, 2, 3)
UNKNOWN = -100
# What the probes read; one answer more than there are names is "not said" (kinds: "no such shape"). Shapes stand in
# reading order (left or upper first), whatever the order in the caption.
FIELDS = {
    "task": 2 + len(EDIT_KINDS),
    "background": len(COLOURS) + 1,
    **{f"kind{i}": len(KINDS) + 1 for i in range(2)},
    **{f"colour{i}": len(COLOURS) for i in range(2)},
    **{f"size{i}": len(RADIUS) + 1 for i in range(2)},
    "place": len(PLACES) + 1,
    "axis": 3,
    "new_colour": len(COLOURS),
    "new_kind": len(KINDS),
    "which_kind": len(KINDS) + 1,
    "which_colour": len(COLOURS) + 1,
}


def scene_labels(scene: Scene, free: frozenset[str]) -> dict[str, int]:
    """The answers for a caption of the scene that leaves `free` open."""
    colours = list(COLOURS)
    labels = {"task": 0, "background": colours.index(scene.background) if "background" not in free else len(colours)}
    for i in range(2):
        labels[f"kind{i}"] = KINDS.index(scene.shapes[i].kind) if i < len(scene.shapes) else len(KINDS)
    for i, shape in enumerate(scene.shapes):
        if "colour" not in free:
            labels[f"colour{i}"] = colours.index(shape.colour)
        labels[f"size{i}"] = list(RADIUS).index(shape.size) if f"size{i}" not in free else len(RADIUS)
    if len(scene.shapes) == 1:
        place = place_of(scene.shapes[0])
        labels["place"] = list(PLACES).index(place) if place and "place" not in free else len(PLACES)
    elif scene.shapes:
        labels["axis"] = 2 if "axis" in free else int(scene.shapes[0].x == scene.shapes[1].x)
    return labels


def edit_labels(scene: Scene, edit: Edit, words: str) -> dict[str, int]:
    """The answers for an instruction; which shape is meant, where its plain names stand in the words."""
    labels = {"task": 1 + EDIT_KINDS.index(edit.kind)}
    if edit.kind in ("recolour", "background"):
        labels["new_colour"] = list(COLOURS).index(edit.value)
    if edit.kind == "replace":
        labels["new_kind"] = KINDS.index(edit.value)
    if edit.kind != "background":
        shape, said = scene.shapes[edit.index], words.lower()
        if shape.kind in said:
            labels["which_kind"] = KINDS.index(shape.kind)
        if shape.colour in said:
            labels["which_colour"] = list(COLOURS).index(shape.colour)
    return labels


def sample(rng: np.random.Generator, combinations: bool = False, held: bool = False) -> tuple[str, dict[str, int]]:
    """A prompt of any task with its answers; combinations, held: of combinations, in wordings, held out of training."""
    draw = rng.random()
    if draw < 0.03:
        scene = Scene(list(COLOURS)[int(rng.integers(10))])
        return caption(scene, rng, held).words, scene_labels(scene, frozenset())
    scene = random_scene(rng, 1 if draw > 0.93 else None, combinations)
    if draw < 0.6:
        wording: Wording = caption(scene, rng, held)
        return wording.words, scene_labels(scene, wording.free)
    if draw > 0.93:
        return combine_instruction(scene, rng, held).words, {"task": 5}
    edit = random_edit(scene, EDIT_KINDS[int(rng.integers(4))], rng, combinations)
    words = instruction(scene, edit, rng, held).words
    return words, edit_labels(scene, edit, words)


def batch_of(
    rng: np.random.Generator, count: int, prompts: Prompts, combinations: bool = False, held: bool = False
) -> tuple[Tensor, ...]:
    """Ids and mask (B, LENGTH), answers (B, fields) with UNKNOWN where the prompt says nothing."""
    samples: list[tuple[str, dict[str, int]]] = []
    while len(samples) < count:
        words, labels = sample(rng, combinations, held)
        if prompts.fits(words):
            samples.append((words, labels))
    ids, mask = prompts([words for words, _ in samples])
    answers = [[labels.get(name, UNKNOWN) for name in FIELDS] for _, labels in samples]
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.tensor(answers)


def new_encoder(seed: int, pad: int, end: int) -> Qwen3ForCausalLM:
    """A fresh encoder; every matrix has sides that are multiples of 64."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
        pad_token_id=pad,
        eos_token_id=end,
    )
    config._attn_implementation = "eager"  # the fused CPU kernel has a backward pass four times as slow
    return Qwen3ForCausalLM(config)


def taps_of(encoder: Qwen3ForCausalLM, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The concatenated taps (B, LENGTH, 3 * HIDDEN) and the logits."""
    output = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return torch.cat([output.hidden_states[k] for k in TAPS], dim=-1), output.logits


def losses(encoder: Qwen3ForCausalLM, probe: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Next-token loss, probe loss, and for every field and prompt whether the probe is right (B, fields)."""
    ids, mask, answers = batch
    with torch.autocast("cpu", torch.bfloat16):
        taps, logits = taps_of(encoder, ids, mask)
        last = taps[torch.arange(len(ids)), mask.sum(1) - 1]
        read = probe(last)
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, UNKNOWN)
    language = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=UNKNOWN)
    reading, right = torch.zeros(()), []
    for column, piece in enumerate(read.float().split(list(FIELDS.values()), dim=1)):
        wanted = answers[:, column]
        reading = reading + F.cross_entropy(piece, wanted, ignore_index=UNKNOWN, reduction="sum") / len(ids)
        right.append((piece.argmax(1) == wanted) | (wanted == UNKNOWN))
    return language, reading, torch.stack(right, dim=1)


@torch.no_grad()
def reading_accuracy(encoder: Qwen3ForCausalLM, probe: nn.Module, prompts: Prompts, held: bool) -> dict[str, float]:
    """Share of 1,000 prompts of held-out combinations of which every field is read right, and the worst fields."""
    batch = batch_of(np.random.default_rng(99), 1000, prompts, True, held)
    right = losses(encoder, probe, batch)[2]
    fields = dict(zip(FIELDS, right.float().mean(0).tolist(), strict=True))
    worst = sorted(fields, key=fields.__getitem__)[:4]
    return {"all": float(right.all(dim=1).float().mean()), **{name: fields[name] for name in worst}}


def train(out: Path, steps: int, batch: int, seed: int, start: Path | None) -> None:
    """Train tokenizer and encoder, from nothing or from those in `start`; resumes from out/text_encoder.pt."""
    if start is not None and not (out / "tokenizer").exists():
        shutil.copytree(start / "tokenizer", out / "tokenizer")
    if not (out / "tokenizer" / "tokenizer.json").exists():
        save_tokenizer(train_tokenizer(seed), out / "tokenizer")
    prompts = Prompts(out / "tokenizer")
    encoder = new_encoder(seed, prompts.pad, prompts.tokenizer.token_to_id("<|im_end|>"))
    if start is not None:
        old = Qwen3ForCausalLM.from_pretrained(start / "text_encoder", dtype=torch.float32)
        encoder.load_state_dict(old.state_dict())
    probe = nn.Linear(len(TAPS) * HIDDEN, sum(FIELDS.values()))
    both = nn.ModuleList([encoder, probe])
    optimisers = Optimisers(both.named_parameters(), *((1e-2, 2e-3) if start is None else (3e-3, 7e-4)))
    average = MovingAverage(both, 0.99)
    step, spent, path = 0, 0.0, out / "text_encoder.pt"
    if path.exists():
        state = torch.load(path)
        both.load_state_dict(state["both"])
        optimisers.load_state_dict(state["optimisers"])
        average.values, average.steps, step, spent = state["average"], state["step"], state["step"], state["minutes"]
    log = Log(out, "text_encoder", spent)
    log(parameters=sum(p.numel() for p in encoder.parameters()), length=LENGTH, step=step)
    while step < steps:
        items = batch_of(np.random.default_rng((seed, step)), batch, prompts)
        language, reading, right = losses(encoder, probe, items)
        (language + reading).backward()
        optimisers.step(min(1.0, (step + 1) / 30) * decayed(step / steps, 0.4))
        average.update(both)
        step += 1
        if step % 50 == 0:
            log(step=step, language=language.item(), reading=reading.item(), fields=right.float().mean().item())
        if step % 250 == 0 or step == steps:
            parts = {"both": both.state_dict(), "optimisers": optimisers.state_dict(), "average": average.values}
            save_state(path, {**parts, "step": step, "minutes": log.minutes})
            average.swap(both)
            for held in (False, True):
                log(step=step, held_out_wordings=held, **reading_accuracy(encoder, probe, prompts, held))
            average.swap(both)
    average.swap(both)
    encoder.to(torch.bfloat16).save_pretrained(out / "text_encoder")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="a diffusers folder whose tokenizer and text encoder go on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train(options.out, options.steps, options.batch, options.seed, options.start)
