"""TREC-6, RTE and IMDb: their official files as lists of texts and labels."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bench.paper.files import find, read_member

TREC_LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
RTE_LABELS = ("entailment", "not_entailment")
IMDB_LABELS = ("neg", "pos")


@dataclass(frozen=True)
class Texts:
    """Labelled texts, one or two a row. Labels are indices."""

    rows: list[tuple[str, ...]]
    labels: list[int]


def read_trec6(folder: Path) -> tuple[Texts, Texts]:
    """Training and test questions of train_5500.label and TREC_10.label, in latin-1; "DESC:manner How ..." a line."""
    return _read_trec(find(folder, ["train_5500.label"])), _read_trec(find(folder, ["TREC_10.label"]))


def _read_trec(path: Path) -> Texts:
    texts = Texts([], [])
    for number, line in enumerate(path.read_text("latin-1").split("\n"), start=1):
        if not line.strip():
            continue
        label, _, question = line.partition(" ")
        coarse = label.partition(":")[0]
        if coarse not in TREC_LABELS or not question:
            raise SystemExit(f"error: {path}, line {number}: expected 'LABEL:kind question', got {line[:60]!r}")
        texts.rows.append((question,))
        texts.labels.append(TREC_LABELS.index(coarse))
    return texts


def read_rte(folder: Path) -> tuple[Texts, Texts]:
    """GLUE's train.tsv and dev.tsv; the labels of test.tsv are not public, so accuracy is that of dev, as in the paper.

    Rows are split at tabs alone: the texts contain unpaired quotation marks.
    """
    return _read_rte(folder, "train.tsv"), _read_rte(folder, "dev.tsv")


def _read_rte(folder: Path, name: str) -> Texts:
    content = read_member(folder, "RTE.zip", f"RTE/{name}")
    path = folder / "RTE.zip" / name
    if content is None:
        path = find(folder, [name, f"RTE/{name}"])
        content = path.read_bytes()
    texts = Texts([], [])
    header, *lines = content.decode("utf-8").replace("\r\n", "\n").split("\n")
    if header.split("\t") != ["index", "sentence1", "sentence2", "label"]:
        raise SystemExit(f"error: {path}: the first line is not 'index sentence1 sentence2 label', split by tabs")
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != 4 or cells[3] not in RTE_LABELS:
            raise SystemExit(f"error: {path}, line {number}: expected four cells, the last a label, got {line[:60]!r}")
        texts.rows.append((cells[1], cells[2]))
        texts.labels.append(RTE_LABELS.index(cells[3]))
    return texts


def read_imdb(folder: Path) -> tuple[Texts, Texts]:
    """The labelled reviews of aclImdb: the unpacked folder, or the archive as it is.

    Classes take turns, so that the test rows of even and of odd index hold as many of each.
    """
    for unpacked in (folder / "aclImdb", folder):
        if (unpacked / "train" / "pos").is_dir():
            reviews = {
                str(path.relative_to(unpacked)): path.read_text("utf-8")
                for path in unpacked.glob("*/*/*.txt")
                if path.parent.name in IMDB_LABELS
            }
            break
    else:
        reviews = _unpack(find(folder, ["aclImdb_v1.tar.gz", "aclImdb_labelled.tar.gz"]))
    return _imdb_part(reviews, "train", folder), _imdb_part(reviews, "test", folder)


def _unpack(archive: Path) -> dict[str, str]:
    reviews = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if member.isfile() and len(parts) == 4 and parts[2] in IMDB_LABELS:
                file = tar.extractfile(member)
                assert file is not None  # it is a file
                reviews["/".join(parts[1:])] = file.read().decode("utf-8")
    return reviews


def _imdb_part(reviews: dict[str, str], part: str, folder: Path) -> Texts:
    names = {label: sorted(name for name in reviews if name.startswith(f"{part}/{label}/")) for label in IMDB_LABELS}
    if not names["neg"] or len(names["neg"]) != len(names["pos"]):
        counts = ", ".join(f"{len(found)} {label}" for label, found in names.items())
        raise SystemExit(f"error: {folder}: {part} should hold as many negative as positive reviews, got {counts}")
    # Labels 0 0 1 1 0 0 1 1 ...: both halves of the test rows are balanced.
    texts = Texts([], [])
    for start in range(0, len(names["neg"]), 2):
        for label, index in (("neg", 0), ("pos", 1)):
            for name in names[label][start : start + 2]:
                texts.rows.append((reviews[name],))
                texts.labels.append(index)
    return texts
