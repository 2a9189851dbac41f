"""Files are complete or unchanged; JSON lines survive a cut."""

import json
import os
import subprocess
import sys

import pytest

from dn_detr_jax.files import (
    read_json_lines,
    replace_atomically,
    write_json_atomically,
    write_text_atomically,
)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    """Catches writing in place, which leaves half of the new text, and a left temporary file."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replace_atomically(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_kill_leaves_the_old_file(tmp_path):
    """Catches a replacement before the end of the block, as after SIGKILL."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    program = (
        "import os, sys; from dn_detr_jax.files import replace_atomically\n"
        "with replace_atomically(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('ne'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], timeout=60)
    assert done.returncode == -9
    assert path.read_text() == "old"


def test_writing_makes_folders_and_keeps_links_and_names(tmp_path):
    """Catches a link that is replaced by a file, and a temporary name longer than names may be."""
    write_text_atomically(tmp_path / "new" / "a.txt", "ä\n", durable=True)
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "new" / "a.txt")
    write_text_atomically(link, "b")
    assert link.is_symlink()
    assert (tmp_path / "new" / "a.txt").read_text() == "b"
    longest = tmp_path / ("n" * 255)
    write_json_atomically(longest, {"a": [1]})
    assert json.loads(longest.read_text()) == {"a": [1]}


def test_a_device_is_written_directly(tmp_path):
    """Catches `--json /dev/stdout` that ends in an error or replaces the device."""
    program = "from dn_detr_jax.files import *; write_text_atomically('/dev/stdout', 'here')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.stdout == b"here", done.stderr


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    """Catches the temporary name in an error, which the user does not know."""
    file = tmp_path / "file"
    file.write_text("")
    for path in file / "a.txt", tmp_path:
        with pytest.raises(OSError) as error:
            write_text_atomically(path, "")
        assert str(error.value.filename) in (str(path), str(file))
    with pytest.raises(OSError) as error, replace_atomically(tmp_path / "b.txt"):
        raise OSError(28, "No space left on device")
    assert error.value.filename == str(tmp_path / "b.txt")


def test_a_line_that_a_kill_has_cut_short_is_left_out(tmp_path):
    """Catches a last line that is lost though complete, or read though cut, at any byte."""
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path) == []
    both = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": None, "name": "a\u2028b"}]
    whole = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in both).encode()
    path.write_bytes(whole)
    assert read_json_lines(path) == both
    for end in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:end])
        assert read_json_lines(path) == both[:1]


def test_lines_that_hold_no_object_are_skipped(tmp_path):
    """Catches a reader that fails, or that returns a value that is not an object."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n[1]\n{"b": \xff}\n' + b"[" * 100000 + b'\n{"c": 2}\n')
    assert read_json_lines(path) == [{"a": 1}, {"c": 2}]
