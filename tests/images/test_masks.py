"""Masks, borders and the way back: what is outside comes back exactly, what is inside fades in over a stated width."""

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from klein_mlx.errors import RequestError
from klein_mlx.images.masks import Canvas, crop_region, make_canvas, soft_edge, token_mask
from klein_mlx.request import Edit, check_edit


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3))
    return Image.fromarray(noise.astype(np.uint8))


def rectangle(size: tuple[int, int], box: tuple[int, int, int, int], mode: str = "L") -> Image.Image:
    mask = Image.new(mode, size, 0)
    ImageDraw.Draw(mask).rectangle(box, fill="white")
    return mask


def edit(**changes: Any) -> Edit:
    asked: dict[str, Any] = dict.fromkeys(
        ("strength", "mask_image", "mask_blur", "padding_mask_crop", "extend", "init_reference", "sigmas")
    )
    checked = check_edit(**{**asked, "init_image": "in.png", "invert_mask": False, **changes})
    assert checked is not None
    return checked


def canvas_of(image: Image.Image, mask: Image.Image | None, **changes: Any) -> Canvas:
    size = changes.pop("size", (None, None))
    asked = edit(mask_image=mask, **changes)
    return make_canvas(asked, image, mask, size, 16)[0]


def pasted(canvas: Canvas, colour: tuple[int, int, int] = (1, 2, 3)) -> np.ndarray:
    """What comes back if the model paints everything in one colour."""
    return np.asarray(canvas.paste(Image.new("RGB", canvas.image.size, colour)))


@pytest.mark.parametrize("size", [(128, 96), (133, 97), (100, 75)])
@pytest.mark.parametrize("padding", [None, 0, 10])
def test_outside_the_mask_nothing_changes(size: tuple[int, int], padding: int | None) -> None:
    image, mask = picture(*size), rectangle(size, (30, 20, 69, 59))
    canvas = canvas_of(image, mask, padding_mask_crop=padding)
    out = pasted(canvas)
    outside = np.asarray(mask) == 0
    assert out.shape[:2] == outside.shape
    assert np.array_equal(out[outside], np.asarray(image)[outside])
    assert (out[30:50, 40:60] == (1, 2, 3)).all()
    assert all(side % 16 == 0 for side in canvas.image.size)


@pytest.mark.parametrize("width", [0, 1, 2, 5])
def test_the_soft_edge_has_the_stated_width(width: int) -> None:
    """Over `width` pixels inside, in even steps; one pixel further it is whole."""
    painted = np.asarray(rectangle((60, 60), (20, 10, 49, 39))) > 0
    opacity = soft_edge(painted, width)
    assert (opacity[~painted] == 0).all()
    across = opacity[25, 20 : 20 + width + 2]
    np.testing.assert_allclose(across, [min(d / (width + 1), 1) for d in range(1, width + 3)])
    assert (opacity[10 + width : 40 - width, 20 + width : 50 - width] == 1).all()
    assert opacity.max() == 1


def test_a_mask_that_reaches_the_border_has_no_edge_there() -> None:
    opacity = soft_edge(np.asarray(rectangle((40, 40), (0, 0, 19, 39))) > 0, 4)
    assert (opacity[:, :15] == 1).all()
    assert 0 < opacity[20, 19] < 1


def test_tokens_of_a_mask() -> None:
    """Whole tokens are whole; a token is judged by its centre; half a centre is half a token."""
    mask = rectangle((64, 48), (16, 16, 47, 31))
    expected = np.zeros((3, 4))
    expected[1, 1:3] = 1
    np.testing.assert_array_equal(token_mask(mask, 16), expected)
    assert token_mask(rectangle((16, 16), (0, 0, 7, 15)), 16).item() == 0.5
    assert token_mask(rectangle((16, 16), (0, 0, 6, 15)), 16).item() == 0.0


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "LA"])
def test_mask_modes_and_inversion(mode: str) -> None:
    image, mask = picture(64, 64), rectangle((64, 64), (16, 16, 47, 47)).convert(mode)
    kept = pasted(canvas_of(image, mask.convert("RGB"), mask_blur=0))
    turned = pasted(canvas_of(image, mask.convert("RGB"), mask_blur=0, invert_mask=True))
    inside = np.zeros((64, 64), bool)
    inside[16:48, 16:48] = True
    assert np.array_equal(turned[inside], np.asarray(image)[inside])
    assert (turned[~inside] == (1, 2, 3)).all()
    assert (kept[inside] == (1, 2, 3)).all()


def test_the_crop_holds_the_mask_and_has_the_pictures_aspect() -> None:
    left, top, right, bottom = crop_region(rectangle((200, 100), (150, 40, 159, 59)), (192, 96), 5)
    assert left <= 145
    assert right >= 165
    assert (top, bottom) == (35, 65)
    assert (right - left) / (bottom - top) == pytest.approx(2, abs=0.05)


def test_a_crop_is_enlarged_and_put_back_where_it_was() -> None:
    """A smooth picture that the model returns unchanged comes back unchanged inside the mask, to within resampling."""
    y, x = np.mgrid[0:150, 0:200]
    image = Image.fromarray(np.stack([x, y, (x + y) / 2], -1).astype(np.uint8))
    mask = rectangle(image.size, (90, 60, 129, 99))
    canvas = canvas_of(image, mask, padding_mask_crop=10, mask_blur=0)
    assert canvas.image.size == (192, 144)
    assert canvas.box[2] - canvas.box[0] < 100
    assert np.abs(np.asarray(canvas.paste(canvas.image)).astype(int) - np.asarray(image)).max() <= 2


@pytest.mark.parametrize(
    ("extend", "size", "corner"),
    [
        ("left=32,right=16", (148, 80), (32, 0)),
        ({"top": 48}, (100, 128), (0, 48)),
        ("160x96", (160, 96), (30, 8)),
        ((133, 80), (133, 80), (16, 0)),
    ],
)
def test_an_extension_keeps_the_old_pixels(extend: Any, size: tuple[int, int], corner: tuple[int, int]) -> None:
    image = picture(100, 80)
    canvas = canvas_of(image, None, extend=extend)
    out = pasted(canvas)
    left, top = corner
    assert out.shape[:2] == size[::-1]
    assert np.array_equal(out[top : top + 80, left : left + 100], np.asarray(image))
    new = np.ones(out.shape[:2], bool)
    new[top : top + 80, left : left + 100] = False
    if new.sum() > 200:
        assert (out[new] == (1, 2, 3)).all(axis=-1).mean() > 0.5  # all but the soft edge


def test_an_extension_with_a_mask_repaints_both() -> None:
    image, mask = picture(96, 64), rectangle((96, 64), (32, 16, 63, 47))
    canvas = canvas_of(image, mask, extend="left=32", mask_blur=0)
    out = pasted(canvas)
    assert (out[:, :32] == (1, 2, 3)).all()
    assert (out[16:48, 64:96] == (1, 2, 3)).all()
    assert np.array_equal(out[:16, 32:], np.asarray(image)[:16])


def test_sizes() -> None:
    """The init image's, cut to multiples; over 1024 * 1024 pixels scaled to that first; or what is asked for."""
    assert canvas_of(Image.new("RGB", (1025, 1024)), None).image.size == (1024, 1008)
    assert canvas_of(Image.new("RGB", (100, 75)), None).image.size == (96, 64)
    assert canvas_of(Image.new("RGB", (100, 75)), None, size=(128, None)).image.size == (128, 64)
    large = canvas_of(picture(1500, 1000), rectangle((1500, 1000), (200, 200, 700, 700)))
    assert large.image.size == (1248, 832)
    assert pasted(large).shape == (1000, 1500, 3)
    _, notes = make_canvas(edit(), picture(100, 75), None, (None, None), 16)
    assert notes == ["100 x 75 of the init image are painted at 96 x 64"]


@pytest.mark.parametrize(
    ("mask", "changes", "message"),
    [
        (Image.new("L", (100, 80), 0), {}, "mask_image is all black: nothing would be repainted; make white what"),
        (Image.new("L", (100, 80), 255), {"invert_mask": True}, "mask_image is all white: nothing would be repainted"),
        (Image.new("L", (80, 100), 255), {}, "mask_image is 80 x 100, but the init image is 100 x 80"),
        (Image.new("L", (200, 160), 255), {}, "mask_image is 200 x 160, but the init image is 100 x 80"),
        (rectangle((100, 80), (0, 0, 2, 2)), {}, "mask_image has white areas that are too thin to repaint"),
        (None, {"extend": "80x100"}, "extend is 80 x 100; it must be larger than the init image, 100 x 80"),
        (None, {"extend": "100x80"}, "extend is 100 x 80; it must be larger than the init image, 100 x 80"),
        (None, {"extend": "left=2"}, "extend adds too little to be painted; add at least half a token"),
        (None, {"extend": "left=8100"}, "extend makes the picture 8200 x 80; its sides may have 8192 pixels"),
    ],
)
def test_what_does_not_fit(mask: Image.Image | None, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        canvas_of(picture(100, 80), mask, **changes)
    assert "\n" not in str(caught.value)


def test_a_picture_that_is_too_small() -> None:
    with pytest.raises(RequestError, match="init_image is 63 x 100; both sides must be at least 64 pixels"):
        canvas_of(picture(63, 100), None)
