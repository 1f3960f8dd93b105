"""Compare the published repository with another one, model by model: what changes if the other one is served?

    python -m scripts.show.compare_repositories [--input FOLDER] [--image IMAGE] OURS THEIRS build/compare.json

A model whose files are the same in both is not asked. If they differ, the real Triton serves first our model, then
theirs, and both get the same requests: seeded ones, or the volumes in FOLDER (scripts/show/volumes.py), or the studies
in it (scripts/infer/volumes.py). Once the ViT or a head differs, the ViT and all heads are asked.
Exit status 1: an answer differs by more than models.yaml allows, a model cannot be compared, or THEIRS has a model that
OURS lacks.
"""

import argparse
import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.convert import collapse
from scripts.convert.model_entry import read_entry
from scripts.convert.probabilities import compute_probabilities, find_changed, normalise_rows
from scripts.convert.sample import make_sample
from scripts.show.asked_repository import (
    SCRATCH,
    Array,
    IncomparableError,
    Repository,
    Request,
    explain_difference,
    make_askable,
    read_weights_kind,
)
from scripts.show.fidelity_table import SYNTHETIC
from scripts.show.volumes import find_volumes, list_names, read_volumes
from scripts.steps.records import read_text, record_path

VECTORS, SERIES = 32, 2  # seeded unit vectors for a head, seeded series for BPR
SAME_FILES, SAME, DIFFERS, NOT_COMPARED = "same files", "same answers", "differs", "not compared"
ALIKE = "answers every study alike"
ONLY = {"ours": "only in the new one", "theirs": "only in the other one"}
BAD = (DIFFERS, NOT_COMPARED, ALIKE, ONLY["theirs"])
LISTED = 40  # differing files, and decisions changed, that are listed


def sort_key(name: str) -> tuple[bool, bool, str]:
    """Return a key that sorts the ViT before its heads, and ONNX models before plans: heads need the embeddings."""
    return name.endswith("_trt"), not name.startswith("vit_"), name


class Comparison:
    """Compares model by model. The heads get the embeddings of both ViTs, so each side decides as its client would."""

    def __init__(self, ours: Repository, theirs: Repository, models: Path, folder: Path | None) -> None:
        self.ours, self.theirs, self.models, self.folder = ours, theirs, models, folder
        self.vit = read_entry(models, "vit")
        self.inputs: list[str] = []
        self.embeddings: dict[str, Array] = {}
        self.probabilities: dict[str, dict[str, list[list[float]]]] = {}

    def compare_models(self) -> dict[str, Any]:
        """Return the content of OUT.json."""
        common = sorted(set(self.ours.models) & set(self.theirs.models), key=sort_key)
        files = {name: (self.ours.hash_files(name), self.theirs.hash_files(name)) for name in common}
        alike = {name: mine == other for name, (mine, other) in files.items()}
        heads = [name for name in common if self.find_family(name) == "head"]
        vits = [name for name in common if self.find_family(name) == "vit"]
        asked = {name for name in common if not alike[name]}
        if asked.intersection(heads + vits):
            asked |= {*heads, *vits}  # a decision depends on the ViT and the head together
            self.folder = self.folder and make_volumes_folder(self.folder, self.ours)
            self.inputs = list_names(self.folder, self.vit)
        results: dict[str, Any] = {}
        for name in common:
            print(f"  {name}: {'the same files' if alike[name] else 'the files differ'}", flush=True)
            results[name] = {"verdict": SAME_FILES}
            if name in asked:
                try:
                    answered = self.compare_model(name, alike[name])
                except IncomparableError as error:
                    answered = {"verdict": NOT_COMPARED, "reason": str(error)}
                results[name] = answered | results[name] if alike[name] else answered
            if not alike[name]:
                mine, other = files[name]
                paths = sorted(mine.keys() | other.keys())
                results[name]["files"] = [path for path in paths if mine.get(path) != other.get(path)][:LISTED]
        for side, here, there in (("ours", self.ours, self.theirs), ("theirs", self.theirs, self.ours)):
            results |= {name: {"verdict": ONLY[side]} for name in here.models if name not in there.models}
        return {
            "ours": str(self.ours.path),
            "theirs": str(self.theirs.path),
            "weights": {"ours": read_weights_kind(self.ours.path), "theirs": read_weights_kind(self.theirs.path)},
            "inputs": self.inputs,
            "files": {f"{name}/{path}": digest for name, (mine, _) in files.items() for path, digest in mine.items()},
            "models": results,
            "probabilities": self.probabilities,
            "agree": not any(result["verdict"] in BAD for result in results.values()),
        }

    def find_family(self, name: str) -> str:
        """Return the family of a served model, such as vit_onnx, from models.yaml; "" if it has no such model."""
        try:
            return str(read_entry(self.models, name.rpartition("_")[0])["family"])
        except SystemExit:
            return ""

    def compare_model(self, name: str, alike: bool) -> dict[str, Any]:
        """Ask both sides, or only ours if the files are the same (`alike`). Return how far the answers differ."""
        if not self.find_family(name):
            raise IncomparableError(f"{self.models} has no such model, so its requests are not known")
        entry = read_entry(self.models, name.rpartition("_")[0])
        configs = [side.read_model_config(name) for side in (self.ours, self.theirs)]
        if reason := explain_difference(*configs):
            raise IncomparableError(reason)
        size = max(1, min(config.max_batch_size for config in configs))
        found: list[list[Array]] = []
        for side, config, partner in zip((self.ours, self.theirs), configs, reversed(configs), strict=True):
            if not (alike and found):
                print(f"  asking {name} of {side.path}", flush=True)
                found.append(
                    side.ask_model(name, make_askable(config, partner, side.image), self.make_requests(entry, size))
                )
        mine, other = (np.concatenate(answers) for answers in (found[0], found[-1]))
        if mine.shape != other.shape or mine.dtype != other.dtype:
            raise IncomparableError(
                f"the new one answers {mine.dtype} {list(mine.shape)}, the other {other.dtype} {list(other.shape)}"
            )
        if entry["family"] == "vit":
            self.embeddings = {"ours": mine, "theirs": other}
        result = (
            make_bpr_result(mine, other)
            if entry["family"] == "bpr"
            else compare_answers(mine, other, entry["tolerance"]["served"])
        )
        if entry["family"] == "vit" and (said := self.explain_collapse(mine, other)):
            result |= {"verdict": ALIKE, "reason": said}
        if entry["family"] == "head" and self.embeddings:
            result["decisions_changed"] = self.list_changed_decisions(name, mine, other)
        return result

    def explain_collapse(self, mine: Array, other: Array) -> str:
        """Return which side gives different volumes the same answer, and why; "" if none does.

        Two files of INPUT may hold the same volume. Then both sides answer them alike, and neither is named.
        """
        found = {"new": collapse.find_alike_rows(other, mine), "other": collapse.find_alike_rows(mine, other)}
        if not self.folder:  # no two seeded volumes are the same
            found = {
                side: pairs or [(0, row) for row in range(1, len(values)) if np.array_equal(values[0], values[row])]
                for (side, pairs), values in zip(found.items(), (mine, other), strict=True)
            }
        bad = [side for side, pairs in found.items() if pairs]
        if not bad:
            return ""
        one, two = found[bad[0]][0]
        return (
            f"the {' and the '.join(bad)} one answers different volumes alike, for example {self.inputs[one]} and "
            f"{self.inputs[two]}: {collapse.CAUSE}; do not use its answers; next, in that project: make repository"
        )

    def make_requests(self, entry: dict[str, Any], size: int) -> Iterable[Request]:
        """Yield the requests for both sides: each volume, or a head's rows in batches of `size`, or series for BPR."""
        if entry["family"] == "vit":
            for name, volume in zip(self.inputs, read_volumes(self.folder, entry), strict=True):
                print(f"    {name}", flush=True)
                yield {"input": volume}
        elif entry["family"] == "bpr":
            yield from (make_sample(entry, seed, 1) for seed in range(1, 1 + SERIES))
        else:
            rows = np.concatenate(
                [*map(normalise_rows, self.embeddings.values()), make_sample(entry, 1, VECTORS)["input"]]
            )
            yield from ({"input": rows[start : start + size]} for start in range(0, len(rows), size))

    def list_changed_decisions(self, name: str, mine: Array, other: Array) -> list[dict[str, Any]]:
        """Return each decision at 0.5 that changes, and keep the probabilities. Each side uses its own ViT and head.

        `mine` and `other`: the head's answers to the embeddings of our ViT, then of theirs, then to seeded vectors.
        """
        count = len(self.inputs)
        new, old = compute_probabilities(mine[:count]), compute_probabilities(other[count : 2 * count])
        head = name.rpartition("_")[0]
        self.probabilities[head] = self.probabilities.get(head) or {"new": new.tolist(), "old": old.tolist()}
        return [
            {
                "input": self.inputs[row],
                "finding": finding,
                "old": float(old[row, finding]),
                "new": float(new[row, finding]),
            }
            for row, finding in find_changed(old, new)
        ]


def compare_answers(mine: Array, other: Array, tolerance: float) -> dict[str, Any]:
    """Return how far the answers of two models differ, relative to the largest value of the new one's."""
    if bad := [side for side, values in (("new", mine), ("other", other)) if not np.isfinite(values).all()]:
        raise IncomparableError(f"the {' and the '.join(bad)} one answers NaN or infinity")
    scale = float(np.abs(mine).max()) or 1.0
    apart = np.abs(mine.astype(np.float64) - other).max(axis=1) / scale
    largest = float(apart.max())
    return {
        "verdict": SAME if largest <= tolerance else DIFFERS,
        "difference": largest,
        "tolerance": tolerance,
        "scale": scale,
        "asked": len(mine),
        "beyond": int((apart > tolerance).sum()),
    }


def make_bpr_result(mine: Array, other: Array) -> dict[str, Any]:
    """Compare the tags of two BPR models: they have no tolerance."""
    both = [[tag.decode(errors="replace") for tag in side.ravel()] for side in (mine, other)]
    apart = sum(a != b for a, b in zip(*both, strict=True))
    return {"verdict": DIFFERS if apart else SAME, "asked": len(mine), "beyond": apart, "new": both[0], "old": both[1]}


def make_volumes_folder(folder: Path, ours: Repository) -> Path:
    """Return `folder` if it holds volumes, else a folder with the volumes of its studies."""
    if find_volumes(folder):
        return folder
    out = SCRATCH / "volumes"
    reader = [".venv-inference/bin/python3", "-m", "scripts.infer.volumes", str(ours.path), str(folder), str(out)]
    if status := subprocess.run(reader).returncode:
        raise SystemExit(
            status
            if status > 0
            else f"INPUT={folder}: its reader was ended by signal {-status}, perhaps for lack of memory"
        )
    return out


def describe_volumes(found: dict[str, Any]) -> str:
    """Return which volumes the models got, if any was asked."""
    if not any("asked" in result for result in found["models"].values()):
        return "no model was asked"
    return f"volumes asked: {', '.join(found['inputs'])}"


def format_findings(found: dict[str, Any]) -> list[str]:
    """Return the results as lines of text."""
    lines = [SYNTHETIC] if "synthetic" in found["weights"].values() else []
    lines += [f"new: {found['ours']}, other: {found['theirs']}", describe_volumes(found)]
    for name, result in found["models"].items():
        words = [f"{name}: {result['verdict']}"]
        if "difference" in result:
            words.append(f"difference {result['difference']:.1e} of the scale, allowed {result['tolerance']:g}")
        if result.get("beyond"):
            more = " by more" if "difference" in result else ""
            words.append(f"{result['beyond']} of {result['asked']} answers differ{more}")
        if "new" in result:
            words.append(f"new {', '.join(result['new'])}; other {', '.join(result['old'])}")
        if "decisions_changed" in result:
            words.append(f"{len(result['decisions_changed'])} decisions changed")
        lines.append(", ".join([*words, *filter(None, [result.get("reason")])]))
        lines += [
            f"  {one['input']}, finding {one['finding']}: {one['old']:.4f} → {one['new']:.4f}"
            for one in result.get("decisions_changed", [])[:LISTED]
        ]
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--models", type=Path, default=Path("convertation/models.yaml"))
    parser.add_argument("--input", type=Path, help="folder of volumes or studies")
    parser.add_argument("--image", help="serve with the Triton of this image, in Docker")
    given = parser.parse_args(argv)
    image = given.image or None
    made_elsewhere = read_text(record_path("published", str(given.ours))).startswith("prebuilt")
    ours = Repository(given.ours, image, confined=made_elsewhere)
    theirs = Repository(given.theirs, image, foreign=True)
    if given.input:
        find_volumes(given.input)  # refuse an absent folder now
    shutil.rmtree(SCRATCH, ignore_errors=True)
    try:
        found = Comparison(ours, theirs, given.models, given.input).compare_models()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        shutil.rmtree(SCRATCH / "volumes", ignore_errors=True)  # they may be patients', and take 221 MB each
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(format_findings(found)))
    if not found["agree"]:
        raise SystemExit(f"the repositories do not agree within the tolerances of models.yaml; details: {given.out}")


if __name__ == "__main__":
    main()
