"""Damaged, odd or hostile images give pixels of the right size or a named error, within bounds.

A few bytes may claim more pixels than the memory holds, so readers check the size first.
"""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from coco_directory import photograph
from damage import damaged, examples, one_line, within
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from dn_detr_jax.data.images import decode, decode_upright, read_header
from dn_detr_jax.errors import DataError
from dn_detr_jax.inference.predictor import read_image

REPOSITORY = Path(__file__).parent.parent
PHOTO = Image.fromarray(photograph(23, 31))
pytestmark = pytest.mark.filterwarnings("ignore")  # of Pillow, about metadata


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


GRAY16 = Image.fromarray(np.arange(23 * 31, dtype=np.uint16).reshape(23, 31))
PALETTE = PHOTO.quantize(20)
FILES = {
    "jpeg": encoded(PHOTO, "JPEG"),
    "progressive": encoded(PHOTO, "JPEG", progressive=True, exif=exif(6)),
    "cmyk": encoded(PHOTO.convert("CMYK"), "JPEG"),
    "png": encoded(PHOTO, "PNG", exif=exif(8)),
    "png16": encoded(GRAY16, "PNG"),
    "palette": encoded(PALETTE, "PNG", transparency=bytes(range(20))),
    "apng": encoded(PHOTO, "PNG", save_all=True, append_images=[PHOTO.rotate(180)]),
    "webp": encoded(PHOTO, "WEBP", exif=exif(3)),
    "webp animated": encoded(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(180)]),
    "gif animated": encoded(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]),
    "bmp": encoded(PHOTO, "BMP"),
    "tiff": encoded(PHOTO, "TIFF", exif=exif(5)),
    "tiff lzw": encoded(PHOTO.convert("CMYK"), "TIFF", compression="tiff_lzw"),
    "tiff16": encoded(GRAY16, "TIFF"),
    "ppm": encoded(PHOTO, "PPM"),
    "jpeg 2000": encoded(PHOTO, "JPEG2000"),
}


def looked_at(data: bytes) -> list[np.ndarray]:
    """Returns the results of all readers for a file; each may refuse it, in one line."""
    found = []
    for read in (
        lambda: decode(data),
        lambda: decode(data, (23, 31)),
        lambda: decode(data, (31, 23)),
        lambda: decode_upright(data),
        lambda: read_image(data),
    ):
        try:
            with within(10):
                found.append(read())
        except DataError as error:
            one_line(error)
    for image in found:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        assert image.flags.c_contiguous and min(image.shape) > 0
    return found


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_is_read(kind):
    """Catches an unreadable good file, whose damaged copies would pass the next test."""
    assert len(looked_at(FILES[kind])) >= 4


@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=examples(25))
@given(data=st.data())
def test_a_damaged_image_has_pixels_or_is_named(kind, data):
    """Catches a reader's error that is not a DataError, and images without pixels."""
    content = data.draw(damaged(FILES[kind]))
    try:
        size = read_header(io.BytesIO(content)).size
    except DataError as error:
        one_line(error)
        size = None
    for image in looked_at(content):
        assert size is not None and sorted(image.shape[:2]) == sorted(size)


@settings(max_examples=examples(50))
@given(
    first=st.sampled_from(sorted(FILES)),
    second=st.sampled_from(sorted(FILES)),
    cut=st.integers(0, 64),
    place=st.floats(0, 1),
)
def test_a_head_of_one_image_on_the_body_of_another(first, second, cut, place):
    body = FILES[second]
    looked_at(FILES[first][:cut] + body[int(place * len(body)) :])


@settings(max_examples=examples(100))
@given(data=st.binary(max_size=200))
def test_bytes_of_any_kind(data):
    looked_at(data)
    for head in (
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"P6 ",
        b"P7\n",
    ):
        looked_at(head + data)


# Bombs


def chunk(name: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def png(width: int, height: int, content: bytes, bits: int = 8, color: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    parts = chunk(b"IHDR", header) + content + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def jpeg_of(width: int, height: int) -> bytes:
    """A JPEG whose frame header claims another size."""
    data = bytearray(FILES["jpeg"])
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def tiff_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(PHOTO, "TIFF"))
    for tag, value in ((256, width), (257, height)):
        entry = data.index(struct.pack("<H", tag) + b"\4\0\1\0\0\0")  # one long number
        data[entry + 8 : entry + 12] = struct.pack("<I", value)
    return bytes(data)


def bombs() -> dict[str, bytes]:
    text = b"comment\0\0" + zlib.compress(bytes(300 * 2**20), 9)
    small = chunk(b"IDAT", zlib.compress(bytes(4 * 13), 9))
    zeros = chunk(b"IDAT", zlib.compress(bytes(300 * 2**20), 9))
    gif = FILES["gif animated"]
    bmp = bytearray(FILES["bmp"])
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    return {
        "PNG of 60000 x 60000": png(60_000, 60_000, small),
        "PNG of 2**31 - 1": png(2**31 - 1, 2**31 - 1, small),
        "PNG of one line": png(2**31 - 1, 1, small),
        "PNG with a compressed text": png(4, 4, chunk(b"zTXt", text) + small),
        "PNG with more data than pixels": png(4, 4, zeros),
        "PNG of 50000 x 50000, 1 bit": png(50_000, 50_000, zeros, bits=1, color=0),
        "JPEG of 65000 x 65000": jpeg_of(65_000, 65_000),
        "GIF of 65535 x 65535": gif[:6] + b"\xff" * 4 + gif[10:],
        "BMP of 60000 x 60000": bytes(bmp),
        "TIFF of 60000 x 60000": tiff_of(60_000, 60_000),
        "TIFF of 2**32 - 1": tiff_of(2**32 - 1, 2**32 - 1),
        "PPM of 10**9": b"P6 1000000000 1000000000 255\n",
        "PPM of 60000": b"P6 60000 60000 255\n",
    }


MEASURE = """
import json, pathlib, resource, sys, time
from dn_detr_jax.errors import DataError
from dn_detr_jax.data.images import decode, decode_upright, read_header
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    data, before, start, said = path.read_bytes(), peak(), time.process_time(), []
    for read in (decode, decode_upright, lambda data: decode(data, (60000, 60000))):
        try:
            said.append(str(read(data).shape))
        except DataError as error:
            said.append(str(error))
    print(json.dumps([path.name, said, peak() - before, time.process_time() - start]))
"""


def test_a_few_bytes_never_take_much_memory_or_time(tmp_path):
    """Catches memory taken by bombs; another process measures their peak alone."""
    for name, data in bombs().items():
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(bombs())
    for name, said, mebibytes, seconds in lines:
        print(name, said, mebibytes, round(seconds, 3))
        assert mebibytes < 64 and seconds < 5, (name, said, mebibytes, seconds)
        if "60000" in name or "2**3" in name:
            assert not any(text.startswith("(") for text in said), (name, said)


def test_images_of_other_programs_formats_are_not_opened(tmp_path):
    """Catches formats whose readers start programs or open other files."""
    marker = tmp_path / "marker"
    scripts = {
        "eps": f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({marker}) (w) file closefile\n",
        "svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="file://{marker}"/></svg>',
        "mvg": f"push graphic-context\nimage over 0,0 0,0 '|touch {marker}'\npop graphic-context",
        "xpm": '/* XPM */ static char *x[] = {"1 1 1 1", "a c #000000", "a"};',
        "pickle": "cposix\nsystem\n(S'touch " + str(marker) + "'\ntR.",
    }
    for content in scripts.values():
        with pytest.raises(DataError, match="no readable image"):
            decode(content.encode())
    assert not marker.exists()
