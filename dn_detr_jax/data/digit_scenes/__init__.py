"""Scenes of handwritten digits, as a TensorFlow Datasets builder that needs no TensorFlow."""

from dn_detr_jax.data.digit_scenes.builder import DigitScenes, DigitScenesConfig

__all__ = ["DigitScenes", "DigitScenesConfig"]
