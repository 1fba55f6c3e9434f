"""Entry points for ``torch.hub``: one for each name of ``normfree.list_models()``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path as _Path
from typing import Any

dependencies = ["torch", "numpy", "scipy", "safetensors"]

try:
    import normfree as _normfree
except ModuleNotFoundError:  # not installed: the package lies beside this file
    sys.path.insert(0, str(_Path(__file__).parent / "src"))
    import normfree as _normfree


def _entry_point(name: str, description: str) -> Callable[..., Any]:
    def create(weights: str | None = None, **options: Any) -> Any:
        model = _normfree.create_model(name, **options)
        return model if weights is None else _normfree.load_weights(model, weights)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""{description}.

    Args:
        weights: a file of ``normfree.save_weights`` to fill the model from.
        options: of ``normfree.create_model``.
    """
    return create


for _name in _normfree.list_models():
    globals()[_name] = _entry_point(_name, _normfree.models.model_entry(_name).description)
