"""Every table of a machine in one go, each written as soon as it is finished."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import memory, passes, report, scaling
from .contenders import Setting

_BATCHES = {
    "cpu": {"train": (1, 16), "infer": (1, 8), "accumulate": (1,), "memory": (16,)},
    "cuda": {"train": (1, 8, 64, 256), "infer": (1, 8, 64, 256), "accumulate": (1, 8), "memory": (64,)},
}


def tables(base: Setting, batches: tuple[int, ...] | None) -> Iterator[tuple[str, str, list[Setting]]]:
    """File name, benchmark and settings: contiguous and channels_last, each eager and compiled."""
    for is_compiled in (False, True):
        for channels_last in (False, True):
            here = replace(base, channels_last=channels_last, compile=is_compiled)
            suffix = ("-channels-last" if channels_last else "") + ("-compiled" if is_compiled else "")
            for kind, usual in _BATCHES[base.device].items():
                if kind == "memory" and is_compiled:
                    continue
                settings = [replace(here, batch=batch) for batch in batches or usual]
                yield f"{kind}{suffix}", kind, settings


def run(
    out: Path,
    base: Setting,
    models: tuple[str, ...],
    repeats: int,
    rounds: int = 2,
    budget: float = 300.0,
    batches: tuple[int, ...] | None = None,
    depths: tuple[int, ...] = scaling.DEPTHS,
) -> list[str]:
    """Writes NAME.json, NAME.csv and NAME.png for every table into ``out``; returns what failed, with the reason."""
    out.mkdir(parents=True, exist_ok=True)
    failures = []
    for name, kind, settings in tables(base, batches):
        try:
            if kind == "memory":
                result = memory.run(models, settings)
            else:
                result = passes.run(kind, models, settings, repeats, rounds)
        except Exception as error:  # one table less, not all of them
            failures.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            print(failures[-1], file=sys.stderr, flush=True)
            continue
        _write(result, out / name)
    _write(scaling.run(replace(base, batch=4), repeats, depths, budget), out / "scaling")
    (out / "failures.json").write_text(json.dumps(failures, indent=1) + "\n")
    return failures


def _write(result: dict[str, Any], path: Path) -> None:
    print(f"{path.name}\n{report.table(result['rows'])}", flush=True)
    report.write_json(result, path.with_suffix(".json"))
    report.write_csv(result["rows"], path.with_suffix(".csv"))
    report.write_figure(result, path.with_suffix(".png"))
