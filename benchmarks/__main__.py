"""``python -m benchmarks NAME``: a table, and files where they are named.

NAME is ``train``, ``infer``, ``accumulate``, ``memory``, ``scaling``, ``clip`` or ``spp``; ``all`` and ``gpu`` write
every table of a machine into a folder, and ``figure`` draws what was written.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import clipping, memory, passes, report, scaling, spp, suite
from .contenders import MODELS, Setting

_BATCHES = {"train": [1, 16], "infer": [1, 8], "accumulate": [1], "memory": [16], "scaling": [4], "clip": [1]}
_HELP = {
    "train": "training step, one update per batch",
    "infer": "inference, cached and folded",
    "accumulate": "eight microbatches, then an update",
    "memory": "peak of allocated bytes in a training step",
    "scaling": "a training step over depth, width, resolution and batch",
    "clip": "adaptive gradient clipping, once",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Side-by-side timings.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in _HELP.items():
        command = commands.add_parser(name, help=text)
        _add_setting(command, ["nf_resnet50"], _BATCHES[name])
        command.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
        command.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: autocast")
        command.add_argument("--channels-last", action="store_true")
        command.add_argument("--compile", action="store_true", help="with CUDA graphs on a GPU")
        _add_outputs(command)
    for name, device, dtype in (("all", "cpu", "float32"), ("gpu", "cuda", "bfloat16")):
        command = commands.add_parser(name, help=f"every table, on {device} in {dtype} unless told otherwise")
        _add_setting(command, list(MODELS), None)
        command.add_argument("--device", default=device, choices=["cpu", "cuda"])
        command.add_argument("--dtype", default=dtype, choices=["float32", "bfloat16"])
        command.add_argument("--out", type=Path, required=True, help="folder to write")
    command = commands.add_parser("figure", help="one figure of what the others have written")
    command.add_argument("results", type=Path, nargs="+", help="JSON files")
    command.add_argument("--out", type=Path, required=True, help="file to write (.png, .svg, .pdf)")
    command = commands.add_parser("spp", help="a Signal Propagation Plot against a bare forward pass")
    command.add_argument("--models", nargs="+", default=list(spp.MODELS))
    command.add_argument("--batch", type=int, default=8)
    command.add_argument("--size", type=int, default=224)
    command.add_argument("--repeats", type=int, default=15)
    _add_outputs(command)
    options = parser.parse_args(arguments)
    if options.command == "figure":
        report.write_summary_figure([json.loads(path.read_text()) for path in options.results], options.out)
        return
    if getattr(options, "device", None) == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; `all`, or --device cpu, times the processor")
    if options.command in ("all", "gpu"):
        batches = tuple(options.batch) if options.batch else None
        base = Setting(1, options.size, options.device, options.dtype, width=options.width)
        numbers = (options.repeats, options.rounds, options.budget, batches, tuple(options.depths))
        suite.run(options.out, base, tuple(options.models), *numbers)
        return
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    result = _run(options)
    result["load_before"] = load
    print(f"{result['machine']}, load {load} before")
    print(report.table(result["rows"]))
    if options.json is not None:
        report.write_json(result, options.json)
    if options.csv is not None:
        report.write_csv(result["rows"], options.csv)
    if options.figure is not None:
        report.write_figure(result, options.figure)


def _add_setting(command: argparse.ArgumentParser, models: list[str], batches: list[int] | None) -> None:
    command.add_argument("--models", nargs="+", default=models, help=f"of {', '.join(MODELS)}, or others")
    command.add_argument("--batch", type=int, nargs="+", default=batches)
    command.add_argument("--size", type=int, default=224, help="pixels")
    command.add_argument("--width", type=float, default=1.0)
    command.add_argument("--repeats", type=int, default=10)
    command.add_argument("--rounds", type=int, default=2, help="times that the whole table is measured")
    command.add_argument("--depths", type=int, nargs="+", default=list(scaling.DEPTHS), help="for scaling")
    command.add_argument("--budget", type=float, default=300.0, help="for scaling: seconds for each point")


def _add_outputs(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", type=Path, help="file to write")
    command.add_argument("--csv", type=Path, help="file to write")
    command.add_argument("--figure", type=Path, help="file to write (.png, .svg, .pdf)")


def _run(options: argparse.Namespace) -> dict[str, Any]:
    models = tuple(options.models)
    if options.command == "spp":
        return {"benchmark": "spp", **spp.run(models, options.batch, options.size, options.repeats)}
    first = Setting(
        options.batch[0],
        options.size,
        options.device,
        options.dtype,
        options.channels_last,
        options.compile,
        options.width,
    )
    settings = [replace(first, batch=batch) for batch in options.batch]
    if options.command == "memory":
        return memory.run(models, settings)
    if options.command == "clip":
        return clipping.run(models, first, options.repeats, options.rounds)
    if options.command == "scaling":
        return scaling.run(first, options.repeats, tuple(options.depths), options.budget)
    return passes.run(options.command, models, settings, options.repeats, options.rounds)


if __name__ == "__main__":
    main()
