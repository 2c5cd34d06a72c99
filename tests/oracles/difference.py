"""Control variates, variance reduction and three-point compressors."""

from __future__ import annotations

import numpy as np

from tests.oracles import Step


def ef_bv(grads, C, x, gamma, lam, nu):
    """Condat, Yi, Richtarik 2022; C is a list, one compressor per worker."""
    h_i = [np.zeros_like(x) for _ in grads]
    while True:
        d_i = [Ci(grad(x) - hi) for Ci, grad, hi in zip(C, grads, h_i, strict=True)]
        g = np.mean(h_i, axis=0) + nu * np.mean(d_i, axis=0)
        h_i = [hi + lam * di for hi, di in zip(h_i, d_i, strict=True)]
        x = x - gamma * g
        yield Step(x=x, h_i=h_i)


def diana(grads, Q, x, gamma, a):
    """Mishchenko et al. 2019; Q is a list, one compressor per worker."""
    h_i = [np.zeros_like(x) for _ in grads]
    h = np.zeros_like(x)
    while True:
        m_i = [Qi(grad(x) - hi) for Qi, grad, hi in zip(Q, grads, h_i, strict=True)]
        g = h + np.mean(m_i, axis=0)
        x = x - gamma * g
        h_i = [hi + a * mi for hi, mi in zip(h_i, m_i, strict=True)]
        h = h + a * np.mean(m_i, axis=0)
        yield Step(x=x, h_i=h_i, h=h)


def marina(grads, Q, x, gamma, exact, takes_part=None):
    """Gorbunov et al. 2021: exact(t) is the shared coin, grads[i](x, t) the gradient of round t.

    PP-MARINA: takes_part(t) gives one flag per worker; the mean is over those that take part.
    """
    g = np.mean([grad(x, 0) for grad in grads], axis=0)
    t = 0
    while True:
        previous, x = x, x - gamma * g
        yield Step(x=x, g=g)
        t += 1
        if exact(t):
            g = np.mean([grad(x, t) for grad in grads], axis=0)
        else:
            differences = [
                Qi(grad(x, t) - grad(previous, t)) for Qi, grad in zip(Q, grads, strict=True)
            ]
            present = takes_part(t) if takes_part else np.ones(len(grads), bool)
            g = g + np.mean([d for d, p in zip(differences, present, strict=True) if p], axis=0)


def three_point(grads, C, x, gamma, init):
    """g_i = C_{g_i, grad f_i(x)}(grad f_i(x+)) for a rule C(h, y, x)."""
    y = [grad(x) for grad in grads]
    g_i = [init(yi) for yi in y]
    while True:
        x = x - gamma * np.mean(g_i, axis=0)
        yield Step(x=x, g_i=g_i)
        new = [grad(x) for grad in grads]
        g_i = [C(hi, yi, xi) for hi, yi, xi in zip(g_i, y, new, strict=True)]
        y = new


def rule_ef21(C):
    return lambda h, y, x: h + C(x - h)


def rule_lag(zeta):
    return lambda h, y, x: x if np.sum((x - h) ** 2) > zeta * np.sum((x - y) ** 2) else h


def rule_clag(C, zeta):
    return lambda h, y, x: h + C(x - h) if np.sum((x - h) ** 2) > zeta * np.sum((x - y) ** 2) else h


def rule_v1(C):
    return lambda h, y, x: y + C(x - y)


def rule_v2(C, Q):
    def rule(h, y, x):
        b = h + Q(x - y)
        return b + C(x - b)

    return rule


def rule_v3(C, inner):
    def rule(h, y, x):
        b = inner(h, y, x)
        return b + C(x - b)

    return rule


def rule_v4(C1, C2):
    def rule(h, y, x):
        b = h + C2(x - h)
        return b + C1(x - b)

    return rule


def rule_v5(C, coin):
    return lambda h, y, x: x if coin() else h + C(x - y)


def ef21_p(grads, C, x, gamma):
    """Gruntkowska, Tyurin, Richtarik 2023: x = x - gamma g(w); w = w + C(x - w)."""
    w = x
    while True:
        x = x - gamma * np.mean([grad(w) for grad in grads], axis=0)
        w = w + C(x - w)
        yield Step(x=x, w=w)


def ec_sgd_diana(grads, C, Q, x, gamma, a):
    """Gorbunov et al. 2020: error-compensated steps along DIANA's corrected gradients."""
    e = [np.zeros_like(x) for _ in grads]
    h_i = [np.zeros_like(x) for _ in grads]
    h = np.zeros_like(x)
    while True:
        v = []
        for i, grad in enumerate(grads):
            ghat = grad(x)
            g = ghat - h_i[i] + h
            v.append(C(e[i] + gamma * g))
            e[i] = e[i] + gamma * g - v[i]
            h_i[i] = h_i[i] + a * Q(ghat - h_i[i])
        h = np.mean(h_i, axis=0)
        x = x - np.mean(v, axis=0)
        yield Step(x=x, e=e, h_i=h_i, h=h)


def econtrol(grads, C, x, gamma, eta, start="dense"):
    """Gao, Islamov, Stich 2024; the start is a dense first message, or h_i = 0."""
    h_i = [grad(x) if start == "dense" else np.zeros_like(x) for grad in grads]
    e_i = [np.zeros_like(x) for _ in grads]
    sums = [np.zeros_like(x) for _ in grads]
    first = start == "dense"
    while True:
        if not first:
            for i, grad in enumerate(grads):
                g = grad(x)
                D = C(eta * e_i[i] + g - h_i[i])
                e_i[i] = e_i[i] + g - h_i[i] - D
                h_i[i] = h_i[i] + D
                sums[i] = sums[i] + g - h_i[i]
        first = False
        x = x - gamma * np.mean(h_i, axis=0)
        yield Step(x=x, h_i=h_i, e_i=e_i, sums=sums)
