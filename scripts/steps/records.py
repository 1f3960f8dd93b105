"""Read and write what is known about files: their digests, and how each artifact was made. Standard library only.

    .make/seen/X   digest, size, mtime, ctime and inode of X; the digest alone once X is gone
    .make/made/X   "X=digest command : input=digest ..." of the step that last made X
    .make/took/X   in which run and why that step ran, its seconds and peak memory, as JSON

In these names, each / of the path X is written as %.  The Makefile reads the same records.
"""

import fcntl
import io  # for the type TextIOWrapper; importing typing would cost every make 17 ms
import os
import time

SETTLED = 20_000_000  # ns; a file that was written less than this ago could change again and keep its times


def record_path(kind: str, path: str) -> str:
    """Return the place of a record: record_path("made", "build/onnx/vit.onnx") is .make/made/build%onnx%vit.onnx."""
    return f".make/{kind}/{path.replace('/', '%')}"


def current_digest(path: str) -> str:
    """Return the SHA-256 of `path`, "" if it is absent; read it only if its size, times or inode changed."""
    note, stat = read_text(record_path("seen", path)).split(), read_status(path)
    if note[1:] != stat or not note:
        if stat:
            note = [hash_file(path), *stat]
        if note:
            write_text(record_path("seen", path), " ".join(note if stat else note[:1]))
    return note[0] if stat else ""


def known_digest(path: str) -> str:
    """Return the digest of `path`; if it is absent, the digest that it had."""
    return current_digest(path) or written_digest(path) or (read_text(record_path("seen", path)).split() or [""])[0]


def written_digest(path: str) -> str:
    """Return the digest of what the last step for `path` wrote, "" if no step has run."""
    return read_text(record_path("made", path)).split(" ")[0].rpartition("=")[2]


def read_inputs(path: str) -> dict[str, str]:
    """Return the digest of each input of the step that last made `path`."""
    words = read_text(record_path("made", path)).rpartition(" : ")[2].split()
    return {name: was for name, _, was in (word.rpartition("=") for word in words)}


def is_true(path: str) -> bool:
    """Tell whether each record is true, from `path` down to sources and own files; files may be absent."""
    if current_digest(path) not in ("", written_digest(path)):
        return True  # an own file; the record of the artifact made from it says which one it was made from
    return all(known_digest(name) == was and is_true(name) for name, was in read_inputs(path).items())


def write_record(target: str, sha: str, recipe: str) -> None:
    """Record how `target` was made; it has the digest `sha`, or had it before it went away."""
    write_text(record_path("made", target), f"{target}={sha} {recipe}")
    if not read_status(target):
        write_text(record_path("seen", target), sha)


def find_content(wanted: str) -> str:
    """Return a file whose content has the digest `wanted`, "" if no such file is known."""
    for name in sorted(os.listdir(".make/seen")):
        if (
            read_text(f".make/seen/{name}").startswith(f"{wanted} ")
            and current_digest(path := name.replace("%", "/")) == wanted
        ):
            return path
    return ""


def read_status(path: str) -> list[str]:
    """Return size, mtime, ctime and inode of a file, an empty list if it is absent."""
    try:
        stat = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    if (
        0 <= time.time_ns() - stat.st_ctime_ns < SETTLED
    ):  # a time in the future comes from another clock: waiting would not help
        time.sleep(SETTLED / 1e9)
        return read_status(path)
    return [str(field) for field in (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)]


def look_at_tree(repository: str) -> str:
    """Note and return the digest of a whole published folder (names and digests of its files), "" if it is empty."""
    files = sorted(
        f"{folder}/{name}"
        for folder, folders, names in os.walk(repository)
        for name in names
        if name != ".gitkeep" and "__pycache__" not in folder
    )
    known_as, _, was = read_text(record_path("tree", repository)).partition("\n")
    listing = "".join(f"{path}={current_digest(path)}\n" for path in files)
    if was != listing:
        known_as = hash_text(listing) if listing else ""
        write_text(record_path("tree", repository), f"{known_as}\n{listing}")
    return known_as


def note_digest(path: str, sha: str) -> None:
    """Note the digest of a file that was just written, so that it is not read again."""
    write_text(record_path("seen", path), " ".join([sha, *read_status(path)]))


def hash_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file."""
    import hashlib  # takes 7 ms, and is not needed while no file has changed

    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()


def hash_text(text: str) -> str:
    """Return the SHA-256 of a text."""
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def read_text(path: str) -> str:
    """Return the text of a file, "" if it is absent."""
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return ""


def write_text(path: str, text: str) -> None:
    """Write a file atomically; raise OSError, with the file's name, if that fails."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    draft = f"{path}.{os.uname().nodename}.{os.getpid()}~"
    try:
        with open(draft, "w") as file:
            file.write(text)
        os.replace(draft, path)
    except OSError as error:  # the error of a full disk names no file
        if os.path.exists(draft):
            os.remove(draft)
        raise OSError(error.errno, error.strerror, path) from None


def lock_file(path: str, kind: int = fcntl.LOCK_EX) -> io.TextIOWrapper:
    """Return an open file that keeps `path` locked until it is closed here and in each child process."""
    os.makedirs(".make/lock", exist_ok=True)
    file = open(record_path("lock", path), "w+")  # NFS gives no shared lock on a file that is open for writing only
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{path}: waiting for another make that works on it", flush=True)
        fcntl.flock(file, kind)
    except OSError as error:  # a network share whose server has no locks
        raise OSError(error.errno, error.strerror, file.name) from None
    os.set_inheritable(file.fileno(), True)  # a command that outlives its make still holds the lock
    return file


def explain_ownership(path: str) -> str:
    """Return a sentence about a file or folder that may not be changed: who owns it, and the command that helps."""
    while path and not os.path.lexists(path):
        path = os.path.dirname(path)
    path = path if path and os.access(path, os.W_OK) is False else os.path.dirname(path) or "."
    if (user := os.stat(path).st_uid) == os.geteuid():
        return f"{path} may not be written to; next: chmod -R u+w {path}"
    import pwd  # slow to import, and rarely needed

    names = [entry.pw_name for entry in pwd.getpwall() if entry.pw_uid == user] or [str(user)]
    return f"{path} belongs to {names[0]} (after sudo make?); next: sudo chown -R $(id -u) {path}"
