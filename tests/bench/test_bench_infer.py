"""The benchmark of `make infer`, on the tiny project and a small study."""

from pathlib import Path

import pytest
from conftest import ROOT, Project

from scripts.bench import infer as bench_infer
from scripts.bench.measure import Tree


def test_stages_folder_memory_and_hand_over_are_measured(
    built: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tree, "build", lambda *_: None)
    for name, value in {"FOLDER": tmp_path / "infer", "ROOT": ROOT, "SLICES": 30, "SIDE": 128, "MORE": 2,
                        "VOLUME": (24, 48, 480)}.items():  # fmt: skip
        monkeypatch.setattr(bench_infer, name, value)

    rows = {row.what: row for row in bench_infer.bench_infer(Tree(built.path), 1)}

    assert list(rows) == [
        "reading, a study alone",
        "preprocessing, a study alone",
        "networks, a study alone",
        "a study of a folder, of its slowest stage alone",
        "studies per minute",
        "most RSS of the process that reads and computes",
        "a volume to a Triton here, shared memory",
        "the same in one message, large frames",
    ]
    # A difference of two runs, which may have any sign
    whole = "a study of a folder, of its slowest stage alone", "studies per minute"
    assert all(row.value is not None and (name in whole or row.value > 0) for name, row in rows.items())
    assert rows["a volume to a Triton here, shared memory"].goal == 0.35
    assert not (tmp_path / "infer").exists()
