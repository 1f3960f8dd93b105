"""The README quotes the output of the commands, and the Russian README says the same."""

import re
import subprocess

import pytest
from conftest import ROOT

READMES = ("README.md", "README.ru.md")


HELP = ("make help", "make help KNOBS=1")


def lines_of(command: str) -> list[str]:
    """Return the lines that a command prints in this checkout, without the caller's environment."""
    said = subprocess.run(
        command.replace("make", "make --no-print-directory", 1).split(), cwd=ROOT, text=True, capture_output=True,
        check=True, env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
    ).stdout  # fmt: skip
    return said.rstrip().split("\n")


@pytest.mark.parametrize(
    ("name", "command"), [*((name, "make help") for name in READMES), ("docs/knobs.md", "make help KNOBS=1")]
)
def test_it_shows_what_make_help_prints(name: str, command: str) -> None:
    shown = "".join(f"    {line}".rstrip() + "\n" for line in [f"$ {command}", *lines_of(command)])
    assert shown in (ROOT / name).read_text()


@pytest.mark.parametrize("command", HELP)
def test_each_line_of_help_fits_in_100_columns(command: str) -> None:
    assert [line for line in lines_of(command) if len(line) > 100] == []


def test_help_lists_each_target_and_each_knob_under_a_theme() -> None:
    targets, knobs = (lines_of(command) for command in HELP)
    assert [line for line in targets if line[:1].isalpha()] == ["Build", "Look", "Serve", "Infer", "Share", "Carry on"]
    assert targets[0] == "Build" and knobs[0] == "Models"
    listed = [line.split()[1] for line in targets if line.startswith("  make ") and "KNOBS=1 lists" not in line]
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony and sorted(listed) == sorted(phony[1].replace("\\\n", " ").split())
    named = re.findall(r"^([A-Z_]+) = .*\$\(CT_", (ROOT / "knobs.mk").read_text(), re.MULTILINE)
    shown = [match[1] for line in knobs if (match := re.match(r"  ([A-Z_]+)=", line))]
    assert shown == named and len(named) > 30


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
