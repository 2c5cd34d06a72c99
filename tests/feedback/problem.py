"""One small heterogeneous problem, for the library and for the references.

Three workers with quadratics ``(1/2) x^T H_i x - b_i^T x`` over parameters of two leaves, in
float64, so library and reference agree to 1e-12 unless they are different algorithms.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ef_optax as ef
from tests.oracles import Step

WORKERS, AXIS, GAMMA, ROUNDS = 3, "workers", 0.05, 20
LEAVES = {"a": (3,), "b": (2, 2)}
SIZES = [3, 4]
TOLERANCE = 1e-12

_rng = np.random.default_rng(0)
_factors = _rng.normal(size=(WORKERS, 7, 7))
H = np.stack([(i + 1) * (A @ A.T / 7 + 0.1 * np.eye(7)) for i, A in enumerate(_factors)])
B = _rng.normal(size=(WORKERS, 7))
START = _rng.normal(size=7)

NOISE = _rng.normal(size=(ROUNDS + 1, WORKERS, 7))
"""The noise that a minibatch adds to each worker's gradient, round by round."""

GRADS = [lambda x, H=Hi, b=bi: H @ x - b for Hi, bi in zip(H, B, strict=True)]
"""One gradient function per worker, for the references."""


NOISY = [lambda x, t, i=i: GRADS[i](x) + NOISE[t, i] for i in range(WORKERS)]
"""The same with the noise of round t."""


def per_leaf(C: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """The reference compressor, applied to each leaf on its own."""

    def apply(x: np.ndarray) -> np.ndarray:
        return np.concatenate([C(part) for part in np.split(x, np.cumsum(SIZES)[:-1])])

    return apply


def tree(x: Any) -> dict[str, jax.Array]:
    """Flat vectors (..., 7) as a tree of parameters."""
    parts = jnp.split(x, np.cumsum(SIZES)[:-1], axis=-1)
    shapes = LEAVES.values()
    return {
        name: part.reshape(*part.shape[:-1], *shape)
        for name, part, shape in zip(LEAVES, parts, shapes, strict=True)
    }


def flat(parameters: Any, lead: int = 0) -> Any:
    """The inverse of :func:`tree`, with ``lead`` leading dimensions."""
    leaves = [parameters[name] for name in LEAVES]
    numpy = np if isinstance(leaves[0], np.ndarray) else jnp
    return numpy.concatenate([x.reshape(*x.shape[:lead], -1) for x in leaves], axis=-1)


@dataclasses.dataclass(frozen=True)
class Recorded(ef.extend.Codec):
    """Wraps a codec; its state records which entries were sent, for the references to read."""

    inner: ef.extend.Codec

    @property
    def traits(self):
        return ef.extend.Traits(unbiased=self.inner.unbiased, deterministic=False, stateful=True)

    def init(self, like, path, num_workers):
        return jnp.zeros(like.shape, bool)

    def protocol(self, x, state, workers):
        outcome = yield from self.inner.protocol(x, (), workers)
        return dataclasses.replace(outcome, state=outcome.support())

    def encode(self, x, key=None):
        return self.inner.encode(x, key)

    def decode(self, message, like):
        return self.inner.decode(message, like)

    def bits(self, shape, dtype=jnp.float32):
        return self.inner.bits(shape, dtype)

    def omega(self, shape, num_workers=1):
        return self.inner.omega(shape, num_workers)


def recorded(compressor: ef.Compressor) -> ef.Compressor:
    """The compressor with a record of its masks: its codec's state."""
    return ef.Compressor(Recorded(compressor.codec))


def replayed(masks: np.ndarray, k: int) -> list[Callable[[np.ndarray], np.ndarray]]:
    """Scaled random-k of every leaf for the references, with the masks (rounds, workers, 7)."""
    factor = np.concatenate([np.full(d, d / k) for d in SIZES])

    def worker(i: int) -> Callable[[np.ndarray], np.ndarray]:
        rows = iter(masks[:, i])
        return lambda x: np.where(next(rows), factor * x, 0.0)

    return [worker(i) for i in range(WORKERS)]


def loss(parameters: Any, batch: Any) -> jax.Array:
    """One worker's objective; the batch holds its matrix and vector, with one row."""
    x = flat(parameters)
    return 0.5 * x @ batch["H"][0] @ x - batch["b"][0] @ x


def optimizer(rule: optax.GradientTransformation, gamma: float = GAMMA) -> ef.parallel.Lifted:
    """The rule followed by gradient descent, on simulated workers."""
    return ef.simulate(optax.chain(rule, optax.sgd(gamma)), WORKERS, AXIS)


def run(
    lifted: ef.parallel.Lifted,
    rounds: int = ROUNDS,
    start: Any = START,
    noisy: bool = False,
    extra: Callable[[Any], dict[str, Any]] | None = None,
) -> types.SimpleNamespace:
    """Runs some rounds.

    Args:
      lifted: from :func:`optimizer`.
      rounds: how many.
      start: the first point.
      noisy: whether gradients are those of minibatches.
      extra: the round -> extra arguments of the update.

    Returns:
      Iterates (rounds, 7), and the states after every round with a leading axis of rounds.
    """
    with jax.enable_x64(True):
        value_and_grad = ef.worker_value_and_grad(loss, WORKERS, AXIS)
        b = B - (NOISE[:rounds] if noisy else np.zeros((rounds, WORKERS, 7)))

        def step(carry: Any, now: Any) -> Any:
            params, state = carry
            batch, more = {"H": jnp.asarray(H), "b": now[1]}, extra(now[0]) if extra else {}
            points = ef.query_points(state, params)
            _, grads = value_and_grad(points, batch)
            updates, state = lifted.update(
                grads["params"], state, params, grads=dict(grads), **more
            )
            params = optax.apply_updates(params, updates)
            return (params, state), (flat(params), state)

        def whole(start: Any, rows: Any) -> Any:
            params = tree(start)
            return jax.lax.scan(step, (params, lifted.init(params)), rows)[1]

        x, states = jax.jit(whole)(jnp.asarray(start), (jnp.arange(rounds), jnp.asarray(b)))
        return types.SimpleNamespace(x=np.asarray(x), state=jax.tree.map(np.asarray, states))


def check(
    lifted: ef.parallel.Lifted,
    oracle: Any,
    rounds: int = ROUNDS,
    noisy: bool = False,
    extra: Any = None,
    got: Any = None,
    **memories: str,
) -> Any:
    """Compares iterates, and named fields of the rule's state, with the reference.

    Args:
      lifted: from :func:`optimizer`.
      oracle: a generator of steps.
      rounds: how many.
      noisy: whether gradients are those of minibatches.
      extra: the round -> extra arguments of the update.
      got: what :func:`run` returned, if it has run already.
      **memories: field of the state -> name in the reference's steps.

    Returns:
      What :func:`run` returned.
    """
    got = got or run(lifted, rounds, noisy=noisy, extra=extra)
    expected: list[Step] = [next(oracle) for _ in range(rounds)]
    close(got.x, [s.x for s in expected])
    for field, name in memories.items():
        value = getattr(got.state[0], field)
        per_worker = value["a"].ndim - 1 > len(LEAVES["a"])
        value = flat(value, 2 if per_worker else 1)
        close(value, [getattr(s, name) for s in expected])
    return got


def close(got: Any, expected: Any) -> None:
    """Equal to 1e-12."""
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE)
