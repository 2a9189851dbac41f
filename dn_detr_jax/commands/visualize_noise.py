"""Draws the noised boxes and labels of a training image.

    python -m dn_detr_jax visualize-noise noise --config digits --config.dn.box_noise=0.8

FOLDER gets `noised_boxes.png`, with a panel for each denoising group, and `attention_mask.png`. The
image is the typical one of the first training batch, as in `pictures/` of a training's work
directory. It needs the training data and no model; --config.seed draws other noise.
"""

from collections.abc import Sequence

from absl import flags

from dn_detr_jax.commands.command_line import define_config_flag, local_path

FLAGS = flags.FLAGS
ARGUMENTS = ("FOLDER",)


def define_flags() -> None:
    """Defines the flags of this command."""
    define_config_flag()


def main(argv: Sequence[str]) -> None:
    """Draws the figures."""
    from dn_detr_jax.config import validate
    from dn_detr_jax.errors import ConfigError
    from dn_detr_jax.evaluation.figures import save
    from dn_detr_jax.training.report import denoising_figures

    config = FLAGS.config
    validate(config)
    if not config.dn.groups:
        raise ConfigError("dn.groups", 0, "at least 1: there is no noise to draw")
    save(denoising_figures(config), local_path(argv[1]))
