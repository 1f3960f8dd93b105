"""The part of a download that has come so far: OUT.part, and in OUT.part.json what it is a part of."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from scripts.archives.yandex_disk import Archive

CHUNK = 1 << 20


class Partial:
    """OUT.part, its digests, and in OUT.part.json what it is a part of and the guard for the next Range."""

    def __init__(self, out: Path) -> None:
        self.path, self.note = out.with_name(f"{out.name}.part"), out.with_name(f"{out.name}.part.json")
        self.file = self.path.open("ab", buffering=0)
        self.whole: Archive | None = None
        self.guard, self.best, self.size = "", 0, self.path.stat().st_size

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()
        if self.path.exists() and self.path.stat().st_size == 0:
            self.path.unlink()
            self.note.unlink(missing_ok=True)

    def belong(self, whole: Archive) -> None:
        """Keep what is there if it is a part of `whole`, else start anew."""
        if self.whole == whole:
            return
        try:
            noted = json.loads(self.note.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            noted = None
        self.whole = whole
        if isinstance(noted, dict) and noted.get("of") == self.identity() and self.size <= whole.size:
            self.guard = str(noted.get("guard", ""))
            self.digest()
        else:
            self.restart()

    def identity(self) -> dict[str, object]:
        """Return what tells the whole from another: its digests, and its date only if it has none."""
        assert self.whole
        return asdict(replace(self.whole, modified="") if self.whole.sha256 or self.whole.md5 else self.whole)

    def digest(self) -> None:
        """Read what came in an earlier run."""
        self.sha256 = hashlib.sha256()
        self.md5 = None
        if self.whole and self.whole.md5 and not self.whole.sha256:
            self.md5 = hashlib.md5(usedforsecurity=False)
        with self.path.open("rb") as file:
            while block := file.read(CHUNK):
                self.sha256.update(block)
                if self.md5:
                    self.md5.update(block)
        self.best = max(self.best, self.size)

    def restart(self) -> None:
        """Forget what came."""
        self.file.truncate(0)
        self.size, self.guard = 0, ""
        self.write_note()
        self.digest()

    def guarded_by(self, headers: Mapping[str, str]) -> None:
        """Note what tells this file on the server from a later one: its entity tag if strong, else its date."""
        tag = headers.get("ETag", "")
        guard = tag if tag.startswith('"') else headers.get("Last-Modified", "")
        if guard != self.guard:
            self.guard = guard
            self.write_note()

    def write_note(self) -> None:
        """Write OUT.part.json."""
        noted = {"of": self.identity(), "guard": self.guard}
        draft = self.note.with_name(f"{self.note.name}~")
        draft.write_text(json.dumps(noted) + "\n", encoding="utf-8")
        draft.replace(self.note)

    def write(self, block: bytes) -> None:
        """Append to the file."""
        written = 0
        while written < len(block):  # an unbuffered write may take less, on a disk that is full
            written += self.file.write(memoryview(block)[written:])
        self.sha256.update(block)
        if self.md5:
            self.md5.update(block)
        self.size += len(block)
        self.best = max(self.best, self.size)

    def set_aside(self) -> Path:
        """Keep a bad file under a name of its own, and return that."""
        bad = self.path.with_name(f"{self.path.name.removesuffix('.part')}.bad")
        self.path.replace(bad)
        self.note.unlink(missing_ok=True)
        return bad

    def finish(self, out: Path) -> None:
        """Make the file `out`."""
        os.fsync(self.file.fileno())
        self.path.replace(out)
        self.note.unlink(missing_ok=True)
