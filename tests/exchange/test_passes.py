"""How often a step reads a leaf, from the compiled program."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import pytest

import ef_optax as ef
from tests.programs import compiled

SIZE = 1 << 20
LEAF = jax.ShapeDtypeStruct((SIZE,), jnp.float32)


def reading_instructions(text: str) -> list[str]:
    """Instructions of the entry computation that read a full-size leaf."""
    entry = text[text.index("ENTRY") :]
    sizes, readers = {}, []
    for line in entry.splitlines()[1:]:
        found = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = \w+\[([\d,]*)\]\S* ([\w\-]+)\((.*)", line)
        if not found:  # a tuple, or the end
            name = re.match(r"\s*%([\w.\-]+) = \(", line)
            if name and any(sizes.get(x) == SIZE for x in re.findall(r"%([\w.\-]+)", line)):
                readers.append(name[1])
            continue
        name, shape, operation, rest = found.groups()
        sizes[name] = math.prod(int(n) for n in shape.split(",") if n)
        operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        if operation != "parameter" and any(sizes.get(x) == SIZE for x in operands):
            readers.append(name)
    return readers


def test_scaled_sign_with_its_residual_needs_two_passes_and_no_third() -> None:
    """4 bytes for each of: gradient and residual, twice; the new residual; the update.

    So 24 bytes and the bits. The codec accounts for 20, the update of one worker for the rest.
    """
    tx = ef.error_feedback(ef.scaled_sign())
    state = jax.eval_shape(tx.init, LEAF)
    # The state first: donated buffers go to outputs of their shape in order.
    step = jax.jit(lambda g, s: tx.update(g, s)[::-1], donate_argnums=1)
    program = compiled(step.lower(LEAF, state))
    assert program.cost_analysis()["bytes accessed"] <= (20.5 + 4.1) * SIZE
    assert len(reading_instructions(program.as_text())) == 2
    assert program.memory_analysis().temp_size_in_bytes <= 0.2 * SIZE  # bits and partial sums


@pytest.mark.slow
def test_top_k_asks_its_message_whether_the_leaf_is_finite() -> None:
    """Checks add no more than a few scalars to the bytes of the step."""
    codec = ef.top_k(0.01).codec

    def step(check: bool):
        def run(x):
            message = codec.encode(x)
            return message, codec.finite(x, message) if check else True

        return compiled(jax.jit(run).lower(LEAF)).cost_analysis()["bytes accessed"]

    assert step(True) <= step(False) + 0.5 * SIZE


def test_what_the_workers_sent_is_decoded_once_for_all_who_read_the_mean() -> None:
    """Adam's two moments read it in loops of their own; each of them would decode it again."""

    def decodings(*readers) -> int:
        tx = ef.simulate(ef.error_feedback(ef.scaled_sign(), axis_name="w"), 4, "w")

        def step(grads, state):
            updates, state = tx.update(grads, state)
            return [reader(updates) for reader in readers], state

        grads = jax.ShapeDtypeStruct((4, SIZE // 8), jnp.float32)
        state = tx.abstract_state(jax.ShapeDtypeStruct(grads.shape[1:], grads.dtype))
        program = compiled(jax.jit(step).lower(grads, state)).as_text()
        return program.count(" shift-right-logical(")

    one, two = decodings(jnp.sin), decodings(jnp.sin, jnp.cos)
    assert one > 0
    assert two == one
