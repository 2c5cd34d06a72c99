"""The map over workers: how a function of one worker's arrays runs on all workers.

``data_parallel``, ``simulate`` and ``worker_value_and_grad`` are written once, on top of
:class:`WorkerMap`. Its implementations define what a worker is: a device of a mesh (``mesh``) or an
index of a ``vmap`` axis (``simulation``).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jax.sharding import Sharding

from ef_optax._core import context
from ef_optax._exchange.collectives import AxisName, axis_names
from ef_optax._numeric import check

Sizes = tuple[int, ...]

Tracing = Callable[[Callable[..., Any]], Callable[..., tuple[Any, Any]]]
"""From one worker's function makes one that returns its trace and the shapes of its results."""


def without_devices(axis_name: AxisName, sizes: Sizes) -> Tracing:
    """Traces one worker's functions among as many workers."""
    axes = list(zip(axis_names(axis_name), sizes, strict=True))
    return functools.partial(jax.make_jaxpr, axis_env=axes, return_shape=True)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one array holds the arrays of all workers. A layout is a leaf of trees.

    Attributes:
      axes: the worker axes along which the workers' arrays differ. If there are none, all workers
        have the same array.
      divided: whether the leading dimension is divided among the workers, like that of a batch;
        otherwise an array that differs has one more leading dimension, of length n.
    """

    axes: frozenset[str] = frozenset()
    divided: bool = False

    @property
    def stacked(self) -> bool:
        """Whether there is a leading worker axis."""
        return bool(self.axes) and not self.divided


SAME = Layout()
"""The layout of an array that is equal on all workers."""


def each(fun: Callable[[Layout, Any], Any], layouts: Any, tree: Any) -> Any:
    """``fun(layout, leaf)`` for every leaf; ``layouts`` is a tree or prefix tree."""
    return jax.tree.map(
        lambda layout, part: jax.tree.map(lambda x: fun(layout, x), part), layouts, tree
    )


class WorkerMap(abc.ABC):
    """Runs functions of one worker on all workers.

    Attributes:
      axis_name: the worker axis, or a tuple of axes, whose collectives the functions may use.
      sizes: the number of workers along each axis.
    """

    axis_name: AxisName
    sizes: Sizes

    @property
    def num_workers(self) -> int:
        """The number of workers over all axes."""
        return math.prod(self.sizes)

    @property
    def own(self) -> Layout:
        """The layout of per-worker arrays, along a leading worker axis."""
        return Layout(frozenset(axis_names(self.axis_name)))

    @property
    def share(self) -> Layout:
        """The layout of an array that is divided among the workers along its leading dimension."""
        return Layout(frozenset(axis_names(self.axis_name)), divided=True)

    @abc.abstractmethod
    def run(
        self,
        fun: Callable[..., Any],
        operands: tuple[Any, ...],
        layouts: tuple[Any, ...],
        results: Any,
        out_specs: Any,
        *,
        place: bool = False,
    ) -> Any:
        """Calls ``fun`` on every worker with its own arrays.

        Args:
          fun: a function of one worker's arrays.
          operands: its arguments, as arrays of all workers.
          layouts: the layout of each argument (trees or prefix trees).
          results: the layout of what ``fun`` returns (a tree or prefix tree).
          out_specs: how the results are split over a mesh, worker axis first (tree or prefix).
          place: whether the results must have these specs; otherwise they may stay where they are
            computed, unless the mesh has typed shardings.

        Returns:
          What ``fun`` returned, as arrays of all workers.
        """

    @property
    def tracing(self) -> Tracing:
        """How one worker's update is traced to find what differs between the workers.

        JAX knows a ``jit`` again where the surrounding map is the same, so this one should look
        like that of :meth:`run`: codecs that are traced here are then not traced there.
        """
        return without_devices(self.axis_name, self.sizes)

    @abc.abstractmethod
    def on_all(self, fun: Callable[[Any], Any], tree: Any) -> Any:
        """Applies ``fun`` to arrays of all workers; its results are the same on all of them."""

    @abc.abstractmethod
    def note(self, params: Any) -> None:
        """Stores what can be read from these parameters, but not from their tracers."""

    @abc.abstractmethod
    def surroundings(self, params: Any) -> context.Lift:
        """What an exchange must know about the model axes of these parameters."""

    @abc.abstractmethod
    def state_specs(
        self,
        tx: optax.GradientTransformation,
        params: Any,
        lift: context.Lift,
        local: Any,
        layouts: Any,
    ) -> Any:
        """The partition spec of each leaf of the state, worker axis first.

        Args:
          tx: one worker's transformation.
          params: parameters, or their shapes and dtypes.
          lift: the :meth:`surroundings` of the parameters.
          local: shapes and dtypes of one worker's state.
          layouts: the layout of each leaf of the state.
        """

    @abc.abstractmethod
    def sharding(self, spec: P, host: bool = False) -> Sharding | None:
        """A spec as a sharding, in the host's memory if asked; None if there are no devices."""


def sizes_of(
    axis: AxisName, num_workers: int | tuple[int, ...], option: str = "num_workers"
) -> Sizes:
    """The number of workers along each axis.

    Raises:
      ValueError: if ``num_workers`` does not give one positive integer for each axis.
    """
    check.axis(axis)
    names = axis_names(axis)
    given = num_workers if isinstance(num_workers, tuple | list) else (num_workers,)
    whole = [s for s in given if isinstance(s, int | np.integer) and not isinstance(s, bool)]
    sizes = tuple(s for s in whole if s >= 1)
    if not names or len(given) != len(names) or len(sizes) != len(names):
        raise ValueError(
            f"{option}={num_workers!r} must give one positive integer for each axis of "
            f"axis_name={axis!r}."
        )
    return tuple(int(s) for s in sizes)
