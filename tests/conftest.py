"""What several tests share."""

import pytest
from hypothesis import settings
from tiny_detector import TinyDetector

from dn_detr_jax.config import base_config
from dn_detr_jax.data.datasets import open_dataset

# The same examples every time; no deadline, since the first example compiles.
settings.register_profile("tests", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def tiny():
    """A small detector, with functions that all tests share so that they compile once."""
    return TinyDetector()


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A folder in which the small set of digit scenes is prepared."""
    directory = tmp_path_factory.mktemp("data")
    config = base_config()
    config.data.name, config.data.dir = "digits_tiny", str(directory)
    open_dataset(config.data, "train")
    return directory


@pytest.fixture
def digits_config(digits_dir):
    """A configuration for it: plain resize, two canvases."""
    config = base_config()
    config.data.update(
        {
            "name": "digits_tiny",
            "dir": str(digits_dir),
            "canvases": ((96, 128), (128, 96)),
            "max_objects": 8,
            "shuffle_window": 32,
            "eval_short_side": 96,
            "eval_max_long_side": 128,
        }
    )
    config.data.augment.update(
        {"flip": 0.0, "crop": 0.0, "short_sides": (80, 88, 96), "max_long_side": 128}
    )
    config.train.batch_size = config.eval.batch_size = 8
    return config
