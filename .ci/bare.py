"""Run by ``make wheel`` in an environment that holds the wheel and what it requires, nothing else.

Imports every module of the package, trains with error feedback between simulated workers, and asks
for what needs a further package.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from importlib.metadata import distribution
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import ef_optax as ef

# What is installed is the wheel, whole and by itself.
wheel = distribution("ef-optax")
assert Path(ef.__file__).is_relative_to(sys.prefix), ef.__file__
assert wheel.version == ef.__version__
assert {file.parts[0].partition("-")[0] for file in wheel.files} == {"ef_optax"}
assert any(file.name == "py.typed" for file in wheel.files)
core = [text for text in wheel.requires if "extra ==" not in text]
assert {re.split(r"\W", text)[0] for text in core} == {"jax", "jaxlib", "numpy", "optax"}, core
for module in pkgutil.walk_packages(ef.__path__, "ef_optax."):
    importlib.import_module(module.name)

# It trains: eight workers with least squares of their own, one entry in ten on the wire.
features = jax.random.normal(jax.random.key(0), (8, 32, 20))
labels = features @ jnp.arange(20.0)
chain = optax.chain(ef.error_feedback(ef.top_k(0.1), axis_name="data"), optax.sgd(0.02))
tx = ef.simulate(chain, 8, "data")


def loss(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return 0.5 * jnp.mean((a @ w - b) ** 2)


@jax.jit
def step(w, state):
    grads = jax.vmap(jax.grad(loss), (None, 0, 0))(w, features, labels)
    updates, state = tx.update(grads, state, w)
    return optax.apply_updates(w, updates), state


w = jnp.zeros(20)
state = tx.init(w)
start = jnp.mean(jax.vmap(loss, (None, 0, 0))(w, features, labels))
for _ in range(500):
    w, state = jax.block_until_ready(step(w, state))
end = jnp.mean(jax.vmap(loss, (None, 0, 0))(w, features, labels))
assert end < 1e-3 * start, (start, end)

# What needs a further package says which.
try:
    ef.save("checkpoint", tx, params=w, opt_state=state)
except ImportError as error:
    assert "orbax-checkpoint" in str(error)
else:
    raise AssertionError("there is a package here that the wheel does not require")
print(f"ef_optax {ef.__version__}: the loss fell from {start:.3g} to {end:.3g}")
