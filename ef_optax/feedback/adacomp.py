"""AdaComp (Chen et al. 2018): sends what one more gradient would lift above its bin's maximum.

G = r + dW ;  H = G + dW ;  per bin: gmax = max|G| ;  send i if |H_i| >= gmax
sent value: sign(G_i) times the leaf's mean of gmax ;  r = G - sent
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.extend import (
    Array,
    AxisName,
    Codec,
    Exchange,
    ExchangeState,
    MemoryLike,
    Message,
    Shape,
    as_transformation,
    bits_of,
    check,
    memory_for,
    pack,
    size_of,
    trees,
    unpack,
    wide_dtype,
)


class AdaCompState(NamedTuple):
    """State of :func:`adacomp`."""

    residual: Any  # per worker, like the parameters: r
    exchange: ExchangeState


@dataclasses.dataclass(frozen=True)
class ThreeLevels(Codec):
    """Two bits per entry, and s; exact for leaves whose entries are -s, 0 or s."""

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        flat = x.reshape(-1)
        codes = jnp.where(flat > 0, 1, jnp.where(flat < 0, 2, 0)).astype(jnp.uint32)
        return {"codes": pack(codes, 2), "scale": jnp.max(jnp.abs(flat), initial=0)[None]}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        codes = unpack(message["codes"], 2, size_of(like.shape))
        scale = message["scale"][0].astype(like.dtype)
        level = jnp.where(codes == 1, scale, jnp.where(codes == 2, -scale, 0))
        return level.astype(like.dtype).reshape(like.shape)

    def support(self, x: Array, message: Message) -> Array:
        del message
        return x != 0

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return 2 * size_of(shape) + bits_of(wide_dtype(dtype))


def adacomp(
    bin_size: int, *, axis_name: AxisName = None, memory: MemoryLike = None
) -> optax.GradientTransformationExtraArgs:
    r"""AdaComp: in each bin the data decide how much is sent.

    .. math:: G = r + g, \quad H = G + g, \quad
              c_j = \text{sign}(G_j)\,\overline{\max_{\text{bin}}|G|}\ \text{where}\
              |H_j| \ge \max_{\text{bin}} |G|, \quad r' = G - c, \quad \text{emit mean}_i\,c_i

    The number of entries that are sent depends on the data, and papers count these. This program
    sends two bits for every entry (none, plus, minus) and one scale per leaf.

    Args:
      bin_size: entries of a bin: 50 for convolutions and 500 for other layers in the publication;
        the last bin of a leaf may be shorter.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which the residual is stored, as in :func:`error_feedback`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is an :class:`AdaCompState`.

    Raises:
      ValueError: for a bin size below 1.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx, g = ef.adacomp(2), jnp.array([4.0, 1.0, 3.0, 2.0])
      >>> updates, state = jax.jit(tx.update)(g, tx.init(g))
      >>> updates.tolist(), state.residual.tolist()
      ([3.5, 0.0, 3.5, 3.5], [0.5, 1.0, -0.5, -1.5])

    References:
      Chen, Choi, Brand, Agrawal, Zhang, Gopalakrishnan, "AdaComp: Adaptive Residual Gradient
      Compression for Data-Parallel Distributed Training", AAAI 2018.
    """
    check.count("adacomp", "bin_size", bin_size)
    exchange = Exchange(ThreeLevels(), axis_name)
    memory = memory_for(memory, axis_name)

    def chosen(r: Array, dW: Array) -> Array:
        """The three levels that are sent of one leaf."""
        G = (r + dW).reshape(-1)
        bins = -(-G.size // bin_size)
        padded = jnp.pad(jnp.abs(G), (0, bins * bin_size - G.size)).reshape(bins, bin_size)
        gmax = jnp.max(padded, axis=1, initial=0)
        H = G + dW.reshape(-1)
        # Not ">=", which is false for every entry of a bin with a NaN: the bin would send nothing.
        send = ~(jnp.abs(H) < jnp.repeat(gmax, bin_size)[: G.size])
        scale = jnp.sum(gmax) / jnp.asarray(max(bins, 1), gmax.dtype)
        return jnp.where(send, jnp.sign(G) * scale, 0).reshape(r.shape)

    def init_fn(params: Any) -> AdaCompState:
        r = memory.zeros(params)
        return AdaCompState(residual=r, exchange=exchange.init(memory.read(r)))

    def update_fn(
        updates: Any, state: AdaCompState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, AdaCompState]:
        del params, extra_args
        r = memory.read(state.residual)
        dW = jax.tree.map(lambda g, r: g.astype(r.dtype), updates, r)
        levels = jax.tree.map(chosen, r, dW)
        out = exchange(levels, state.exchange, want=("sent",))
        r = trees.sub(trees.add(r, dW), out.sent)
        r = memory.write(r, state.residual, out.state.step)
        return trees.emit(out.aggregate, updates), AdaCompState(r, out.state)

    return as_transformation(init_fn, update_fn)
