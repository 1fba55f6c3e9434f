"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from normfree.files import atomic_path, write_text


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    write_text(target, "old")

    def fail() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_permissions_are_those_of_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot write"):
        write_text(tmp_path / "missing" / "x", "")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        write_text(tmp_path, "")
