"""Turn the scores of the slices into the name of what the series shows."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Scores = NDArray[np.float64]

EMPTY = 110.83, 6.14, 108.92, 6.22  # the scores that published networks give to an empty slice
SMOOTHING = 10.0  # mm
NEAR = 10.0  # a score is a boundary if it is this close to 0 or 100
SLOPE_TOLERANCE = 0.28  # relative to the expected slope
SHORT = 100.0  # mm

PARTS = "PELVIS", "ABDOMEN", "CHEST", "NECK", "HEAD"  # upwards
LANDMARKS = {
    "PELVIS": "pelvis_start femur_end pelvis_end",
    "ABDOMEN": "L5 L4 L3 L2 L1 Th12 Th11 Th10 Th9",
    "CHEST": "Th12 Th11 Th10 Th9 Th8 Th7 Th6 Th5 Th4 Th3 Th2 Th1",
    "NECK": "Th3 Th2 Th1 C7 C6 C5 C4 C3 C2",
    "HEAD": "C3 C2 C1 eyes_end",
}
ENOUGH = {"PELVIS": 2, "ABDOMEN": 7, "CHEST": 9, "NECK": 6, "HEAD": 3}  # landmarks seen for the part to be included
EXTENT = {
    "PELVIS": ("pelvis_start", "pelvis_end"),
    "ABDOMEN": ("pelvis_end", "Th9"),
    "CHEST": ("Th9", "Th2"),
    "NECK": ("Th2", "C3"),
    "HEAD": ("C3", "head_end"),
}


@dataclass(frozen=True)
class Settings:
    """The part of inference-settings.json that the tag depends on."""

    low: float  # score that becomes 0
    high: float  # score that becomes 100
    landmarks: dict[str, float]  # where the landmarks lie between 0 and 100
    slope: float  # expected, per mm
    slope_min: float  # a slope beyond these two is an outlier
    slope_max: float

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """Read the file; ValueError if it is absent, no JSON, or lacks a number that the tag needs."""
        try:
            return cls.parse(json.loads(path.read_text()))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; expected the inference-settings.json of the network") from None
        except KeyError as error:
            raise ValueError(
                f"{path}: lacks {error.args[0]!r}; expected the inference-settings.json of a network"
            ) from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}; expected the inference-settings.json of a network") from None

    @classmethod
    def parse(cls, settings: dict[str, Any]) -> "Settings":
        """Take the settings from a JSON object; KeyError, TypeError or ValueError if it is not of this kind."""
        original, transformed = (settings["lookuptable_train_val"][key] for key in ("original", "transformed"))
        needed = " ".join([*LANDMARKS.values(), *(" ".join(pair) for pair in EXTENT.values())]).split()
        result = cls(
            low=float(original[settings["settings"]["start-landmark"]]["mean"]),
            high=float(original[settings["settings"]["end-landmark"]]["mean"]),
            landmarks={name: float(transformed[name]["mean"]) for name in needed},
            slope=float(settings["slope_mean"]),
            slope_min=float(settings["lower_quantile_tangential_slope"]),
            slope_max=float(settings["upper_quantile_tangential_slope"]),
        )
        numbers = result.low, result.high, result.slope, result.slope_min, result.slope_max, *result.landmarks.values()
        if not all(map(math.isfinite, numbers)) or result.low == result.high or result.slope == 0:
            raise ValueError("NaN, infinite, equal or zero where numbers are needed")
        return result


@dataclass(frozen=True)
class Reading:
    """The scores of a series made comparable: 0 at the start landmark, 100 at the end landmark."""

    scores: Scores  # (slices,), smoothed; NaN where empty or cut off as an outlier
    slope: float  # per mm, of the line through them; NaN with fewer than 2
    valid: bool  # the slope is near the expected one, or unknown

    @property
    def reverse(self) -> bool:
        """True if the series goes from head to feet."""
        return self.slope < 0


def tag(scores: ArrayLike, z_spacing: float, settings: Settings) -> str:
    """Scores of a series' kept slices, in order, and the mm between them -> "CHEST", "NECK-CHEST", …, "NONE".

    ValueError if there is no score.
    """
    reading = read(scores, z_spacing, settings)
    if not reading.valid:
        return "NONE"
    included = _included(reading.scores, settings)
    if not included or len(reading.scores) * z_spacing < SHORT:
        return _most_frequent(reading.scores, settings)
    lowest, highest = PARTS.index(included[0]), PARTS.index(included[-1])
    return "-".join(reversed(PARTS[lowest : highest + 1]))  # the parts between count as shown, too


def read(scores: ArrayLike, z_spacing: float, settings: Settings) -> Reading:
    """Scores (slices,) of the network -> scores scaled, smoothed and without outliers, and their slope."""
    raw = np.array(scores, np.float64)
    if raw.ndim != 1 or not raw.size:
        raise ValueError(f"scores have shape {list(raw.shape)}, expected one score per slice and at least one slice")
    scale = 100 / (settings.high - settings.low)
    rising = _slope(np.arange(len(raw)), (raw - settings.low) * scale) > 0
    raw[np.isin(raw.round(2), EMPTY)] = np.nan
    values = (raw - settings.low) * scale
    seen = ~np.isnan(values)
    values[seen] = _smooth(values[seen], SMOOTHING / z_spacing)
    _cut_outliers(values, rising, z_spacing, settings)

    seen = ~np.isnan(values)
    slope = _slope(np.flatnonzero(seen) * z_spacing, values[seen])
    return Reading(values, slope, valid=not abs(1 - abs(slope) / settings.slope) > SLOPE_TOLERANCE)


def _cut_outliers(values: Scores, rising: bool, z_spacing: float, settings: Settings) -> None:
    """Beyond the body's ends (0 and 100), from an impossible slope to the end of the series, set scores to NaN."""
    if len(values) < 2:
        return
    start, end = _nearest(values, 0), _nearest(values, 100)
    if start > end:
        start = math.nan
    slopes = np.diff(values) / z_spacing
    slopes = np.append(slopes, slopes[-1])
    outliers = np.flatnonzero((slopes < settings.slope_min) | (slopes > settings.slope_max))
    before, after = (start, end) if rising else (end, start)
    head, tail = outliers[outliers < before], outliers[outliers > after]  # none where the boundary is NaN
    if head.size:
        values[: head[-1]] = np.nan
    if tail.size:
        values[tail[0] :] = np.nan


def _nearest(values: Scores, target: float) -> float:
    """Return the index of the score nearest to `target`, NaN if no score is near."""
    distance = np.abs(values - target)
    distance[np.isnan(distance)] = np.inf
    index = int(distance.argmin())
    return index if distance[index] < NEAR else math.nan


def _slope(x: NDArray[Any], y: Scores) -> float:
    """Return the slope of the least-squares line through the points, NaN with fewer than 2."""
    if len(x) < 2:
        return math.nan
    x = x - x.mean()
    return float(x @ (y - y.mean()) / (x @ x))


def _smooth(values: Scores, sigma: float) -> Scores:
    """Smooth by a Gaussian, truncated at 4 sigmas, edges mirrored: the defaults of scipy.ndimage.gaussian_filter."""
    if not values.size:
        return values
    radius = int(4 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return np.convolve(np.pad(values, radius, mode="symmetric"), kernel / kernel.sum(), mode="valid")


def _included(values: Scores, settings: Settings) -> list[str]:
    """Return the parts, upwards, of which enough landmarks have scores on both sides."""

    def is_present(landmark: str) -> bool:
        position = settings.landmarks[landmark]
        return bool((values < position).any() and (values > position).any())

    return [part for part in PARTS if sum(map(is_present, LANDMARKS[part].split())) >= ENOUGH[part]]


def _most_frequent(values: Scores, settings: Settings) -> str:
    """Return the part with most slices, the first one found if several have as many; NONE if no slice is in a part."""
    extents = {part: [settings.landmarks[name] for name in EXTENT[part]] for part in PARTS}
    found = [part for value in values for part, (low, high) in extents.items() if low < value < high]
    return Counter(found).most_common(1)[0][0] if found else "NONE"
