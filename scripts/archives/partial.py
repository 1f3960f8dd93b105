"""Keep an unfinished download: OUT.part, and OUT.part.json, which says what it is a part of."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from scripts.archives.yandex_disk import Archive

CHUNK = 1 << 20


class Partial:
    """OUT.part with its digests; OUT.part.json holds the whole archive's identity and the `guard` for If-Range."""

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

    def begin(self, whole: Archive) -> None:
        """Keep the bytes that came if they are a part of `whole`, else start from the first byte."""
        if self.whole == whole:
            return
        try:
            noted = json.loads(self.note.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            noted = None
        self.whole = whole
        if isinstance(noted, dict) and noted.get("of") == self.describe_whole() and self.size <= whole.size:
            self.guard = str(noted.get("guard", ""))
            self.hash_content()
        else:
            self.restart()

    def describe_whole(self) -> dict[str, object]:
        """Return what identifies the whole archive: size and digests, and its date only if there is no digest."""
        assert self.whole
        return asdict(replace(self.whole, modified="") if self.whole.sha256 or self.whole.md5 else self.whole)

    def hash_content(self) -> None:
        """Compute the digests of what came in an earlier run."""
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
        """Drop all bytes that came."""
        self.file.truncate(0)
        self.size, self.guard = 0, ""
        self.write_note()
        self.hash_content()

    def note_guard(self, headers: Mapping[str, str]) -> None:
        """Note what identifies this version on the server: its entity tag if it is strong, else its date."""
        tag = headers.get("ETag", "")
        guard = tag if tag.startswith('"') else headers.get("Last-Modified", "")
        if guard != self.guard:
            self.guard = guard
            self.write_note()

    def write_note(self) -> None:
        """Write OUT.part.json."""
        noted = {"of": self.describe_whole(), "guard": self.guard}
        draft = self.note.with_name(f"{self.note.name}~")
        draft.write_text(json.dumps(noted) + "\n", encoding="utf-8")
        draft.replace(self.note)

    def write(self, block: bytes) -> None:
        """Append a block to the file."""
        written = 0
        while written < len(block):  # an unbuffered write may write less, for instance to a full disk
            written += self.file.write(memoryview(block)[written:])
        self.sha256.update(block)
        if self.md5:
            self.md5.update(block)
        self.size += len(block)
        self.best = max(self.best, self.size)

    def set_aside(self) -> Path:
        """Rename a bad file and return its new name."""
        bad = self.path.with_name(f"{self.path.name.removesuffix('.part')}.bad")
        self.path.replace(bad)
        self.note.unlink(missing_ok=True)
        return bad

    def finish(self, out: Path) -> None:
        """Rename the complete file to `out`."""
        os.fsync(self.file.fileno())
        self.path.replace(out)
        self.note.unlink(missing_ok=True)
