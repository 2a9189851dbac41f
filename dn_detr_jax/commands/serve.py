"""Serves an exported detector over HTTP, with a page to try it.

    python -m dn_detr_jax serve --artifact detector.zip [--host 127.0.0.1] [--port 8000]

`pip install "dn_detr_jax[serve]"` brings what it needs. `POST /predict` takes a form with the file
`image`, or JSON with the file in base64:

    curl -F image=@street.jpg -F threshold=0.5 http://127.0.0.1:8000/predict
    curl -H "Content-Type: application/json" -d '{"image": "/9j/4AA..."}' http://.../predict

and answers {"height", "width", "detections": [{"class", "category_id", "score", "bbox": [left, top,
width, height]}]}, boxes in pixels of the upright image. `GET /health` says what is served.

A request without a threshold has that of the artifact: the one with the best F1 in the evaluation
of its checkpoint, or 0.5.

Images that arrive together are detected together, up to the artifact's batch size (`export
--batch_size`). SIGTERM and Ctrl-C answer the requests under way and end.
"""

import importlib.util
from collections.abc import Sequence

from absl import flags

from dn_detr_jax.commands.command_line import define_path_flag, log_to_terminal
from dn_detr_jax.errors import ConfigError, DataError

FLAGS = flags.FLAGS
_PACKAGES = ("starlette", "uvicorn", "python_multipart")


def define_flags() -> None:
    """Defines the flags of this command."""
    define_path_flag("artifact", "File of the command export.", required=True)
    flags.DEFINE_string("host", "127.0.0.1", "Address; 0.0.0.0 is reached from other machines.")
    flags.DEFINE_integer("port", 8000, "0: a free one.", lower_bound=0, upper_bound=65535)
    flags.DEFINE_integer("max_bytes", 20 * 2**20, "Of a request.", lower_bound=1)
    flags.DEFINE_integer("max_pixels", 50_000_000, "Of an image.", lower_bound=1)
    flags.DEFINE_float("timeout", 30.0, "Seconds for a request.", lower_bound=0.1)
    flags.DEFINE_integer("max_waiting", 64, "Images that wait for the detector.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    """Reads the file and serves it."""
    del argv
    log_to_terminal()
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DataError(
            f'{", ".join(missing)}: not installed: pip install "dn_detr_jax[serve]", or in a clone '
            "pip install starlette uvicorn python-multipart"
        )
    from dn_detr_jax.inference.exported import ExportedError, load_exported
    from dn_detr_jax.serving.server import Limits, run_server
    from dn_detr_jax.training.freed_memory import keep_freed_memory

    try:
        detector = load_exported(FLAGS.artifact)
        keep_freed_memory()
    except ExportedError as error:
        raise DataError(str(error)) from error
    limits = Limits(FLAGS.max_bytes, FLAGS.max_pixels, FLAGS.timeout, FLAGS.max_waiting)
    try:
        run_server(detector, FLAGS.host, FLAGS.port, limits)
    except OSError as error:
        raise ConfigError("--port", FLAGS.port, f"{FLAGS.host} can't be used: {error}") from error
