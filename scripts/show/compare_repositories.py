"""Compare the published repository with another one, model by model: what changes if it is served instead?

    python -m scripts.show.compare_repositories [--input FOLDER] [--image IMAGE] OURS THEIRS build/compare.json

Files that are the same need no question.  Where they differ, the real Triton serves first the one model, then the
other, and both get the same requests: seeded ones, or the volumes in FOLDER (scripts/show/volumes.py), or the studies
in it
(scripts/infer/volumes.py).  Exit status 1 where an answer differs by more than models.yaml allows, a model cannot be
compared, or THEIRS has one that OURS lacks.
"""

import argparse
import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format  # type: ignore[import-untyped]
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2 as schema  # type: ignore[import-untyped]

from scripts.convert import collapse
from scripts.convert.model_entry import model_entry
from scripts.convert.probabilities import compute_probabilities, find_changed, normalise_rows
from scripts.convert.sample import make_sample
from scripts.publish.prebuilt import GPUS, make_environment
from scripts.serve.model_config import read_config
from scripts.serve.onnx_headers import read_without_weights
from scripts.serve.triton_client import UnservedError, serve_models
from scripts.serve.verdict import hash_file, stage_files
from scripts.show.fidelity_table import SYNTHETIC
from scripts.show.volumes import find_volumes as volume_files
from scripts.show.volumes import list_names, read_volumes
from scripts.steps.records import read_text, record_path

Array = NDArray[Any]
Request = dict[str, Array]

SCRATCH, LOG, VENV = Path("build/compare"), Path("build/logs/compare.log"), Path(".venv-compare")
VECTORS, SERIES = 32, 2  # requests to a head, and to BPR, besides
SAME_FILES, SAME, DIFFERS, NOT_COMPARED = "same files", "same answers", "differs", "not compared"
ALIKE = "answers every study alike"
ONLY = {"ours": "only in the new one", "theirs": "only in the other one"}
BAD = (DIFFERS, NOT_COMPARED, ALIKE, ONLY["theirs"])
LISTED = 40


class UnlikeError(Exception):
    """Two models that cannot be asked the same, or one that cannot be asked here, in words."""


class Repository:
    """One of the two, its models and how they are asked.

    `foreign`: its Python has requirements of its own; `confined`: its code is another's, see triton_server.
    """

    def __init__(self, path: Path, image: str | None, *, foreign: bool = False, confined: bool = True) -> None:
        if not any(path.glob("*/config.pbtxt")):
            raise SystemExit(f"{path}: no model repository; expected folders with a config.pbtxt")
        self.path, self.image, self.foreign, self.confined = path.resolve(), image, foreign, confined
        self.models = sorted(config.parent.name for config in path.glob("*/config.pbtxt"))

    def files(self, name: str) -> dict[str, str]:
        """The sha256 of each file of a model, but for what Python leaves there."""
        folder = self.path / name
        files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}

    def config(self, name: str) -> Any:
        try:
            return read_config(self.path / name / "config.pbtxt")
        except ValueError as error:
            raise UnlikeError(f"{self.path / name}/config.pbtxt cannot be read: {error}") from None

    def answers(self, name: str, config: Any, requests: Iterable[Request]) -> list[Array]:
        """What this model alone, served by Triton with this config, answers; UnlikeError where it cannot be served."""
        if config.platform == "tensorrt_plan" and not (self.image and GPUS.is_dir()):
            raise UnlikeError(f"{self.path / name} is a TensorRT plan: only an image on a machine with a GPU serves it")
        written = SCRATCH / f"{name}.pbtxt"
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(text_format.MessageToString(config))
        contents = [f"{name}/{file}={self.path / name / file}" for file in self.files(name) if file != "config.pbtxt"]
        stage_files([f"{name}/config.pbtxt={written}", *contents], SCRATCH / "staging")
        venv = None
        if self.foreign and config.backend == "python" and not self.image:
            venv, trouble = make_environment(self.path, VENV)
            if trouble:
                raise UnlikeError(f"{self.path / name}: {trouble}")
        try:
            with serve_models(SCRATCH / "staging", LOG, image=self.image, venv=venv, foreign=self.confined) as ask:
                return [ask(name, request) for request in requests]
        except UnservedError as error:
            raise UnlikeError(f"{self.path / name}: {error}") from None


def sort_key(name: str) -> tuple[bool, bool, str]:
    """Sorts vit_onnx before the heads_onnx, and vit_trt before theirs: heads are asked with the embeddings before."""
    return name.endswith("_trt"), not name.startswith("vit_"), name


class Comparison:
    """Model by model; the heads are asked with the embeddings of both ViTs, so each side decides as it would."""

    def __init__(self, ours: Repository, theirs: Repository, models: Path, folder: Path | None) -> None:
        self.ours, self.theirs, self.models, self.folder = ours, theirs, models, folder
        self.vit = model_entry(models, "vit")
        self.inputs: list[str] = []
        self.embeddings: dict[str, Array] = {}
        self.probabilities: dict[str, dict[str, list[list[float]]]] = {}

    def run(self) -> dict[str, Any]:
        """What OUT holds."""
        common = sorted(set(self.ours.models) & set(self.theirs.models), key=sort_key)
        files = {name: (self.ours.files(name), self.theirs.files(name)) for name in common}
        alike = {name: mine == other for name, (mine, other) in files.items()}
        heads = [name for name in common if self.family(name) == "head"]
        vits = [name for name in common if self.family(name) == "vit"]
        asked = {name for name in common if not alike[name]}
        if asked.intersection(heads + vits):
            asked |= {*heads, *vits}  # what reaches a decision, ViT and heads tell together
            self.folder = self.folder and make_volumes_folder(self.folder, self.ours)
            self.inputs = list_names(self.folder, self.vit)
        results: dict[str, Any] = {}
        for name in common:
            print(f"  {name}: {'the same files' if alike[name] else 'the files differ'}", flush=True)
            results[name] = {"verdict": SAME_FILES}
            if name in asked:
                try:
                    answered = self.judge(name, alike[name])
                except UnlikeError as error:
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
            "weights": {"ours": kind_of_weights(self.ours.path), "theirs": kind_of_weights(self.theirs.path)},
            "inputs": self.inputs,
            "files": {f"{name}/{path}": digest for name, (mine, _) in files.items() for path, digest in mine.items()},
            "models": results,
            "probabilities": self.probabilities,
            "agree": not any(result["verdict"] in BAD for result in results.values()),
        }

    def family(self, name: str) -> str:
        """The family that models.yaml gives it, "" where it has no such model."""
        try:
            return str(model_entry(self.models, name.rpartition("_")[0])["family"])
        except SystemExit:
            return ""

    def judge(self, name: str, alike: bool) -> dict[str, Any]:
        """Ask both, or one where the files are the same, and say how far apart the answers are."""
        if not self.family(name):
            raise UnlikeError(f"{self.models} has no such model, so what to ask it is not known")
        entry = model_entry(self.models, name.rpartition("_")[0])
        configs = [side.config(name) for side in (self.ours, self.theirs)]
        if reason := explain_difference(*configs):
            raise UnlikeError(reason)
        size = max(1, min(config.max_batch_size for config in configs))
        found: list[list[Array]] = []
        for side, config, partner in zip((self.ours, self.theirs), configs, reversed(configs), strict=True):
            if not (alike and found):
                print(f"  asking {name} of {side.path}", flush=True)
                found.append(side.answers(name, make_askable(config, partner, side.image), self.requests(entry, size)))
        mine, other = (np.concatenate(answers) for answers in (found[0], found[-1]))
        if mine.shape != other.shape or mine.dtype != other.dtype:
            raise UnlikeError(f"ours answers {mine.dtype} {list(mine.shape)}, theirs {other.dtype} {list(other.shape)}")
        if entry["family"] == "vit":
            self.embeddings = {"ours": mine, "theirs": other}
        result = (
            make_bpr_result(mine, other)
            if entry["family"] == "bpr"
            else compare_answers(mine, other, entry["tolerance"]["served"])
        )
        if entry["family"] == "vit" and (said := self.collapsed(mine, other)):
            result |= {"verdict": ALIKE, "reason": said}
        if entry["family"] == "head" and self.embeddings:
            result["decisions_changed"] = self.decide(name, mine, other)
        return result

    def collapsed(self, mine: Array, other: Array) -> str:
        """Which side answers different volumes alike, in words; "" where none does.

        Two files of INPUT may hold the same volume: then both sides say so.
        """
        found = {"new": collapse.find_alike_rows(other, mine), "other": collapse.find_alike_rows(mine, other)}
        if not self.folder:  # seeded volumes are different ones
            found = {
                side: pairs or [(0, row) for row in range(1, len(values)) if np.array_equal(values[0], values[row])]
                for (side, pairs), values in zip(found.items(), (mine, other), strict=True)
            }
        bad = [side for side, pairs in found.items() if pairs]
        if not bad:
            return ""
        one, two = found[bad[0]][0]
        return (
            f"the {' and the '.join(bad)} one answers different volumes alike, {self.inputs[one]} and "
            f"{self.inputs[two]} for one: {collapse.CAUSE}; no answer of it can be used; next there: make repository"
        )

    def requests(self, entry: dict[str, Any], size: int) -> Iterable[Request]:
        """What both are asked: each volume, or rows for a head in batches of `size`, or series."""
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

    def decide(self, name: str, mine: Array, other: Array) -> list[dict[str, Any]]:
        """Each decision at 0.5 that would be another: own ViT, own head on either side."""
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


def explain_difference(ours: Any, theirs: Any) -> str:
    """Why two configs cannot be asked the same, "" if they can. What a config leaves out, Triton completes."""
    for what in ("input", "output"):
        mine, other = list_tensors(ours, what), list_tensors(theirs, what)
        if not mine or not other:
            continue
        if mine.keys() != other.keys():
            return f"{what}: {', '.join(sorted(mine))} in the new one, {', '.join(sorted(other))} in the other"
        for name, (kind, shape) in mine.items():
            other_kind, other_shape = other[name]
            pairs = zip(shape, other_shape, strict=False)
            if (
                kind != other_kind
                or len(shape) != len(other_shape)
                or any(a != b and -1 not in (a, b) for a, b in pairs)
            ):
                return f"{what} {name} is {kind} {shape} in the new one, {other_kind} {other_shape} in the other"
    return ""


def list_tensors(config: Any, what: str) -> dict[str, tuple[str, list[int]]]:
    """Type and whole shape of each input or output, by name."""
    batch = [-1] if config.max_batch_size else []
    return {
        tensor.name: (schema.DataType.Name(tensor.data_type).removeprefix("TYPE_"), [*batch, *tensor.dims])
        for tensor in getattr(config, what)
    }


def make_askable(config: Any, partner: Any, image: str | None) -> Any:
    """A copy that can be served here and strictly: on the CPU where there is no GPU, and whole."""
    whole = type(config).FromString(config.SerializeToString())
    if config.platform == "onnxruntime_onnx":
        whole.platform, whole.backend = "", "onnxruntime"
    if not config.input and not config.output:
        whole.max_batch_size = partner.max_batch_size
    for what in ("input", "output"):
        if not getattr(config, what):
            getattr(whole, what).extend(getattr(partner, what))
    if not (config.platform or config.backend):
        whole.platform, whole.backend = partner.platform, partner.backend
    if not (image and GPUS.is_dir()):
        del whole.instance_group[:]
        whole.instance_group.add(count=1, kind=schema.ModelInstanceGroup.KIND_CPU)
    return whole


def compare_answers(mine: Array, other: Array, tolerance: float) -> dict[str, Any]:
    """How far two answers are apart, relative to the largest value of the new one."""
    if bad := [side for side, values in (("new", mine), ("other", other)) if not np.isfinite(values).all()]:
        raise UnlikeError(f"the {' and the '.join(bad)} one answers NaN or infinity")
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
    """Tags are the same or they are not."""
    both = [[tag.decode(errors="replace") for tag in side.ravel()] for side in (mine, other)]
    apart = sum(a != b for a, b in zip(*both, strict=True))
    return {"verdict": DIFFERS if apart else SAME, "asked": len(mine), "beyond": apart, "new": both[0], "old": both[1]}


def kind_of_weights(repository: Path) -> str:
    """What the ONNX files of a repository say about themselves: synthetic, real, or unknown."""
    kinds = set()
    for path in sorted(repository.glob("*/*/model.onnx")):
        try:
            properties = read_without_weights(path)[0].metadata_props
        except (ValueError, OSError):
            continue
        kinds |= {prop.value for prop in properties if prop.key == "weights"}
    return next((kind for kind in ("synthetic", "real") if kind in kinds), "unknown")


def make_volumes_folder(folder: Path, ours: Repository) -> Path:
    """The folder itself if it holds volumes, else one with those of its studies."""
    if volume_files(folder):
        return folder
    out = SCRATCH / "volumes"
    reader = [".venv-inference/bin/python3", "-m", "scripts.infer.volumes", str(ours.path), str(folder), str(out)]
    if status := subprocess.run(reader).returncode:
        raise SystemExit(status if status > 0 else f"INPUT={folder}: reading it ended by signal {-status}; memory?")
    return out


def describe_volumes(found: dict[str, Any]) -> str:
    """Which volumes were asked, if any had to be."""
    if not any("asked" in result for result in found["models"].values()):
        return "nothing had to be asked"
    return f"asked: {', '.join(found['inputs'])}"


def format_findings(found: dict[str, Any]) -> list[str]:
    """The findings as a person reads them."""
    said = [SYNTHETIC] if "synthetic" in found["weights"].values() else []
    said += [f"new: {found['ours']}, other: {found['theirs']}", describe_volumes(found)]
    for name, result in found["models"].items():
        words = [f"{name}: {result['verdict']}"]
        if "difference" in result:
            words.append(f"{result['difference']:.1e} of the scale apart, allowed {result['tolerance']:g}")
        if result.get("beyond"):
            words.append(f"{result['beyond']} of {result['asked']} answers beyond that")
        if "new" in result:
            words.append(f"new {', '.join(result['new'])}; other {', '.join(result['old'])}")
        if "decisions_changed" in result:
            words.append(f"{len(result['decisions_changed'])} decisions changed")
        said.append(", ".join([*words, *filter(None, [result.get("reason")])]))
        said += [
            f"  {one['input']}, finding {one['finding']}: {one['old']:.4f} → {one['new']:.4f}"
            for one in result.get("decisions_changed", [])[:LISTED]
        ]
    return said


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--models", type=Path, default=Path("convertation/models.yaml"))
    parser.add_argument("--input", type=Path, help="folder of volumes or studies")
    parser.add_argument("--image", help="serve by this image's Triton, in Docker")
    given = parser.parse_args(argv)
    image = given.image or None
    of_others = read_text(record_path("published", str(given.ours))).startswith("prebuilt")
    ours = Repository(given.ours, image, confined=of_others)
    theirs = Repository(given.theirs, image, foreign=True)
    if given.input:
        volume_files(given.input)  # is it there?
    shutil.rmtree(SCRATCH, ignore_errors=True)
    try:
        found = Comparison(ours, theirs, given.models, given.input).run()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        shutil.rmtree(SCRATCH / "volumes", ignore_errors=True)  # patients', 221 MB each
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(format_findings(found)))
    if not found["agree"]:
        raise SystemExit(f"the repositories do not agree within models.yaml's tolerances; all of it: {given.out}")


if __name__ == "__main__":
    main()
