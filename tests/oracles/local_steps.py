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


def streaming(grads, x, gamma, beta, period, parts, outers, delay, mixing):
    """Streaming DiLoCo: ``parts`` are slices of x, ``outers`` their outer steps."""
    y = [np.copy(x) for _ in grads]
    v = [np.zeros_like(x) for _ in grads]
    P, t, on_its_way = len(parts), 0, []
    while True:
        t += 1
        for i, grad in enumerate(grads):
            v[i] = beta * v[i] + grad(y[i])
            y[i] = y[i] - gamma * v[i]
        for p, part in enumerate(parts):
            if t % period == period * (p + 1) // P % period:
                on_its_way.append((t + delay, part, outers[p]([(x - yi)[part] for yi in y])))
        for when, part, step in on_its_way:
            if when == t:
                x = np.copy(x)
                x[part] += step
                for i in range(len(y)):
                    y[i] = np.copy(y[i])
                    y[i][part] = mixing * y[i][part] + (1 - mixing) * x[part]
        yield Step(x=x, y=y, v=v)


def rounded_mean(C, a, mu, b):
    """MuLoCo's: e_i = b e_i + D_i; c_i = C(e_i); A = C(mean c_i); Nesterov's momentum on A."""
    e, m = None, 0

    def outer(drifts):
        nonlocal e, m
        e = [D if e is None else b * ei + D for ei, D in zip(e or drifts, drifts, strict=True)]
        c = [C(ei) for ei in e]
        e = [ei - ci for ei, ci in zip(e, c, strict=True)]
        A = C(np.mean(c, axis=0))
        m = mu * m + A
        return -a * (A + mu * m)

    return outer


def noloco(grads, x, gamma, beta, period, a, mu, pairs):
    """NoLoCo; ``pairs(r)`` has the pairs of workers that meet in round r."""
    n = len(grads)
    y, p = [np.copy(x) for _ in grads], [np.copy(x) for _ in grads]
    v, m = [np.zeros_like(x) for _ in grads], [np.zeros_like(x) for _ in grads]
    t = 0
    while True:
        t += 1
        for i, grad in enumerate(grads):
            v[i] = beta * v[i] + grad(y[i])
            y[i] = y[i] - gamma * v[i]
        if t % period == 0:
            group = {i: [i] for i in range(n)}
            for i, j in pairs(t // period - 1):
                group[i] = group[j] = [i, j]
            mean = [
                np.mean([y[j] - p[j] for j in group[i]], axis=0)
                + (np.mean([p[j] for j in group[i]], axis=0) - p[i])
                for i in range(n)
            ]
            m = [mu * mi + a * d for mi, d in zip(m, mean, strict=True)]
            p = [pi + mi for pi, mi in zip(p, m, strict=True)]
            y = [np.copy(pi) for pi in p]
        yield Step(x=np.mean(p, axis=0), y=y, v=v)
