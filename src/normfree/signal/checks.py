"""What can be wrong with a signal: one check for each, with its evidence and its remedy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .findings import Finding
from .propagation import SignalPoint, SignalPropagation

_EXPLODED = 1e3  # variance over that at the first block
_VANISHED = 1e-3  # the same
_SHIFTED = 1.0  # squared mean over variance
_DOUBLED = 1.0  # what one identity block adds, over what was there
_FAINT = 1e-4  # residual variance over the variance of what it is added to
_DEAD = 1e-12  # a variance that is none
_FEW_SAMPLES = 32  # values per channel
_SHORTFALL = 0.75  # residual variance on a small map over that on the largest
_LARGEST_FP16 = 65504.0
_SMALLEST_FP16 = 6.1e-5
_PEAK = 6.0  # standard deviations that some element of a large activation reaches
_GRADIENT = 1e5  # gradient energy at the first block over that at the last
_BF16_STEPS = 2.0**8  # representable numbers between 1 and 2, times two


class Evidence:
    """A signal in the forms in which the checks look at it."""

    def __init__(self, signal: SignalPropagation, model: nn.Module | None):
        self.signal = signal
        self.model = model
        self.points = list(itertools.takewhile(_is_usable, signal.points))
        self.blocks = [point for point in self.points if point.kind in ("block", "transition")]
        self.pairs = list(itertools.pairwise(self.points))

    @property
    def has_batch_norm(self) -> bool:
        return self.model is not None and any(isinstance(module, _BatchNorm) for module in self.model.modules())

    @property
    def has_average_pooled_shortcut(self) -> bool:
        return self.model is not None and sum(isinstance(m, nn.AvgPool2d) for m in self.model.modules()) > 0

    def resets(self) -> list[SignalPoint]:
        """The outputs of the transition blocks."""
        return [point for point in self.blocks if point.kind == "transition"]


def _is_usable(point: SignalPoint) -> bool:
    return point.is_finite and math.isfinite(point.avg_channel_variance)


def _non_finite(evidence: Evidence) -> Iterable[Finding]:
    point = next((p for p in evidence.signal.points if not _is_usable(p)), None)
    if point is None:
        return
    before = evidence.points[-1] if evidence.points else None
    level = before.avg_channel_variance if before is not None else math.nan
    yield Finding(
        "non-finite",
        point.name,
        "the first NaN or infinite values appear in this block",
        {"NaN": point.nan_count, "infinite": point.inf_count, "variance before": level},
        "If the variance before it is large, mend the growth first; else look for a division, logarithm or root in "
        "this block, and for weights that are not finite.",
        "error",
    )


def _runaway(evidence: Evidence) -> Iterable[Finding]:
    if len(evidence.points) < 3:
        return
    first = evidence.points[1] if evidence.points[0].kind == "stem" else evidence.points[0]
    start = first.avg_channel_variance
    if start <= _DEAD:
        return
    for point in evidence.points:
        ratio = point.avg_channel_variance / start
        if ratio > _EXPLODED:
            growth = _growth(evidence, start)
            yield Finding(
                "exploding",
                point.name,
                "the variance explodes: every block multiplies it instead of adding a fixed amount",
                {"variance": point.avg_channel_variance, "at the first block": start, "factor per block": growth},
                "Normalise the input of each branch by its expected standard deviation β, use Scaled Weight "
                "Standardization, and scale branches by α = 0.2 (nf.create_model does all three), or a skip gain of 0.",
                "error",
            )
            return
    last = evidence.points[-1]
    if last.avg_channel_variance < _VANISHED * start and last.avg_channel_variance > _DEAD and not _pooled(evidence):
        place = next(p for p in evidence.points if p.avg_channel_variance < _VANISHED * start)
        yield Finding(
            "vanishing",
            place.name,
            "the variance vanishes: weights and activations take more of it than they give back",
            {"variance": last.avg_channel_variance, "at the first block": start},
            "Initialise with the activation's gain (nf.gain) or use WSConv layers; nf.calibrate sets the gains of a "
            "model that is built from them.",
            "error",
        )


def _growth(evidence: Evidence, start: float) -> float:
    last = evidence.points[-1].avg_channel_variance
    return float((last / start) ** (1.0 / max(len(evidence.points) - 2, 1)))


def _mean_shift(evidence: Evidence) -> Iterable[Finding]:
    shifted = [p for p in evidence.blocks if p.avg_channel_squared_mean > _SHIFTED * p.avg_channel_variance]
    if len(shifted) < 2 or len(shifted) < 0.2 * len(evidence.blocks):
        return
    number = evidence.points.index(shifted[0])
    worst = max(shifted, key=lambda p: p.avg_channel_squared_mean / max(p.avg_channel_variance, 1e-300))
    yield Finding(
        "mean-shift",
        shifted[0].name,
        f"the channel means grow from block {number} on and overtake the variance: activations such as ReLU have a "
        "positive mean, which plain weights turn into a different constant for every channel, so that examples look "
        "more and more alike",
        {
            "squared mean": shifted[0].avg_channel_squared_mean,
            "variance": shifted[0].avg_channel_variance,
            "largest ratio": worst.avg_channel_squared_mean / max(worst.avg_channel_variance, 1e-300),
        },
        "With Scaled Weight Standardization, whose rows sum to zero, it would be flat: replace the convolutions by "
        "nf.WSConv2d. With BatchNorm, put it between the activation and the convolution.",
        "error" if len(shifted) > 0.5 * len(evidence.blocks) else "warning",
    )


def _branches(evidence: Evidence) -> Iterable[Finding]:
    strong: list[tuple[SignalPoint, float]] = []
    silent: list[tuple[SignalPoint, float]] = []
    weak: list[tuple[SignalPoint, float]] = []
    for before, point in evidence.pairs:
        if point.kind != "block" or before.avg_channel_variance <= _DEAD:
            continue
        added = _power(point) / max(_power(before), 1e-300) - 1.0
        residual = point.residual_avg_channel_variance
        if residual is not None and residual <= _FAINT * before.avg_channel_variance:
            (silent if residual <= _DEAD else weak).append((point, residual))
        elif residual is not None and added > _DOUBLED and residual > 0.5 * before.avg_channel_variance:
            strong.append((point, added))
    if len(strong) >= 2:
        point, added = strong[0]
        yield Finding(
            "strong-branch",
            point.name,
            f"{len(strong)} blocks add more than their input holds, so that the skip path is drowned",
            {"added, over the input": added, "residual variance": point.residual_avg_channel_variance or 0.0},
            "Scale the branches: α = 0.2, or 1/√(number of blocks), or a skip gain that starts at 0.",
        )
    if weak:
        point, residual = weak[0]
        yield Finding(
            "weak-branch",
            point.name,
            f"{len(weak)} residual branches carry next to nothing beside the skip path",
            {"residual variance": residual},
            "Intended for LayerScale and zero-initialised last layers; otherwise raise the branch's gain: "
            "nf.calibrate sets branches to variance 1 before α.",
            "info" if len(weak) > 0.5 * len(evidence.blocks) else "warning",
        )
    if silent:
        point, residual = silent[0]
        every = len(silent) >= 0.5 * max(len(evidence.blocks), 1)
        yield Finding(
            "silent-branch",
            point.name,
            f"{len(silent)} residual branches are zero",
            {"residual variance": residual},
            "A last layer that starts at zero does this on purpose; on small data sets start it above zero. If no "
            "layer does, look for dead activations in the branch.",
            "info" if every else "warning",
        )


def _power(point: SignalPoint) -> float:
    return point.avg_channel_variance + point.avg_channel_squared_mean


def _missing_resets(evidence: Evidence) -> Iterable[Finding]:
    transitions = [(a, b) for a, b in evidence.pairs if b.kind == "transition" and a.kind != "stem"]
    if len(transitions) < 2:
        return
    kept = [(a, b) for a, b in transitions if b.avg_channel_variance > 0.8 * a.avg_channel_variance]
    first = evidence.blocks[0].avg_channel_variance
    last = transitions[-1][1].avg_channel_variance
    if len(kept) == len(transitions) and first > _DEAD and last > 4.0 * first:
        before, point = kept[0]
        yield Finding(
            "missing-reset",
            point.name,
            "transition blocks hand the accumulated variance on instead of resetting it",
            {"before": before.avg_channel_variance, "after": point.avg_channel_variance, "at the last one": last},
            "Let the shortcut convolution of a transition read the normalised, activated signal that the branch reads, "
            "as nf.create_model's blocks do; the variance then restarts at 1 + α².",
        )


def _padding(evidence: Evidence) -> Iterable[Finding]:
    if evidence.has_batch_norm or _pooled(evidence):
        return
    known = [p for p in evidence.blocks if p.residual_avg_channel_variance and len(p.shape) == 4]
    if len(known) < 3:
        return
    largest = max(min(p.shape[2:]) for p in known)
    reference = max(p.residual_avg_channel_variance or 0.0 for p in known if min(p.shape[2:]) == largest)
    if not 0.5 < reference < 2.0:
        return
    small = [
        p
        for p in known
        if min(p.shape[2:]) <= 8
        and min(p.shape[2:]) < largest
        and (p.residual_avg_channel_variance or 0.0) < _SHORTFALL * reference
    ]
    if not small:
        return
    worst = min(small, key=lambda p: p.residual_avg_channel_variance or 0.0)
    side = min(worst.shape[2:])
    yield Finding(
        "padding-shortfall",
        small[0].name,
        f"branches lose variance on small maps, where zero padding fills much of each 3×3 window: on {side}×{side} "
        "only the given share of taps is valid",
        {
            "residual variance": worst.residual_avg_channel_variance or 0.0,
            "on the largest map": reference,
            "valid taps": ((3 * side - 2) / (3 * side)) ** 2,
        },
        "nf.calibrate(model, input_shape=...) or calibrated_for=(height, width) puts it back as a gain; or train on "
        "larger images, or with fewer strides (stem='small').",
    )


def _pooled(evidence: Evidence) -> list[tuple[SignalPoint, float]]:
    """Transitions behind which the variance is a fraction of that behind the transition before."""
    if evidence.model is not None and not evidence.has_average_pooled_shortcut:
        return []
    resets = evidence.resets()
    fallen = []
    for before, after in itertools.pairwise(resets):
        ratio = after.avg_channel_variance / max(before.avg_channel_variance, 1e-300)
        if ratio < 0.4 and before.avg_channel_variance > _DEAD:
            fallen.append((after, ratio))
    return fallen if len(fallen) >= max(1, len(resets) // 2) and len(resets) >= 2 else []


def _average_pooling(evidence: Evidence) -> Iterable[Finding]:
    fallen = _pooled(evidence)
    if not fallen:
        return
    point, ratio = fallen[0]
    why = (
        "the average pool in the shortcut averages"
        if evidence.has_average_pooled_shortcut
        else ("the shortcut averages, as an average pool does,")
    )
    yield Finding(
        "pooled-shortcut",
        point.name,
        f"each transition loses variance: {why} neighbours that are hardly correlated, which leaves as little as a "
        "quarter",
        {"ratio": ratio, "variance at the last": fallen[-1][0].avg_channel_variance},
        "White noise shows this at its worst; measure with images. nf.calibrate(model, images) sets the shortcut's "
        "gain to what the images need, shortcut='strided' does without the pool.",
    )


def _few_samples(evidence: Evidence) -> Iterable[Finding]:
    if not evidence.has_batch_norm or not evidence.points:
        return
    counted = [(p.shape[0] * math.prod(p.shape[2:]), p) for p in evidence.points if len(p.shape) >= 2]
    count, point = min(counted, key=lambda pair: pair[0])
    if count < _FEW_SAMPLES:
        yield Finding(
            "few-samples",
            point.name,
            "BatchNorm estimates every channel's statistics from few values at this batch and map size",
            {"values per channel": count, "relative error of the variance": math.sqrt(2.0 / max(count - 1, 1))},
            "Use a larger batch or larger images, synchronised BatchNorm, or a normaliser-free network, in which "
            "examples never meet (nf.create_model, nf.batchnorm_twin).",
        )


def _dead(evidence: Evidence) -> Iterable[Finding]:
    for before, point in evidence.pairs:
        if before.avg_channel_variance > _DEAD >= point.avg_channel_variance:
            yield Finding(
                "dead",
                point.name,
                "the activation is constant from here on: its units no longer react to the input",
                {"variance": point.avg_channel_variance, "before": before.avg_channel_variance},
                "Look for a ReLU whose input is negative throughout (a bias or mean far below zero), or weights at 0.",
                "error",
            )
            return


def _precision(evidence: Evidence) -> Iterable[Finding]:
    for point in evidence.points:
        peak = _PEAK * math.sqrt(point.avg_channel_variance) + math.sqrt(point.avg_channel_squared_mean)
        if peak > _LARGEST_FP16:
            yield Finding(
                "fp16-overflow",
                point.name,
                "activations reach beyond the largest float16 number",
                {"peak": peak, "largest float16": _LARGEST_FP16},
                "Train in bfloat16 or float32, or mend the growth.",
            )
            break
    for point in evidence.points:
        spread = math.sqrt(point.avg_channel_variance)
        if point.avg_channel_variance > _DEAD and spread < _SMALLEST_FP16:
            yield Finding(
                "fp16-underflow",
                point.name,
                "activations are below the smallest normal float16 number",
                {"standard deviation": spread, "smallest normal float16": _SMALLEST_FP16},
                "Train in bfloat16 or float32, or raise the gains (nf.calibrate).",
            )
            break
    for point in evidence.points:
        ratio = math.sqrt(point.avg_channel_squared_mean / max(point.avg_channel_variance, 1e-300))
        if point.avg_channel_variance > _DEAD and ratio > 0.25 * _BF16_STEPS:
            yield Finding(
                "bf16-rounding",
                point.name,
                "the mean is so large that bfloat16 rounds the differences between examples away",
                {"mean over standard deviation": ratio, "bfloat16 steps": _BF16_STEPS},
                "Mend the mean shift, or keep this part in float32.",
            )
            break


def _gradients(evidence: Evidence) -> Iterable[Finding]:
    levels = [(p, p.gradient_avg_channel_variance) for p in evidence.blocks]
    known = [(p, g * math.prod(p.shape[1:])) for p, g in levels if g is not None and math.isfinite(g)]
    if len(known) < 3 or known[-1][1] <= 0.0:
        return
    point, first = known[0]
    ratio = first / known[-1][1]
    if not 1.0 / _GRADIENT < ratio < _GRADIENT:
        yield Finding(
            "gradient",
            point.name,
            f"the gradient {'explodes' if ratio > 1 else 'vanishes'} on its way back to the first block",
            {"energy at the first block over that at the last": ratio},
            "Scale the branches (α, skip gain) so that every block's Jacobian stays near the identity.",
        )


def _gaps(evidence: Evidence) -> Iterable[Finding]:
    gaps = [point for point in evidence.signal.points if point.gap]
    if gaps:
        yield Finding(
            "gap",
            gaps[0].name,
            f"the prediction has no rule for {gaps[0].gap}",
            {"points with gaps": len(gaps)},
            "Measure with nf.spp, or teach the theory the operator with nf.register_rule.",
            "info",
        )


CHECKS: tuple[Callable[[Evidence], Iterable[Finding]], ...] = (
    _non_finite,
    _runaway,
    _dead,
    _mean_shift,
    _missing_resets,
    _branches,
    _average_pooling,
    _padding,
    _few_samples,
    _gradients,
    _precision,
    _gaps,
)
