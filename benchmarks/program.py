"""A step as a contender: compiled with donation, with facts about its compiled program."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing


def contender(
    name: str, step: Callable[..., Any], *arguments: jax.Array, kept: int = 1
) -> tuple[timing.Contender, dict[str, float]]:
    """Compiles a step for its arguments; all but the first ``kept`` are donated.

    Arguments that are only overwritten are donated as well. Donated arguments are copied before
    each run, outside the clock.

    Returns:
      The contender, and facts about its compiled program; bytes are divided by the size of the
      first argument. ``peak`` is the memory beyond the arguments: temporary buffers, and results
      that are not written over an argument.
    """
    size = arguments[0].size
    donated = tuple(range(kept, len(arguments)))
    lowered = jax.jit(step, donate_argnums=donated, keep_unused=True).lower(*arguments)
    start = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    shown = {
        "compile_seconds": seconds,
        "bytes_per_element": program.cost_analysis()["bytes accessed"] / size,
        "message_bytes_per_element": new / size,
        "peak_bytes_per_element": (new + memory.temp_size_in_bytes) / size,
    }

    def prepare() -> tuple[jax.Array, ...]:
        fresh = (*arguments[:kept], *(jnp.copy(x) for x in arguments[kept:]))
        return jax.block_until_ready(fresh)

    def run(fresh: tuple[jax.Array, ...]) -> Any:
        return jax.block_until_ready(program(*fresh))

    return timing.Contender(name, prepare, run), shown
