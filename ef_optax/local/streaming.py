"""Streaming DiLoCo (Douillard et al. 2025): fragments of the model are synchronised in turn.

every step t:             x_i = x_i + Inner(grad f_i(x_i))
t mod H = floor(H/P p):   D_i = x - x_i of fragment p is sent            (p = 1 .. P)
V steps later:            x = x + Outer_p(D_1, ..., D_n) ;  x_i = al x_i + (1 - al) x
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.extend import (
    Array,
    MemoryLike,
    arguments,
    as_transformation,
    check,
    memory_for,
    own_models,
    path_string,
    trees,
)


class StreamingState(NamedTuple):
    """State of :func:`streaming`."""

    step: Array  # int32 scalar: steps made
    ahead: Any  # per worker, like the parameters: x_i - x
    inner: Any  # per worker: the state of the inner optimizer
    outer: tuple[Any, ...]  # the state of the outer chain of each fragment
    waiting: Any  # like the parameters: steps of the common model on their way; () without a delay

    roles = {"inner": "optimizer"}

    def points(self, params: Any) -> dict[str, Any]:
        """Each worker's own model, at which its gradient is taken; the common one needs none."""
        return own_models.own_model("params", self.ahead, params)


def streaming(
    inner: optax.GradientTransformation,
    period: int,
    outer: optax.GradientTransformation,
    fragments: int,
    *,
    fragment_of: Callable[[str], int] | None = None,
    delay: int = 0,
    mixing: float = 0.0,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Local steps whose synchronisation is spread over the steps, fragment by fragment.

    Every H steps each of P fragments is synchronised once, at its own step, so the largest message
    is P times smaller than that of :func:`local_steps`. What is sent at step t is applied ``delay``
    steps later, and the worker keeps a share of what it did meanwhile:

    .. math:: x' = x + \text{Outer}_p(D_1, \dots, D_n), \quad x_i' = \alpha x_i + (1 - \alpha) x'

    With one fragment, no delay and mixing 0 it is :func:`local_steps`; with mixing 1 the workers
    never hear of each other. In a compiled step the exchange itself is not spread over steps: the
    delay follows the published algorithm, and what it hides is up to the runtime.

    Args:
      inner: the optimizer of the local steps, with its rate and its sign.
      period: H, at least P.
      outer: the chain that gets the drifts of one fragment, as for :func:`local_steps`; in the
        publication 4-bit messages, then Nesterov's momentum. Each fragment has its own state.
      fragments: P.
      fragment_of: the number of the fragment, 0 to P - 1, from the path of a leaf
        (``"layer_3/kernel"``); None deals the leaves out in turn, which is the strided pattern of
        the publication for layers of one leaf.
      delay: V, below H; 1 to 5 in the publication.
      mixing: alpha in [0, 1]; 0.5 in the publication with a delay.
      memory: the dtype in which x_i - x is stored, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer; its state is a :class:`StreamingState`. ``update`` takes gradients at
      ``query_points(state, params)["params"]``, and skips bad ones as :func:`local_steps` does.

    Raises:
      TypeError: if ``inner`` or ``outer`` is not an Optax transformation. ValueError: for an option
        out of range, and at init for a fragment that does not exist.

    Example:
      Two fragments are synchronised at odd and even steps:

      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> outer = optax.chain(ef.compressed_mean(ef.identity(), axis_name="w"), optax.scale(-1.0))
      >>> tx = ef.simulate(ef.local.streaming(optax.sgd(1.0), 2, outer, 2), 2, "w")
      >>> params, grads = [jnp.zeros(1)] * 2, [jnp.array([[1.0], [3.0]])] * 2
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(grads, state, params)
      ...     print([float(u[0]) for u in updates])
      [-2.0, 0.0]
      [0.0, -4.0]

    References:
      Douillard et al., "Streaming DiLoCo with overlapping communication", 2025; the steps at which
      fragments are due are those of torchft, local_sgd.py.
    """
    for name, value in (("inner", inner), ("outer", outer)):
        if not isinstance(value, optax.GradientTransformation):
            raise TypeError(f"streaming: {name}={value!r} is not an Optax transformation.")
    check.count("streaming", "fragments", fragments)
    check.count("streaming", "period", period, least=fragments)
    check.count("streaming", "delay", delay, least=0, most=period - 1)
    check.share("streaming", "mixing", mixing)
    inner, outer = optax.with_extra_args_support(inner), optax.with_extra_args_support(outer)
    memory = memory_for(memory)
    due = [period * (p + 1) // fragments % period for p in range(fragments)]

    def init_fn(params: Any) -> StreamingState:
        wide = trees.wide(params)
        owners = _owners(params, fragments, fragment_of)
        return StreamingState(
            step=jnp.zeros((), jnp.int32),
            ahead=memory.zeros(params),
            inner=inner.init(params),
            outer=tuple(outer.init(_part(wide, owners, p)) for p in range(fragments)),
            waiting=memory.zeros(params) if delay else (),
        )

    def update_fn(
        updates: Any, state: StreamingState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, StreamingState]:
        params = arguments.require_params("streaming", params)
        x_i, wide = state.points(params)["params"], trees.wide(params)
        ahead = memory.read(state.ahead)
        ahead, after = own_models.inner_step(inner, updates, state.inner, ahead, x_i, extra_args)
        owners, count = _owners(params, fragments, fragment_of), state.step + 1
        drift, outer_states, sent = trees.scale(-1, ahead), [], {}
        on_its_way = memory.read(state.waiting) if delay else _zeros(wide)
        for p in range(fragments):
            own = _part(wide, owners, p)

            def send(p: int = p, own: Any = own) -> Any:
                with own_models.unwatched():
                    return outer.update(_part(drift, owners, p), state.outer[p], own, **extra_args)

            def keep(p: int = p) -> Any:
                return _part(on_its_way, owners, p), state.outer[p]

            step, new = own_models.every(period, count - due[p], send, keep, None)
            outer_states.append(new)
            sent |= zip((i for i, o in enumerate(owners) if o == p), jax.tree.leaves(step))  # noqa: B905
        steps = jax.tree.unflatten(jax.tree.structure(wide), [sent[i] for i in range(len(owners))])
        now = [(count - delay) % period == due[o] for o in owners]
        flags = jax.tree.unflatten(jax.tree.structure(wide), [n & (count > delay) for n in now])
        moved = jax.tree.map(lambda u, f: jnp.where(f, u, 0), steps, flags)
        left = lambda a, u, f: jnp.where(f, mixing * (a - u), a)  # noqa: E731
        ahead = jax.tree.map(left, ahead, moved, flags)
        return trees.emit(moved, updates), StreamingState(
            step=count,
            ahead=memory.write(ahead, state.ahead, count),
            inner=after,
            outer=tuple(outer_states),
            waiting=memory.write(steps, state.waiting, count, shared=True) if delay else (),
        )

    return as_transformation(init_fn, update_fn)


def _owners(params: Any, fragments: int, fragment_of: Callable[[str], int] | None) -> list[int]:
    """The fragment of each leaf.

    Raises:
      ValueError: for a fragment that does not exist; the message has the leaf.
    """
    paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if fragment_of is None:
        return [i % fragments for i in range(len(paths))]
    owners = [fragment_of(path) for path in paths]
    for path, owner in zip(paths, owners, strict=True):
        if not isinstance(owner, int) or not 0 <= owner < fragments:
            raise ValueError(
                f"streaming: fragment_of({path!r})={owner!r} must be a number from 0 to "
                f"{fragments - 1}."
            )
    return owners


def _part(tree: Any, owners: list[int], p: int) -> Any:
    """The tree with the leaves of one fragment, at their own paths."""
    leaves, treedef = jax.tree.flatten(tree)
    kept = [x if o == p else optax.MaskedNode() for x, o in zip(leaves, owners, strict=True)]
    return jax.tree.unflatten(treedef, kept)


def _zeros(tree: Any) -> Any:
    """Zeros like ``tree`` that are the same on all workers, for JAX's types too."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
