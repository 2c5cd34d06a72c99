"""Faults of the optimizers of the literature, and of the parts that were made for them."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

HERE = "ef_optax/recipes"
RECIPES = "tests/recipes/test_recipes.py"
NUMPY = f"{RECIPES}::test_recipes_against_numpy"

MUTATIONS = (
    Mutation(
        "signum: the momentum takes the dtype of the gradients",
        f"{HERE}/signum.py",
        "kept = memory.write(m, state.momentum, state.vote.exchange.step)",
        "kept = trees.emit(m, updates)",
        (f"{RECIPES}::test_signum_keeps_its_momentum_in_float32",),
    ),
    Mutation(
        "DeMo: the momentum does not decay",
        f"{HERE}/demo.py",
        "decay=decay, memory=memory",
        "memory=memory",
        (NUMPY,),
    ),
    Mutation(
        "DeMo: the step is the mean itself, without its sign",
        f"{HERE}/demo.py",
        "        optax.scale_by_sign(),\n",
        "",
        (NUMPY,),
    ),
    Mutation(
        "DisTrO: what was sent is subtracted before the look-ahead",
        f"{HERE}/distro.py",
        "jnp.sign(x).astype(jnp.int8), d)",
        "jnp.sign(x).astype(jnp.int8), memory.read(feedback.residual))",
        (NUMPY,),
    ),
    Mutation(
        "DisTrO: the look-ahead is made with the rate of the next step",
        f"{HERE}/distro.py",
        "last = jnp.asarray(rate, state.last_rate.dtype)",
        "last = jnp.asarray(arguments.value_at(learning_rate, feedback.exchange.step), rate.dtype)",
        (NUMPY,),
    ),
    Mutation(
        "DisTrO: values travel instead of votes",
        f"{HERE}/distro.py",
        "values=sign() if votes else None",
        "values=None",
        (f"{RECIPES}::test_distro_counts_votes",),
    ),
    Mutation(
        "the mean over senders: coefficients are counted as values of the leaf",
        "ef_optax/exchanges/senders.py",
        "        if isinstance(codec, CoefficientCodec):\n            return (yield",
        "        if False:\n            return (yield",
        (NUMPY,),
    ),
    Mutation(
        "the mean over senders: the votes are subtracted from the residual",
        "ef_optax/exchanges/senders.py",
        "residual=lambda: codec.residual(x, message),",
        "residual=lambda: x - codec.decode(self._unpacked(jax.tree.map(lambda m: m[None], "
        "self._packed(message, workers)), message), like),",
        ("tests/exchanges/test_transports.py::test_votes_travel_and_values_are_subtracted",),
    ),
)
