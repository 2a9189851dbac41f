"""Compiles the training step of a config for devices that may be absent."""

import contextlib
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dn_detr_jax.config import check_attention
from dn_detr_jax.errors import ConfigError
from dn_detr_jax.models.registry import abstract_params, build_model, trainable
from dn_detr_jax.preflight import gpus
from dn_detr_jax.sharding import make_mesh, replicated
from dn_detr_jax.training.compile_options import accepted_options
from dn_detr_jax.training.optimizer import make_optimizer
from dn_detr_jax.training.state import TrainState, abstract_state
from dn_detr_jax.training.step import abstract_batch, jit_train_step


class OutOfMemory(Exception):  # noqa: N818 (an answer, not a mistake)
    """A program does not fit into a device.

    Attributes:
      needed: bytes per device, None if the compiler did not say.
      available: bytes per device, likewise.
    """

    def __init__(self, message: str, needed: float | None, available: float | None):
        super().__init__(message)
        self.needed, self.available = needed, available


class AbstractStep(NamedTuple):
    """The training step of a config before it is compiled.

    Attributes:
      function: the jitted step of `training.step`.
      state: shapes and shardings of its train state.
    """

    function: Any
    state: TrainState

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.state.params))

    @property
    def fixed_bytes(self) -> int:
        """Bytes per device that do not depend on the batch size: the state, and a gradient."""
        return _bytes_per_device(self.state) + _bytes_per_device(self.state.params)


def _bytes_per_device(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    shapes = (leaf.sharding.shard_shape(leaf.shape) for leaf in leaves)
    sizes = (np.dtype(leaf.dtype).itemsize for leaf in leaves)
    return sum(math.prod(shape) * size for shape, size in zip(shapes, sizes, strict=True))


def abstract_step(config: ConfigDict, mesh: Mesh) -> AbstractStep:
    """Makes the training step of `train.py` for the devices of a mesh, without computing anything.

    Raises:
      ConfigError: `model.num_classes` or `data.max_objects` is left to the data, or a value does
        not fit the devices.
    """
    for section, name in (("model", "num_classes"), ("data", "max_objects")):
        if not config[section][name]:
            expected = "a number of at least 1, or --whole_run, which reads it from the data"
            raise ConfigError(f"{section}.{name}", 0, expected)
    per_device, parts = config.train.batch_size // mesh.size, config.train.accumulate_steps
    if per_device % parts:
        expected = f"a divisor of the {per_device} images per device"
        raise ConfigError("train.accumulate_steps", parts, expected)
    check_attention(config, mesh.devices.flat[0].platform)
    model = build_model(config.model, config.compile.attention)
    shapes = abstract_params(model)
    is_trained = trainable(shapes, config.model, config.train.freeze)
    # Only the schedule's constants depend on the numbers of steps.
    optimizer, _ = make_optimizer(config, shapes, 1_000, 100_000, is_trained)
    function = jit_train_step(
        model=model,
        optimizer=optimizer,
        trainable=traverse_util.unflatten_dict(is_trained, sep="/"),
        config=config,
        mesh=mesh,
    )
    return AbstractStep(function, abstract_state(model, optimizer, config, mesh))


def compile_step(config: ConfigDict, mesh: Mesh, canvas: tuple[int, int]) -> jax.stages.Compiled:
    """Compiles the training step of a config.

    Args:
      config: valid and whole, see `abstract_step`.
      mesh: of devices that may be a topology's.
      canvas: height and width.

    Raises:
      OutOfMemory: the compiler reports that the step does not fit into a device.
      ConfigError: of the config.
    """
    step, device = abstract_step(config, mesh), mesh.devices.flat[0]
    absent = gpus.is_absent_gpu(device)
    with gpus.callbacks_without_gpu() if absent else contextlib.nullcontext():
        lowered = step.function.lower(step.state, abstract_batch(config, "train", mesh, canvas))
    options = accepted_options(config, device) | (gpus.OPTIONS if absent else {})
    return compile_or_explain(lowered, options)


def count_operations(config: ConfigDict, canvas: tuple[int, int]) -> float:
    """Counts the operations of the step, of all devices together, before any compiler changes it.

    Args:
      config: valid and whole, see `abstract_step`.
      canvas: height and width.
    """
    config = config.copy_and_resolve_references()
    config.compile.attention = "xla"  # a fused attention would count as nothing
    config.mesh.data = 1
    mesh = make_mesh(1, jax.devices("cpu")[:1])
    step = abstract_step(config, mesh)
    lowered = step.function.lower(step.state, abstract_batch(config, "train", mesh, canvas))
    return (lowered.cost_analysis() or {}).get("flops", 0.0)


def compile_or_explain(
    lowered: jax.stages.Lowered, options: dict[str, Any] | None = None
) -> jax.stages.Compiled:
    """Compiles a program; raises `OutOfMemory` if the compiler reports that it does not fit."""
    try:
        return lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if re.search("No such compile option|While setting option", str(error)):
            raise ConfigError("compile.options", options, str(error).splitlines()[0]) from None
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(str(error).splitlines()[0], *parse_out_of_memory(str(error))) from None


def parse_out_of_memory(message: str) -> tuple[float | None, float | None]:
    """Reads the bytes needed and available from a message of XLA's compiler for TPUs.

    Examples:
      >>> parse_out_of_memory("total memory required (24.00G) exceeds available HBM (15.75G).")
      (25769803776.0, 16911433728.0)
      >>> parse_out_of_memory("Used 512.0M of 0.25G hbm. Exceeded hbm capacity by 256M.")
      (536870912.0, 268435456.0)
      >>> parse_out_of_memory("no numbers")
      (None, None)
    """
    size = r"([\d.]+)([KMGT]?)"
    for pattern in (
        rf"required.*?\({size}\).*?available.*?\({size}\)",
        rf"Used {size}i?B? of {size}i?B? hbm",
    ):
        if match := re.search(pattern, message, re.DOTALL):
            numbers = [match.group(1, 2), match.group(3, 4)]
            needed, available = (
                float(n) * 1024 ** " KMGT".index(unit or " ") for n, unit in numbers
            )
            return needed, available
    return None, None


def usable_memory(mesh: Mesh) -> float | None:
    """Returns the bytes of a device that a program may use; None if unknown, as for a CPU.

    For TPUs the compiler reports them when it gets a program that fits into no chip: one TiB of
    arguments, in arrays of 4 GiB (libtpu before 0.0.42 takes none of 8 GiB or more).
    """
    device = mesh.devices.flat[0]
    if gpus.is_absent_gpu(device):
        return gpus.usable_bytes(device.device_kind)
    if device.platform != "tpu" or device in jax.devices():
        statistics = device.memory_stats() if device.platform != "cpu" else None
        return (statistics or {}).get("bytes_limit")
    part = jax.ShapeDtypeStruct((2**15, 2**15), jnp.float32, sharding=replicated(mesh))
    huge = [part] * 256
    try:
        compile_or_explain(jax.jit(lambda xs: [x + 1 for x in xs]).lower(huge))
    except OutOfMemory as error:
        return error.available
    return None
