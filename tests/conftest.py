"""Fixtures and settings that several tests share."""

import typecheck  # noqa: F401, before the modules that it checks

# isort: split
import gc

import fast_jit
import pytest
from data import tiny as tiny_config
from hypothesis import settings
from tiny_detector import TinyDetector, random_params

import dn_detr_jax
import dn_detr_jax.inference.predictor as predictor_module
from dn_detr_jax.checkpoints.manager import Checkpoints
from dn_detr_jax.config import base_config
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.models.registry import abstract_params, build_model

collect_ignore = ["data"]  # tests import it; pytest must not import it again under another name

# Every run has the same examples; no deadline, since the first example compiles.
settings.register_profile("tests", max_examples=25, deadline=None, derandomize=True, database=None)
# pytest --hypothesis-profile=deep: new examples each time, and a hundred times as many.
settings.register_profile("deep", max_examples=2500, deadline=None, database=None)
settings.load_profile("tests")


def pytest_collection_finish():
    """Keeps modules and tests out of garbage collection, which costs 7% of the time else."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


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
    """A config for the digit scenes: plain resize, two canvases."""
    config = base_config()
    config.data.update(
        {
            "name": "digits_tiny",
            "dir": str(digits_dir),
            "canvases": ((96, 128), (128, 96)),
            "max_objects": 8,
            "eval_short_side": 96,
            "eval_max_long_side": 128,
        }
    )
    config.data.augment.update(
        {"flip": 0.0, "crop": 0.0, "short_sides": (80, 88, 96), "max_long_side": 128}
    )
    config.train.batch_size = config.eval.batch_size = 8
    return config


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory, digits_dir):
    """A work directory for `digits_tiny`, its parameters random; programs compile quickly.

    Labels 0 to 9 are the categories 10, 20, ...; label 6 stands for nothing.
    """
    config = tiny_config.get_config()
    config.data.dir, config.data.canvases = str(digits_dir), ((96, 128), (128, 96))
    names = ["zero", "one", "two", "three", "four", "five", "", "seven", "eight", "nine"]
    categories = [Category(10 * (i + 1), name) for i, name in enumerate(names)]
    params = random_params(abstract_params(build_model(config.model)))
    workdir = tmp_path_factory.mktemp("digits_run")
    with Checkpoints(workdir, config, categories=categories) as checkpoints:
        checkpoints.save(4, {"params": params})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor_module, "accepted_options", lambda *_: fast_jit.OPTIONS)
        yield workdir


@pytest.fixture(scope="session")
def predictor(digits_run):
    """The detector of `digits_run`, two images at a time."""
    return dn_detr_jax.load(digits_run, batch_size=2)
