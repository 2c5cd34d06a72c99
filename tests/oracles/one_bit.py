"""The later optimizers of the 1-bit family, from the official code (DeepSpeed)."""

from __future__ import annotations

import numpy as np

from tests.oracles import Step


def zero_one_adam(grads, C, x, eta, freeze, kappa, scaler, clipper, b1, b2, eps, w):
    """Lu et al. 2022, without a server's compression; counters as in zoadam.py."""
    n = len(grads)
    e = [np.zeros_like(x) for _ in grads]
    m, v = [np.zeros_like(x)] * n, np.zeros_like(x)
    buf, lrs = [np.zeros_like(x) for _ in grads], 0.0
    var_interval, var_counter, interval, counter, t = 1, 0, 1, 0, 0
    while True:
        t += 1
        if t <= freeze:
            g = [grad(x) for grad in grads]
            if t % var_interval == 0:
                mean = np.mean(g, axis=0)
                v = b2 * v + (1 - b2) * mean**2
                var_counter += 1
                if var_counter == kappa:
                    var_counter, var_interval = 0, 2 * var_interval
            else:
                p = [gi + ei for gi, ei in zip(g, e, strict=True)]
                c = [C(pi) for pi in p]
                e = [pi - ci for pi, ci in zip(p, c, strict=True)]
                mean = np.mean(c, axis=0)
            m = [b1 * m[0] + (1 - b1) * mean] * n
            x = x - eta(t - 1) * (m[0] / (np.sqrt(v) + eps) + w * x)
        else:
            if t == freeze + 1:
                e = [np.zeros_like(x) for _ in grads]
            m = [b1 * mi + (1 - b1) * g(x + bi) for mi, g, bi in zip(m, grads, buf, strict=True)]
            u = [mi / (np.sqrt(v) + eps) + w * (x + bi) for mi, bi in zip(m, buf, strict=True)]
            buf = [bi - eta(t - 1) * ui for bi, ui in zip(buf, u, strict=True)]
            lrs += eta(t - 1)
            if t % interval == 0:
                p = [bi * (np.sqrt(v) + eps) + ei for bi, ei in zip(buf, e, strict=True)]
                c = [C(pi) for pi in p]
                e = [pi - ci for pi, ci in zip(p, c, strict=True)]
                z = np.mean(c, axis=0)
                m = [-z / lrs] * n
                x = x + z / (np.sqrt(v) + eps)
                buf, lrs = [np.zeros_like(x) for _ in grads], 0.0
            counter += 1
            if counter == scaler:
                counter, interval = 0, min(clipper, 2 * interval)
        yield Step(x=x, y=[x + bi for bi in buf])


def one_bit_lamb(grads, C, sizes, x, eta, freeze, b1, b2, eps, w, low, high, factors, change):
    """Li et al. 2021, without a server's compression: one C for the vector of all layers."""
    layers = [slice(a - d, a) for a, d in zip(np.cumsum(sizes), sizes, strict=True)]
    e = [np.zeros_like(x) for _ in grads]
    m, v, fresh = np.zeros_like(x), np.zeros_like(x), None
    frozen, last, scale = [0.0] * len(layers), [1.0] * len(layers), None
    t = 0
    while True:
        g = [grad(x) for grad in grads]
        new = np.copy(x)
        if t < freeze:
            m = b1 * m + (1 - b1) * np.mean(g, axis=0)
            v = b2 * v + (1 - b2) * np.mean(g, axis=0) ** 2
            fresh = np.copy(v)
            for i, part in enumerate(layers):
                u = m[part] / (np.sqrt(v[part]) + eps) + w * x[part]
                c = np.clip(np.linalg.norm(x[part]) / np.linalg.norm(u), low, high)
                frozen[i] = 0.9 * frozen[i] + 0.1 * c
                new[part] = x[part] - eta * c * u
        else:
            if scale is None:
                rms = [np.sqrt(np.mean(m[part] ** 2)) for part in layers]
                scale = np.concatenate(
                    [np.full(d, np.mean(rms) / r) for d, r in zip(sizes, rms, strict=True)]
                )
            before = m
            p = [(b1 * m + (1 - b1) * gi) * scale + ei for gi, ei in zip(g, e, strict=True)]
            sent = [C(pi) for pi in p]
            e = [pi - ci for pi, ci in zip(p, sent, strict=True)]
            m = np.mean(sent, axis=0) / scale
            rebuilt = (m - b1 * before) / (1 - b1)
            fresh = b2 * fresh + (1 - b2) * rebuilt**2
            for i, part in enumerate(layers):
                u0 = m[part] / (np.sqrt(v[part]) + eps)
                u = u0 + w * x[part]
                f = np.max((np.sqrt(v[part]) + eps) / (np.sqrt(fresh[part]) + eps))
                share = min(1.0, np.linalg.norm(u0) / np.linalg.norm(u))
                f = np.clip(f * share + 1 - share, *factors)
                f = np.clip(f, last[i] * (1 - change), last[i] * (1 + change))
                last[i] = f
                new[part] = x[part] - eta * frozen[i] * f * u
        x = new
        t += 1
        yield Step(x=x, m=m, factor=list(last))
