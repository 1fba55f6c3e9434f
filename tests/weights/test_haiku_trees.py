"""Trees of the original: the logits of a NumPy forward pass, every form of tree, every kind of misfit."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial

import haiku_reference as original
import numpy as np
import pytest
import torch

import normfree as nf

CLASSES = 7
D26, D50 = (2, 2, 2, 2), (3, 4, 6, 3)
B0_WIDTHS, B0_DEPTHS = (48, 104, 208, 440), (1, 3, 6, 6)


def scaled(activation: Callable, gamma: float) -> Callable:
    return lambda x: gamma * activation(x)


relu, silu = scaled(original.relu, original.RELU_GAMMA), scaled(original.silu, original.SILU_GAMMA)
gelu = scaled(original.gelu_tanh, original.GELU_GAMMA)
RESNET_STRIDES = (1, 2, 2, 2)

FAMILIES = {
    "nf_resnet50": (
        lambda: original.resnet_tree("NF_ResNet", D50, 0.5, CLASSES),
        partial(original.nf_forward, root="NF_ResNet", depths=D50, strides=RESNET_STRIDES, activation=relu),
        {"width": 0.125},
    ),
    "nf_seresnet26": (
        lambda: original.resnet_tree("NF_ResNet", D26, 1, CLASSES, se_ratio=0.25),
        partial(original.nf_forward, root="NF_ResNet", depths=D26, strides=RESNET_STRIDES, activation=silu),
        {"width": 0.25, "activation": "silu"},
    ),
    "nf_regnet_b0": (
        lambda: original.regnet_tree(B0_WIDTHS, B0_DEPTHS, 0.5, CLASSES),
        partial(original.nf_forward, root="NF_RegNet", depths=B0_DEPTHS, strides=(2, 2, 2, 2), activation=silu),
        {"width": 0.5 / 0.75},
    ),
    "nfnet_f0": (
        lambda: original.nfnet_tree((64, 128, 384, 384), (1, 2, 6, 3), CLASSES),
        partial(original.nf_forward, root="NFNet", depths=(1, 2, 6, 3), strides=RESNET_STRIDES, activation=gelu),
        {"width": 0.25},
    ),
    "skipinit_resnet26": (
        lambda: original.resnet_tree("SkipInit_ResNet", D26, 1, CLASSES),
        partial(original.skipinit_forward, depths=D26),
        {"width": 0.25},
    ),
    "fixup_resnet26": (
        lambda: original.resnet_tree("FixUp_ResNet", D26, 1, CLASSES),
        partial(original.fixup_forward, depths=D26),
        {"width": 0.25},
    ),
}


def small_tree() -> original.Tree:
    return original.resnet_tree("NF_ResNet", D26, 0.25, CLASSES)


def small_model(**options: object) -> nf.models.network.ResidualNetwork:
    return nf.create_model("nf_resnet26", **{"num_classes": CLASSES, "width": 0.0625, "padding": "same", **options})


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_logits_are_those_of_the_original(name: str) -> None:
    make_tree, forward, options = FAMILIES[name]
    tree = make_tree()
    model = nf.create_model(name, num_classes=CLASSES, padding="same", **options).double().eval()
    assert nf.load_haiku(model, tree) is model
    for size in (64, 45):
        images = np.random.default_rng(size).normal(size=(2, size, size, 3))
        expected = forward(images, tree)
        with torch.no_grad():
            got = model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
        assert np.abs(got - expected).max() <= 1e-10 * np.abs(expected).max()


def test_what_is_not_in_the_tree_is_set_to_the_original() -> None:
    model = nf.load_haiku(small_model(padding="symmetric", gain_source="exact", shortcut="avgpool"), small_tree())
    chosen = {"padding": "same", "gain_source": "published", "shortcut": "strided"}
    assert chosen.items() <= model.info.options.items()
    assert model.stages[1][0].conv1.padding == "same"
    assert model.stages[1][0].conv_shortcut.stride == (2, 2)


def test_the_models_own_configuration_can_be_kept() -> None:
    model = nf.load_haiku(small_model(padding="symmetric"), small_tree(), reconfigure=False)
    assert model.info.options["padding"] == "symmetric"
    assert model.info.options["gain_source"] == "exact"


def test_parameters_stay_the_same_objects_for_an_optimiser() -> None:
    model = small_model(padding="symmetric", shortcut="avgpool")
    before = {id(parameter) for parameter in model.parameters()}
    nf.load_haiku(model, small_tree())
    assert {id(parameter) for parameter in model.parameters()} == before


def joined(tree: original.Tree, separator: str) -> dict[str, np.ndarray]:
    return {f"{path}{separator}{name}": array for path, entry in tree.items() for name, array in entry.items()}


def nested(tree: original.Tree) -> dict:
    root: dict = {}
    for path, entry in tree.items():
        place = root
        for part in path.split("/"):
            place = place.setdefault(part, {})
        place.update(entry)
    return {"params": root}


FLAT_FORMS = [partial(joined, separator=separator) for separator in ("/", "//", ":")]


@pytest.mark.parametrize("form", [*FLAT_FORMS, nested])
def test_every_form_of_tree(form: Callable) -> None:
    tree = small_tree()
    expected = snapshot(nf.load_haiku(small_model(), tree))
    got = snapshot(nf.load_haiku(small_model(), form(tree)))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("form", FLAT_FORMS)
def test_every_form_of_file(form: Callable, tmp_path) -> None:
    tree = small_tree()
    np.savez(tmp_path / "tree.npz", **form(tree))
    expected = snapshot(nf.load_haiku(small_model(), tree))
    got = snapshot(nf.load_haiku(small_model(), str(tmp_path / "tree.npz")))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickled_tree_of_arrays_is_read_without_executing_it(protocol: int, tmp_path) -> None:
    path = tmp_path / "F0_haiku.npz"
    path.write_bytes(pickle.dumps(small_tree(), protocol=protocol))
    expected = snapshot(nf.load_haiku(small_model(), small_tree()))
    got = snapshot(nf.load_haiku(small_model(), path))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


class Executed:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def without(tree: original.Tree, path: str) -> original.Tree:
    del tree[path]
    return tree


def with_nan(tree: original.Tree) -> original.Tree:
    tree["NF_ResNet/~/nf_res_block_3/~/conv1"]["gain"][1] = np.nan
    return tree


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (lambda: original.resnet_tree("NF_ResNet", D50, 0.25, CLASSES), "The tree has 16 blocks, the model has 8"),
        (
            lambda: original.resnet_tree("NF_ResNet", D26, 0.5, CLASSES),
            r"expected shape \(4, 3, 7, 7\), got \(8, 3, 7, 7\)",
        ),
        (
            lambda: original.resnet_tree("NF_ResNet", D26, 0.25, 9),
            r"linear/w: expected shape \(7, .*, got \(9, ",
        ),
        (lambda: original.resnet_tree("SkipInit_ResNet", D26, 0.25, CLASSES), "SkipInit_ResNet"),
        (lambda: without(small_tree(), "NF_ResNet/~/nf_res_block_7/~/conv2"), "nf_res_block_7/conv2/w: missing"),
        (lambda: with_nan(small_tree()), "nf_res_block_3/conv1/gain: 1 of 8 numbers are NaN"),
        (lambda: {**small_tree(), "NF_ResNet/~/linear": {"w": np.array(["a"]), "b": np.zeros(7)}}, "floating-point"),
        (lambda: 3, "expected a mapping"),
    ],
)
def test_a_tree_that_does_not_fit_is_named_and_changes_nothing(tree: Callable, message: str) -> None:
    model = small_model(padding="symmetric")
    before, options = snapshot(model), dict(model.info.options)
    with pytest.raises(nf.CheckpointError, match=message):
        nf.load_haiku(model, tree())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.info.options == options
    assert model.stages[1][0].conv1.padding == (1, 1)


def test_other_classes_keep_the_models_classifier() -> None:
    model = small_model(num_classes=3)
    classifier = model.head.classifier.weight.clone()
    tree = small_tree()
    with pytest.raises(nf.CheckpointError, match="classifier='keep'"):
        nf.load_haiku(model, tree)
    nf.load_haiku(model, tree, classifier="keep")
    assert torch.equal(model.head.classifier.weight, classifier)
    assert model.stem.conv.gain.detach().numpy() == pytest.approx(tree["NF_ResNet/~/initial_conv"]["gain"])
    features_only = nf.load_haiku(small_model(num_classes=0), tree)
    assert torch.equal(features_only.stem.conv.weight, model.stem.conv.weight)


def test_damaged_and_dangerous_files(tmp_path) -> None:
    np.savez(tmp_path / "tree.npz", **joined(small_tree(), "/"))
    whole = (tmp_path / "tree.npz").read_bytes()
    files = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "noise": bytes(range(256)),
        "pickle": pickle.dumps({"NF_ResNet/~/linear": {"w": Executed()}}),
        "short_pickle": pickle.dumps(small_tree())[:1000],
    }
    for name, content in files.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    np.savez(tmp_path / "objects.npz", tree=np.array([Executed()], dtype=object))
    for name in [*files, "objects"]:
        with pytest.raises(nf.CheckpointError, match=r"corrupt|never executed"):
            nf.load_haiku(small_model(), tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError, match="absent"):
        nf.load_haiku(small_model(), tmp_path / "absent.npz")


def test_only_models_that_the_original_has() -> None:
    with pytest.raises(nf.CheckpointError, match="has no resnetv2_26"):
        nf.load_haiku(nf.create_model("resnetv2_26", width=0.0625), small_tree())
    with pytest.raises(TypeError, match="create_model"):
        nf.load_haiku(torch.nn.Linear(2, 2), small_tree())
