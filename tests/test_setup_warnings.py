"""What a start warns of in its environment."""

import logging

import pytest

from dn_detr_jax.training.setup import warn_of_several_opencvs

ALL = ("opencv-python", "opencv-python-headless", "opencv-contrib-python")


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_several_packages_of_opencv_are_named(count, tmp_path, monkeypatch, caplog):
    """Catches silence where one package has overwritten the other's files, and a false alarm."""
    for name in ALL[:count]:
        folder = tmp_path / f"{name.replace('-', '_')}-5.0.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 5.0.1\n")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with caplog.at_level(logging.WARNING):
        warn_of_several_opencvs()
    assert len(caplog.messages) == (count > 1)
    if count > 1:
        assert all(f"{name} 5.0.1" in caplog.text for name in ALL[:count])
