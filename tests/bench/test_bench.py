"""The benchmark: what it prints and writes, when it fails, and whether it measures the right thing."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml

from convertation.straight_export import straight_export
from convertation.vit.ctvit import make_synthetic_state_dict
from convertation.vit.torch2onnx import torch2onnx
from scripts.bench import __main__ as bench
from scripts.bench import compare as bench_compare
from scripts.bench import fetch as bench_fetch
from scripts.bench import measure as bench_measure
from scripts.bench import models as bench_models
from scripts.bench import pipeline as bench_pipeline
from scripts.bench.measure import Row, Tree, compare_medians
from scripts.convert.sample import make_sample

ROOT = Path(__file__).parents[2]
HIT, MISS = Row("fast enough", 2.0, "≤", 2.5, "s", "of 3"), Row("small enough", 0.5, "≤", 0.3, "x")
UNKNOWN, SHOWN = Row("unzip", None, "≥", 0.8, "x", "no unzip on this machine"), Row("share of the peak", 0.9)
TINY: dict[str, Any] = {
    "family": "vit",
    "checkpoint": "tiny.pt",
    "network": {
        "dim": 32, "heads": 2, "dim_head": 16, "spatial_depth": 2, "temporal_depth": 2, "patch": [10, 20, 20],
        "codebook": 64,
    },
    "input": [1, 20, 40, 60],
    "output": [24],
    "batch": [1, 2, 4],
}  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, out: Path, groups: dict[str, list[Row]], *words: str) -> dict[str, Any]:
    """Run the program with groups that return given rows; return the JSON that it wrote."""
    monkeypatch.setattr(bench, "GROUPS", {name: lambda tree, rounds, rows=rows: rows for name, rows in groups.items()})
    monkeypatch.setattr(bench, "BENCH", out.parent / "bench")
    words = words or ("--only", ",".join(groups))
    monkeypatch.setattr(sys, "argv", ["bench", *words, str(out)])
    bench.main()
    written: dict[str, Any] = json.loads(out.read_text())
    return written


def test_goal_stands_beside_value(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = run(monkeypatch, tmp_path / "bench.json", {"one": [HIT, UNKNOWN, SHOWN]})
    lines = [line for line in capsys.readouterr().out.splitlines() if "disturbed" not in line]
    assert lines == [
        "one:",
        "  fast enough        2 s  ≤ 2.5 s  pass          of 3",
        "  unzip              -    ≥ 0.8 x  not measured  no unzip on this machine",
        "  share of the peak  0.9",
    ]
    assert [(row["group"], row["what"], row["value"], row["goal"], row["verdict"]) for row in written["rows"]] == [
        ("one", "fast enough", 2.0, 2.5, "pass"),
        ("one", "unzip", None, 0.8, "not measured"),
        ("one", "share of the peak", 0.9, None, ""),
    ]
    assert written["machine"]["cores"] >= 1 and set(written["others_cores"]) == {"one"}


def test_a_miss_is_named_at_the_end_and_in_the_exit_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, out, {"one": [HIT], "two": [MISS]})
    assert stop.value.code == f"1 figures miss their goals (all figures are in {out}):\n  two: small enough"
    assert [row["verdict"] for row in json.loads(out.read_text())["rows"]] == ["pass", "MISS"]


def test_a_group_runs_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = run(monkeypatch, tmp_path / "bench.json", {"one": [HIT], "two": [MISS]}, "--only", "one")
    assert {row["group"] for row in written["rows"]} == {"one"}
    with pytest.raises(SystemExit, match="--only three: expected some of one,two"):
        run(monkeypatch, tmp_path / "bench.json", {"one": [HIT], "two": [MISS]}, "--only", "one,three")


def test_a_ratio_is_that_of_medians() -> None:
    row = compare_medians("load", [1.0, 2.0, 9.0], [8.0, 7.0, 90.0], 0.25, "s")
    assert (row.value, row.verdict, row.note, row.samples) == (0.25, "pass", "2 s, straight 8 s", [0.125, 0.25, 1.125])


def test_a_probe_measures_a_process_of_its_own() -> None:
    found = bench_measure.run_probe("nothing", cwd=ROOT)
    assert 5e6 < found["peak"] < 5e7 and 0 < found["cpu"] < 5
    with pytest.raises(SystemExit, match=r"bench: module no\.such failed"):
        bench_measure.run_probe("module", "no.such", cwd=ROOT)


def test_an_artifact_that_is_there_twice_is_named(tmp_path: Path) -> None:
    for name in ("once", "copy"):
        (tmp_path / name).write_bytes(b"weights " * 20_000)
    (tmp_path / "other").write_bytes(b"numbers " * 20_000)
    row = bench_pipeline.bench_disk_use(Tree(tmp_path))
    assert row.value == 1.5 and row.verdict == "MISS" and row.note in ("copy", "once")


def test_what_make_announced_is_read() -> None:
    said = "build/onnx/vit.onnx: new\nbuild/lock: waiting for another make\nvit: differs\npublished: vit_onnx\n"
    assert bench_pipeline.list_announced(said) == {"build/onnx/vit.onnx"}


def test_a_small_archive_is_fetched_killed_and_unpacked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_fetch, "SIZE", 1 << 22)
    monkeypatch.setattr(bench_fetch, "FOLDER", tmp_path)
    monkeypatch.setattr(bench_fetch, "ROOT", ROOT)
    cpu, above, beyond = bench_fetch.bench_fetch(Tree(tmp_path), 1)
    assert (tmp_path / "weights.zip").stat().st_size == 1 << 22
    assert cpu.value and above.value and 0 < above.value < 100
    assert beyond.value is not None and 0 <= beyond.value < 100
    if shutil.which("unzip"):
        (speed,) = bench_fetch.bench_unpack(Tree(tmp_path), 1)
        assert speed.value and speed.value > 0


def test_the_work_of_a_volume_is_the_known_395_billion_multiply_adds() -> None:
    entry = yaml.safe_load((ROOT / "convertation/models.yaml").read_text())["vit"]
    assert bench_models.count_multiply_adds(entry) == pytest.approx(395e9, rel=0.005)


def test_the_straight_export_computes_the_same(tmp_path: Path) -> None:
    checkpoint = tmp_path / "tiny.pt"
    torch.save(make_synthetic_state_dict(TINY), checkpoint)
    straight_export(checkpoint, TINY, tmp_path / "straight.onnx")
    torch2onnx(checkpoint, TINY, tmp_path / "ours.onnx", opset=20, metadata={})
    straight, ours = (
        onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"]).run(
            ["output"], make_sample(TINY, 0, 3)
        )[0]
        for name in ("straight", "ours")
    )
    assert straight.shape == (3, 24)
    np.testing.assert_allclose(straight, ours, atol=1e-5 * np.abs(ours).max())


# --- What moved ------------------------------------------------------------------


def run_of(**samples: list[float]) -> dict[str, Any]:
    """Return a bench.json with one ratio per name; its goal is at most 1."""
    rows = [
        {"group": "vit", "what": what, "value": sorted(values)[len(values) // 2], "relation": "≤", "goal": 1.0,
         "unit": "x", "note": "", "samples": values if len(values) > 1 else [], "verdict": "pass"}
        for what, values in samples.items()
    ]  # fmt: skip
    return {"machine": {"cores": 2, "processor": "one"}, "others_cores": {}, "rows": rows}


def test_figures_that_moved_beyond_the_noise_of_both_runs_come_first() -> None:
    old = run_of(steady=[0.5, 0.52, 0.54], load=[0.2, 0.21, 0.22], memory=[0.4, 0.4, 0.4], once=[0.1])
    new = run_of(steady=[0.53, 0.55, 0.56], load=[0.3, 0.31, 0.32], memory=[0.3, 0.3, 0.31], once=[0.2])

    assert bench_compare.compare_runs(old, new) == [
        "vit: load    WORSE          0.21 → 0.31 x (+48 %), noise ±0.04",
        "vit: memory  better         0.4 → 0.3 x (-25 %), noise ±0.01",
        "vit: once    measured once  0.1 → 0.2 x (+100 %)",
        "vit: steady  within noise   0.52 → 0.55 x (+6 %), noise ±0.07",
        "2 of 4 figures moved beyond the noise",
    ]


def test_more_is_better_if_the_goal_is_a_minimum() -> None:
    old, new = run_of(speed=[1.0, 1.0, 1.0]), run_of(speed=[2.0, 2.0, 2.0])
    for row in (old["rows"][0], new["rows"][0]):
        row["relation"] = "≥"
    assert bench_compare.judge_figure(old["rows"][0], new["rows"][0])[0] == "better"
    old["rows"][0]["relation"] = new["rows"][0]["relation"] = ""
    assert bench_compare.judge_figure(old["rows"][0], new["rows"][0])[0] == "moved"


def test_another_machine_and_figures_of_only_one_run_are_named() -> None:
    old, new = run_of(load=[1.0, 1.0], gone=[1.0, 1.0]), run_of(load=[1.0, 1.0], added=[1.0, 1.0])
    new["machine"]["processor"] = "another"
    assert bench_compare.compare_runs(old, new) == [
        "other processor: one, now another; times of two machines cannot be compared",
        "vit: load  within noise  1 → 1 x (+0 %), noise ±0",
        "vit: gone  only in the old run",
        "vit: added  only in the new run",
        "0 of 1 figures moved beyond the noise",
    ]


def test_make_bench_compares_with_the_run_that_it_replaces(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    row = Row("load", 0.2, "≤", 1.0, "x", samples=[0.2, 0.2])
    run(monkeypatch, out, {"one": [row]})
    run(monkeypatch, out, {"one": [Row("load", 0.1, "≤", 1.0, "x", samples=[0.1, 0.1])]}, "--compare", str(out))
    assert "one: load  better  0.2 → 0.1 x (-50 %), noise ±0" in capsys.readouterr().out


def test_a_file_that_is_no_benchmark_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "old.json").write_text('{"rows": [{}], "machine": {}}')
    for name, message in (("old.json", "not the result of a benchmark"), ("absent.json", "No such file")):
        with pytest.raises(SystemExit, match=f"{name}: {message}.*; expected an earlier build/bench.json"):
            run(monkeypatch, tmp_path / "out.json", {"one": [MISS]}, "--compare", str(tmp_path / name))
    assert not (tmp_path / "out.json").exists()
