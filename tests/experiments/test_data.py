"""The data readers on small files made here: what they read, and what they refuse."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import data

RNG = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


def write_mnist(folder: Path, *, compress: bool, dots: bool = False) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "train-images-idx3-ubyte": RNG.integers(0, 256, (5, 4, 3), np.uint8),
        "train-labels-idx1-ubyte": np.arange(5, dtype=np.uint8),
        "t10k-images-idx3-ubyte": RNG.integers(0, 256, (2, 4, 3), np.uint8),
        "t10k-labels-idx1-ubyte": np.array([9, 0], np.uint8),
    }
    for name, array in arrays.items():
        name = name.replace("-idx", ".idx") if dots else name
        path = folder / (name + ".gz" * compress)
        path.write_bytes(gzip.compress(idx(array)) if compress else idx(array))
    return arrays


@pytest.mark.parametrize("name, place", [("mnist", "mnist"), ("fashion_mnist", "fashion-mnist")])
@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_are_read(tmp_path: Path, name: str, place: str, compress: bool) -> None:
    arrays = write_mnist(tmp_path / place, compress=compress, dots=compress)
    for root in (tmp_path, tmp_path / place):
        dataset = data.load(name, str(root))
        np.testing.assert_array_equal(
            dataset.train_images[..., 0], arrays["train-images-idx3-ubyte"]
        )
        np.testing.assert_array_equal(dataset.test_labels, [9, 0])
        assert dataset.train_images.dtype == np.uint8 and dataset.train_labels.dtype == np.int32


def damage_truncate(content: bytes) -> bytes:
    return content[:-1]


def damage_lengthen(content: bytes) -> bytes:
    return content + b"\0"


def damage_magic(content: bytes) -> bytes:
    return b"\0\0\x0b\x03" + content[4:]


def damage_header(content: bytes) -> bytes:
    return content[:9]


def damage_empty(content: bytes) -> bytes:
    return content[:0]


@pytest.mark.parametrize(
    "damage, words",
    [
        (damage_truncate, "truncated: the header promises 5x4x3"),
        (damage_lengthen, "too long"),
        (damage_magic, "not an IDX file of rank 3: it starts with 00000b03"),
        (damage_header, "truncated inside the header"),
        (damage_empty, "starts with nothing"),
    ],
)
@pytest.mark.parametrize("compress", [False, True])
def test_damaged_idx_files_are_refused(
    tmp_path: Path, damage: Any, words: str, compress: bool
) -> None:
    arrays = write_mnist(tmp_path, compress=False)
    path = tmp_path / "train-images-idx3-ubyte"
    content = damage(idx(arrays[path.name]))
    path.write_bytes(gzip.compress(content) if compress else content)
    with pytest.raises(data.DataError, match=words) as caught:
        data.load("mnist", str(tmp_path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [1, 9, 30])
def test_truncated_gzip_is_refused(tmp_path: Path, cut: int) -> None:
    write_mnist(tmp_path, compress=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(data.DataError, match="truncated or damaged gzip"):
        data.load("mnist", str(tmp_path))


def test_missing_and_inconsistent_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="--data_dir or EF_OPTAX_DATA"):
        data.load("mnist", None)
    with pytest.raises(data.DataError, match="not a folder"):
        data.load("cifar10", str(tmp_path / "absent"))
    with pytest.raises(data.DataError, match="no file train-images-idx3-ubyte"):
        data.load("fashion_mnist", str(tmp_path))
    with pytest.raises(data.DataError, match=r"cifar-100-binary or cifar-100-python"):
        data.load("cifar100", str(tmp_path))
    write_mnist(tmp_path, compress=False)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.arange(4, dtype=np.uint8)))
    with pytest.raises(data.DataError, match="5 train images but 4 labels"):
        data.load("mnist", str(tmp_path))
    labels.write_bytes(idx(np.full(5, 10, np.uint8)))
    with pytest.raises(data.DataError, match="label 10 in a set of 10 classes"):
        data.load("mnist", str(tmp_path))


########################################################################################
# CIFAR
########################################################################################


def cifar_batches(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    classes = 10 if name == "cifar10" else 100
    return {
        file: (RNG.integers(0, 256, (2, 3072), np.uint8), RNG.integers(0, classes, 2))
        for file in (files if name == "cifar10" else ["train", "test"])
    }


def binary(name: str, pixels: np.ndarray, labels: np.ndarray) -> bytes:
    columns = [labels[:, None].astype(np.uint8), pixels]
    coarse = np.full((len(labels), 1), 7, np.uint8)
    return np.hstack(columns if name == "cifar10" else [coarse, *columns]).tobytes()


def python(name: str, pixels: np.ndarray, labels: np.ndarray, protocol: int = 2) -> bytes:
    table: dict[Any, Any] = {b"data": pixels, b"batch_label": b"some batch"}
    if name == "cifar10":
        table[b"labels"] = labels.tolist()
    else:
        table[b"coarse_labels"], table[b"fine_labels"] = [7] * len(labels), labels.tolist()
    return pickle.dumps(table, protocol)


FOLDERS = {
    ("cifar10", "binary"): ("cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
    ("cifar10", "python"): ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    ("cifar100", "binary"): ("cifar-100-binary", "cifar-100-binary.tar.gz"),
    ("cifar100", "python"): ("cifar-100-python", "cifar-100-python.tar.gz"),
}


@pytest.mark.parametrize("name, kind", FOLDERS)
@pytest.mark.parametrize("archive", [False, True])
def test_cifar_is_read(tmp_path: Path, name: str, kind: str, archive: bool) -> None:
    batches = cifar_batches(name)
    folder, tar = FOLDERS[name, kind]
    pack, suffix = (binary, ".bin") if kind == "binary" else (python, "")
    contents = {file + suffix: pack(name, *batch) for file, batch in batches.items()}
    if archive:
        with tarfile.open(tmp_path / tar, "w:gz") as out:
            for file, content in contents.items():
                member = tarfile.TarInfo(f"{folder}/{file}")
                member.size = len(content)
                out.addfile(member, io.BytesIO(content))
    else:
        (tmp_path / folder).mkdir()
        for file, content in contents.items():
            (tmp_path / folder / file).write_bytes(content)
    dataset = data.load(name, str(tmp_path))
    pixels, labels = (np.concatenate(column) for column in zip(*batches.values(), strict=True))
    count = len(dataset.train_labels)
    assert count == len(labels) - 2 and dataset.augment
    np.testing.assert_array_equal(dataset.train_labels, labels[:count])
    np.testing.assert_array_equal(dataset.test_labels, labels[count:])
    # Channels first in the file: byte 1024 c + 32 y + x.
    np.testing.assert_array_equal(dataset.train_images[1, 3, 5, 2], pixels[1, 2048 + 32 * 3 + 5])

    if archive:
        whole = (tmp_path / tar).read_bytes()
        (tmp_path / tar).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(data.DataError, match=r"truncated or damaged|missing"):
            data.load(name, str(tmp_path))
    else:
        (tmp_path / folder / next(reversed(contents))).unlink()
        with pytest.raises(data.DataError, match="missing"):
            data.load(name, str(tmp_path))


def test_truncated_cifar_batches_are_refused() -> None:
    pixels, labels = cifar_batches("cifar10")["test_batch"]
    with pytest.raises(data.DataError, match="not a multiple of the record size 3073"):
        data.read_cifar_binary(binary("cifar10", pixels, labels)[:-1], 1, 10, "x")
    with pytest.raises(data.DataError, match="truncated"):
        data.read_cifar_binary(b"", 1, 10, "x")
    with pytest.raises(data.DataError, match="not a readable CIFAR batch"):
        data.read_cifar_python(python("cifar10", pixels, labels)[:-100], 1, 10, "x")
    with pytest.raises(data.DataError, match="not an integer below 10"):
        data.read_cifar_python(python("cifar10", pixels, labels + 10), 1, 10, "x")
    with pytest.raises(data.DataError, match="no array of 3072 bytes"):
        data.read_cifar_python(python("cifar10", pixels[:, 1:], labels), 1, 10, "x")
    with pytest.raises(data.DataError, match="not of unsigned bytes"):
        data.read_cifar_python(python("cifar10", pixels.astype(np.float32), labels), 1, 10, "x")


class Exploit:
    def __init__(self, command: tuple[Any, ...]) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return self.command


@pytest.mark.parametrize(
    "command",
    [(os.system, ("touch EXPLOITED",)), (eval, ("1",)), (getattr, ("", "join")), (object, ())],
)
def test_a_pickle_cannot_run_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps({b"data": Exploit(command), b"labels": []}, 2)
    with pytest.raises(data.DataError, match="the pickle asks for"):
        data.read_cifar_python(content, 1, 10, "x")
    assert not list(tmp_path.iterdir())


########################################################################################
# Splits, augmentation, padding
########################################################################################


def test_digits_are_split_without_overlap_and_the_validation_part_is_training_data() -> None:
    dataset = data.load("digits")
    assert len(dataset.train_labels) == 1400 and len(dataset.test_labels) == 397
    held = dataset.hold_out(0.2)
    assert len(held.train_labels) == 1120 and len(held.test_labels) == 280

    def rows(images: np.ndarray) -> list[bytes]:
        return sorted(image.tobytes() for image in images)

    both = np.concatenate([held.train_images, held.test_images])
    assert rows(both) == rows(dataset.train_images)
    everything = np.concatenate([dataset.train_images, dataset.test_images])
    from sklearn.datasets import load_digits

    assert rows(everything) == rows(load_digits().images.astype(np.uint8))


def test_crop_and_flip_only_moves_pixels() -> None:
    images = np.arange(1, 1 + 40 * 6 * 5, dtype=np.uint16).reshape(40, 6, 5, 1)
    moved = data.crop_and_flip(images, np.random.default_rng(1))
    again = data.crop_and_flip(images, np.random.default_rng(1))
    np.testing.assert_array_equal(moved, again)
    flips = set()
    for image, out in zip(images[..., 0], moved[..., 0], strict=True):
        padded = np.pad(image, 4)
        found = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (1, -1)
            if np.array_equal(padded[top : top + 6, left : left + 5][:, ::flip], out)
        ]
        assert found
        flips.add(found[0][2])
    assert flips == {1, -1}


@pytest.mark.parametrize("count, workers", [(397, 8), (10, 1), (2500, 3), (1, 8)])
def test_padding_keeps_every_test_image_once(count: int, workers: int) -> None:
    images = RNG.integers(0, 256, (count, 2, 2, 1), np.uint8)
    labels = np.arange(count, dtype=np.int32)
    padded_images, padded_labels = data.pad_to_batches(images, labels, workers)
    assert padded_labels.shape[1] % workers == 0
    real = padded_labels.ravel() >= 0
    np.testing.assert_array_equal(padded_labels.ravel()[real], labels)
    np.testing.assert_array_equal(padded_images.reshape(-1, 2, 2, 1)[real], images)
    assert padded_labels.size - count < padded_labels.shape[0] * workers
