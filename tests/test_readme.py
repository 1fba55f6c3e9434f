"""The README's Python examples run as they are written, on small networks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

import normfree as nf
from normfree._torchvision import import_timm

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the examples take for granted; models as wide as a test can afford."""
    monkeypatch.chdir(tmp_path)
    create_model = nf.create_model
    timm = import_timm()
    timm_create_model = timm.create_model

    def narrow(name: str, *args: Any, **options: Any) -> Any:
        return create_model(name.replace("600", "26"), *args, **{"width": 0.25, **options})

    monkeypatch.setattr(nf, "create_model", narrow)
    monkeypatch.setattr(nf, "load_haiku", lambda model, path: model)  # the file is 300 MB; tests/weights reads others
    save_file(timm_create_model("nf_resnet26").state_dict(), "nf_resnet50.safetensors")
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    return {
        "nf": nf,
        "torch": torch,
        "cross_entropy": cross_entropy,
        "model": create_model("nf_resnet26", 20, width=0.25),
        "images": images,
        "labels": labels,
        "one_at_a_time": list(zip(images, labels, strict=True)),
        "accumulate": 2,
    }


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0][:40] for block in BLOCKS])
def test_example(block: str, names: dict[str, Any]) -> None:
    exec(compile(block, str(README), "exec"), names)
    if "per_example" in names:
        assert all(gradient.shape[0] == 2 for gradient in names["per_example"].values())
    if "accumulate)" in block:
        assert all(parameter.grad is not None for parameter in names["model"].parameters())
