"""Detection over HTTP: `/predict`, `/health`, and a page to drop an image onto.

It needs starlette, uvicorn and python-multipart (`pip install "dn_detr_jax[serve]"`). Images are
held in memory for the time of their request; nothing of a request is executed, logged or written.
"""

import asyncio
import base64
import contextlib
import hashlib
import re
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from dn_detr_jax.inference.exported import ExportedDetector
from dn_detr_jax.serving.batches import Batches, Busy
from dn_detr_jax.serving.requests import Limits, Refused, decode_image, read_question

_PAGE = Path(__file__).with_name("page.html")
_DECODERS = 4  # images that are decoded at a time
_MOST_CONNECTIONS = 256


def make_app(detector: ExportedDetector, limits: Limits) -> Starlette:
    """Makes the application that answers the requests.

    Args:
      detector: finds the objects.
      limits: of a request.
    """
    batches = Batches(detector, limits.waiting)
    decoders = ThreadPoolExecutor(_DECODERS, "decoder")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        del app
        running = asyncio.create_task(batches.run())
        yield
        running.cancel()

    def prepare(image: bytes) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
        pixels = decode_image(image, limits)
        height, width = pixels.shape[:2]
        return (height, width), *detector.prepare(pixels)

    async def answer(request: Request) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limits.seconds
        try:
            async with asyncio.timeout_at(deadline):
                question = await read_question(request, limits, detector.threshold)
        except TimeoutError:
            raise Refused(408, f"not received within {limits.seconds:g} seconds") from None
        try:
            async with asyncio.timeout_at(deadline):
                rows = await loop.run_in_executor(decoders, prepare, question.image)
                found = await batches.detect(*rows[1:])
        except TimeoutError:
            raise Refused(503, f"not answered within {limits.seconds:g} seconds") from None
        return _document(detector, found, rows[0], question.threshold)

    async def predict(request: Request) -> Response:
        try:
            return JSONResponse(await answer(request))
        except Refused as refused:
            return _error(refused.status, refused.reason)
        except Busy:
            return _error(503, "too many requests wait; try again later", {"Retry-After": "1"})
        except ClientDisconnect:
            return Response(status_code=400)

    async def health(request: Request) -> Response:
        del request
        return JSONResponse(
            {
                "status": "ok",
                "step": detector.metadata["step"],
                "canvas": list(detector.canvas),
                "batch_size": detector.batch_size,
                "threshold": detector.threshold,
                "classes": [c["name"] for c in detector.classes if c["name"]],
                "platform": jax.default_backend(),
                "waiting": batches.waiting,
            }
        )

    text = _PAGE.read_text(encoding="utf-8")
    policy = _content_policy(text)

    async def page(request: Request) -> Response:
        del request
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    return Starlette(
        routes=[
            Route("/", page),
            Route("/health", health),
            Route("/predict", predict, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )


def _document(
    detector: ExportedDetector,
    found: dict[str, np.ndarray],
    size: tuple[int, int],
    threshold: float,
) -> dict[str, Any]:
    """Returns the answer to a request, of one row of the detector's results."""
    names = {category["id"]: category["name"] for category in detector.classes}
    detections = [
        {
            "class": names[result["category_id"]],
            "category_id": result["category_id"],
            "score": result["score"],
            "bbox": result["bbox"],
        }
        for result in detector.coco_results(found, 0, 0, size)
        if result["score"] >= threshold
    ]
    return {"height": size[0], "width": size[1], "detections": detections}


def _error(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": reason}, status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answers for unknown paths and methods."""
    del request
    assert isinstance(error, HTTPException)
    return _error(error.status_code, str(error.detail), dict(error.headers or {}))


def _content_policy(page: str) -> str:
    """Allows the page its own script and style, requests to this server, and nothing else."""

    def source(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{source('script')}'; "
        f"style-src 'sha256-{source('style')}'; img-src blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def make_server(detector: ExportedDetector, limits: Limits) -> uvicorn.Server:
    """Makes the server; `run_server` runs it until SIGTERM or Ctrl-C."""
    config = uvicorn.Config(
        make_app(detector, limits),
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=max(1, round(limits.seconds)),
    )
    return uvicorn.Server(config)


def run_server(detector: ExportedDetector, host: str, port: int, limits: Limits) -> None:
    """Compiles, serves until SIGTERM or Ctrl-C, and answers the requests under way.

    Args:
      detector: finds the objects.
      host: name or address to listen on.
      port: 0 for one that is free.
      limits: of a request.

    Raises:
      OSError: the address can't be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        image, size = detector.prepare(np.zeros((8, 8, 3), np.uint8))
        detector(image[None], size[None])
        name = f"[{host}]" if ":" in host else host
        print(f"Serving on http://{name}:{listener.getsockname()[1]}")
        print(f"Lowest score: {detector.threshold:.3f}, if a request has no threshold", flush=True)
        make_server(detector, limits).run(sockets=[listener])
