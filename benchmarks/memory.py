"""Counts the bytes that a training step keeps for its backward pass, by rematerialization.

    python -m benchmarks.memory --canvas 800x1344 --batch_size 2 --dtype bfloat16

The table has a row for each choice of `model.remat` and each layout of the denoising queries: the
bytes that are kept for the backward pass on one device, parameters included. The loss is traced and
neither compiled nor run, so the figures hold for every device. A compiler may keep a little less
because of fusion, and needs temporaries besides.
"""

import copy
import math
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import ConfigDict

from benchmarks import common
from dn_detr_jax.commands.command_line import run_main
from dn_detr_jax.config import (
    validate,
)
from dn_detr_jax.models.registry import abstract_params, build_model
from dn_detr_jax.sharding import make_mesh
from dn_detr_jax.training.step import abstract_batch, compute_losses

FLAGS = flags.FLAGS
PARTS = "backbone", "encoder", "decoder"


def kept_bytes(config: ConfigDict) -> int:
    """Returns the bytes that the forward pass keeps for the backward pass on one device."""
    model, mesh = build_model(config.model), make_mesh(1)

    def backward(params, batch):
        def loss(params):
            key = jax.random.key(0)
            return compute_losses(params, batch, key, model=model, config=config, mesh=mesh)[0]

        return jax.vjp(loss, params)[1]

    batch = abstract_batch(config, "train", mesh)
    arrays = jax.tree.leaves(jax.eval_shape(backward, abstract_params(model), batch))
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    validate(FLAGS.config)
    report = common.Report("memory")
    for setting in common.settings_of_flags(FLAGS.config):
        for layout in ("paper", "packed"):
            for remat in ((), ("attention",), *((part,) for part in PARTS), PARTS):
                config = copy.deepcopy(FLAGS.config)
                common.apply_setting(config, setting)
                config.dn.layout, config.model.remat = layout, remat
                row = {"layout": layout, "remat": ", ".join(remat) or "nothing"}
                kept = round(kept_bytes(config) / 1e9, 3)
                report.add(setting.columns() | row | {"kept_gb": kept})
    report.show()


if __name__ == "__main__":
    common.define_flags(batch_size=["2"], dtype=["bfloat16"])
    run_main(main)
