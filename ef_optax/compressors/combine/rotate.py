"""Compression after a random rotation, after which no coordinate stands out."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits, common
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array, wide_dtype
from ef_optax._numeric.random import as_key
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax._numeric.transforms import TRANSFORMS
from ef_optax.compressors.combine._single import single_codec
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class Rotated(Codec):
    """``inverse(inner(forward(x)))``; the message carries the seed of the transform."""

    inner: Codec
    key: Array
    kind: str = "hadamard"

    @property
    def traits(self) -> Traits:
        shared = common(self.inner.traits)
        if self.kind != "kashin":
            return dataclasses.replace(shared, deterministic=False)
        return dataclasses.replace(shared, deterministic=False, linear=False, basis="none")

    def length(self, size: int) -> int:
        """Size of the vector that the inner codec compresses."""
        return TRANSFORMS[self.kind][0](size)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        assert key is not None
        seed = jax.random.bits(key, (1,), jnp.uint32)
        flat = x.reshape(-1).astype(wide_dtype(x.dtype))
        rotated = TRANSFORMS[self.kind][1](flat, jax.random.key(seed[0]))
        inner = None if self.inner.deterministic else jax.random.fold_in(key, 1)
        return {"seed": seed, "inner": self.inner.encode(rotated.astype(flat.dtype), inner)}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        size, dtype = size_of(like.shape), wide_dtype(like.dtype)
        rotated = jax.ShapeDtypeStruct((self.length(size),), dtype)
        y = self.inner.decode(message["inner"], rotated)
        x = TRANSFORMS[self.kind][2](y, jax.random.key(message["seed"][0]), size)
        return x.astype(like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return 32 + self.inner.bits((self.length(size_of(shape)),), wide_dtype(dtype))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        """The inner codec's alpha at the rotated length; Kashin's frame does not preserve it."""
        if self.kind == "kashin":
            return None
        return self.inner.alpha((self.length(size_of(shape)),), num_workers)

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        """The inner codec's omega at the rotated length; see :meth:`alpha`."""
        if self.kind == "kashin":
            return None
        return self.inner.omega((self.length(size_of(shape)),), num_workers)

    def noise_error(self, shape: Shape, num_workers: int = 1) -> float:
        """A rotation turns noise into noise; with Kashin's frame the error is not known."""
        if self.kind == "kashin":
            return 0.0
        return self.inner.noise_error((self.length(size_of(shape)),), num_workers)


def rotate(compressor: Compressor, key: Any = None, *, kind: str = "hadamard") -> Compressor:
    """Compresses a randomly rotated leaf and rotates back: ``C(x) = R^-1 C'(R x)``.

    After the rotation all coordinates have similar sizes. So quantisers that scale by the largest
    magnitude lose much less, and so do sparsifiers that choose without looking at the values. For
    the two orthonormal kinds, the constants of the inner compressor hold at the rotated length D.

    Args:
      compressor: any compressor of single leaves without state.
      key: a JAX random key or an int; step, leaf and worker are folded in.
      kind: ``"hadamard"`` takes random signs and the Walsh-Hadamard transform, and D is the next
        power of two; ``"dft"`` takes random phases and the Fourier transform, and D is even;
        ``"kashin"`` takes coefficients in a redundant Hadamard frame, with D up to 2.4 d. These are
        even flatter, but the map is not a rotation.

    Returns:
      The compressor. Bits: 32 for the seed, and those of the inner compressor for D values.

    Raises:
      TypeError: without a key, or if ``compressor`` is not a compressor of single leaves.
      ValueError: for another kind.

    Example:
      Signs reproduce a single spike once the rotation has spread it:

      >>> import ef_optax as ef, jax, numpy as np
      >>> compressor = ef.rotate(ef.scaled_sign(), key=0)
      >>> x = 2 * np.eye(16, dtype="f4")[3]
      >>> out, _ = jax.jit(compressor.update)(x, compressor.init(x))
      >>> np.allclose(out, x, atol=1e-5), compressor.bits((16,))
      (True, 80)

    References:
      Suresh, Yu, Kumar, McMahan, Distributed mean estimation, 2017, section 3 (Hadamard);
      Lyubarskii, Vershynin, Uncertainty principles and vector quantization, 2010 (Kashin).
    """
    inner = single_codec(compressor, "rotate", "compressor")
    check.word("rotate", "kind", kind, TRANSFORMS)
    return Compressor(Rotated(inner, as_key(key, "rotate"), kind))
