"""Our own files and folders: without loss, whole or not at all, and clear about what does not fit."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import normfree as nf

OPTIONS = {"num_classes": 5, "width": 0.125}


def model(name: str = "nf_seresnet26", **options: object) -> nf.models.network.ResidualNetwork:
    torch.manual_seed(0)
    made = nf.create_model(name, **{**OPTIONS, **options}).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def assert_same(got: nn.Module, expected: nn.Module) -> None:
    assert got.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert got.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(got.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["nf_seresnet26", "nf_regnet_b0", "bn_regnet_b0", "fixup_resnet26", "eca_nfnet_l0"])
def test_saving_and_loading_loses_nothing(name: str, tmp_path: Path) -> None:
    saved = model(name, padding="same")
    nf.save_weights(saved, tmp_path / "a.safetensors")
    loaded = nf.load_weights(tmp_path / "a.safetensors")
    assert_same(loaded, saved)
    assert loaded.info == saved.info
    assert not loaded.training
    nf.save_weights(loaded, tmp_path / "b.safetensors")
    assert_same(nf.load_weights(tmp_path / "b.safetensors"), saved)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_precision_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = model().to(dtype)
    nf.save_weights(saved, tmp_path / "a.safetensors")
    assert_same(nf.load_weights(tmp_path / "a.safetensors"), saved)


def test_a_model_with_other_classes_is_saved_as_it_is(tmp_path: Path) -> None:
    saved = model()
    saved.reset_classifier(2)
    nf.save_weights(saved, tmp_path / "a.safetensors")
    assert nf.load_weights(tmp_path / "a.safetensors").num_classes == 2
    filled = nf.load_weights(model(), tmp_path / "a.safetensors", classifier="keep")
    assert torch.equal(filled.stem.conv.weight, saved.stem.conv.weight)
    assert filled.num_classes == 5


def test_any_module_can_be_saved_and_filled(tmp_path: Path) -> None:
    saved, other = nn.Linear(3, 2), nn.Linear(3, 2)
    nf.save_weights(saved, tmp_path / "a.safetensors")
    assert nf.load_weights(other, tmp_path / "a.safetensors") is other
    assert_same(other, saved)
    with pytest.raises(nf.CheckpointError, match=r"load_weights\(model, path\)"):
        nf.load_weights(tmp_path / "a.safetensors")


def test_misfits_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    nf.save_weights(model(), path)
    wider, other_classes = model(width=0.25), model(num_classes=7)
    before = {name: tensor.clone() for name, tensor in wider.state_dict().items()}
    with pytest.raises(nf.CheckpointError, match=r"stem.conv.weight: expected shape \(16, .*, got \(8, "):
        nf.load_weights(wider, path)
    assert all(torch.equal(before[name], tensor) for name, tensor in wider.state_dict().items())
    with pytest.raises(nf.CheckpointError, match=r"head.classifier.weight.*\n.*\nclassifier='keep'"):
        nf.load_weights(other_classes, path)
    broken = model()
    with torch.no_grad():
        broken.stem.conv.gain[2] = torch.inf
    nf.save_weights(broken, path)
    with pytest.raises(nf.CheckpointError, match=r"stem.conv.gain: 1 of 8 numbers are NaN or infinite"):
        nf.load_weights(path)


def test_damaged_files(tmp_path: Path) -> None:
    path = nf.save_weights(model(), tmp_path / "a.safetensors")
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-10], whole[::-1]):
        path.write_bytes(content)
        with pytest.raises(nf.CheckpointError, match="truncated or corrupt"):
            nf.load_weights(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        nf.load_weights(tmp_path / "absent.safetensors")


def test_a_file_of_a_model_that_is_not_known(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = {"name": "nf_resnet49", "options": {}, "data": {"mean": [0.5], "std": [0.5]}}
    for metadata in (json.dumps(config), "not json", json.dumps([1])):
        save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"normfree": metadata})
        with pytest.raises(nf.CheckpointError, match="cannot make its model"):
            nf.load_weights(tmp_path / "a.safetensors")


def test_what_has_no_name_cannot_be_written_down(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="activation"):
        nf.save_weights(model(activation=nn.ReLU()), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_hub(tmp_path: Path) -> None:
    saved = model("nf_regnet_b0")
    nf.save_pretrained(saved, tmp_path / "folder")
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    loaded = nf.from_pretrained(tmp_path / "folder")
    assert_same(loaded, saved)
    assert loaded.info == saved.info
    assert_same(nf.load_weights(tmp_path / "folder" / "model.safetensors"), saved)
    with pytest.raises(TypeError, match="create_model"):
        nf.save_pretrained(nn.Linear(1, 1), tmp_path / "other")


def test_pushing_uploads_the_same_folder(monkeypatch, tmp_path: Path) -> None:
    import huggingface_hub

    uploaded: dict[str, object] = {}

    class Api:
        def __init__(self, **_: object):
            pass

        def create_repo(self, repo_id: str, **_: object) -> object:
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id: str, folder_path: Path, **options: object) -> str:
            uploaded.update(options, repo_id=repo_id, model=nf.from_pretrained(folder_path))
            return "address"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    saved = model()
    assert nf.push_to_hub(saved, "someone/net", commit_message="first") == "address"
    assert uploaded["repo_id"] == "someone/net"
    assert uploaded["commit_message"] == "first"
    assert_same(uploaded["model"], saved)


def hubconf(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("hubconf", root / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_torch_hub_entry_points(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    assert set(nf.list_models()) <= set(vars(hubconf(root)))
    made = torch.hub.load(str(root), "nf_resnet26", source="local", num_classes=3, width=0.125)
    assert made.num_classes == 3
    nf.save_weights(model(), tmp_path / "a.safetensors")
    filled = torch.hub.load(str(root), "nf_seresnet26", source="local", weights=tmp_path / "a.safetensors", **OPTIONS)
    assert_same(filled, model())


def test_importing_stays_light() -> None:
    code = "import sys, normfree; print([m for m in ('safetensors', 'huggingface_hub', 'timm') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
