"""Query points: the points at which rules need gradients, on the same minibatch.

MARINA, PAGE, STORM and others need the gradient at the last iterate *on this step's batch*; with
the stored minibatch gradient of the last step they would be other algorithms. Such a rule keeps its
points in its state; its State class has a method ``points(params) -> {name: tree like params}``.

A rule with local steps needs no gradient at the common parameters. Its point has the name
``"params"`` and takes their place, so that one gradient is computed and not two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class HessianVector(NamedTuple):
    """A query for the product of the Hessian at ``point`` with ``tangent``."""

    point: Any
    tangent: Any


@jax.tree_util.register_pytree_node_class
class Points(dict[str, Any]):
    """Points by name; ``"params"`` is always among them. See :func:`query_points`.

    Attributes:
      own_params: whether ``"params"`` has a leading worker axis: each worker has its own model.
    """

    own_params: bool = False

    def tree_flatten(self) -> tuple[list[Any], tuple[tuple[str, ...], bool]]:
        names = tuple(sorted(self))
        return [self[name] for name in names], (names, self.own_params)

    @classmethod
    def tree_unflatten(cls, static: tuple[tuple[str, ...], bool], children: list[Any]) -> Points:
        names, own = static
        points = cls(zip(names, children, strict=True))
        points.own_params = own
        return points


def _has_points(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, "_fields") and hasattr(type(x), "points")


def query_points(opt_state: Any, params: Any) -> Points:
    """Collects the points at which the rules of a chain need gradients in this step.

    Args:
      opt_state: the state of a chain, lifted or not.
      params: the parameters.

    Returns:
      A :class:`Points` dictionary with ``"params"`` and the points of the rules. Give it to
      :func:`worker_value_and_grad` in place of the parameters, and pass the result on:
      ``update(grads["params"], state, params, grads=grads)``.

    Raises:
      ValueError: if two rules in one chain use the same name for different points.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.error_feedback(ef.top_k(0.1))
      >>> sorted(ef.query_points(tx.init(jnp.zeros(3)), jnp.zeros(3)))
      ['params']
    """
    points, moved = Points({"params": params}), False
    for node in jax.tree.leaves(opt_state, is_leaf=_has_points):
        if not _has_points(node):
            continue
        for name, point in node.points(params).items():
            if name in points and (name != "params" or moved):
                raise ValueError(f"query_points: two rules in the chain ask for a point {name!r}.")
            moved = moved or name == "params"
            points[name] = point
    pairs = zip(jax.tree.leaves(points["params"]), jax.tree.leaves(params), strict=True)
    points.own_params = moved and any(jnp.ndim(x) > jnp.ndim(p) for x, p in pairs)
    return points
