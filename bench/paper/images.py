"""MNIST and CIFAR-10: their official files, and the convolutional nets."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.paper.files import find, read_member
from bench.tasks import Data

CIFAR_CLASSES = 10

#: How a file may be compressed, by the end of its name.
OPENERS: dict[str, Callable[[Path], bytes]] = {
    "": Path.read_bytes,
    ".gz": lambda path: gzip.decompress(path.read_bytes()),
    ".xz": lambda path: lzma.decompress(path.read_bytes()),
}


def read(folder: Path, *names: str) -> bytes:
    """The content of the first of these files that is there, as it is or compressed."""
    path = find(folder, [name + end for name in names for end in OPENERS])
    return OPENERS[path.suffix if path.suffix in OPENERS else ""](path)


def read_idx(folder: Path, name: str) -> Tensor:
    """An idx file of bytes (LeCun's MNIST format) as a uint8 tensor of the shape that it gives."""
    content = read(folder, name, name.replace("-idx", ".idx"))
    dimensions = content[3] if len(content) > 4 else 0
    header = 4 + 4 * dimensions
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    if content[:3] != b"\0\0\x08" or len(content) != header + int(np.prod(shape)):
        raise SystemExit(f"error: {name} in {folder} is not an idx file of bytes, or is cut short")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy()).reshape(shape)


def load_mnist(folder: Path) -> Data:
    """60,000 training and 10,000 test images, shape [rows, 1, 28, 28], scaled to mean 0 and deviation 1."""
    pixels = [read_idx(folder, f"{part}-images-idx3-ubyte") for part in ("train", "t10k")]
    labels = [read_idx(folder, f"{part}-labels-idx1-ubyte").long() for part in ("train", "t10k")]
    train, test = normalized(pixels[0].unsqueeze(1), pixels[1].unsqueeze(1))
    return Data(train, labels[0], test, labels[1])


def read_cifar10(content: bytes, name: str) -> tuple[Tensor, Tensor]:
    """Images and labels of a file of CIFAR-10's binary version: records of a label and 3 x 32 x 32 pixels."""
    size = 1 + 3 * 32 * 32
    if not content or len(content) % size:
        raise SystemExit(f"error: {name} is not a file of CIFAR-10's binary version, or is cut short")
    records = torch.from_numpy(np.frombuffer(content, np.uint8).copy()).reshape(-1, size)
    if int(records[:, 0].max()) >= CIFAR_CLASSES:
        raise SystemExit(f"error: {name} has labels above {CIFAR_CLASSES - 1}: no file of CIFAR-10's binary version")
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()


def load_cifar10(folder: Path) -> Data:
    """50,000 training images and those of the test file, scaled by the training set's mean and deviation per channel.

    Of the test images the first 1000 do if the whole file is not there.
    """
    names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    parts = [read_cifar10(_cifar_file(folder, name), name) for name in names]
    test_pixels, y_test = read_cifar10(
        _cifar_file(folder, "test_batch.bin", "test_batch_first1000.bin"), "the test file"
    )
    train, test = normalized(torch.cat([x for x, _ in parts]), test_pixels)
    return Data(train, torch.cat([y for _, y in parts]), test, y_test)


def _cifar_file(folder: Path, name: str, *others: str) -> bytes:
    """A file of the archive as it is, unpacked, or one of the others."""
    content = read_member(folder, "cifar-10-binary.tar.gz", f"cifar-10-batches-bin/{name}")
    return read(folder, name, f"cifar-10-batches-bin/{name}", *others) if content is None else content


def normalized(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes [rows, channels, height, width] to floats: minus mean, by deviation of the training set per channel.

    Channels lie last in memory, which takes a quarter to a third off the time of a step on a CPU.
    """
    values = train.float() / 255
    mean = values.double().mean(dim=(0, 2, 3), keepdim=True).float()
    deviation = values.double().std(dim=(0, 2, 3), keepdim=True).float()
    scaled = (values - mean) / deviation, (test.float() / 255 - mean) / deviation
    return scaled[0].to(memory_format=torch.channels_last), scaled[1].to(memory_format=torch.channels_last)


class CifarNet(nn.Module):
    """The paper's net for CIFAR-10: two children, so two depths. ReLU after pooling: the same bits for less work."""

    def __init__(self) -> None:
        super().__init__()
        convolutions: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 128)):
            convolutions += [nn.Conv2d(before, after, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
        self.features = nn.Sequential(*convolutions)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.features(x))
        return out


class MnistNet(nn.Module):
    """Two convolutions and two Linear layers; the paper has no MNIST, so the net is ours, with four children."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        out: Tensor = self.fc2(x)
        return out
