"""Gradient estimators and query points; grads[i](x, t) is the minibatch gradient of round t."""

from __future__ import annotations

import numpy as np

from tests.oracles import Step


def storm(grads, C, x, gamma, eta):
    """EF21 on v = (1 - eta)(v + grad(x; xi) - grad(x_last; xi)) + eta grad(x; xi)."""
    v = [grad(x, 0) for grad in grads]
    g_i = [C(vi) for vi in v]
    t = 0
    while True:
        last, x = x, x - gamma * np.mean(g_i, axis=0)
        yield Step(x=x, v=v, g_i=g_i)
        t += 1
        for i, grad in enumerate(grads):
            moved = v[i] + grad(x, t) - grad(last, t)
            v[i] = (1 - eta) * moved + eta * grad(x, t)
            g_i[i] = g_i[i] + C(v[i] - g_i[i])


def hessian_momentum(grads, hessians, C, x, gamma, eta):
    """EF21 on v = (1 - eta)(v + H (x - x_last)) + eta grad(x; xi)."""
    v = [grad(x, 0) for grad in grads]
    g_i = [C(vi) for vi in v]
    t = 0
    while True:
        last, x = x, x - gamma * np.mean(g_i, axis=0)
        yield Step(x=x, v=v, g_i=g_i)
        t += 1
        for i, grad in enumerate(grads):
            v[i] = (1 - eta) * (v[i] + hessians[i] @ (x - last)) + eta * grad(x, t)
            g_i[i] = g_i[i] + C(v[i] - g_i[i])


def igt(grads, C, x, gamma, eta):
    """EF21 on v = (1 - eta) v + eta grad(x + ((1 - eta)/eta)(x - x_last); xi)."""
    v = [grad(x, 0) for grad in grads]
    g_i = [C(vi) for vi in v]
    t = 0
    while True:
        last, x = x, x - gamma * np.mean(g_i, axis=0)
        yield Step(x=x, v=v, g_i=g_i)
        t += 1
        for i, grad in enumerate(grads):
            v[i] = (1 - eta) * v[i] + eta * grad(x + (1 - eta) / eta * (x - last), t)
            g_i[i] = g_i[i] + C(v[i] - g_i[i])
