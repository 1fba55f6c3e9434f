"""What is at a path, and which of its files are for training and which for validation."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .errors import DataError

Kind = Literal["digits", "hub", "parquet", "webdataset", "folder"]

TRAINING_NAMES = ("train", "training")
VALIDATION_NAMES = ("validation", "valid", "val", "test", "testing", "eval", "dev")
_SUFFIXES: dict[str, Kind] = {".parquet": "parquet", ".tar": "webdataset"}
_KIND_NAMES = {"parquet": "Parquet files", "webdataset": "WebDataset shards"}


@dataclass(frozen=True)
class SplitFiles:
    """The files of both splits; ``held_out``: the first are for both, and some of their rows are for validation."""

    train: list[Path] = field(default_factory=list)
    validation: list[Path] = field(default_factory=list)
    held_out: bool = False


def kind_of(path: str) -> Kind:
    """What a ``data.path`` means.

    Raises:
        DataError: nothing there, a file that holds no data set, or two kinds of data in one folder.
    """
    if path == "digits":
        return "digits"
    if path.startswith("hub:"):
        return "hub"
    place = Path(path).expanduser()
    if place.is_dir():
        found = {kind for suffix, kind in _SUFFIXES.items() if _below(place, suffix)}
        if len(found) > 1:
            names = " and ".join(_KIND_NAMES[kind] for kind in sorted(found))
            raise DataError(f"data: {path} holds {names}; name those that are meant: data={path}/*.parquet")
        return found.pop() if found else "folder"
    files = [place] if place.is_file() else _globbed(path)
    if not files:
        raise DataError(
            f"data: there is no file or folder {path}; expected digits, a folder, Parquet file(s), "
            "WebDataset shards (.tar) or hub:NAME"
        )
    kinds = {_SUFFIXES.get(file.suffix.lower()) for file in files}
    if len(kinds) > 1 or None in kinds:
        raise DataError(f"data: {path} is neither Parquet (.parquet) nor WebDataset (.tar)")
    return _SUFFIXES[files[0].suffix.lower()]


def split_files(path: str, suffix: str, train: str | None, validation: str | None) -> SplitFiles:
    """Which files of a data set belong to which split.

    A pattern given for a split decides; else the names of files and folders (``train…``, ``validation…``, ``val…``,
    ``test…``; validation goes before test); else all files are for training, with some of their rows held out.

    Raises:
        DataError: a pattern that no file fits, or files of which some say what they are for and some do not.
    """
    place = Path(path).expanduser()
    root = place if place.is_dir() else place.parent
    files = _below(place, suffix) if place.is_dir() else [place] if place.is_file() else _globbed(path)
    chosen_train = _chosen(root, suffix, train, "train") if train else None
    chosen_validation = _chosen(root, suffix, validation, "validation") if validation else None
    named_train = [file for file in files if _named(file, root, TRAINING_NAMES)]
    named_validation = next(
        (found for name in VALIDATION_NAMES if (found := [file for file in files if _named(file, root, (name,))])), []
    )
    if chosen_train is None and chosen_validation is None and not named_train and not named_validation:
        return SplitFiles(files, files, held_out=True)
    first = named_train if chosen_train is None else chosen_train
    second = named_validation if chosen_validation is None else chosen_validation
    if chosen_train is None and not first and chosen_validation is not None:
        first = [file for file in files if file not in second]
    if first and not second:
        return SplitFiles(first, first, held_out=True)
    return SplitFiles(first, [] if first == second and validation is None else second)


def split_folder(root: Path, chosen: str | None, names: Sequence[str]) -> Path | None:
    """The sub-folder of a split, by the name that was chosen or by its usual ones; None if there is none.

    Raises:
        DataError: the chosen one does not exist.
    """
    if chosen is not None:
        folder = next((place for place in (root / chosen, Path(chosen).expanduser()) if place.is_dir()), None)
        if folder is None:
            raise DataError(f"data: there is no folder {chosen} in {root}")
        return folder
    folders = {place.name.lower(): place for place in folders_in(root)}
    return next((folders[name] for name in names if name in folders), None)


def folders_in(root: Path) -> list[Path]:
    """Sub-folders in the order of their names, hidden ones left out."""
    return sorted(place for place in root.iterdir() if place.is_dir() and not place.name.startswith("."))


def _named(file: Path, root: Path, names: Iterable[str]) -> bool:
    """Whether the file's name, or a folder between it and the root, begins with one of the names as a word."""
    parts = file.relative_to(root).parts if file.is_relative_to(root) else (file.name,)
    return any(_starts_with_word(part.lower(), name) for part in parts for name in names)


def _starts_with_word(text: str, word: str) -> bool:
    rest = text.removeprefix(word)
    return text.startswith(word) and not rest[:1].isalpha()


def _chosen(root: Path, suffix: str, pattern: str, split: str) -> list[Path]:
    """Files by the pattern of a split: a file, a folder, a glob, or the first letters of files, below the root."""
    for place in (root / pattern, Path(pattern).expanduser()):
        if place.is_file():
            return [place]
        if place.is_dir():
            return _below(place, suffix)
    files = _globbed(str(root / pattern)) or _globbed(pattern)
    files = files or [file for file in _below(root, suffix) if _named(file, root, (pattern.lower(),))]
    if not files:
        raise DataError(f"data.{split}: no file fits {pattern!r} in {root}")
    return files


def _below(folder: Path, suffix: str) -> list[Path]:
    """Files with this suffix at any depth, sorted, hidden ones left out."""
    return sorted(
        file
        for file in folder.rglob(f"*{suffix}")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def _globbed(pattern: str) -> list[Path]:
    return sorted(Path(file) for file in glob.glob(str(Path(pattern).expanduser()), recursive=True))
