"""EF21 and its extensions."""

from __future__ import annotations

import numpy as np

from tests.oracles import Step


def _start(grads, C, x, init):
    if init == "compressed":
        return [C(grad(x)) for grad in grads]
    if init == "full":
        return [grad(x) for grad in grads]
    return [np.zeros_like(x) for _ in grads]


def ef21(grads, C, x, gamma, init="compressed"):
    """Richtarik, Sokolov, Fatkhullin 2021."""
    g_i = _start(grads, C, x, init)
    g = np.mean(g_i, axis=0)
    while True:
        x = x - gamma * g
        yield Step(x=x, g_i=g_i, g=g)
        c_i = [C(grad(x) - gi) for grad, gi in zip(grads, g_i, strict=True)]
        g_i = [gi + ci for gi, ci in zip(g_i, c_i, strict=True)]
        g = g + np.mean(c_i, axis=0)


def ef21_plus(grads, C, x, gamma, init="full"):
    """For each worker C(grad) or g_i + C(grad - g_i), whichever is nearer; ties to the latter."""
    g_i = _start(grads, C, x, init)
    while True:
        x = x - gamma * np.mean(g_i, axis=0)
        yield Step(x=x, g_i=g_i)
        for i, grad in enumerate(grads):
            new = grad(x)
            b = C(new)
            m = g_i[i] + C(new - g_i[i])
            g_i[i] = m if np.linalg.norm(m - new) <= np.linalg.norm(b - new) else b


def heavy_ball(grads, C, x, gamma, eta):
    """EF21-HB: v = eta v + g, v^0 = g^0."""
    g_i = [C(grad(x)) for grad in grads]
    v = np.mean(g_i, axis=0)
    while True:
        x = x - gamma * v
        yield Step(x=x, g_i=g_i, v=v)
        g_i = [gi + C(grad(x) - gi) for grad, gi in zip(grads, g_i, strict=True)]
        v = eta * v + np.mean(g_i, axis=0)


def bidirectional(grads, C_w, C_M, x, gamma):
    """EF21-BC: the server compresses the difference to what the workers know."""
    gw = [C_w(grad(x)) for grad in grads]
    g = C_M(np.mean(gw, axis=0))
    while True:
        x = x - gamma * g
        yield Step(x=x, gw=gw, g=g)
        gw = [gi + C_w(grad(x) - gi) for grad, gi in zip(grads, gw, strict=True)]
        b = C_M(np.mean(gw, axis=0) - g)
        g = g + b


def partial_participation(grads, C, x, gamma, takes_part):
    """EF21-PP: takes_part(t) gives one flag per worker; the mean stays over all g_i.

    Round 0 makes g_i^0; workers absent there start from zero.
    """
    g_i = [np.zeros_like(x) for _ in grads]
    t = 0
    while True:
        present = takes_part(t)
        for i, grad in enumerate(grads):
            if present[i]:
                g_i[i] = g_i[i] + C(grad(x) - g_i[i])
        x = x - gamma * np.mean(g_i, axis=0)
        t += 1
        yield Step(x=x, g_i=g_i)


def page(grads, parts, C, x, gamma, exact):
    """EF21-PAGE: exact(t) is the shared coin; parts[i](x, t) the minibatch gradient of round t."""
    v = [grad(x) for grad in grads]
    g_i = [np.copy(vi) for vi in v]
    t = 0
    while True:
        previous, x = x, x - gamma * np.mean(g_i, axis=0)
        yield Step(x=x, g_i=g_i, v=v)
        t += 1
        for i in range(len(grads)):
            if exact(t):
                v[i] = grads[i](x)
            else:
                v[i] = v[i] + parts[i](x, t) - parts[i](previous, t)
            g_i[i] = g_i[i] + C(v[i] - g_i[i])


def proximal(grads, C, prox, x, gamma):
    """EF21-Prox: x = prox(x - gamma g)."""
    g_i = [C(grad(x)) for grad in grads]
    while True:
        x = prox(x - gamma * np.mean(g_i, axis=0))
        yield Step(x=x, g_i=g_i)
        g_i = [gi + C(grad(x) - gi) for grad, gi in zip(grads, g_i, strict=True)]


def momentum(grads, C, x, gamma, fresh_weight, start="compressed"):
    """EF21-SGDM: v = (1 - eta) v + eta g; c = C(v - g_i). v^0 is the first gradient."""
    v = [grad(x) for grad in grads]
    g_i = [C(vi) for vi in v] if start == "compressed" else [np.copy(vi) for vi in v]
    while True:
        x = x - gamma * np.mean(g_i, axis=0)
        yield Step(x=x, g_i=g_i, v=v)
        for i, grad in enumerate(grads):
            v[i] = (1 - fresh_weight) * v[i] + fresh_weight * grad(x)
            g_i[i] = g_i[i] + C(v[i] - g_i[i])


def double_momentum(grads, C, x, gamma, fresh_weight):
    """EF21-SGD2M: u = (1 - eta) u + eta v; c = C(u - g_i)."""
    v = [grad(x) for grad in grads]
    u = [np.copy(vi) for vi in v]
    g_i = [C(ui) for ui in u]
    while True:
        x = x - gamma * np.mean(g_i, axis=0)
        yield Step(x=x, g_i=g_i, v=v, u=u)
        for i, grad in enumerate(grads):
            v[i] = (1 - fresh_weight) * v[i] + fresh_weight * grad(x)
            u[i] = (1 - fresh_weight) * u[i] + fresh_weight * v[i]
            g_i[i] = g_i[i] + C(u[i] - g_i[i])


def weighted(grads, C, x, gamma, w):
    """EF21-W: worker i tracks grad f_i/(n w_i); g = sum_i w_i g_i."""
    n = len(grads)
    g_i = [C(grad(x) / (n * wi)) for grad, wi in zip(grads, w, strict=True)]
    g = sum(wi * gi for wi, gi in zip(w, g_i, strict=True))
    while True:
        x = x - gamma * g
        yield Step(x=x, g_i=g_i, g=g)
        u = [C(gr(x) / (n * wi) - gi) for gr, wi, gi in zip(grads, w, g_i, strict=True)]
        g_i = [gi + ui for gi, ui in zip(g_i, u, strict=True)]
        g = g + sum(wi * ui for wi, ui in zip(w, u, strict=True))


def clip21(grads, clip, x, gamma):
    """Khirirat et al. 2023: g_i = g_i + clip(grad - g_i), from zero."""
    g_i = [np.zeros_like(x) for _ in grads]
    while True:
        g_i = [gi + clip(grad(x) - gi) for grad, gi in zip(grads, g_i, strict=True)]
        x = x - gamma * np.mean(g_i, axis=0)
        yield Step(x=x, g_i=g_i)


def normalised(grads, C, x, gamma, fresh_weight):
    """EF21-SGDM's estimates; x = x - gamma_t g/||g||, fresh weight eta_t (functions of t)."""
    v = [grad(x) for grad in grads]
    g_i = [C(vi) for vi in v]
    t = 0
    while True:
        g = np.mean(g_i, axis=0)
        x = x - gamma(t) * g / np.linalg.norm(g)
        t += 1
        yield Step(x=x, g_i=g_i, v=v)
        for i, grad in enumerate(grads):
            v[i] = (1 - fresh_weight(t)) * v[i] + fresh_weight(t) * grad(x)
            g_i[i] = g_i[i] + C(v[i] - g_i[i])
