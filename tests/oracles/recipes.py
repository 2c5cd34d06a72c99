"""Whole optimizers of the literature, from their algorithm boxes and official codes."""

from __future__ import annotations

import numpy as np
import scipy.fft

from tests.oracles import Step


def signum(grads, x, eta, b, w):
    """Bernstein et al. 2019: the majority of the signs of the workers' momenta."""
    m = [np.zeros_like(x) for _ in grads]
    while True:
        m = [b * mi + (1 - b) * grad(x) for mi, grad in zip(m, grads, strict=True)]
        votes = np.sum([np.where(mi >= 0, 1, -1) for mi in m], axis=0)
        x = x - eta * (np.sign(votes) + w * x)
        yield Step(x=x, m=m)


def dgc_sgd(grads, ks, dense, x, eta, m, w, nesterov):
    """DGC and the SGD of its official code; ``dense`` marks the coordinates of dense leaves.

    ``ks(t)`` is the number of other coordinates that are sent in step t.
    """
    u = [np.zeros_like(x) for _ in grads]
    v = [np.zeros_like(x) for _ in grads]
    b = np.zeros_like(x)
    t = 0
    while True:
        sent = []
        for i, grad in enumerate(grads):
            g = grad(x)
            if nesterov:
                u[i] = m * (u[i] + g)
                v[i] = v[i] + u[i] + g
            else:
                u[i] = m * u[i] + g
                v[i] = v[i] + u[i]
            size = np.where(dense, -1.0, np.abs(v[i]))
            chosen = np.zeros(len(x), bool)
            chosen[np.argsort(-size, kind="stable")[: ks(t)]] = True
            sent.append(np.where(dense | chosen, v[i], 0))
            v[i] = v[i] - sent[i]
            u[i] = np.where(chosen, 0, u[i])
        b = m * b + w * x
        decay = w * x + m * b if nesterov else b
        x = x - eta * (np.mean(sent, axis=0) + decay)
        t += 1
        yield Step(x=x, u=u, v=v, b=b)


def one_bit_adam(grads, C, x, eta, freeze_step, b1, b2, eps, w):
    """Tang et al. 2021, without a server's compression: dense Adam, then C on the momentum."""
    e = [np.zeros_like(x) for _ in grads]
    m, v = np.zeros_like(x), np.zeros_like(x)
    t = 0
    while True:
        g = [grad(x) for grad in grads]
        if t < freeze_step:
            m = b1 * m + (1 - b1) * np.mean(g, axis=0)
            v = b2 * v + (1 - b2) * np.mean(g, axis=0) ** 2
        else:
            z = [b1 * m + (1 - b1) * gi + ei for gi, ei in zip(g, e, strict=True)]
            c = [C(zi) for zi in z]
            e = [zi - ci for zi, ci in zip(z, c, strict=True)]
            m = np.mean(c, axis=0)
        x = x - eta * (m / (np.sqrt(v) + eps) + w * x)
        t += 1
        yield Step(x=x, e=e, m=m, v=v)


def power_sgd_momentum(gradients, q, x, eta, b, w):
    """Vogels et al. 2019, Algorithm 2, for one matrix whose gradients (workers, ...) are given."""
    e = np.zeros(gradients.shape[1:])
    m = np.zeros_like(x)
    for g in gradients:
        p_i = g + e
        p = np.linalg.qr(p_i.mean(0) @ q)[0]
        q = p_i.mean(0).T @ p
        D = p @ q.T
        e = p_i - D
        step = D + w * x
        m = b * m + step
        x = x - eta * (step + m)
        yield Step(x=x, e=e, m=m)


def demo(grads, forward, inverse, k, x, eta, b, w, ahead=False):
    """DeMo; with ``ahead`` DisTrO, whose gradients are taken ahead of the parameters.

    ``forward`` gives the coefficients of each tile, ``inverse`` undoes it.
    """
    d, q = [np.zeros_like(x) for _ in grads], [np.zeros_like(x) for _ in grads]
    t, last = 0, 0.0
    while True:
        rate, sent = eta(t), []
        for i, grad in enumerate(grads):
            g = grad(x - last * np.sign(d[i]) if ahead else x)
            d[i] = b * (d[i] - q[i]) + rate * g
            kept = []
            for tile in forward(d[i]):
                order = np.argsort(-np.abs(tile), kind="stable")[:k]
                kept.append(np.where(np.isin(np.arange(len(tile)), order), tile, 0))
            q[i] = inverse(kept)
            sent.append(kept)
        mean = []
        for tile in zip(*sent, strict=True):
            senders = np.count_nonzero(tile, axis=0)
            mean.append(np.sum(tile, axis=0) / np.maximum(1, senders))
        x = x - rate * (np.sign(inverse(mean)) + w * x)
        t, last = t + 1, rate
        yield Step(x=x, d=d, q=q)


def newton_schulz(x):
    """Jordan et al. 2024: five steps of the quintic iteration, along the shorter side."""
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T).T
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def dion2(gradients, x, k, parts, eta, mu, w, basis=None):
    """Dion2 for one matrix, of which columns are chosen if there are not more of them than rows.

    ``basis`` has the rows on which is projected, as in Trion; without it these are unit vectors.
    """
    across = x.shape[1] <= x.shape[0]
    turn = (lambda a: np.swapaxes(a, -2, -1)) if across else (lambda a: a)
    basis = np.eye(min(x.shape)) if basis is None else basis
    M, scale = np.zeros_like(turn(gradients[0])), np.sqrt(x.shape[1] / x.shape[0])
    for g in gradients:
        M = M + turn(g)
        S = basis @ M
        norms = np.abs(S).sum(axis=2).mean(axis=0).reshape(parts, -1)
        length = norms.shape[1]
        chosen = [p * length + i for p in range(parts) for i in np.argsort(-norms[p])[:k]]
        Q, U = basis[chosen], S[:, chosen]
        M = M - (1 - mu) * Q.T @ U
        x = x - eta * (scale * turn(Q.T @ newton_schulz(U.mean(axis=0))) + w * x)
        yield Step(x=x, M=turn(M))


def dion(gradients, q, x, eta, mu, w):
    """Ahn et al. 2025, Algorithm 1, with the two factors averaged over the workers."""
    M = np.zeros(gradients.shape[1:])
    for g in gradients:
        B = M + g
        P = np.linalg.qr(B.mean(0) @ q)[0]
        R = B.mean(0).T @ P
        M = B - (1 - mu) * P @ R.T
        q = R / np.linalg.norm(R, axis=0)
        x = x - eta * (np.sqrt(x.shape[1] / x.shape[0]) * P @ q.T + w * x)
        yield Step(x=x, M=M)


def ef21_muon(gradients, x, lmo, C, server, eta, b):
    """Gruntkowska et al. 2025 for one leaf: EF21 of the momentum, and EF21-P on the way back."""
    M = G = None
    model = x
    for g in gradients:
        if M is None:
            M, G = g, g
        else:
            M = (1 - b) * M + b * g
            G = G + np.stack([C(m) for m in M - G])
        model = model - eta * lmo(G.mean(0))
        x = x + server(model - x)
        yield Step(x=x, G=G, ahead=model - x)


def ldadam(gradients, x, r, eta, b1, b2, rho, eps, w):
    """Robert et al. 2025 for a matrix, projected along its shorter side."""
    across = x.shape[1] <= x.shape[0]
    turn = (lambda a: a.T) if across else (lambda a: a)
    E = np.zeros_like(turn(x))
    P = m = v = None
    for t, g in enumerate(gradients):
        G = turn(g) + E
        if t == 0:
            new = np.linalg.svd(G)[0][:, :r]
            m = v = np.zeros((r, G.shape[1]))
            before, carried = np.zeros_like(G), m
        else:
            before = P @ m
            b = rho * before / (1 - b1**t) + (1 - rho) * G
            new = np.linalg.qr(b @ b.T @ P)[0]
            S = new.T @ P
            carried = S @ m
            v = v / (1 - b2**t) - (m / (1 - b1**t)) ** 2
            v = np.abs(S**2 @ v + (carried / (1 - b1**t)) ** 2) * (1 - b2**t)
        P = new
        h = P.T @ G
        E = G - P @ h + b1 / (1 - b1) * (before - P @ carried)
        m = b1 * carried + (1 - b1) * h
        v = b2 * v + (1 - b2) * h**2
        step = m / (1 - b1 ** (t + 1)) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
        x = x - eta * (turn(P @ step) + w * x)
        yield Step(x=x, E=turn(E))


def dct_adamw(gradients, x, r, eta, b1, b2, eps, w):
    """Adam in the r largest frequencies of a tall matrix; all moments are kept at full size."""
    columns = x.shape[1]
    D = scipy.fft.dct(np.eye(columns), axis=0, norm="ortho")
    e = np.zeros(gradients.shape[1:])
    m, v = np.zeros_like(x), np.zeros_like(x)  # of the frequencies, zero if not chosen
    for t, g in enumerate(gradients):
        A = g + e
        S = A @ D.T
        chosen = np.sort(np.argsort(-np.abs(S).sum(axis=1).mean(axis=0))[:r])
        mask = np.isin(np.arange(columns), chosen)
        sent = np.where(mask, S, 0)
        e = A - sent @ D
        h = sent.mean(axis=0)
        m = np.where(mask, b1 * m + (1 - b1) * h, 0)
        v = np.where(mask, b2 * v + (1 - b2) * h**2, 0)
        step = m / (1 - b1 ** (t + 1)) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
        x = x - eta * (step @ D + w * x)
        yield Step(x=x, e=e, chosen=chosen)


def micro_adam(gradients, x, C, Q, window, eta, b1, b2, eps, w):
    """Modoranu et al. 2024: the moments are sums over the last sparse gradients."""
    e, kept = np.zeros_like(x), []
    for t, g in enumerate(gradients):
        a = g + e
        V = C(a)
        e = Q(a - V)
        kept = [*kept, V][-window:]
        m = sum(b1 ** (len(kept) - 1 - j) * V for j, V in enumerate(kept))
        v = sum(b2 ** (len(kept) - 1 - j) * V**2 for j, V in enumerate(kept))
        m = m * (1 - b1) / (1 - b1 ** (t + 1))
        v = v * (1 - b2) / (1 - b2 ** (t + 1))
        x = x - eta * (m / (np.sqrt(v) + eps) + w * x)
        yield Step(x=x, e=e)


def gpa(grads, x, eta, mu_x, mu_y):
    """Generalised primal averaging with SGD inside."""
    z = np.copy(x)
    while True:
        y = mu_y * x + (1 - mu_y) * z
        z = z - eta * np.mean([grad(y) for grad in grads], axis=0)
        x = mu_x * x + (1 - mu_x) * z
        yield Step(x=x)


def econtrol_dual_averaging(grads, C, x, rate, eta, weight, l1):
    """Gao et al. 2026 with psi = l1 ||x||_1, coordinate by coordinate; h_i starts at C(g_i)."""
    start, z, A, t = x, np.zeros_like(x), 0.0, 0
    h_i, e_i = [np.zeros_like(x) for _ in grads], [np.zeros_like(x) for _ in grads]
    while True:
        for i, grad in enumerate(grads):
            d = grad(x) - h_i[i] + eta * e_i[i]
            sent = C(d)
            e_i[i] = e_i[i] + grad(x) - h_i[i] - sent
            h_i[i] = h_i[i] + sent
        z, A, gamma = z + weight(t) * np.mean(h_i, axis=0), A + weight(t), 1 / rate(t)
        # <z, x> + A l1 |x| + gamma/2 (x - start)^2 is least where its derivative changes sign.
        above, below = start - (z + A * l1) / gamma, start - (z - A * l1) / gamma
        x = np.where(above > 0, above, np.where(below < 0, below, 0.0))
        t += 1
        yield Step(x=x, h_i=h_i, e_i=e_i)
