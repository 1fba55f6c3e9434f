"""The data type, its files, its table and its plot."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import normfree as nf
from normfree.signal.table import sparkline

POINTS = (
    nf.SignalPoint("stem", 0, "stem", (2, 4, 8, 8), 0.5, 0.4),
    nf.SignalPoint("a", 1, "transition", (2, 8, 8, 8), 0.01, 1.1, 1.0),
    nf.SignalPoint("b", 1, "block", (2, 8, 8, 8), 0.02, 1.2, 0.9),
    nf.SignalPoint("c", 2, "transition", (2, 16, 4, 4), 0.03, 1.1, 0.8),
)
SIGNAL = nf.SignalPropagation(POINTS, "net", 2, ("a note",))
BROKEN = nf.SignalPropagation(
    (*POINTS[:2], nf.SignalPoint("b", 1, "block", (2, 8, 8, 8), float("nan"), float("inf"), 1.0, 3, 1))
)


def test_dictionaries_go_there_and_back() -> None:
    assert nf.SignalPropagation.from_dict(json.loads(json.dumps(SIGNAL.to_dict()))) == SIGNAL
    assert SIGNAL.stage_starts == [1, 3]
    assert SIGNAL.values("residual_avg_channel_variance") == [None, 1.0, 0.9, 0.8]


def test_json_is_strict(tmp_path: Path) -> None:
    BROKEN.to_json(tmp_path / "signal.json")
    data = json.loads((tmp_path / "signal.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert data["points"][2]["avg_channel_variance"] is None
    assert data["points"][2]["nan_count"] == 3


def test_csv_has_a_row_per_point(tmp_path: Path) -> None:
    SIGNAL.to_csv(tmp_path / "signal.csv")
    rows = list(csv.DictReader((tmp_path / "signal.csv").open()))
    assert [row["name"] for row in rows] == ["stem", "a", "b", "c"]
    assert rows[0]["residual_avg_channel_variance"] == ""
    assert float(rows[2]["avg_channel_variance"]) == 1.2
    assert rows[3]["shape"] == "2x16x4x4"


def test_a_signal_has_points() -> None:
    with pytest.raises(ValueError, match="points"):
        nf.SignalPropagation(())


def test_the_table_names_stages_numbers_and_trouble() -> None:
    text = str(SIGNAL)
    assert text.splitlines()[0] == "net: 4 points, 2 examples"
    assert [line.split()[0] for line in text.splitlines()[3:6]] == ["stem", "1", "2"]
    assert "1.1 → 1.2" in text
    assert "note: a note" in text
    assert "! b is the first point with 3 NaN and 1 infinite values" in str(BROKEN)


def test_sparklines_rise_with_their_values() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 0, 7) == "▁▂▃▄▅▆▇█"
    assert sparkline([None, float("nan"), 1.0], 0, 1) == "·!█"
    assert len(sparkline(list(range(500)), 0, 500)) == 24


@pytest.mark.parametrize(("ending", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_plots_in_three_formats(tmp_path: Path, ending: str, magic: bytes) -> None:
    figure = SIGNAL.plot(tmp_path / f"spp{ending}")
    assert (tmp_path / f"spp{ending}").read_bytes().startswith(magic)
    assert [axis.get_title() for axis in figure.axes] == [
        "Average channel squared mean",
        "Average channel variance",
        "Residual average channel variance",
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / f"spp{ending}"]


def test_plots_show_the_numbers() -> None:
    axes = list(Figure().subplots(1, 3))
    nf.plot_signals([SIGNAL, nf.SignalPropagation(POINTS[:3], "short")], axes)
    lines = axes[1].get_lines()
    assert list(lines[0].get_ydata()) == [0.4, 1.1, 1.2, 1.1]
    assert lines[0].get_label() == "net"
    assert axes[0].get_yscale() == "log"
    assert axes[1].get_yscale() == "linear"
    styles = {(line.get_linestyle(), line.get_marker()) for line in lines[:2]}
    assert len(styles) == 2, "curves must differ without colour"


def test_plots_of_non_finite_signals(tmp_path: Path) -> None:
    BROKEN.plot(tmp_path / "broken.png")
    assert (tmp_path / "broken.png").stat().st_size > 1000


def test_bad_plot_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ending in"):
        SIGNAL.plot(tmp_path / "spp.jpg")
    with pytest.raises(ValueError, match="3 axes"):
        SIGNAL.plot(list(Figure().subplots(1, 2)))
    with pytest.raises(ValueError, match="at least one"):
        nf.plot_signals([], tmp_path / "x.png")
    with pytest.raises(OSError, match="cannot write"):
        SIGNAL.plot(tmp_path / "missing" / "spp.png")
    assert list(tmp_path.iterdir()) == []
