"""What a user can mend is one line: folders, disks, processes, files that are not what they say."""

from __future__ import annotations

import gzip
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from experiments import data, libsvm, processes, programs, storage
from experiments.arguments import UsageError
from tests.paths import ROOT


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "--out_dir is empty; name a folder"),
        ("a\0b", "NUL character"),
        ("gs://bucket/run", "to a folder of this machine; mount the store"),
        ("~nobody-of-this-name/run", "--out_dir=~nobody-of-this-name/run: "),
    ],
)
def test_what_is_no_folder_is_refused(text: str, words: str) -> None:
    with pytest.raises(storage.OutputError, match=words):
        storage.folder(text)


def test_the_home_directory_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.folder("~/runs") == tmp_path / "runs"
    assert storage.folder("runs/a") == Path("runs/a")


def state_of(size: int) -> programs.State:
    """A state whose parameters take four times as many bytes."""
    return programs.State({"w": jnp.zeros(size)}, {}, ())


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = types.SimpleNamespace(free=1_000_000)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage)
    (tmp_path / "3").mkdir()
    with pytest.raises(storage.OutputError, match=r"and 1,000,000 are free; .*--resume"):
        storage.save(tmp_path, 4, None, state_of(300_000))
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_what_fails_while_saving_is_one_line_and_keeps_the_checkpoint_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object, **__: object) -> None:
        raise ValueError(f"RESOURCE_EXHAUSTED: {'x' * 300}\n\n[OS error 28: No space left]")

    (tmp_path / "3").mkdir()
    monkeypatch.setattr(ef, "save", full)
    with pytest.raises(storage.OutputError, match=r"No space left.*--resume") as caught:
        storage.save(tmp_path, 4, None, state_of(3))
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__
    assert (tmp_path / "3").is_dir()


def test_metrics_that_are_not_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe{}\n")
    with pytest.raises(storage.OutputError, match=r"metrics\.jsonl: damaged line"):
        storage.read_rows(tmp_path)


# ------------------------------------------------------------------------------ processes


def test_a_coordinator_that_does_not_answer_is_named() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    with pytest.raises(UsageError, match=f"--coordinator={address}: process 0 does not"):
        processes.wait_for(address, 0.3)


@pytest.mark.parametrize(
    "address", ["localhost", "localhost:", ":80", "localhost:http", "[::1]:", "a:70000"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="must be host:port"):
        processes.wait_for(address, 0.1)


def test_a_coordinator_that_answers_is_waited_for() -> None:
    with socket.create_server(("localhost", 0)) as server:
        processes.wait_for(f"localhost:{server.getsockname()[1]}", 5)


@pytest.mark.slow
def test_partners_that_never_come_are_waited_for_and_named() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    program = f"from experiments import processes; processes.join({address!r}, 2, 0, 1)"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False, timeout=120
    )
    assert run.returncode == 1
    words = run.stderr.decode().splitlines()
    assert words[-1].startswith("error: --multihost: not all of the 2 processes arrived within 1 s")
    assert not [line for line in words if "Traceback" in line or "stack trace" in line]


@pytest.mark.slow
def test_flags_that_do_not_fit_end_in_one_line() -> None:
    command = [sys.executable, "-m", "experiments.train", "--multihost", "--num_processes=0"]
    options = ["--flagfile=experiments/presets/demo.flags", "--coordinator=localhost:1"]
    run = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == "error: --num_processes=0 must be at least 1"
    assert "Traceback" not in run.stderr


# ------------------------------------------------------------------------------ files


def header(*shape: int) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()


def test_no_more_is_unpacked_than_the_header_promises(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(header(2, 3, 3) + bytes(50_000_000)))
    with pytest.raises(data.DataError, match="too long: the header promises 2x3x3"):
        data.read_idx(path, dimensions=3)
    assert len(data._read(path, 100)) == 100


def test_a_header_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(header(1 << 31, 1 << 31, 4))  # 2^64 bytes: zero in 64 bits
    with pytest.raises(data.DataError, match="more than any such set has"):
        data.read_idx(path, dimensions=3)


def test_a_batch_that_unpacks_without_end_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(data, "_LARGEST", 10_000)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(bytes(1_000_000)))
    with pytest.raises(data.DataError, match="unpacks to more than 10000 bytes"):
        data.load("cifar10", str(tmp_path))


@pytest.mark.parametrize(
    ("train_shape", "test_shape", "words"),
    [((0, 4, 3), (2, 4, 3), "no train images"), ((5, 4, 3), (2, 3, 4), "do not belong together")],
)
def test_images_that_cannot_be_trained_on(
    tmp_path: Path, train_shape: tuple, test_shape: tuple, words: str
) -> None:
    for split, shape in (("train", train_shape), ("t10k", test_shape)):
        images = header(*shape) + bytes(int(np.prod(shape)))
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(images)
        labels = header(shape[0]) + bytes(shape[0])
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(data.DataError, match=words):
        data.load("fashion_mnist", str(tmp_path))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["1", "-1"], "has labels and no features"),
        (["1 1:nan", "-1 1:2"], "line 1 .* nan is not finite"),
        (["1 1:2", "inf 1:2"], "line 2 .* inf is not finite"),
        (["1 1:2", "-1 99999999999999:2"], "line 2 .* end at 1048576"),
        (["1 0:2", "-1 1:2"], "line 1 .* start at 1"),
    ],
)
def test_libsvm_files_that_are_no_data(lines: list[str], words: str) -> None:
    with pytest.raises(libsvm.FormatError, match=words):
        libsvm.parse(lines)
