"""The compiled programs of a method: create a state, and run a block of steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import ef_optax as ef
from experiments.arguments import UsageError
from experiments.workers import AXIS, Workers


class State(NamedTuple):
    """What a run carries from step to step, and all that a checkpoint holds."""

    params: Any
    batch_stats: Any  # BatchNorm's running averages; empty for models without
    opt_state: Any


class Training(NamedTuple):
    """What is trained, on which data, and how much of it one call of the program does.

    Attributes:
      variables: seed -> the Flax variables at the start.
      loss_fn: (params, batch, batch_stats) -> (loss of one worker, new batch_stats).
      batches: (seed, epoch) -> the blocks of one epoch, as (steps, examples, ...) arrays. A
        function of these two alone, so that a resumed run repeats it.
      block: steps of one call of the compiled program.
      blocks: calls in an epoch.
      accumulate: micro-batches between two exchanges.
      param_specs: how the parameters are split over the devices of a worker; None: not at all.
    """

    variables: Callable[[Any], Any]
    loss_fn: Callable[..., tuple[jax.Array, Any]]
    batches: Callable[[int, int], Iterator[Any]]
    block: int
    blocks: int
    accumulate: int = 1
    param_specs: Any = None

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.blocks * self.block


class Programs(NamedTuple):
    """The compiled programs of one method; learning rate and seed are inputs."""

    tx: ef.parallel.Lifted
    create: Callable[[int], State]
    run_block: Callable[..., tuple[State, jax.Array]]
    wire: dict[str, Any]


Chain = optax.GradientTransformation | Callable[[Any], optax.GradientTransformation]
"""The optimizer of one worker, or a function of its rate that makes it."""


def build(
    chain: Chain,
    compressor: ef.Compressor,
    training: Training,
    workers: Workers,
) -> Programs:
    """Compiles what trains with the transformation `chain` of one worker.

    Args:
      chain: the optimizer, or a function that makes it from the rate, an input of the program.
      compressor: the size of a message if nothing is sent (one worker).
      training: the model, the data and the steps.
      workers: where it runs.
    """

    def lifted(rate: Any) -> Any:
        return workers.lift(_at(chain, rate), training.param_specs)

    tx = lifted(1.0)
    value_and_grad = workers.value_and_grad(training.loss_fn, training.accumulate)
    block = training.block
    place = workers.replicated
    if training.param_specs is not None:
        place = jax.tree.map(
            lambda spec: NamedSharding(workers.mesh, spec),
            {"params": training.param_specs},
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )
    variables = functools.partial(jax.jit, out_shardings=place)(training.variables)

    def create(seed: int) -> State:
        made = variables(seed)
        opt_state = tx.init(made["params"])
        return State(made["params"], made.get("batch_stats", {}), opt_state)

    def step(tx: Any, state: State, batch: Any) -> tuple[State, jax.Array]:
        points = ef.query_points(state.opt_state, state.params)
        (losses, stats), grads = value_and_grad(points, batch, state.batch_stats)
        updates, opt_state = tx.update(grads["params"], state.opt_state, state.params, grads=grads)
        # If any worker has a NaN, all workers skip the step and its BatchNorm averages.
        stats = jax.tree.map(
            lambda new, old: jnp.where(jnp.isfinite(new), new, old), stats, state.batch_stats
        )
        return State(optax.apply_updates(state.params, updates), stats, opt_state), losses

    def run_block(state: State, rate: jax.Array, batches: Any) -> tuple[State, jax.Array]:
        if optax.tree.get_all_with_path(state.opt_state, "learning_rate"):  # else: a schedule
            opt_state = optax.tree.set(state.opt_state, learning_rate=rate)
            state = state._replace(opt_state=opt_state)
        step_at = functools.partial(step, lifted(rate) if callable(chain) else tx)
        if block == 1:  # not even a loop of one round, see --block_steps
            state, losses = step_at(state, jax.tree.map(lambda x: x[0], batches))
            return state, losses[None]
        return jax.lax.scan(step_at, state, batches)

    state = create(0)
    keep = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(run_block, donate_argnums=0, out_shardings=(keep, None))
    example = next(training.batches(0, 0))
    compiled = jitted.lower(state, np.float32(0), example).compile()
    if workers.count == 1:
        codec = compressor.codec
        bits = [codec.bits(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state.params)]
        wire = {"message_bytes": math.ceil(sum(bits) / 8), "link_bytes": 0}
    elif workers.simulated:
        alone = exchange_alone(_at(chain, 1.0), state.params, workers)
        wire = bytes_sent(ef.wire_report(alone), 1)
    else:
        wire = bytes_sent(ef.wire_report(compiled).along(workers.mesh, AXIS), block)
    return Programs(tx, create, compiled, wire)


def _at(chain: Chain, rate: Any) -> optax.GradientTransformation:
    return chain(rate) if callable(chain) else chain


def exchange_alone(chain: optax.GradientTransformation, params: Any, workers: Workers) -> Any:
    """The update of `chain` compiled for as many CPU devices: what simulated workers would send.

    Raises:
      UsageError: this process has fewer CPU devices.
    """
    devices = jax.devices("cpu")
    if len(devices) < workers.count:
        raise UsageError(
            f"--workers={workers.count}: the bytes of simulated workers are read from a program "
            f"for as many CPU devices, and there are {len(devices)}; unset XLA_FLAGS"
        )
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((workers.count,), (AXIS,), auto, devices=devices[: workers.count])
    tx = ef.data_parallel(chain, mesh, AXIS)
    whole, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(AXIS)))

    def like(tree: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def gradients(state: Any, params: Any, batch: jax.Array) -> Any:
        def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
            return batch.mean() + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))

        value_and_grad = ef.worker_value_and_grad(loss_fn, mesh, AXIS)
        return value_and_grad(ef.query_points(state, params), batch)[1]

    params = like(params, whole)
    state = ef.parallel.abstract_state(tx, params)
    grads = jax.eval_shape(gradients, state, params, jnp.zeros(workers.count))
    update = jax.jit(lambda grads, *rest: tx.update(grads["params"], *rest, grads=grads))
    return update.lower(like(grads, split), state, params).compile()


def bytes_sent(report: ef.measure.WireReport, block: int) -> dict[str, Any]:
    """Bytes that one worker sends to the others in one of the `block` steps of a program.

    What only some of the steps send counts in full, and the result is said to be a bound; how much
    that is, is under `sometimes`. `rounds` lists the collectives of a step: kind, message, whether
    only some steps have it.
    """
    names = ("message_bytes", "link_bytes")
    totals, sometimes = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    collectives = report.collectives
    for item in collectives:
        # A collective in the loop is listed once, with the number of its executions.
        share = 1 if item.times is None else item.times / block
        for name in names:
            totals[name] += share * getattr(item, name)
            sometimes[name] += share * getattr(item, name) * item.conditional
    found: dict[str, Any] = {name: round(total) for name, total in totals.items()}
    if any(item.conditional for item in collectives):
        rounded = {name: round(total) for name, total in sometimes.items()}
        found |= {"at_most": True, "sometimes": rounded}
    times = [(item, 1 if item.times is None else item.times // block) for item in collectives]
    found["rounds"] = [
        [item.kind, item.message_bytes, item.conditional] for item, n in times for _ in range(n)
    ]
    return found
