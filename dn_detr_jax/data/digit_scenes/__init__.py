"""Scenes of handwritten digits, as a TensorFlow Datasets builder that needs no TensorFlow."""

from dn_detr_jax.data.digit_scenes.builder import DigitScenes, DigitScenesConfig
from dn_detr_jax.data.digit_scenes.preparation import prepare

__all__ = ["DigitScenes", "DigitScenesConfig", "prepare"]
