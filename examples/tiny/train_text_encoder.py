"""Stage 2: the tokenizer and the text encoder, a four-layer Qwen3, on captions and instructions.

    python examples/tiny/train_text_encoder.py --out DIR --minutes 4

Two losses: the next token, and linear probes that read the whole scene (or the edit) from the three taps of the last
token, which has seen all of the prompt. The encoder is frozen afterwards. Writes DIR/tokenizer, DIR/text_encoder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from text import LENGTH, VOCABULARY, Prompts, save_tokenizer, train_tokenizer
from torch import Tensor, nn
from training import Log, MovingAverage, Optimisers, decayed, save_state
from transformers import Qwen3Config, Qwen3ForCausalLM
from world import (
    COLOURS,
    EDIT_KINDS,
    KINDS,
    PLACES,
    RADIUS,
    Edit,
    Scene,
    caption,
    combine_instruction,
    instruction,
    is_captioned,
    random_edit,
    random_scene,
)

HIDDEN = 128
TAPS = (1, 2, 3)
UNKNOWN = -100
# What the probes read. Shapes are in reading order (left or upper first), whatever the order in the caption.
FIELDS = {
    "task": 2 + len(EDIT_KINDS),
    "background": len(COLOURS),
    **{f"kind{i}": len(KINDS) + 1 for i in range(2)},
    **{f"colour{i}": len(COLOURS) for i in range(2)},
    **{f"size{i}": len(RADIUS) for i in range(2)},
    **{f"place{i}": len(PLACES) for i in range(2)},
    "new_colour": len(COLOURS),
    "new_kind": len(KINDS),
    "which_kind": len(KINDS),
    "which_colour": len(COLOURS),
}


def scene_labels(scene: Scene) -> dict[str, int]:
    """The answers for a caption of the scene."""
    colours, places = list(COLOURS), list(PLACES.values())
    labels = {"task": 0, "background": colours.index(scene.background)}
    shapes = sorted(scene.shapes, key=lambda shape: (shape.y, shape.x))
    for i in range(2):
        labels[f"kind{i}"] = KINDS.index(shapes[i].kind) if i < len(shapes) else len(KINDS)
        if i < len(shapes):
            labels[f"colour{i}"] = colours.index(shapes[i].colour)
            labels[f"size{i}"] = list(RADIUS).index(shapes[i].size)
            labels[f"place{i}"] = places.index((shapes[i].x, shapes[i].y))
    return labels


def edit_labels(scene: Scene, edit: Edit) -> dict[str, int]:
    """The answers for an instruction."""
    labels = {"task": 1 + EDIT_KINDS.index(edit.kind)}
    if edit.kind in ("recolour", "background"):
        labels["new_colour"] = list(COLOURS).index(edit.value)
    if edit.kind == "replace":
        labels["new_kind"] = KINDS.index(edit.value)
    if edit.kind != "background":
        labels["which_kind"] = KINDS.index(scene.shapes[edit.index].kind)
        labels["which_colour"] = list(COLOURS).index(scene.shapes[edit.index].colour)
    return labels


def sample(rng: np.random.Generator, held: bool = False) -> tuple[str, dict[str, int]]:
    """A prompt of any task with its answers."""
    draw = rng.random()
    if draw < 0.03:
        scene = Scene(list(COLOURS)[int(rng.integers(10))])
        return caption(scene, rng), scene_labels(scene)
    scene = random_scene(rng, 1 if draw > 0.93 else None, held)
    if draw < 0.6:
        while not is_captioned(scene):
            scene = random_scene(rng, 2, held)
        return caption(scene, rng), scene_labels(scene)
    if draw > 0.93:
        return combine_instruction(scene, rng), {"task": 5}
    edit = random_edit(scene, EDIT_KINDS[int(rng.integers(4))], rng, held)
    return instruction(scene, edit, rng), edit_labels(scene, edit)


def batch_of(rng: np.random.Generator, count: int, prompts: Prompts, held: bool = False) -> tuple[Tensor, ...]:
    """Ids and mask (B, LENGTH), answers (B, fields) with UNKNOWN where the prompt says nothing."""
    samples = [sample(rng, held) for _ in range(count)]
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
def reading_accuracy(encoder: Qwen3ForCausalLM, probe: nn.Module, prompts: Prompts) -> float:
    """Share of held-out prompts of which task, kinds, colours and new values are all read right."""
    batch = batch_of(np.random.default_rng(99), 1000, prompts, held=True)
    said = [i for i, n in enumerate(FIELDS) if n.startswith(("task", "kind", "colour", "new"))]
    return float(losses(encoder, probe, batch)[2][:, said].all(dim=1).float().mean())


def train(out: Path, minutes: float, batch: int, seed: int) -> None:
    """Train tokenizer and encoder; resumes from out/text_encoder.pt."""
    if not (out / "tokenizer" / "tokenizer.json").exists():
        save_tokenizer(train_tokenizer(seed), out / "tokenizer")
    prompts = Prompts(out / "tokenizer")
    encoder = new_encoder(seed, prompts.pad, prompts.tokenizer.token_to_id("<|im_end|>"))
    probe = nn.Linear(len(TAPS) * HIDDEN, sum(FIELDS.values()))
    both = nn.ModuleList([encoder, probe])
    optimisers = Optimisers(both.named_parameters(), 1e-2, 2e-3)
    average = MovingAverage(both, 0.99)
    step, spent, path = 0, 0.0, out / "text_encoder.pt"
    if path.exists():
        state = torch.load(path)
        both.load_state_dict(state["both"])
        optimisers.load_state_dict(state["optimisers"])
        average.values, average.steps, step, spent = state["average"], state["step"], state["step"], state["minutes"]
    log = Log(out, "text_encoder", spent)
    log(parameters=sum(p.numel() for p in encoder.parameters()), length=LENGTH, step=step)
    while log.minutes < minutes:
        items = batch_of(np.random.default_rng((seed, step)), batch, prompts)
        language, reading, right = losses(encoder, probe, items)
        (language + reading).backward()
        optimisers.step(min(1.0, (step + 1) / 30) * decayed(log.minutes / minutes, 0.4))
        average.update(both)
        step += 1
        if step % 25 == 0:
            log(step=step, language=language.item(), reading=reading.item(), fields=right.float().mean().item())
        if step % 100 == 0:
            parts = {"both": both.state_dict(), "optimisers": optimisers.state_dict(), "average": average.values}
            save_state(path, {**parts, "step": step, "minutes": log.minutes})
    average.swap(both)
    log(step=step, held_out_prompts_read=reading_accuracy(encoder, probe, prompts))
    encoder.to(torch.bfloat16).save_pretrained(out / "text_encoder")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train(options.out, options.minutes, options.batch, options.seed)
