"""A decoder-only transformer in Flax: rotary positions, RMS norm before each part, no biases.

Matrices are separate leaves of two dimensions (query, key, value and output of attention, up and
down of the perceptron), because optimizers that orthogonalise or factor a matrix should see each
one by itself. Initial values are Flax's defaults, of variance 1 / fan-in; the last matrix of each
part is divided by the square root of their number, so the sum of all parts has variance about 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Size(NamedTuple):
    """12 x layers x width^2 parameters, without the embedding and the head."""

    layers: int
    width: int
    heads: int


SIZES = {
    "0.2M": Size(2, 96, 4),
    "1M": Size(5, 128, 4),
    "3M": Size(4, 256, 4),
    "10M": Size(6, 384, 6),
    "25M": Size(8, 512, 8),
    "85M": Size(12, 768, 12),
    "300M": Size(24, 1024, 16),
    "1B": Size(20, 2048, 16),
}
"""By the number of parameters that they have without the embedding and the head."""


def rotate(x: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary positions (Su et al. 2021): pairs of features turned by position x frequency.

    Args:
      x: (batch, length, heads, features), with an even number of features.
      base: the slowest pair turns by `1 / base` of the fastest.

    Returns:
      The same shape and dtype. Scalar products of two of its positions depend on their distance.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequencies
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Block(nn.Module):
    """Attention to the past, then a perceptron; each is added to what comes in."""

    size: Size
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layers, width, heads = self.size
        last = nn.initializers.variance_scaling(1 / (2 * layers), "fan_in", "truncated_normal")

        def dense(features: int, name: str, init: Any = nn.linear.default_kernel_init) -> nn.Dense:
            return nn.Dense(features, False, self.dtype, kernel_init=init, name=name)

        y = nn.RMSNorm(dtype=self.dtype, name="attention_norm")(x)
        per_head = (*x.shape[:2], heads, width // heads)
        query, key, value = (
            dense(width, name)(y).reshape(per_head) for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        x = x + dense(width, "output", last)(y.reshape(x.shape))
        y = nn.RMSNorm(dtype=self.dtype, name="perceptron_norm")(x)
        return x + dense(width, "down", last)(nn.gelu(dense(4 * width, "up")(y)))


class Transformer(nn.Module):
    """Logits of the next token after every token.

    Attributes:
      vocabulary: number of different tokens.
      size: one of the values of `SIZES`, or another.
      dtype: of activations and matrix products; parameters, logits and norms' sums are float32.
      remat: keep only what goes into each block, and compute the rest again in the backward pass.
    """

    vocabulary: int
    size: Size
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(batch, length) integers -> (batch, length, vocabulary) float32."""
        block = nn.remat(Block) if self.remat else Block
        x = nn.Embed(self.vocabulary, self.size.width, self.dtype, name="embedding")(tokens)
        for layer in range(self.size.layers):
            x = block(self.size, self.dtype, name=f"block_{layer}")(x)
        x = nn.RMSNorm(dtype=self.dtype, name="norm")(x)
        # The cross entropy takes exponentials of the logits: their dtype is float32 in any case.
        logits = nn.Dense(self.vocabulary, False, self.dtype, name="head")(x)
        return logits.astype(jnp.float32)
