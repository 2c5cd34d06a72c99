"""What a library must offer to run these cases: a few functions on NumPy arrays.

To run the cases against another library, give the fixture ``library`` an object with the same
methods. Arrays go in and come out as NumPy; a worker's update is a dictionary of leaves.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ef_optax as ef
from ef_optax._bits import packing
from ef_optax.compressors.quantize.eden import fitted_scale


@functools.partial(jax.jit, static_argnames="kind")
def _fitted_signs(x: jax.Array, kind: str) -> jax.Array:
    codes = jnp.where(x >= 0, 1.0, -1.0)
    return codes * fitted_scale(codes, x, kind)


class EfOptax:
    """The adapter of this library."""

    def pack_indices(self, indices: Any, bits: int) -> bytes:
        """Bit fields of ``bits`` bits, low bit first, as ceil(count bits / 8) bytes (strict).

        Raises ``ValueError`` for an index that does not fit and for an odd count.
        """
        indices = np.asarray(indices, np.int64)
        if indices.size % 2 or (indices >= 1 << bits).any() or (indices < 0).any():
            raise ValueError("indices do not fit, or their count is odd")
        words = np.asarray(packing.pack(jnp.asarray(indices, jnp.uint32), bits))
        return words.astype("<u4").tobytes()[: -(-indices.size * bits // 8)]

    def unpack_indices(self, data: bytes, bits: int, count: int) -> np.ndarray:
        """The inverse of :meth:`pack_indices`."""
        words = np.zeros(packing.packed_words(count, bits), "<u4")
        words.view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
        return np.asarray(packing.unpack(jnp.asarray(words, jnp.uint32), bits, count))

    def sign_words(self, x: Any) -> np.ndarray:
        """The packed signs, 32 to a word."""
        return np.asarray(packing.pack_signs(jnp.asarray(x, jnp.float32)))

    def compress(self, name: str, x: Any, **options: Any) -> np.ndarray:
        """What the receiver decodes from the message of one leaf."""
        compressor = getattr(ef, name)(**options)
        x = jnp.asarray(x, jnp.float32)
        return np.asarray(jax.jit(compressor.update)(x, compressor.init(x))[0])

    def optimizer(self, name: str, rate: float, *, step_units: bool = False, **options: Any) -> Any:
        """EF14 around a compressor with plain gradient descent, one worker."""
        feedback = ef.error_feedback(getattr(ef, name)(**options))
        parts = (optax.sgd(rate), feedback) if step_units else (feedback, optax.sgd(rate))
        return optax.chain(*parts)

    def rule(self, name: str, rate: float, compressor: str, **options: Any) -> Any:
        """Another rule around a compressor with plain gradient descent, one worker."""
        return optax.chain(getattr(ef, name)(getattr(ef, compressor)(), **options), optax.sgd(rate))

    def corrected(self, name: str, schedule: Any, **options: Any) -> Any:
        """EF14 in gradient units whose residual follows the learning rate, with that schedule."""
        feedback = ef.error_feedback(getattr(ef, name)(**options), learning_rate=schedule)
        return optax.chain(feedback, optax.sgd(schedule))

    def workers(self, tx: Any, n: int) -> Any:
        """``tx`` with n workers in one process."""
        return ef.simulate(tx, n, "w")

    def mean_of_workers(self, name: str, rows: Any, **options: Any) -> np.ndarray:
        """The mean over workers of their decoded messages."""
        rows = jnp.asarray(rows, jnp.float32)
        rule = ef.compressed_mean(getattr(ef, name)(**options), axis_name="w")
        tx = ef.simulate(rule, len(rows), "w")
        zeros = jax.tree.map(jnp.zeros_like, rows[0])
        return np.asarray(tx.update(rows, tx.init(zeros), zeros)[0])

    def draws(self, name: str, x: Any, count: int, **options: Any) -> np.ndarray:
        """What the receiver decodes with ``count`` different keys, in float64."""
        codec, x = getattr(ef, name)(**options).codec, jnp.asarray(x, jnp.float32)
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        one = jax.jit(jax.vmap(lambda key: codec.decode(codec.encode(x, key), like)))
        return np.asarray(one(jax.random.split(jax.random.key(1), count)), np.float64)

    def message_bits(self, name: str, shape: Any, **options: Any) -> int:
        """Exact bits of one worker's message for a leaf."""
        return getattr(ef, name)(**options).bits(shape)

    def constants(self, name: str, shape: Any, **options: Any) -> tuple[Any, Any]:
        """Contraction alpha and variance omega, None if there is none."""
        codec = getattr(ef, name)(**options).codec
        return codec.alpha(shape), codec.omega(shape)

    def arithmetic_bits(self, values: Any) -> float:
        """Bits of a vector under arithmetic coding with its own histogram."""
        return ef.measure.arithmetic_bits(values)

    def fitted_signs(self, x: Any, scale: str) -> np.ndarray:
        """DRIVE's signs and scale without its rotation."""
        return np.asarray(_fitted_signs(np.asarray(x, np.float32), scale))

    def feedback(self, name: str, gradients: Any, **options: Any) -> tuple[list, list]:
        """What one worker sends, and its residual, after each step of EF14 in gradient units."""
        tx = ef.error_feedback(getattr(ef, name)(**options))
        gradients = [jnp.asarray(g) for g in gradients]
        state, update, sent, owed = (
            tx.init(jnp.zeros_like(gradients[0])),
            jax.jit(tx.update),
            [],
            [],
        )
        for g in gradients:
            out, state = update(g, state)
            sent.append(np.asarray(out))
            owed.append(np.asarray(state.residual))
        return sent, owed

    def both_ways(self, name: str, steps: Any, **options: Any) -> list[np.ndarray]:
        """Updates of several workers when the server compresses the mean again; both remember."""
        compressor = getattr(ef, name)(**options)
        tx = ef.double_squeeze(compressor, axis_name="w")
        return self._run(tx, steps)[0]

    def two_phase(self, name: str, steps: Any, **options: Any) -> tuple[list, list]:
        """Updates and worker memories when every worker serves, and compresses, one chunk."""
        shot = ef.exchanges.two_shot(getattr(ef, name)(**options))
        return self._run(ef.error_feedback(shot, axis_name="w"), steps)

    def _run(self, rule: Any, steps: Any) -> tuple[list, list]:
        steps = [jnp.asarray(rows, jnp.float32) for rows in steps]
        tx, params = ef.simulate(rule, len(steps[0]), "w"), jnp.zeros_like(steps[0][0])
        state, update, updates, memories = tx.init(params), jax.jit(tx.update), [], []
        for rows in steps:
            out, state = update(rows, state, params)
            updates.append(np.asarray(out))
            memories.append(np.asarray(state.residual))
        return updates, memories
