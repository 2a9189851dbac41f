"""Finds and loads the config file of an experiment, by path or by name.

The experiments of this project are in `configs/` of a clone; an installed package has the same
files in `dn_detr_jax/configs/`.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from dn_detr_jax.errors import ConfigFileError

_PACKAGE = Path(__file__).absolute().parent.parent


def configs_folder() -> Path:
    """Returns the folder of this project's experiments."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def experiment_names() -> list[str]:
    """Returns the names of this project's experiments."""
    return sorted(path.stem for path in configs_folder().glob("*.py") if path.stem[0] != "_")


def find_config(name_or_path: str) -> Path:
    """Finds the file of an experiment.

    Args:
      name_or_path: a path, or the name of one of this project's experiments; a path that exists
        comes first.

    Raises:
      ConfigFileError: there is neither; the message names the experiments.

    Examples:
      >>> find_config("coco_r50").name
      'coco_r50.py'
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if name_or_path in experiment_names():
        return configs_folder() / f"{name_or_path}.py"
    known = ", ".join(experiment_names())
    raise ConfigFileError(
        f"--config={name_or_path}: there is no such file, and no experiment of that name; "
        f"experiments: {known}"
    )


def load_config(name_or_path: str) -> ConfigDict:
    """Loads the config of an experiment, for example as the base of another one.

    Args:
      name_or_path: as for `find_config`.

    Examples:
      >>> load_config("coco_r50_12ep").train.duration
      '12 epochs'
    """
    path = find_config(name_or_path)
    spec = importlib.util.spec_from_file_location(f"dn_detr_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigFileError(f"--config={name_or_path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
