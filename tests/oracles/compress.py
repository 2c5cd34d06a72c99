"""Compression operators on NumPy vectors."""

from __future__ import annotations

import numpy as np


def identity(x):
    return x


def nothing(x):
    return np.zeros_like(x)


def top_k(k):
    """Keeps the k largest magnitudes, ties to the lowest index."""

    def C(x):
        keep = np.argsort(-np.abs(x), kind="stable")[:k]
        y = np.zeros_like(x)
        y[keep] = x[keep]
        return y

    return C


def scaled_sign(x):
    return np.mean(np.abs(x)) * np.where(x >= 0, 1.0, -1.0)


def mask(keep):
    """A fixed coordinate mask: linear, deterministic."""

    def C(x):
        return np.where(keep, x, 0.0)

    return C


def power_of_two(x):
    """Rounds magnitudes down to a power of two: odd, contractive, not homogeneous."""
    return np.array(
        [0.0 if v == 0 else np.copysign(2.0 ** np.floor(np.log2(abs(v))), v) for v in x]
    )


def clip(tau):
    """Scales down to norm tau."""

    def C(x):
        norm = np.linalg.norm(x)
        return x if norm <= tau else tau / norm * x

    return C


def hard_threshold(lam):
    def C(x):
        return np.where(np.abs(x) >= lam, x, 0.0)

    return C


def random_k(k, rng, scaled=True):
    """Unbiased rand-k (times d/k), drawing from ``rng``."""

    def C(x):
        keep = rng.choice(len(x), k, replace=False)
        y = np.zeros_like(x)
        y[keep] = x[keep] * (len(x) / k if scaled else 1.0)
        return y

    return C


def soft_threshold(level):
    """The proximal operator of ``level * norm1``."""

    def prox(x):
        return np.sign(x) * np.maximum(np.abs(x) - level, 0.0)

    return prox
