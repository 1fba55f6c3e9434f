"""Which values some tensors hold, so that what was computed from them can be kept until they change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """The identity, version and place of tensors at one moment.

    It sees every change that torch counts (in-place operations, optimiser steps, ``load_state_dict``, also through
    ``detach()`` and views), new memory (``.data = …``, moves) and other tensors in their place. It cannot see writes
    through ``tensor.data.copy_(…)``, NumPy or DLPack, which share memory but no version.
    """

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    storages: tuple[torch.UntypedStorage, ...]  # kept alive: no other tensor can come to lie at the same address
    addresses: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    @staticmethod
    def of(*tensors: Tensor) -> Snapshot:
        """Raises RuntimeError for tensors made in inference mode, which have no version."""
        return Snapshot(
            tensors,
            tuple(tensor._version for tensor in tensors),
            tuple(tensor.untyped_storage() for tensor in tensors),
            tuple(tensor.data_ptr() for tensor in tensors),
            tuple(tensor.dtype for tensor in tensors),
        )

    def is_of(self, *tensors: Tensor) -> bool:
        """Whether these very tensors were taken, whatever they hold by now."""
        return len(tensors) == len(self.tensors) and all(a is b for a, b in zip(tensors, self.tensors, strict=True))

    def is_unwritten(self) -> bool:
        """As :meth:`is_current`, but memory may have been given back and filled again meanwhile, as FSDP does."""
        return all(
            tensor._version == version and tensor.untyped_storage()._cdata == storage._cdata
            for tensor, version, storage in zip(self.tensors, self.versions, self.storages, strict=True)
        )

    def is_current(self) -> bool:
        """Whether the tensors still hold what they held."""
        return self.is_current_of(self.tensors)

    def is_current_of(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether these very tensors were taken and still hold what they held."""
        if len(tensors) != len(self.tensors):
            return False
        for tensor, taken, version, address, dtype in zip(  # in every forward pass; a generator takes twice as long
            tensors, self.tensors, self.versions, self.addresses, self.dtypes, strict=False
        ):
            if (
                tensor is not taken
                or tensor._version != version
                or tensor.data_ptr() != address
                or tensor.dtype != dtype
            ):
                return False
        return True
