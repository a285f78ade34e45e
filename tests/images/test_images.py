"""Pictures in and out: every mode to right pixels, the reference's size rules, and saving that never half-writes."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image, ImageCms

from klein_mlx.errors import RequestError
from klein_mlx.images import reading as images
from klein_mlx.runtime import pictures


def gradient(width: int = 80, height: int = 64) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 2, y * 2, x + y], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = gradient()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transpose that the camera did
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    loaded, notes = images.load_image(tmp_path / "x.png")
    assert np.array_equal(np.asarray(loaded), np.asarray(upright))
    assert not notes


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(tmp_path / "x.png")
    loaded, _ = images.load_image(str(tmp_path / "x.png"))
    assert loaded.mode == "RGB"
    assert loaded.getpixel((3, 3)) == (156, 156, 156)  # 40000 / 257


def test_transparency_is_white() -> None:
    for mode in ("RGBA", "LA", "PA"):
        clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0)).convert(mode)
        loaded, notes = images.load_image(clear)
        assert loaded.getpixel((0, 0)) == (255, 255, 255)
        assert notes == ["image: what is transparent in it is taken as white"]
    assert images.load_image(Image.new("RGBA", (8, 8), "red"))[1] == []
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert images.load_image(half)[0].getpixel((0, 0)) == pytest.approx((255, 127, 127), abs=1)
    palette = gradient().convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert images.load_image(palette)[0].getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"])
def test_other_modes_become_rgb(mode: str) -> None:
    source = Image.new("RGB", (8, 8), "white")
    if mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(source, ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
        assert converted is not None
    else:
        converted = source.convert(mode)
    loaded, _ = images.load_image(converted)
    assert loaded.mode == "RGB"
    assert min(loaded.getpixel((2, 2))) >= 252  # type: ignore[arg-type]


def linear_profile() -> bytes:
    """sRGB's primaries with linear curves: lcms' own sRGB profile, its parametric curves set to gamma 1."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    at = profile.find(b"para")
    while at >= 0:
        profile[at + 8 : at + 10] = b"\0\0"
        profile[at + 12 : at + 16] = b"\0\1\0\0"
        at = profile.find(b"para", at + 4)
    return bytes(profile)


def test_a_profile_is_converted_to_srgb() -> None:
    """Half the light is 188 in sRGB. A damaged profile is ignored."""
    grey = Image.new("RGB", (8, 8), (128, 128, 128))
    grey.info["icc_profile"] = linear_profile()
    assert images.load_image(grey)[0].getpixel((0, 0)) == pytest.approx((188, 188, 188), abs=1)
    grey.info["icc_profile"] = b"damaged"
    assert images.load_image(grey)[0].getpixel((0, 0)) == (128, 128, 128)


def test_an_animation_gives_its_first_frame_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.gif"
    Image.new("RGB", (8, 8), "red").save(path, save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])
    loaded, notes = images.load_image(path)
    assert loaded.getpixel((0, 0)) == (255, 0, 0)
    assert notes == [f"{path}: an animation; its first frame is used"]


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n", b"%PDF-1.4"])
def test_what_is_no_picture(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"image .*x\.png cannot be read"):
        images.load_image(path)


def test_a_truncated_picture(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    gradient(400, 400).save(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(RequestError, match=r"x\.png cannot be read"):
        images.load_image(path)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="does not exist"):
        images.load_image(tmp_path / "none.png")
    with pytest.raises(RequestError, match="is not a file"):
        images.load_image(tmp_path)
    with pytest.raises(RequestError, match="image is of type int; it must be a path, a PIL image or a numpy array"):
        images.load_image(3)


@pytest.mark.parametrize(
    ("size", "used"),
    [
        ((128, 96), (128, 96)),
        ((130, 100), (128, 96)),
        ((1025, 1024), (1024, 1008)),  # scaled to 1024 x 1023, then cropped: rounding instead would give 1024 x 1024
        ((2048, 1024), (1440, 720)),
        ((64, 512), (64, 512)),
    ],
)
def test_reference_sizes(size: tuple[int, int], used: tuple[int, int]) -> None:
    prepared, note = images.prepare_reference(Image.new("RGB", size), 16)
    assert prepared.size == used
    assert (note is None) == (size == used)


def test_references_that_are_refused() -> None:
    with pytest.raises(RequestError, match="63 x 100; both sides must be at least 64"):
        images.prepare_reference(Image.new("RGB", (63, 100)), 16)
    with pytest.raises(RequestError, match="64 x 513; its aspect must be at most 8 : 1"):
        images.prepare_reference(Image.new("RGB", (64, 513)), 16)


def test_pixels_and_back() -> None:
    image = gradient()
    pixels = pictures.to_pixels(image)
    assert pixels.shape == (1, 64, 80, 3)
    assert pixels.min().item() >= -1
    assert np.array_equal(np.asarray(pictures.to_image(pixels[0])), np.asarray(image))
    assert pictures.to_image(mx.full((2, 2, 3), 7.0)).getpixel((0, 0)) == (255, 255, 255)
