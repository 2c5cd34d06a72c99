"""Saving and restoring a training state, for another number of workers too.

A checkpoint is an orbax directory: arrays (no pickle) and one JSON item that describes them. It
appears under its name only when it is complete. It includes the residuals, because a run that loses
them takes another course.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ef_optax._core import context
from ef_optax._rules import resting
from ef_optax.parallel import replicas
from ef_optax.parallel.change_workers import change_workers
from ef_optax.parallel.lift import Lifted

VERSION = 1
"""Version of the layout; increased when an older reader could misread a newer checkpoint."""

__all__ = ["Checkpoint", "save_args"]  # save and restore are imported from ef_optax


class Checkpoint(NamedTuple):
    """The result of :func:`restore`."""

    params: Any
    opt_state: Any
    extra: Any
    step: int
    num_workers: int  # of the run that saved it


def save(
    path: str | os.PathLike[str],
    tx: optax.GradientTransformation,
    *,
    params: Any,
    opt_state: Any,
    extra: Any = (),
    step: int = 0,
) -> None:
    """Writes one checkpoint directory, completely or not at all.

    It also stores the number of workers, the axis names, and the fingerprint of the state: name,
    shape and dtype of every leaf. If there are several processes, all of them must call this.

    Args:
      path: the directory to create, one for each saved step; it must not exist.
      tx: the transformation that the state belongs to (lifted or not).
      params: the parameters.
      opt_state: its state, with residuals and random keys.
      extra: any other tree of arrays that the run needs (BatchNorm averages, a data position).
      step: the number of finished steps.

    Raises:
      FileExistsError: if ``path`` exists. ImportError: without orbax-checkpoint.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, tempfile
      >>> tx = ef.simulate(ef.error_feedback(ef.top_k(k=1), axis_name="w"), 2, "w")
      >>> params = jnp.array([1.0, 2.0])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     ef.save(f"{folder}/7", tx, params=params, opt_state=tx.init(params), step=7)
      ...     ef.restore(f"{folder}/7", tx, params=params).step
      7
    """
    ocp = _orbax()
    target = _directory(path)
    if target.exists():
        raise FileExistsError(
            f"path={str(target)!r} exists, and replacing it could lose both checkpoints in a "
            "crash; save every step under its own name and remove old ones afterwards."
        )
    args = save_args(tx, params=params, opt_state=opt_state, extra=extra, step=step)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(target, args)


def save_args(
    tx: optax.GradientTransformation,
    *,
    params: Any,
    opt_state: Any,
    extra: Any = (),
    step: int = 0,
) -> Any:
    """What :func:`save` writes, as arguments for the ``CheckpointManager`` of orbax.

    The manager keeps the last few steps and writes in the background; :func:`restore` reads the
    directory of a step, for another number of workers too.

    Args:
      tx: the transformation that the state belongs to (lifted or not).
      params: the parameters.
      opt_state: its state, with residuals and random keys.
      extra: any other tree of arrays that the run needs.
      step: the number of finished steps.

    Returns:
      An ``orbax.checkpoint.args.Composite`` with the items ``about`` and ``arrays``.

    Raises:
      ImportError: without orbax-checkpoint.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, orbax.checkpoint as ocp, tempfile
      >>> tx = ef.simulate(ef.error_feedback(ef.top_k(k=1), axis_name="w"), 2, "w")
      >>> params = jnp.array([1.0, 2.0])
      >>> args = ef.checkpoint.save_args(tx, params=params, opt_state=tx.init(params), step=7)
      >>> with tempfile.TemporaryDirectory() as folder, ocp.CheckpointManager(folder) as manager:
      ...     manager.save(7, args=args)
      ...     manager.wait_until_finished()
      ...     ef.restore(f"{folder}/{manager.latest_step()}", tx, params=params).step
      True
      7
    """
    ocp = _orbax()
    names, leaves = _named({"params": params, "opt_state": opt_state, "extra": extra})
    about = {
        "version": VERSION,
        "step": int(step),
        "num_workers": tx.num_workers if isinstance(tx, Lifted) else 1,
        "axis_name": tx.axis_name if isinstance(tx, Lifted) else None,
        "fingerprint": [
            [name, _dtype(x), list(np.shape(x))] for name, x in zip(names, leaves, strict=True)
        ],
    }
    arrays = {
        _item(i, names[i]): _as_stored(x) for i, x in enumerate(leaves) if np.size(x)
    }  # orbax refuses empty arrays, so restore creates them
    stored = list(arrays)
    about["checksums"] = [
        [stored[part.leaf], part.begin, part.end, part.low]
        for part in replicas.parts_of(list(arrays.values()))
    ]
    items = {"about": ocp.args.JsonSave(about)}
    if arrays:
        items["arrays"] = ocp.args.StandardSave(arrays)
    return ocp.args.Composite(**items)


def restore(
    path: str | os.PathLike[str],
    tx: optax.GradientTransformation,
    *,
    params: Any,
    opt_state: Any = None,
    extra: Any = (),
) -> Checkpoint:
    """Reads a checkpoint into the shapes, dtypes and devices of the present run.

    The next step is bit-identical to the one that would have followed. If ``tx`` has another number
    of workers than the run that saved the state, :func:`change_workers` adapts it and keeps the
    mean of the residuals.

    Args:
      path: a directory that :func:`save` made.
      tx: the same chain, lifted to the present number of workers.
      params: parameters of the present run (or shapes and dtypes with shardings); their values are
        not used.
      opt_state: a state of the expected form; by default the form that ``tx.init`` makes.
      extra: a tree of the expected form of ``extra``.

    Returns:
      A :class:`Checkpoint`.

    Raises:
      FileNotFoundError: if there is no complete checkpoint at ``path``.
      ValueError: if it was made by another version, if its fingerprint is that of another model or
        chain (the message has the first leaf that differs), or if its files are damaged: what
        cannot be read, and arrays that do not have the checksums with which they were saved.
      ImportError: without orbax-checkpoint.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, tempfile
      >>> tx = ef.error_feedback(ef.top_k(k=1), axis_name="w")
      >>> four, two = ef.simulate(tx, 4, "w"), ef.simulate(tx, 2, "w")
      >>> params = jnp.zeros(1)
      >>> state = four.init(params)._replace(residual=jnp.array([[1.0], [2.0], [3.0], [6.0]]))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     ef.save(f"{folder}/1", four, params=params, opt_state=state)
      ...     ef.restore(f"{folder}/1", two, params=params).opt_state.residual.tolist()
      [[1.5], [4.5]]
    """
    ocp = _orbax()
    source = _directory(path)
    if not (source / "about").is_dir() or not ocp.utils.is_checkpoint_finalized(source):
        raise FileNotFoundError(f"path={str(source)!r} holds no complete checkpoint of ef.save.")
    state = _state_like(tx, params) if opt_state is None else opt_state
    like = {"params": params, "opt_state": state, "extra": extra}
    names, leaves = _named(like)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        where = f"path={str(source)!r}"
        about = _read(checkpointer, source, ocp.args.Composite(about=ocp.args.JsonRestore()))[
            "about"
        ]
        _check(about, tx, names, leaves, where)
        shapes = [tuple(shape) for _, _, shape in about["fingerprint"]]
        wanted = [_as_saved(x, shape) for x, shape in zip(leaves, shapes, strict=True)]
        templates = {_item(i, names[i]): _template(x) for i, x in enumerate(wanted) if x.size}
        arrays: Mapping[str, Any] = {}
        if templates:
            asked = ocp.args.Composite(arrays=ocp.args.StandardRestore(templates))
            arrays = _read(checkpointer, source, asked)["arrays"]
            _check_sums(about.get("checksums", ()), arrays, where)  # older ones have none
    found = [_placed(arrays.get(_item(i, names[i])), x) for i, x in enumerate(wanted)]
    tree = jax.tree.unflatten(jax.tree.structure(like), found)
    if shapes != [np.shape(x) for x in leaves]:
        fresh = tx.init(tree["params"]) if opt_state is None else opt_state
        tree["opt_state"] = change_workers(tree["opt_state"], fresh)
    tree["opt_state"] = resting.returned(tree["opt_state"])
    return Checkpoint(**tree, step=about["step"], num_workers=about["num_workers"])


def _orbax() -> Any:
    """The orbax module, which takes seconds to import and which only checkpoints need."""
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            "ef_optax.save and ef_optax.restore need orbax-checkpoint: "
            "pip install 'ef-optax[experiments]'"
        ) from error
    return ocp


def _directory(path: str | os.PathLike[str]) -> Any:
    """An absolute path, or the path of a storage service (``gs://...``)."""
    from etils import epath  # comes with orbax

    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def _state_like(tx: optax.GradientTransformation, params: Any) -> Any:
    if isinstance(tx, Lifted):
        return tx.abstract_state(params)
    known = all(isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(params))
    return tx.init(params) if known else jax.eval_shape(tx.init, params)


# ---------------------------------------------------------------------------- leaves


def _named(tree: Any) -> tuple[list[str], list[Any]]:
    located = jax.tree_util.tree_leaves_with_path(tree)
    return [context.path_string(path) for path, _ in located], [x for _, x in located]


def _item(index: int, name: str) -> str:
    """The name of a leaf in the checkpoint: readable, and unique for any keys of the tree."""
    return f"{index:05d}.{name.replace('/', '.')}"


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def _dtype(x: Any) -> str:
    return str(jnp.result_type(x))


def _as_stored(x: Any) -> Any:
    if isinstance(x, jax.Array):
        return jax.random.key_data(x) if _is_key(x) else x
    return np.asarray(x, jnp.result_type(x))


def _as_saved(x: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The leaf as it was saved, on its present devices; rows of other workers are not split."""
    sharding = getattr(x, "sharding", None)
    if isinstance(x, jax.Array) and not x.committed:
        sharding = None  # it may be on the devices of the other leaves
    if shape != np.shape(x) and isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, P(None, *sharding.spec[1:]))
    return jax.ShapeDtypeStruct(shape, jnp.result_type(x), sharding=sharding)


def _template(x: jax.ShapeDtypeStruct) -> Any:
    """The template with which orbax reads a leaf: onto devices, or as a NumPy array."""
    data = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
    if x.sharding is None:
        return np.empty(data.shape, data.dtype)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)


def _placed(value: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
    if value is None:
        return jnp.zeros(x.shape, x.dtype, device=x.sharding)
    if not _is_key(x):
        return jnp.asarray(value)
    impl = jax.random.key_impl(jnp.empty((), x.dtype))
    keys = jax.random.wrap_key_data(jnp.asarray(value), impl=impl)
    return keys if x.sharding is None else jax.device_put(keys, x.sharding)


def _check(
    about: Mapping[str, Any], tx: Any, names: list[str], leaves: list[Any], where: str
) -> None:
    """Refuses another version, another model and another chain."""
    if about["version"] != VERSION:
        raise ValueError(
            f"{where} has layout version {about['version']}, this ef_optax reads {VERSION}; "
            "restore it with the ef_optax that saved it."
        )
    now = tx.num_workers if isinstance(tx, Lifted) else 1
    before = about["num_workers"]
    workers = f"saved with {before} workers of axis {about['axis_name']!r}, now {now}"
    saved = {name: (dtype, tuple(shape)) for name, dtype, shape in about["fingerprint"]}
    here = {name: (_dtype(x), np.shape(x)) for name, x in zip(names, leaves, strict=True)}
    for name in sorted([*here, *saved], key=lambda name: not name.startswith("params")):
        a, b = saved.get(name), here.get(name)
        if a is not None and b is not None and a[0] == b[0]:
            resized = name.startswith("opt_state/") and a[1][1:] == b[1][1:]
            if a[1] == b[1] or (resized and (a[1][:1], b[1][:1]) == ((before,), (now,))):
                continue
        raise ValueError(
            f"{where} belongs to another model or chain: '{name}' is {_spell(a)} there and "
            f"{_spell(b)} here ({workers}). Restore it with the model, chain and codec it was "
            "saved with."
        )


def _read(checkpointer: Any, source: Any, asked: Any) -> Any:
    """What is asked for of a checkpoint, or one line that says why it cannot be read."""
    try:
        return checkpointer.restore(source, asked)
    except Exception as error:  # each layer below has its own, and orbax raises this very class
        known = isinstance(error, ValueError | KeyError | TypeError | OSError)
        if "Gloo" in str(error) or not (known or type(error) is Exception):
            raise  # another process is gone, or memory: that says nothing about the files
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise ValueError(
            f"path={str(source)!r} cannot be read ({reason}): it is damaged or incomplete. Restore "
            "another checkpoint."
        ) from error


def _check_sums(saved: Iterable[Any], arrays: Mapping[str, Any], where: str) -> None:
    """Refuses arrays whose bits are not those that were saved.

    Parts of an array that is now split further are passed over, since no device has them whole.
    """
    for item, begin, end, expected in saved:
        for first, last, data in replicas.local_parts(arrays[item]):
            if all(a <= b for a, b in zip((*first, *end), (*begin, *last), strict=True)):
                cut = zip(begin, end, first, strict=True)
                part = data[tuple(slice(a - origin, b - origin) for a, b, origin in cut)]
                if replicas.checksum(part) != expected:
                    raise ValueError(
                        f"{where} is damaged: '{item}' does not have the checksum with which it "
                        "was saved. Restore another checkpoint."
                    )
                break


def _spell(leaf: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if leaf is None else f"{leaf[0]}[{','.join(map(str, leaf[1]))}]"
