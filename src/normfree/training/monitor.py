"""Signal Propagation Plots while a network trains, in any loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..files import write_text
from ..signal import SignalPropagation, plot_signals, spp
from ..signal.propagation import without_non_finite

Listener = Callable[[int, SignalPropagation], None]


class SignalMonitor:
    """Measures a model's signal every so many steps of a training loop.

    ::

        monitor = SignalMonitor(model, images, every=500, folder="runs/x/signal")
        for step, batch in enumerate(batches):
            ...
            monitor(step)

    The model, its running statistics, its gradients and the random numbers are as before afterwards.

    Args:
        model: any module.
        inputs: what :func:`normfree.spp` takes: a tensor or an iterable of batches, the same for every measurement.
        every: steps between two measurements; step 0 is measured.
        folder: gets ``step-00000500.json`` and ``.png`` for each measurement; None writes nothing.
        on_signal: called with the step and the signal.

    Attributes:
        signals: every measurement that was made, as (step, signal).

    Raises:
        ValueError: ``every`` is not positive, or ``inputs`` is an iterator, which one measurement would use up.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        every: int = 500,
        folder: str | Path | None = None,
        on_signal: Listener | None = None,
    ):
        if every < 1:
            raise ValueError(f"every: expected a positive number of steps, got {every}")
        if isinstance(inputs, Iterator):
            kind = type(inputs).__name__
            raise ValueError(f"inputs: expected a tensor or batches to go through again and again, got a {kind}")
        self.model, self.inputs, self.every = model, inputs, every
        self.folder = None if folder is None else Path(folder)
        self.on_signal = on_signal
        self.signals: list[tuple[int, SignalPropagation]] = []

    def __call__(self, step: int) -> SignalPropagation | None:
        """Measures if it is time to."""
        return self.measure(step) if step % self.every == 0 else None

    def measure(self, step: int) -> SignalPropagation:
        """Measures now."""
        signal = spp(self.model, self.inputs, label=f"step {step}")
        self.signals.append((step, signal))
        if self.folder is not None:
            write_signal(signal, self.folder, f"step-{step:08d}")
        if self.on_signal is not None:
            self.on_signal(step, signal)
        return signal


def write_signal(signal: SignalPropagation, folder: Path, name: str) -> None:
    """NAME.json and NAME.png."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.json", json.dumps(without_non_finite(signal.to_dict()), ensure_ascii=False) + "\n")
    plot_signals([signal], folder / f"{name}.png")


def lightning_callback(inputs: Any, every: int = 500, folder: str | Path | None = None) -> Any:
    """A callback for PyTorch Lightning's ``Trainer`` that does what :class:`SignalMonitor` does, on the first process.

    Steps are the trainer's ``global_step``: optimiser steps, each measured once however many batches it accumulates.
    The callback's ``monitor`` is the :class:`SignalMonitor`; None before the first batch.

    Raises:
        ImportError: neither ``lightning`` nor ``pytorch_lightning`` is installed.
    """
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback  # type: ignore[import-not-found, no-redef]
        except ImportError:
            raise ImportError("lightning_callback needs PyTorch Lightning: pip install lightning") from None

    class SignalCallback(Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.monitor: SignalMonitor | None = None
            self.step = -1

        def on_train_batch_start(self, trainer: Any, module: nn.Module, batch: Any, batch_idx: int) -> None:
            if not trainer.is_global_zero or trainer.global_step == self.step:
                return
            if self.monitor is None:
                self.monitor = SignalMonitor(module, inputs, every, folder)
            self.step = trainer.global_step
            self.monitor(self.step)

    return SignalCallback()
