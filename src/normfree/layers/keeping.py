"""Modules that keep a tensor computed from their parameters, as long as the parameters stay what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from .._allocator import keep_freed_memory
from .._snapshot import Snapshot
from ..standardize import Scale
from ..standardize.ordinary import ORDINARY, looked_into


@dataclass(frozen=True)
class _Kept:
    """A tensor, and what it was computed from."""

    snapshot: Snapshot
    constant: float | None
    value: Tensor
    version: int  # of the value, which a caller might overwrite


_OF_THIS_MODULE = ("_kept", "_shared", "_held")
"""What a module keeps for itself: no copy, pickle or replica has it."""


class KeepsWhatItComputes:
    """A module that keeps a tensor computed from its parameters: in evaluation its own, and one shared for a while.

    What is kept leaves with a change of mode, of device or of precision, and is neither copied nor pickled. Mixed
    into a torch module, in front of it.
    """

    training: bool
    _kept: _Kept | None = None
    _shared: SharedTensor | None = None
    _held: torch.UntypedStorage | None = None

    def _hold(self, value: Tensor) -> None:
        """Holds a tensor's memory until the next one is there, which therefore finds as much memory free.

        Memory that C's allocator has given back to the system costs more to get again than a standardized weight
        costs to compute. Graphics cards have an allocator that gives nothing back.
        """
        if self.training and value.requires_grad and value.device.type == "cpu" and not looked_into():
            keep_freed_memory()
            self.__dict__["_held"] = value.untyped_storage()  # a module's own way takes longer

    def _computed(self, sources: tuple[Tensor, ...], constant: float | None, compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, or what it gave before if neither the sources nor the constant have changed since."""
        if not self._may_keep():
            return compute()
        kept = self._kept
        if (
            kept is not None
            and kept.constant == constant
            and kept.snapshot.is_current_of(sources)
            and kept.value._version == kept.version
        ):
            return kept.value
        if not _have_versions(sources):
            return compute()
        snapshot = Snapshot.of(*sources)  # before computing: a change by another thread meanwhile is then seen
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
        if type(value) is Tensor:
            self._kept = _Kept(snapshot, constant, value, value._version)
        return value

    def _may_keep(self) -> bool:
        return not (self.training or torch.is_grad_enabled() or looked_into())

    def train(self, mode: bool = True) -> Self:
        self._kept = self._held = None
        return super().train(mode)  # type: ignore[misc, no-any-return]

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._kept = self._held = None
        return super()._apply(*args, **kwargs)  # type: ignore[misc, no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _OF_THIS_MODULE}

    def _replicate_for_data_parallel(self) -> Self:
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        for key in _OF_THIS_MODULE:
            replica.__dict__.pop(key, None)
        return cast(Self, replica)


def _have_versions(sources: tuple[Tensor, ...]) -> bool:
    """Whether changes of a parameter and what goes with it can be seen."""
    return isinstance(sources[0], nn.Parameter) and all(
        type(source) in ORDINARY and not source.is_inference() for source in sources
    )


class SharedTensor:
    """What :func:`normfree.shared_standardization` gives a module in place of what it would compute itself."""

    def get(self, module: Any, output_scale: Scale | None) -> Tensor | None:
        """The tensor, or None where the module has to compute its own."""
        raise NotImplementedError
