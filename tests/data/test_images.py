"""Image files as people have them, and Chameleon's preprocessing."""

import io
import os
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from xprompt_jax.data import images
from xprompt_jax.data.images import list_images, open_image, postprocess, preprocess, resize_center_crop, save_png, to_pixels
from xprompt_jax.errors import UserError


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels)).astype(np.uint8)


def opened(source) -> np.ndarray:
    image = open_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels and holds almost none."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )  # fmt: skip


def test_path_bytes_image_and_array_are_the_same(tmp_path):
    array = noise(5, 7)
    (tmp_path / "a.png").write_bytes(data := encoded(PIL.Image.fromarray(array)))
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), data, PIL.Image.fromarray(array), array):
        np.testing.assert_array_equal(opened(source), array)


@pytest.mark.parametrize(("orientation", "turn"), [(3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)])
def test_exif_rotation(orientation, turn):
    array = noise(4, 6)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(opened(encoded(PIL.Image.fromarray(array), exif=exif)), turn(array))


def test_cmyk_jpeg():
    ink = PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    np.testing.assert_allclose(opened(encoded(ink, "JPEG", quality=95)), np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=3)


def test_16_bit_grey_keeps_its_range():
    levels = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    data = encoded(PIL.Image.fromarray(levels))
    assert PIL.Image.open(io.BytesIO(data)).mode.startswith("I;16")
    np.testing.assert_array_equal(opened(data), np.array([[0, 1, 128, 255]])[..., None].repeat(3, -1))


def test_greyscale_and_bilevel():
    grey = noise(3, 4, 1)[..., 0]
    np.testing.assert_array_equal(opened(encoded(PIL.Image.fromarray(grey))), grey[..., None].repeat(3, -1))
    np.testing.assert_array_equal(opened(grey), grey[..., None].repeat(3, -1))
    assert opened(encoded(PIL.Image.new("1", (2, 2), 1))).min() == 255


def test_palette_with_a_transparent_entry():
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    np.testing.assert_array_equal(opened(encoded(image, transparency=0)), [[[255, 255, 255], [200, 100, 50]]])


def test_rgb_with_a_transparent_colour():
    image = PIL.Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    np.testing.assert_array_equal(opened(encoded(image, transparency=(1, 2, 3))), [[[255, 255, 255], [4, 5, 6]]])


def test_transparency_is_blended_on_white_and_truncated():
    rgba = noise(16, 16, 4)
    color, alpha = rgba[..., :3].astype(np.float64), rgba[..., 3:] / 255
    blended = color * alpha + 255 * (1 - alpha)
    np.testing.assert_array_equal(opened(encoded(PIL.Image.fromarray(rgba))), np.floor(blended))
    np.testing.assert_array_equal(opened(rgba), np.floor(blended))
    assert (np.floor(blended) != np.rint(blended)).any()


def test_transparency_is_metas_at_every_level():
    alpha, color = np.mgrid[:256, :256]
    rgba = np.stack([color, 255 - color, color, alpha], -1).astype(np.uint8)
    share = rgba[..., 3:] / 255.0
    expected = ((1 - share) * 255 + share * rgba[..., :3]).astype(np.uint8)
    np.testing.assert_array_equal(opened(rgba), expected)
    grey = PIL.Image.fromarray(rgba[..., 0]).convert("LA")
    grey.putalpha(PIL.Image.fromarray(rgba[..., 3]))
    np.testing.assert_array_equal(opened(encoded(grey)), expected[..., :1].repeat(3, -1))


def test_what_is_computed_by_strips_is_whole():
    rgba = np.random.default_rng(7).integers(0, 256, (150, 3, 4), np.uint8)
    share = rgba[..., 3:] / 255.0
    np.testing.assert_array_equal(opened(rgba), (rgba[..., :3] * share + 255.0 * (1 - share)).astype(np.uint8))
    levels = np.random.default_rng(8).integers(0, 65536, (150, 3), np.uint16)
    np.testing.assert_array_equal(opened(encoded(PIL.Image.fromarray(levels)))[..., 1], (levels / 257).astype(np.uint8))


def test_one_pixel():
    np.testing.assert_array_equal(opened(encoded(PIL.Image.new("RGB", (1, 1), (1, 2, 3)))), [[[1, 2, 3]]])
    assert preprocess(open_image(noise(1, 1)), 8).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("cut.jpg", encoded(PIL.Image.fromarray(noise(64, 64)), "JPEG")[:900], "damaged or cut short"),
        ("cut.png", encoded(PIL.Image.fromarray(noise(64, 64)))[:900], "damaged or cut short"),
        ("empty.png", b"", "empty"),
        ("text.png", b"this is no image", "not an image"),
        ("huge.png", png_header(30_000, 30_000), "89,000,000 pixels"),
        ("large.png", png_header(10_000, 10_000), "89,000,000 pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_are_named_in_one_line(tmp_path, name, data, complaint):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=complaint) as error:
        open_image(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_bad_sources(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(UserError, match="cannot read"):
        open_image(tmp_path)  # a folder
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot read"):
        open_image(tmp_path / "file" / "a.png")
    with pytest.raises(UserError, match="not float64"):
        open_image(np.zeros((4, 4, 3)))
    with pytest.raises(UserError, match=r"not uint8 \[4, 4, 2\]"):
        open_image(np.zeros((4, 4, 2), np.uint8))
    with pytest.raises(UserError, match="not int"):
        open_image(3)


def test_list_images_is_recursive_and_sorted(tmp_path):
    for name in ("b/2.PNG", "b/10.jpeg", "a.webp", "c/d/e.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("notes.txt", ".hidden.png", "b/thumbs.db"):
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in list_images(tmp_path)] == ["a.webp", "b/10.jpeg", "b/2.PNG", "c/d/e.tif"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    for name in ("real/1.png", "all/2.png", "all/.cache/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name, to in (("a", "real"), ("b", "real"), ("back", "all")):
        (tmp_path / "all" / name).symlink_to(tmp_path / to)
    (tmp_path / "all" / "c").mkdir()
    (tmp_path / "all" / "c" / "4.png").touch()
    (tmp_path / "all" / "latest").symlink_to(tmp_path / "all" / "c")  # would bring its images twice
    found = [p.relative_to(tmp_path / "all").as_posix() for p in list_images(tmp_path / "all")]
    assert found == ["2.png", "a/1.png", "b/1.png", "c/4.png"]


def test_folders_without_images(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="no image files"):
        list_images(tmp_path)
    for folder in (tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(UserError, match="no such folder"):
            list_images(folder)


def test_unreadable_folder():
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        (locked := Path(place) / "locked").mkdir(mode=0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root reads everything; nobody does not
        try:
            with pytest.raises(UserError, match=f"{locked}: cannot read the folder"):
                list_images(place)
        finally:
            os.seteuid(user)


def random_sides(seed: int, count: int) -> list[tuple[int, int]]:
    return [tuple(map(int, sides)) for sides in np.random.default_rng(seed).integers(9, 200, (count, 2))]


# 64 x 65 and 64 x 67: halves, which round to even. 31 x 500: an odd margin.
@pytest.mark.parametrize(("width", "height"), [(64, 65), (64, 67), (67, 64), (33, 33), (32, 32), (31, 500), *random_sides(0, 30)])
def test_preprocess_is_metas_recipe(width, height):
    size, image = 32, PIL.Image.fromarray(noise(height, width))
    scale = size / min(width, height)
    sides = (round(scale * width), round(scale * height))
    left, top = (sides[0] - size) // 2, (sides[1] - size) // 2
    box = (left, top, left + size, top + size)
    expected = np.asarray(image.resize(sides, PIL.Image.LANCZOS).crop(box))
    np.testing.assert_array_equal(resize_center_crop(image, size), expected)
    pixels = preprocess(image, size)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, (expected.astype(np.float64) / 255 * 2 - 1).astype(np.float32))


def test_metas_levels():
    """In float64 until the end: half of the levels differ in float32."""
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_pixels(levels), (levels.astype(np.float64) / 255.0 * 2.0 - 1.0).astype(np.float32))


def modes(width: int, height: int) -> list[PIL.Image.Image]:
    """One image of each mode that people's files have."""
    rgba = PIL.Image.fromarray(noise(height, width, 4))
    rgb = rgba.convert("RGB")
    colors = rgb.quantize(16)
    colors.info["transparency"] = 3
    return [rgba, rgb, colors, rgb.convert("L"), rgba.convert("LA"), rgb.convert("CMYK")]


@pytest.mark.parametrize(("width", "height"), [(64, 67), (67, 64), (31, 300), (48, 48), (512, 700), *random_sides(1, 12)])
def test_hf_recipe_is_transformers(width, height):
    module = pytest.importorskip("transformers.models.chameleon.image_processing_pil_chameleon", exc_type=ImportError)
    size = 512 if width == 512 else 32
    processor = module.ChameleonImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    assert module.ChameleonImageProcessorPil().size["shortest_edge"] == 512
    for image in modes(width, height)[: 2 if size == 512 else None]:
        expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        pixels = preprocess(open_image(image, "hf"), size, "hf")
        assert pixels.dtype == expected.dtype == np.float32
        np.testing.assert_array_equal(pixels, expected)


def test_recipes_differ_as_described():
    """Half of the shapes get another long side; white is 0.989 instead of 1."""
    pictures = [open_image(noise(height, width)) for width, height in random_sides(2, 40)]
    other = sum((resize_center_crop(p, 32) != resize_center_crop(p, 32, "hf")).any() for p in pictures)
    assert 10 <= other <= 30
    levels = np.arange(256)
    assert to_pixels(levels, "hf").max() == pytest.approx(0.989, abs=1e-6)
    assert np.abs(to_pixels(levels) - to_pixels(levels, "hf")).max() == pytest.approx(0.011, abs=1e-6)


def test_unknown_recipe():
    image = open_image(noise(8, 8))
    for use in (lambda r: open_image(image, r), lambda r: resize_center_crop(image, 4, r), lambda r: to_pixels(noise(2, 2), r)):
        with pytest.raises(UserError, match="image recipe 'huggingface' is unknown; use meta or hf"):
            use("huggingface")


def test_too_narrow_image(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    with pytest.raises(UserError, match="1 x 500 is too narrow"):
        resize_center_crop(open_image(noise(500, 1)), 32)


def test_postprocess_clamps_and_truncates():
    np.testing.assert_array_equal(postprocess(np.array([-3.0, -1, 0, 0.9999, 1, 9])), [0, 0, 127, 254, 255, 255])
    levels = np.arange(256)
    # Half a level up, so that rounding errors of the way there do not show.
    np.testing.assert_array_equal(postprocess((levels + 0.5) / 255 * 2 - 1), levels)


def test_postprocess_is_metas_arithmetic():
    """Exact levels and their neighbours, where another order of operations truncates to another level."""
    torch = pytest.importorskip("torch")
    exact = (np.arange(256) / 255 * 2 - 1).astype(np.float32)
    around = [exact, np.nextafter(exact, np.float32(-2)), np.nextafter(exact, np.float32(2))]
    pixels = np.concatenate([*around, np.random.default_rng(0).normal(size=20_000).astype(np.float32)])
    unit = ((torch.clamp(torch.from_numpy(pixels), -1.0, 1.0) + 1.0) / 2.0).numpy()
    np.testing.assert_array_equal(postprocess(pixels), (unit * 255).astype(np.uint8))


def test_save_png_round_trip(tmp_path):
    array = noise(6, 5)
    for i, source in enumerate((array, PIL.Image.fromarray(array))):
        save_png(source, tmp_path / "new" / f"{i}.png")
        np.testing.assert_array_equal(opened(tmp_path / "new" / f"{i}.png"), array)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["0.png", "1.png"]


def test_save_png_leaves_nothing_half_done(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="cannot write"):
        save_png(noise(4, 4), tmp_path / "file" / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        save_png(noise(4, 4), tmp_path / "folder.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]
    assert (tmp_path / "file").read_text() == "kept"
