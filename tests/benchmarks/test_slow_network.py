"""The slow network: links as slow as they are said to be, and tables that follow from records."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.slow_network import __main__ as main
from benchmarks.slow_network import curves, records, report
from benchmarks.slow_network import network as net
from benchmarks.slow_network.methods import LATE, chosen
from benchmarks.slow_network.predict import Model
from ef_optax.measure import planner
from experiments import lines
from tests.paths import ROOT

needs_root = pytest.mark.skipif(bool(net.missing()), reason=net.missing() or "possible here")

# ------------------------------------------------------------------------------ records

SHAPES = {"kernel": [512, 256], "bias": [100]}
SIZE = 512 * 256 + 100
RATE = 1e7


def run_of(method: str, seconds: list[float], **facts) -> dict:
    facts = {"workers": 4, "rate": RATE, "round": 0, "received": 0.0, "loss": 1.0, **facts}
    return {"kind": "run", "method": method, "seconds": seconds, **facts}


def probe_of(kind: str, size: int, seconds: float, rate: float | None) -> dict:
    facts = {"workers": 4, "rate": rate, "round": 0, "bytes": size, "seconds": [seconds]}
    return {"kind": "probe", "method": kind, **facts}


RECORDS = [
    {"kind": "about", "hardware": "a machine"},
    {"kind": "model", "shapes": SHAPES},
    {"kind": "codec", "method": "scaled_sign", "workers": 4, "seconds_per_value": [1e-7, 1e-8]},
    probe_of("gather", 16, 0.003, RATE),
    probe_of("gather", 1 << 14, 0.3, RATE),
    probe_of("gather", 1 << 22, 60.3, RATE),
    probe_of("reduce", 16, 0.006, RATE),
    probe_of("reduce", 1 << 22, 8.006, RATE),
    probe_of("gather", 16, 0.003, None),
    probe_of("reduce", 1 << 22, 0.5, None),
    run_of("compute", [0.1, 0.3, 0.2]),
    run_of("dense float32", [1.2, 1.0, 1.1]),
    run_of("scaled_sign", [0.4, 0.5]),
    run_of("scaled_sign", [0.6], round=1),
]


def test_a_prediction_and_a_limit_by_hand() -> None:
    """Gathers of three messages, 1 ms each; signs in words, a scale a leaf, and a header."""
    model = Model(RECORDS, 4)
    cells = records.cells(RECORDS)
    cell = cells["scaled_sign", 4, RATE]
    assert cell.seconds == (0.4, 0.5, 0.6) and cell.median == 0.5
    message = 4 * (math.ceil((512 * 256 + 100) / 32) + 2 + 2)
    transfer = 3 * message * 8 / RATE
    assert model.limit(cell) == pytest.approx(0.2 + 0.003 + transfer, rel=1e-3)
    codec = SIZE * (1e-7 + 3e-8)
    want = 0.2 + codec + 0.003 + transfer / records.FRAMES
    assert model.seconds("scaled_sign", RATE) == pytest.approx(want, rel=1e-3)
    # Without a limit the link is as fast as the software: 6 MB in half a second.
    assert model.software() == pytest.approx(8 * 1.5 * 2**22 / 0.5)


def test_a_step_that_is_late_takes_the_longer_of_computation_and_transfer() -> None:
    """The planner says nothing about it: what can be hidden is one of its arguments."""
    late = [run_of(f"{name}{LATE}", [1.0]) for name in ("dense float32", "scaled_sign")]
    model, cells = Model(RECORDS + late, 4), records.cells(RECORDS + late)
    plain, dense, signs = (
        model.limit(cells[name, 4, RATE])
        for name in ("scaled_sign", late[0]["method"], late[1]["method"])
    )
    assert dense == pytest.approx(2 * 0.75 * 4 * (SIZE + 1) * 8 / RATE + 2 * 3 * 0.001, rel=1e-2)
    assert dense > 0.2 and signs == pytest.approx(max(0.2, plain - 0.2))
    assert not any(name.endswith(LATE) for name in model.methods)


def test_a_prediction_from_measured_collectives_by_hand() -> None:
    """A gather of 17 kB lies between two probes, or beyond the last one."""
    model = Model(RECORDS, 4)
    message = 4 * (math.ceil((512 * 256 + 100) / 32) + 2 + 2)
    gather = 0.3 + 60 * (message - 2**14) / (2**22 - 2**14)
    assert model.collective("gather", message, RATE) == pytest.approx(gather)
    want = 0.2 + SIZE * (1e-7 + 3e-8) + gather
    assert model.probed_seconds("scaled_sign", RATE) == pytest.approx(want)
    assert model.collective("reduce", 2**23, RATE) == pytest.approx(16.006, rel=1e-5)


def test_the_table_says_what_a_step_took_by_its_limit_and_by_dense() -> None:
    text = report.tables(RECORDS)
    (line,) = (line for line in text.splitlines() if line.startswith("| scaled_sign | 0.5 ("))
    limit = 0.5 / Model(RECORDS, 4).limit(records.cells(RECORDS)["scaled_sign", 4, RATE])
    assert f"{limit:.2f} limit, 2.2x)" in line
    assert "| compute | 0.2 |" in text and "### 4 workers" in text
    assert text.count("median of 2 cells; the worst is") == 2


def test_the_slowest_worker_decides_and_local_steps_wait_for_nobody() -> None:
    answers = [{"seconds": [1.0, 5.0]}, {"seconds": [2.0, 3.0]}]
    assert records.step_seconds(answers, 1) == [2.0, 5.0]
    assert records.step_seconds(answers, 2) == [3.0]


def curve_of(method: str, losses: list[float], **facts) -> dict:
    facts = {"workers": 4, "rate": None, "seed": 0, "tuning": False, "steps": 60, **facts}
    return {"kind": "curve", "method": method, "learning_rate": 1e-3, "losses": losses, **facts}


def test_seconds_to_a_loss_are_steps_times_the_seconds_of_a_step() -> None:
    found = [
        curve_of("dense float32", [4.0, 3.0, 2.0]),
        curve_of("dense float32", [4.0, 3.5, 3.0], seed=1),
        curve_of("dense float32", [4.0, 1.0], rate=RATE),
        curve_of("dense float32", [4.0, 1.5], tuning=True, learning_rate=2e-3),
        curve_of("dense float32", [4.0, 1.6], tuning=True, learning_rate=5e-4),
    ]
    assert curves.best_rate(found, "dense float32") == 2e-3
    runs = curves.curves(found)
    assert [run.steps_to(2.5) for run in runs] == [1.5 * curves.EVERY, None]
    seconds = curves.seconds_to(runs, records.cells(RECORDS), 4, RATE, 2.5)
    assert seconds == {"dense float32": [pytest.approx(1.5 * curves.EVERY * 1.1), None]}
    table = report.by_seconds([*RECORDS, *found[:1]], 4)
    assert "| dense float32 | 0.001 | 2.00 | 36 | 39.6 | 45 | 49.5 | 51 | 56.1 |" in table
    assert "| 2.50 | - | - | - | - | - | - |" in report.by_seconds([*RECORDS, *found], 4)


def test_dense_methods_come_first_and_every_method_is_the_planners() -> None:
    names = list(chosen())
    assert names[:2] == ["dense float32", "dense bfloat16"]
    plain = {name.removesuffix(LATE) for name in names}
    assert plain < {method.name for method in planner.methods()} and plain < set(names)


def test_without_root_it_says_so(tmp_path: Path) -> None:
    with net.network(2, isolated=False) as loopback:
        assert loopback.inside(1, ["true"]) == ["true"]
        loopback.limit(None)
        with pytest.raises(RuntimeError, match="not slowed down"):
            loopback.limit(1e6)


# ------------------------------------------------------------------------------ real links

RECEIVE = """
import socket, sys, time
server = socket.create_server((sys.argv[1], 5000))
print("ready", flush=True)
peer, _ = server.accept()
start, count = None, 0
while data := peer.recv(1 << 20):
    start = start or time.perf_counter()
    count += len(data)
print(8 * count / (time.perf_counter() - start))
"""
SEND = """
import socket, sys
peer = socket.create_connection((sys.argv[1], 5000))
peer.sendall(bytes(int(sys.argv[2])))
"""


@needs_root
@pytest.mark.slow
def test_links_are_as_slow_as_they_are_said_to_be() -> None:
    with net.network(2) as pair:
        for rate in (20e6, 200e6):
            pair.limit(rate)
            command = pair.inside(1, [sys.executable, "-c", RECEIVE, pair.addresses[1]])
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver:
                assert receiver.stdout is not None
                receiver.stdout.readline()
                arguments = [pair.addresses[1], str(int(rate / 8))]
                subprocess.run(pair.inside(0, [sys.executable, "-c", SEND, *arguments]), check=True)
                assert 0.88 * rate < float(receiver.stdout.readline()) < 1.02 * rate
        assert os.getpid() in net.owners()
    assert os.getpid() not in net.owners()


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_behind_after_a_signal(number: int) -> None:
    # Where the tests run in the background, a shell may have left SIGINT ignored.
    program = """
import signal, time
from benchmarks.slow_network.network import network
signal.signal(signal.SIGINT, signal.default_int_handler)
with network(2):
    print("built", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"built\n"
        assert child.pid in net.owners()
        child.send_signal(number)
        child.wait(30)
    assert child.pid not in net.owners()


@needs_root
@pytest.mark.slow
def test_a_run_writes_records_and_goes_on_where_it_was(tmp_path: Path) -> None:
    options = ["--workers=2", "--rates=50mbit", "--rounds=1", "--steps=1", "--size=0.2M"]
    options += ["--methods=dense float32", f"--out={tmp_path}"]
    command = [sys.executable, "-m", "benchmarks.slow_network", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = lines.read(tmp_path / "records.jsonl")
        kinds = [record["kind"] for record in found]
        assert kinds == ["about", "model", "codec", *["probe"] * 9, "run", "run"]
    model, dense = Model(found, 2), found[-1]
    leaves = planner.leaves_of(model.shapes)
    (reduce,) = planner.rounds_of(chosen()["dense float32"], leaves, 2)
    # Beside the message: 66 bytes of headers for each 1,448, as much for its acknowledgement,
    # and what the processes say to their coordinator.
    message = reduce.received_bytes(2)
    assert message < dense["received"] < message * (1514 + 66) / 1448 + 50_000
    assert "| dense float32 | " in done.stdout


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--workers=1", "--workers=1: give numbers of at least 2"),
        ("--workers=two", "--workers=two: give numbers of at least 2"),
        ("--rounds=0", "--rounds=0: give a number of at least 1"),
        ("--size=9Q", "--size=9Q: choose of 0.2M"),
        ("--methods=dense float32|nope", "--methods: 'nope' is none of dense float32"),
        ("--rates=50mbit,fast", "bandwidth='fast' is not a bandwidth"),
        ("--live=fast", "bandwidth='fast' is not a bandwidth"),
    ],
)
def test_flags_are_checked_before_anything_is_built(flag: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        main.checked(main.parser().parse_args([flag]))
