"""Combinations: a quantiser inside a sparsifier, a choice for each leaf, a plain transformation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from ef_optax._base import (
    Array,
    Codec,
    Gather,
    Gathered,
    Mean,
    Message,
    Outcome,
    Protocol,
    Shape,
    Workers,
    bits_of,
    joint_basis,
    like_of,
    size_of,
    wide_dtype,
)
from ef_optax._compressor import Compressor, codec_of
from ef_optax._context import path_string
from ef_optax.compressors._messageless import MessagelessCodec
from ef_optax.compressors._sparse import SparseCodec
from ef_optax.compressors.random_block import RandomBlock
from ef_optax.compressors.sparsify import RandomK

Policy = Callable[[str, jax.ShapeDtypeStruct], Compressor]


def contraction(codec: Codec, shape: Shape) -> float | None:
    """``alpha``, or ``1 - omega`` for an unbiased codec with omega < 1; None where not known."""
    alpha, omega = codec.alpha(shape), codec.omega(shape)
    if alpha is not None:
        return alpha
    return 1 - omega if omega is not None and omega < 1 else None


@dataclasses.dataclass(frozen=True)
class Composed(SparseCodec):
    """The sparsifier chooses the entries, the quantiser encodes their values."""

    quantizer: Codec
    sparsifier: SparseCodec

    @property
    def basis(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return joint_basis(self.quantizer, self.sparsifier)

    @property
    def unbiased(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.quantizer.unbiased and self.sparsifier.unbiased

    @property
    def homogeneous(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.quantizer.homogeneous and self.sparsifier.homogeneous

    @property
    def deterministic(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.quantizer.deterministic and self.sparsifier.deterministic

    def count(self, size: int) -> int:
        """Number of values kept of a leaf of ``size``."""
        return self.sparsifier.count(size)

    @property
    def shared_positions(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.sparsifier.shared_positions

    def step_key(self, workers: Workers) -> Array | None:
        first = self.quantizer if self.sparsifier.deterministic else self.sparsifier
        return first.step_key(workers)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        inner = None if key is None else jax.random.fold_in(key, 1)  # other numbers than the mask's
        return self._encode(x, key, inner)

    def _encode(self, x: Array, key: Array | None, inner: Array | None) -> Message:
        message = self.sparsifier.encode(x, key)
        return {**message, "values": self.quantizer.encode(message["values"], inner)}

    def protocol(self, x: Array, state: Any, workers: Workers) -> Protocol:
        if not self.shared_positions:
            return (yield from super().protocol(x, state, workers))
        # Everybody knows the positions, so only the values are gathered; each rounds its own.
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

    def least_error(self, shape: Shape, num_workers: int = 1) -> float:
        """The sparsifier's, to which an unbiased quantiser can only add."""
        return self.sparsifier.least_error(shape, num_workers) if self.quantizer.unbiased else 0.0


@dataclasses.dataclass(frozen=True)
class PerLeaf(MessagelessCodec):
    """A policy that chooses the compressor of each leaf by its path, shape and dtype."""

    policy: Policy
    why: ClassVar[str] = (
        "its codec depends on the leaf. Ask codec.for_leaf(path, like), or "
        "ef_optax.message_bits(compressor, params)."
    )
    stateful: ClassVar[bool] = True

    def for_leaf(self, path: str, like: jax.ShapeDtypeStruct) -> Codec:
        chosen = codec_of(self.policy(path, like), f"policy({path!r})")
        return chosen.for_leaf(path, like)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        raise self.refusal("bits")


@dataclasses.dataclass(frozen=True)
class Dense(Codec):
    """A stateless Optax transformation of all its leaves together, sent dense."""

    tx: optax.GradientTransformation
    granularity: ClassVar[str] = "group"
    homogeneous: ClassVar[bool] = False
    transports: ClassVar[tuple[str, ...]] = ("reduce",)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        return self._apply([x])[0]

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        return message.astype(like.dtype)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return size_of(shape) * bits_of(dtype)

    def protocol(self, x: list[Array], state: Any, workers: Workers) -> Protocol:
        del workers
        sent = self._apply(x)
        mean = yield Mean(sent)
        return Outcome(
            aggregate=mean,
            state=state,
            sent=lambda: sent,
            residual=lambda: [a - b for a, b in zip(x, sent, strict=True)],
            support=lambda: [jnp.ones(a.shape, bool) for a in x],
        )

    def _apply(self, leaves: list[Array]) -> list[Array]:
        updates: Any = self.tx.update(leaves, self.tx.init(leaves), None)[0]
        return updates


def compose(quantizer: Compressor, sparsifier: Compressor) -> Compressor:
    """Quantised sparse values: ``C(x) = scatter(Q(values of S(x)))``.

    The sparsifier's message carries the quantiser's message in place of its values, so a top-k
    message with bf16 values costs k (16 + ceil(log2 d)) bits. Where all workers share the positions
    (``random_k(shared_mask=True)``, ``random_block``) nothing but the quantised values travels, by
    a gather. One error feedback goes around the composition. If both are randomised, the
    sparsifier's key drives both. alpha = alpha_S times the contraction of Q on k values (derived;
    for an unbiased Q with variance omega that is (1 - omega) k/d, Basu et al. 2019).

    Args:
      quantizer: any compressor of leaves, applied to the vector of kept values.
      sparsifier: a compressor whose message is indices and values (``top_k``, ``random_k``, ...).

    Returns:
      The compressor.

    Raises:
      TypeError: if either is not such a compressor (the order is quantiser, sparsifier), or if
        the sparsifier's choice depends on the other workers (``leader_top_k``).

    Example:
      >>> import ef_optax as ef
      >>> ef.compose(ef.cast("bfloat16"), ef.top_k(k=10)).bits((1024,))
      260

    References:
      Basu, Data, Karakus, Diggavi, Qsparse-local-SGD, 2019, Lemmas 1-3.
    """
    inner, outer = codec_of(quantizer, "quantizer"), codec_of(sparsifier, "sparsifier")
    if not isinstance(outer, SparseCodec):
        raise TypeError(
            f"sparsifier={outer!r} does not send indices and values, so nothing can be quantised "
            "inside its message; the order is compose(quantizer, sparsifier)."
        )
    alone = type(outer).protocol in (Codec.protocol, Composed.protocol) or isinstance(
        outer, RandomK | RandomBlock
    )
    if not alone:
        raise TypeError(
            f"sparsifier={outer!r} has an exchange of its own, which a quantiser inside its "
            "message would leave out; compose with a sparsifier of single workers, such as top_k."
        )
    if inner.granularity != "leaf" or inner.stateful:
        raise TypeError(f"quantizer={inner!r} must be a stateless compressor of single leaves.")
    return Compressor(Composed(inner, outer))


def per_leaf(policy: Policy) -> Compressor:
    """Chooses a compressor for each leaf by its path, shape or size.

    Args:
      policy: ``policy(path, leaf) -> Compressor`` with ``path`` like ``"dense/kernel"`` and
        ``leaf`` a ``jax.ShapeDtypeStruct`` (``leaf.shape``, ``leaf.dtype``, ``leaf.size``). It is
        called while tracing and must depend on nothing else.

    Returns:
      The compressor.

    Raises:
      TypeError: if ``policy`` is not callable, or (at use) returns something else.

    Example:
      Biases and other small leaves dense, the rest top-1%:

      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> small = lambda path, leaf: leaf.ndim < 2 or leaf.size < 1024
      >>> mixed = ef.per_leaf(lambda p, x: ef.identity() if small(p, x) else ef.top_k(0.01))
      >>> mixed.codec.for_leaf("bias", jax.ShapeDtypeStruct((10,), jnp.float32))
      Identity()
    """
    if isinstance(policy, Compressor) or not callable(policy):
        raise TypeError(
            f"per_leaf: policy={policy!r} must be a function (path, leaf) -> Compressor."
        )
    return Compressor(PerLeaf(policy))


def dense(tx: optax.GradientTransformation) -> Compressor:
    """Uses a plain, stateless Optax transformation as a compressor with a dense message.

    ``C(updates) = tx.update(updates)``, all leaves together. On purpose only: nothing is saved on
    the wire. It makes clipping a "compressor", as Clip21 needs.

    Args:
      tx: a transformation without state, such as ``optax.clip(1.0)``.

    Returns:
      The compressor; its message is the dense array, exchanged by an all-reduce.

    Raises:
      TypeError: if ``tx`` is not a transformation or already a compressor.
      ValueError: if ``tx`` has state.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> clip = ef.dense(optax.clip(1.0))
      >>> clip.update(jnp.array([5.0, -0.5]), clip.init(None))[0].tolist()
      [1.0, -0.5]
    """
    if isinstance(tx, Compressor) or not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"dense: tx={tx!r} must be a plain Optax transformation.")
    if jax.tree.leaves(jax.eval_shape(tx.init, [jax.ShapeDtypeStruct((1,), jnp.float32)])):
        raise ValueError("dense: tx has state; put it into the chain before or after instead.")
    return Compressor(Dense(tx))


def message_bits(compressor: Compressor, params: Any, dtype: Any = None) -> int:
    """Bits of one worker's message for a whole tree: the sum of its leaves' ``codec.bits``.

    Args:
      compressor: any compressor, also :func:`per_leaf`.
      params: a tree of arrays or ShapeDtypeStructs.
      dtype: dtype of the compressed values; default float32 or the leaf's own if that is wider.

    Returns:
      Bits, before they are rounded up to a word and without the two header words of a step.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> ef.message_bits(ef.scaled_sign(), {"w": jnp.zeros((8, 8)), "b": jnp.zeros(8)})
      136
    """
    codec, total = codec_of(compressor), 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        wide = wide_dtype(leaf.dtype) if dtype is None else dtype
        total += codec.for_leaf(path_string(path), like_of(leaf)).bits(leaf.shape, wide)
    return total
