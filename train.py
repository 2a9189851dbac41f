"""Trains or evaluates a detector.

    python train.py --config configs/digits.py --workdir runs/digits
    python train.py --config configs/digits.py --workdir runs/digits --eval_only

`python train.py --help` lists the flags and says how several processes start.
"""

from dn_detr_jax.commands import train
from dn_detr_jax.commands.command_line import run_command

if __name__ == "__main__":
    run_command(train, "python train.py")
