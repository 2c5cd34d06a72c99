"""Classic error feedback in its three units, and its one-worker-memory relatives."""

from __future__ import annotations

import numpy as np

from tests.oracles import Step


def gradient_units(grads, C, x, gamma, injection=1.0, retention=1.0):
    """U1: p = g + e; c = C(p); e = p - c; x = x - gamma_t mean c.

    injection a: c = C(g + a e), the rest of e is kept. retention b: e = b (e + g - c).
    """
    e = [np.zeros_like(x) for _ in grads]
    t = 0
    while True:
        g = [grad(x) for grad in grads]
        c = [C(gi + injection * ei) for gi, ei in zip(g, e, strict=True)]
        e = [retention * (ei + gi - ci) for ei, gi, ci in zip(e, g, c, strict=True)]
        x = x - gamma(t) * np.mean(c, axis=0)
        t += 1
        yield Step(x=x, e=e, c=c, g=g)


def step_units(grads, C, x, gamma):
    """U2, Karimireddy et al. 2019, Algorithm 2: p = gamma_t g + e; x = x - mean C(p)."""
    e = [np.zeros_like(x) for _ in grads]
    t = 0
    while True:
        g = [grad(x) for grad in grads]
        p = [gamma(t) * gi + ei for gi, ei in zip(g, e, strict=True)]
        D = [C(pi) for pi in p]
        x = x - np.mean(D, axis=0)
        e = [pi - Di for pi, Di in zip(p, D, strict=True)]
        t += 1
        yield Step(x=x, e=e, c=D, g=g)


def lr_corrected(grads, C, x, gamma):
    """U3: p = g + (gamma_{t-1}/gamma_t) e; c = C(p); e = p - c; x = x - gamma_t mean c."""
    e = [np.zeros_like(x) for _ in grads]
    t = 0
    while True:
        ratio = gamma(t - 1) / gamma(t) if t else 1.0
        p = [grad(x) + ratio * ei for grad, ei in zip(grads, e, strict=True)]
        c = [C(pi) for pi in p]
        e = [pi - ci for pi, ci in zip(p, c, strict=True)]
        x = x - gamma(t) * np.mean(c, axis=0)
        t += 1
        yield Step(x=x, e=e, c=c)


def ef_momentum(grads, C, x, gamma, beta):
    """m = beta m + (1 - beta)(g + e); c = C(m); e = m - c, as the recipe is usually quoted."""
    m = [np.zeros_like(x) for _ in grads]
    e = [np.zeros_like(x) for _ in grads]
    while True:
        for i, grad in enumerate(grads):
            m[i] = beta * m[i] + (1 - beta) * (grad(x) + e[i])
        c = [C(mi) for mi in m]
        e = [mi - ci for mi, ci in zip(m, c, strict=True)]
        x = x - gamma * np.mean(c, axis=0)
        yield Step(x=x, e=e, m=m, c=c)


def damped(grads, C, x, gamma, beta):
    """r = r + g; c = C((1 - beta) r); r = r - c."""
    r = [np.zeros_like(x) for _ in grads]
    while True:
        c = []
        for i, grad in enumerate(grads):
            r[i] = r[i] + grad(x)
            c.append(C((1 - beta) * r[i]))
            r[i] = r[i] - c[i]
        x = x - gamma * np.mean(c, axis=0)
        yield Step(x=x, r=r, c=c)


def ecq_sgd(grads, C, x, gamma, alpha, beta):
    """Wu et al. 2018: q = Q(g + alpha h); h = beta h + (g - q)."""
    h = [np.zeros_like(x) for _ in grads]
    while True:
        q = []
        for i, grad in enumerate(grads):
            g = grad(x)
            q.append(C(g + alpha * h[i]))
            h[i] = beta * h[i] + (g - q[i])
        x = x - gamma * np.mean(q, axis=0)
        yield Step(x=x, h=h, q=q)


def plain(grads, C, x, gamma):
    """No memory: x = x - gamma mean C(g)."""
    while True:
        x = x - gamma * np.mean([C(grad(x)) for grad in grads], axis=0)
        yield Step(x=x)
