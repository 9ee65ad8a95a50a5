"""MNIST and CIFAR-10: their file formats, from small files made here, and the nets."""

from __future__ import annotations

import gzip
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.paper.images import CifarNet, MnistNet, load_cifar10, load_mnist, normalized, read_cifar10
from bench.paper.problem import Options, layers_by_child
from bench.paper.tasks import TASKS


def write_mnist(folder: Path, end: str = "", compress: Callable[[bytes], bytes] = bytes) -> dict[str, Tensor]:
    """Seven training and five test images in LeCun's format; returns what was written."""
    written = {}
    for part, rows in (("train", 7), ("t10k", 5)):
        pixels = torch.randint(0, 256, (rows, 28, 28), dtype=torch.uint8)
        labels = torch.randint(0, 10, (rows,), dtype=torch.uint8)
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
            content = bytes([0, 0, 8, values.dim()]) + sizes + values.numpy().tobytes()
            (folder / f"{part}-{kind}-ubyte{end}").write_bytes(compress(content))
            written[f"{part}-{kind[:6]}"] = values
    return written


@pytest.mark.parametrize(("end", "compress"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_mnist(end: str, compress: Callable[[bytes], bytes], tmp_path: Path, seed: int) -> None:
    written = write_mnist(tmp_path, end, compress)
    data = load_mnist(tmp_path)
    assert data.x_train.shape == (7, 1, 28, 28) and data.x_test.shape == (5, 1, 28, 28)
    assert torch.equal(data.y_train, written["train-labels"].long())
    assert torch.equal(data.y_test, written["t10k-labels"].long())
    pixels = written["train-images"].double() / 255
    expected = (written["t10k-images"].double() / 255 - pixels.mean()) / pixels.std()
    torch.testing.assert_close(data.x_test.squeeze(1).double(), expected, atol=1e-5, rtol=1e-5)


def write_cifar10(folder: Path, test_name: str, compress: Callable[[bytes], bytes] = bytes, end: str = "") -> Tensor:
    """Two records a file in the binary version's layout; returns all of them."""
    records = torch.randint(0, 256, (12, 1 + 3072), dtype=torch.uint8)
    records[:, 0] %= 10
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), test_name]
    for name, pair in zip(names, records.split(2), strict=True):
        (folder / f"{name}{end}").write_bytes(compress(pair.numpy().tobytes()))
    return records


@pytest.mark.parametrize(
    ("test_name", "end", "compress"),
    [("test_batch.bin", "", bytes), ("test_batch_first1000.bin", ".xz", lzma.compress)],
)
def test_cifar10(test_name: str, end: str, compress: Callable[[bytes], bytes], tmp_path: Path, seed: int) -> None:
    records = write_cifar10(tmp_path, test_name, compress, end)
    data = load_cifar10(tmp_path)
    assert torch.equal(torch.cat([data.y_train, data.y_test]), records[:, 0].long())
    # Planes of red, green, blue, each row by row.
    pixels = records[:, 1:].reshape(12, 3, 32, 32)
    train, test = normalized(pixels[:10], pixels[10:])
    assert torch.equal(data.x_train, train) and torch.equal(data.x_test, test)
    assert train.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (train.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-4


def test_cifar10_from_the_archive_as_it_is(tmp_path: Path, seed: int) -> None:
    records = write_cifar10(tmp_path, "test_batch.bin")
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for file in sorted(tmp_path.glob("*.bin")):
            tar.add(file, f"cifar-10-batches-bin/{file.name}")
            file.unlink()
    data = load_cifar10(tmp_path)
    assert torch.equal(torch.cat([data.y_train, data.y_test]), records[:, 0].long())
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"torn")
    with pytest.raises(SystemExit, match=r"cifar-10-binary\.tar\.gz cannot be read"):
        load_cifar10(tmp_path)


def test_a_label_beyond_the_classes_is_seen(seed: int) -> None:
    with pytest.raises(SystemExit, match="x has labels above 9"):
        read_cifar10(bytes([200]) + bytes(3072), "x")


def test_missing_and_torn_files_are_named(tmp_path: Path, seed: int) -> None:
    with pytest.raises(SystemExit, match="--data-dir is missing: the folder with MNIST's four idx files"):
        TASKS["mnist"].prepare(0, Options())
    with pytest.raises(SystemExit, match="is not a folder"):
        TASKS["mnist"].prepare(0, Options(data_dir=tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="train-images-idx3-ubyte"):
        load_mnist(tmp_path)
    write_mnist(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="cut short"):
        load_mnist(tmp_path)
    write_cifar10(tmp_path, "test_batch.bin")
    (tmp_path / "data_batch_3.bin").write_bytes(b"123")
    with pytest.raises(SystemExit, match=r"data_batch_3\.bin is not a file"):
        load_cifar10(tmp_path)


def test_the_seed_fixes_the_net_even_when_the_data_were_read_before(tmp_path: Path, seed: int) -> None:
    write_mnist(tmp_path)
    nets = [TASKS["mnist"].prepare(seed, Options(data_dir=tmp_path)).model for _ in range(2)]
    assert torch.equal(nets[0].get_parameter("fc2.weight"), nets[1].get_parameter("fc2.weight"))


def test_nets() -> None:
    assert CifarNet()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert [len(names) for names in layers_by_child(CifarNet())] == [6, 4]
    assert MnistNet()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert [len(names) for names in layers_by_child(MnistNet())] == [2, 2, 2, 2]
