"""Writes training images as the model gets them, with their boxes.

    python -m dn_detr_jax preview --config configs/finetune.py:aerial --config.data.dir=DIR \\
        --out seen

`seen` then holds an image for each of the first `--images` training images: resized, cropped and
changed in color by the augmentation of the config, on its canvas, whose rest is black. The images
are those of a training with the same config, from the step `--step` on. Files are named by step,
row of the batch and image id; files of the same names are replaced.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dn_detr_jax.commands.command_line import define_config_flag, define_path_flag, log_to_terminal
from dn_detr_jax.config import validate
from dn_detr_jax.training import stop

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    define_config_flag()
    define_path_flag("out", "Folder for the images.", required=True)
    flags.DEFINE_integer("images", 16, "How many.", lower_bound=1)
    flags.DEFINE_integer("step", 0, "Step of the training to begin with.", lower_bound=0)


def main(argv: Sequence[str]) -> None:
    """Writes the images."""
    del argv
    stop.end_on_signals("not all images were written", stop.INTERRUPTED)
    validate(FLAGS.config)
    log_to_terminal()
    from dn_detr_jax.data.datasets import open_dataset
    from dn_detr_jax.training.preview import write_preview
    from dn_detr_jax.training.setup import resolve

    training = open_dataset(FLAGS.config.data, "train")
    config = resolve(FLAGS.config, training)
    write_preview(training, config, Path(FLAGS.out), FLAGS.images, FLAGS.step)
    print(f"{FLAGS.out}: {FLAGS.images} images")
