"""Finding the files of a data set in the folder that the user gives."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path


def need_folder(folder: Path | None, what: str) -> Path:
    """The folder itself, or an error that says what to put there."""
    if folder is None:
        raise SystemExit(f"error: --data-dir is missing: the folder with {what}")
    if not folder.is_dir():
        raise SystemExit(f"error: --data-dir: {folder} is not a folder; it should hold {what}")
    return folder


def find(folder: Path, names: Sequence[str]) -> Path:
    """The first of these files that is in the folder."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise SystemExit(f"error: none of {', '.join(names)} in {folder}")


def read_member(folder: Path, archive: str, member: str) -> bytes | None:
    """A file of an archive, .zip or .tar.gz, as it was published; None where the archive is not in the folder."""
    path = folder / archive
    if not path.is_file():
        return None
    try:
        if archive.endswith(".zip"):
            with zipfile.ZipFile(path) as zipped:
                return zipped.read(member)
        with tarfile.open(path) as tar:
            file = tar.extractfile(member)
            return None if file is None else file.read()
    except (KeyError, zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise SystemExit(f"error: {path} cannot be read, or {member} is not in it ({error})") from None
