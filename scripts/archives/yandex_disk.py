"""Ask the API of Yandex.Disk about a public file that training/archives.json names, and try again after errors.

Variables of the environment: YANDEX_DISK_API and YANDEX_DISK_LINK replace the API's address and the public link;
FETCH_TIMEOUT is the longest silence of a server, FETCH_BACKOFF the first pause between two tries, both in seconds.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
import urllib3

SOURCES = Path("training/archives.json")
TRIES = 6  # tries in a row that bring nothing
GAIN = 16 << 20  # bytes; a try that brings fewer brings nothing
PATIENCE = 900.0  # s; if a server asks for a longer pause, give up
FIELDS = "name,type,size,md5,sha256,modified"

Result = TypeVar("Result")
Pause = Callable[[float], None]


@dataclass(frozen=True)
class Archive:
    """What is known about an archive file; "" means unknown."""

    size: int
    sha256: str = ""
    md5: str = ""
    modified: str = ""

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in asdict(self).items() if value != "")


@dataclass(frozen=True)
class Source:
    """Where an archive is, and the commands that work with an archive fetched by hand, or without one."""

    name: str
    api: str
    link: str
    path: str
    by_hand: str
    without: str = ""

    @property
    def lock(self) -> Path:
        return SOURCES.parent / f"{self.name}.lock.json"

    @property
    def way_out(self) -> str:
        without = f"\nOr do without it: {self.without}" if self.without else ""
        return f"Or fetch {self.name} by hand from {self.link} and run: {self.by_hand}{without}"


class TroubleError(Exception):
    """An error that may pass until the next try; `pause` is the server's wish in seconds, if it has one."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class RefusedError(Exception):
    """An error that another try would not change."""


def read_source(name: str) -> Source:
    """Return where the archive `name` is, from training/archives.json and the environment."""
    entries = read_json(SOURCES)
    known = entries.get("archives")
    if not isinstance(known, dict) or name not in known:
        raise SystemExit(f"{SOURCES}: no archive {name}; it names {', '.join(known or []) or 'none'}")
    try:
        return Source(
            name=name,
            api=os.environ.get("YANDEX_DISK_API") or entries["api"],
            link=os.environ.get("YANDEX_DISK_LINK") or known[name]["link"],
            path=known[name]["path"],
            by_hand=known[name]["by_hand"],
            without=known[name].get("without", ""),
        )
    except KeyError as error:
        raise SystemExit(f"{SOURCES}: {name} has no {error}; expected link, path, by_hand, and api on top") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: cannot be read: {error}; expected a JSON object, see git log {path}") from None
    if not isinstance(entries, dict):
        raise SystemExit(f"{path}: holds no JSON object; see git log {path}")
    return entries


def parse_archive(entries: Mapping[str, Any]) -> Archive | None:
    """Return the archive that a JSON object describes, None if it describes none."""
    size = entries.get("size")
    texts = {key: entries.get(key) or "" for key in ("sha256", "md5", "modified")}
    if type(size) is not int or size < 0 or not all(isinstance(text, str) for text in texts.values()):
        return None
    return Archive(size, texts["sha256"].lower(), texts["md5"].lower(), texts["modified"])


def describe_difference(old: Archive, new: Archive) -> str:
    """Say how the contents differ, "" if nothing that is known of both differs; `modified` is not compared."""
    pairs = [(key, getattr(old, key), getattr(new, key)) for key in ("size", "sha256", "md5")]
    return ", ".join(f"{key} {was} -> {now}" for key, was, now in pairs if was != now and was != "" and now != "")


def ask_for_archive(origin: Source) -> Archive:
    """Return what the API says the archive is now; raise TroubleError, RefusedError or a RequestException."""
    entries = call_api(origin, "", fields=FIELDS)
    if entries.get("type", "file") != "file":
        raise RefusedError(f"{origin.path} in {origin.link} is a folder, not a file")
    if archive := parse_archive(entries):
        return archive
    raise RefusedError(
        f"{find_host(origin.api)} names no size of {origin.path}; this is not the API that this program knows"
    )


def ask_for_address(origin: Source) -> str:
    """Return a fresh address of the archive's content; it expires soon."""
    href = call_api(origin, "/download").get("href")
    if not isinstance(href, str) or not href.startswith(("https://", "http://")):
        raise RefusedError(f"{find_host(origin.api)} gave no address to download {origin.path} from")
    return check_https(origin, href)


def find_host(url: str) -> str:
    """Return the host of `url`, without user and password."""
    return urlsplit(url).netloc.rpartition("@")[2]


def check_https(origin: Source, url: str) -> str:
    """Return `url`; raise RefusedError if it leads from HTTPS to another scheme."""
    if origin.api.startswith("https:") and not url.startswith("https:"):
        raise RefusedError(f"the download leads from HTTPS to {urlsplit(url).scheme}://{find_host(url)}")
    return url


def call_api(origin: Source, action: str, **query: str) -> dict[str, Any]:
    """Return the API's answer about the archive."""
    query |= {"public_key": origin.link, "path": origin.path}
    url = origin.api.rstrip("/") + action
    with requests.get(url, params=query, headers={"Accept": "application/json"}, timeout=read_timeouts()) as response:
        name = find_host(response.url)
        try:
            entries = response.json()
        except ValueError:
            entries = None
        if not isinstance(entries, dict):
            if response.status_code >= 500 or response.status_code == 429:
                raise make_busy_error(response, "")
            kind = response.headers.get("Content-Type", "something")
            raise RefusedError(f"{name} answered {response.status_code} with {kind}, not JSON; a portal or a captcha?")
        if response.status_code == 200 and "error" not in entries:
            return entries
        said = " ".join(str(entries[key]) for key in ("error", "message") if entries.get(key))
        if "DownloadLimitExceeded" in said and "Retry-After" not in response.headers:
            raise RefusedError(f"too many people download this file today ({response.status_code} {said})")
        if response.status_code >= 500 or response.status_code == 429:
            raise make_busy_error(response, said)
        meaning = {403: "the owner forbids downloads", 404: f"there is no {origin.path} in {origin.link}"}
        raise RefusedError(f"{meaning.get(response.status_code, f'{name} refuses')} ({response.status_code} {said})")


def make_busy_error(response: requests.Response, said: str) -> TroubleError:
    """Return the error of a server that may answer later, with the pause that it asks for."""
    name, status = find_host(response.url), response.status_code
    reason = f"{name} asks for fewer requests" if status == 429 else f"{name} has an error of its own"
    return TroubleError(
        f"{reason} ({f'{status} {said}'.strip()})", parse_retry_after(response.headers.get("Retry-After", ""))
    )


def parse_retry_after(header: str) -> float | None:
    """Return the seconds that a Retry-After header (a number or a date) asks for, None if it asks for none."""
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def read_timeouts() -> tuple[float, float]:
    """Return the longest waits for a connection and for the next bytes, in seconds."""
    silence = read_seconds("FETCH_TIMEOUT", 60.0)
    return min(15.0, silence), silence


def read_seconds(variable: str, default: float) -> float:
    """Return a positive number of seconds from the environment."""
    text = os.environ.get(variable) or str(default)
    try:
        if 0 < (value := float(text)) < 86400:
            return value
    except ValueError:
        pass
    raise SystemExit(f"{variable}={text}: expected a number of seconds, e.g. {variable}={default:g}")


def retry_action(
    origin: Source,
    action: Callable[[], Result],
    *,
    reached: Callable[[], int] = lambda: 0,
    pause: Pause = time.sleep,
    kept: Callable[[], str] = lambda: "",
) -> Result:
    """Call `action` and return its result; try again after an error.

    Give up after TRIES tries in a row in which `reached` did not grow by GAIN bytes: SystemExit with the last error, a
    sentence about what is `kept`, and the way out.
    """
    tries, mark = 0, reached()
    while True:
        try:
            return action()
        except RefusedError as refusal:
            raise SystemExit(f"{origin.name}: {refusal}{kept()}\n{origin.way_out}") from None
        except requests.exceptions.SSLError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                hint = "behind a proxy of your own, name its certificate: REQUESTS_CA_BUNDLE=/path/ca.pem"
                raise SystemExit(f"{origin.name}: {find_cause(error)}; {hint}\n{origin.way_out}") from None
            trouble = TroubleError(find_cause(error))
        except TroubleError as error:
            trouble = error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            if isinstance(error, ValueError):  # the text is no URL
                said = re.sub(r"//[^/@\s]*@", "//", str(error))  # without user and password
                raise SystemExit(f"{origin.name}: {said}; see {SOURCES} and YANDEX_DISK_API") from None
            trouble = TroubleError(find_cause(error))
        tries += 1
        if reached() >= mark + GAIN:
            tries, mark = 1, reached()
        wait = read_seconds("FETCH_BACKOFF", 1.0) * 2 ** (tries - 1) if trouble.pause is None else trouble.pause
        if wait > PATIENCE:
            raise SystemExit(f"{origin.name}: {trouble}; try again in {wait / 60:.0f} min{kept()}\n{origin.way_out}")
        if tries >= TRIES:
            raise SystemExit(f"{origin.name}: {trouble}; gave up after {tries} tries{kept()}\n{origin.way_out}")
        print(
            f"{origin.name}: {trouble}; again in {wait:.3g} s (try {tries + 1} of {TRIES})", file=sys.stderr, flush=True
        )
        pause(wait)


def find_cause(error: BaseException) -> str:
    """Say in a few words what caused a network error, which is wrapped in several other errors."""
    if isinstance(error, TroubleError | RefusedError):
        return str(error)
    causes = [error]
    while inner := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(inner)
    if any(isinstance(cause, requests.Timeout | TimeoutError) for cause in causes) or isinstance(
        error, urllib3.exceptions.ReadTimeoutError
    ):
        return f"the server was silent for too long (FETCH_TIMEOUT={read_timeouts()[1]:g} s)"
    last = causes[-1]
    text = (last.strerror if isinstance(last, OSError) else "") or str(last) or type(last).__name__
    return f"connection failed: {text}"
