"""Imports a PyTorch checkpoint as a work directory.

    python -m dn_detr_jax import checkpoint.pth --config configs/coco_r50.py \\
        --out runs/official [--config.model.num_patterns=3 ...]

The work directory holds one checkpoint, of step 0, and the names of COCO's classes if there are 91.
`train.py --eval_only --workdir runs/official` evaluates it,
`train.py --config.init.checkpoint=runs/official` starts a training from it. With
`--config.init.reset_heads=True` the config may have another number of classes: the class head and
the label embedding are newly initialized.

The names in the file tell whether it is of the official code, of detrex or of transformers. Classes
and settings follow the source and are stored; docs/weights.md tells what differs.

SOURCE is a `.pth` or `.pth.tar`, a `.safetensors` or an `.npz`. Its state dict is a bare one or is
stored under keys such as `model`, `state_dict` or `ema`, which may be nested. `--entry` names
another one by a dotted path such as `ema.module`. Names of wrapping modules (`module.`,
`_orig_mod.`) are removed. PyTorch is not needed, and no code of the file is run.
`hf:OWNER/NAME` or `hf:OWNER/NAME:FILE` is a file on the Hugging Face Hub, such as
`hf:IDEA-Research/dab-detr-resnet-50`.
"""

from collections.abc import Sequence

from absl import flags

from dn_detr_jax.commands.command_line import define_config_flag, define_path_flag, local_path
from dn_detr_jax.config import validate

FLAGS = flags.FLAGS
ARGUMENTS = ("SOURCE",)


def define_flags() -> None:
    """Defines the flags of this command."""
    define_config_flag()
    define_path_flag("out", "Work directory to make.", required=True)
    flags.DEFINE_string(
        "entry", None, "Dotted path of the state dict, such as ema.module, if not the usual one."
    )


def main(argv: Sequence[str]) -> None:
    """Reads, converts, and writes the checkpoint."""
    validate(FLAGS.config)
    from dn_detr_jax.interop.hub import is_hub_name
    from dn_detr_jax.interop.import_torch import import_file

    source = argv[1] if is_hub_name(argv[1]) else local_path(argv[1])
    import_file(source, FLAGS.config, FLAGS.out, FLAGS.entry)
