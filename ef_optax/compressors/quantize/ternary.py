"""TernGrad: random values -1, 0 or 1, times the largest magnitude."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Gather, Gathered, Max
from ef_optax._core.traits import Traits
from ef_optax._core.transport import mean_of
from ef_optax._core.workers import Workers
from ef_optax._numeric import check
from ef_optax._numeric.division import safe_divisor
from ef_optax._numeric.dtypes import Array, bits_of, scale_dtype
from ef_optax._numeric.norms import leaf_norm
from ef_optax._numeric.random import as_key, round_randomly
from ef_optax._numeric.shapes import Shape, like_of, size_of
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.quantize._ternary import PACKINGS, TernaryCodec


@dataclasses.dataclass(frozen=True)
class Ternary(TernaryCodec):
    """The largest magnitude M times sign(x), with probability |x|/M, else 0."""

    key: Array
    clip_sigmas: float | None = None
    packing: str = "bits"

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=self.clip_sigmas is None,
            deterministic=False,
            basis="exact" if self.clip_sigmas is None else "none",
        )

    def parts(self, x: Array, key: Array | None) -> tuple[Array, Array]:
        clipped = self._clipped(x)
        return leaf_norm(clipped, "linf"), self._chosen(clipped, leaf_norm(clipped, "linf"), key)

    def _clipped(self, x: Array) -> Array:
        if self.clip_sigmas is None or not x.size:
            return x
        largest = safe_divisor(leaf_norm(x, "linf"))
        limit = self.clip_sigmas * largest * jnp.std(x / largest)
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
    """TernGrad with the largest magnitude of all workers."""

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, independent=False)

    def protocol(self, x: Array, state: Any, workers: Workers) -> Protocol:
        like = like_of(x)
        clipped = self._clipped(x.reshape(-1).astype(scale_dtype(x.dtype)))
        largest = leaf_norm(clipped, "linf")
        scale = yield Max(jnp.where(jnp.isfinite(largest), largest, jnp.inf))
        message = self._message(scale, self._chosen(clipped, scale, self.step_key(workers)))
        got: Gathered = yield Gather(message["ternary"])
        messages = {"ternary": got.messages, "scale": jnp.stack([message["scale"]] * workers.size)}
        return Outcome(
            aggregate=mean_of(self, dataclasses.replace(got, messages=messages), like, workers),
            state=state,
            sent=lambda: self.decode(message, like),
            residual=lambda: self.residual(x, message),
            support=lambda: self.support(x, message),
        )

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """A round for the maximum of the scales, then one for the ternary values."""
        del num_workers
        scale = bits_of(scale_dtype(dtype))
        return scale, self.bits(shape, dtype) - scale

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        """None for several workers, since the common scale may be far above this worker's."""
        return super().omega(shape) if num_workers == 1 else None


def ternary(
    key: Any = None,
    *,
    clip_sigmas: float | None = None,
    packing: str = "bits",
    shared_scale: bool = False,
) -> Compressor:
    """TernGrad: ``C(x)_i = M sign(x_i)`` with probability ``|x_i|/M``, else 0.

    M is the largest magnitude. It is unbiased with omega = (sqrt(d) - 1)/2 (exact). With
    ``clip_sigmas`` = c, the leaf is first clamped to +-c times its standard deviation (about its
    mean, divisor d). This lowers the variance but introduces a bias; the published choice is 2.5.

    Args:
      key: a JAX random key or an int; step, leaf and worker are folded in.
      clip_sigmas: clamp at this many standard deviations; None for no clamping.
      packing: ``"bits"`` for 2 bits per value, or ``"quartic"`` for five values per byte.
      shared_scale: whether M is the largest magnitude of all workers, which takes one more round,
        so that the mean is M/n times a sum of integers. It stays unbiased, but workers with small
        gradients have more variance, and no omega bounds it relative to their own leaf.

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
        check.static_positive("ternary", "clip_sigmas", clip_sigmas)
    check.word("ternary", "packing", packing, PACKINGS)
    check.flag("ternary", "shared_scale", shared_scale)
    kind = SharedTernary if shared_scale else Ternary
    return Compressor(kind(as_key(key, "ternary"), clip_sigmas, packing))
