"""The paper's first two figures, at a size that a test can afford."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import normfree as nf
from normfree.experiments import Settings, first_figures
from normfree.experiments.first_figures import Scale, figure1, figure2


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_figures, "QUICK", Scale(depth=50, pixels=512, batch_size=1))


def test_figure1_bears_the_claims_out(tmp_path: Path) -> None:
    said: list[str] = []
    report = figure1(Settings(quick=True, say=said.append))
    failed = [claim.text for claim in report.claims if not claim.holds]
    assert failed == []
    assert len(said) == 2
    written = report.write(tmp_path / "new")
    assert [path.name for path in written] == ["figure1.png", "figure1.json", "figure1.csv"]
    data = json.loads(written[1].read_text())
    assert data["settings"]["seed"] == 0
    assert len(data["signals"]) == 2
    assert len(written[2].read_text().splitlines()) == 1 + 2 * 17


def test_figure2_bears_the_claims_out() -> None:
    report = figure2(Settings(quick=True, say=lambda text: None))
    assert [claim.text for claim in report.claims if not claim.holds] == []


def test_claims_can_fail() -> None:
    report = figure1(Settings(quick=True, say=lambda text: None))
    flat = nf.SignalPropagation(
        tuple(replace(p, avg_channel_variance=1.0 + 0.01 * (i % 2)) for i, p in enumerate(report.signals[0].points)),
        "flat",
    )
    assert not first_figures._grows_linearly(flat).holds
    assert not first_figures._is_reset(flat).holds
    assert not first_figures._mean_is_negligible(report.signals[0]).holds
