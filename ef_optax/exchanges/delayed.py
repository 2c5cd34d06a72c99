"""Messages that travel while the next gradient is computed, and are applied one step late.

all_gather:   C(x_i) of the step before, to all workers
then          C(x_i) of this step is put into the state, to be sent in the next one
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._core.codec import Codec
from ef_optax._core.once import by_value, traced_once
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Gather, Gathered, Message
from ef_optax._core.traits import Traits
from ef_optax._core.transport import Transport, mean_of
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import like_of
from ef_optax.compressors.compressor import Compressor
from ef_optax.exchanges.carried import carried


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """What is static about a message that is on its way: its codec, and the leaf that it is of."""

    codec: Codec
    like: jax.ShapeDtypeStruct

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @functools.cached_property
    def _identity(self) -> Any:
        return by_value(self.codec), self.like.shape, self.like.dtype


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["message", "sent"], meta_fields=["form"]
)
@dataclasses.dataclass(frozen=True)
class OnItsWay:
    """The state of :class:`Delayed` for one leaf.

    Attributes:
      message: per worker: what was encoded in the last step, and is sent in the next one.
      sent: bool scalar: whether there was a last step; without one the message means nothing.
      form: everything static.
    """

    message: Message
    sent: Array
    form: Form

    def of_workers(self) -> Array:
        """What the receivers will decode of every worker's message, if there is a worker axis."""
        form = self.form
        decoded = jax.vmap(lambda message: form.codec.decode(message, form.like))(self.message)
        return jnp.where(self.sent, decoded, 0)


@dataclasses.dataclass(frozen=True)
class Delayed(Transport):
    """Gathers the messages of the step before; this step's message waits for the next one."""

    def run(self, codec: Codec, x: Array, state: OnItsWay, workers: Workers) -> Protocol:
        message, like = traced_once(codec.encode, x, codec.step_key(workers)), like_of(x)
        finite = traced_once(codec.finite, x, message)
        got: Gathered = yield Gather(state.message, finite, early=True)
        mean = mean_of(codec, got, like, workers)
        return Outcome(
            aggregate=jnp.where(state.sent, mean, 0),
            state=OnItsWay(message, jnp.ones((), bool), state.form),
            sent=lambda: traced_once(codec.decode, message, like),
            residual=lambda x=x: traced_once(codec.residual, x, message),
            support=lambda: traced_once(codec.support, x, message),
        )

    def init(self, codec: Codec, like: Any, num_workers: int) -> OnItsWay:
        own = jax.ShapeDtypeStruct(like.shape, like.dtype)
        key = codec.step_key(Workers(num_workers, 0, jnp.zeros((), jnp.int32), np.uint32(0)))
        message = jax.eval_shape(codec.encode, own, key)
        nothing = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), message)
        return OnItsWay(nothing, jnp.zeros((), bool), Form(codec, own))

    def traits(self, codec: Codec) -> Traits:
        return dataclasses.replace(
            codec.traits, additive=False, broadcast=False, streams=False, stateful=True
        )


def delayed(compressor: Compressor) -> Compressor:
    r"""Sends every message one step late, so that it travels while a gradient is computed.

    .. math:: \text{aggregate}_t = \text{mean}_i\, C(x_{i, t-1}), \quad
              \text{aggregate}_0 = 0

    The message of a step is put into the state. The next step sends it, and applies the mean of all
    workers' messages at its end. The transfer needs nothing but the state, and neither the gradient
    nor the residual needs the transfer: a runtime with asynchronous collectives runs them at the
    same time, and a step takes the longer of both and not their sum. What remains in line is one
    number, whether all workers' gradients of this step are finite, which all of them must know.

    Under error feedback ``x_{t+1} = x_t - gamma mean_i c_{i, t-1}``, and the virtual iterate
    ``x - gamma (mean_i e_i + mean_i c_i)``, with the messages c that are on their way, moves by the
    exact mean gradient. A delay of one step needs a learning rate that is a little smaller.

    The messages are part of the state: of checkpoints, and of what is carried over to another
    number of workers, where they are added to the residuals that they were taken from. A rule
    without a residual loses them there.

    Args:
      compressor: what is sent; a stateless compressor of single leaves. Messages are gathered.

    Returns:
      The compressor. Bits: those of the message. It is not additive, since the aggregate is that of
      the step before.

    Raises:
      TypeError: if ``compressor`` is not a stateless Compressor of single leaves whose message one
        worker encodes alone. ValueError: at the first exchange, if messages are weighted.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.error_feedback(ef.exchanges.delayed(ef.top_k(k=1)))
      >>> state = tx.init(jnp.zeros(2))
      >>> for gradient in ([3.0, 2.0], [1.0, 1.0], [0.0, 0.0]):
      ...     updates, state = tx.update(jnp.array(gradient), state)
      ...     print(updates.tolist())
      [0.0, 0.0]
      [3.0, 0.0]
      [0.0, 3.0]

    References:
      Stich, Karimireddy, "The Error-Feedback Framework: Better Rates for SGD with Delayed Gradients
      and Compressed Communication", 2020, with a delay of one step.
    """
    return carried("delayed", compressor, Delayed())
