"""Save and restore: bit-identical on the same workers, mean kept on another number, or refused."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ef_optax as ef


# Optax's Adam mixes dtypes. Module scope, like the checkpoint that most tests share.
@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


SIZES = {"w": (3, 4), "b": (4,), "none": (0, 2), "s": ()}


class NoisyState(optax.TraceState):
    """A per-worker random key in the state."""


def own_noise() -> optax.GradientTransformation:
    """Adds noise from a typed key that differs between workers and advances in the state."""

    def init(params):
        del params
        return NoisyState(jax.random.fold_in(jax.random.key(3), jax.lax.axis_index("data")))

    def update(updates, state, params=None):
        del params
        key, use = jax.random.split(state.trace)
        noise = lambda g: g + 0.01 * jax.random.normal(use, g.shape, g.dtype)  # noqa: E731
        return jax.tree.map(noise, updates), NoisyState(key)

    return optax.GradientTransformation(init, update)


def chain(compressor=None):
    return optax.chain(
        own_noise(),
        optax.trace(0.9),
        ef.error_feedback(compressor or ef.top_k(k=2), axis_name="data"),
        optax.adam(1e-2),
    )


def mesh_of(n):
    return jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])


def draw(rng, lead=()):
    dtypes = {"b": jnp.bfloat16}
    return {
        k: jnp.asarray(rng.normal(size=(*lead, *shape)), dtypes.get(k, jnp.float32))
        for k, shape in SIZES.items()
    }


PARAMS = draw(np.random.default_rng(0))


@functools.cache
def run_of(n):
    """A lifted chain on n devices, its compiled step, and how often the step was traced."""
    mesh, traces = mesh_of(n), []
    tx = ef.data_parallel(chain(), mesh, "data")

    @jax.jit
    def step(params, state, grads):
        traces.append(1)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.device_put(PARAMS, jax.NamedSharding(mesh, P()))
    return tx, step, params, traces


@functools.cache
def two_steps():
    """The state after two steps on two devices."""
    tx, step, params, _ = run_of(2)
    state = tx.init(params)
    for t in range(2):
        params, state = jax.block_until_ready(step(params, state, gradients(t, 2)))
    return params, state


def gradients(t, n):
    return draw(np.random.default_rng(100 + t), (n,))


def host(tree):
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return jax.tree.map(lambda x: np.asarray(data(x)), tree)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, host(a), host(b))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of the state after two steps on two devices."""
    params, state = two_steps()
    path = tmp_path_factory.mktemp("run") / "2"
    extra = {"seen": np.arange(3), "average": jnp.ones(2)}
    ef.save(path, run_of(2)[0], params=params, opt_state=state, extra=extra, step=2)
    return path


EXTRA = {"seen": np.zeros(3, int), "average": jnp.zeros(2)}


def test_the_next_step_is_bit_identical_and_compiles_nothing(saved):
    tx, step, params, traces = run_of(2)
    went_on = step(*two_steps(), gradients(2, 2))
    before = len(traces)
    back = ef.restore(saved, tx, params=params, extra=EXTRA)
    assert (back.step, back.num_workers) == (2, 2)
    same((back.params, back.opt_state), two_steps())
    for a, b in zip(jax.tree.leaves(back.opt_state), jax.tree.leaves(two_steps()[1]), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
    np.testing.assert_array_equal(back.extra["seen"], [0, 1, 2])
    np.testing.assert_array_equal(back.extra["average"], [1, 1])
    same(step(back.params, back.opt_state, gradients(2, 2)), went_on)
    assert len(traces) == before, "the restored state made the step compile again"


@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_another_number_of_workers_keeps_the_mean_residual(saved, n):
    tx, step, params, _ = run_of(n)
    back = ef.restore(saved, tx, params=params, extra=EXTRA)
    old, new = two_steps()[1], back.opt_state
    same(back.params, two_steps()[0])
    assert back.num_workers == 2
    for name in SIZES:
        residual = np.asarray(new[2].residual[name])
        assert residual.shape == (n, *SIZES[name])
        mean = np.asarray(old[2].residual[name]).mean(0)
        np.testing.assert_allclose(residual.mean(0), mean, rtol=1e-6, atol=1e-7)
    same(new[3], old[3])  # Adam's moments are equal on all workers
    fresh = tx.init(params)
    same(new[0], fresh[0])  # and random keys start again
    jax.tree.map(lambda a, b: (a.sharding == b.sharding) or pytest.fail(f"{a}"), new, fresh)
    jax.block_until_ready(step(back.params, new, gradients(2, n)))


def test_a_manager_keeps_the_last_steps_and_restore_reads_them(tmp_path):
    """For another number of workers too, and with what the manager itself adds to a step."""
    import orbax.checkpoint as ocp

    tx, _, params, _ = run_of(2)
    state = two_steps()[1]
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(tmp_path / "run", options=options) as manager:
        for step in range(3):
            args = ef.checkpoint.save_args(tx, params=params, opt_state=state, step=step)
            manager.save(step, args=args, metrics={"loss": 1.0 / (1 + step)})
        manager.wait_until_finished()
        assert manager.all_steps() == [1, 2]
        path = manager.directory / str(manager.latest_step())
    back = ef.restore(path, tx, params=params)
    assert (back.step, back.num_workers) == (2, 2)
    same((back.params, back.opt_state), (params, state))
    three, _, params, _ = run_of(3)
    mean = np.asarray(state[2].residual["w"]).mean(0)
    found = np.asarray(ef.restore(path, three, params=params).opt_state[2].residual["w"])
    assert found.shape == (3, *SIZES["w"])
    np.testing.assert_allclose(found.mean(0), mean, rtol=1e-6, atol=1e-7)


def test_a_simulation_continues_what_a_mesh_has_saved(saved):
    tx = ef.simulate(chain(), 2, "data")
    back = ef.restore(saved, tx, params=PARAMS, extra=EXTRA)
    same((back.params, back.opt_state), two_steps())
    assert not back.opt_state[2].residual["w"].committed  # free to move to the others' devices


def test_one_worker_without_a_lift(tmp_path):
    """Also uncommitted parameters, and a state with its own shape."""
    tx = optax.chain(ef.error_feedback(ef.top_k(k=1)), optax.sgd(0.1))
    params = {"a/b": np.float32(2.0), "a": {"b": np.arange(3.0, dtype=np.float32)}}
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    ef.save(tmp_path / "0", tx, params=params, opt_state=state)
    back = ef.restore(tmp_path / "0", tx, params=jax.eval_shape(lambda: params))
    same(back.opt_state, state)
    same(back.params, jax.tree.map(jnp.asarray, params))
    assert back.num_workers == 1 and back.extra == ()


def test_a_tree_without_arrays(tmp_path):
    ef.save(tmp_path / "0", optax.identity(), params={}, opt_state=optax.EmptyState(), step=3)
    back = ef.restore(tmp_path / "0", optax.identity(), params={})
    assert back == ef.checkpoint.Checkpoint({}, optax.EmptyState(), (), 3, 1)


########################################################################################
# Refusals
########################################################################################


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("model", r"'params/w' is float32\[3,4\] there and float32\[3,5\] here"),
        ("dtype", r"'params/b' is bfloat16\[4\] there and float32\[4\] here"),
        ("chain", "'opt_state/1/exchange/.*' is missing there"),
        ("less", "'opt_state/3/1/.*|'opt_state/3/0/count' is .* missing here"),
        ("extra", r"'extra/average' is float32\[2\] there and missing here"),
    ],
)
def test_a_foreign_checkpoint_is_refused(saved, what, says):
    params, extra, tx = dict(PARAMS), EXTRA, chain()
    if what == "model":
        params["w"] = jnp.zeros((3, 5))
    if what == "dtype":
        params["b"] = jnp.zeros(4)
    if what == "chain":
        tx = optax.chain(own_noise(), ef.compressed_mean(ef.top_k(k=2), axis_name="data"))
    if what == "less":
        tx = optax.chain(
            own_noise(), optax.trace(0.9), ef.error_feedback(ef.top_k(k=2), axis_name="data")
        )
    if what == "extra":
        extra = {"seen": np.zeros(3, int)}
    with pytest.raises(ValueError, match=says) as caught:
        ef.restore(saved, ef.simulate(tx, 2, "data"), params=params, extra=extra)
    assert "saved with 2 workers of axis 'data', now 2" in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 3, 5), (5, 3, 4), (3, 3, 5)])
def test_only_the_worker_axis_may_change(saved, shape):
    """Two workers saved, three ask: (2, 3, 4) may become (3, 3, 4) and nothing else."""
    tx = ef.simulate(chain(), 3, "data")
    state = tx.abstract_state(PARAMS)
    state[1].trace["w"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(ValueError, match="'opt_state/1/trace/w'.*with 2 workers.*now 3"):
        ef.restore(saved, tx, params=PARAMS, opt_state=state, extra=EXTRA)


def test_parameters_that_were_placed_nowhere_stay_so(saved):
    """Otherwise they would be on one device, where a step on the mesh cannot use them."""
    back = ef.restore(saved, run_of(2)[0], params=PARAMS, extra=EXTRA)
    assert not any(x.committed for x in jax.tree.leaves(back.params))
    assert all(x.committed for x in jax.tree.leaves(back.opt_state))


def test_nothing_is_overwritten_and_nothing_half_done_is_read(saved, tmp_path):
    tx = run_of(2)[0]
    with pytest.raises(FileExistsError, match="own name"):
        ef.save(saved, tx, params=PARAMS, opt_state=())
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        ef.restore(tmp_path / "9", tx, params=PARAMS)
    (tmp_path / "8").mkdir()
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        ef.restore(tmp_path / "8", tx, params=PARAMS)


def damage(path, how):
    """Changes a file as a faulty disk, a lost block or an interrupted copy would."""
    data = bytearray(path.read_bytes())
    if how in ("flip", "first"):
        data[0 if how == "first" else len(data) // 2] ^= 16
    path.unlink()
    if how != "missing":
        path.write_bytes(data[: len(data) // 2] if how == "cut" else data)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A matrix with a row on each of two devices, and its checkpoint.

    It is the only array: when orbax cannot read one of several, it leaves the others half read.
    Rows of 2 kB have a file of their own; up to 1 kB they are in an index that has checksums.
    Random bits cannot be compressed, so a bit that flips in the middle of the file is theirs.
    """
    values = np.random.default_rng(1).integers(0, 1 << 32, (2, 512), np.uint32)
    split = jax.device_put(values, jax.NamedSharding(mesh_of(2), P("data")))
    path = tmp_path_factory.mktemp("rows") / "1"
    ef.save(path, optax.identity(), params=split, opt_state=optax.EmptyState())
    return split, path


def read_rows(path, like):
    return ef.restore(path, optax.identity(), params=like).params


@pytest.mark.parametrize("how", ["flip", "first", "cut", "missing"])
@pytest.mark.parametrize("what", ["about/metadata", "arrays/manifest.ocdbt", "values"])
def test_a_damaged_checkpoint_is_refused_in_one_line(rows, tmp_path, what, how):
    """The values too: their storage has no checksum of its own.

    They are read onto one device. Of several parts, orbax leaves the others half read.
    """
    split, path = rows
    like = jax.device_put(np.asarray(split), jax.devices()[0])
    copy = shutil.copytree(path, tmp_path / "copy")
    largest = max((copy / "arrays").rglob("d/*"), key=lambda path: path.stat().st_size)
    damage(largest if what == "values" else copy / what, how)
    with pytest.raises(ValueError, match=f"^path='{copy}'") as caught:
        read_rows(copy, like)
    assert "\n" not in str(caught.value)
    if (what, how) != ("about/metadata", "flip"):  # which makes it another's
        assert str(caught.value).endswith("Restore another checkpoint.")
    assert ("checksum" in str(caught.value)) == ((what, how) == ("values", "flip"))


def test_the_part_of_every_worker_has_a_checksum(rows, tmp_path):
    """It is compared where the reader has that part whole, and older checkpoints have none."""
    split, path = rows
    copy = shutil.copytree(path, tmp_path / "copy")
    about = copy / "about" / "metadata"
    said = json.loads(about.read_text())
    assert [part[1:3] for part in said["checksums"]] == [[[0, 0], [1, 512]], [[1, 0], [2, 512]]]
    like = {
        "split": split,
        "whole": np.asarray(split),
        "finer": jax.device_put(split, jax.NamedSharding(mesh_of(2), P(None, "data"))),
    }
    for tree in like.values():
        np.testing.assert_array_equal(read_rows(copy, tree), split)
    said["checksums"][1][3] ^= 1
    about.write_text(json.dumps(said))
    for name in ("split", "whole"):
        with pytest.raises(ValueError, match="'00000.params' does not have the checksum"):
            read_rows(copy, like[name])
    read_rows(copy, like["finer"])
    del said["checksums"]
    about.write_text(json.dumps(said))
    read_rows(copy, split)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")


@needs_root
def test_a_full_disk_leaves_the_checkpoint_before_as_it_was(tmp_path):
    """A real one, of a megabyte, on which there is room for one checkpoint and not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]).returncode:
        pytest.skip("this machine does not let root mount a disk")
    try:
        tx, values = optax.sgd(0.1), np.random.default_rng(0).normal(size=60_000)
        params = jnp.asarray(values, jnp.float32)
        ef.save(disk / "1", tx, params=params, opt_state=tx.init(params), step=1)
        with pytest.raises(Exception, match="(?i)no space left"):  # the class is the disk layer's
            for step in range(2, 9):
                ef.save(disk / str(step), tx, params=params, opt_state=tx.init(params))
        assert not (disk / str(step)).exists()
        back = ef.restore(disk / "1", tx, params=params)
        np.testing.assert_array_equal(back.params, params)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_save_that_fails_leaves_nothing_under_the_name(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "save", fail)
    monkeypatch.setattr(ocp.JsonCheckpointHandler, "async_save", fail, raising=False)
    tx = optax.sgd(0.1)
    with pytest.raises(OSError, match="disk full"):
        ef.save(tmp_path / "1", tx, params=jnp.ones(2), opt_state=tx.init(jnp.ones(2)))
    assert not (tmp_path / "1").exists()
    with pytest.raises(FileNotFoundError):
        ef.restore(tmp_path / "1", tx, params=jnp.ones(2))


def test_another_version_is_refused(tmp_path, monkeypatch):
    tx = optax.sgd(0.1)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["ef_optax.checkpoint"], "VERSION", 999)
        ef.save(tmp_path / "1", tx, params=jnp.ones(2), opt_state=tx.init(jnp.ones(2)))
    with pytest.raises(ValueError, match="layout version 999"):
        ef.restore(tmp_path / "1", tx, params=jnp.ones(2))


def test_the_checkpoint_says_what_it_is_and_holds_no_pickle(saved):
    about = json.loads((saved / "about" / "metadata").read_text())
    assert {k: about[k] for k in ("version", "step", "num_workers", "axis_name")} == {
        "version": 1,
        "step": 2,
        "num_workers": 2,
        "axis_name": "data",
    }
    assert ["opt_state/2/residual/w", "float32", [2, 3, 4]] in about["fingerprint"]
    assert not any("pickle" in path.name or path.suffix == ".pkl" for path in saved.rglob("*"))


def test_without_orbax_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"ef-optax\[experiments\]"):
        ef.save(tmp_path / "1", optax.sgd(0.1), params=jnp.ones(2), opt_state=())
    with pytest.raises(ImportError, match="orbax-checkpoint"):
        ef.restore(tmp_path / "1", optax.sgd(0.1), params=jnp.ones(2))


def test_a_lost_process_is_no_damaged_checkpoint() -> None:
    """The advice for damage is to restore another checkpoint; here the files are as they were."""

    class Interrupted:
        def restore(self, source, asked):
            raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")

    with pytest.raises(ValueError, match="^UNKNOWN: Gloo AllGather failed"):
        sys.modules["ef_optax.checkpoint"]._read(Interrupted(), "folder", None)
