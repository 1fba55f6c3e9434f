"""Figures 1 and 2 of Brock et al. 2021: the signals of BatchNorm and normaliser-free ResNetV2-600."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch

from ..models import create_model
from ..signal import SignalPoint, SignalPropagation, spp
from .report import Claim, Report
from .settings import Settings

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Scale:
    """Size of the networks and of their input."""

    depth: int
    pixels: int
    batch_size: int


FULL = Scale(depth=600, pixels=512, batch_size=2)
QUICK = Scale(depth=101, pixels=512, batch_size=2)


def figure1(settings: Settings) -> Report:
    """BN-ReLU-Conv against ReLU-BN-Conv."""
    scale, seed, progress = (QUICK if settings.quick else FULL), settings.seed, settings.say
    signals = (
        _signal("BN-ReLU-Conv", f"resnetv2_{scale.depth}", scale, seed, progress),
        _signal("ReLU-BN-Conv", f"resnetv2_{scale.depth}_relu_bn", scale, seed, progress),
    )
    bn_relu, relu_bn = signals
    claims = [
        *(_grows_linearly(signal) for signal in signals),
        *(_is_reset(signal) for signal in signals),
        _claim(
            "BN-ReLU-Conv: the residual branch's variance is well below 1, near 1 − 1/π = 0.682",
            _largest_distance(_residuals(bn_relu), 1 - 1 / np.pi) < 0.1,
            f"from {min(_residuals(bn_relu)):.3f} to {max(_residuals(bn_relu)):.3f}",
        ),
        _mean_grows("BN-ReLU-Conv", bn_relu),
        _claim(
            "ReLU-BN-Conv: the residual branch's variance is 1",
            _largest_distance(_residuals(relu_bn), 1.0) < 0.1,
            f"from {min(_residuals(relu_bn)):.3f} to {max(_residuals(relu_bn)):.3f} (weights of variance 1 / fan-in, "
            "which is what He's rule gives for an input of unit variance; 2 / fan-in gives 2)",
        ),
        _mean_is_negligible(relu_bn),
    ]
    title = f"ResNetV2-{scale.depth} with BatchNorm at initialisation, N(0, 1) input, {scale.pixels} px"
    return Report("figure1", title, signals, tuple(claims), _settings(scale, seed))


def figure2(settings: Settings) -> Report:
    """ReLU-BN-Conv against normaliser-free with He weights and with Scaled Weight Standardization, α = 1."""
    scale, seed, progress = (QUICK if settings.quick else FULL), settings.seed, settings.say
    nf = f"nf_resnet{scale.depth}"
    relu_bn = _signal("BatchNorm, ReLU-BN-Conv", f"resnetv2_{scale.depth}_relu_bn", scale, seed, progress)
    he = _signal("normaliser-free, He weights", nf, scale, seed, progress, alpha=1.0, weights="he")
    standardized = _signal("normaliser-free, Scaled Weight Standardization", nf, scale, seed, progress, alpha=1.0)
    last = he.points[-1]
    residuals = _residuals(standardized)
    overtaken = [point for point in he.points[1:] if point.avg_channel_squared_mean > point.avg_channel_variance]
    ratios = [
        ours.avg_channel_variance / theirs.avg_channel_variance
        for ours, theirs in zip(standardized.points[1:], relu_bn.points[1:], strict=True)
    ]
    claims = [
        _mean_grows("He weights", he),
        _claim(
            "He weights: the squared mean overtakes the variance",
            len(overtaken) > len(he.points) / 2,
            f"larger in {len(overtaken)} of {len(he.points) - 1} blocks; at the last one "
            f"{last.avg_channel_squared_mean:.1f} against {last.avg_channel_variance:.1f}",
        ),
        _mean_is_negligible(standardized),
        _claim(
            "Scaled Weight Standardization: the residual branch's variance is near 1 (median within 10 %)",
            abs(float(np.median(residuals)) - 1) < 0.1,
            f"median {np.median(residuals):.3f}, from {min(residuals):.3f} to {max(residuals):.3f}: zero padding takes "
            "its share where maps are small",
        ),
        _claim(
            "Scaled Weight Standardization: the variance lies almost on top of ReLU-BN-Conv's (median within 10 %)",
            abs(float(np.median(ratios)) - 1) < 0.1,
            f"ratio of the two: median {np.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}, the least "
            "where maps are small",
        ),
    ]
    title = f"ResNetV2-{scale.depth} at initialisation, N(0, 1) input, {scale.pixels} px, α = 1"
    return Report("figure2", title, (relu_bn, he, standardized), tuple(claims), _settings(scale, seed))


def _signal(label: str, name: str, scale: Scale, seed: int, progress: Progress, **options: Any) -> SignalPropagation:
    progress(f"{label}: {name}, {scale.batch_size} × 3 × {scale.pixels} × {scale.pixels}")
    torch.manual_seed(seed)
    model = create_model(name, **options)
    noise = torch.randn(scale.batch_size, 3, scale.pixels, scale.pixels)
    return spp(model, noise, label=label)


def _settings(scale: Scale, seed: int) -> dict[str, Any]:
    return {
        "depth": scale.depth,
        "pixels": scale.pixels,
        "batch_size": scale.batch_size,
        "seed": seed,
        "input": "N(0, 1)",
    }


def _claim(text: str, holds: bool, evidence: str) -> Claim:
    return Claim(text, bool(holds), evidence)


def _stages(signal: SignalPropagation) -> list[list[SignalPoint]]:
    return [list(points) for _, points in groupby(signal.points[1:], key=lambda point: point.stage)]


def _residuals(signal: SignalPropagation) -> list[float]:
    variances = (point.residual_avg_channel_variance for point in signal.points)
    return [variance for variance in variances if variance is not None]


def _largest_distance(values: Sequence[float], target: float) -> float:
    return max(abs(value - target) for value in values)


def _grows_linearly(signal: SignalPropagation) -> Claim:
    slopes, fits = [], []
    for stage in _stages(signal):
        variance = np.array([point.avg_channel_variance for point in stage])
        depth = np.arange(len(stage))
        slope, intercept = np.polyfit(depth, variance, 1)
        left = variance - (slope * depth + intercept)
        slopes.append(slope)
        fits.append(1.0 - left.var() / variance.var())
    return _claim(
        f"{signal.label}: within every stage the variance grows about linearly with depth",
        min(slopes) > 0 and min(fits) > 0.98,
        f"per block {', '.join(f'{slope:.3f}' for slope in slopes)}; R² of a straight line at least {min(fits):.4f}",
    )


def _is_reset(signal: SignalPropagation) -> Claim:
    drops = [
        (before[-1].avg_channel_variance, after[0].avg_channel_variance) for before, after in pairwise(_stages(signal))
    ]
    return _claim(
        f"{signal.label}: the variance is reset at every transition block",
        all(after < 0.5 * before for before, after in drops),
        "; ".join(f"{before:.1f} to {after:.2f}" for before, after in drops),
    )


def _mean_grows(label: str, signal: SignalPropagation) -> Claim:
    series = [[point.avg_channel_squared_mean for point in stage] for stage in _stages(signal)]
    return _claim(
        f"{label}: the squared mean grows with depth within every stage",
        all(np.polyfit(range(len(values)), values, 1)[0] > 0 for values in series),
        "; ".join(f"{values[0]:.2f} to {values[-1]:.2f}" for values in series),
    )


def _mean_is_negligible(signal: SignalPropagation) -> Claim:
    shares = [point.avg_channel_squared_mean / point.avg_channel_variance for point in signal.points[1:]]
    return _claim(
        f"{signal.label}: the squared mean is far below the variance (a twentieth at most)",
        max(shares) < 0.05,
        f"at most {max(shares):.4f} of it",
    )
