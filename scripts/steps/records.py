"""What is known about files: their digests, and how each artifact was made. Standard library only.

    .make/seen/X   digest, size, mtime, ctime and inode of X; the digest alone once X is gone
    .make/made/X   "X=digest command : input=digest ..." of the step that last made X
    .make/took/X   when and why that step ran, its seconds and peak memory, as JSON

In these names, / of the path X is written as %.  The Makefile reads the same records.
"""

import fcntl
import io  # typing would cost every make 17 ms
import os
import time

SETTLED = 20_000_000  # ns; a file younger than the clock's tick could change again under the same times


def record_path(kind: str, path: str) -> str:
    """Return the place of a record: record("made", "build/onnx/vit.onnx") is .make/made/build%onnx%vit.onnx."""
    return f".make/{kind}/{path.replace('/', '%')}"


def current_digest(path: str) -> str:
    """Return the SHA-256 of `path`, "" if it is absent; read it only if it moved since the last look."""
    note, stat = read_text(record_path("seen", path)).split(), read_status(path)
    if note[1:] != stat or not note:
        if stat:
            note = [hash_file(path), *stat]
        if note:
            write_text(record_path("seen", path), " ".join(note if stat else note[:1]))
    return note[0] if stat else ""


def known_digest(path: str) -> str:
    """Return the digest of `path`, or of what it was before it went away."""
    return current_digest(path) or written_digest(path) or (read_text(record_path("seen", path)).split() or [""])[0]


def written_digest(path: str) -> str:
    """Return the digest of what the last step for `path` wrote, "" if there was none."""
    return read_text(record_path("made", path)).split(" ")[0].rpartition("=")[2]


def read_inputs(path: str) -> dict[str, str]:
    """Return the digest of each input of the step that last made `path`."""
    words = read_text(record_path("made", path)).rpartition(" : ")[2].split()
    return {name: was for name, _, was in (word.rpartition("=") for word in words)}


def is_true(path: str) -> bool:
    """Tell whether each record is true from `path` down to the sources and the user's own, be they absent or not."""
    if current_digest(path) not in ("", written_digest(path)):
        return True  # no step wrote this; whether it is the right one, its consumer's record says
    return all(known_digest(name) == was and is_true(name) for name, was in read_inputs(path).items())


def write_record(target: str, sha: str, recipe: str) -> None:
    """Record how `target`, which has the digest `sha` or had it when it was here, came about."""
    write_text(record_path("made", target), f"{target}={sha} {recipe}")
    if not read_status(target):
        write_text(record_path("seen", target), sha)


def find_content(wanted: str) -> str:
    """Return a present file whose content has the digest `wanted`, "" if none is known."""
    for name in sorted(os.listdir(".make/seen")):
        if (
            read_text(f".make/seen/{name}").startswith(f"{wanted} ")
            and current_digest(path := name.replace("%", "/")) == wanted
        ):
            return path
    return ""


def read_status(path: str) -> list[str]:
    """Return size, mtime, ctime and inode of a file, nothing if it is absent."""
    try:
        stat = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    if 0 <= time.time_ns() - stat.st_ctime_ns < SETTLED:  # a time to come is another clock's: waiting would not help
        time.sleep(SETTLED / 1e9)
        return read_status(path)
    return [str(field) for field in (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)]


def look_at_tree(repository: str) -> str:
    """Note and return the digest of a published folder as a whole: of its files' names and digests, "" if empty."""
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
    """Note the digest of a file that was just written, so that it need not be read for it."""
    write_text(record_path("seen", path), " ".join([sha, *read_status(path)]))


def hash_file(path: str) -> str:
    """Return the SHA-256 of a file."""
    import hashlib  # 7 ms that a look at unmoved files does without

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
    """Write a file at one stroke; OSError, which names it, where that cannot be."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    draft = f"{path}.{os.uname().nodename}.{os.getpid()}~"
    try:
        with open(draft, "w") as file:
            file.write(text)
        os.replace(draft, path)
    except OSError as error:  # a full disk tells no name
        if os.path.exists(draft):
            os.remove(draft)
        raise OSError(error.errno, error.strerror, path) from None


def lock_file(path: str, kind: int = fcntl.LOCK_EX) -> io.TextIOWrapper:
    """Return an open file that keeps `path` locked until it, and the copy a child may have of it, is closed."""
    os.makedirs(".make/lock", exist_ok=True)
    file = open(record_path("lock", path), "w+")  # NFS lets no one share a lock on what is open for writing alone
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{path}: waiting for another make that is at it", flush=True)
        fcntl.flock(file, kind)
    except OSError as error:  # a share whose server keeps no locks
        raise OSError(error.errno, error.strerror, file.name) from None
    os.set_inheritable(file.fileno(), True)  # a command that outlives its make still counts
    return file


def explain_ownership(path: str) -> str:
    """Return a sentence about a file or folder that may not be changed: who owns it, and the command that ends that."""
    while path and not os.path.lexists(path):
        path = os.path.dirname(path)
    path = path if path and os.access(path, os.W_OK) is False else os.path.dirname(path) or "."
    if (user := os.stat(path).st_uid) == os.geteuid():
        return f"{path} may not be written to; next: chmod -R u+w {path}"
    import pwd  # few runs need it

    names = [entry.pw_name for entry in pwd.getpwall() if entry.pw_uid == user] or [str(user)]
    return f"{path} belongs to {names[0]} (after sudo make?); next: sudo chown -R $(id -u) {path}"
