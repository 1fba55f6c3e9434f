"""`SignalPropagation`: the one type through which signals are measured, predicted, compared and shown."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from ..files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["stem", "block", "transition", "layer"]


@dataclass(frozen=True)
class SignalPoint:
    """The signal at one place: the input of the first residual block, a block's output, or a layer's output.

    Attributes:
        name: module path; for the stem, the path of the block that it enters.
        stage: 0 at the stem, then counting up where the shape changes.
        kind: ``"stem"``, ``"block"`` (shape kept, identity shortcut), ``"transition"``, or ``"layer"``.
        shape: of the activation, as it came (batch included).
        avg_channel_squared_mean: mean over channels of the squared channel mean.
        avg_channel_variance: mean over channels of the channel variance.
        residual_avg_channel_variance: the latter for the residual branch before α, skip gain and stochastic depth;
            None where there is no branch.
        nan_count, inf_count: elements of the activation that are NaN, and infinite.
        gradient_avg_channel_squared_mean, gradient_avg_channel_variance: the first two statistics of the gradient
            of the loss with respect to the activation; None unless asked for.
        gap: in a prediction, the operators between the point before and this one that the theory has no rule for.
    """

    name: str
    stage: int
    kind: Kind
    shape: tuple[int, ...]
    avg_channel_squared_mean: float
    avg_channel_variance: float
    residual_avg_channel_variance: float | None = None
    nan_count: int = 0
    inf_count: int = 0
    gradient_avg_channel_squared_mean: float | None = None
    gradient_avg_channel_variance: float | None = None
    gap: str = ""

    @property
    def is_finite(self) -> bool:
        """Whether no element is NaN or infinite."""
        return self.nan_count == 0 and self.inf_count == 0


@dataclass(frozen=True)
class SignalPropagation:
    """A Signal Propagation Plot as data (Brock et al. 2021, section 3).

    Attributes:
        points: in execution order: the input of the first residual block, then every block's output; in networks
            without residual merges, every layer's output.
        label: what the signal is of; the legend of a plot.
        examples: number of examples that were averaged over.
        notes: what was assumed, skipped or noticed.
    """

    points: tuple[SignalPoint, ...]
    label: str = "model"
    examples: int = 0
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("points: a signal needs at least one point")

    @property
    def first_non_finite(self) -> SignalPoint | None:
        """The first point that holds a NaN or an infinite value, or None."""
        return next((point for point in self.points if not point.is_finite), None)

    @property
    def stage_starts(self) -> list[int]:
        """Indices of the points at which a new stage begins, the stem's left out."""
        pairs = zip(self.points[:-1], self.points[1:], strict=True)
        return [index for index, (before, after) in enumerate(pairs, start=1) if before.stage != after.stage]

    def values(self, statistic: str) -> list[float | None]:
        """One statistic along the points: the name of a numeric field of :class:`SignalPoint`."""
        return [getattr(point, statistic) for point in self.points]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        points = [{**asdict(point), "shape": list(point.shape)} for point in self.points]
        return {"label": self.label, "examples": self.examples, "notes": list(self.notes), "points": points}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SignalPropagation:
        """The inverse of :meth:`to_dict`."""
        points = tuple(SignalPoint(**{**point, "shape": tuple(point["shape"])}) for point in data["points"])
        return cls(points, data["label"], data["examples"], tuple(data["notes"]))

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`to_dict` as JSON; NaN and infinite statistics become null."""
        write_text(path, json.dumps(without_non_finite(self.to_dict()), indent=1, allow_nan=False) + "\n")

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes one row per point; an absent statistic is an empty cell."""
        write_text(path, signals_csv([self], with_label=False))

    def plot(self, path_or_axes: str | os.PathLike[str] | Sequence[Axes]) -> Figure:
        """Draws the three panels to a PNG, SVG or PDF file, or onto three axes; see :func:`plot_signals`."""
        from .plot import plot_signals

        return plot_signals([self], path_or_axes)

    def __str__(self) -> str:
        from .table import signal_table

        return signal_table(self)


def without_non_finite(data: Any) -> Any:
    """The same nested lists and dictionaries, with None for every float that JSON cannot hold."""
    if isinstance(data, dict):
        return {key: without_non_finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [without_non_finite(value) for value in data]
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return None
    return data


def signals_csv(signals: Sequence[SignalPropagation], with_label: bool = True) -> str:
    """One row per point of every signal, in front of it the signal's label and the point's index if asked for."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [item.name for item in fields(SignalPoint)]
    writer.writerow([*(("network", "index") if with_label else ()), *names])
    for signal in signals:
        for index, point in enumerate(signal.points):
            cells = (getattr(point, name) for name in names)
            row = ["x".join(map(str, cell)) if isinstance(cell, tuple) else cell for cell in cells]
            writer.writerow([*((signal.label, index) if with_label else ()), *row])
    return text.getvalue()
