"""``python -m benchmarks spp``: prints a table, and writes the numbers if a file is named."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import spp


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Side-by-side timings.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("spp", help="a Signal Propagation Plot against a bare forward pass")
    command.add_argument("--models", nargs="+", default=list(spp.MODELS))
    command.add_argument("--batch", type=int, default=8)
    command.add_argument("--size", type=int, default=224)
    command.add_argument("--repeats", type=int, default=15)
    command.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    result = spp.run(tuple(arguments.models), arguments.batch, arguments.size, arguments.repeats)
    print(f"{result['machine']}, batch {arguments.batch}, {arguments.size} px, median of {arguments.repeats}")
    print(
        f"{'model':24s} {'forward':>10s} {'spp':>10s} {'hooks':>10s} {'spp/fwd':>8s} {'hooks/fwd':>9s} {'spread':>7s}"
    )
    for row in result["rows"]:
        print(
            f"{row['model']:24s} {row['forward_ms']:7.1f} ms {row['spp_ms']:7.1f} ms {row['hooks_ms']:7.1f} ms "
            f"{row['spp_over_forward']:8.3f} {row['hooks_over_forward']:9.3f} {row['spread']:7.3f}"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
