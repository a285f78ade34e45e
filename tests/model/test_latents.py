"""The latent grid: orders, round trips, noise."""

import mlx.core as mx

from klein_mlx.model import sampler


def test_patches_are_channel_major() -> None:
    """Channel c * 4 + dy * 2 + dx of token (y, x) is channel c of latent (2y + dy, 2x + dx)."""
    z = mx.random.normal((2, 6, 10, 8))
    grid = sampler.patchify(z)
    assert grid.shape == (2, 3, 5, 32)
    for c, dy, dx in ((0, 0, 0), (3, 1, 0), (7, 0, 1), (5, 1, 1)):
        assert mx.array_equal(grid[..., c * 4 + dy * 2 + dx], z[:, dy::2, dx::2, c])
    assert mx.array_equal(sampler.unpatchify(grid), z)


def test_tokens_run_row_by_row() -> None:
    grid = mx.random.normal((1, 3, 5, 4))
    tokens = sampler.latents_to_tokens(grid)
    assert mx.array_equal(tokens[0, 7], grid[0, 7 // 5, 7 % 5])
    assert mx.array_equal(sampler.tokens_to_latents(tokens, 3, 5), grid)


def test_position_ids() -> None:
    assert sampler.text_ids(3).tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]
    assert sampler.image_ids(2, 3, t=10).tolist() == [[10, y, x, 0] for y in range(2) for x in range(3)]
    assert sampler.image_ids(2, 3).dtype == mx.int32


def test_noise_depends_on_the_key_alone() -> None:
    first = sampler.noise(mx.random.key(7), 4, 6, 8)
    mx.random.seed(1)
    mx.eval(mx.random.normal((100,)))
    assert mx.array_equal(sampler.noise(mx.random.key(7), 4, 6, 8), first)
    assert not mx.array_equal(sampler.noise(mx.random.key(8), 4, 6, 8), first)
    large = sampler.noise(mx.random.key(0), 64, 64, 32)
    assert abs(large.mean().item()) < 0.01
    assert abs(large.std().item() - 1) < 0.01


def test_channels_first_and_back() -> None:
    x = mx.random.normal((2, 8, 3, 5))
    grid = sampler.from_channels_first(x)
    assert mx.array_equal(grid[1, 2, 4], x[1, :, 2, 4])
    assert mx.array_equal(sampler.to_channels_first(grid), x)
