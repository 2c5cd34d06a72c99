"""Three values, -1, 0 and 1, times one scale: TernGrad and 3LC."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax import _check, _fields
from ef_optax._base import (
    Array,
    Codec,
    Gather,
    Gathered,
    Max,
    Message,
    Outcome,
    Protocol,
    Shape,
    Workers,
    as_key,
    bits_of,
    like_of,
    size_of,
)
from ef_optax._compressor import Compressor
from ef_optax.compressors._blocks import round_randomly, safe_divisor
from ef_optax.compressors._norms import leaf_norm
from ef_optax.compressors._quartic import pack_quartic, quartic_bits, unpack_quartic
from ef_optax.compressors.sign import scale_dtype

PACKINGS = ("bits", "quartic")


class TernaryCodec(Codec):
    """``C(x) = scale * t`` with t in {-1, 0, 1}; subclasses give scale and t."""

    packing: str

    @abc.abstractmethod
    def parts(self, x: Array, key: Array | None) -> tuple[Array, Array]:
        """The scale (a scalar) and the ternary values of a flat leaf."""

    def encode(self, x: Array, key: Array | None = None) -> Message:
        return self._message(*self.parts(x.reshape(-1).astype(scale_dtype(x.dtype)), key))

    def _message(self, scale: Array, ternary: Array) -> Message:
        if self.packing == "quartic":
            packed = pack_quartic(ternary)
        else:
            packed = _fields.pack(ternary.astype(jnp.int32) + 1, 2)
        return {"ternary": packed, "scale": scale[None]}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        size = size_of(like.shape)
        if self.packing == "quartic":
            ternary = unpack_quartic(message["ternary"], size)
        else:
            ternary = _fields.unpack(message["ternary"], 2, size).astype(jnp.int32) - 1
        values = ternary.astype(message["scale"].dtype) * message["scale"]
        return values.astype(like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        values = quartic_bits(size) if self.packing == "quartic" else 2 * size
        return values + bits_of(scale_dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Ternary(TernaryCodec):
    """The largest magnitude M times sign(x), with probability |x|/M, else 0."""

    key: Array
    clip_sigmas: float | None = None
    packing: str = "bits"

    deterministic: ClassVar[bool] = False

    @property
    def basis(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "exact" if self.clip_sigmas is None else "none"

    @property
    def unbiased(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.clip_sigmas is None

    def parts(self, x: Array, key: Array | None) -> tuple[Array, Array]:
        clipped = self._clipped(x)
        return leaf_norm(clipped, "linf"), self._chosen(clipped, leaf_norm(clipped, "linf"), key)

    def _clipped(self, x: Array) -> Array:
        if self.clip_sigmas is None or not x.size:
            return x
        unit = safe_divisor(leaf_norm(x, "linf"))
        limit = self.clip_sigmas * unit * jnp.std(x / unit)
        return jnp.clip(x, -limit, limit)

    @staticmethod
    def _chosen(x: Array, scale: Array, key: Array | None) -> Array:
        """sign(x) with probability |x|/scale, else 0."""
        assert key is not None
        chosen = round_randomly(jnp.abs(x) / safe_divisor(scale), key)
        return jnp.where(x < 0, -chosen, chosen)

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        """(sqrt(d) - 1)/2, attained by (1, a, ..., a) with a = 1/(1 + sqrt(d))."""
        del num_workers
        if self.clip_sigmas is not None:
            return None
        return (math.sqrt(max(1, size_of(shape))) - 1) / 2


@dataclasses.dataclass(frozen=True)
class SharedTernary(Ternary):
    """The same with the largest magnitude of all workers."""

    independent: ClassVar[bool] = False

    def protocol(self, x: Array, state: Any, workers: Workers) -> Protocol:
        like = like_of(x)
        clipped = self._clipped(x.reshape(-1).astype(scale_dtype(x.dtype)))
        largest = leaf_norm(clipped, "linf")
        scale = yield Max(jnp.where(jnp.isfinite(largest), largest, jnp.inf))
        message = self._message(scale, self._chosen(clipped, scale, self.step_key(workers)))
        got: Gathered = yield Gather(message["ternary"])
        messages = {"ternary": got.messages, "scale": jnp.stack([message["scale"]] * workers.size)}
        return Outcome(
            aggregate=self.decode_mean(messages, like, got.weights, got.total),
            state=state,
            sent=lambda: self.decode(message, like),
            residual=lambda: self.residual(x, message),
            support=lambda: self.support(x, message),
        )

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """The scale to the maximum, then the ternary values."""
        del num_workers
        scale = bits_of(scale_dtype(dtype))
        return scale, self.bits(shape, dtype) - scale

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        """None for several workers: the common scale may be far above this worker's."""
        return super().omega(shape) if num_workers == 1 else None


@dataclasses.dataclass(frozen=True)
class ThreeLC(TernaryCodec):
    """S = s M times x/S rounded to nearest: values above half of S, at most one step."""

    sparsity: float
    packing: str = "quartic"
    basis: ClassVar[str] = "exact"

    def parts(self, x: Array, key: Array | None) -> tuple[Array, Array]:
        del key
        scale = leaf_norm(x, "linf") * jnp.asarray(self.sparsity, x.dtype)
        return scale, jnp.round(x / safe_divisor(scale))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        """s(2 - s)/(1 + (d - 1) s^2/4), attained when all others are just not sent."""
        del num_workers
        s = self.sparsity
        return s * (2 - s) / (1 + (max(1, size_of(shape)) - 1) * s**2 / 4)


def ternary(
    key: Any = None,
    *,
    clip_sigmas: float | None = None,
    packing: str = "bits",
    shared_scale: bool = False,
) -> Compressor:
    """TernGrad: ``C(x)_i = M sign(x_i)`` with probability ``|x_i|/M``, else 0.

    M is the largest magnitude. Unbiased with omega = (sqrt(d) - 1)/2 (exact). With ``clip_sigmas``
    = c the leaf is first clamped to +-c times its standard deviation (about its mean, divisor d),
    which lowers the variance and gives up unbiasedness; the published choice is 2.5.

    Args:
      key: a JAX random key or an int; step, leaf and worker are folded in.
      clip_sigmas: clamp at this many standard deviations; None: no clamping.
      packing: ``"bits"``, 2 bits a value, or ``"quartic"``, five values to a byte.
      shared_scale: M is the largest magnitude of all workers, found in a round of its own, so that
        the mean is M/n times a sum of integers. Still unbiased, with more variance for workers
        of small gradients: no omega of a worker's own leaf bounds it.

    Returns:
      The compressor. Bits: 32 + 2 d, or 32 + 8 ceil(d/5).

    Raises:
      ValueError: for a bad ``clip_sigmas`` or ``packing``. TypeError: without a key.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.ternary(key=0)
      >>> compressor.update(jnp.array([2.0, -2.0, 0.0]), compressor.init(None))[0].tolist()
      [2.0, -2.0, 0.0]
      >>> ef.ternary(key=0, packing="quartic").bits((100,))
      192

    References:
      Wen et al., TernGrad, 2017, equations 2-5 and section 3.3 (clipping), and its
      scaler sharing.
    """
    if clip_sigmas is not None:
        _check.static_positive("ternary", "clip_sigmas", clip_sigmas)
    _check.word("ternary", "packing", packing, PACKINGS)
    _check.flag("ternary", "shared_scale", shared_scale)
    kind = SharedTernary if shared_scale else Ternary
    return Compressor(kind(as_key(key, "ternary"), clip_sigmas, packing))


def three_lc(sparsity: float = 1.0) -> Compressor:
    """3LC: rounds x/S to -1, 0 or 1 with S = ``sparsity`` times the largest magnitude.

    A value is sent, as +-S, iff ``|x| > S/2`` (a tie is not sent). Deterministic and biased:
    alpha = s(2 - s)/(1 + (d - 1) s^2/4) (exact). Meant for error feedback. 3LC's last stage, the
    zero-run code, has a length that depends on the data; :func:`ef_optax.zero_run_bits` counts it.

    Args:
      sparsity: s, the sparsity multiplier, 1 <= s < 2; larger sends fewer and larger values.

    Returns:
      The compressor. Bits: 32 + 8 ceil(d/5), five values to a byte.

    Raises:
      ValueError: if ``sparsity`` is not in [1, 2).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.three_lc(1.5)
      >>> compressor.update(jnp.array([2.0, -1.0, 1.6]), compressor.init(None))[0].tolist()
      [3.0, 0.0, 3.0]

    References:
      Lim, Andersen, Kaminsky, 3LC: lightweight and effective traffic compression, 2019, section 3.
    """
    _check.static("three_lc", "sparsity", sparsity, lambda s: 1 <= s < 2, "a number in [1, 2)")
    return Compressor(ThreeLC(float(sparsity)))
