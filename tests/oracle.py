"""Oracles for the tests: the formulas of the paper, one number at a time in float64."""

import math

import numpy as np

EPS = 1e-6  # guards the denominators of overlaps, as in the official code


def corners(box):
    x, y, w, h = (float(v) for v in box)
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def iou_and_giou(a, b, eps=EPS):
    """Returns IoU and GIoU of two boxes in corners."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (map(float, box) for box in (a, b))
    overlap = max(min(ax1, bx1) - max(ax0, bx0), 0) * max(min(ay1, by1) - max(ay0, by0), 0)
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - overlap
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    iou = overlap / (union + eps)
    return iou, iou - (hull - union) / (hull + eps)


def giou(a, b):
    """Returns the GIoU of two boxes given by center and size."""
    return iou_and_giou(corners(a), corners(b))[1]


def focal(logit, positive, alpha=0.25, gamma=2.0):
    """Returns -alpha_t (1 - p_t)^gamma log(p_t), with p_t the probability of the true outcome."""
    z = float(logit) if positive else -float(logit)
    log_p = -max(-z, 0.0) - math.log1p(math.exp(-abs(z)))
    log_not_p = -max(z, 0.0) - math.log1p(math.exp(-abs(z)))
    weight = 1.0 if alpha < 0 else alpha if positive else 1 - alpha
    return weight * math.exp(gamma * log_not_p) * -log_p


def random_boxes(rng, *shape):
    """Draws boxes as center and size inside the unit square: float32 [*shape, 4]."""
    size = rng.uniform(0.05, 0.5, (*shape, 2))
    center = size / 2 + rng.uniform(0, 1, (*shape, 2)) * (1 - size)
    return np.concatenate([center, size], axis=-1).astype(np.float32)
