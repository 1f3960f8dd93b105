"""Print what each published file was made from, as JSON; or compare a repository with such a file.

    python3 -sES -m scripts.publish.provenance REPOSITORY
    python3 -sES -m scripts.publish.provenance REPOSITORY --check FILE.json

The JSON, standard library only, no clock and no absolute path in it:

    published  for each file in the repository: its sha256, its source, what was guessed about its checkpoint
    made       for each artifact: its sha256, command, versions of the packages that shape it, sha256 of each input
    origin     for each file that no step made: its sha256 and kind: source, archive, or local (an own file)
    verdict    the artifact with the verdict on the set; its record is in `made`

A synthetic checkpoint, made here from seeded numbers, is an artifact like any other; `weights` says which kind it is.
The JSON proves no origin: anyone who can change the files can change an unsigned JSON beside them.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from scripts.steps.explain import ARCHIVE, Step, ask_make, judge_steps, read_lock
from scripts.steps.printing import print_text
from scripts.steps.records import (
    current_digest,
    hash_file,
    known_digest,
    read_inputs,
    read_text,
    record_path,
    written_digest,
)
from scripts.steps.step import KEPT

READ_AS = b"\x0a\x12checkpoint_read_as"  # a key of 18 letters, as protobuf writes it; its value follows


def trace_repository(repository: str, steps: dict[str, Step]) -> dict[str, Any]:
    """Return the provenance of every published file by the records; SystemExit if a file differs from its record."""
    copies = {file: source for step in steps.values() for file, source in step.files.items()}
    verdict = next(name for name in steps if Path(name).name == "verdict.json")
    judgement = read_inputs(verdict)
    again = "the records do not say what it was made from; make repository"
    told: dict[str, Any] = {
        "version": read_text("VERSION").strip(),
        "weights": "",
        "verdict": verdict,
        "published": {},
        "made": {},
        "origin": {},
    }
    told["weights"] = read_text(record_path("published", repository)).partition("\n")[0]
    for file, source in sorted(copies.items()):
        if not (sha := current_digest(file)):
            raise SystemExit(f"{file} is not there; make repository")
        if sha != judgement.get(source):
            raise SystemExit(f"{file} is not what the verdict was passed on: {again}")
        guessed = {"checkpoint_read_as": said} if (said := read_guesses(file)) else {}
        told["published"][os.path.relpath(file, repository)] = {"sha256": sha, "copy_of": source, **guessed}

    def trace(name: str, sha: str) -> None:
        if name in told["made"] or name in told["origin"]:
            if (told["made"].get(name) or told["origin"][name])["sha256"] != sha:
                raise SystemExit(f"{name} changed between two steps: {again}")
        elif written_digest(name) == sha:
            text = read_text(record_path("made", name)).partition(" ")[2]
            command, _, _ = text.rpartition(" : ")
            words = command.split()
            inputs = read_inputs(name)
            told["made"][name] = {
                "sha256": sha,
                "command": " ".join(word for word in words if "==" not in word),
                "versions": dict(word.split("==") for word in words if "==" in word),
                "inputs": inputs,
            }
            for source, was in inputs.items():
                trace(source, was)
        elif name in steps and not name.startswith(KEPT):
            raise SystemExit(f"{name} was made anew since: {again}")
        else:
            told["origin"][name] = {"sha256": sha, "kind": "local" if name.startswith(KEPT) else "source"}

    trace(verdict, written_digest(verdict))
    if f"{ARCHIVE}.lock.json" in told["origin"]:
        told["origin"][ARCHIVE] = {
            "kind": "archive",
            **read_archive_lock(told["origin"][f"{ARCHIVE}.lock.json"]["sha256"]),
        }
    return {key: dict(sorted(value.items())) if isinstance(value, dict) else value for key, value in told.items()}


def read_guesses(file: str) -> str:
    """Return what was guessed about the checkpoint of an ONNX file, from its metadata (field 14), "" if nothing was."""
    if not file.endswith(".onnx"):
        return ""
    with open(file, "rb") as onnx:

        def read_varint() -> int:
            value = shift = 0
            while byte := onnx.read(1):
                value, shift = value | (byte[0] & 127) << shift, shift + 7
                if byte[0] < 128:
                    break
            return value

        end = os.fstat(onnx.fileno()).st_size
        while onnx.tell() < end:
            field, kind = divmod(read_varint(), 8)
            if kind == 0:
                read_varint()
            elif kind != 2:
                return ""
            elif (length := read_varint()) and field == 14 and onnx.read(length).startswith(READ_AS):
                onnx.seek(len(READ_AS) + 1 - length, os.SEEK_CUR)
                return onnx.read(read_varint()).decode()
            elif field != 14:
                onnx.seek(length, os.SEEK_CUR)
    return ""


def read_archive_lock(lock: str) -> dict[str, Any]:
    """Return what the lock with this digest says about weights.zip; only the digest, if the lock has changed since."""
    return read_lock() if known_digest(f"{ARCHIVE}.lock.json") == lock else {"sha256": "", "lock_sha256": lock}


def list_differences(repository: str, told: dict[str, Any]) -> list[str]:
    """Return how the files of a repository, each read again, differ from the published files of a provenance."""
    expected = {name: entry["sha256"] for name, entry in told["published"].items()}
    here = {
        os.path.relpath(f"{folder}/{name}", repository)
        for folder, _, names in os.walk(repository)
        for name in names
        if name != ".gitkeep" and "__pycache__" not in folder
    }
    lines = [f"{name}: not there" for name in expected.keys() - here]
    lines += [f"{name}: not among those told of" for name in here - expected.keys()]
    for name in here & expected.keys():
        if (sha := hash_file(f"{repository}/{name}")) != expected[name]:
            lines.append(f"{name}: sha256 is {sha}, told is {expected[name]}")
    return sorted(lines)


def check_provenance(repository: str, file: str) -> None:
    """Compare a repository with a provenance; SystemExit with each difference."""
    try:
        told = json.loads(read_text(file))
        lines = list_differences(repository, told)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise SystemExit(f"{file}: no provenance; expected what `make provenance > {file}` writes") from None
    if lines:
        raise SystemExit("\n".join([*lines, f"{repository} is not what {file} tells of"]))
    print_text(f"{repository}: {len(told['published'])} files are those of {file}")


if __name__ == "__main__":
    if sys.argv[2:3] == ["--check"]:
        check_provenance(sys.argv[1], sys.argv[3])
    else:
        print_text(
            json.dumps(trace_repository(sys.argv[1], judge_steps(ask_make("repository"), sys.argv[1])), indent=2)
        )
