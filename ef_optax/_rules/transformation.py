"""How Optax transformations are made from their two functions."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ef_optax._exchange import monitored
from ef_optax._exchange.exchange import ExchangeState
from ef_optax._numeric import trees
from ef_optax._rules import resting


def as_transformation(
    init_fn: Callable[..., Any], update_fn: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """An Optax transformation from its two functions, whose state may be of any class.

    Optax types the state of an update as a union of pytrees, and a function that names its own
    State class does not match it. The type is lost here and nowhere else.

    If the state has monitored exchanges (:func:`ef_optax.monitor`), they also get the norms of the
    rule's gradient, which an exchange does not know. Memories on the host are on the device while
    the functions run.
    """

    def init(params: Any) -> Any:
        return resting.begun(init_fn, params)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        updates = jax.tree.map(_array, updates)
        _check_shapes(updates, params)

        def run(state: Any) -> tuple[Any, Any]:
            try:
                emitted, after = update_fn(updates, state, params, **extra_args)
            except (AttributeError, TypeError, ValueError) as error:
                if not _says_why(error):
                    _explain(init_fn, updates, state, error)
                raise
            same = jax.tree.structure(after) == jax.tree.structure(state)
            fits = _shapes(emitted) == _shapes(updates) and _shapes(after) == _shapes(state)
            if same and not fits:  # something was broadcast, which no operation refuses
                _explain(init_fn, updates, state, None)
            return emitted, _with_gradient(after, updates)

        return resting.stepped(run, state)

    return optax.GradientTransformationExtraArgs(init, update)


PACKAGE = Path(__file__).parents[1]

ALL_WORKERS = (
    "Gradients of all workers, with a leading worker axis, go to a lifted chain, "
    "ef_optax.simulate(...) or ef_optax.data_parallel(...); here they are those of one worker."
)


def _array(g: Any) -> Any:
    """A number of Python, or an array of NumPy, as an array of JAX; other leaves as they are."""
    numeric = isinstance(g, bool | int | float | np.ndarray) and np.result_type(g).kind in "biuf"
    return jnp.asarray(g, jnp.result_type(g)) if numeric else g


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [jnp.shape(x) for x in jax.tree.leaves(tree)]


def _check_shapes(updates: Any, params: Any) -> None:
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


def _says_why(error: Exception) -> bool:
    """Whether an error is one of this library's own, which names what is wrong."""
    if isinstance(error, AttributeError) or "JAX has removed" in str(vars(error)):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(PACKAGE)


def _explain(
    init_fn: Callable[..., Any], updates: Any, state: Any, error: Exception | None
) -> None:
    """Says so if a step failed because the state is not one for these gradients.

    Raises:
      ValueError: with the first difference to the state that ``init_fn`` makes.
    """
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


def plus(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The updates plus what a transformation makes of them: ``u + tx(u)``.

    Example:
      >>> import jax.numpy as jnp
      >>> both = plus(optax.trace(0.5))  # u + m with m = 0.5 m + u
      >>> both.update(jnp.ones(1), both.init(jnp.zeros(1)))[0].tolist()
      [2.0]
    """
    inner = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        made, state = inner.update(updates, state, params, **extra_args)
        return trees.add(updates, made), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _with_gradient(state: Any, gradient: Any) -> Any:
    def noted(x: Any) -> Any:
        if not (_is_exchange(x) and x.monitor):
            return x
        return x._replace(monitor=monitored.with_gradient(x.monitor, gradient, x.step))

    exchanges = jax.tree.leaves(state, is_leaf=_is_exchange)
    if not any(_is_exchange(x) and x.monitor for x in exchanges):
        return state
    return jax.tree.map(noted, state, is_leaf=_is_exchange)


def _is_exchange(x: Any) -> bool:
    return isinstance(x, ExchangeState)
