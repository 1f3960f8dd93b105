"""The output folder: output.json, and output.xlsx, output.csv and warnings_and_errors.txt, which are made from it.

After each study all four are written to temporary files and renamed, output.json first. A kill loses only the studies
that are being processed.
"""

import csv
import fcntl
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from openpyxl import Workbook  # type: ignore[import-untyped]
from openpyxl.cell import WriteOnlyCell  # type: ignore[import-untyped]

from scripts.infer.messages import translate

COLUMNS = (
    "path_to_study", "study_uid", "series_uid", "probability_of_pathology", "pathology", "processing_status",
    "time_of_processing", "most_dangerous_pathology_type",
)  # fmt: skip
FILES = "output.json", "output.xlsx", "output.csv", "warnings_and_errors.txt"
REMARKS = "warnings", "error"
# Keys: COLUMNS; findings; REMARKS; failure, a key of FAILURES or ""; fingerprint of the study's files; models, their
# digest; volume, the digest of the tensor; copies of the study: path_to_study and fingerprint of each
Row = dict[str, Any]
SAME = "study_uid", "series_uid", "volume"


class Output:
    """The rows of an output folder, old and new, sorted by path."""

    def __init__(self, folder: Path) -> None:
        """SystemExit: the folder cannot be written, another run writes there, or another program made its tables."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit("OUTPUT: another run writes there; wait for it, or choose another folder") from None
        except OSError as error:
            raise SystemExit(f"OUTPUT: {(error.strerror or 'no folder').lower()}; choose another folder") from None
        self.weights = ""
        self.present: set[str] = set()
        self.rows: dict[str, Row] = {}
        if (folder / FILES[0]).exists():
            try:
                document = json.loads((folder / FILES[0]).read_text())
                self.weights, self.rows = (
                    document["weights"],
                    {row["path_to_study"]: row for row in document["studies"]},
                )
                if not all(row.keys() >= {*COLUMNS, *REMARKS} for row in self.rows.values()):
                    raise KeyError
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                raise SystemExit(f"OUTPUT: make infer did not write its {FILES[0]}; choose another folder") from None
        elif others := [name for name in FILES[1:] if (folder / name).exists()]:
            raise SystemExit(f"OUTPUT: another program wrote its {others[0]}; choose another folder")

    def begin(self, weights: str, present: Iterable[str] = ()) -> None:
        """Note the kind of weights and `present`, the paths that INPUT has now.

        SystemExit: the folder has results of another kind of weights; kinds never mix.
        """
        self.present = set(present)
        if self.rows and self.weights != weights:
            raise SystemExit(
                f"OUTPUT: its results come from {self.weights} weights, not {weights}; choose another folder"
            )
        self.weights = weights

    def find(self, path: str, fingerprint: str) -> Row:
        """The row of a study, found by its path, its fingerprint under an old path, or as a copy; {} if there is none.

        A row under a path that INPUT no longer has moves to `path`.
        """
        if path in self.rows:
            return self.rows[path]
        for row in list(self.rows.values()):
            copies = row.get("copies", [])
            copy = {"path_to_study": path, "fingerprint": fingerprint}
            if row["path_to_study"] in self.present:
                if copy in copies:
                    return row | copy
            elif row.get("fingerprint") == fingerprint or copy in copies:
                del self.rows[row["path_to_study"]]
                self.rows[path] = row | copy | {"copies": [other for other in copies if other != copy]}
                return self.rows[path]
        return {}

    def add(self, row: Row) -> None:
        """Add or replace the row of a study; a study that INPUT holds twice keeps one row, that of the first path."""
        self.forget(row["path_to_study"])
        for other in list(self.rows.values()):
            if not row.get("volume") or any(other.get(name) != row[name] for name in SAME):
                continue
            if other["path_to_study"] not in self.present:  # the study was renamed
                del self.rows[other["path_to_study"]]
            elif other.get("models") == row.get("models"):
                first, second = sorted((other, row), key=lambda one: str(one["path_to_study"]))
                copies = {copy["path_to_study"]: copy for one in (other, row) for copy in one.get("copies", [])}
                copies[second["path_to_study"]] = {name: second[name] for name in ("path_to_study", "fingerprint")}
                first["copies"] = [copies[path] for path in sorted(copies) if path in self.present]
                del self.rows[other["path_to_study"]]
                row = first
        self.rows[row["path_to_study"]] = row
        self.write()

    def forget(self, path: str) -> None:
        """Remove a study; if it has copies, its row moves to the first of them."""
        for row in self.rows.values():
            if row.get("copies"):
                row["copies"] = [copy for copy in row["copies"] if copy["path_to_study"] != path]
        if (old := self.rows.pop(path, None)) and old.get("copies"):
            first, *others = old["copies"]
            self.rows[first["path_to_study"]] = old | first | {"copies": others}

    def write(self) -> None:
        """Write all four files. SystemExit: the disk is full, or the folder is gone."""
        rows = [self.rows[path] for path in sorted(self.rows)]
        stamp = {"synthetic": translate("synthetic"), "unknown": translate("unknown_weights")}.get(self.weights, "")
        document = {"weights": self.weights, **({"stamp": stamp} if stamp else {}), "studies": rows}
        try:
            contents = (
                json.dumps(document, indent=1, ensure_ascii=False).encode(errors="replace"),
                make_workbook(rows, self.weights, stamp),
                make_csv(rows, self.weights),
                "".join(f"{line}\n" for line in list_remarks(rows, stamp)).encode(),
            )
            for name, content in zip(FILES, contents, strict=True):
                self.replace(name, content)
        except OSError as error:
            raise SystemExit(
                f"OUTPUT: {(error.strerror or 'write error').lower()}; the rows before this study are kept"
            ) from None

    def replace(self, name: str, content: bytes) -> None:
        aside = self.folder / f".{name}.part"
        try:
            aside.write_bytes(content)
            if os.geteuid() == 0:  # in a container: give the files to the folder's owner
                owner = self.folder.stat()
                os.chown(aside, owner.st_uid, owner.st_gid)
            aside.replace(self.folder / name)
        finally:
            aside.unlink(missing_ok=True)


def list_columns(weights: str) -> tuple[str, ...]:
    """COLUMNS, and `weights` unless they are real, so that nobody takes a synthetic row for a finding."""
    return COLUMNS if weights == "real" else (*COLUMNS, "weights")


def list_cells(row: Row, weights: str) -> list[Any]:
    return [row[name] if name in COLUMNS else weights for name in list_columns(weights)]


def make_workbook(rows: list[Row], weights: str, stamp: str) -> bytes:
    """output.xlsx: the table, and on a second sheet the lines of warnings_and_errors.txt."""
    book = Workbook(write_only=True)
    sheet = book.create_sheet("SYNTHETIC" if weights == "synthetic" else "studies")
    for values in [list(list_columns(weights)), *(list_cells(row, weights) for row in rows)]:
        sheet.append([make_cell(sheet, value) for value in values])
    sheet = book.create_sheet("warnings_and_errors")
    for line in list_remarks(rows, stamp):
        sheet.append([make_cell(sheet, line)])
    stream = io.BytesIO()
    book.save(stream)
    return stream.getvalue()


def make_cell(sheet: Any, value: Any) -> Any:
    """Store text as text, even if it begins like a formula."""
    made = WriteOnlyCell(sheet, value)
    if isinstance(value, str):
        made.data_type = "s"
    return made


def make_csv(rows: list[Row], weights: str) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(list_columns(weights))
    writer.writerows(list_cells(row, weights) for row in rows)
    return stream.getvalue().encode()


def list_remarks(rows: list[Row], stamp: str) -> Iterator[str]:
    """The lines of warnings_and_errors.txt; they name a study by its row in output.xlsx, which has its path."""
    if stamp:
        yield stamp
    is_empty = True
    for number, row in enumerate(rows, 2):
        warnings = [
            *row["warnings"],
            *([translate("copies", count=len(copies))] if (copies := row.get("copies")) else []),
        ]
        for level, texts in (("error", [row["error"]] if row["error"] else []), ("warning", warnings)):
            for text in texts:
                is_empty = False
                yield translate("row", row=number, level=translate(level), text=text)
    if is_empty:
        yield translate("none_wrong")


def decode_name(name: str, top: Path) -> str:
    """`name`, or if it is not UTF-8, `name` read as cp1251, unless a file has that name.

    Most names that are not UTF-8 come from old Russian Windows.
    """
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        try:
            guess = os.fsencode(name).decode("cp1251")
        except UnicodeDecodeError:
            return name
        return name if (top / guess).exists() else guess


def show_path(path: Path, top: Path) -> str:
    """A study's path below INPUT for the table: printable, and not a formula to a program that opens the CSV.

    Unprintable letters and undecodable bytes are escaped, so paths stay distinct.
    """
    name = "." if path == top else path.relative_to(top).as_posix()
    name = decode_name(name, top)
    plain = (letter.isprintable() and letter != "\\" for letter in name)
    name = "".join(
        letter if kept else letter.encode("unicode_escape").decode() for letter, kept in zip(name, plain, strict=True)
    )
    return f"./{name}" if name[0] in "=+-@" else name
