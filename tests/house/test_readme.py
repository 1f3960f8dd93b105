"""The README says what the commands say, and its Russian twin says the same."""

import re
import subprocess

import pytest
from conftest import ROOT

READMES = ("README.md", "README.ru.md")


@pytest.mark.parametrize("name", READMES)
def test_it_shows_what_make_help_prints(name: str) -> None:
    said = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, text=True, capture_output=True, check=True,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
    ).stdout  # fmt: skip
    shown = "".join(f"    {line}".rstrip() + "\n" for line in ["$ make help", *said.rstrip().split("\n")])
    assert shown in (ROOT / name).read_text()


@pytest.mark.parametrize(
    "twins", [READMES, *((f"docs/{name}.md", f"docs/{name}.ru.md") for name in ("guide", "inference"))]
)
def test_the_twins_have_the_same_commands_tables_and_parts(twins: tuple[str, str]) -> None:
    def skeleton(text: str) -> list[str]:
        headings = re.findall(r"^#+ ", text, re.MULTILINE)
        rows = [str(line.count("|")) for line in text.splitlines() if line.startswith("|")]
        return headings + rows + sorted(set(re.findall(r"`make [a-z]+|[A-Z_]{2,}=", text)))

    english, russian = (skeleton((ROOT / name).read_text()) for name in twins)
    assert english == russian


@pytest.mark.parametrize(
    "name", [*READMES, *(f"docs/{name}{language}.md" for name in ("guide", "inference") for language in ("", ".ru"))]
)
def test_every_target_and_file_it_names_exists(name: str) -> None:
    text = (ROOT / name).read_text()
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE)) <= targets
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / name).parent.joinpath(link).exists(), link


def test_the_first_screen_says_what_goes_in_what_comes_out_and_what_to_type() -> None:
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    for part in ("checkpoints", "Triton", "make repository WEIGHTS=synthetic", "make test", "published:", "vit_onnx/"):
        assert part in screen, part
