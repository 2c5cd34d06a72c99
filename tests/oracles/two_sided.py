"""Error feedback on the workers and on the server; momentum before or inside the compression."""

from __future__ import annotations

import numpy as np

from tests.oracles import Step


def dist_ef_sgdm(grads, C, C_server, x, eta, mu, nesterov=True):
    """Zheng, Huang, Kwok 2019, with the learning-rate ratio."""
    m = [np.zeros_like(x) for _ in grads]
    e = [np.zeros_like(x) for _ in grads]
    E = np.zeros_like(x)
    t = 0
    while True:
        ratio = eta(t - 1) / eta(t) if t else 1.0
        D = []
        for i, grad in enumerate(grads):
            g = grad(x)
            m[i] = mu * m[i] + g
            p = (mu * m[i] + g if nesterov else m[i]) + ratio * e[i]
            D.append(C(p))
            e[i] = p - D[i]
        q = np.mean(D, axis=0) + ratio * E
        server = C_server(q)
        E = q - server
        x = x - eta(t) * server
        t += 1
        yield Step(x=x, e=e, E=E, m=m)


def double_squeeze(grads, C, C_server, x, gamma):
    """Tang et al. 2019: both directions compressed with their own memory, gradient units."""
    e = [np.zeros_like(x) for _ in grads]
    E = np.zeros_like(x)
    while True:
        sent = []
        for i, grad in enumerate(grads):
            v = grad(x) + e[i]
            sent.append(C(v))
            e[i] = v - sent[i]
        v = np.mean(sent, axis=0) + E
        broadcast = C_server(v)
        E = v - broadcast
        x = x - gamma * broadcast
        yield Step(x=x, e=e, E=E)


def dgc(grads, k, x, gamma, m, nesterov=False, masking=True):
    """Lin et al. 2018: momentum correction and momentum factor masking, top-k of the velocity."""
    u = [np.zeros_like(x) for _ in grads]
    v = [np.zeros_like(x) for _ in grads]
    while True:
        sent, increments = [], []
        for i, grad in enumerate(grads):
            g = grad(x)
            if nesterov:
                u[i] = m * (u[i] + g)
                increments.append(u[i] + g)
            else:
                u[i] = m * u[i] + g
                increments.append(u[i])
            v[i] = v[i] + increments[i]
            mask = np.zeros(len(x))
            mask[np.argsort(-np.abs(v[i]), kind="stable")[:k]] = 1.0
            sent.append(v[i] * mask)
            v[i] = v[i] * (1 - mask)
            if masking:
                u[i] = u[i] * (1 - mask)
        x = x - gamma * np.mean(sent, axis=0)
        yield Step(x=x, u=u, v=v, sent=sent, increments=increments)


def fetch_sgd(grads, bucket, sign, columns, k, x, gamma, rho, clear):
    """Rothchild et al. 2020: momentum and error in the server's sketch.

    Row r puts coordinate i into cell bucket[r, i] with sign[r, i].
    """
    rows = len(bucket)

    def sketch(v):
        table = np.zeros((rows, columns))
        for r in range(rows):
            for i in range(len(v)):
                table[r, bucket[r, i]] += sign[r, i] * v[i]
        return table

    S_u, S_e = np.zeros((rows, columns)), np.zeros((rows, columns))
    while True:
        S = np.mean([sketch(grad(x)) for grad in grads], axis=0)
        S_u = rho * S_u + S
        S_e = S_e + S_u
        U = np.median([sign[r] * S_e[r, bucket[r]] for r in range(rows)], axis=0)
        D = np.zeros_like(x)
        chosen = np.argsort(-np.abs(U), kind="stable")[:k]
        D[chosen] = U[chosen]
        if clear == "subtract":
            S_e = S_e - sketch(D)
        else:
            hit = sketch(D) != 0
            S_e, S_u = np.where(hit, 0.0, S_e), np.where(hit, 0.0, S_u)
        x = x - gamma * D
        yield Step(x=x, S_u=S_u, S_e=S_e)
