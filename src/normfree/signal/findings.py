"""What a diagnosis says: findings, and the report that they make."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..files import write_text
from .propagation import without_non_finite

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or worth knowing.

    Attributes:
        kind: a short identifier, such as ``"mean-shift"``.
        place: name of the point where it begins.
        cause: what happens, and why.
        numbers: the evidence.
        remedy: what to change.
        severity: ``"error"``, ``"warning"`` or ``"info"``.
    """

    kind: str
    place: str
    cause: str
    numbers: dict[str, float]
    remedy: str
    severity: Severity = "warning"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return asdict(self)

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in self.numbers.items())
        return f"{self.severity}: {self.place}: {self.cause} ({numbers}). {self.remedy}"


class Diagnosis(list[Finding]):
    """Findings, the gravest first; empty for a healthy network. Printing it gives the report."""

    label: str = "model"

    @property
    def healthy(self) -> bool:
        """Whether there is nothing beyond remarks."""
        return all(finding.severity == "info" for finding in self)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return {
            "label": self.label,
            "healthy": self.healthy,
            "findings": without_non_finite([finding.to_dict() for finding in self]),
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`to_dict`."""
        write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def __str__(self) -> str:
        head = [f"{self.label}: healthy"] if self.healthy else [f"{self.label}: {_counted(self)}"]
        return "\n".join([*head, *(f"  {finding}" for finding in self)])


def _counted(findings: Iterable[Finding]) -> str:
    grave = [finding for finding in findings if finding.severity != "info"]
    return f"{len(grave)} finding{'s' if len(grave) != 1 else ''}"
