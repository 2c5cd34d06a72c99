"""Gossip between workers in matrix form: rows are workers, W has the mixing weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Gossip(NamedTuple):
    x: np.ndarray  # (n, d), every worker's model
    v: np.ndarray  # (n, d), what every worker follows


def gradients(grads, X):
    return np.stack([g(x) for g, x in zip(grads, X, strict=True)])


def choco_sgd(grads, C, x, gamma, beta, mixing, W) -> Iterator[Gossip]:
    """CHOCO-SGD with heavy ball inside: X - gamma M, then X + mixing (W - I) Xh."""
    X = np.tile(x, (len(grads), 1))
    Xh, M = np.tile(x, (len(grads), 1)), np.zeros_like(X)
    while True:
        M = beta * M + gradients(grads, X)
        X = X - gamma * M
        Xh = Xh + np.stack([C(row) for row in X - Xh])
        X = X + mixing * (W @ Xh - Xh)
        yield Gossip(X, M)


def beer(grads, C, x, gamma, mixing, W) -> Iterator[Gossip]:
    """BEER in the order of its code: V, G, X, H."""
    X = np.tile(x, (len(grads), 1))
    H, before = np.tile(x, (len(grads), 1)), np.zeros_like(X)
    V, G = np.zeros_like(X), np.zeros_like(X)
    while True:
        now = gradients(grads, X)
        V = V + mixing * (W @ G - G) + now - before
        G = G + np.stack([C(row) for row in V - G])
        X = X + mixing * (W @ H - H) - gamma * V
        H = H + np.stack([C(row) for row in X - H])
        before = now
        yield Gossip(X, V)


def gradient_tracking(grads, x, gamma, W) -> Iterator[Gossip]:
    """DSGT: X = W X - gamma V; V = W V + new gradients - old gradients."""
    X = np.tile(x, (len(grads), 1))
    now = gradients(grads, X)
    V = now
    while True:
        X = W @ X - gamma * V
        yield Gossip(X, V)
        before, now = now, gradients(grads, X)
        V = W @ V + now - before
