"""The image of a request: a multipart form or JSON, within limits, in memory only."""

import base64
import dataclasses
import io
import json
import math
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from dn_detr_jax.data.images import decode_upright, read_header
from dn_detr_jax.errors import DataError, one_line


class Refused(Exception):  # noqa: N818, an answer
    """A request that gets an error in place of detections.

    Attributes:
      status: of HTTP.
      reason: one line.
    """

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Attributes:
      bytes: of its body.
      pixels: of its image, decoded.
      seconds: from its headers to the answer.
      waiting: images of all requests that may wait for the detector.
    """

    bytes: int = 20 * 2**20
    pixels: int = 50_000_000
    seconds: float = 30.0
    waiting: int = 64


@dataclasses.dataclass(frozen=True)
class Question:
    """What a request asks.

    Attributes:
      image: bytes of an image file.
      threshold: lowest score.
    """

    image: bytes
    threshold: float


async def read_question(request: Request, limits: Limits, threshold: float) -> Question:
    """Reads the body of a request.

    Args:
      request: of `/predict`.
      limits: of the request.
      threshold: lowest score, where the request has none.

    Raises:
      Refused: the body is too large, malformed or of another type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise Refused(415, "expected application/json or multipart/form-data")
    body = await _read_body(request, limits.bytes)
    if kind == "application/json":
        return _from_json(body, threshold)
    return await _from_form(request, body, threshold)


async def _read_body(request: Request, limit: int) -> bytes:
    too_large = Refused(413, f"the request has more than {limit} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise too_large
    return bytes(body)


def _from_json(body: bytes, threshold: float) -> Question:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"no JSON: {one_line(error)[:200]}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("image"), str):
        raise Refused(400, 'expected {"image": the file in base64, "threshold": 0.5}')
    encoded = fields["image"]
    if encoded.startswith("data:"):  # as browsers write it
        encoded = encoded.partition(",")[2]
    try:
        image = base64.b64decode(encoded, validate=True)
    except ValueError:
        raise Refused(400, "image is not base64") from None
    return Question(image, _threshold(fields.get("threshold", threshold)))


class _InMemory(MultiPartParser):
    spool_max_size = sys.maxsize  # larger files would be written to the disk


async def _from_form(request: Request, body: bytes, threshold: float) -> Question:
    async def parts() -> AsyncIterator[bytes]:
        yield body
        yield b""

    stream: Any = parts()
    try:
        form = await _InMemory(request.headers, stream, max_files=1, max_fields=1).parse()
    except (MultiPartException, ValueError, KeyError) as error:
        message = getattr(error, "message", "") or one_line(error)
        raise Refused(400, f"no form: {message[:200]}") from None
    image = form.get("image")
    if not isinstance(image, UploadFile):
        raise Refused(400, "expected a form with the file image, and if you like threshold")
    return Question(await image.read(), _threshold(form.get("threshold", threshold)))


def _threshold(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= 1:
        raise Refused(400, "threshold: expected a number from 0 to 1")
    return number


def decode_image(image: bytes, limits: Limits) -> np.ndarray:
    """Decodes an image, upright.

    Returns:
      uint8 [H, W, 3].

    Raises:
      Refused: no readable image, or one of too many pixels, which is not decoded.
    """
    try:
        height, width = read_header(io.BytesIO(image)).size
        if height * width > limits.pixels:
            raise Refused(413, f"{width} x {height} pixels, more than {limits.pixels}")
        return decode_upright(image)
    except DataError as error:
        raise Refused(422, one_line(error)[:300]) from None
