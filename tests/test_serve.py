"""The HTTP server of an exported detector: answers, limits, what it leaves behind, its page."""

import base64
import dataclasses
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags as absl_flags
from browser import Browser, find_chromium
from fast_jit import fast_jit as quick_jit
from PIL import Image

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("python_multipart")

from dn_detr_jax.commands.dispatch import COMMANDS
from dn_detr_jax.inference.export import export
from dn_detr_jax.inference.exported import load_exported
from dn_detr_jax.inference.predictor import read_run
from dn_detr_jax.serving.requests import Limits
from dn_detr_jax.serving.server import make_server

ROOT = Path(__file__).parent.parent
CANVAS = 96, 128  # of the images too, so that nothing is resized
LIMITS = Limits(bytes=300_000, pixels=100_000, seconds=20.0, waiting=64)
THRESHOLD = 0.1


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


IMAGES = [png(np.random.default_rng(i).integers(0, 256, (*CANVAS, 3), np.uint8)) for i in range(5)]


class Server:
    """A server in a thread of this process."""

    def __init__(self, detector, limits=LIMITS):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._server = make_server(detector, limits)
        self._server.install_signal_handlers = lambda: None
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def ask(self, method, path, body=None, headers=None):
        """Returns status, headers and parsed body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        kind = answer.headers.get("content-type", "")
        return answer.status, answer.headers, json.loads(text) if "json" in kind else text

    def post_json(self, document):
        body = document if isinstance(document, bytes) else json.dumps(document)
        return self.ask("POST", "/predict", body, {"Content-Type": "application/json"})[::2]

    def post_form(self, fields):
        body = form(fields)
        kind = "multipart/form-data; boundary=bound"
        return self.ask("POST", "/predict", body, {"Content-Type": kind})[::2]


def form(fields):
    """A form; files are bytes."""
    lines = []
    for name, value in fields:
        file = '; filename="../../image.png"' if isinstance(value, bytes) else ""
        value = value if isinstance(value, bytes) else str(value).encode()
        head = f'--bound\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        lines.append(head.encode() + value + b"\r\n")
    return b"".join(lines) + b"--bound--\r\n"


@pytest.fixture(scope="module")
def stored(predictor):
    """The threshold of the artifact: between the scores of the first image that differ most."""
    scores = predictor.predict(IMAGES[0], threshold=0.0).scores
    place = int(np.argmax(-np.diff(scores)))
    return float(scores[place : place + 2].mean())


@pytest.fixture(scope="module")
def artifact(digits_run, stored, tmp_path_factory):
    """An exported detector for four images at a time."""
    path = tmp_path_factory.mktemp("artifact") / "detector.zip"
    run = dataclasses.replace(read_run(digits_run), threshold=stored)
    export(run, path, platforms=("cpu",), canvas=CANVAS, batch_size=4)
    return path


@pytest.fixture(scope="module")
def detector(artifact):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", quick_jit)
        loaded = load_exported(artifact)
    pixels = np.zeros((*CANVAS, 3), np.uint8)
    loaded(*(part[None] for part in loaded.prepare(pixels)))  # compiles
    return loaded


@pytest.fixture(scope="module")
def server(detector):
    with Server(detector) as server:
        yield server


def encoded(data):
    return base64.b64encode(data).decode()


def test_parallel_requests_equal_the_predictor(server, predictor, detector, monkeypatch):
    """Catches rows of a batch that get each other's detections, and other boxes or names."""
    calls, detect = [], type(detector).__call__

    def slow(self, images, sizes):
        calls.append(len(images))
        time.sleep(0.1)  # the next requests arrive meanwhile
        return detect(self, images, sizes)

    monkeypatch.setattr(type(detector), "__call__", slow)

    def ask(i):
        image = IMAGES[i % 5]
        if i % 2:
            return server.post_json({"image": encoded(image), "threshold": THRESHOLD})
        return server.post_form([("image", image), ("threshold", THRESHOLD)])

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    wanted = predictor.predict(IMAGES, threshold=THRESHOLD)
    assert sum(map(len, wanted)) > 20
    for i, (status, found) in enumerate(answers):
        expected = wanted[i % 5]
        assert status == 200 and (found["height"], found["width"]) == CANVAS == expected.size
        detections = found["detections"]
        assert [d["class"] for d in detections] == list(expected.class_names)
        assert [d["category_id"] for d in detections] == expected.category_ids.tolist()
        np.testing.assert_allclose([d["score"] for d in detections], expected.scores, atol=1e-5)
        boxes = np.array([d["bbox"] for d in detections])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(boxes, expected.boxes, atol=1e-3)
    assert sum(calls) == 20 and max(calls) == 4 and len(calls) < 15


def test_requests_without_a_threshold_have_that_of_the_artifact(server, predictor, stored):
    """Catches a default of the server's own."""
    expected = predictor.predict(IMAGES[0], threshold=stored)
    assert 0 < len(expected) < len(predictor.predict(IMAGES[0], threshold=0.0))
    for status, found in (
        server.post_json({"image": encoded(IMAGES[0])}),
        server.post_form([("image", IMAGES[0])]),
    ):
        assert status == 200
        assert [d["class"] for d in found["detections"]] == list(expected.class_names)
    assert server.ask("GET", "/health")[2]["threshold"] == stored


def test_health_and_a_data_url(server, detector):
    status, _, health = server.ask("GET", "/health")
    assert (status, health["status"], health["canvas"]) == (200, "ok", list(CANVAS))
    assert len(health["classes"]) == 9 and "" not in health["classes"]
    plain = server.post_json({"image": encoded(IMAGES[0])})
    assert server.post_json({"image": f"data:image/png;base64,{encoded(IMAGES[0])}"}) == plain
    assert plain[0] == 200


NOISE = np.random.default_rng(9).integers(0, 256, (400, 300, 3), np.uint8)
WRONG = {
    "truncated": (422, [("image", IMAGES[0][:500])]),
    "text": (422, [("image", b"#!/bin/sh\necho hello\n")]),
    "postscript": (422, [("image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")]),
    "empty": (422, [("image", b"")]),
    "pixels": (413, [("image", png(np.zeros((400, 300, 3), np.uint8)))]),
    "bytes": (413, [("image", png(NOISE))]),
    "no_image": (400, [("threshold", 0.5)]),
    "image_as_text": (400, [("image", "/etc/passwd")]),
    "threshold": (400, [("image", IMAGES[0]), ("threshold", "nan")]),
    "two_files": (400, [("image", IMAGES[0]), ("other", IMAGES[0])]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_forms_are_refused_in_one_line(name, server):
    wanted, fields = WRONG[name]
    status, answer = server.post_form(fields)
    assert status == wanted and list(answer) == ["error"] and "\n" not in answer["error"]


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b"\xff\xfe", 400),
        (b"[]", 400),
        ({"image": 5}, 400),
        ({"image": "/etc/passwd?"}, 400),
        ({"image": "http://127.0.0.1/image.png"}, 400),
        ({"image": "aGVsbG8="}, 422),
        ({"image": encoded(IMAGES[0]), "threshold": True}, 400),
        ({"image": encoded(IMAGES[0]), "threshold": 10**400}, 400),
        ({"image": encoded(IMAGES[0]), "threshold": [0.5]}, 400),
        ({"image": "A" * 300_001}, 413),
    ],
    ids=lambda value: "" if isinstance(value, int) else None,
)
def test_wrong_json_is_refused_in_one_line(body, wanted, server):
    status, answer = server.post_json(body)
    assert status == wanted and list(answer) == ["error"] and "\n" not in answer["error"]


def test_other_types_methods_and_paths(server):
    assert server.ask("POST", "/predict", b"x", {"Content-Type": "text/plain"})[0] == 415
    assert server.ask("POST", "/predict", b"x")[0] == 415
    bad_form = {"Content-Type": "multipart/form-data"}
    assert server.ask("POST", "/predict", b"x", bad_form)[0] == 400
    assert server.ask("GET", "/predict")[0] == 405
    for path in "/../../etc/passwd", "/page.html", "/predict/":
        assert server.ask("GET", path)[0] in (307, 404), path


def test_a_body_without_a_length_is_cut_off(server):
    """Catches a limit that trusts the header alone."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"A" * 50_000
        for _ in range(7):
            connection.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_slow_bodies_slow_detections_and_long_queues(detector, monkeypatch):
    """Catches requests that wait for ever, and a server that does not recover."""
    limits = Limits(bytes=300_000, pixels=100_000, seconds=0.5, waiting=1)
    go_on, detect = threading.Event(), type(detector).__call__

    def blocked(self, images, sizes):
        go_on.wait(30)
        return detect(self, images, sizes)

    question = {"image": encoded(IMAGES[0])}
    with Server(detector, limits) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 99\r\n\r\n{{".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        with monkeypatch.context() as patch, ThreadPoolExecutor(6) as pool:
            patch.setattr(type(detector), "__call__", blocked)
            answers = list(pool.map(server.post_json, [question] * 6))
            go_on.set()
        assert {status for status, _ in answers} == {503}
        reasons = {answer["error"] for _, answer in answers}
        assert reasons == {
            "not answered within 0.5 seconds",
            "too many requests wait; try again later",
        }
        deadline = time.monotonic() + 30
        while server.post_json(question)[0] != 200:
            assert time.monotonic() < deadline


def test_nothing_of_a_request_reaches_the_disk(server, monkeypatch, tmp_path):
    """Catches forms that starlette writes into temporary files from one MiB on."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    written = []
    monkeypatch.setattr(
        tempfile.SpooledTemporaryFile, "rollover", lambda self: written.append(self)
    )
    monkeypatch.setattr("starlette.formparsers.MultiPartParser.spool_max_size", 10)
    assert server.post_form([("image", IMAGES[0])])[0] == 200
    assert server.post_form([("image", IMAGES[0][:500])])[0] == 422
    assert written == [] and list(tmp_path.iterdir()) == []


def _drop(data, name="scene.png"):
    """JavaScript that drops an image file onto the page."""
    return f"""(() => {{
      const bytes = Uint8Array.from(atob("{encoded(data)}"), (c) => c.charCodeAt(0));
      const transfer = new DataTransfer();
      transfer.items.add(new File([bytes], "{name}", {{type: "image/png"}}));
      const event = new DragEvent("drop", {{dataTransfer: transfer, bubbles: true}});
      document.getElementById("drop").dispatchEvent(event);
    }})()"""


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium")
def test_the_page_shows_the_detections_of_a_dropped_image(server, predictor, stored, tmp_path):
    """Catches a page that needs the network, that its own policy blocks, or that draws nothing."""
    status, headers, page = server.ask("GET", "/")
    assert status == 200 and b"http" not in page.replace(b"http-equiv", b"")
    assert "default-src 'none'" in headers["content-security-policy"]
    found = predictor.predict(IMAGES[1], threshold=THRESHOLD)
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait_for("document.getElementById('served').textContent.startsWith('9 classes')")
        start = float(browser.run("document.getElementById('value').textContent"))
        assert start == pytest.approx(max(stored, 0.05), abs=0.0051)
        browser.run("document.getElementById('threshold').value = 0.1")
        browser.run(_drop(IMAGES[1]))
        browser.wait_for("!document.getElementById('table').hidden")
        rows = browser.run(
            "[...document.querySelectorAll('#rows tr')].map("
            "(row) => [...row.cells].map((cell) => cell.textContent))"
        )
        assert [row[0] for row in rows] == list(found.class_names)
        np.testing.assert_allclose([float(row[1]) for row in rows], found.scores, atol=6e-4)
        size = browser.run("[canvas.width, canvas.height]")
        assert size == [CANVAS[1], CANVAS[0]]
        left, top = np.clip(found.boxes[0][:2].round(), 1, 90).astype(int).tolist()
        drawn = browser.run(
            "[...document.getElementById('canvas').getContext('2d')"
            f".getImageData({left}, {top}, 1, 1).data]"
        )
        pixels = np.asarray(Image.open(io.BytesIO(IMAGES[1])))
        assert drawn[:3] != pixels[top, left].tolist()
        if path := os.environ.get("SCREENSHOT"):
            browser.screenshot(Path(path))
        browser.run(_drop(IMAGES[1][:300], "<b>broken</b>"))
        browser.wait_for("document.getElementById('message').className === 'error'")
        message = browser.run("document.getElementById('message').textContent")
        assert message.startswith("<b>broken</b>: ")
        assert browser.run("canvas.hidden && document.getElementById('table').hidden")


@pytest.mark.slow
def test_the_command_serves_until_a_signal(artifact, stored):
    command = [sys.executable, "-m", "dn_detr_jax", "serve", f"--artifact={artifact}", "--port=0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        line = process.stdout.readline()
        assert line.startswith("Serving on http://127.0.0.1:"), process.stderr.read()
        port = int(line.rpartition(":")[2])
        said = f"Lowest score: {stored:.3f}, if a request has no threshold\n"
        assert process.stdout.readline() == said
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read())["status"] == "ok"
        connection.close()
        taken = [*command[:-1], f"--port={port}"]
        second = subprocess.run(taken, capture_output=True, text=True)
        assert second.returncode == 1
        assert second.stderr.startswith(f"error: --port = {port}: 127.0.0.1 can't be used: ")
        process.terminate()
        stdout, stderr = process.communicate(timeout=60)
    assert (stdout, stderr) == ("", "") and process.returncode in (0, -15)


def test_missing_packages_are_one_line(tmp_path):
    """Catches a traceback for an extra that is not installed."""
    code = (
        "import sys; sys.modules['python_multipart'] = sys.modules['jax'] = None\n"
        "sys.argv = ['dn-detr', 'serve', '--artifact=none.zip']\n"
        "from dn_detr_jax.commands.dispatch import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert 'python_multipart: not installed: pip install "dn_detr_jax[serve]"' in done.stderr


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_dockerfiles_copy_what_exists_and_start_the_command(name):
    """Catches renamed files, forgotten exceptions of .dockerignore and wrong flags; builds none."""
    text = (ROOT / "docker" / f"{name}.Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line.strip()]
    known = "FROM WORKDIR COPY RUN USER ENV EXPOSE HEALTHCHECK ENTRYPOINT CMD"
    assert steps[0][0] == "FROM" and {step for step, _ in steps} <= set(known.split())
    sent = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    copied = {source for step, rest in steps if step == "COPY" for source in rest.split()[:-1]}
    assert copied == sent and all((ROOT / source).exists() for source in copied)
    arguments = [json.loads(rest) for step, rest in steps if step in ("ENTRYPOINT", "CMD")]
    program, command, *flags = [argument for part in arguments for argument in part]
    assert program == "dn-detr"
    values = absl_flags.FlagValues()
    for flag in ("host", "artifact"):
        absl_flags.DEFINE_string(flag, None, "", flag_values=values)
    assert command in COMMANDS and values([program, *flags]) == [program]
    assert "USER serve" in lines
