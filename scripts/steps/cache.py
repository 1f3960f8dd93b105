"""Read and write the shared cache: what steps wrote, by the digest of their command, versions and inputs.

    CACHE/steps/KEY   "SHA SIZE" of what a step wrote; KEY is the SHA-256 of "TARGET COMMAND VERSIONS : INPUT=SHA ..."
    CACHE/files/SHA   those bytes

CACHE is a folder or s3://bucket/prefix; with CACHE_MODE=read nothing is written there.  Everyone who may write to the
cache is trusted to say what a step writes; the bytes are checked against their SHA after copying.  A problem with the
cache is a warning and never stops a build.  Standard library only, except for s3://.
"""

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from threading import Lock
from typing import Any, NamedTuple

from scripts.steps.records import read_text, write_text

OFF = ".make/cache-off"  # the run that no longer uses the cache
DAMAGED = ".make/cache-spoiled"  # the run, then the SHA of each entry that it found damaged and did not replace


class Result(NamedTuple):
    """What a step wrote: its SHA-256 and its size in bytes."""

    sha: str
    size: int


class Folder:
    """A folder that machines share."""

    def __init__(self, path: str) -> None:
        self.path = path
        if os.environ.get("CACHE_MODE") != "read":
            with suppress(FileExistsError):
                os.mkdir(path)  # not its parents: a share that is not mounted must not be created as a local folder
        os.listdir(path)

    def read(self, name: str) -> bytes | None:
        """Return the content of the small entry `name`, None if there is none."""
        try:
            with open(f"{self.path}/{name}", "rb") as file:
                return file.read(200)
        except FileNotFoundError:
            return None

    def get(self, name: str, out: str) -> Result | None:
        """Copy the entry `name` to `out` and hash it in another thread meanwhile; None if there is none."""
        try:
            with (
                open(f"{self.path}/{name}", "rb", 0) as file,
                open(out, "wb", 0) as copy,
                ThreadPoolExecutor(1) as beside,
            ):
                copying = beside.submit(_send_file, file.fileno(), copy.fileno())
                buffer, hashed = memoryview(bytearray(1 << 20)), hashlib.sha256()
                at = 0
                while count := os.preadv(file.fileno(), [buffer], at):
                    hashed.update(buffer[:count])
                    at += count
                return Result(hashed.hexdigest(), copying.result())
        except FileNotFoundError:
            return None

    def put(self, name: str, source: str) -> None:
        """Write the file `source` as the entry `name` atomically; others may write the same entry at the same time."""
        path = f"{self.path}/{name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        draft = f"{path}.{os.uname().nodename}.{os.getpid()}~"
        try:
            shutil.copyfile(source, draft)
            os.replace(draft, path)
        except BaseException:
            if os.path.exists(draft):
                os.remove(draft)
            raise

    def size(self, name: str) -> int:
        """Return the size of the entry `name`, -1 if there is none."""
        return os.path.getsize(path) if os.path.exists(path := f"{self.path}/{name}") else -1


class Bucket:
    """A prefix in an S3 bucket; endpoint and credentials come from AWS_ENDPOINT_URL, AWS_PROFILE and so on."""

    def __init__(self, url: str) -> None:
        import boto3  # type: ignore[import-untyped]
        from botocore.config import Config  # type: ignore[import-untyped]
        from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

        self.bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self.prefix = f"{prefix.rstrip('/')}/" if prefix else ""
        patience = Config(connect_timeout=5, read_timeout=60, retries={"max_attempts": 2})
        try:
            self.client = boto3.client("s3", config=patience)
        except BotoCoreError as error:  # an absent profile or a malformed ~/.aws/config
            raise OSError(error) from None

    def read(self, name: str) -> bytes | None:
        """Return the content of the small entry `name`, None if there is none."""
        content: bytes | None = self._ask(lambda **place: self.client.get_object(**place)["Body"].read(200), name)
        return content

    def get(self, name: str, out: str) -> Result | None:
        """Download the entry `name` to `out` and hash it on the way; None if there is none."""

        def download(**place: str) -> Result:
            hashed, size = hashlib.sha256(), 0
            with closing(self.client.get_object(**place)["Body"]) as body, open(out, "wb") as file:
                for block in body.iter_chunks(1 << 20):
                    hashed.update(block)
                    size += file.write(block)
            return Result(hashed.hexdigest(), size)

        found: Result | None = self._ask(download, name)
        return found

    def put(self, name: str, source: str) -> None:
        """Upload the file `source` as the entry `name`; S3 shows the entry only when it is complete."""
        self._ask(lambda **place: self.client.upload_file(source, *place.values()), name)

    def size(self, name: str) -> int:
        """Return the size of the entry `name`, -1 if there is none."""
        answer = self._ask(self.client.head_object, name)
        return int(answer["ContentLength"]) if answer else -1

    def _ask(self, call: Any, name: str) -> Any:
        from boto3.exceptions import S3UploadFailedError  # type: ignore[import-untyped]
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return call(Bucket=self.bucket, Key=self.prefix + name)
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in ("NoSuchKey", "404"):
                return None
            raise OSError(error) from None
        except (BotoCoreError, S3UploadFailedError) as error:
            raise OSError(error) from None


class Cache:
    """The cache that CACHE and CACHE_MODE name, for this run; `stored` counts the bytes written to it."""

    def __init__(self) -> None:
        self.where, self.run = os.environ.get("CACHE", ""), os.environ.get("MAKE_RUN", "")
        self.stored = 0
        now, *damaged = read_text(DAMAGED).split("\n")
        self.damaged = set(damaged) if now == f"{self.run} {self.where}" else set[str]()
        self.noting = Lock()
        self.store: Folder | Bucket | None = None
        if self.where and read_text(OFF) != f"{self.run} {self.where}":
            try:
                self.store = Bucket(self.where) if self.where.startswith("s3://") else Folder(self.where)
            except (ImportError, OSError, ValueError) as error:  # ValueError: AWS_ENDPOINT_URL is no URL
                self._give_up(error)

    def find(self, target: str, recipe: str) -> Result | None:
        """Return what the step of `target` with this recipe wrote before, None if the cache does not know it."""
        if not (store := self.store):  # another thread may set it to None at any time
            return None
        try:
            entry = store.read(name := _step_key(target, recipe))
        except OSError as error:
            self._give_up(error)
            return None
        if entry is None:
            return None
        words = entry.decode("ascii", "replace").split()
        if len(words) != 2 or len(words[0]) != 64 or not words[0].isalnum() or not words[1].isdigit():
            self._warn(f"{name} is damaged; {target} is made here")
            return None
        return Result(words[0], int(words[1]))

    def fetch(self, result: Result, out: str) -> bool:
        """Copy the bytes of `result` to `out` and check their SHA; if that fails, return False and leave no `out`."""
        if not (store := self.store) or result.sha in self.damaged:
            return False
        try:
            if (found := store.get(name := f"files/{result.sha}", out)) == result:
                return True
            if found:
                damage = f"{name} holds {found.size} bytes of sha256 {found.sha}, expected {result.size}"
                self._note_damage(result.sha, damage)
        except OSError as error:
            self._give_up(error)
        if os.path.exists(out):
            os.remove(out)
        return False

    def keep(self, target: str, recipe: str, sha: str, path: str) -> None:
        """Put what a step wrote to `path` into the cache, unless it is there already or CACHE_MODE=read."""
        if not self.store or os.environ.get("CACHE_MODE") == "read":
            return
        result = Result(sha, os.path.getsize(path))
        try:
            if sha in self.damaged or self.store.size(f"files/{sha}") != result.size:
                self.store.put(f"files/{sha}", path)
                self.stored = result.size
                self._note_damage(sha, "")
            write_text(draft := f".make/out/{target}.entry", f"{sha} {result.size}\n")
            self.store.put(_step_key(target, recipe), draft)
            os.remove(draft)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        with self.noting:
            if read_text(OFF) == f"{self.run} {self.where}":
                return
            self._warn(f"{error}; going on without it")
            write_text(OFF, f"{self.run} {self.where}")
            self.store = None

    def _note_damage(self, sha: str, damage: str) -> None:
        """Note that an entry is damaged, and warn once in a run; with an empty `damage`, that it was replaced."""
        with self.noting:
            if bool(damage) != (sha in self.damaged):
                self.damaged ^= {sha}
                write_text(DAMAGED, "\n".join([f"{self.run} {self.where}", *sorted(self.damaged)]))
                if damage:
                    self._warn(damage)

    def _warn(self, what: str) -> None:
        print(f"warning: cache {self.where}: {what}", flush=True)


def _step_key(target: str, recipe: str) -> str:
    return f"steps/{hashlib.sha256(f'{target} {recipe}'.encode()).hexdigest()}"


def _send_file(source: int, out: int) -> int:
    """Copy between two descriptors inside the kernel, as a shared extent where possible; return the size in bytes."""
    at = 0
    try:
        while count := os.copy_file_range(source, out, 1 << 30, at):
            at += count
    except OSError:  # another disk, or a file system without copy_file_range
        while count := os.sendfile(out, source, at, 1 << 30):
            at += count
    return at
