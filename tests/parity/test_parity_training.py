"""Training beside diffusers, torch and PEFT: loss and gradients of all weights, AdamW, the files that are written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from folders import GOLDEN
from test_parity_lora import check

from klein_mlx.formats.names import diffusers_name, to_ours
from klein_mlx.formats.open import open_model
from klein_mlx.model.sampler import join_references
from klein_mlx.train.adapters import add_adapters, all_weights
from klein_mlx.train.blockwise import Blockwise, Sample
from klein_mlx.train.export import origin_of, save_lora
from klein_mlx.train.noise import key_of
from klein_mlx.train.optimize import Updater
from klein_mlx.train.options import make_options
from klein_mlx.weights.checkpoint import load_part

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SIGMA, TEXT = 0.6, 24


def as_torch(array: mx.array) -> Any:
    return torch.from_numpy(np.array(array))


@pytest.mark.parametrize("references", [False, True])
def test_loss_and_gradients_are_torchs(references: bool) -> None:
    """On random weights float32 itself is 9e-5 from float64."""
    from parity_reference import load

    source = open_model(str(GOLDEN))
    transformer: Any = load_part("transformer", source, mx.float32)
    c = source.config.transformer
    latents, noise = (mx.random.normal((1, 8, 6, c.in_channels), key=mx.random.key(k)) for k in (1, 2))
    embeds = mx.random.normal((1, TEXT, c.joint_attention_dim), key=mx.random.key(3))
    grid = mx.random.normal((1, 4, 6, c.in_channels), key=mx.random.key(4))
    joined = join_references([grid]) if references else None
    found: dict[str, mx.array] = {}
    blockwise = Blockwise(transformer, all_weights(transformer), mx.float32)
    sample = Sample(latents, noise, embeds, SIGMA, joined)
    loss = blockwise.loss_and_gradients(sample, lambda stage, own: found.update(own))

    pipe = load(GOLDEN)
    model = pipe.transformer.requires_grad_(True)
    tokens, target = as_torch(((1 - SIGMA) * latents + SIGMA * noise).flatten(1, 2)), noise - latents
    ids = pipe._prepare_latent_ids(torch.zeros(1, c.in_channels, 8, 6))
    if joined is not None:
        tokens = torch.cat([tokens, as_torch(joined.tokens)], dim=1)
        ids = torch.cat([ids, pipe._prepare_image_ids([torch.zeros(1, c.in_channels, 4, 6)])], dim=1)
    text = as_torch(embeds)
    timestep = torch.tensor([np.float32(SIGMA)])
    out = model(tokens, text, timestep, ids, pipe._prepare_text_ids(text), None, return_dict=False)[0][:, :48]
    right = (out - as_torch(target.flatten(1, 2))).square().mean()
    right.backward()
    assert loss == pytest.approx(float(right.detach()), rel=1e-5)
    theirs = dict(model.named_parameters())
    assert len(found) == len(theirs)
    for path, gradient in found.items():
        name, layout = diffusers_name("transformer", path)
        other = to_ours(layout, mx.array(theirs[name].grad.numpy()))
        error = mx.linalg.norm(gradient - other) / mx.linalg.norm(other)
        assert error.item() < 2e-4, path


def test_adamw_is_torchs() -> None:
    options = make_options({"data": "x", "output": "x.safetensors", "warmup": 0, "learning_rate": 1e-2})
    weights = {"w": mx.random.normal((8, 4), key=mx.random.key(0))}
    parameter = torch.nn.Parameter(as_torch(weights["w"]).clone())
    right = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.999), weight_decay=options.weight_decay)
    updater = Updater(replace(options, optimizer="adamw"), weights)
    for step in range(20):
        gradient = mx.random.normal((8, 4), key=mx.random.key(step + 1))
        parameter.grad = as_torch(gradient)
        right.step()
        updater.update("all", {"w": gradient}, step)
    assert np.abs(np.array(weights["w"]) - parameter.detach().numpy()).max() < 1e-6


# diffusers 0.42 renames the magnitude of single blocks' attn.to_out to one that there is not, so DoRA is compared on
# double blocks.
@pytest.mark.parametrize(
    ("dora", "layout", "targets"),
    [(False, "diffusers", "all"), (False, "comfy", "all"), (True, "diffusers", "double_blocks.*")],
)
def test_diffusers_reads_what_is_written(dora: bool, layout: str, targets: str, tmp_path: Path) -> None:
    """Its own velocity with the file, by PEFT's own layers, is the product's."""
    source = open_model(str(GOLDEN))
    transformer: Any = load_part("transformer", source, mx.float32)
    trainables = add_adapters(transformer, targets, 4, 0, dora)
    for path, array in trainables.weights.items():
        if not path.endswith("magnitude"):
            trainables.weights[path] = 0.1 * mx.random.normal(array.shape, key=key_of(path))
    origin = origin_of(source.config, "style", None, 1, 1)
    (file,) = save_lora(tmp_path / "style.safetensors", trainables, trainables.weights, layout, origin)
    check(file)
