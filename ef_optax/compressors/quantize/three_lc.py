"""3LC: rounding to three levels, with a sparsity multiplier."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from ef_optax._core.traits import Traits
from ef_optax._numeric import check
from ef_optax._numeric.division import safe_divisor
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.norms import leaf_norm
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.quantize._ternary import TernaryCodec


@dataclasses.dataclass(frozen=True)
class ThreeLC(TernaryCodec):
    """S times x/S rounded to nearest, with S = s M, so that values above S/2 become S."""

    sparsity: float
    packing: str = "quartic"

    @property
    def traits(self) -> Traits:
        return Traits(basis="exact")

    def parts(self, x: Array, key: Array | None) -> tuple[Array, Array]:
        del key
        scale = leaf_norm(x, "linf") * jnp.asarray(self.sparsity, x.dtype)
        return scale, jnp.round(x / safe_divisor(scale))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        """s(2 - s)/(1 + (d - 1) s^2/4), attained if all other values are just not sent."""
        del num_workers
        s = self.sparsity
        return s * (2 - s) / (1 + (max(1, size_of(shape)) - 1) * s**2 / 4)


def three_lc(sparsity: float = 1.0) -> Compressor:
    """3LC: rounds x/S to -1, 0 or 1 with S = ``sparsity`` times the largest magnitude.

    A value is sent, as +-S, iff ``|x| > S/2`` (a tie is not sent). It is deterministic and biased,
    with alpha = s(2 - s)/(1 + (d - 1) s^2/4) (exact), and meant for error feedback. The length of
    3LC's last stage, the zero-run code, depends on the data;
    :func:`ef_optax.measure.zero_run_bits` counts it.

    Args:
      sparsity: s, the sparsity multiplier, 1 <= s < 2; a larger one sends fewer and larger values.

    Returns:
      The compressor. Bits: 32 + 8 ceil(d/5), for five values per byte.

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
    check.static("three_lc", "sparsity", sparsity, lambda s: 1 <= s < 2, "a number in [1, 2)")
    return Compressor(ThreeLC(float(sparsity)))
