"""One worker of the JAX side: ``jax.distributed`` over Gloo, one device."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    from experiments.text import Tokens

PORT = 29400


class Worker:
    """Answers the requests of the benchmark; methods and programs stay ready between them."""

    def __init__(self, number: int, count: int, size: str, rows: int) -> None:
        # Not before jax.distributed has started: these start JAX.
        from jax.sharding import NamedSharding, PartitionSpec

        from benchmarks.slow_network import methods
        from experiments import text

        self.mesh = jax.make_mesh((count,), (methods.AXIS,), (jax.sharding.AxisType.Auto,))
        self.own = NamedSharding(self.mesh, PartitionSpec(methods.AXIS))
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.number, self.count, self.size, self.rows = number, count, size, rows
        self.data = text.load()
        self.tokens = self._rows(self.data.train, np.random.default_rng(0), 64)
        self.loss = methods.loss(size, self.data.vocabulary)
        self.params = jax.tree.map(np.asarray, methods.start(size, self.data.vocabulary))
        self.programs: dict[str, Steps | LateSteps] = {}
        self.steps: dict[str, Any] = {}
        self.evaluate = jax.jit(self.loss)

    def __call__(self, op: str, **options: Any) -> Any:
        return getattr(self, op)(**options)

    def prepare(self, method: str) -> float:
        """Compiles a method's step and takes it once; gives the seconds."""
        begin = time.perf_counter()
        from benchmarks.slow_network.methods import is_late

        make = self._alone if method == "compute" else self._together
        if is_late(method):
            make = self._late
        self.programs[method] = make(method)
        self.programs[method](0)
        self.programs[method].finish()
        return time.perf_counter() - begin

    def run(self, method: str, steps: int) -> dict[str, Any]:
        """Takes one step, then times others.

        Returns:
          The seconds of each of them, the loss of the last, and the bytes that the interface
          received and sent in all of them.
        """
        from benchmarks.slow_network.fleet import timed

        program = self.programs[method]

        def meet() -> None:
            program.finish()
            self.meet()
            if isinstance(program, LateSteps):  # the first step after a pause waits for nothing
                program(0)

        done = timed(program, meet, steps)
        program.finish()
        return done

    def probe(self, kind: str, size: int, times: int) -> list[float]:
        """Seconds of a collective alone, with this many bytes from each worker."""
        from jax.sharding import PartitionSpec

        from benchmarks.slow_network import methods

        def collective(x: jax.Array) -> jax.Array:
            if kind == "gather":
                return jax.lax.all_gather(x, methods.AXIS, tiled=True)
            if kind == "all_to_all":
                whole = x.reshape(self.count, -1)
                return jax.lax.all_to_all(whole, methods.AXIS, 0, 0, tiled=True).reshape(x.shape)
            return jax.lax.psum(x, methods.AXIS)

        spec = PartitionSpec(methods.AXIS)
        program = jax.jit(
            jax.shard_map(
                collective, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False
            )
        )
        each = max(1, size // 4 // self.count) * self.count
        x = jax.make_array_from_process_local_data(self.own, np.ones(each, np.float32))
        jax.block_until_ready(program(x))
        seconds = []
        for _ in range(times):
            self.meet()
            begin = time.perf_counter()
            jax.block_until_ready(program(x))
            seconds.append(time.perf_counter() - begin)
        return seconds

    def codec(self, method: str) -> list[float]:
        """The planner's measurement of a codec, by all workers at the same time.

        A dense mean has a cost too: leaves are put together into one message and taken apart.
        """
        from benchmarks.slow_network import methods
        from ef_optax.measure.planner import timing

        self.meet()
        found = timing.measure(methods.sent(methods.chosen()[method]), statistics.median)
        return [found.own, found.other]

    def learn(
        self, method: str, learning_rate: float, seed: int, steps: int, tuning: bool, every: int
    ) -> dict[str, Any]:
        """Trains from the first step with other rows of text in each.

        Args:
          method: its name.
          learning_rate: Adam's.
          seed: of the first parameters and of the rows.
          steps: how many.
          tuning: whether the losses are those of a split of the training text.
          every: steps between two losses.

        Returns:
          The loss on this worker's part of the held-out rows, at first and after every ``every``
          steps, and the seconds of these steps.
        """
        from benchmarks.slow_network import methods

        data = self.data.hold_out() if tuning else self.data
        tokens = self._rows(data.train, np.random.default_rng([seed, 1]), steps)
        held_out = data.held_out.spread(methods.HELD_OUT, methods.LENGTH + 1)
        own = held_out[self.number :: self.count]
        tx = methods.optimizer(methods.chosen()[method], self.mesh, methods.adam(learning_rate))
        params, state = self._start(tx, methods.start(self.size, data.vocabulary, seed))
        if method not in self.steps:
            step = self._step(tx, params, state)  # compiled here, not in the first timed step
            self.steps[method] = step.lower(params, state, self._placed(tokens[0])).compile()
        losses, seconds, begin = [], [], 0.0
        for i in range(steps + 1):
            if i % every == 0:
                seconds.append(time.perf_counter() - begin)
                local = jax.tree.map(lambda x: x.addressable_shards[0].data, params)
                losses.append(float(self.evaluate(local, own)))
                self.meet()
                begin = time.perf_counter()
            if i < steps:
                done = self.steps[method](params, state, self._placed(tokens[i]))
                params, state, _ = jax.block_until_ready(done)
        return {"losses": losses, "seconds": seconds[1:]}

    def shapes(self) -> dict[str, list[int]]:
        """The shapes of the parameters, by path."""
        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        return {jax.tree_util.keystr(path): list(x.shape) for path, x in leaves}

    def meet(self) -> None:
        """Returns when all workers are there."""
        from jax.experimental import multihost_utils

        multihost_utils.process_allgather(np.zeros(1))

    def _rows(self, text: Tokens, rng: np.random.Generator, steps: int) -> np.ndarray:
        """This worker's rows of text in each step: (steps, rows, tokens)."""
        from benchmarks.slow_network import methods

        length = methods.LENGTH + 1
        starts = rng.integers(text.starts(length), size=(steps, self.count, self.rows))
        return text.windows(starts[:, self.number], length)

    def _place(self, i: int) -> jax.Array:
        """The rows of a step, on the mesh."""
        return self._placed(self.tokens[i % len(self.tokens)])

    def _placed(self, rows: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(self.own, rows)

    def _start(self, tx: Any, params: Any) -> tuple[Any, Any]:
        """Parameters and state on the mesh."""

        def shared(x: jax.Array) -> jax.Array:
            if len(x.sharding.device_set) == self.count:
                return x
            return jax.device_put(np.asarray(x), self.replicated)

        params = jax.device_put(jax.tree.map(np.asarray, params), self.replicated)
        return params, jax.tree.map(shared, tx.init(params))

    def _step(self, tx: Any, params: Any, state: Any) -> Any:
        """The program of a step that exchanges gradients; it writes over what it is given."""
        import optax

        import ef_optax as ef
        from benchmarks.slow_network import methods

        value_and_grad = ef.worker_value_and_grad(self.loss, self.mesh, methods.AXIS)

        def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
            losses, grads = value_and_grad(ef.query_points(state, params), tokens)
            updates, state = tx.update(grads["params"], state, params, grads=grads)
            return optax.apply_updates(params, updates), state, losses

        keep = jax.tree.map(lambda x: x.sharding, (params, state))
        return jax.jit(step, donate_argnums=(0, 1), out_shardings=(*keep, None))

    def _together(self, name: str) -> Steps:
        from benchmarks.slow_network import methods

        if name == methods.LOCAL:
            tx = methods.local_steps(self.mesh)
        else:
            tx = methods.optimizer(methods.chosen()[name], self.mesh)
        params, state = self._start(tx, self.params)
        return Steps(self._step(tx, params, state), params, state, self._place)

    def _late(self, name: str) -> LateSteps:
        """The same in two programs, of which one travels while the other computes."""
        import ef_optax as ef
        from benchmarks.slow_network import methods

        tx = methods.optimizer(methods.chosen()[name], self.mesh)
        params, state = self._start(tx, self.params)
        gradient = ef.worker_value_and_grad(self.loss, self.mesh, methods.AXIS)
        keep = jax.tree.map(lambda x: x.sharding, (params, state))
        update = jax.jit(tx.update, donate_argnums=1, out_shardings=keep)
        zeros = jax.device_put(jax.tree.map(np.zeros_like, self.params), keep[0])
        late = ef.parallel.Overlapped(update, state, zeros)
        return LateSteps(jax.jit(gradient), late, params, self._place)

    def _alone(self, _: str) -> Steps:
        """The same computation without an exchange: the gradient of one worker, and Adam."""
        import optax

        from benchmarks.slow_network import methods

        tx = optax.adam(methods.RATE)

        def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
            loss, grads = jax.value_and_grad(self.loss)(params, tokens)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        device = jax.local_devices()[0]
        params = jax.device_put(self.params, device)
        program = jax.jit(step, donate_argnums=(0, 1))
        place = lambda i: jax.device_put(self.tokens[i % len(self.tokens)], device)  # noqa: E731
        return Steps(program, params, tx.init(params), place)


class Steps:
    """The steps of one program; a call takes a step and gives the loss.

    Args:
      program: ``program(params, state, tokens)`` gives new parameters, a new state and the losses.
      params: the first parameters.
      state: the first state.
      place: the tokens of a step.
    """

    def __init__(
        self, program: Any, params: Any, state: Any, place: Callable[[int], jax.Array]
    ) -> None:
        self.program, self.held, self.place = program, [params, state], place

    def __call__(self, i: int) -> float:
        *self.held[:], loss = jax.block_until_ready(self.program(*self.held, self.place(i)))
        return _mean(loss)

    def finish(self) -> None:
        """Nothing is on its way between two steps."""


class LateSteps:
    """Steps whose updates travel while the next gradient is computed.

    Args:
      gradient: ``gradient(params, tokens)`` gives the losses and the gradients.
      late: the update.
      params: the first parameters.
      place: the tokens of a step.
    """

    def __init__(
        self, gradient: Any, late: Any, params: Any, place: Callable[[int], jax.Array]
    ) -> None:
        import optax

        self.gradient, self.late, self.params, self.place = gradient, late, params, place
        self.apply = jax.jit(optax.apply_updates, donate_argnums=(0, 1))

    def __call__(self, i: int) -> float:
        loss, grads = self.gradient(self.params, self.place(i))
        updates = self.late(grads, self.params)
        self.params = jax.block_until_ready(self.apply(self.params, updates))
        return _mean(loss)

    def finish(self) -> None:
        """Waits for what is on its way."""
        self.late.finish()


def _mean(loss: jax.Array) -> float:
    return float(np.mean(loss.addressable_shards[0].data))


def main(number: str, count: str, address: str, size: str, rows: str) -> None:
    """Joins the others, then answers."""
    from benchmarks.slow_network.fleet import serve

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"{address}:{PORT}", int(count), int(number))
    serve(Worker(int(number), int(count), size, int(rows)))


if __name__ == "__main__":
    main(*sys.argv[1:])
