"""The metrics files of a run, also after an interruption, and its terminal output."""

import contextlib
import io
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from dn_detr_jax.training.writers import MetricWriter, Progress, read_metrics


def _events(workdir):
    """Reads TensorBoard's records: length, checksum, data, checksum."""
    events = []
    for path in sorted((workdir / "tensorboard").glob("events*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_scalars_of_every_kind(tmp_path):
    values = {
        "loss": jnp.float32(0.5),
        "count": np.int64(3),
        "flag": True,
        "bad": float("nan"),
        "worse": jnp.float32(-jnp.inf),
    }
    with MetricWriter(tmp_path) as writer:
        writer.scalars(7, values)
        line = (tmp_path / "metrics.jsonl").read_text()  # flushed before close
    parsed = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert parsed.pop("time") > 1.6e9
    assert parsed == {
        "step": 7, "loss": 0.5, "count": 3, "flag": 1, "bad": None, "worse": None,
    }  # fmt: skip
    scalars = {v.tag: v.simple_value for e in _events(tmp_path) for v in e.summary.value}
    assert scalars["loss"] == 0.5 and not {"bad", "worse"} & scalars.keys()


def test_resuming_gives_the_lines_of_an_uninterrupted_run(tmp_path):
    def train(workdir, start, stop):
        with MetricWriter(workdir, start_step=start) as writer:
            for step in range(start + 1, stop + 1):
                writer.scalars(step, {"loss": step / 8})
                if step % 5 == 0:
                    writer.scalars(step, {"AP": step / 100})

    train(tmp_path / "straight", 0, 20)
    train(tmp_path / "killed", 0, 13)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "loss"')  # killed while writing
    train(tmp_path / "killed", 10, 20)

    lines = {name: read_metrics(tmp_path / name) for name in ("straight", "killed")}
    for line in lines["straight"] + lines["killed"]:
        line.pop("time")
    assert lines["killed"] == lines["straight"]
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_tensorboard_hides_the_steps_that_are_repeated(tmp_path):
    MetricWriter(tmp_path, start_step=10).close()
    starts = [e.step for e in _events(tmp_path) if e.session_log.status == e.session_log.START]
    assert starts == [11]


def test_an_incomplete_last_line_is_left_out(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.scalars(1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2}')  # without its line break: the line is incomplete
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    assert read_metrics(tmp_path / "nowhere") == []


def test_images_and_texts_reach_tensorboard(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.images(3, {"detections": np.full((4, 6, 3), 200, np.uint8)})
        writer.text("config", "dn:\n  groups: 5")
    summaries = {value.tag: value for event in _events(tmp_path) for value in event.summary.value}
    image = summaries["detections"].image
    assert (image.height, image.width) == (4, 6)
    assert image.encoded_image_string.startswith(b"\x89PNG")
    text = next(value for tag, value in summaries.items() if tag.startswith("config"))
    assert b"  groups: 5" in text.tensor.string_val[0]


@pytest.fixture
def full():
    """A file on a full disk."""
    if not Path("/dev/full").exists():
        pytest.skip("no file that is always full")
    file = open("/dev/full", "a")  # noqa: SIM115, closing it is an error too
    yield file
    with contextlib.suppress(OSError):
        file.close()


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, full):
    writer = MetricWriter(tmp_path)
    writer._file = full
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl"):
        writer.scalars(1, {"loss": 1.0})
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        writer.close()
    writer.close()


def test_a_full_disk_for_tensorboard_is_one_warning(tmp_path, full, caplog):
    """Catches a thread that ends alone while the training waits for it forever."""
    with MetricWriter(tmp_path) as writer:
        writer._loggers._open["tensorboard"]._file._writer = full.buffer
        for step in range(1, 1001):
            writer.scalars(step, {"loss": 1.0})
    assert len(read_metrics(tmp_path)) == 1000
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.match(r"the logger tensorboard is left out .*No space left .*tensorboard/", message)


def test_an_error_is_not_replaced_by_that_of_closing(tmp_path, full):
    """Catches an error of the curve files that replaces that of the checkpoint."""
    with pytest.raises(RuntimeError, match="the checkpoint"), MetricWriter(tmp_path) as writer:
        writer._file = full
        with contextlib.suppress(OSError):
            writer.scalars(1, {"loss": 1.0})
        raise RuntimeError("the checkpoint")


def test_two_writers_at_once_share_no_file(tmp_path):
    """Catches file names with whole seconds: a second writer empties the first one's file."""
    for step in (1, 2):
        with MetricWriter(tmp_path, start_step=step - 1) as writer:
            writer.scalars(step, {"loss": 1.0 * step})
    found = {e.step for e in _events(tmp_path) if e.summary.value}
    assert found == {1, 2}


def test_disabled_writes_nothing(tmp_path):
    with MetricWriter(tmp_path / "run", enabled=False) as writer:
        writer.scalars(1, {"loss": 1.0})
        writer.images(1, {"image": np.zeros((2, 2, 3), np.uint8)})
        writer.text("config", "x")
    assert not (tmp_path / "run").exists()


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    progress = Progress(1000, start_step=100, stream=stream)
    progress.update(150)
    assert stream.getvalue() == ""
    progress._began -= 30 + 90  # as if 120 seconds had passed, 90 of them in an evaluation
    progress.pause(90)
    progress.log(200, 12.34567, 51.26)
    assert stream.getvalue() == "step  200/1000  loss 12.3457  51.3 img/s  4m00s left\n"
    progress.message("saved")
    progress.close()
    assert stream.getvalue().endswith("left\nsaved\n")


def test_time_left_is_unknown_before_the_first_step():
    stream = io.StringIO()
    Progress(1000, start_step=100, stream=stream).log(100, 1.0, 0.0)
    assert "? left" in stream.getvalue()


def test_a_bar_on_a_terminal():
    stream = _Terminal()
    progress = Progress(1000, start_step=100, stream=stream)
    progress.log(500, 1.25, 99.5)
    progress.message("saved")
    progress.close()
    shown = stream.getvalue()
    assert re.search(r"50%.*500/1000.*loss 1\.25, 99\.5 img/s", shown)
    assert "saved\n" in shown


def test_other_processes_are_silent():
    for stream in (io.StringIO(), _Terminal()):
        progress = Progress(10, enabled=False, stream=stream)
        progress.update(1)
        progress.log(5, 1.0, 1.0)
        progress.message("saved")
        progress.close()
        assert stream.getvalue() == ""
