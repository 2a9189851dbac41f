"""Encoded pictures to RGB, as every photograph of a data set should look to a network.

OpenCV decodes plain JPEG, to Pillow's pixels and never slower; Pillow reads everything
else, and every header. Transparency is dropped, not blended: colours are those that are stored.

Orientation (EXIF 2.32, section 4.6.4, tag 0x0112): annotations are made on pictures as stored or
as shown, and files don't say which. The annotated size does, where a rotation changes it.
"""

import io
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image

from dn_detr_jax.errors import DataError

# What may be read. Others that Pillow knows start programs (EPS) or are no photographs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
_JPEG = ("JPEG", "MPO")  # of the latter, JPEG with more pictures behind it, the first


class Header(NamedTuple):
    """What a picture's file says before its pixels.

    Attributes:
      size: height and width in pixels, as stored.
      orientation: of EXIF, 1 to 8; 1 if the file has none.
    """

    size: tuple[int, int]
    orientation: int

    @property
    def shown_size(self) -> tuple[int, int]:
        """Height and width once the orientation is applied."""
        return self.size[::-1] if self.orientation >= 5 else self.size


def read_header(file: BinaryIO) -> Header:
    """The header of a picture, the only part of the file that is read.

    Raises:
      DataError: it is no picture of a known kind.
    """
    with _open(file) as picture:
        return _header(picture)


def decode(data: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    """The pixels of a picture.

    Args:
      data: a JPEG, PNG, WebP, BMP, GIF, TIFF, PPM or JPEG 2000 file, in any mode of up to 16 bits.
      size: its annotated height and width. The orientation that the file asks for is applied only
        where that gives this size and the stored pixels don't. None: as stored.

    Returns:
      uint8 [H, W, 3], RGB. Of 16 bits the upper 8.

    Raises:
      DataError: no picture, damaged, cut off, too large to be one, or not of the annotated size.
    """
    with _open(io.BytesIO(data)) as picture:
        header = _header(picture)
        turn = needs_turn(header, size)
        image = _pixels(picture, header.orientation, data)
    return np.ascontiguousarray(_turned(image, header.orientation)) if turn else image


def decode_upright(source: bytes | Image.Image) -> np.ndarray:
    """The pixels of a picture as viewers show it, its EXIF orientation applied.

    Args:
      source: a file as for `decode`, or a Pillow image of any mode.

    Returns:
      uint8 [H, W, 3], RGB.

    Raises:
      DataError: no picture, or a damaged one.
    """
    if isinstance(source, Image.Image):
        return _upright(source, b"")
    with _open(io.BytesIO(source)) as picture:
        return _upright(picture, source)


def _upright(picture: Image.Image, data: bytes) -> np.ndarray:
    header = _header(picture)
    image = _pixels(picture, header.orientation, data)
    return np.ascontiguousarray(_turned(image, header.orientation))


def _open(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file, formats=_FORMATS)
    except Image.UnidentifiedImageError:
        kinds = ", ".join(_FORMATS)
        size = file.seek(0, io.SEEK_END)
        raise DataError(f"{size} bytes that are no readable picture: {kinds}") from None
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
        raise DataError(_damage(error)) from error


def _damage(error: Exception) -> str:
    return f"a damaged picture ({error or type(error).__name__})"


def _header(picture: Image.Image) -> Header:
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF says nothing; the pixels may be well
        orientation = 1
    if not isinstance(orientation, int) or not 1 <= orientation <= 8:
        orientation = 1
    size = picture.height, picture.width
    turned = picture.format == "TIFF" and orientation >= 5  # Pillow says the size as shown
    return Header(size[::-1] if turned else size, orientation)


def needs_turn(header: Header, size: tuple[int, int] | None) -> bool:
    """Whether a picture of the annotated size is the stored one with its orientation applied.

    Args:
      header: of the file.
      size: annotated height and width; None: as stored.

    Raises:
      DataError: neither the stored picture nor the turned one has that size.
    """
    if size is None or tuple(size) == header.size:
        return False
    if tuple(size) == header.shown_size:
        return True
    stored, annotated = (f"{width} x {height}" for height, width in (header.size, size))
    raise DataError(
        f"is {stored} pixels (width x height, EXIF orientation {header.orientation}), but "
        f"annotated as {annotated}"
    )


def _pixels(picture: Image.Image, orientation: int, data: bytes) -> np.ndarray:
    """RGB as stored, whatever the orientation, which was read before.

    Pillow reads what is no file (`data` is empty), and what OpenCV refuses, such as a file that is
    cut off: it says why.
    """
    if data and picture.format in _JPEG and picture.mode in ("RGB", "L"):
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if image is not None and image.shape[:2] == (picture.height, picture.width):
            return image
    try:
        picture.load()
        image = _to_rgb(picture)
    except DataError:
        raise
    except Exception as error:  # as in _open
        raise DataError(_damage(error)) from error
    if picture.format == "TIFF":  # which Pillow has turned
        return np.ascontiguousarray(_turned(image, {6: 8, 8: 6}.get(orientation, orientation)))
    return image


def _to_rgb(picture: Image.Image) -> np.ndarray:
    """A loaded picture of any mode as uint8 [H, W, 3]."""
    mode = picture.mode
    if mode.startswith("I"):  # 16 bits, in 16 or in 32
        values = np.asarray(picture)
        if values.size and (values.min() < 0 or values.max() > 0xFFFF):
            raise DataError(f"pixels from {values.min()} to {values.max()}: more than 16 bits")
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if mode == "F":
        raise DataError("pixels are floating-point numbers, of unknown range; convert to 8 bits")
    if mode == "P":
        picture = picture.convert("RGBA")  # knows every kind of transparency of a palette
    return np.asarray(picture.convert("RGB"))


def _turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """A picture with its EXIF orientation applied, a view."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
