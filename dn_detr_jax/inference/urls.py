"""Images at URLs, fetched into memory within limits, by the standard library."""

import dataclasses
import io
import queue
import re
import threading
import urllib.parse
import urllib.request
from pathlib import PurePosixPath

import dn_detr_jax
from dn_detr_jax.data.images import read_header
from dn_detr_jax.errors import DataError, one_line

MOST_BYTES = 20 * 2**20  # of a file
MOST_PIXELS = 50_000_000  # of an image, decoded
MOST_SECONDS = 30.0  # from the look-up of the host to the last byte


@dataclasses.dataclass(frozen=True)
class Url:
    """Address of an image, http or https.

    Attributes:
      address: as given.

    Raises:
      DataError: the address has no host.
    """

    address: str

    def __post_init__(self) -> None:
        try:
            host = urllib.parse.urlsplit(self.address).hostname
        except ValueError:
            host = None
        if not host:
            raise DataError(f"{self.address}: a URL without a host")

    @property
    def path(self) -> str:
        """The path within the host, with the name of the file, decoded."""
        return urllib.parse.unquote(urllib.parse.urlsplit(self.address).path)

    @property
    def stem(self) -> str:
        """The name of the file without suffix, or the host, for names of files about it."""
        name = PurePosixPath(self.path).stem or str(urllib.parse.urlsplit(self.address).hostname)
        return re.sub(r"[^\w .-]", "_", name)[:100]

    def read_bytes(self) -> bytes:
        """Fetches the file.

        Raises:
          DataError: the server can't be reached, answers with an error or too slowly, redirects to
            something else than http and https, or the file is too large.
        """
        answers: queue.SimpleQueue[bytes | DataError] = queue.SimpleQueue()
        # A thread, because neither a look-up nor slow headers end with urllib's time limit.
        threading.Thread(target=self._fetch, args=(answers,), daemon=True).start()
        try:
            answer = answers.get(timeout=MOST_SECONDS)
        except queue.Empty:
            raise DataError(f"{self}: not received within {MOST_SECONDS:g} seconds") from None
        if isinstance(answer, DataError):
            raise answer
        return answer

    def _fetch(self, answers: "queue.SimpleQueue[bytes | DataError]") -> None:
        try:
            answers.put(self._read())
        except DataError as error:
            answers.put(error)
        except Exception as error:  # urllib and http.client raise many kinds of errors
            answers.put(DataError(f"{self}: can't be fetched: {one_line(error)[:300]}"))

    def _read(self) -> bytes:
        name = f"dn_detr_jax/{dn_detr_jax.__version__}"
        request = urllib.request.Request(self.address, headers={"User-Agent": name})
        with _opener().open(request, timeout=MOST_SECONDS) as answer:
            content = answer.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise DataError(f"{self}: more than {MOST_BYTES} bytes")
        try:
            height, width = read_header(io.BytesIO(content)).size
        except DataError as error:
            raise DataError(f"{self}: {error}") from error
        if height * width > MOST_PIXELS:
            raise DataError(f"{self}: {width} x {height} pixels, more than {MOST_PIXELS}")
        return content

    def __str__(self) -> str:
        return self.address


def is_url(argument: str) -> bool:
    """Whether an argument of the command line is a URL of http or https."""
    return argument.lower().startswith(("http://", "https://"))


def _opener() -> urllib.request.OpenerDirector:
    """An opener of nothing but http and https, also after redirections."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
