"""What an experiment leaves behind: a picture, its numbers, and what they say of each claim."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import write_text
from ..provenance import provenance
from ..signal import SignalPropagation, plot_signals
from ..signal.propagation import signals_csv, without_non_finite


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, whether the numbers bear it out, and the numbers."""

    text: str
    holds: bool
    evidence: str

    @property
    def verdict(self) -> str:
        return "holds" if self.holds else "FAILS"

    def __str__(self) -> str:
        return f"[{self.verdict}] {self.text}\n        {self.evidence}"


@dataclass(frozen=True)
class Report:
    """A finished experiment."""

    name: str
    title: str
    signals: tuple[SignalPropagation, ...]
    claims: tuple[Claim, ...]
    settings: dict[str, Any]

    def write(self, folder: Path) -> list[Path]:
        """Writes NAME.png, NAME.json and NAME.csv and returns their paths.

        Raises:
            OSError: the folder cannot be made or written to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        picture, numbers, table = (folder / f"{self.name}{ending}" for ending in (".png", ".json", ".csv"))
        plot_signals(self.signals, picture, title=self.title)
        write_text(numbers, json.dumps(without_non_finite(self.to_dict()), indent=1, ensure_ascii=False) + "\n")
        write_text(table, signals_csv(self.signals))
        return [picture, numbers, table]

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain types, with what made it: command, seed, versions, machine."""
        return {
            "name": self.name,
            "title": self.title,
            "settings": self.settings,
            "made_by": provenance(),
            "claims": [asdict(claim) for claim in self.claims],
            "signals": [signal.to_dict() for signal in self.signals],
        }
