"""Updates and states that do not belong together, and what to say about them."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._numeric import trees

Init = Callable[..., Any]
PACKAGE = Path(__file__).parents[1]

ALL_WORKERS = (
    "Gradients of all workers, with a leading worker axis, go to a lifted chain, "
    "ef_optax.simulate(...) or ef_optax.data_parallel(...); here they are those of one worker."
)


def as_array(g: Any) -> Any:
    """A number of Python, or an array of NumPy, as an array of JAX; other leaves as they are."""
    numeric = isinstance(g, bool | int | float | np.ndarray) and np.result_type(g).kind in "biuf"
    return jnp.asarray(g, jnp.result_type(g)) if numeric else g


def check_shapes(updates: Any, params: Any) -> None:
    """Refuses gradients that are not shaped like the parameters, which would be broadcast.

    Raises:
      ValueError: with the first leaf that differs, and the usual cause.
    """
    given, wanted = _shapes(updates), _shapes(params)
    if params is None or given == wanted or len(given) != len(wanted):
        return  # trees of other structures are refused where they are used
    for (path, g), shape in zip(jax.tree.leaves_with_path(updates), wanted, strict=True):
        if jnp.shape(g) != shape:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"updates{name} has shape {jnp.shape(g)}, but params{name} has {shape}. "
                f"{ALL_WORKERS}"
            )


def check_results(init_fn: Init, given: tuple[Any, Any], results: tuple[Any, Any]) -> None:
    """Refuses results of other shapes than the updates and the state that were given.

    Something was broadcast then, which no operation refuses; a rule that splits its updates over
    the workers may have such results, and is left alone.

    Raises:
      ValueError: if the state has not the shapes of one for these updates.
    """
    same = jax.tree.structure(results[1]) == jax.tree.structure(given[1])
    if same and any(_shapes(a) != _shapes(b) for a, b in zip(given, results, strict=True)):
        _compare(init_fn, *given, None)


def explain(init_fn: Init, updates: Any, state: Any, error: Exception) -> None:
    """Says so if a step failed because the state is not one for these updates.

    Raises:
      ValueError: with the first difference to the state that ``init_fn`` makes.
    """
    if not _says_why(error):
        _compare(init_fn, updates, state, error)


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [jnp.shape(x) for x in jax.tree.leaves(tree)]


def _says_why(error: Exception) -> bool:
    """Whether an error is one of this library's own, which names what is wrong."""
    if isinstance(error, AttributeError) or "JAX has removed" in str(vars(error)):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(PACKAGE)


def _compare(init_fn: Init, updates: Any, state: Any, error: Exception | None) -> None:
    """Raises if ``state`` is not like the one that ``init_fn`` makes of these updates."""
    try:
        expected = jax.eval_shape(init_fn, updates)
    except Exception:  # the gradients alone are at fault, and the first error says how
        return
    if jax.tree.structure(state) != jax.tree.structure(expected):
        if error is None:  # a rule inside of another may have a state of another form
            return
        what = trees.difference(state, expected)
    elif _shapes(state) != _shapes(expected):
        located = zip(jax.tree.leaves_with_path(state), _shapes(expected), strict=True)
        what = next(
            f"{jax.tree_util.keystr(path)} has shape {jnp.shape(x)}, expected {shape}"
            for (path, x), shape in located
            if jnp.shape(x) != shape
        )
    else:
        return
    raise ValueError(
        f"state does not belong to this rule and these updates: {what}. Make it with the rule's "
        f"own init, from the parameters whose gradients these are. {ALL_WORKERS}"
    ) from error
