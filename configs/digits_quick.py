"""DN-Deformable-DETR on scenes of handwritten digits: learns from scratch in minutes on a CPU.

    python train.py --config configs/digits_quick.py --workdir runs/digits

This is what `make train` trains. It is `digits_deformable.py` with one encoder layer in place of
two, for 1,350 steps: a fourth of the time of a step less. `docs/digits.md` has AP and duration.

To vary: `--config.dn.groups=0` (DAB-Deformable-DETR), `--config.train.duration="4 epochs"`.
"""

from dn_detr_jax.config import load_config


def get_config():
    """Returns `digits_deformable` with a smaller encoder and a shorter schedule."""
    config = load_config("digits_deformable")
    config.model.encoder_layers = 1
    config.train.duration = "1.8 epochs"
    return config
