"""The peak of allocated bytes in a training step, counted tensor storage by tensor storage."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .contenders import Setting, contenders, kept_and_recomputed
from .passes import training_step
from .timing import machine


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, as operations make them and references end.

    Memory that a kernel takes and gives back within one operation is not seen; gradients are accumulated in place
    or taken over, as outside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def watch(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor)
        return result


def peak_of_training_step(model: torch.nn.Module, setting: Setting) -> int:
    """Peak bytes in the second step, when the optimiser has its state."""
    step = training_step(model, setting)
    step()
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with AllocatedBytes() as counter:
        for tensor in (*model.parameters(), *model.buffers()):
            counter.watch(tensor)
        step()
    momentum = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return counter.peak + momentum


def run(models: tuple[str, ...], settings: list[Setting]) -> dict[str, Any]:
    """One row for each contender: MiB at the peak, and ours over it."""
    rows: list[dict[str, Any]] = []
    for name in models:
        for setting in settings:
            peaks, gaps = {}, {}
            models = contenders(name, setting)
            models |= kept_and_recomputed(models["ours"])
            for key, model in models.items():
                try:
                    peaks[key] = peak_of_training_step(model, setting)
                except (ValueError, RuntimeError) as error:
                    gaps[key] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            head = {"model": name, "batch": setting.batch}
            for key, peak in peaks.items():
                row = {**head, "contender": key, "peak_mib": round(peak / 2**20, 1)}
                rows.append(row | ({"ours_over_it": round(peaks["ours"] / peak, 4)} if "ours" in peaks else {}))
            rows += [{**head, "contender": key, "gap": reason} for key, reason in gaps.items()]
    return {"benchmark": "memory", "machine": machine(), "setting": vars(settings[0]), "rows": rows}
