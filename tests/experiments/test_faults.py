"""Faults of real processes over Gloo: one is killed, or was started differently."""

from __future__ import annotations

import random
import signal
import socket
import time
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import ef_optax as ef
from experiments import comparison, processes, programs, storage
from experiments.arguments import UsageError
from tests.experiments.test_train import finish, results, start

PROGRAM = ("-m", "experiments.train")
LONGER = ("--epochs=8", "--batch_size=4")


def pair(out_dir: Path, *extra: str, second: tuple[str, ...] = (), arriving: int = 2) -> list[Any]:
    """Two processes of the main job, with further flags for both and for the second.

    Only the first ``arriving`` of them are started.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = ("--multihost", f"--coordinator=localhost:{port}", "--num_processes=2", *extra)
    device = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    return [
        start(*PROGRAM, out_dir=out_dir, extra=(*shared, f"--process_id={i}", *also), **device)
        for i, also in enumerate(((), second)[:arriving])
    ]


# ------------------------------------------------------------------------------ started differently

FACTS = {
    "flags": {"ratio": 0.1, "methods": ["sgdm"]},
    "versions": {"jax": "0.10"},
    "data": {"the data with checksum": "1a"},
    "folders": {"checkpoint sgdm_seed0 at epoch": 3},
}


@pytest.mark.parametrize(
    ("group", "name", "value", "said"),
    [
        ("flags", "ratio", 0.2, ("--ratio=0.1", "--ratio=0.2")),
        ("versions", "jax", "0.12", ("jax 0.10", "jax 0.12")),
        ("versions", "more", "1", ("more None", "more 1")),
        (
            "data",
            "the data with checksum",
            "2b",
            tuple(f"the data with checksum {x}" for x in ("1a", "2b")),
        ),
        (
            "folders",
            "checkpoint sgdm_seed0 at epoch",
            0,
            tuple(f"checkpoint sgdm_seed0 at epoch {x}" for x in (3, 0)),
        ),
    ],
)
def test_the_first_difference_is_named(group: str, name: str, value: Any, said: tuple) -> None:
    other = {**FACTS, group: {**FACTS[group], name: value}}
    assert processes.difference(FACTS, other) == said
    assert processes.difference(FACTS, FACTS) is None
    processes.agree(FACTS)  # alone, there is nobody to differ from


def test_a_fingerprint_depends_on_values_shapes_and_order() -> None:
    first, second = np.arange(6, dtype=np.uint8), np.arange(6, dtype=np.uint8)[::-1]
    texts = [[first], [second], [first.reshape(2, 3)], [first.astype(int)], [first, second]]
    texts += [[second, first]]
    assert len({processes.fingerprint(arrays) for arrays in texts}) == len(texts)
    assert processes.fingerprint([first]) == processes.fingerprint([first.copy()])
    large = np.zeros(3 << 20, np.uint8)
    before = processes.fingerprint([large])
    large[-1] = 1
    assert processes.fingerprint([large]) != before


def test_nobody_looks_for_checkpoints_until_old_ones_are_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Otherwise a process that is faster than the first takes those of --overwrite for its own."""
    events: list[str] = []
    meet = lambda _: events.append("all meet")  # noqa: E731
    monkeypatch.setattr(comparison.multihost_utils, "sync_global_devices", meet)
    monkeypatch.setattr(storage, "start", lambda *_: events.append("removed"))
    values: Any = types.SimpleNamespace(multihost=True, overwrite=True)
    comparison.prepare(values, tmp_path, {"flags": {}, "versions": {}, "data": {}}, resume=False)
    assert events == ["all meet", "removed", "all meet"]


def test_a_damaged_checkpoint_ends_a_resumed_run_in_one_line(tmp_path: Path) -> None:
    state = programs.State({"w": jax.numpy.arange(3.0)}, {}, ())
    tx = optax.identity()
    storage.save(tmp_path, 4, tx, state._replace(opt_state=tx.init(state.params)))
    assert storage.last_epoch(tmp_path) == 4
    (tmp_path / "4" / "arrays" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(storage.OutputError, match=r"^--resume: .*damaged.*begin this run again$"):
        storage.restore(tmp_path, 4, tx, state._replace(opt_state=tx.init(state.params)))


def test_copies_that_differ_end_the_run_with_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ef.parallel, "differing_replicas", lambda tree: tuple(tree))
    with pytest.raises(UsageError, match="epoch 3: the workers' copies of a and 1 more differ"):
        processes.check_replicas({"a": 0, "b": 0}, "epoch 3")
    monkeypatch.setattr(ef.parallel, "differing_replicas", lambda tree: ())
    processes.check_replicas({"a": jax.numpy.zeros(3)}, "epoch 3")


@pytest.mark.slow
def test_processes_that_were_started_differently_say_in_what(tmp_path: Path) -> None:
    done = [finish(one) for one in pair(tmp_path / "run", second=("--ratio=0.5",))]
    for one in done:
        assert one.returncode == 1 and "Traceback" not in one.stderr
        last = one.stderr.splitlines()[-1]
        assert "process 1 has --ratio=0.5, process 0 has --ratio=0.01" in last
    assert not (tmp_path / "run").exists()


def test_nobody_waits_for_ever_for_the_first_process() -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))  # and does not listen
        address = f"localhost:{probe.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(
            UsageError, match=f"^--coordinator={address}: process 0 does not answer"
        ):
            processes.wait_for(address, 0.3)
    assert 0.3 < time.monotonic() - begin < 10


@pytest.mark.slow
def test_the_first_process_does_not_wait_for_ever_for_the_others(tmp_path: Path) -> None:
    (alone,) = (finish(one) for one in pair(tmp_path, "--connect_timeout=2", arriving=1))
    assert alone.returncode == 1 and "Traceback" not in alone.stderr
    last = alone.stderr.splitlines()[-1]
    assert last.startswith("error: --multihost: not all of the 2 processes arrived within 2 s;")


# ------------------------------------------------------------------------------ killed


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_all_go_on_to_the_same_bits(tmp_path: Path) -> None:
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    both = pair(killed, *LONGER)
    while len(storage.read_rows(killed)) < 2:  # one checkpoint is complete
        assert all(one.poll() is None for one in both)
        time.sleep(0.05)
    time.sleep(random.uniform(0, 1))
    both[1].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    other, dead = (finish(one) for one in both)
    assert dead.returncode == -signal.SIGKILL and other.returncode == 1
    assert time.monotonic() - begin < 60
    assert "another process ended or cannot be reached" in other.stderr.splitlines()[-1]
    assert "Traceback" not in other.stderr and not (killed / "table.md").exists()

    again = [finish(one) for one in pair(killed, *LONGER, "--resume", "--check_replicas=1")]
    assert [one.returncode for one in again] == [0, 0], again
    assert "of 16 epochs were done before" in again[0].stdout
    whole = [finish(one) for one in pair(straight, *LONGER)]
    assert [one.returncode for one in whole] == [0, 0], whole
    assert results(killed) == results(straight)  # losses and accuracies to the last bit
