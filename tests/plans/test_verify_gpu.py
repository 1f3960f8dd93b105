"""`make verify-gpu` measures until the rate is steady, and finds plans that are slower than their ONNX models."""

import itertools
import threading
from typing import Any

import pytest

from scripts.plans import verify_gpu
from scripts.plans.verify_gpu import MOST_WINDOWS, WINDOW, WINDOWS, find_slower, measure_load, measure_spread


class Clock:
    """A clock for one client: these seconds pass at its requests, in turn."""

    def __init__(self, seconds: list[float]) -> None:
        self.now, self.seconds, self.asked = 0.0, itertools.cycle(seconds), 0

    def ask(self) -> None:
        self.now += next(self.seconds)
        self.asked += 1

    def perf_counter(self) -> float:
        return self.now


def told(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> tuple[dict[str, float], int]:
    clock = Clock(seconds)
    monkeypatch.setattr(verify_gpu, "time", clock)
    return measure_load(clock.ask, 1), clock.asked


def test_a_steady_model_is_asked_for_three_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = told(monkeypatch, [0.01] * 9 + [0.03])

    assert asked == WINDOWS * WINDOW
    assert found == {"p50_ms": 10.0, "p95_ms": 30.0, "per_s": 83.33, "spread": 0.0}


def test_a_model_that_warms_up_is_asked_until_its_rate_is_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = told(monkeypatch, [0.5] * WINDOW + [0.1] * WINDOW + [0.02] * 1000)

    assert asked == (2 + WINDOWS) * WINDOW
    assert (found["p50_ms"], found["p95_ms"], found["per_s"], found["spread"]) == (20.0, 20.0, 50.0, 0.0)


def test_a_model_that_never_becomes_steady_is_left_after_ten_windows_with_its_spread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, asked = told(monkeypatch, [0.01] * WINDOW + [0.02] * WINDOW)

    assert asked == MOST_WINDOWS * WINDOW
    assert found["spread"] == 1.0 == measure_spread([1, 1, 2, 1])


def test_the_given_number_of_clients_ask_at_once() -> None:
    together = threading.Barrier(4, timeout=60)

    def ask() -> None:
        together.wait()  # fails unless four clients arrive

    assert measure_load(ask, 4)["per_s"] > 0


def measured(name: str, p50: float, spread: float = 0.02) -> dict[str, Any]:
    return {name: {"1": {"load": {"1": {"p50_ms": p50, "spread": spread}}}}}


@pytest.mark.parametrize(
    ("plan", "onnx", "late"),
    [
        (30.0, 20.0, {"vit_trt": "30 ms, the ONNX model 20 ms"}),
        (20.3, 20.0, {}),  # within the spread
        (12.0, 20.0, {}),
    ],
)
def test_a_plan_is_slower_only_beyond_the_spread(plan: float, onnx: float, late: dict[str, str]) -> None:
    assert find_slower(measured("vit_trt", plan) | measured("vit_onnx", onnx)) == late


def test_a_plan_without_its_onnx_model_is_not_compared() -> None:
    assert find_slower(measured("vit_trt", 30.0)) == find_slower(measured("bpr_model", 30.0)) == {}
