"""``normfree reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import print_json, say
from .options import AsJson, Seed

_STUDIES = ("cifar10", "full_width", "microbatch", "table1", "depth")


def reproduce(
    experiments: Annotated[
        list[str],
        typer.Argument(
            help=f"figure1, figure2, or all of these; or studies that train: {', '.join(_STUDIES)}.", metavar="NAME..."
        ),
    ],
    quick: Annotated[bool, typer.Option("--quick", help="Smaller networks and inputs: seconds, not minutes.")] = False,
    data: Annotated[str | None, typer.Option(help="For studies: folder with CIFAR-10's Parquet files.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="For studies: training runs side by side.")] = 1,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="For studies: time limit; the same command then goes on.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="For studies: of every recipe, such as epochs=10; repeat."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures, numbers and training runs.")] = Path("reproduced"),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Draw the paper's figures and run its studies; say of each claim whether the numbers bear it out."""
    import difflib

    from ..experiments import FIGURES, Settings

    names = list(FIGURES) if experiments == ["all"] else experiments
    known = [*FIGURES, *_STUDIES]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise ValueError(f"there is no experiment {name!r}{hint}")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out: {out} is not a folder")
    settings = Settings(quick, seed, data, out, jobs, minutes, tuple(setting or ()), say)
    reports: list[Any] = []
    for name in names:
        if name in FIGURES:
            report: Any = FIGURES[name](settings)
        else:
            from ..experiments.training_studies import STUDIES

            report = STUDIES[name](settings)
        written = report.write(out)
        reports.append(report)
        if not as_json:
            print(f"{name}: {report.title}")
            if name in _STUDIES:
                print(report.table)
            print("\n".join(f"  {claim}" for claim in report.claims))
            print(f"  wrote {', '.join(str(path) for path in written)}\n")
    if as_json:
        from ..signal.propagation import without_non_finite

        print_json(without_non_finite([report.to_dict() for report in reports]))
