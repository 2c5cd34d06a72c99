"""What an exchange learns from the lift during tracing: how parameters are split over mesh axes.

An exchange has to know how each leaf is laid out over the model axes of the mesh. It must look this
up by leaf *path*, because transformations between the lift and the exchange (``masked``,
``partition``) change the tree. A context variable carries it, which is set only while the lift
traces; extra arguments would break line searches that forward ``**kwargs``.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec


@dataclasses.dataclass(frozen=True)
class Lift:
    """The context of one lifted transformation.

    Attributes:
      specs: leaf path -> partition spec of the parameter over the model axes.
      axis_sizes: model axis name -> number of slices.
      simulated: whether model axes are emulated by ``vmap`` instead of being devices.
      guarded: whether the lift undoes a skipped step, so that aggregates need not become NaN.
      accepted: whether the lift accepts this worker's gradients, a boolean scalar; None if it has
        not checked them.
      axes: the worker axes of the lift. An exchange over only some of them does not reach all
        workers, so its messages do not carry ``accepted``.
      present: whether this worker takes part in this step, a boolean scalar; None if all do.
    """

    specs: Mapping[str, PartitionSpec] = dataclasses.field(default_factory=dict)
    axis_sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    simulated: bool = False
    guarded: bool = True
    accepted: Any = None
    axes: tuple[str, ...] = ()
    present: Any = None

    def virtual(self) -> Lift:
        """The same lift with emulated model axes, so that it can be traced without devices."""
        return dataclasses.replace(self, simulated=True)


_LIFT: contextvars.ContextVar[Lift | None] = contextvars.ContextVar("ef_optax_lift", default=None)


def current() -> Lift | None:
    """The lift that is being traced, or None in a hand-written map."""
    return _LIFT.get()


@contextlib.contextmanager
def lifting(lift: Lift) -> Iterator[None]:
    """Sets the current lift while it traces the transformation."""
    token = _LIFT.set(lift)
    try:
        yield
    finally:
        _LIFT.reset(token)


def path_string(path: tuple[object, ...]) -> str:
    """The name of a leaf, such as ``a/b/0``; stable between processes, for keys and policies."""
    return jax.tree_util.keystr(path, simple=True, separator="/")  # pyright: ignore


def spec_axes(spec: PartitionSpec | None) -> tuple[str, ...]:
    """The mesh axes that a partition spec names, in order.

    >>> spec_axes(PartitionSpec(None, ("fsdp", "tp")))
    ('fsdp', 'tp')
    """
    names: list[str] = []
    for entry in spec or ():
        if entry is not None:
            names.extend(entry if isinstance(entry, tuple) else (entry,))
    return tuple(names)
