"""An unbiased compressor, scaled down until it is contractive."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits, common
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import Shape
from ef_optax.compressors.combine._single import single_codec
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class Shrunk(Codec):
    """``U(x) / (1 + omega)``, with omega for the leaf's shape."""

    inner: Codec

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(
            common(self.inner.traits), unbiased=False, basis=self.inner.basis
        )

    def step_key(self, workers: Workers) -> Array | None:
        return self.inner.step_key(workers)

    def factor(self, shape: Shape) -> float:
        """1/(1 + omega)."""
        omega = self.inner.omega(shape)
        if omega is None:
            raise ValueError(
                f"scale_to_contractive: {self.inner!r} has no variance constant for shape {shape}."
            )
        return 1 / (1 + omega)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        return self.inner.encode(x, key)

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        return self.inner.decode(message, like) * jnp.asarray(self.factor(like.shape), like.dtype)

    def decode_mean(
        self,
        messages: Message,
        like: jax.ShapeDtypeStruct,
        weights: Array | None = None,
        total: Array | int | None = None,
    ) -> Array:
        mean = self.inner.decode_mean(messages, like, weights, total)
        return mean * jnp.asarray(self.factor(like.shape), like.dtype)

    def support(self, x: Array, message: Message) -> Array:
        return self.inner.support(x, message)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return self.inner.bits(shape, dtype)

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        """1/(1 + omega)."""
        del num_workers
        return self.factor(shape)


def scale_to_contractive(unbiased: Compressor) -> Compressor:
    """A contractive compressor from an unbiased one: ``U(x) / (1 + omega)``.

    alpha = 1/(1 + omega). Use it to put an unbiased quantiser under error feedback.

    Args:
      unbiased: an unbiased compressor of single leaves with a variance constant.

    Returns:
      The compressor. Bits: those of ``unbiased``.

    Raises:
      ValueError: if ``unbiased`` is biased, or has no variance constant for a leaf.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> compressor = ef.scale_to_contractive(ef.qsgd(1, key=0, norm="linf"))
      >>> x = jnp.array([3.0, 3.0, -3.0, 3.0])
      >>> out, _ = jax.jit(compressor.update)(x, compressor.init(x))
      >>> out.tolist(), compressor.codec.alpha(4)
      ([2.0, 2.0, -2.0, 2.0], 0.6666666666666666)

    References:
      Fatkhullin et al., EF21 with bells and whistles, 2021, equation 5.
    """
    codec = single_codec(unbiased, "scale_to_contractive", "unbiased")
    if not codec.unbiased or codec.omega((2,)) is None:
        raise ValueError(
            f"scale_to_contractive: {codec!r} is not unbiased with a known variance constant."
        )
    return Compressor(Shrunk(codec))
