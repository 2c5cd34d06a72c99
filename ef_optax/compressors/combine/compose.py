"""A quantiser inside a sparsifier: the kept values are quantised."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Gather, Gathered, Message
from ef_optax._core.traits import Traits, common
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.shapes import Shape, like_of, size_of
from ef_optax.compressors.combine._single import single_codec
from ef_optax.compressors.compressor import Compressor, codec_of
from ef_optax.compressors.sparse._sparse import SparseCodec


def contraction(codec: Codec, shape: Shape) -> float | None:
    """``alpha``, or ``1 - omega`` for an unbiased codec with omega < 1; None if unknown."""
    alpha, omega = codec.alpha(shape), codec.omega(shape)
    if alpha is not None:
        return alpha
    return 1 - omega if omega is not None and omega < 1 else None


@dataclasses.dataclass(frozen=True)
class Composed(SparseCodec):
    """The sparsifier chooses the entries, and the quantiser encodes their values."""

    quantizer: Codec
    sparsifier: SparseCodec

    @property
    def traits(self) -> Traits:
        return common(self.quantizer.traits, self.sparsifier.traits)

    def count(self, size: int) -> int:
        """Number of values kept of a leaf of ``size``."""
        return self.sparsifier.count(size)

    def step_key(self, workers: Workers) -> Array | None:
        first = self.quantizer if self.sparsifier.deterministic else self.sparsifier
        return first.step_key(workers)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        inner = None if key is None else jax.random.fold_in(key, 1)  # independent of the mask
        return self._encode(x, key, inner)

    def _encode(self, x: Array, key: Array | None, inner: Array | None) -> Message:
        message = self.sparsifier.encode(x, key)
        return {**message, "values": self.quantizer.encode(message["values"], inner)}

    def parts(self, message: Message, like: jax.ShapeDtypeStruct) -> tuple[Array, Array]:
        values_like = jax.ShapeDtypeStruct((self.count(size_of(like.shape)),), like.dtype)
        values = self.quantizer.decode(message["values"], values_like)
        return self.sparsifier.parts({**message, "values": values}, like)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        kept = self.count(size_of(shape))
        plain = kept * bits_of(dtype)
        return self.sparsifier.bits(shape, dtype) - plain + self.quantizer.bits((kept,), dtype)

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        """alpha_sparsifier times the quantiser's contraction on k values."""
        outer = self.sparsifier.alpha(shape, num_workers)
        inner = contraction(self.quantizer, (self.count(size_of(shape)),))
        return None if outer is None or inner is None else outer * inner

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        """omega_1 omega_2 + omega_1 + omega_2 for two unbiased codecs."""
        outer = self.sparsifier.omega(shape, num_workers)
        inner = self.quantizer.omega((self.count(size_of(shape)),), num_workers)
        if not self.unbiased or outer is None or inner is None:
            return None
        return outer * inner + outer + inner

    def noise_error(self, shape: Shape, num_workers: int = 1) -> float:
        """For an unbiased quantiser: (1 + e_1)(1 + e_2) - 1, or 1 - alpha + alpha e_2."""
        if not self.quantizer.unbiased:
            return 0.0
        outer = self.sparsifier.noise_error(shape, num_workers)
        inner = self.quantizer.noise_error((self.count(size_of(shape)),), num_workers)
        alpha = self.sparsifier.alpha(shape, num_workers)
        return (1 + outer) * (1 + inner) - 1 if alpha is None else 1 - alpha + alpha * inner


@dataclasses.dataclass(frozen=True)
class SharedComposed(Composed):
    """All workers draw the same positions, so only the values travel; each rounds with its key."""

    @property
    def shared_positions(self) -> bool:
        return True

    def protocol(self, x: Array, state: Any, workers: Workers) -> Protocol:
        like, key = like_of(x), self.step_key(workers)
        assert key is not None
        own = jax.random.fold_in(jax.random.fold_in(key, 1), workers.index)
        message = self._encode(x, key, own)
        got: Gathered = yield Gather(message["values"])
        positions = {name: part for name, part in message.items() if name != "values"}
        copies = jax.tree.map(lambda p: jnp.stack([p] * workers.size), positions)
        messages = {**copies, "values": got.messages}
        return Outcome(
            aggregate=self.decode_mean(messages, like, got.weights, got.total),
            state=state,
            sent=lambda: self.decode(message, like),
            residual=lambda: self.residual(x, message),
            support=lambda: self.support(x, message),
        )


def compose(quantizer: Compressor, sparsifier: Compressor) -> Compressor:
    """Quantised sparse values: ``C(x) = scatter(Q(values of S(x)))``.

    The sparsifier's message carries the quantiser's message in place of its values, so a top-k
    message with bf16 values costs k (16 + ceil(log2 d)) bits. If all workers share the positions
    (``random_k(shared_mask=True)``, ``random_block``), only the quantised values travel, by a
    gather. Error feedback goes around the whole composition. If both are randomised, both use the
    sparsifier's key. alpha is alpha_S times the contraction of Q on k values (derived; for an
    unbiased Q with variance omega this is (1 - omega) k/d, Basu et al. 2019).

    Args:
      quantizer: any compressor of single leaves; it is applied to the vector of kept values.
      sparsifier: a compressor whose message is indices and values (``top_k``, ``random_k``, ...).

    Returns:
      The compressor.

    Raises:
      TypeError: if either is not such a compressor (the quantiser comes first), or if the
        sparsifier's choice depends on the other workers (``leader_top_k``).

    Example:
      >>> import ef_optax as ef
      >>> ef.compose(ef.cast("bfloat16"), ef.top_k(k=10)).bits((1024,))
      260

    References:
      Basu, Data, Karakus, Diggavi, Qsparse-local-SGD, 2019, Lemmas 1-3.
    """
    outer = codec_of(sparsifier, "sparsifier")
    shared = isinstance(outer, SparseCodec) and outer.shared_positions
    if not shared:
        outer = single_codec(sparsifier, "compose", "sparsifier")
    if not isinstance(outer, SparseCodec):
        raise TypeError(
            f"compose: sparsifier={outer!r} does not send indices and values, so nothing can be "
            "quantised inside its message; the order is compose(quantizer, sparsifier)."
        )
    inner = single_codec(quantizer, "compose", "quantizer")
    return Compressor((SharedComposed if shared else Composed)(inner, outer))
