"""Models by description."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from normfree.sources import SourceError, input_size, load_model


def test_models_of_every_source(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def small(width=4):\n    return nn.Linear(3, width)\n"
        "built = nn.Linear(2, 2)\n"
        "number = 3\n"
    )
    ours = load_model("nf_resnet26", width=0.25, num_classes=7)
    assert ours.num_classes == 7
    assert type(load_model("torchvision:resnet18")).__name__ == "ResNet"
    assert type(load_model("timm:resnetv2_50")).__name__ == "ResNetV2"
    assert isinstance(load_model("torch.nn:Identity"), nn.Identity)
    assert load_model(f"{tmp_path}/mine.py:small", width=9).out_features == 9
    assert load_model(f"{tmp_path}/mine.py:built").in_features == 2
    with pytest.raises(SourceError, match="is a int, neither"):
        load_model(f"{tmp_path}/mine.py:number")
    with pytest.raises(SourceError, match="did you mean small"):
        load_model(f"{tmp_path}/mine.py:smal")


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("nf_resnet5", "did you mean nf_resnet50"),
        ("timm:resnet5", "timm has no model 'resnet5'; did you mean"),
        ("torchvision:resnet5", "torchvision has no model 'resnet5'; did you mean"),
        ("missing.py:model", "there is no file missing.py"),
        ("no_such_package:model", "cannot import no_such_package"),
        ("torch.nn:", "expected NAME or SOURCE:NAME"),
        ("os:getcwd", "gave a str, not an nn.Module"),
        ("torch.nn:Linear", "cannot build torch.nn:Linear: TypeError"),
    ],
)
def test_bad_descriptions(description: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load_model(description)


@pytest.mark.parametrize(
    ("text", "message"),
    [("def f(:\n", "line 1: SyntaxError"), ("x = 1\nraise KeyError('q')\n", "line 2: KeyError: 'q'")],
)
def test_files_with_errors_in_them(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(SourceError, match=message):
        load_model(f"{tmp_path}/bad.py:f")


def test_the_input_size_that_a_model_was_made_for() -> None:
    assert input_size(load_model("timm:botnet26t_256")) == (3, 256, 256)
    assert input_size(load_model("nf_resnet26", width=0.25, in_channels=1)) == (1, 224, 224)
    assert input_size(load_model("nf_regnet_b1")) == (3, 256, 256)
    assert input_size(nn.Identity()) == (3, 224, 224)
