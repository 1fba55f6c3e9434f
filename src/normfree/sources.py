"""Models by description: ours, timm's, torchvision's, or any callable in a module or a file."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from torch import nn

from ._torchvision import import_timm, import_torchvision
from .models import create_model, list_models
from .models.network import ModelInfo

DEFAULT_INPUT_SIZE = (3, 224, 224)


class SourceError(ValueError):
    """A model that cannot be had from its description; the message says why."""


def load_model(description: str, **options: Any) -> nn.Module:
    """A model from the way it is named on the command line.

    Args:
        description: ``nf_resnet50`` (one of :func:`normfree.list_models`), ``timm:NAME``, ``torchvision:NAME``,
            ``package.module:callable`` or ``path/file.py:callable``. A callable is called with ``options``; it may be
            a class, a function, or a module that is already built.
        options: handed on to whatever makes the model.

    Raises:
        SourceError: unknown name, a file or module that cannot be loaded, or something that is no ``nn.Module``.
    """
    source, colon, name = description.rpartition(":")
    if not colon:
        return _ours(description, options)
    if not source or not name:
        raise SourceError(f"model: expected NAME or SOURCE:NAME, got {description!r}")
    if source == "timm":
        return _from_timm(name, options)
    if source == "torchvision":
        return _from_torchvision(name, options)
    return _from_callable(source, name, options)


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that a model is made for, as far as it says so; else (3, 224, 224)."""
    for holder in (getattr(model, "default_cfg", None), getattr(model, "pretrained_cfg", None)):
        size = holder.get("input_size") if isinstance(holder, dict) else None
        if size is not None and len(size) == 3:
            return (int(size[0]), int(size[1]), int(size[2]))
    info = getattr(model, "info", None)
    if not isinstance(info, ModelInfo):
        return DEFAULT_INPUT_SIZE
    return (info.options.get("in_channels", 3), info.data.test_size, info.data.test_size)


def _ours(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        return create_model(name, **options)
    except ValueError as error:
        if name in list_models():
            raise SourceError(f"model {name}: {error}") from None
        hint = "; models of others are named timm:NAME, torchvision:NAME, package.module:callable or file.py:callable"
        raise SourceError(f"{str(error).removeprefix('name: ')}{hint}") from None


def _from_timm(name: str, options: dict[str, Any]) -> nn.Module:
    timm = import_timm()
    if not timm.is_model(name):
        raise SourceError(f"timm has no model {name!r}{_near(name, timm.list_models())}")
    return _built(f"timm:{name}", lambda: timm.create_model(name, pretrained=False, **options))


def _from_torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    models = import_torchvision().models
    if name not in models.list_models():
        raise SourceError(f"torchvision has no model {name!r}{_near(name, models.list_models())}")
    return _built(f"torchvision:{name}", lambda: models.get_model(name, weights=None, **options))


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def _from_callable(source: str, name: str, options: dict[str, Any]) -> nn.Module:
    module = _file_module(Path(source)) if source.endswith(".py") else _named_module(source)
    try:
        maker = getattr(module, name)
    except AttributeError:
        public = [item for item in vars(module) if not item.startswith("_")]
        raise SourceError(f"{source} has no {name!r}{_near(name, public)}") from None
    if isinstance(maker, nn.Module):
        return maker
    if not callable(maker):
        raise SourceError(f"{source}:{name} is a {type(maker).__name__}, neither a module nor a callable")
    return _built(f"{source}:{name}", lambda: maker(**options))


def _file_module(path: Path) -> Any:
    if not path.is_file():
        raise SourceError(f"there is no file {path}")
    name = f"_normfree_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SourceError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise SourceError(f"cannot load {path}{_line_in(error, path)}: {_brief(error)}") from error
    return module


def _named_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise SourceError(f"cannot import {name}: {_brief(error)}") from error


def _built(description: str, make: Any) -> nn.Module:
    try:
        model = make()
    except Exception as error:
        raise SourceError(f"cannot build {description}: {_brief(error)}") from error
    if not isinstance(model, nn.Module):
        raise SourceError(f"{description} gave a {type(model).__name__}, not an nn.Module")
    return model


def _line_in(error: Exception, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    traceback, line = error.__traceback__, None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(path):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f", line {line}" if line else ""


def _brief(error: Exception) -> str:
    message = str(error.msg if isinstance(error, SyntaxError) else error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__
