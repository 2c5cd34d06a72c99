"""Local steps of heavy ball, then one step of the common model on the workers' drifts."""

from __future__ import annotations

import numpy as np

from tests.oracles import Step


def local_steps(grads, x, gamma, beta, period, outer):
    """Workers keep their momentum over synchronisations; ``outer(drifts)`` moves the common x."""
    y = [np.copy(x) for _ in grads]
    v = [np.zeros_like(x) for _ in grads]
    t = 0
    while True:
        for i, grad in enumerate(grads):
            v[i] = beta * v[i] + grad(y[i])
            y[i] = y[i] - gamma * v[i]
        if (t + 1) % period == 0:
            x = x + outer([x - yi for yi in y])
            y = [np.copy(x) for _ in grads]
        t += 1
        yield Step(x=x, y=y, v=v)


def nesterov(a, b):
    """DiLoCo's outer step: A = mean D_i; m = b m + A; -a (A + b m)."""
    m = 0

    def outer(drifts):
        nonlocal m
        A = np.mean(drifts, axis=0)
        m = b * m + A
        return -a * (A + b * m)

    return outer


def sparse(C, a, b, senders):
    """SparseLoCo's: e_i = b e_i + D_i; c_i = C(e_i); e_i = e_i - c_i; -a Agg(c)."""
    e = None

    def outer(drifts):
        nonlocal e
        e = [D if e is None else b * ei + D for ei, D in zip(e or drifts, drifts, strict=True)]
        c = np.array([C(ei) for ei in e])
        e = [ei - ci for ei, ci in zip(e, c, strict=True)]
        number = np.maximum(1, (c != 0).sum(axis=0)) if senders else len(c)
        return -a * c.sum(axis=0) / number

    return outer
