"""Decoding of images, against Pillow."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from coco_directory import photograph
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from dn_detr_jax.data import images
from dn_detr_jax.data.images import decode, decode_upright, read_header, used_bits
from dn_detr_jax.errors import DataError


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


PHOTO = Image.fromarray(photograph(37, 50))


@pytest.mark.parametrize(
    "kind,mode",
    [
        ("JPEG", "RGB"),
        ("JPEG", "L"),
        ("JPEG", "CMYK"),  # Pillow writes and reads it inverted, as Adobe's programs do
        ("PNG", "RGB"),
        ("PNG", "L"),
        ("PNG", "LA"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("PNG", "1"),
        ("GIF", "P"),
        ("BMP", "RGB"),
        ("WEBP", "RGBA"),
        ("TIFF", "CMYK"),
        ("PPM", "RGB"),
    ],
)
def test_every_mode_becomes_the_rgb_of_pillow(kind, mode):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(PHOTO.convert(mode), kind, **options)
    result = decode(data)
    assert result.dtype == np.uint8 and result.shape == (37, 50, 3) and result.flags.c_contiguous
    np.testing.assert_array_equal(result, np.asarray(opened(data).convert("RGB")))
    if mode in ("RGB", "CMYK", "RGBA"):  # the colors as drawn
        assert np.abs(result.astype(int) - np.asarray(PHOTO)).mean() < 6


def test_a_cmyk_photograph_is_not_a_negative():
    """Catches a reader that ignores Adobe's marker for inverted ink."""
    data = encoded(PHOTO.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data
    correlation = np.corrcoef(decode(data).ravel(), np.asarray(PHOTO).ravel())[0, 1]
    assert correlation > 0.95


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_a_palette_with_transparency_keeps_its_colors(transparency):
    palette = PHOTO.quantize(200)
    data = encoded(palette, "PNG", transparency=transparency)
    np.testing.assert_array_equal(decode(data), np.asarray(palette.convert("RGB")))


def png16(values: np.ndarray) -> bytes:
    """Returns a 16-bit PNG, made from the specification, of uint16 [H, W] or [H, W, 3]."""
    color = 0 if values.ndim == 2 else 2
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, color, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_of_16_bits_the_upper_8_remain():
    """Catches clipping to 255, Pillow's way for gray images, which leaves white images."""
    rng = np.random.default_rng(0)
    gray, color = rng.integers(0, 65536, (5, 7)), rng.integers(0, 65536, (5, 7, 3))
    expected = np.repeat((gray // 256)[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode(png16(gray)), expected)
    np.testing.assert_array_equal(decode(png16(color)), color // 256)
    data = encoded(Image.fromarray(gray.astype(np.int32)), "TIFF")
    np.testing.assert_array_equal(decode(data), expected)


def tiff16(values: np.ndarray) -> bytes:
    """Returns a 16-bit TIFF of uint16 [H, W] or RGB [H, W, 3]."""
    _, data = cv2.imencode(".tiff", values[..., ::-1] if values.ndim == 3 else values)
    return data.tobytes()


@pytest.mark.parametrize("write", [png16, tiff16])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
@pytest.mark.parametrize("bits,shift", [(8, 0), (9, 2), (10, 2), (12, 4), (13, 6), (15, 8)])
def test_an_image_that_uses_some_of_16_bits_is_not_black(write, shape, bits, shift, caplog):
    """Covers 10, 12 and 14 bits, as from X-ray, thermal and microscope cameras."""
    images._warn_of_depth.cache_clear()
    values = np.random.default_rng(bits).integers(0, 2**bits, shape).astype(np.uint16)
    values[0, 0] = 2**bits - 1
    data = write(values)
    expected = values >> shift
    expected = np.repeat(expected[..., None], 3, axis=2) if values.ndim == 2 else expected
    np.testing.assert_array_equal(decode(data), expected)
    assert read_header(io.BytesIO(data)).bits == 16 and used_bits(data) == 8 + shift
    for _ in range(3):
        decode(data)
    assert len(caplog.records) == (shift < 8)  # once, not for each image


def test_images_of_8_bits_use_8():
    assert {used_bits(encoded(PHOTO, kind)) for kind in ("JPEG", "PNG", "TIFF")} == {8}


def test_suffixes_are_those_of_files_that_are_decoded():
    """Catches a missing suffix, which hides images, and one that can't be decoded."""
    kinds = Image.registered_extensions()
    other = {".pfm"}  # floating-point numbers
    assert set(images.SUFFIXES) == {s for s in kinds if kinds[s] in images.FORMATS} - other | {
        ".mpo"
    }
    for suffix in images.SUFFIXES:
        kind = kinds[suffix]
        image = PHOTO.convert({".pbm": "1", ".pgm": "L"}.get(suffix, "RGB"))
        assert decode(encoded(image, kind)).shape == (37, 50, 3), suffix


def test_values_of_unknown_range_are_refused():
    floats = encoded(Image.fromarray(np.ones((4, 5), np.float32)), "TIFF")
    with pytest.raises(DataError, match="floating-point"):
        decode(floats)
    with pytest.raises(DataError, match="from -3 to -3: more than 16 bits"):
        decode(encoded(Image.fromarray(np.full((4, 5), -3, np.int32)), "TIFF"))


def within_half_a_step(pixels, values, low, high):
    """Whether pixels are the values, mapped from a range to 0 to 255 and rounded."""
    exact = np.interp(values, (low, high), (0, 255))
    exact = np.repeat(exact[..., None], 3, axis=2) if exact.ndim == 2 else exact
    return pixels.dtype == np.uint8 and np.abs(pixels - exact).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("write", [png16, tiff16])
@pytest.mark.parametrize("shape", [(50, 70), (50, 70, 3)])
@pytest.mark.parametrize("pixel_range", [(0, 4095), (1000, 1200), (0, 65535), (-500, 3000.5)])
def test_a_range_of_pixels_is_the_same_for_all_images(write, shape, pixel_range, caplog):
    """Catches a scale that depends on the image, and values that wrap around."""
    values = np.random.default_rng(0).integers(0, 2**16, shape).astype(np.uint16)
    for brightest in (65535, 4095, 900):
        image = np.minimum(values, brightest)
        pixels = decode(write(image), pixel_range=pixel_range)
        assert within_half_a_step(pixels, image, *pixel_range)
        shown = images.decode_upright(write(image), pixel_range)
        np.testing.assert_array_equal(pixels, shown)
    assert not caplog.records
    photo = encoded(PHOTO, "PNG")  # of 8 bits
    np.testing.assert_array_equal(decode(photo, pixel_range=pixel_range), decode(photo))


def test_with_a_range_any_gray_numbers_are_read():
    rng = np.random.default_rng(0)
    floats = rng.normal(0.5, 0.4, (9, 8)).astype(np.float32)
    data = encoded(Image.fromarray(floats), "TIFF")
    assert within_half_a_step(decode(data, pixel_range=(0.0, 1.0)), floats, 0, 1)
    floats[2, 3] = np.nan
    pixels = decode(encoded(Image.fromarray(floats), "TIFF"), pixel_range=(0.0, 1.0))
    assert pixels[2, 3].tolist() == [0, 0, 0]
    tissue = rng.integers(-1000, 2_000_000, (9, 8)).astype(np.int32)
    data = encoded(Image.fromarray(tissue), "TIFF")
    assert within_half_a_step(decode(data, pixel_range=(-1000, 400)), tissue, -1000, 400)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("order", ["<", ">"])
def test_more_channels_are_refused_with_their_number(order):
    """Catches "no readable image" for 5 channels; the TIFF is made from its specification."""
    tags = [(256, 4), (257, 4), (258, 8), (259, 1), (262, 1), (273, 200), (277, 5), (278, 4)]
    entries = [struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags]
    entries.append(struct.pack(f"{order}HHII", 279, 4, 1, 80))
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    data = (head + directory).ljust(200, b"\0") + bytes(80)
    with pytest.raises(DataError, match=r"a TIFF of 5 channels; .*write 3 of the channels as RGB"):
        decode(data)
    with pytest.raises(DataError, match="no readable image"):
        decode(head + b"\xff" * 300)


def with_orientation(image: Image.Image, orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(image, kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_exactly_where_the_annotated_size_says_so(orientation, kind):
    data = with_orientation(PHOTO, orientation, kind)
    stored = np.asarray(opened(data))
    shown = np.asarray(ImageOps.exif_transpose(opened(data)))
    assert read_header(io.BytesIO(data)) == ((37, 50), orientation, 8)
    assert read_header(io.BytesIO(data)).shown_size == shown.shape[:2]
    np.testing.assert_array_equal(decode(data), stored)
    np.testing.assert_array_equal(decode(data, (37, 50)), stored)
    if orientation >= 5:
        turned = decode(data, (50, 37))
        np.testing.assert_array_equal(turned, shown)
        assert turned.flags.c_contiguous
    else:
        with pytest.raises(DataError, match=r"is 50 x 37 pixels .* annotated as 37 x 50"):
            decode(data, (50, 37))
    with pytest.raises(DataError, match=r"is 50 x 37 pixels .* annotated as 60 x 37"):
        decode(data, (37, 60))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_like_any_other(orientation):
    """Catches a double turn: Pillow turns TIFF itself, and reports the shown size."""
    data = with_orientation(PHOTO, orientation, "TIFF")
    stored = np.asarray(PHOTO)
    shown = np.asarray(ImageOps.exif_transpose(opened(with_orientation(PHOTO, orientation, "PNG"))))
    assert read_header(io.BytesIO(data)) == ((37, 50), orientation, 8)
    np.testing.assert_array_equal(decode(data, (37, 50)), stored)
    np.testing.assert_array_equal(decode_upright(data), shown)
    if orientation >= 5:
        np.testing.assert_array_equal(decode(data, (50, 37)), shown)


@pytest.mark.parametrize("size", [(50, 37), (40, 40)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_setting_decides_where_the_size_can_not(orientation, size):
    """Compares all orientations with Pillow, for the size that the setting gives the boxes."""
    data = with_orientation(PHOTO.resize(size), orientation)
    header = read_header(io.BytesIO(data))
    stored = np.asarray(opened(data))
    shown = np.asarray(ImageOps.exif_transpose(opened(data)))
    for annotated in (header.size, header.shown_size):
        for exif, expected in (("as_stored", stored), ("as_shown", shown)):
            found = decode(data, images.size_of_boxes(header, annotated, exif), exif)
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(decode(data, None, exif), expected)
        automatic = decode(data, images.size_of_boxes(header, annotated, "auto"), "auto")
        proven = annotated == header.shown_size != header.size
        np.testing.assert_array_equal(automatic, shown if proven else stored)
        is_open = images.orientation_is_open(header, annotated)
        assert is_open == (orientation != 1 and not proven)
    with pytest.raises(DataError, match=r"annotated as 9 x 8"):
        images.size_of_boxes(header, (8, 9), "as_shown")
    if header.size != header.shown_size:
        with pytest.raises(DataError, match=r"data\.exif=as_shown\), but annotated"):
            decode(data, header.size, "as_shown")


def test_metadata_behind_the_pixels_of_a_png_count(monkeypatch):
    """Catches a PNG without an orientation that is decoded for its header."""
    data = with_orientation(PHOTO, 6, "PNG")
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    late = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    for content in (data, late):
        assert read_header(io.BytesIO(content)).orientation == 6
        assert decode(content, (50, 37)).shape == (50, 37, 3)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)
    assert read_header(io.BytesIO(data[:start] + data[end:])).orientation == 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_hide_a_good_image():
    data = encoded(PHOTO, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff rubbish")
    np.testing.assert_array_equal(decode(data, (37, 50)), np.asarray(opened(data)))


@pytest.mark.parametrize("kind,mode", [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB")])
def test_a_file_that_is_cut_off_is_refused(kind, mode):
    """Catches a truncated image; older versions of OpenCV return it with a gray lower part."""
    data = encoded(PHOTO.convert(mode), kind)
    for length in (len(data) // 3, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(DataError, match=r"damaged|no readable image"):
            decode(data[:length])


def test_bytes_behind_a_jpeg_do_no_harm():
    data = encoded(PHOTO, "JPEG")
    np.testing.assert_array_equal(decode(data + b"\0 camera maker's notes"), decode(data))


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xd9"])
def test_rubbish_is_refused(data):
    with pytest.raises(DataError, match=r"no readable image|damaged"):
        decode(data)
    with pytest.raises(DataError, match=r"no readable image|damaged"):
        read_header(io.BytesIO(data))


def test_noise_in_a_file_is_refused_or_decoded_but_nothing_else():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        good = np.frombuffer(encoded(PHOTO, kind), np.uint8)
        for _ in range(30):
            data = good.copy()
            data[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4)
            try:
                assert decode(data.tobytes()).dtype == np.uint8
            except DataError:
                continue


def test_an_image_that_would_fill_the_memory_is_refused():
    tiny = png16(np.zeros((4, 4), np.uint16))
    head = struct.pack(">II", 60_000, 60_000) + tiny[24:29]
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + head))
    with pytest.raises(DataError, match=r"too large: at most 268435456 pixels"):
        decode(tiny[:16] + head + crc + tiny[33:])


def test_a_large_scan_is_no_bomb(monkeypatch):
    """Catches Pillow's limit below 192 million pixels, the size of aerial images and scans."""
    scan = encoded(Image.new("1", (16_000, 12_000)), "PNG")
    assert read_header(io.BytesIO(scan)).size == (12_000, 16_000)
    monkeypatch.setattr(images, "MOST_PIXELS", 12_000 * 16_000 - 1)
    with pytest.raises(DataError, match=r"too large: 16000 x 12000 pixels, at most 191999999"):
        decode(scan)


def test_no_program_is_started_for_an_image():
    """Catches PostScript, which Pillow passes to Ghostscript."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert opened(script).format == "EPS"
    with pytest.raises(DataError, match="no readable image"):
        decode(script)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_copy_of_a_pillow_image_is_turned_like_its_file(kind):
    """Would catch that the EXIF data of an image without a file is ignored."""
    data = with_orientation(PHOTO, 6, kind)
    expected = decode_upright(data)
    assert expected.shape == (50, 37, 3)
    np.testing.assert_array_equal(decode_upright(opened(data).copy()), expected)
