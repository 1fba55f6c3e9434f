"""`diagnose`: what a signal says about a network, in words, with a remedy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .checks import CHECKS, Evidence
from .findings import Diagnosis, Finding
from .predict import predict_spp
from .propagation import SignalPropagation


def diagnose(
    subject: SignalPropagation | nn.Module,
    input_shape: Sequence[int] | None = None,
    *,
    model: nn.Module | None = None,
) -> Diagnosis:
    """Finds what is wrong with a network's signal: where, why, and what would help.

    Args:
        subject: a signal, measured or predicted; or a model, whose signal is predicted.
        input_shape: (N, C, *size), for a model.
        model: with a signal, the model that it is of: its layers then count as evidence, too.

    Returns:
        The findings, the gravest first; empty, and printed as "healthy", if there are none.

    Raises:
        TypeError: ``subject`` is neither.
        ValueError: a model without an ``input_shape``, and as :func:`normfree.predict_spp`.
    """
    if isinstance(subject, nn.Module):
        if input_shape is None:
            raise ValueError("input_shape: a model is diagnosed from its predicted signal, which needs one")
        model, signal = subject, predict_spp(subject, input_shape, backward=True)
    elif isinstance(subject, SignalPropagation):
        signal = subject
    else:
        raise TypeError(f"subject: expected a signal or a model, got {type(subject).__name__}")
    evidence = Evidence(signal, model)
    found: list[Finding] = []
    for check in CHECKS:
        found.extend(check(evidence))
    order = {"error": 0, "warning": 1, "info": 2}
    diagnosis = Diagnosis(sorted(found, key=lambda finding: order[finding.severity]))
    diagnosis.label = signal.label
    return diagnosis
