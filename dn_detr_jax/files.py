"""Files that a kill or a full disk leaves either complete or as they were, and JSON lines."""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """Adds a file's name to an OSError of the block, which has none when writing fails."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextlib.contextmanager
def replace_atomically(path: str | os.PathLike, durable: bool = False) -> Iterator[Path]:
    """Gives a temporary path whose file takes the place of `path` when the block ends.

    The temporary file lies in the same folder, which is made if it is missing. If the block raises,
    the temporary file is deleted and `path` stays as it was. A symbolic link keeps pointing to the
    replaced file; a pipe or device, such as /dev/stdout, is written directly.

    Args:
      path: file to write.
      durable: the new content is on the disk before it takes the place of the old one, so that not
        even a power failure loses both.

    Raises:
      OSError: naming `path`, also where the temporary file could not be written.

    Examples:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> with replace_atomically(folder / "notes.txt") as temporary:
      ...     _ = temporary.write_text("complete")
      >>> [file.name for file in folder.iterdir()]
      ['notes.txt']
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path  # opening a folder raises an error with its name
        return
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary), temporary):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text_atomically(path: str | os.PathLike, text: str, durable: bool = False) -> None:
    """Writes a UTF-8 file as a whole or not at all; errors as for `replace_atomically`."""
    with replace_atomically(path, durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomically(path: str | os.PathLike, value: Any, indent: int | None = 1) -> None:
    """Writes a JSON file as a whole or not at all; errors as for `replace_atomically`."""
    write_text_atomically(path, json.dumps(value, indent=indent) + "\n")


def checksum(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads the objects of a file with one JSON object per line.

    Lines that are cut short, as a kill leaves the last one, or hold no object are skipped.

    Returns:
      The objects in their order; an empty list if there is no file.

    Raises:
      OSError: the file can't be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    objects = []
    for line in text.split("\n")[:-1]:  # what follows the last line break is incomplete
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects
