"""Prepares `DigitScenes` once, for all processes that use a folder."""

import contextlib
import fcntl
import io
import shutil
import sys
from pathlib import Path

import tensorflow_datasets as tfds

from dn_detr_jax.data.digit_scenes.builder import DigitScenes


def prepare(scenes: str, directory: Path) -> Path:
    """Prepares scenes under a directory unless they are there.

    Args:
      scenes: name of a `DigitScenesConfig`, "full" or "tiny".
      directory: the folder of the data set is made in it.

    Returns:
      The folder.

    Raises:
      OSError: it can't be written.
    """
    builder = DigitScenes(config=scenes, data_dir=directory, file_format="array_record")
    folder = Path(builder.data_dir)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # One process prepares, others that start at the same time wait for it.
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for leftover in folder.parent.glob(f"incomplete.*_{folder.name}"):
                shutil.rmtree(leftover)  # of a preparation that was killed
            config = builder.builder_config
            print(
                f"Preparing {config.train} + {config.validation} scenes of handwritten digits "
                f"in {folder}",
                flush=True,
            )
            _prepare_quietly(builder, directory)
    return folder


def _prepare_quietly(builder: tfds.core.DatasetBuilder, directory: Path) -> None:
    """Prepares without downloads; progress bars on a terminal only."""
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            download_dir=directory / "downloads",
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
