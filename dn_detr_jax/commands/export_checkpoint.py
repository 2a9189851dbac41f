"""Writes parameters as a state dict, under the names of a PyTorch code.

    python -m dn_detr_jax export-torch runs/r50 --out r50.pth [--step latest] [--names detrex]

`r50.pth` is what `torch.save({"model": state_dict}, ...)` gives and the official code resumes from;
the suffixes `.safetensors` and `.npz` give the state dict alone. Import followed by export returns
every tensor bit by bit. `--names` gives the names of detrex, of transformers, or of the official
DAB-DETR or DETR, where these have the model; docs/weights.md tells how they differ.
"""

from collections.abc import Sequence

from absl import flags

from dn_detr_jax.commands.command_line import define_path_flag, define_step_flag, local_path

FLAGS = flags.FLAGS
ARGUMENTS = ("WORKDIR",)


def define_flags() -> None:
    """Defines the flags of this command."""
    define_path_flag("out", "File to write: .pth, .safetensors or .npz.", required=True)
    define_step_flag("latest")
    flags.DEFINE_enum(
        "names",
        "official",
        ["official", "detrex", "transformers", "dab-detr", "detr"],
        "Whose names.",
    )


def main(argv: Sequence[str]) -> None:
    """Restores, converts, and writes the file."""
    from dn_detr_jax.interop import torch_files
    from dn_detr_jax.interop.export_torch import export

    state = export(local_path(argv[1]), FLAGS.step, FLAGS.names)
    torch_files.write(FLAGS.out, state)
    print(f"Wrote {len(state)} tensors to {FLAGS.out}")
