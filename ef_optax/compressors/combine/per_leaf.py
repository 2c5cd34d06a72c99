"""A policy that chooses the compressor of each leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.messageless import MessagelessCodec
from ef_optax._core.policy import LeafPolicy, for_leaf
from ef_optax._core.traits import Traits
from ef_optax._numeric.shapes import Shape
from ef_optax.compressors.compressor import Compressor, codec_of

Policy = Callable[[str, jax.ShapeDtypeStruct], Compressor]


@dataclasses.dataclass(frozen=True)
class PerLeaf(MessagelessCodec, LeafPolicy):
    """A policy that chooses the compressor of each leaf by its path, shape and dtype."""

    policy: Policy
    why: ClassVar[str] = (
        "its codec depends on the leaf. Ask codec.for_leaf(path, like), or "
        "ef_optax.message_bits(compressor, params)."
    )

    @property
    def traits(self) -> Traits:
        return Traits(stateful=True)

    def for_leaf(self, path: str, like: jax.ShapeDtypeStruct) -> Codec:
        chosen = codec_of(self.policy(path, like), f"policy({path!r})")
        return for_leaf(chosen, path, like)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        raise self.refusal("bits")


def per_leaf(policy: Policy) -> Compressor:
    """Chooses a compressor for each leaf by its path, shape or size.

    Args:
      policy: ``policy(path, leaf) -> Compressor`` with ``path`` like ``"dense/kernel"`` and
        ``leaf`` a ``jax.ShapeDtypeStruct`` (``leaf.shape``, ``leaf.dtype``, ``leaf.size``). It is
        called while tracing, and must depend only on these two.

    Returns:
      The compressor.

    Raises:
      TypeError: if ``policy`` is not callable, or, when it is used, returns something else.

    Example:
      Biases and other small leaves travel dense, the rest by top-1%:

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
