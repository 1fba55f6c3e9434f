import subprocess
import sys

import pytest

FORBIDDEN = ["scipy", "matplotlib", "typer", "rich", "timm", "torchvision", "PIL", "pyarrow"]


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_import_pulls_in_torch_and_numpy_alone():
    loaded = loaded_by("import normfree")
    assert {"torch", "numpy", "normfree"} <= loaded
    assert not loaded & set(FORBIDDEN)


def test_models_of_plain_activations_need_no_more():
    statement = (
        "import normfree as nf; nf.create_model('nf_resnet26', width=0.125); nf.list_models(); nf.gain('elu(0.5)')"
    )
    assert not loaded_by(statement) & set(FORBIDDEN)


@pytest.mark.parametrize("name", __import__("normfree").__all__)
def test_every_public_name_is_there_and_explained(name):
    import normfree

    thing = getattr(normfree, name)
    assert name == "__version__" or thing.__doc__
