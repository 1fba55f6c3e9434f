"""What each process does in test_distributed.py. Arguments: the folder for runs, and the cases as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tiny_runs import quiet, tiny

from normfree.training import evaluate_run, train
from normfree.training.update import Learner


def die_once(self: Learner, *arguments: Any) -> Any:
    """Process 1 is gone before the sixth update, the first time it gets there."""
    if self.update == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(7)
    return step(self, *arguments)


folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
step = Learner.step
for name, overrides in cases.items():
    Learner.step = die_once if name == "dies" else step  # type: ignore[method-assign]
    train(tiny(*overrides), folder / name, say=quiet)
result = evaluate_run(folder / "dies", checkpoint="best", batch_size=7)
if os.environ["RANK"] == "0":
    (folder / "evaluation.json").write_text(json.dumps(result.to_dict()))
