"""Remedies for errors of JAX and of frameworks that do not say what a user of the lift can do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ef_optax._exchange.collectives import AxisName, UnboundAxisError

_KNOWN = {
    "Closing over inputs to shard_map": (
        "a loss or a transformation uses an array of the mesh that is not among its arguments, "
        "which a mesh with Explicit axes does not allow. Pass it: "
        "worker_value_and_grad(loss_fn, mesh, axis_name)(params, batch, *args) calls "
        "loss_fn(params, batch, *args) on every worker. Outside the lift it need not be passed: "
        "optax.chain(ef_optax.data_parallel(rule, mesh, axis_name), linesearch) evaluates its "
        "value_fn outside the workers."
    ),
    "Received incompatible devices": (
        "an argument is committed to devices that are not those of the mesh. Put parameters and "
        "whatever else lies there on the mesh before init, "
        "jax.device_put(params, jax.NamedSharding(mesh, jax.P())); tx.abstract_state(params) has "
        "the shardings with which a state is restored."
    ),
    "Length of device assignment": (
        "some arguments lie on a mesh with Explicit axes and others do not. Put all of them there, "
        "jax.device_put(tree, jax.NamedSharding(mesh, jax.P())), or none: ef_optax.simulate and "
        "worker_value_and_grad(loss_fn, n, axis_name) need no mesh."
    ),
}
"""Part of a message -> its cause and remedy."""


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Raises known errors again with their cause and remedy, and other errors unchanged."""
    try:
        yield
    except (NotImplementedError, ValueError) as error:
        remedy = next((text for part, text in _KNOWN.items() if part in str(error)), None)
        if remedy is None:
            raise
        raise ValueError(f"{remedy} ({str(error).splitlines()[0]})") from error


@contextlib.contextmanager
def workers_along(axis_name: AxisName) -> Iterator[None]:
    """Says of an axis that is not one of workers here what the axis of the workers is.

    Raises:
      NameError: that names both axes.
    """
    try:
        yield
    except NameError as error:
        if isinstance(error, UnboundAxisError):
            what = f"a rule in the chain has axis_name={error.axis!r}"
        elif "unbound axis name" in str(error):
            what = f"a collective is over another axis ({str(error).splitlines()[0]})"
        else:
            raise
        raise NameError(
            f"{what}, but the workers are along axis_name={axis_name!r}. Both must be the same, as "
            f"in ef_optax.simulate(ef_optax.error_feedback(compressor, axis_name={axis_name!r}), "
            f"n, {axis_name!r})."
        ) from error
