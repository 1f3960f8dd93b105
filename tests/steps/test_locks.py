"""Each wheel that is installed has the hash that its lock says, and a lock has the pins of its requirements."""

import base64
import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

PINS = [*sorted(ROOT.glob("requirements*.txt")), ROOT / "tests/requirements.txt"]


def pins(path: Path) -> set[str]:
    """Return name==version of each pin in a file and the files that it includes, except PyTorch's, without hash."""
    text = path.read_text()
    found = {f"{re.sub('[-_.]+', '-', name).lower()}=={version}"
             for name, version in re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.MULTILINE)}  # fmt: skip
    for other in re.findall(r"^-r (\S+)", text, re.MULTILINE):
        found |= pins(path.parent / other)
    return {pin for pin in found if not pin.startswith("torch==")}


@pytest.mark.parametrize("path", PINS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_lock_has_the_pins_of_its_requirements_each_with_hashes(path: Path) -> None:
    lock = path.with_suffix(".lock")
    assert pins(lock) == pins(path), "scripts/steps/lock.sh makes it anew"
    for entry in re.split(r"\n(?=\S)", lock.read_text().partition("\n")[2].strip()):
        assert "--hash=sha256:" in entry, entry


def wheel(folder: Path, content: str) -> Path:
    """A wheel of one module, chestprobe 1.0."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "chestprobe-1.0-py3-none-any.whl"
    tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {
        "chestprobe.py": content,
        "chestprobe-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: chestprobe\nVersion: 1.0\n",
        "chestprobe-1.0.dist-info/WHEEL": tag,
    }
    sums = []
    for name, text in files.items():
        sha = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        sums.append(f"{name},sha256={sha},{len(text)}")
    files["chestprobe-1.0.dist-info/RECORD"] = "\n".join([*sums, "chestprobe-1.0.dist-info/RECORD,,", ""])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an index of one wheel, its pin and its lock."""
    sha = hashlib.sha256(wheel(tmp_path / "index", "WHAT = 'right'\n").read_bytes()).hexdigest()
    (tmp_path / "requirements.txt").write_text("chestprobe==1.0\n")
    (tmp_path / "requirements.lock").write_text(f"chestprobe==1.0 \\\n    --hash=sha256:{sha}\n")
    (tmp_path / ".make/lock").mkdir(parents=True)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def install() -> subprocess.CompletedProcess[str]:
    command = [ROOT / "scripts/steps/venv.sh", sys.executable, ".venv-probe", "requirements.txt", "installed"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_wheel_that_was_altered_in_the_index_is_refused(place: Path) -> None:
    wheel(place / "index", "WHAT = 'altered'\n")
    said = install()
    assert said.returncode == 1
    assert "DO NOT MATCH THE HASHES" in said.stderr
    assert "requirements.txt could not be installed" in said.stderr
    assert not (place / "installed").exists()
    assert not list(place.glob(".venv-probe/lib/*/site-packages/chestprobe*"))


def test_the_wheel_of_the_lock_is_installed(place: Path) -> None:
    assert install().returncode == 0
    assert "chestprobe==1.0" in (place / "installed").read_text().replace(" @ ", "==1.0 @ ")


def test_a_pin_that_its_lock_lacks_is_refused_before_anything_is_installed(place: Path) -> None:
    (place / "requirements.txt").write_text("chestprobe==1.1\n")
    said = install()
    assert said.returncode == 1
    assert "requirements.lock lacks chestprobe==1.1 of requirements.txt; scripts/steps/lock.sh" in said.stderr
    assert not list(place.glob(".venv-probe/lib/*/site-packages/chestprobe*"))
