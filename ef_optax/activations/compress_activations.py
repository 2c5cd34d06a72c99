"""Activations and their gradients compressed where they cross a cut, without a memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._exchange import collectives as coll
from ef_optax.activations import _cut
from ef_optax.compressors.compressor import Compressor


def compress_activations(
    forward: Compressor,
    backward: Compressor | None = None,
    *,
    axis_name: coll.AxisName = None,
    pairs: _cut.Pairs | None = None,
) -> Callable[..., jax.Array]:
    """A function for a cut of a model: it sends C(x) forward, and C'(gradient) back.

    The receiver goes on with ``y = C(x)``. In the backward pass the gradient with respect to y is
    compressed, sent back and taken for the gradient with respect to x, as if C were the identity.
    Both messages are packed: over a mesh axis, exactly their bits cross in a ``ppermute``.

    A model that was trained with compressed activations needs the same compression when it is used.
    In a study with ResNet-18, top-k of a tenth was the sparsest that did no severe harm, and
    gradients needed milder compression than activations (Rudakov et al.).

    Args:
      forward: the compressor C of activations, for each example by itself.
      backward: the compressor C' of their gradients; None sends them as they are.
      axis_name: the axis of the surrounding ``jax.shard_map`` along which the stages are; None for
        a model in one process, where the values are compressed and nothing moves.
      pairs: (sender, receiver) of each link; None for each stage to the next.

    Returns:
      The function ``cut(x, step=None) -> y``. ``x`` is a floating array whose first axis is that of
      the examples; ``y`` is like it, and zero on a stage that receives nothing. ``step`` is the
      number of the step, an int or an int32 scalar, and must be given to compressors with a key.
      The cut has a gradient, but no forward-mode derivative.

    Raises:
      ValueError: for a compressor with its own protocol or with state, bad ``pairs``, or a step
        that is not given but needed.
      TypeError: if ``forward`` or ``backward`` is no compressor, or ``x`` is not floating-point.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> cut = ef.activations.compress_activations(ef.block_quantize(3), ef.top_k(k=1))
      >>> loss = lambda w, x: jnp.sum(cut(w * x) * jnp.array([1.0, 2.0, 3.0]))
      >>> x = jnp.array([[6.0, -2.5, 0.0]])  # one example
      >>> jax.jit(cut)(x).tolist()
      [[6.0, -2.0, 0.0]]
      >>> jax.jit(jax.grad(loss, 1))(1.0, x).tolist()  # the largest value of the gradient
      [[0.0, 0.0, 3.0]]

    References:
      Rudakov, Beznosikov, Kholodov, Gasnikov, Activations and gradients compression for
      model-parallel training, 2024.
    """
    cut = _cut.cut_for("compress_activations", axis_name, pairs)
    there = _cut.codec_for(cut.name, "forward", forward)
    back = _cut.codec_for(cut.name, "backward", backward)
    sent_back = cut.gradient_path(back)

    def cross(x: Any, step: Any = None) -> jax.Array:
        x = cut.batch(x)
        step = _cut.checked_step(cut.name, step, [there, back])
        message = cut.encode(there, jax.lax.stop_gradient(x), step, _cut.FORWARD)
        received = _cut.decode(there, cut.forward(message), x)
        y = jnp.where(cut.receives(), received, jnp.zeros_like(received))
        return sent_back(x, y, step)

    return cross
