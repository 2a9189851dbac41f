"""Augmentations to start from, as values of `config.data.augment`.

The values are starting points. No AP was measured with them.
"""

from typing import Any

from dn_detr_jax.errors import ConfigError

_PRESETS: dict[str, dict[str, Any]] = {
    # Small data sets, or a fine-tuning of few epochs: the geometry stays the paper's.
    "conservative": {"brightness": 0.1, "contrast": 0.15, "saturation": 0.15, "hue": 0.01},
    # Long trainings from few images.
    "aggressive": {
        "brightness": 0.3,
        "contrast": 0.4,
        "saturation": 0.5,
        "hue": 0.05,
        "scale": (0.5, 1.5),
        "zoom_out": 0.25,
        "iou_crop": 0.25,
        "mosaic": 0.25,
        "stop_at": "90%",
    },
    # Images from above: no direction is up. With the flip of 0.5, all eight orientations are
    # equally frequent.
    "aerial": {
        "flip": 0.5,
        "rotate": 0.75,
        "brightness": 0.2,
        "contrast": 0.2,
        "saturation": 0.2,
        "hue": 0.015,
        "scale": (0.5, 1.5),
        "stop_at": "90%",
    },
}


def augment_preset(name: str) -> dict[str, Any]:
    """Returns the values of a preset, for `config.data.augment.update`.

    Args:
      name: "conservative", "aggressive" or "aerial"; empty for the published augmentation.

    Raises:
      ConfigError: no such preset.

    Examples:
      >>> augment_preset("conservative")["hue"]
      0.01
    """
    if not name:
        return {}
    if name not in _PRESETS:
        raise ConfigError("data.augment", name, f"one of the presets {', '.join(_PRESETS)}")
    return dict(_PRESETS[name])
