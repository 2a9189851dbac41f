"""Prediction for videos and cameras, against the same frames as images, read back by OpenCV."""

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import cv2
import numpy as np
import pytest

from dn_detr_jax.commands import predict
from dn_detr_jax.errors import DataError
from dn_detr_jax.files import read_json_lines
from dn_detr_jax.inference import video_files, videos
from dn_detr_jax.inference.other_outputs import OtherOutputs
from dn_detr_jax.inference.tiles import TiledPredictor
from dn_detr_jax.inference.video_files import predict_videos
from dn_detr_jax.inference.videos import Video, VideoReader, camera_of, video_file, write_video
from dn_detr_jax.training import stop
from dn_detr_jax.visualize.boxes import draw_detections

ROOT = Path(__file__).parent.parent
SIZE, RATE = (96, 128), 12.5  # height and width, frames per second
THRESHOLD = 0.1


def write_frames(path, count, size=SIZE):
    """Writes a video of coarse noise, with times and without."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), RATE, size[::-1])
    rng = np.random.default_rng(count)
    for _ in range(count):
        writer.write(rng.integers(0, 256, (12, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1))
    writer.release()
    return path


def frames_of(path):
    """The frames of a video as OpenCV reads them, in RGB."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(read[1][..., ::-1].copy())
    return frames, capture.get(cv2.CAP_PROP_FPS)


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    return write_frames(tmp_path_factory.mktemp("videos") / "street.avi", 5)


def assert_records(records, frames, predictor, name):
    """Compares records with the predictions for the frames as images."""
    expected = predictor.predict(frames, threshold=THRESHOLD)
    assert sum(map(len, expected)) > len(frames)
    assert [record["frame"] for record in records] == list(range(len(frames)))
    for record, found in zip(records, expected, strict=True):
        assert record["file_name"] == name
        assert (record["height"], record["width"]) == found.size
        detections = record["detections"]
        assert [d["class"] for d in detections] == list(found.class_names)
        assert [d["category_id"] for d in detections] == found.category_ids.tolist()
        np.testing.assert_allclose([d["score"] for d in detections], found.scores, atol=1e-5)
        boxes = np.array([d["bbox"] for d in detections])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(boxes, found.boxes, atol=0.01)


def test_frames_have_the_detections_of_images(predictor, street, tmp_path):
    """Catches channels in another order, frames lost between batches, and times of other frames.

    The odd number of frames leaves the last batch half full.
    """
    others = OtherOutputs(tmp_path, predictor.categories, txt=True, crops=True)
    done = predict_videos(predictor, [Video(street)], tmp_path, THRESHOLD, others=others)
    assert done == (5, [], False)
    frames, _ = frames_of(street)
    records = read_json_lines(tmp_path / "videos" / "street.jsonl")
    assert_records(records, frames, predictor, str(street))
    assert [record["seconds"] for record in records] == pytest.approx(np.arange(5) / RATE)

    drawn, rate = frames_of(tmp_path / "videos" / "street.mp4")
    assert len(drawn) == 5 and rate == RATE
    for ours, plain, found in zip(
        drawn, frames, predictor.predict(frames, threshold=THRESHOLD), strict=True
    ):
        parts = found.boxes, found.labels, found.scores, found.class_names
        near, far = (
            np.abs(ours.astype(int) - other).mean()
            for other in (draw_detections(plain, *parts), plain)
        )
        assert near < 0.8 * far  # compressed
    names = {path.name for path in (tmp_path / "labels").iterdir()}
    assert names == {f"street_{i:06}.txt" for i in range(5)}
    lines = [(tmp_path / "labels" / name).read_text().splitlines() for name in sorted(names)]
    assert [len(some) for some in lines] == [len(record["detections"]) for record in records]
    crops = {path.parent.name for path in tmp_path.glob("crops/*/street_000004_*.jpg")}
    assert crops == {d["class"] for d in records[4]["detections"]}


def test_tiles_and_nodraw(predictor, street, tmp_path):
    """Catches frames that come out of the tiles in another order, and a video without need."""
    tiled = TiledPredictor(predictor, 80)
    done = predict_videos(tiled, [Video(street)], tmp_path, THRESHOLD, draw=False)
    assert done == (5, [], False)
    records = read_json_lines(tmp_path / "videos" / "street.jsonl")
    assert [record["frame"] for record in records] == list(range(5))
    expected = tiled.predict(frames_of(street)[0][3], THRESHOLD)
    assert [d["class"] for d in records[3]["detections"]] == list(expected.class_names)
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["street.jsonl"]


def test_frames_are_written_while_others_are_read(predictor, tmp_path, monkeypatch):
    """Catches a video that is held in memory, and records that a kill would lose."""
    path, behind = write_frames(tmp_path / "long.avi", 20), []

    class Watched(VideoReader):
        def __iter__(self):
            for frame in super().__iter__():
                lines = read_json_lines(tmp_path / "videos" / "long.jsonl")
                behind.append(frame.number - len(lines))
                yield frame

    monkeypatch.setattr(video_files, "VideoReader", Watched)
    predict_videos(predictor, [Video(path)], tmp_path, THRESHOLD, draw=False)
    assert len(behind) == 20 and max(behind) <= 2 * predictor.batch_size


def test_unreadable_videos_are_named_and_others_predicted_for(predictor, street, tmp_path):
    """Catches a damaged video that passes for a short one."""
    whole = write_frames(tmp_path / "whole.avi", 40).read_bytes()
    contents = {"half.avi": whole[: len(whole) // 2], "empty.mp4": b"", "text.mov": b"text"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [*(tmp_path / name for name in contents), street]
    done = predict_videos(predictor, list(map(Video, paths)), tmp_path, 0.9, draw=False)
    half, empty, text = done.failures
    count = len(read_json_lines(tmp_path / "videos" / "half.jsonl"))
    assert 0 < count < 30 and done.frames == count + 5
    assert half == f"{paths[0]}: a damaged video: {count} of its 40 frames can be read"
    for message, path in ((empty, paths[1]), (text, paths[2])):
        assert message == f"{path}: not a video that OpenCV can read, or a damaged one"
    assert len(read_json_lines(tmp_path / "videos" / "street.jsonl")) == 5


def test_a_stop_keeps_what_was_written(predictor, street, tmp_path):
    """Catches an annotated video without its index, and further videos after the stop."""
    other = write_frames(tmp_path / "other.avi", 3)
    looks = iter([False, False, False, True, True])
    done = predict_videos(
        predictor, [Video(street), Video(other)], tmp_path, 0.5, stopped=lambda: next(looks)
    )
    assert done == (3, [], True)
    assert len(read_json_lines(tmp_path / "videos" / "street.jsonl")) == 3
    assert len(frames_of(tmp_path / "videos" / "street.mp4")[0]) == 3
    assert not (tmp_path / "videos" / "other.jsonl").exists()


def test_a_camera_is_read_until_a_stop(predictor, street, tmp_path, monkeypatch):
    """Catches times by the number of frames, which a slow detector makes wrong."""
    opened, capture = [], cv2.VideoCapture

    def camera(source):
        opened.append(source)
        return capture(str(street))

    assert camera_of("camera:3") == Video(3) and str(Video(3)) == "camera:3"
    assert camera_of("camera:") is camera_of("camera:x") is camera_of("3") is None
    ticks = iter(range(100))
    # Not `time.monotonic` itself, which other threads call.
    monkeypatch.setattr(videos, "time", types.SimpleNamespace(monotonic=lambda: next(ticks)))
    monkeypatch.setattr(videos.cv2, "VideoCapture", camera)
    looks = iter([False, False, False, True])
    done = predict_videos(
        predictor, [Video(3)], tmp_path, 0.5, draw=False, stopped=lambda: next(looks)
    )
    assert opened == [3] and done == (3, [], False)
    records = read_json_lines(tmp_path / "videos" / "camera_3.jsonl")
    assert [record["seconds"] for record in records] == [1, 2, 3]
    done = predict_videos(predictor, [Video(3)], tmp_path, 0.5, draw=False)
    assert done == (5, ["camera:3: sends no more frames, after 5"], False)


def test_a_missing_camera_is_one_line(predictor, tmp_path, capfd):
    done = predict_videos(predictor, [Video(99)], tmp_path, 0.5)
    (failure,) = done.failures
    assert failure == "camera:99: there is no such camera, or another program uses it"
    assert capfd.readouterr().err == ""


def test_what_can_not_be_written_is_named(tmp_path, monkeypatch):
    """Catches an unwritten video that nobody notices."""
    target, frame = tmp_path / "out" / "a.mp4", np.zeros((*SIZE, 3), np.uint8)
    with write_video(target, (97, 129), 29.97) as write:
        write(np.zeros((97, 129, 3), np.uint8))
    assert frames_of(target)[0][0].shape == (96, 128, 3)
    with pytest.raises(OSError, match=r"a\.mp4: frame 1 "), write_video(target, SIZE, 5) as write:
        write(frame)
        write(frame[:64])
    assert len(frames_of(target)[0]) == 1
    with pytest.raises(OSError, match=r"a\.mp4: 1 of 2 frames"), write_video(target, SIZE, 5) as w:
        w(frame)
        w(frame)
        monkeypatch.setattr(videos.cv2, "VideoCapture", lambda path: _OneFrame())
    monkeypatch.undo()
    monkeypatch.setattr(videos, "_CODEC", "none")
    with pytest.raises(OSError, match=r"a\.mp4: OpenCV can't write videos \(none in MP4\)"):
        write_video(target, SIZE, 5).__enter__()
    with pytest.raises(IsADirectoryError, match="folder"):
        (tmp_path / "folder.mp4").mkdir()
        write_video(tmp_path / "folder.mp4", SIZE, 5).__enter__()


class _OneFrame:
    def get(self, key):
        return float(key == cv2.CAP_PROP_FRAME_COUNT)


def test_results_do_not_replace_their_video(predictor, tmp_path):
    """Catches a video that is destroyed while it is read, and results of two videos in one file."""
    (tmp_path / "videos").mkdir()
    path = write_frames(tmp_path / "videos" / "a.avi", 3).rename(tmp_path / "videos" / "a.mp4")
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"a\.mp4: its results would replace it"):
        predict_videos(predictor, [Video(path)], tmp_path, 0.5)
    assert path.read_bytes() == before
    same = [Video(Path("a/x.mp4")), Video(Path("b/x.mp4")), Video(0)]
    assert len(set(video_files._stems(same))) == 3


def test_arguments_are_divided(tmp_path):
    """Catches images taken for videos and the reverse; folders stay folders."""
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "A.MP4").write_bytes(b"")
    names = ["a.jpg", "A.MP4", "folder.mp4", "A.MP4"]
    arguments = ["camera:0", *(str(tmp_path / name) for name in names)]
    found, others = predict._split(arguments, allow_urls=False)
    assert found == [Video(0), Video(tmp_path / "A.MP4")]
    assert others == [tmp_path / "a.jpg", tmp_path / "folder.mp4"]
    with pytest.raises(DataError, match=r"none\.mkv: there is no such file"):
        video_file(tmp_path / "none.mkv")


def test_ctrl_c_ends_with_readable_results(predictor, tmp_path, monkeypatch, capsys):
    """Catches a signal that loses the video or passes for its end, and one that ends at once."""
    path, requests = write_frames(tmp_path / "long.avi", 20), []

    class Request(stop.StopRequest):
        def __enter__(self):
            requests.append(self)
            return super().__enter__()

    class Interrupted(VideoReader):
        def __iter__(self):
            for frame in super().__iter__():
                if frame.number == 6:
                    os.kill(os.getpid(), signal.SIGINT)
                    deadline = time.monotonic() + 30
                    while not requests[0].received and time.monotonic() < deadline:
                        time.sleep(0.01)
                yield frame

    monkeypatch.setattr(video_files, "VideoReader", Interrupted)
    monkeypatch.setattr(predict.stop, "StopRequest", Request)
    values = {"out": str(tmp_path), "draw": True}
    monkeypatch.setattr(predict, "FLAGS", types.SimpleNamespace(**values))
    with pytest.raises(SystemExit) as ended:
        predict._predict_videos(
            [Video(path)], predictor, THRESHOLD, OtherOutputs(tmp_path, [], txt=False, crops=False)
        )
    records = read_json_lines(tmp_path / "videos" / "long.jsonl")
    assert ended.value.code == 130 and 0 < len(records) < 8
    assert (
        capsys.readouterr().out == f"Wrote the detections of {len(records)} frames to {tmp_path}\n"
    )
    assert len(frames_of(tmp_path / "videos" / "long.mp4")[0]) == len(records)


def test_ffmpeg_does_not_write_to_the_terminal(tmp_path):
    """Catches lines of a library beside the one line of an error."""
    (tmp_path / "text.mp4").write_bytes(b"text")
    code = (
        "import sys, pathlib; from dn_detr_jax.inference.videos import Video, VideoReader\n"
        "try: VideoReader(Video(pathlib.Path(sys.argv[1])))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "text.mp4")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.count("\n") == 1 and done.stderr == ""
