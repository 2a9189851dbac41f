"""Image files to RGB pixels, and what the header of a file says.

OpenCV decodes plain JPEG: the pixels equal Pillow's, and it is never slower. OpenCV also decodes
color PNG and TIFF of 16 bits per channel; Pillow keeps 8 bits of them. Pillow reads everything
else, and every header. Transparency is dropped, not blended: colors are those that are stored.

Orientation (EXIF 2.32, section 4.6.4, tag 0x0112): some tools annotate images as stored, others as
viewers show them, and annotation files do not say which. The annotated size decides where the
orientation changes the size (`Exif` has the other cases).
"""

import functools
import io
import logging
from collections.abc import Callable, Sequence
from typing import IO, BinaryIO, Literal, NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, features

from dn_detr_jax.errors import DataError

logger = logging.getLogger(__name__)

MOST_PIXELS = 2**28  # of an image that is read: 16384 x 16384, 768 MiB as RGB

# Which pixels the boxes are drawn on, `config.data.exif`. "as_stored" and "as_shown" say it for all
# images. "auto" applies the orientation only if the annotated size asks for it: an image whose size
# does not change by it (180 degrees, mirrored, squares) stays as stored.
Exif = Literal["auto", "as_shown", "as_stored"]

# `config.data.pixel_range`: (darkest, brightest) value of pixels of more than 8 bits, or empty.
PixelRange = Sequence[float]

# Formats of Pillow that are read, their file name suffixes, and the optional part of Pillow that
# they need. Pillow's other formats start programs (EPS) or are not made for photographs.
_FORMATS = {
    # MPO is JPEG with further images behind the first, which is read.
    "JPEG": ((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "jpg"),
    "PNG": ((".png", ".apng"), "zlib"),
    "WEBP": ((".webp",), "webp"),
    "AVIF": ((".avif", ".avifs"), "avif"),
    "BMP": ((".bmp",), ""),
    "GIF": ((".gif",), ""),
    "TIFF": ((".tif", ".tiff"), ""),
    "PPM": ((".ppm", ".pgm", ".pbm", ".pnm"), ""),
    "JPEG2000": ((".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), "jpg_2000"),
}


def _readable() -> dict[str, tuple[str, ...]]:
    """Returns the suffixes of the formats that the installed Pillow reads, by format."""
    return {
        kind: suffixes
        for kind, (suffixes, needed) in _FORMATS.items()
        if not needed or features.check(needed)
    }


FORMATS = tuple(_readable())

# File name suffixes of the images that `decode` reads, in lower case. Content decides what a file
# is; suffixes only tell images from other files of a folder.
SUFFIXES = tuple(suffix for suffixes in _readable().values() for suffix in suffixes)

# Pillow refuses twice as many pixels as its own limit, and warns from that limit on. This module
# has a limit of its own, which is larger.
Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, MOST_PIXELS)


class Header(NamedTuple):
    """What the file of an image says before its pixels.

    Attributes:
      size: height and width in pixels, as stored.
      orientation: of EXIF, 1 to 8; 1 if the file has none.
      bits: 16 if the file has 16 bits per channel, else 8.
    """

    size: tuple[int, int]
    orientation: int
    bits: int = 8

    @property
    def shown_size(self) -> tuple[int, int]:
        """Height and width after the orientation is applied."""
        return self.size[::-1] if self.orientation >= 5 else self.size


def read_header(file: BinaryIO) -> Header:
    """Reads the header of an image, and no other part of the file.

    Raises:
      DataError: the file is no image of a known format, or the image is too large.
    """
    with _open(file) as opened:
        return _header(opened)


def decode(
    data: bytes,
    size: tuple[int, int] | None = None,
    exif: Exif = "auto",
    pixel_range: PixelRange = (),
) -> np.ndarray:
    """Decodes an image.

    Args:
      data: the content of a file in one of `FORMATS`, in any mode of up to 16 bits; with a range
        also gray images of 32 bits and of floating-point numbers.
      size: height and width that the boxes lie in; None: not known, which leaves "auto" as stored.
      exif: `config.data.exif`.
      pixel_range: `config.data.pixel_range`.

    Returns:
      uint8 [H, W, 3], RGB. An image of more than 8 bits per channel is scaled by the range, and
      values beyond it become black or white. Without a range it is scaled by the bits that it uses:
      8, 10, 12, 14 or 16.

    Raises:
      DataError: no image, a damaged or incomplete one, one of more than `MOST_PIXELS`, or one of
        another size.
    """
    with _open(io.BytesIO(data)) as opened:
        header = _header(opened)
        turn = needs_turn(header, size, exif)
        pixels = _pixels(opened, header, data, pixel_range)
    return np.ascontiguousarray(_turned(pixels, header.orientation)) if turn else pixels


def decode_upright(source: bytes | Image.Image, pixel_range: PixelRange = ()) -> np.ndarray:
    """Decodes an image as viewers show it, with its EXIF orientation applied.

    Args:
      source: the content of a file as for `decode`, or a Pillow image of any mode.
      pixel_range: `config.data.pixel_range`.

    Returns:
      uint8 [H, W, 3], RGB.

    Raises:
      DataError: as `decode`.
    """
    if isinstance(source, Image.Image):
        return _upright(source, b"", pixel_range)
    with _open(io.BytesIO(source)) as opened:
        return _upright(opened, source, pixel_range)


def _upright(opened: Image.Image, data: bytes, pixel_range: PixelRange) -> np.ndarray:
    header = _header(opened)
    pixels = _pixels(opened, header, data, pixel_range)
    return np.ascontiguousarray(_turned(pixels, header.orientation))


def _open(file: BinaryIO) -> Image.Image:
    try:
        opened = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        channels = _channels_of_tiff(file)
        if channels > 4:
            raise DataError(
                f"a TIFF of {channels} channels; gray images and images of 3 channels are read, "
                "with or without transparency: write 3 of the channels as RGB"
            ) from None
        size = file.seek(0, io.SEEK_END)
        raise DataError(f"{size} bytes that are no readable image: {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise DataError(_too_large("")) from None
    except Exception as error:  # Pillow's readers raise many kinds of errors for damaged files
        raise DataError(_damage(error)) from error
    if opened.width * opened.height > MOST_PIXELS:
        opened.close()
        raise DataError(_too_large(f"{opened.width} x {opened.height} pixels, "))
    return opened


def _channels_of_tiff(file: BinaryIO) -> int:
    """Returns the number of channels (SamplesPerPixel) of a TIFF, 0 for another file."""
    file.seek(0)
    head = file.read(8)
    if head[:4] not in (b"II*\0", b"MM\0*"):
        return 0
    try:
        directory = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(directory.next)
        directory.load(file)
        return int(directory.get(TiffImagePlugin.SAMPLESPERPIXEL, 1))
    except Exception:  # a damaged file, which is reported as such
        return 0


def _too_large(found: str) -> str:
    return (
        f"too large: {found}at most {MOST_PIXELS} pixels are read, such as 16384 x 16384; resize "
        "the image or cut it into parts"
    )


def _damage(error: Exception) -> str:
    return f"a damaged image ({error or type(error).__name__})"


def _header(opened: Image.Image) -> Header:
    bits = 16 if opened.mode.startswith("I") or _is_deep_color(opened) else 8
    try:
        orientation = _exif(opened).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF, which does not matter for the pixels
        orientation = 1
    if not isinstance(orientation, int) or not 1 <= orientation <= 8:
        orientation = 1
    size = opened.height, opened.width
    turned = opened.format == "TIFF" and orientation >= 5  # Pillow gives the size as shown
    return Header(size[::-1] if turned else size, orientation, bits)


def _exif(opened: Image.Image) -> Image.Exif:
    """Reads the EXIF data of an image; decodes the pixels of a PNG only if EXIF may follow them."""
    # None after the pixels were read. A copy of an image has no file, and may have EXIF data.
    file = opened.fp if isinstance(opened, ImageFile.ImageFile) else None
    if opened.format == "PNG" and file is not None and not _has_late_metadata(file):
        return Image.Image.getexif(opened)
    return opened.getexif()


def _has_late_metadata(file: IO[bytes]) -> bool:
    """Whether a PNG, read up to its pixels, has text or EXIF behind them."""
    pixels = file.tell()
    place = pixels - 8  # of the length and the name of the chunk
    try:
        while True:
            file.seek(place)
            head = file.read(8)
            if len(head) < 8 or head[4:] == b"IEND":
                return False
            if head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            place += 12 + int.from_bytes(head[:4])
    finally:
        file.seek(pixels)


def _is_deep_color(opened: Image.Image) -> bool:
    """Whether a color PNG or TIFF has 16 bits per channel, which Pillow's mode does not say."""
    if opened.format not in ("PNG", "TIFF") or opened.mode not in ("RGB", "RGBA"):
        return False
    tiles = getattr(opened, "tile", [])
    return bool(tiles) and "16" in str(tiles[0][3])


def needs_turn(header: Header, size: tuple[int, int] | None, exif: Exif = "auto") -> bool:
    """Whether the orientation has to be applied to the stored pixels.

    Args:
      header: of the file.
      size: height and width that the boxes lie in; None: not known.
      exif: `config.data.exif`.

    Raises:
      DataError: the image does not have that size.
    """
    if exif == "auto":
        turn = size is not None and size != header.size
    else:
        turn = exif == "as_shown" and header.orientation != 1
    found = header.shown_size if turn else header.size
    if size is None or tuple(size) == found:
        return turn
    raise DataError(_other_size(header, size, exif))


def size_of_boxes(header: Header, size: tuple[int, int], exif: Exif) -> tuple[int, int]:
    """Returns the height and width that the boxes of an image lie in.

    It is the annotated size, with height and width exchanged where the file is annotated with the
    stored size and boxes as shown, or the reverse.

    Args:
      header: of the file.
      size: annotated height and width.
      exif: `config.data.exif`.

    Raises:
      DataError: the image has that size neither as stored nor as shown.
    """
    if tuple(size) not in (header.size, header.shown_size):
        raise DataError(_other_size(header, size, exif))
    return {"auto": size, "as_shown": header.shown_size, "as_stored": header.size}[exif]


def orientation_is_open(header: Header, size: tuple[int, int]) -> bool:
    """Whether the annotated size leaves open if boxes are drawn on the stored or shown pixels."""
    proven = tuple(size) == header.shown_size != header.size
    return header.orientation != 1 and not proven


def _other_size(header: Header, size: tuple[int, int], exif: Exif) -> str:
    stored, annotated = (f"{width} x {height}" for height, width in (header.size, size))
    rule = "" if exif == "auto" else f", data.exif={exif}"
    return (
        f"is {stored} pixels (width x height, EXIF orientation {header.orientation}{rule}), but "
        f"annotated as {annotated}"
    )


def used_bits(data: bytes) -> int:
    """Returns how many bits per channel an image of 16 bits uses: 8, 10, 12, 14 or 16.

    Raises:
      DataError: as `decode`.
    """
    with _open(io.BytesIO(data)) as opened:
        header = _header(opened)
        if header.bits == 8:
            return 8
        return _depth(_deep_pixels(opened, header, data))


def _pixels(
    opened: Image.Image, header: Header, data: bytes, pixel_range: PixelRange
) -> np.ndarray:
    """Decodes an image as stored.

    Pillow reads what is no file (`data` is empty), and what OpenCV refuses, such as an incomplete
    file: its error says why.
    """
    if header.bits == 16 or (opened.mode == "F" and pixel_range):
        deep = _deep_pixels(opened, header, data, checked=not pixel_range)
        values = _scaled(deep, pixel_range) if pixel_range else _eight_bits(deep)
        return np.repeat(values[..., None], 3, axis=2) if values.ndim == 2 else values
    if data and opened.format in ("JPEG", "MPO") and opened.mode in ("RGB", "L"):
        pixels = _by_opencv(opened, data, cv2.IMREAD_COLOR_RGB)
        if pixels is not None:
            return pixels
    return _as_stored(opened, header, _load(opened, _to_rgb))


def _by_opencv(opened: Image.Image, data: bytes, flags: int) -> np.ndarray | None:
    """Decodes an image with OpenCV; returns None if that fails."""
    content = np.frombuffer(data, np.uint8)
    pixels = cv2.imdecode(content, flags | cv2.IMREAD_IGNORE_ORIENTATION)
    right = pixels is not None and pixels.shape[:2] == (opened.height, opened.width)
    return pixels if right else None


def _deep_pixels(
    opened: Image.Image, header: Header, data: bytes, checked: bool = True
) -> np.ndarray:
    """Decodes an image of 16 bits as stored: numbers [H, W] or [H, W, 3].

    `checked` says whether gray values of more than 16 bits are an error.

    OpenCV always applies the orientation of TIFF files. So Pillow reads color TIFF files with an
    orientation; it keeps 8 bits per channel.
    """
    if opened.mode.startswith(("I", "F")):
        convert = _gray_values if checked else np.asarray
        return _as_stored(opened, header, _load(opened, convert))
    if data and (opened.format == "PNG" or header.orientation == 1):
        # IMREAD_COLOR_RGB gives wrong colors for TIFF of 16 bits in OpenCV 5.0.
        pixels = _by_opencv(opened, data, cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)
        if pixels is not None and pixels.dtype == np.uint16:
            return np.ascontiguousarray(pixels[..., ::-1])
    return _as_stored(opened, header, _load(opened, _to_rgb)).astype(np.uint16) << 8


def _load(opened: Image.Image, convert: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    try:
        opened.load()
        return convert(opened)
    except DataError:
        raise
    except Exception as error:  # as in _open
        raise DataError(_damage(error)) from error


def _as_stored(opened: Image.Image, header: Header, pixels: np.ndarray) -> np.ndarray:
    """Undoes the orientation of a TIFF file, which Pillow applies."""
    if opened.format != "TIFF":
        return pixels
    inverse = {6: 8, 8: 6}.get(header.orientation, header.orientation)
    return np.ascontiguousarray(_turned(pixels, inverse))


def _gray_values(opened: Image.Image) -> np.ndarray:
    """Returns the values of a gray image of 16 bits, which Pillow may hold in 32."""
    values = np.asarray(opened)
    if values.size and (values.min() < 0 or values.max() > 0xFFFF):
        raise DataError(
            f"pixels from {values.min()} to {values.max()}: more than 16 bits; set data.pixel_range"
        )
    return values


def _depth(values: np.ndarray) -> int:
    """Returns the least depth of image sensors, in bits, that holds all the values."""
    most = int(values.max(initial=0))
    return next(depth for depth in (8, 10, 12, 14, 16) if most < 2**depth)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    depth = _depth(values)
    if depth < 16:
        _warn_of_depth(depth)
    return (values >> (depth - 8)).astype(np.uint8)


@functools.cache
def _warn_of_depth(depth: int) -> None:
    logger.warning(
        "an image of 16 bits per channel uses only %d of them: it is scaled so that %d is white, "
        "each image by itself; data.pixel_range gives all images one range (this is said once)",
        depth,
        2**depth - 1,
    )


def _scaled(values: np.ndarray, pixel_range: PixelRange) -> np.ndarray:
    """Maps a range of values to 0 to 255, uint8; no number is the darkest value."""
    low, high = pixel_range
    shares = (values.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    return np.rint(255 * np.clip(np.nan_to_num(shares), 0, 1)).astype(np.uint8)


def _to_rgb(opened: Image.Image) -> np.ndarray:
    """Converts a loaded image of 8 bits, of any mode, to uint8 [H, W, 3]."""
    if opened.mode == "F":
        raise DataError(
            "pixels are floating-point numbers, of unknown range; set data.pixel_range, such as "
            "(0.0, 1.0)"
        )
    if opened.mode == "P":
        opened = opened.convert("RGBA")  # which knows every kind of transparency of a palette
    return np.asarray(opened.convert("RGB"))


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Returns a view with an EXIF orientation applied."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
