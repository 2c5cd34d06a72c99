"""The workers of a run: devices, rows of devices that share a model, or simulated on one device."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ef_optax as ef
from experiments import processes
from experiments.arguments import UsageError

AXIS = "data"
INSIDE = "fsdp"
"""The axis of the devices of one worker, each with a part of the model."""


class Workers(NamedTuple):
    """How many there are, and what maps a computation over them."""

    count: int
    devices: list[Any]
    mesh: Mesh
    simulated: bool = False

    @property
    def inside(self) -> int:
        """Devices of one worker."""
        return self.mesh.shape.get(INSIDE, 1)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def lift(self, tx: optax.GradientTransformation, param_specs: Any = None) -> Any:
        """The transformation of one worker for all of them."""
        if self.simulated:
            return ef.simulate(tx, self.count, AXIS)
        return ef.data_parallel(tx, self.mesh, AXIS, param_specs=param_specs)

    def value_and_grad(
        self, loss_fn: Callable[..., Any], accumulate: int = 1
    ) -> Callable[..., Any]:
        """Losses, mean of the auxiliary values and gradients of all workers."""
        where = self.count if self.simulated else self.mesh
        return ef.worker_value_and_grad(
            loss_fn, where, AXIS, has_aux=True, aux_mean=True, accumulate=accumulate
        )

    def put(self, array: np.ndarray) -> jax.Array:
        """Shards a (steps, examples, ...) array; each process contributes its own columns."""
        axes = (AXIS, INSIDE) if self.inside > 1 else AXIS
        by_step = NamedSharding(self.mesh, PartitionSpec(None, axes))
        local = np.split(array, jax.process_count(), axis=1)[jax.process_index()]
        return jax.make_array_from_process_local_data(by_step, local, array.shape)

    def hardware(self) -> str:
        """One phrase for the report."""
        first, count = self.devices[0], self.count * self.inside
        if self.simulated:
            kind = "CPU" if first.platform == "cpu" else first.device_kind
            cores = f" of {os.cpu_count()} cores" if first.platform == "cpu" else ""
            return f"{self.count} workers simulated on one {kind}{cores}"
        if first.platform != "cpu":
            return f"{count} x {first.device_kind}"
        return f"{count} virtual CPU device{'s' if count > 1 else ''} on {os.cpu_count()} cores"


def define_flags(values: flags.FlagValues) -> None:
    """The flags that `start` reads."""
    given: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_integer(
        "workers", 0, "Devices to use; 0: all (8 on a CPU).", lower_bound=0, **given
    )
    flags.DEFINE_bool(
        "multihost", False, "Call jax.distributed.initialize(): one process per host.", **given
    )
    where = "where JAX cannot find it itself."
    flags.DEFINE_string("coordinator", None, f"host:port of process 0 {where}", **given)
    flags.DEFINE_integer("num_processes", None, f"Number of processes {where}", **given)
    flags.DEFINE_integer("process_id", None, f"This process {where}", **given)
    flags.DEFINE_integer(
        "connect_timeout", 300, "Seconds to wait for other processes.", lower_bound=1, **given
    )
    flags.DEFINE_integer(
        "lost_timeout",
        30,
        "Seconds without a sign of life after which another process counts as lost.",
        lower_bound=2,
        **given,
    )


def start(values: flags.FlagValues, inside: int = 1, simulated: bool = False) -> Workers:
    """Starts JAX with the devices that are asked for, and connects the processes.

    Args:
      values: the flags of `define_flags`.
      inside: devices of one worker.
      simulated: all workers on the first device.

    Raises:
      UsageError: there are fewer devices, or the processes do not find each other.
    """
    if values.multihost:
        processes.join(
            values.coordinator,
            values.num_processes,
            values.process_id,
            values.connect_timeout,
            values.lost_timeout,
        )
    elif "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", (values.workers or 8 // inside or 1) * inside)
    devices = jax.devices()
    workers = values.workers or (8 if simulated else len(devices) // inside)
    auto = jax.sharding.AxisType.Auto
    if simulated:
        mesh = jax.make_mesh((1,), (AXIS,), (auto,), devices=devices[:1])
        return Workers(workers, devices, mesh, True)
    needed = workers * inside
    if not workers or needed > len(devices):
        each = f" of {inside} devices each" if inside > 1 else ""
        raise UsageError(f"--workers={workers or 1}{each}, but there are {len(devices)} devices")
    if values.multihost and needed < len(devices):
        raise UsageError(f"--workers={workers}: --multihost uses all {len(devices)} devices")
    shape, names = ((workers,), (AXIS,)) if inside == 1 else ((workers, inside), (AXIS, INSIDE))
    mesh = jax.make_mesh(shape, names, (auto,) * len(shape), devices=devices[:needed])
    return Workers(workers, devices, mesh)
