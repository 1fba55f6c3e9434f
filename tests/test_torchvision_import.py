"""torchvision and timm import in a fresh interpreter, in either order, and say plainly when they are absent."""

from __future__ import annotations

import subprocess
import sys

import pytest

from normfree._torchvision import import_timm, import_torchvision


def test_timm_can_be_the_first_to_need_torchvision() -> None:
    code = (
        "from normfree._torchvision import import_timm, import_torchvision\n"
        "import_timm().create_model\n"
        "from torchvision.transforms import v2\n"
        "assert import_torchvision() is import_torchvision()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("load", "name"), [(import_torchvision, "torchvision"), (import_timm, "timm")])
def test_an_absent_package_is_named_with_the_command_that_installs_it(load, name, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(ImportError, match=f"pip install {name}"):
        load()


def test_another_failure_is_passed_on(monkeypatch) -> None:
    import importlib

    def fail(name: str) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(RuntimeError, match="something else"):
        import_timm()
