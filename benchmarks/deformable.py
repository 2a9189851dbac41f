"""Compares deformable sampling with PyTorch's `grid_sample`, or prints the compiler's plan for it.

    python -m benchmarks.deformable --canvas 400x672 --part encoder
    python -m benchmarks.deformable --canvas 800x1344 --part decoder
    python -m benchmarks.deformable --canvas 800x1344 --batch_size 2 --plan gpu

The first two measure CPU seconds of `sample_levels` and of the formulation in PyTorch that the
official code has for CPUs: one `grid_sample` for each level, then a weighted sum. Both are in one
process and take turns. "Against PyTorch" is the ratio of their seconds in a round, and "difference"
is the largest one of a result or gradient, relative to the largest number of that array. PyTorch
may be missing, and has no such function for bfloat16 values with float32 locations; its columns are
left out then. Its threads sleep while they wait (OMP_WAIT_POLICY=passive, unless it is set): those
that spin take CPU seconds from whatever runs next.

With `--plan` nothing runs: the program is compiled for an H100 (`pip install "jax[cuda13]"`) or a
chip of TPU v5e (`pip install "jax[tpu]"`), and the table has the memory that the compiler plans.

The sizes are the config's. An encoder has a query for each token, near its place; a decoder has
the matching and denoising queries at random places. Points lie around them, two pixels away.
"""

import functools
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from benchmarks import common, gpu_plan
from dn_detr_jax.commands.command_line import run_main
from dn_detr_jax.config import validate
from dn_detr_jax.models.deformable import sample_levels
from dn_detr_jax.models.deformable_rows import Shapes
from dn_detr_jax.preflight import gpus
from dn_detr_jax.preflight.topologies import topology_devices

FLAGS = flags.FLAGS
PARTS = "encoder", "decoder"
PLANS = "gpu", "tpu"
MIB = 2**20


def level_shapes(config: ConfigDict) -> Shapes:
    """Returns (height, width) of each feature level of the config's first canvas."""
    first = 6 - config.model.backbone_levels  # the backbone's last level has stride 32 = 2^5
    strides = [2 ** (first + i) for i in range(config.model.backbone_levels)]
    strides += [2 ** (6 + i) for i in range(config.model.extra_levels)]
    height, width = config.data.canvases[0]
    return tuple((math.ceil(height / stride), math.ceil(width / stride)) for stride in strides)


def make_arguments(config: ConfigDict, part: str, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Returns value, locations, weights and the cotangent of the sums, in float32.

    Args:
      config: whole configuration.
      part: of `PARTS`.
      seed: of the noise.
    """
    rng, shapes, model = np.random.default_rng(seed), level_shapes(config), config.model
    batch, heads = config.train.batch_size, model.num_heads
    if part == "encoder":
        points = model.encoder_points
        references = np.concatenate([_pixel_centers(*shape) for shape in shapes])
    else:
        points = model.decoder_points
        references = rng.uniform(0.1, 0.9, (model.num_queries + config.dn.slots, 2))
    size = np.array(shapes)[:, None, ::-1]  # [levels, 1, 2]
    each = batch, len(references), heads, len(shapes), points
    locations = references[:, None, None, None] + rng.normal(0, 2, (*each, 2)) / size
    weights = rng.dirichlet(np.ones(len(shapes) * points), each[:3]).reshape(each)
    tokens = sum(height * width for height, width in shapes)
    value = rng.normal(size=(batch, tokens, heads, model.hidden_dim // heads))
    cotangent = rng.normal(size=(*each[:2], model.hidden_dim))
    return tuple(x.astype(np.float32) for x in (value, locations, weights, cotangent))


def _pixel_centers(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width].reshape(2, -1)
    return np.stack([(x + 0.5) / width, (y + 0.5) / height], -1)


def forward(shapes: Shapes, value: Any, locations: Any, weights: Any, cotangent: Any) -> tuple:
    """Returns the sums alone."""
    del cotangent
    return (sample_levels(value, shapes, locations, weights),)


def both(shapes: Shapes, value: Any, locations: Any, weights: Any, cotangent: Any) -> tuple:
    """Returns the sums and the gradients of value, locations and weights."""

    def sums(value, locations, weights):
        return sample_levels(value, shapes, locations, weights)

    out, pull = jax.vjp(sums, value, locations, weights)
    return out, *pull(cotangent)


PASSES = {"forward": forward, "forward and backward": both}


def torch_passes(shapes: Shapes, arguments: Sequence[np.ndarray]) -> dict[str, Callable[[], list]]:
    """Returns the functions of `PASSES` in PyTorch, with the arguments in them."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when PyTorch is loaded
    import torch

    *inputs, cotangent = (torch.from_numpy(x) for x in arguments)

    def sums(value, locations, weights):
        batch, _, heads, features = value.shape
        queries, sizes = locations.shape[1], [height * width for height, width in shapes]
        samples = []
        for k, tokens in enumerate(value.split(sizes, dim=1)):
            maps = tokens.flatten(2).transpose(1, 2).reshape(-1, features, *shapes[k])
            grid = 2 * locations[:, :, :, k].transpose(1, 2).flatten(0, 1) - 1
            read = torch.nn.functional.grid_sample(maps, grid, align_corners=False)
            samples.append(read)  # [batch * heads, features, queries, points]
        shares = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
        summed = (torch.stack(samples, -2).flatten(-2) * shares).sum(-1)
        return summed.view(batch, heads * features, queries).transpose(1, 2).contiguous()

    def forward():
        with torch.no_grad():
            return [sums(*inputs)]

    def both():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = sums(*leaves)
        out.backward(cotangent)
        return [out.detach(), *(x.grad for x in leaves)]

    return {"forward": forward, "forward and backward": both}


def compare(config: ConfigDict, part: str, rounds: int, steps: int) -> Iterator[dict[str, Any]]:
    """Yields the figures of each pass, without PyTorch's if it can't run.

    Args:
      config: whole configuration.
      part: of `PARTS`.
      rounds: timed rounds, after an untimed one.
      steps: calls of a round.
    """
    shapes, arguments, dtype = (
        level_shapes(config),
        make_arguments(config, part),
        config.model.dtype,
    )
    value, locations, weights, cotangent = (jnp.asarray(x) for x in arguments)
    ours = value.astype(dtype), locations, weights, cotangent.astype(dtype)
    peer = {}
    if dtype == "float32" and importlib.util.find_spec("torch") is not None:
        peer = torch_passes(shapes, arguments)
    for name, function in PASSES.items():
        program = jax.jit(functools.partial(function, shapes)).lower(*ours).compile()
        calls = {"cpu_s": functools.partial(_wait, program, ours)}
        if peer:
            calls["torch_cpu_s"] = peer[name]
        results = [call() for call in calls.values()]
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for clock, call in calls.items():
                seconds[clock].append(_cpu_seconds(call, steps))
        row = {"pass": name, "temporaries_mib": _temporaries(program)}
        row |= {clock: common.summary(values) for clock, values in seconds.items()}
        if peer:
            ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
            row |= {"against PyTorch": common.summary(ratios), "difference": _difference(*results)}
        yield row


def _wait(program: jax.stages.Compiled, arguments: Sequence[Any]) -> Any:
    return jax.block_until_ready(program(*arguments))


def _cpu_seconds(call: Callable[[], Any], steps: int) -> float:
    """Returns the CPU seconds of a call, over all threads of this process."""
    start = time.process_time()
    for _ in range(steps):
        call()
    return (time.process_time() - start) / steps


def _difference(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(ours, theirs, strict=True)]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def _temporaries(program: jax.stages.Compiled) -> float:
    return round(program.memory_analysis().temp_size_in_bytes / MIB, 1)


def plan(config: ConfigDict, part: str, target: str) -> Iterator[dict[str, Any]]:
    """Yields the compiler's plan of each pass.

    Args:
      config: whole configuration.
      part: of `PARTS`.
      target: of `PLANS`.

    Raises:
      PreflightError: jax is installed without the compiler for the target.
    """
    on_gpu = target == "gpu"
    device = (gpus.gpu_devices("h100", 1) if on_gpu else topology_devices("v5e:2x2"))[0]
    dtypes = config.model.dtype, "float32", "float32", config.model.dtype
    arguments = [
        jax.ShapeDtypeStruct(x.shape, dtype, sharding=SingleDeviceSharding(device))
        for x, dtype in zip(make_arguments(config, part), dtypes, strict=True)
    ]
    options: Any = gpus.OPTIONS if on_gpu else None
    for name, function in PASSES.items():
        start = time.monotonic()
        lowered = jax.jit(functools.partial(function, level_shapes(config))).lower(*arguments)
        program = lowered.compile(options)
        row = {"chip": device.device_kind, "pass": name, "temporaries_mib": _temporaries(program)}
        if on_gpu:
            row["kernels"] = gpu_plan.count_kernels(program.as_text())
        yield row | {"compile_s": round(time.monotonic() - start, 1)}


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    validate(FLAGS.config)
    jax.config.update("jax_platforms", "cpu")
    if not FLAGS.plan and importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed: its columns are left out", file=sys.stderr)
    report = common.Report("deformable")
    for setting in common.settings_of_flags(FLAGS.config):
        common.apply_setting(FLAGS.config, setting)
        for part in FLAGS.part:
            if FLAGS.plan:
                rows = plan(FLAGS.config, part, FLAGS.plan)
            else:
                rows = compare(FLAGS.config, part, FLAGS.rounds, FLAGS.steps)
            for row in rows:
                report.add(setting.columns() | {"part": part} | row)
    report.show()


if __name__ == "__main__":
    common.define_flags(batch_size=["1"], config="coco_deformable_r50_50ep")
    flags.DEFINE_multi_enum("part", PARTS, PARTS, "Several by repeating the flag.")
    flags.DEFINE_enum("plan", None, PLANS, "Compile for an H100 or a TPU v5e, and run nothing.")
    run_main(main)
