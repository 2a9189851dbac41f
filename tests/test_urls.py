"""Prediction for images at URLs, from a server of the standard library."""

import http.server
import io
import json
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

from dn_detr_jax.commands import predict
from dn_detr_jax.errors import DataError
from dn_detr_jax.inference import image_files, urls
from dn_detr_jax.inference.urls import Url


def png(height, width):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


IMAGE = png(30, 40)
FILES = {
    "/a/street 1.png": IMAGE,
    "/text.jpg": b"<html>hello</html>",
    "/large.png": png(90, 100),
    "/half.png": IMAGE[: len(IMAGE) // 2],
    "/pixels.png": png(1, 101),
}
MOVED = {
    "/moved": "/a/street%201.png",
    "/to_file": "file:///etc/passwd",
    "/to_ftp": "ftp://127.0.0.1/x.png",
    "/loop": "/loop",
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = Url(f"http://x{self.path}").path
        if path == "/slow.png":
            time.sleep(1)
        elif path in MOVED:
            self.send_response(302)
            self.send_header("Location", MOVED[path])
            self.end_headers()
        elif path in FILES:
            self.send_response(200)
            self.end_headers()  # without a length, which a limit could trust
            self.wfile.write(FILES[path])
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def host():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    monkeypatch.setattr(urls, "MOST_BYTES", 10_000)
    monkeypatch.setattr(urls, "MOST_PIXELS", 1_200)
    monkeypatch.setattr(urls, "MOST_SECONDS", 0.5)


def test_an_image_at_a_url_has_the_detections_of_its_file(host, predictor, tmp_path):
    """Catches other pixels, lost ids, and a broken URL that ends the others."""
    addresses = [f"{host}/a/street%201.png?size=large", f"{host}/none.png", f"{host}/moved"]
    paths = image_files.find_images([Url(address) for address in addresses])
    files = image_files.number_images(paths)
    failures = image_files.predict_files(predictor, files, tmp_path, 0.0)
    assert failures == [f"{addresses[1]}: can't be fetched: HTTP Error 404: Not Found"]
    results = json.loads((tmp_path / "detections.json").read_text())
    expected = predictor.predict(IMAGE, threshold=0.0).to_coco(0)
    for image_id in (0, 2):
        lines = [line for line in results if line["image_id"] == image_id]
        assert {line["file_name"] for line in lines} == {addresses[image_id]}
        assert [line["category_id"] for line in lines] == [d["category_id"] for d in expected]
        scores = [line["score"] for line in lines]
        np.testing.assert_allclose(scores, [d["score"] for d in expected], atol=1e-5)
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"street 1.jpg", "moved.jpg"}


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/none.png", "HTTP Error 404"),
        ("/text.jpg", "18 bytes that are no readable image"),
        ("/large.png", "more than 10000 bytes"),
        ("/pixels.png", "101 x 1 pixels, more than 100"),
        ("/to_file", "not allowed"),
        ("/to_ftp", "unknown url type: ftp"),
        ("/loop", "infinite loop"),
        ("/slow.png", r"not received within 0\.5 seconds|timed out"),
    ],
)
def test_what_is_no_image_is_one_line(host, path, words, monkeypatch):
    """Catches limits that are not kept, and a redirection to a local file."""
    if path == "/pixels.png":
        monkeypatch.setattr(urls, "MOST_PIXELS", 100)
    with pytest.raises(DataError, match=words) as error:
        Url(host + path).read_bytes()
    assert str(error.value).startswith(f"{host}{path}: ") and "\n" not in str(error.value)


def test_an_incomplete_image_is_one_line(host):
    (failure,) = image_files.find_images([Url(f"{host}/half.png")])
    with pytest.raises(DataError, match=r"half\.png: a damaged image"):
        image_files._read(image_files.ImageFile(failure, 0), "auto", ())


def test_a_host_that_sends_nothing_is_left_in_time():
    """Catches a limit for each part of an answer in place of one for all of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"

        def drip():
            connection, _ = listener.accept()
            with connection:
                for letter in b"HTTP/1.1 200 OK\r\n":
                    connection.sendall(bytes([letter]))
                    time.sleep(0.1)

        thread = threading.Thread(target=drip)
        thread.start()
        begin = time.monotonic()
        with pytest.raises(DataError, match=r"x\.png: not received within 0\.5 seconds"):
            Url(address).read_bytes()
        assert time.monotonic() - begin < 1.5
        thread.join()


def test_urls_need_their_flag():
    """Catches a request that nobody asked for."""
    address = "https://127.0.0.1:1/x.png"
    with pytest.raises(DataError, match=r"x\.png: .*--allow_urls"):
        predict._split([address], allow_urls=False)
    found, others = predict._split([address], allow_urls=True)
    assert (found, others) == ([], [Url(address)])
    for wrong in ("http://", "http://[1/x.png", "https:///x.png"):
        with pytest.raises(DataError, match="without a host"):
            Url(wrong)


@pytest.mark.parametrize(
    ("address", "stem"),
    [
        ("http://host.org/", "host.org"),
        ("http://host/a/street%20one.jpg?x=/y.png", "street one"),
        ("http://host/a%00b%2F..%2F..%2Fc%5Cd.png", "c_d"),
        ("http://host/" + 300 * "x", 100 * "x"),
    ],
)
def test_names_of_results_are_names_of_files(address, stem):
    """Catches a server that chooses the folder of the results."""
    assert Url(address).stem == stem


def test_urls_are_matched_with_annotations_by_their_path():
    """Catches a query that hides the name of the file."""
    paths = [Url("http://host/val2017/000000000139.jpg?x=1")]
    assert image_files.match_file_names([p.path for p in paths], ["000000000139.jpg"]) == [(0,)]
