"""The main job as a user sees it: what it refuses, what it writes, what a kill leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import flagsaver

import ef_optax as ef
from experiments import arguments, methods, report, storage, train, tuning
from tests.paths import ROOT

# Those of the small studies are in test_studies.py.
PRESETS = [
    path
    for path in sorted((ROOT / "experiments" / "presets").glob("*.flags"))
    if re.search(r"python -m experiments\.(train|batch_size_table)\b", path.read_text())
]

Refuse = Callable[..., str]


@pytest.fixture
def refuse(tmp_path: Path) -> Iterator[Refuse]:
    """Runs the main job in this process; returns the one line with which it refuses."""

    def call(*arguments: str) -> str:
        words = ["train", "--methods=sgdm", "--lr=sgdm=0.1", f"--out_dir={tmp_path / 'out'}"]
        rest = train.FLAGS([*words, *arguments])
        with pytest.raises(SystemExit) as caught:
            train.main(rest)
        message = str(caught.value.code)
        assert message.startswith("error: ") and "\n" not in message
        assert not (tmp_path / "out").exists()
        return message

    with flagsaver.flagsaver():
        yield call


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--methods=sgdm,ef_topk"], "use ef_top_k"),
        (["--methods=sgdm,adam"], "missing a required argument: 'learning_rate'"),
        (["--methods=ef21(top_k(0.1))"], "no learning rate; write ef21(top_k(0.1)) | sgd(0.1)"),
        (["--methods=ef21(top_k(2.0)) | sgd(1)"], "ratio=2.0 must be"),
        (["--methods=sgdm | sgd(1)"], "the short name sgdm cannot be a part of it"),
        (["--methods=sgdm,sgdm"], "none of them twice"),
        (["--methods=top_k"], "no learning rate for top_k; add top_k=RATE"),
        (["--lr=sgdm"], "'sgdm' is not method=rate"),
        (["--lr=sgdm=-1"], "positive"),
        (["--lr_drops=half"], "not a list of numbers"),
        (["--ratio=0"], "--ratio=0.0 must lie in (0, 1]"),
        (["--seeds=0"], "at least one run"),
        (["--momentum=1"], "must lie in [0, 1)"),
        (["--batch_size=100000"], "more than the 1400 training examples"),
        (["--workers=1000"], "--workers=1000, but there are"),
        (["--dataset=cifar10", "--data_dir="], "--data_dir or EF_OPTAX_DATA"),
        (["--dataset=mnist", "--data_dir=/nowhere"], "is not a folder"),
        (["surplus"], "unexpected argument 'surplus'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    refuse: Refuse, arguments: list[str], words: str
) -> None:
    assert words in refuse(*arguments)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_are_complete_and_say_what_they_are(preset: Path) -> None:
    with flagsaver.flagsaver():
        train.FLAGS(["train", f"--flagfile={preset}"])
        named = arguments.parse_methods(train.FLAGS.methods, methods.METHODS)
        assert list(arguments.parse_rates(train.FLAGS.lr, named, methods.METHODS)) == named
    header = preset.read_text().split("\n--")[0]
    for word in ("Result:", "Command:", "Hardware:", "Learning rates:"):
        assert word in header, f"{preset.name} does not state its {word}"


########################################################################################
# The files of a run
########################################################################################


def config(**changed: Any) -> dict[str, Any]:
    chosen = {
        "dataset": "digits",
        "model": "mlp",
        "methods": ["sgdm", "ef_top_k"],
        "workers": 8,
        "batch_size": 2,
        "epochs": 2,
        "seeds": 2,
        "lr": {"sgdm": 0.03, "ef_top_k": 0.3},
        "lr_drops": [0.5],
        "weight_decay": 5e-4,
        "ratio": 0.01,
    }
    about = {
        "dense_bytes": 4000,
        "parameters": 1000,
        "steps_per_epoch": 10,
        "hardware": "a test",
        "command": "python -m experiments.train",
    }
    return {"flags": chosen | changed, "about": about, "versions": {"jax": "1"}}


def rows() -> list[dict[str, Any]]:
    accuracies = {("sgdm", 0): (0.9, 0.98), ("sgdm", 1): (0.92, 0.96)}
    accuracies |= {("ef_top_k", 0): (0.97, 0.95), ("ef_top_k", 1): (0.97, 0.96)}
    return [
        {"method": m, "seed": s, "epoch": e, "test_accuracy": a, "train_loss": 1.0 / e}
        for (m, s), values in accuracies.items()
        for e, a in enumerate(values, 1)
    ]


WIRE = {
    "sgdm": {"message_bytes": 4000, "link_bytes": 14000},
    "ef_top_k": {"message_bytes": 50, "link_bytes": 700},
}


def cells(text: str, method: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| `{method}`"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_rate_that_is_chosen_is_not_at_the_edge_of_stability() -> None:
    scores = {0.1: (0.957, -0.2), 0.3: (0.963, -0.2), 1.0: (0.969, -0.2), 3.0: (0.117, -9.0)}
    assert tuning.robust_rate(scores) == 0.3
    assert tuning.robust_rate({**scores, 3.0: (0.95, -0.3)}) == 1.0
    assert tuning.robust_rate({0.1: (0.9, -0.2), 1.0: (0.9, -0.1), 3.0: (0.8, -1.0)}) == 1.0
    assert tuning.robust_rate({0.1: (0.9, -0.2)}) == 0.1


def test_table_states_mean_deviation_difference_and_bytes() -> None:
    text = report.table(config(), rows(), WIRE)
    # (98 + 96)/2 = 97, sample deviation sqrt 2; a dense ring moves 4 (n-1)/n m = 14000 bytes.
    assert cells(text, "sgdm") == (
        "`sgdm`|0.03|97.00 ± 1.41|97.00||4,000|1.0x|14,000|1.0x".split("|")
    )
    assert cells(text, "ef_top_k") == (
        "`ef_top_k`|0.3|95.50 ± 0.71|97.00|-1.50|50|80.0x|700|20.0x".split("|")
    )
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    single = report.table(config(workers=1), rows(), WIRE)
    assert "link" not in single and "With one worker nothing travels" in single


LOCAL = "local.diloco(sgd(0.1), 5) | scale(0.5)"


def test_methods_are_short_names_or_expressions_in_one_spelling() -> None:
    text = " sgdm,top_k , ef21(top_k(.01))|adamw(3e-4), local.diloco(sgd(0.1),5)|scale(0.5)"
    named = arguments.parse_methods(text, methods.METHODS)
    assert named == ["sgdm", "top_k", "ef21(top_k(0.01)) | adamw(0.0003)", LOCAL]
    rates = arguments.parse_rates(["sgdm=0.1", "top_k=0.3"], named, methods.METHODS)
    assert list(rates.values()) == [0.1, 0.3, 1.0, 1.0]
    assert methods.compressor(named[2]).codec == ef.top_k(0.01).codec
    for method in named[2:]:
        methods.check(method)


@pytest.mark.slow
def test_a_key_in_an_expression_does_not_start_jax_before_the_devices_are_made(
    tmp_path: Path,
) -> None:
    """In a fresh process, as users start it; otherwise three workers would be too many."""
    words = ["--methods=ef21(random_k(0.1, key=0)) | sgd(0.1)", "--workers=3", "--batch_size=9999"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    ran = subprocess.run(
        [sys.executable, "-m", "experiments.train", *words, f"--out_dir={tmp_path / 'out'}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "9999 x 3 workers is more than the 1400 training examples" in ran.stderr


def test_the_rate_of_the_main_job_multiplies_the_updates_of_an_expression() -> None:
    tx = ef.simulate(methods.optimizer("error_feedback(top_k(k=1)) | sgd(0.5)"), 2, methods.AXIS)
    params = jnp.zeros(2)
    state = optax.tree.set(tx.init(params), learning_rate=jnp.float32(0.1))
    updates, _ = tx.update(jnp.array([[4.0, 0.0], [0.0, 2.0]]), state, params)
    np.testing.assert_allclose(updates, [-0.1, -0.05], rtol=1e-6)


def test_files_and_rows_of_an_expression() -> None:
    """Names that every file system takes, no two alike; a bar does not end a cell."""
    assert storage.run_name("ef_top_k", 1) == "ef_top_k_seed1"
    names = [storage.run_name(m, 0) for m in (LOCAL, LOCAL.replace("5", "6"), "x" * 300 + "()")]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,120}", name) for name in names)
    found = [dict(row, method=LOCAL) for row in rows() if row["method"] == "sgdm"]
    wire = {LOCAL: {"message_bytes": 50, "link_bytes": 700, "at_most": True}}
    text = report.table(config(methods=[LOCAL], lr={LOCAL: 1.0}), found, wire)
    row = next(line for line in text.splitlines() if "diloco" in line)
    assert row.replace("\\|", "/").split("|")[1:3] == [
        f" `{LOCAL.replace('|', '/')}` ",
        " its own ",
    ]
    assert "| ≤ 50 |" in row and "≤: some steps" in text


def test_report_writes_the_table_and_a_picture(tmp_path: Path) -> None:
    storage.start(tmp_path, config(), overwrite=False)
    with pytest.raises(storage.OutputError, match="no finished epoch"):
        storage.write_text(tmp_path / "wire.json", json.dumps(WIRE))
        report.write(tmp_path)
    for row in rows():
        storage.append_row(tmp_path, row)
    assert report.write(tmp_path) == (tmp_path / "table.md").read_text(encoding="utf-8")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert set(methods.METHODS) == set(report.LABELS)


def test_results_are_neither_overwritten_nor_mixed(tmp_path: Path) -> None:
    storage.check_free(tmp_path, config(), resume=False, overwrite=False)
    storage.start(tmp_path, config(), overwrite=False)
    (tmp_path / "notes.txt").write_text("the user's own")
    with pytest.raises(storage.OutputError, match="already holds results"):
        storage.check_free(tmp_path, config(), resume=False, overwrite=False)
    storage.check_free(tmp_path, config(), resume=True, overwrite=False)
    with pytest.raises(storage.OutputError, match="started with --batch_size=2, not 4"):
        storage.check_free(tmp_path, config(batch_size=4), resume=True, overwrite=False)
    with pytest.raises(storage.OutputError, match=r"--lr=sgdm=0.03,ef_top_k=0.3, not sgdm=1;"):
        storage.check_free(tmp_path, config(lr={"sgdm": 1}), resume=True, overwrite=False)
    storage.check_free(tmp_path, config(batch_size=4), resume=False, overwrite=True)
    storage.start(tmp_path, config(batch_size=4), overwrite=True)
    assert storage.read_json(tmp_path / "config.json")["flags"]["batch_size"] == 4
    assert (tmp_path / "notes.txt").exists()


def test_rows_after_the_last_checkpoint_are_dropped(tmp_path: Path) -> None:
    for row in rows():
        storage.append_row(tmp_path, row)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"method": "sgdm", "se')  # cut short by a kill
    half = storage.run_dir(tmp_path, "sgdm", 1) / "2.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    storage.forget_unsaved(tmp_path, {("sgdm", 0): 2, ("sgdm", 1): 1})
    kept = [(row["method"], row["seed"], row["epoch"]) for row in storage.read_rows(tmp_path)]
    assert kept == [("sgdm", 0, 1), ("sgdm", 0, 2), ("sgdm", 1, 1)]
    assert not half.exists()
    assert storage.last_epoch(half.parent) == 0


########################################################################################
# Whole runs
########################################################################################

# Kills its own process in the middle of writing the n-th checkpoint.
KILL_IN_SAVE = """
import os, signal, sys
from absl import app
import orbax.checkpoint as ocp
from experiments import train
save, calls = ocp.JsonCheckpointHandler.async_save, []
def save_and_die(self, *args, **kwargs):
    calls.append(0)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(self, *args, **kwargs)
ocp.JsonCheckpointHandler.async_save = save_and_die
app.run(train.main)
"""


def start(*program: str, out_dir: Path, extra: tuple[str, ...] = (), **env: str) -> Any:
    arguments = ["--methods=ef_top_k", "--lr=ef_top_k=0.3", "--seeds=2", "--epochs=3"]
    arguments += ["--workers=2", "--batch_size=16", f"--out_dir={out_dir}"]
    return subprocess.Popen(
        [sys.executable, *program, *arguments, *extra],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: Any) -> subprocess.CompletedProcess[str]:
    try:
        output, errors = process.communicate(timeout=280)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run(*program: str, out_dir: Path, extra: tuple[str, ...] = ()) -> Any:
    return finish(start(*program, out_dir=out_dir, extra=extra))


def results(out_dir: Path) -> list[dict[str, Any]]:
    found = storage.read_rows(out_dir)
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


def arrays(folder: Path) -> list[np.ndarray]:
    import jax
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return [np.asarray(x) for x in jax.tree.leaves(checkpointer.restore(folder / "arrays"))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*[Ss]harding.*")  # restored without its mesh, on purpose
def test_a_run_killed_inside_a_checkpoint_resumes_to_the_same_bits(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    first = run("-m", "experiments.train", out_dir=straight)
    assert first.returncode == 0, first.stderr
    dead = run("-c", KILL_IN_SAVE, out_dir=killed)
    assert dead.returncode == -signal.SIGKILL
    assert not (killed / "table.md").exists()
    assert [row["seed"] for row in results(killed)] == [0, 0, 0, 1]
    again = run("-m", "experiments.train", out_dir=killed, extra=("--resume",))
    assert again.returncode == 0, again.stderr
    assert "resumed: 3 of 6 epochs" in again.stdout
    assert results(killed) == results(straight)
    for seed in (0, 1):
        folders = [storage.run_dir(out, "ef_top_k", seed) / "3" for out in (straight, killed)]
        for a, b in zip(*map(arrays, folders), strict=True):
            np.testing.assert_array_equal(a, b)
    # Top-1% of 8192, 128, 1280 and 10 values: 82, 2, 13 and 1 values of 32 bits, with indices of
    # Values of 32 bits, indices of 13, 7, 11 and 4, and two words of the exchange's own.
    bits = sum(k * (32 + index) for k, index in ((82, 13), (2, 7), (13, 11), (1, 4))) + 2 * 32
    words = -(-bits // 32)
    assert storage.read_json(straight / "wire.json")["ef_top_k"]["message_bytes"] == 4 * words


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    one, two = tmp_path / "one", tmp_path / "two"
    program = ("-m", "experiments.train")
    shared = ("--multihost", f"--coordinator={address}", "--num_processes=2")
    device = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    processes = [
        start(*program, out_dir=two, extra=(*shared, f"--process_id={index}"), **device)
        for index in range(2)
    ]
    done = [finish(process) for process in processes]
    assert [process.returncode for process in done] == [0, 0], done
    assert "| `ef_top_k` |" in done[0].stdout and "ef_top_k" not in done[1].stdout
    alone = run(*program, out_dir=one)
    assert alone.returncode == 0, alone.stderr
    assert storage.read_json(one / "wire.json") == storage.read_json(two / "wire.json")
    for a, b in zip(results(one), results(two), strict=True):
        assert a["test_accuracy"] == b["test_accuracy"]
        # The reported mean over workers is summed in another order.
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_diverging_run_stops_with_one_line_and_keeps_what_was_there(tmp_path: Path) -> None:
    done = run("-m", "experiments.train", out_dir=tmp_path, extra=("--lr=ef_top_k=1e30",))
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ef_top_k, seed 0: the loss is not finite at the end of")
    assert all(row["skipped_steps"] < 43 for row in results(tmp_path))
    assert not (tmp_path / "table.md").exists()
