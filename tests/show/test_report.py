"""`make report`, read by a real Chromium: what it shows, that it can be printed, and that it loads nothing."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import REPOSITORY, Project
from pypdf import PdfReader

from scripts.show.report import describe_models
from scripts.show.report_sections import show_gpu

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(not BROWSER, reason="Chromium is not installed here (apt install chromium)")
# Chromium itself asks these for updates and the time, whatever page it shows
ITS_OWN = ("google.com", "googleapis.com", "gvt1.com", "gstatic.com")
ROW = {"group": "vit", "unit": "x", "note": "", "samples": [0.1, 0.12], "goal": 0.2, "relation": "≤", "verdict": "pass"}
BENCH = {
    "machine": {"cores": 2, "processor": "Xeon", "python": "3.11"},
    "others_cores": {},
    "rows": [
        ROW | {"what": "session load", "value": 0.11},
        ROW | {"what": "most memory", "value": 0.5, "verdict": "MISS", "samples": []},
        ROW | {"what": "on a GPU", "value": None, "note": "no GPU here", "verdict": "not measured", "samples": []},
    ],
}


class Text(HTMLParser):
    """The words of a page, without its style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.style = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.style = tag == "style"

    def handle_data(self, data: str) -> None:
        self.words += [] if self.style else data.split()

    def __str__(self) -> str:
        return " ".join(self.words)


class Chromium:
    """One run of headless Chromium on one page: what it prints, its console, its requests."""

    def __init__(self, page: Path, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True)
        assert BROWSER
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
            f"--log-net-log={folder / 'net.json'}", *options, page.as_uri(),
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        self.printed = run.stdout
        self.console = [line for line in run.stderr.splitlines() if ":CONSOLE" in line]
        log = json.loads((folder / "net.json").read_text())
        asked = {str(event.get("params", {}).get("url", "")) for event in log["events"]}
        self.requests = {
            url for url in asked if url.startswith("http") and not str(urlsplit(url).hostname).endswith(ITS_OWN)
        }


@pytest.fixture(scope="module")
def shown(measured: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The tiny project with everything that the report shows: fidelity, a comparison, benchmarks."""
    project = Project(tmp_path_factory.mktemp("shown") / "project")
    shutil.copytree(measured.path, project.path, symlinks=True, copy_function=shutil.copy)
    other = project.path / "other"
    shutil.copytree(project.path / REPOSITORY, other)
    path = other / "binary_onnx/1/model.onnx"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"layers.", b"lAyers."))  # names alone
    assert path.read_bytes() != data
    project.make("compare", "WITH=other")
    (project.path / "build/bench.json").write_text(json.dumps(BENCH))
    assert project.make("report").splitlines()[-1] == "build/report.html"
    yield project


def page(project: Project) -> Path:
    return project.path / "build/report.html"


# --- In Chromium -------------------------------------------------------------------


@needs_chromium
def test_chromium_shows_every_section_without_an_error_or_a_request(shown: Project, tmp_path: Path) -> None:
    seen = Chromium(page(shown), tmp_path / "seen", "--dump-dom")

    assert seen.console == [] and seen.requests == set()
    words = str(Text(seen.printed))
    assert seen.printed.count("<svg") == 1 + 3 + 1 + 1  # pipeline, fidelity, probabilities, benchmarks
    for part in (
        "SYNTHETIC weights: this shows that the programs work, and says nothing about diagnoses.",
        "tritonserver 2.47.0 loaded each model strictly",
        "vit_onnx READY", "bpr_model READY",
        "convertation/vit/torch2onnx.py",  # in the graph
        "vit_onnx/1/model.onnx", "torch 2.13.0", "build/synthetic/CT-RATE/model_binary.pth",
        "ONNX, batch 4 ONNX, batch 1", "plan: not built: make trt on a machine with a GPU",
        "Differences of the embeddings", "Margins of the codes", "float32 rounding explains up to",
        "binary_onnx same answers", "vit_onnx same files",
        "session load 0.11 x (≤ 0.2)", "on a GPU not measured no GPU here",
    ):  # fmt: skip
        assert part in words, part


@needs_chromium
def test_it_prints_on_pages_that_hold_the_same_words(shown: Project, tmp_path: Path) -> None:
    out = tmp_path / "report.pdf"
    Chromium(page(shown), tmp_path / "printed", f"--print-to-pdf={out}", "--no-pdf-header-footer")

    pages = [" ".join(sheet.extract_text().split()) for sheet in PdfReader(out).pages]
    assert 2 <= len(pages) <= 12 and all(pages)
    for part in ("Chest-CT models for NVIDIA Triton", "SYNTHETIC", "vit_onnx", "Fidelity", "Compared", "session load"):
        assert any(part in text for text in pages), part


@needs_chromium
def test_these_tests_notice_a_request_and_an_error(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://example.invalid/x.png'><script>console.error('no')</script>")

    seen = Chromium(bad, tmp_path / "seen", "--dump-dom")

    assert seen.console and seen.requests == {"http://example.invalid/x.png"}


# --- The file -----------------------------------------------------------------------


def test_the_page_refers_to_nothing_outside_itself(shown: Project) -> None:
    text = page(shown).read_text()

    assert "default-src 'none'" in text and "<script" not in text and "@import" not in text
    links = re.findall(r"(?:src|href)=\"([^\"]*)\"", text)
    assert links and all(link.startswith("#") or link == "data:," for link in links)
    assert re.findall(r"url\(", text) == []


def test_the_same_state_gives_the_same_bytes(shown: Project) -> None:
    before = page(shown).read_bytes()
    shown.make("report")
    assert page(shown).read_bytes() == before


def test_one_card_says_what_the_models_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NGC_RELEASE", raising=False)
    models = tmp_path / "build/models"
    models.mkdir(parents=True)
    entry = {"family": "head", "input": [512], "output": [2], "batch": [1, 4, 8], "trained_on": "LiPro"}
    (models / "binary.json").write_text(json.dumps(entry))
    (models / "binary.tolerance.json").write_text(json.dumps({"tolerance": {"output": 1e-5}}))
    text = describe_models("real")
    for said in (
        "Intended use",
        "not a medical device",
        "Hounsfield",
        "LiPro",
        "output 1e-05",
        "security holes",
        "team says",
    ):
        assert said in text, said
    assert "seeded numbers" in describe_models("synthetic")


def test_each_part_is_stamped_where_the_weights_are_synthetic(shown: Project) -> None:
    stamped = re.findall(r"<h2>([^<]*)<span class=\"stamp\">SYNTHETIC</span></h2>", page(shown).read_text())
    assert stamped == ["Model card", "Models", "Fidelity", "Compared"]


def test_what_is_missing_is_named_with_the_command_that_makes_it(built: Project, tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    shutil.copytree(built.path, project.path, symlinks=True, copy_function=shutil.copy)
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name in ("bash", "make", "awk", "python3", "sh", "realpath"):
        (bin_ / name).symlink_to(Path(shutil.which(name) or "").resolve())
    project.make("report", PATH=str(bin_))  # no other program

    text = str(Text(page(project).read_text()))
    for part in (
        "The difference that each hop makes: not made yet. Make it with make fidelity",
        "The check by NVIDIA's parser and builder: not made yet. Make it with make trt CHECK=1",
        "The speed of the models on a GPU: not made yet. Make it with make verify-gpu",
        "A comparison with another repository: not made yet. Make it with make compare WITH=/path/to/it",
        "The benchmarks: not made yet. Make it with make bench",
    ):
        assert part in text, part


def test_measurements_on_a_gpu_are_a_table_and_a_slow_plan_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"p50_ms": 31.0, "p95_ms": 33.5, "per_s": 31.9, "spread": 0.04}
    row = {"latency_ms": 31.0, "memory_mib": 2345, "first_ms": 600.0, "way": "gRPC", "load": {"1": one, "4": one}}
    told = {
        "on": {"gpu": "NVIDIA Stand-in RTX 3090", "driver": "555.42.06", "tensorrt": None},
        "measured": {"vit_trt": {"1": row}},
        "slower": {"vit_trt": "31 ms, the ONNX model 29 ms"},
    }
    monkeypatch.chdir(tmp_path)
    Path("build").mkdir()
    Path("build/verify-gpu.json").write_text(json.dumps(told))

    text = str(Text(show_gpu()))

    assert "gpu NVIDIA Stand-in RTX 3090; driver 555.42.06. Each model ran alone" in text
    assert "vit_trt is slower than its ONNX model: 31 ms, the ONNX model 29 ms." in text
    assert "vit_trt 1 1 31 33.5 31.9 4 % 600 2345 vit_trt 1 4 31 33.5 31.9 4 % 600 2345" in text


def test_a_part_that_is_out_of_date_says_so(shown: Project, tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    shutil.copytree(shown.path, project.path, symlinks=True, copy_function=shutil.copy)
    assert "Something it was made from has changed since" not in page(project).read_text()
    project.append("scripts/convert/probabilities.py", "# a remark\n")
    project.make("report")
    assert (
        page(project).read_text().count("Something it was made from has changed since. Run <code>make fidelity</code>")
        == 1
    )

    config = project.path / REPOSITORY / "binary_onnx/config.pbtxt"
    config.write_text(config.read_text() + "# a remark\n")
    project.make("report")
    text = page(project).read_text()
    assert "Other models were published since" in text
    assert "is not what the verdict was passed on" in text


def test_the_check_by_tensorrt_is_shown(stand_ins: Project) -> None:
    found = {"judge": "TensorRT for RTX 1.7.1", "built_for": ["8.6", "8.9"], "layers": 1176, "attention_nodes": 60,
             "profile": {"batch": [1, 2, 4]}, "engine_bytes": 749_682_932, "weights_bytes": 741_326_464,
             "activation_bytes": 1_419_116_544}  # fmt: skip
    shutil.rmtree(stand_ins.path / "build")
    (stand_ins.path / "build/checks").mkdir(parents=True)
    (stand_ins.path / "build/checks/vit.rtx.json").write_text(json.dumps(found))
    stand_ins.make("report")
    text = str(Text(page(stand_ins).read_text()))
    assert "TensorRT for RTX 1.7.1 parsed each file and built it on a CPU" in text
    assert "vit 8.6, 8.9 1176 60 749.7 MB 741.3 MB 1419.1 MB at batch 4" in text
    assert "The same engines on a GPU" not in text
    answered = {"gpu": "RTX 3090", "output": 0.0021, "ms": {"1": {"median": 31.5, "p95": 32.25}}}
    (stand_ins.path / "build/checks/vit.rtx-gpu.json").write_text(json.dumps(answered))
    stand_ins.make("report")
    assert "vit RTX 3090 2.1e-03 1 31.50 32.25" in str(Text(page(stand_ins).read_text()))


def test_before_anything_is_built_the_report_is_a_list_of_commands(stand_ins: Project) -> None:
    shutil.rmtree(stand_ins.path / REPOSITORY)
    shutil.rmtree(stand_ins.path / "build")
    shutil.rmtree(stand_ins.path / ".make/published", ignore_errors=True)
    stand_ins.make("report")
    text = str(Text(page(stand_ins).read_text()))
    assert "Triton's verdict: not made yet. Make it with make repository" in text
    assert [path.name for path in (stand_ins.path / "build").iterdir()] == ["report.html"]
