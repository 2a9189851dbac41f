"""A detector small enough to compile in seconds, with its compiled functions, shared by tests."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from data import tiny as tiny_config
from data.tiny import CANVAS, GROUPS
from fast_jit import fast_jit
from flax import traverse_util

from dn_detr_jax import denoising
from dn_detr_jax.models.images import normalize_images
from dn_detr_jax.models.registry import abstract_params, build_model
from dn_detr_jax.sharding import make_mesh
from dn_detr_jax.training.step import compute_losses, criterion


def random_params(shapes, seed=0):
    """Draws parameters without the zeros and neutral values of an initialization."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        name = path[-1]
        if name in ("kernel", "label_embedding", "patterns", "anchors"):
            return rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape)
        if name in ("scale", "var", "slope"):
            return rng.uniform(0.5, 1.5, shape)
        return rng.normal(0, 0.3, shape)  # biases and means

    flat = traverse_util.flatten_dict(shapes)
    drawn = {path: draw(path, leaf.shape).astype(np.float32) for path, leaf in flat.items()}
    return traverse_util.unflatten_dict(drawn)


def image_batch(objects=4):
    """Returns three images of several sizes, with 4, 2 and 0 objects in `objects` slots."""
    rng = np.random.default_rng(1)
    labels = np.full((3, objects), 0, np.int32)
    boxes = np.zeros((3, objects, 4), np.float32)
    labels[:, :4], boxes[:, :4] = rng.integers(0, 5, (3, 4)), oracle.random_boxes(rng, 3, 4)
    return {
        "image": rng.integers(0, 256, (3, CANVAS, CANVAS, 3)).astype(np.uint8),
        "size": np.int32([[64, 64], [50, 41], [33, 64]]),
        "labels": labels,
        "boxes": boxes,
        "valid": np.arange(objects) < np.array([4, 2, 0])[:, None],
        "image_id": np.arange(3, dtype=np.int32),
    }


def object_noise(objects=4, seed=2):
    """Draws noise of `GROUPS` groups, independent of the number of slots."""
    rng = np.random.default_rng(seed)

    def slots(draws):  # [B, G, many, ...] -> [B, G * M, ...]
        return np.ascontiguousarray(draws[:, :, :objects]).reshape(3, -1, *draws.shape[3:])

    return denoising.Noise(
        label_u=slots(rng.random((3, GROUPS, 10), np.float32)),
        label_new=slots(rng.integers(0, 5, (3, GROUPS, 10)).astype(np.int32)),
        box_u=slots(rng.random((3, GROUPS, 10, 4), np.float32)),
    )


def denoising_queries(batch, noise):
    """Returns the denoising queries of a batch, with the published noise."""
    targets = batch["labels"], batch["boxes"], batch["valid"]
    return denoising.prepare(*targets, noise, groups=GROUPS, label_noise=0.2, box_noise=0.4)


class Result(NamedTuple):
    """Outputs of denoising and of matching queries by name, and the loss."""

    dn: dict
    match: dict
    total: jax.Array
    terms: dict


class TinyDetector:
    """The model, random parameters, and functions that compile once for each shape."""

    def __init__(self):
        self.config = tiny_config.shared()
        self.model = build_model(self.config.model)
        self.mesh = make_mesh(1)
        self.shapes = abstract_params(self.model)
        self.params = random_params(self.shapes)
        self.detect = fast_jit(self._detect)
        self.train = fast_jit(self._train, static_argnames="attend_padding")
        self.loss_and_gradient = fast_jit(jax.value_and_grad(self._loss, has_aux=True))

    def _detect(self, params, image, size):
        """Runs without denoising queries."""
        return self.model.apply({"params": params}, normalize_images(image, size), size)

    def _train(self, params, batch, noise, attend_padding=False):
        """Runs with denoising queries and the loss."""
        dn = denoising_queries(batch, noise)
        images = normalize_images(batch["image"], batch["size"])
        outputs = self.model.apply(
            {"params": params}, images, batch["size"], dn, attend_padding=attend_padding
        )
        total, terms, _ = criterion(outputs, dn, batch, config=self.config, mesh=self.mesh)
        parts = {name: denoising.split(x, dn) for name, x in outputs.items()}
        return Result(*({name: p[i] for name, p in parts.items()} for i in (0, 1)), total, terms)

    def _loss(self, params, batch, noise):
        key = jax.random.key(0)
        config = {"config": self.config, "mesh": self.mesh, "model": self.model}
        return compute_losses(params, batch, key, noise=noise, **config)


def by_group(outputs):
    """Reshapes denoising outputs [L, B, G * M, K] to [L, B, G, M, K]."""
    return {k: jnp.reshape(v, (*v.shape[:2], GROUPS, -1, v.shape[-1])) for k, v in outputs.items()}
