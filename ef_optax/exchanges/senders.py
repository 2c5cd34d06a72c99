"""The mean over the senders: each coordinate is averaged over the workers that sent it.

all_gather:   C(x_i) of every worker, to all workers
then          sum_i C(x_i) / number of workers that sent the coordinate, 0 if none did
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.need import Need
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Gather, Gathered, Message
from ef_optax._core.traits import Traits, common
from ef_optax._core.transport import Transport
from ef_optax._core.workers import Workers
from ef_optax._numeric.division import safe_divisor
from ef_optax._numeric.dtypes import Array, bits_of, wide_dtype
from ef_optax._numeric.reductions import UNROLL_LIMIT
from ef_optax._numeric.shapes import Shape, like_of, size_of
from ef_optax.compressors.combine._single import single_codec
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._coefficients import CoefficientCodec
from ef_optax.compressors.sparse._sparse import Followable, SparseCodec
from ef_optax.exchanges.carried import SPARSE, carried

POSITIONS = dataclasses.replace(
    SPARSE, met=lambda codec: isinstance(codec, SparseCodec | CoefficientCodec)
)
PLAIN_VALUES = Need(
    lambda codec: isinstance(codec, Followable | CoefficientCodec),
    "does not send plain values, which values= could encode",
    "choose a sparsifier such as top_k, or leave values out",
)


@dataclasses.dataclass(frozen=True)
class MeanOfSenders(Transport):
    """Gathers sparse messages; a coordinate's values are divided by the number of its senders."""

    values: Codec | None = None

    @property
    def needs(self) -> tuple[Need, ...]:
        return (POSITIONS,) if self.values is None else (POSITIONS, PLAIN_VALUES)

    def run(self, codec: Codec, x: Array, state: Any, workers: Workers) -> Protocol:
        if isinstance(codec, CoefficientCodec):
            return (yield from self._of_coefficients(codec, x, state, workers))
        message, like = codec.encode(x, codec.step_key(workers)), like_of(x)
        got: Gathered = yield Gather(self._packed(message, workers), codec.finite(x, message))
        got = dataclasses.replace(got, messages=self._unpacked(got.messages, message))
        total = codec.decode_mean(got.messages, like, got.weights, 1)
        return Outcome(
            aggregate=total / safe_divisor(self._senders(codec, got, like)),
            state=state,
            sent=lambda: codec.decode(message, like),
            residual=lambda: codec.residual(x, message),
            support=lambda: codec.support(x, message),
        )

    def _of_coefficients(
        self, codec: CoefficientCodec, x: Array, state: Any, workers: Workers
    ) -> Protocol:
        """The exchange of the coefficients; what comes out is transformed back."""
        like = like_of(x)
        out = yield from self.run(codec.inner(x.shape), codec.analysis(x), state, workers)
        return Outcome(
            aggregate=codec.synthesis(out.aggregate, like),
            state=state,
            sent=lambda: codec.synthesis(out.sent(), like),
            residual=lambda: x - codec.synthesis(out.sent(), like),
            support=lambda: jnp.ones(x.shape, bool),
        )

    def _packed(self, message: Message, workers: Workers) -> Message:
        """The message, with its values in the form in which they travel."""
        if self.values is None:
            return message
        key = self.values.step_key(workers)
        return {**message, "values": self.values.encode(message["values"], key)}

    def _unpacked(self, messages: Message, own: Message) -> Message:
        if self.values is None:
            return messages
        decode, like = self.values.decode, like_of(own["values"])
        return {**messages, "values": jax.vmap(lambda m: decode(m, like))(messages["values"])}

    @staticmethod
    def _senders(codec: Codec, got: Gathered, like: jax.ShapeDtypeStruct) -> Array:
        """The sum of the weights of each coordinate's senders, without n dense masks."""
        nothing = jnp.zeros(like.shape, like.dtype)

        def add(i: Any, count: Array) -> Array:
            sent = codec.support(nothing, jax.tree.map(lambda m: m[i], got.messages))
            weight = 1 if got.weights is None else got.weights[i].astype(like.dtype)
            return count + jnp.where(sent, jnp.asarray(weight, like.dtype), 0)

        n = jax.tree.leaves(got.messages)[0].shape[0]
        if n > UNROLL_LIMIT:
            return jax.lax.fori_loop(1, n, add, add(0, nothing))
        count = nothing
        for i in range(n):
            count = add(i, count)
        return count

    def traffic(self, codec: Codec, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """The message, whose values may be encoded."""
        (bits,) = super().traffic(codec, shape, dtype, num_workers)
        if self.values is None:
            return (bits,)
        inner, wide = codec, dtype
        if isinstance(codec, CoefficientCodec):
            inner, wide = codec.inner(shape), wide_dtype(dtype)
        assert isinstance(inner, SparseCodec)
        k = inner.count(size_of(shape))
        return (bits - k * bits_of(wide) + self.values.bits((k,), wide),)

    def traits(self, codec: Codec) -> Traits:
        known = codec.traits if self.values is None else common(codec.traits, self.values.traits)
        return dataclasses.replace(
            known, unbiased=False, linear=False, additive=False, basis=codec.basis
        )


def mean_of_senders(compressor: Compressor, *, values: Compressor | None = None) -> Compressor:
    """Averages each coordinate over the workers that sent it, not over all workers.

    All public code of SparseLoCo and DeMo does so, where the papers divide by the number of
    workers. The difference is large: at a density of 1/64, 16 workers with independent supports
    have 1.12 senders for each coordinate that is sent, so the step is 14 times longer.

    The aggregate is not the mean of what was sent (``additive`` is False): a worker's message and
    its residual still add up to its input, but what all workers apply is not conserved, and rules
    that keep an estimate of the mean refuse it. With weights, values and senders are weighted. The
    coordinates of ``ef.dct_top_k`` are its coefficients.

    Args:
      compressor: a sparsifier, perhaps with quantised values.
      values: encodes the values that travel, but not those that the worker itself subtracts from
        its residual, so what this loses is not kept: ``ef.sign()`` sends votes, as DisTrO does. To
        keep it, quantise inside of the compressor (:func:`ef_optax.compose`).

    Returns:
      The compressor. Bits: those of the message.

    Raises:
      TypeError: if ``compressor`` or ``values`` is not a stateless Compressor of single leaves
        whose message one worker encodes alone.
      ValueError: if ``compressor`` does not send indices and values.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> senders = ef.exchanges.mean_of_senders(ef.block_top_k(k=1, block=2))
      >>> tx = ef.simulate(ef.compressed_mean(senders, axis_name="w"), 2, "w")
      >>> grads = jnp.array([[4.0, 1.0, 6.0, 0.0], [0.0, 8.0, 2.0, 0.0]])
      >>> tx.update(grads, tx.init(jnp.zeros(4)), jnp.zeros(4))[0].tolist()
      [4.0, 8.0, 4.0, 0.0]

    References:
      The code of SparseLoCo (tplr-ai/CCLoco: src/tplr/ccloco.py) and of DeMo (bloc97/DeMo); votes:
      PsycheFoundation/psyche, shared/modeling/src/trainer.rs.
    """
    encoded = None if values is None else single_codec(values, "mean_of_senders", "values")
    return carried("mean_of_senders", compressor, MeanOfSenders(encoded))
