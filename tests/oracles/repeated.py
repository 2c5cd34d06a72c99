"""Compression in several rounds, over local steps, with constraints, or with shared indices."""

from __future__ import annotations

import numpy as np

from tests.oracles import Step


def fcc(C, x, rounds):
    """Huang et al. 2022: v = 0; R times v = v + C(x - v)."""
    v = np.zeros_like(x)
    for _ in range(rounds):
        v = v + C(x - v)
    return v


def neolithic(grads, C, C_server, x, gamma, R):
    """Huang et al. 2022: R minibatches, R-fold compression up and down; grads[i](x, t, r)."""
    t = 0
    while True:
        means = [np.mean([grad(x, t, r) for r in range(R)], axis=0) for grad in grads]
        x = x - gamma * fcc(C_server, np.mean([fcc(C, g, R) for g in means], axis=0), R)
        t += 1
        yield Step(x=x)


def qsparse_local_sgd(grads, C, x, eta, period):
    """Basu et al. 2019: local steps; every ``period`` steps the drift is sent with memory."""
    y = [np.copy(x) for _ in grads]
    m = [np.zeros_like(x) for _ in grads]
    t = 0
    while True:
        for i, grad in enumerate(grads):
            y[i] = y[i] - eta * grad(y[i])
        if (t + 1) % period == 0:
            c = []
            for i in range(len(grads)):
                D = m[i] + x - y[i]
                c.append(C(D))
                m[i] = D - c[i]
            x = x - np.mean(c, axis=0)
            y = [np.copy(x) for _ in grads]
        t += 1
        yield Step(x=x, y=y, m=m)


def cser(grads, C1, C2, x, eta, period):
    """Xie et al. 2020: partial synchronisation of gradients, and of errors every few steps."""

    def psync(v, C):
        c = [C(vi) for vi in v]
        r = [vi - ci for vi, ci in zip(v, c, strict=True)]
        return [np.mean(c, axis=0) + ri for ri in r], r

    x_i = [np.copy(x) for _ in grads]
    e = [np.zeros_like(x) for _ in grads]
    t = 0
    while True:
        g, r = psync([grad(xi) for grad, xi in zip(grads, x_i, strict=True)], C2)
        x_i = [xi - eta * gi for xi, gi in zip(x_i, g, strict=True)]
        e = [ei - eta * ri for ei, ri in zip(e, r, strict=True)]
        t += 1
        if t % period == 0:
            corrected, left = psync(e, C1)
            x_i = [xi + ci - ei for xi, ci, ei in zip(x_i, corrected, e, strict=True)]
            e = left
        yield Step(x=np.mean(x_i, axis=0), x_i=x_i, e=e)


def scalecom(grads, k, x, gamma, beta):
    """Chen et al. 2020: worker t mod n chooses the indices; low-pass memory with weight beta."""
    m = [np.zeros_like(x) for _ in grads]
    t = 0
    while True:
        p = [mi + grad(x) for mi, grad in zip(m, grads, strict=True)]
        leader = np.argsort(-np.abs(p[t % len(grads)]), kind="stable")[:k]
        keep = np.isin(np.arange(len(x)), leader)
        sent = [np.where(keep, pi, 0.0) for pi in p]
        for i, grad in enumerate(grads):
            m[i] = m[i] + beta * (grad(x) - sent[i])
        x = x - gamma * np.mean(sent, axis=0)
        t += 1
        yield Step(x=x, m=m, sent=sent)


def adacomp(grads, bin_size, x, gamma):
    """Chen et al. 2018: per bin, entries that one more gradient would push over its maximum."""
    r = [np.zeros_like(x) for _ in grads]
    while True:
        sent = []
        for i, grad in enumerate(grads):
            dW = grad(x)
            G = r[i] + dW
            H = G + dW
            gmax = np.array([np.max(np.abs(b)) for b in np.split(G, len(x) // bin_size)])
            chosen = np.abs(H) >= np.repeat(gmax, bin_size)
            sent.append(np.where(chosen, np.sign(G) * np.mean(gmax), 0.0))
            r[i] = G - sent[i]
        x = x - gamma * np.mean(sent, axis=0)
        yield Step(x=x, r=r, sent=sent)


def safe_ef(grads, constraint, constraint_grads, C, C_0, x, gamma):
    """Islamov et al. 2025: step along the objective when safe, else along the constraint."""
    w = np.copy(x)
    e = [np.zeros_like(x) for _ in grads]
    while True:
        h = grads if constraint(x) <= 0 else constraint_grads
        v = []
        for i in range(len(grads)):
            direction = h[i](x)
            v.append(C(e[i] + direction))
            e[i] = e[i] + direction - v[i]
        w = w - gamma * np.mean(v, axis=0)
        x = x + C_0(w - x)
        yield Step(x=x, w=w, e=e)
