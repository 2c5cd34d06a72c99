"""Memories in the host's memory, from which they are fetched for each step."""

from __future__ import annotations

import dataclasses

from ef_optax.extend import Memory, MemoryLike, memory_for


def on_host(memory: MemoryLike = None) -> Memory:
    """Keeps a rule's memories in the memory of the host, for the option ``memory`` of every rule.

    Between two steps the device holds nothing of them. In a step they are copied to the device, and
    what is remembered then is copied back. Both copies are in the compiled program, so the compiler
    can overlap them with the passes through the model. The numbers are those without ``on_host``.
    A copy takes the bytes of the memory divided by the bandwidth of the bus twice a step, so it
    helps to store it in fewer bytes as well. Small numbers, such as what is lost by rounding, stay
    on the device.

    A lift puts the state where it belongs. For a ``jax.shard_map`` of your own, put it on the mesh
    with the memory kinds that its leaves have; ``jax.pmap`` takes nothing from the host's memory.

    Args:
      memory: how the memories are stored, as without ``on_host``: None for float32, a floating
        dtype, or a compressor such as ``ef.block_quantize(8, block=128, key=0)``.

    Returns:
      The value of the option ``memory``.

    Raises:
      ValueError: for a ``memory`` that is none; and at init, if the devices have no memory of kind
        ``"pinned_host"``.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.error_feedback(ef.top_k(k=1), memory=ef.on_host())
      >>> _, state = tx.update(jnp.array([3.0, 2.0]), tx.init(jnp.zeros(2)))
      >>> state.residual.message.sharding.memory_kind
      'pinned_host'
      >>> state.residual.wide().tolist()
      [0.0, 2.0]

    References:
      The residual of SparseLoCo's production code lies in pinned memory of the host; the bytes per
      parameter of each format are those of :func:`ef_optax.measure.state_bytes`.
    """
    return dataclasses.replace(memory_for(memory), host=True)
