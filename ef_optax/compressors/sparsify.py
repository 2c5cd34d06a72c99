"""Sparsifiers that keep k of d values: the largest (top-k) or random ones (rand-k)."""

from __future__ import annotations

import dataclasses
import fractions
import math
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax import _check, _fields, _packing, _selection
from ef_optax._base import (
    Array,
    Codec,
    Message,
    Protocol,
    Shape,
    Workers,
    as_key,
    bits_of,
    size_of,
)
from ef_optax._compressor import Compressor
from ef_optax._random import random_subset
from ef_optax.compressors._joint_sparse import JointSparse
from ef_optax.compressors._sparse import IndexedCodec, SparseCodec, by_size


def resolve_k(ratio: float | None, k: int | None, size: int) -> int:
    """How many of ``size`` values are kept.

    ``min(d, max(1, ceil(ratio d)))`` in exact rational arithmetic of the decimal that was written
    (0.07 of 100 is 7, not 8); 0 for an empty leaf.

    >>> resolve_k(0.07, None, 100), resolve_k(None, 5, 3), resolve_k(0.01, None, 0)
    (7, 3, 0)
    """
    if k is None:
        assert ratio is not None
        k = max(1, math.ceil(fractions.Fraction(str(ratio)) * size))
    return min(size, k)


def check_ratio_or_k(name: str, ratio: Any, k: Any) -> None:
    """Refuses anything but exactly one of a ratio in (0, 1] and a positive integer k."""
    if (ratio is None) == (k is None):
        raise ValueError(
            f"{name}: ratio={ratio!r}, k={k!r}; give exactly one of them: ratio=0.01 keeps one "
            "value in a hundred, k=10 keeps ten of every leaf."
        )
    if k is None:
        _check.ratio(name, "ratio", ratio)
    else:
        _check.count(name, "k", k)


@dataclasses.dataclass(frozen=True)
class TopK(IndexedCodec):
    """The k largest magnitudes of each leaf; ties go to the lowest index."""

    ratio: float | None = None
    k: int | None = None
    basis: ClassVar[str] = "exact"

    def count(self, size: int) -> int:
        """Number of values kept of a leaf of ``size``."""
        return resolve_k(self.ratio, self.k, size)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        flat = x.reshape(-1)
        indices, values = _selection.top_k(flat, self.count(flat.size))
        return self.message(values, indices, flat.size)

    def family(self, like: jax.ShapeDtypeStruct) -> Hashable | None:
        """Large leaves with samples and indices of the same width."""
        if type(self).protocol is not Codec.protocol:
            return None
        size = size_of(like.shape)
        plan = _selection.plan(size, self.count(size))
        return None if plan is None else (plan.sample, _packing.bits_for(size))

    def joint(self) -> Codec:
        return JointSparse(self)

    def encode_each(self, xs: Sequence[Array], rows: Sequence[Array | int]) -> list[Message]:
        flats = [x.reshape(-1) for x in xs]
        counts = [self.count(flat.size) for flat in flats]
        indices, values = _selection.top_k_of_each(flats, counts, rows)
        width = _packing.bits_for(flats[0].size)
        words = jax.vmap(lambda codes: _packing.pack(codes, width))(indices)
        messages = []
        for members in by_size(flats):
            count = counts[members[0]]
            own = slice(None) if len(members) == len(xs) else np.asarray(members)
            packed = words[own][:, : _packing.packed_words(count, width)]
            field = _fields.Packed(packed, count * width)
            messages.append({"indices": field, "values": values[own][:, :count]})
        return messages

    def finite(self, x: Array, message: Message) -> Array:
        """Told by the values: infinities and NaN count as the largest, so one of them is sent."""
        del x
        return jnp.all(jnp.isfinite(message["values"]))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        del num_workers
        size = size_of(shape)
        return self.count(size) / size if size else 1.0


@dataclasses.dataclass(frozen=True)
class RandomPlaces(SparseCodec):
    """k values at places that do not depend on the leaf, each value as likely as the others."""

    key: Array
    ratio: float | None = None
    k: int | None = None
    scaled: bool = False

    deterministic: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    basis: ClassVar[str] = "exact"

    @property
    def unbiased(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.scaled

    def count(self, size: int) -> int:
        """Number of values kept of a leaf of ``size``."""
        return resolve_k(self.ratio, self.k, size)

    def values(self, x: Array, indices: Array) -> Array:
        """The values at these indices, times d/k if scaled."""
        factor = x.size / self.count(x.size) if self.scaled and x.size else 1.0
        return x.reshape(-1)[indices] * jnp.asarray(factor, x.dtype)

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        del num_workers
        size = size_of(shape)
        return None if self.scaled else self.count(size) / size if size else 1.0

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        del num_workers
        size = size_of(shape)
        return (size / self.count(size) - 1 if size else 0.0) if self.scaled else None

    def least_error(self, shape: Shape, num_workers: int = 1) -> float:
        """As much as the variance, if scaled: no leaf is better than another."""
        return self.omega(shape, num_workers) or 0.0

    def step_key(self, workers: Workers) -> Array:
        return workers.fold(self.key, shared=self.shared_positions)

    def protocol(self, x: Array, state: Any, workers: Workers) -> Protocol:
        if not self.shared_positions:
            return (yield from super().protocol(x, state, workers))
        return (yield from self.averaged(x, self.encode(x, self.step_key(workers)), state))


@dataclasses.dataclass(frozen=True)
class RandomK(RandomPlaces):
    """A uniformly random k-subset of each leaf; the message carries the seed, not the indices."""

    shared_mask: bool = False

    @property
    def shared_positions(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.shared_mask

    @property
    def transports(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("reduce",) if self.shared_mask else ("gather",)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        assert key is not None
        seed = jax.random.bits(key, (1,), jnp.uint32)
        indices = random_subset(seed[0], x.size, self.count(x.size))
        return {"seed": seed, "values": self.values(x, indices)}

    def parts(self, message: Message, like: jax.ShapeDtypeStruct) -> tuple[Array, Array]:
        size = size_of(like.shape)
        return random_subset(message["seed"][0], size, self.count(size)), message["values"]

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        seed = 0 if self.shared_mask else 32
        return seed + self.count(size_of(shape)) * bits_of(dtype)


def top_k(ratio: float | None = None, *, k: int | None = None) -> Compressor:
    """Keeps the k largest magnitudes of every leaf, exactly; ties go to the lowest index.

    ``C(x)_i = x_i`` if ``|x_i|`` is among the k largest, else 0. Contraction alpha = k/d (exact for
    equal magnitudes), biased. Bits: k (32 + ceil(log2 d)) for float32.

    Args:
      ratio: kept / total in (0, 1]; k = min(d, max(1, ceil(ratio d))) for each leaf.
      k: number of values kept of each leaf; give either this or ``ratio``.

    Returns:
      The compressor. The residual is the input with the sent entries set to zero.

    Raises:
      ValueError: unless exactly one of ``ratio`` and ``k`` is given, and in range.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.top_k(0.5)
      >>> compressor.update(jnp.array([1.0, 2.0, 3.0, 4.0]), compressor.init(None))[0].tolist()
      [0.0, 0.0, 3.0, 4.0]

    References:
      Stich, Cordonnier, Jaggi, Sparsified SGD with memory, 2018, Definition 2.1.
    """
    check_ratio_or_k("top_k", ratio, k)
    return Compressor(TopK(ratio, k))


def random_k(
    ratio: float | None = None,
    key: Any = None,
    *,
    k: int | None = None,
    scaled: bool = False,
    shared_mask: bool = False,
) -> Compressor:
    """Keeps a uniformly random k-subset of every leaf, drawn without replacement.

    ``C(x) = (d/k) x`` on the subset if ``scaled`` (unbiased, omega = d/k - 1), else ``x`` there
    (alpha = k/d in expectation); 0 elsewhere. A message is a 32-bit seed and k values: receivers
    draw the same subset from the seed. With ``shared_mask`` all workers draw the same subset, the
    codec is one linear map, and only the k values are summed (no seed travels).

    Args:
      ratio: kept / total in (0, 1].
      key: a JAX random key or an int; the step, the leaf's path and (unless ``shared_mask``) the
        worker are folded in, so no two leaves, steps or workers share a mask.
      k: number of values kept of each leaf; give either this or ``ratio``.
      scaled: multiply by d/k to make it unbiased. Use False under error feedback.
      shared_mask: the same subset on all workers.

    Returns:
      The compressor.

    Raises:
      TypeError: if ``key`` is missing. ValueError: for a bad ``ratio`` or ``k``.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.random_k(0.25, key=0)
      >>> out, _ = compressor.update(jnp.ones(8), compressor.init(jnp.ones(8)))
      >>> int((out != 0).sum())
      2

    References:
      Stich, Cordonnier, Jaggi, Sparsified SGD with memory, 2018; the scaled form as in
      Richtarik, Sokolov, Fatkhullin, EF21, 2021.
    """
    check_ratio_or_k("random_k", ratio, k)
    _check.flag("random_k", "scaled", scaled)
    _check.flag("random_k", "shared_mask", shared_mask)
    return Compressor(RandomK(as_key(key, "random_k"), ratio, k, scaled, shared_mask))
