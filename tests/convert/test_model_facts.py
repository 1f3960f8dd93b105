"""What make reads from models.yaml: the same models as Python, in whatever style the file is written."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from random import Random

import pytest
import yaml
from conftest import ROOT

from scripts.convert.model_entry import main
from tests.conftest import Project

MODELS = ROOT / "convertation/models.yaml"


def draw(random: Random) -> str:
    """A valid models.yaml with random spellings, order, quotes, indentation and remarks."""

    def quoted(text: str) -> str:
        return random.choice([text, f'"{text}"', f"'{text}'"])

    def inline(value: object) -> str:
        if isinstance(value, dict):
            gap = random.choice(["", " "])
            return "{" + gap + ", ".join(f"{quoted(key)}: {inline(item)}" for key, item in value.items()) + gap + "}"
        if isinstance(value, list):
            return "[" + random.choice([",", ", "]).join(map(inline, value)) + "]"
        if isinstance(value, bool):
            return random.choice([str(value), str(value).lower(), "yes" if value else "no"])
        if isinstance(value, str):
            return f'"{value}"' if "{" in value else quoted(value)
        return str(value)

    def remark() -> str:
        return random.choice(["", "", "  # family: head", " # optional: true"])

    models = yaml.safe_load(MODELS.read_text())
    for number in range(random.randrange(4)):
        name = random.choice("AagezZ") + random.choice(["ge", "-x", "_2", "VIT"]) + str(number)
        models[name] = models["binary"] | {"checkpoint": f"CT-RATE/{name}.pth", "optional": random.random() < 0.5}
    lines = []
    for name in random.sample(list(models), len(models)):
        entry = {key: models[name][key] for key in random.sample(list(models[name]), len(models[name]))}
        lines += random.choice([[], ["# a remark:"], [""], ["    # family: vit"]])
        if random.random() < 0.3:
            lines.append(f"{quoted(name)}: {inline(entry)}{remark()}")
            continue
        indent = " " * random.choice([1, 2, 4, 7])
        lines.append(f"{quoted(name)}{random.choice(['', ' '])}:{remark()}")
        for key, value in entry.items():
            if isinstance(value, dict) and random.random() < 0.5:
                lines.append(f"{indent}{key}:{remark()}")
                lines += [f"{indent}  {quoted(below)}: {inline(item)}{remark()}" for below, item in value.items()]
            else:
                lines.append(f"{indent}{quoted(key)}: {inline(value)}{remark()}")
    return random.choice(["", "---\n", "%YAML 1.1\n---\n"]) + random.choice(["\n", "\r\n"]).join([*lines, ""])


@pytest.mark.parametrize("seed", range(20))
def test_make_and_python_see_the_same_models(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_bytes(draw(Random(seed)).encode())
    out = tmp_path / f"{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.mk"
    expected = yaml.load(path.read_bytes(), yaml.SafeLoader)
    main(["facts", str(path), str(out)])
    told = ("family", "checkpoint", "trained_on", "optional")
    probe = "$(foreach model,$(all_models),$(info $(model)" + "".join(f"|$($(model).{fact})" for fact in told) + "))"
    (tmp_path / "Makefile").write_text(f"VIT := {{VIT}}\ninclude {out.name}\n{probe}\nall: ;@:\n")
    run = subprocess.run(["make", "-s"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "|".join([name, *(str(entry.get(fact) or "").replace("True", "1") for fact in told)])
        for name, entry in expected.items()
    ]


def test_nothing_is_written_if_the_file_changed_meanwhile(tmp_path: Path) -> None:
    """Make names the output by the digest of the file that it saw; the file may have changed since."""
    path = tmp_path / "models.yaml"
    path.write_text(draw(Random(1)))
    with pytest.raises(SystemExit, match="changed while it was read; run make again"):
        main(["facts", str(path), str(tmp_path / "0123456789abcdef.mk")])
    assert list(tmp_path.iterdir()) == [path]


def targets(project: Project) -> set[str]:
    """The targets of the published repository."""
    return set(re.findall(r"^(\S+)=[0-9a-f]* ", project.make("repository", "EXPLAIN=1"), re.MULTILINE))


def test_the_makefile_builds_the_same_models_however_models_yaml_is_written(stand_ins: Project) -> None:
    path = stand_ins.path / "convertation/models.yaml"
    shutil.copy(stand_ins.path / "convertation/head/binary.pbtxt", stand_ins.path / "convertation/head/extra.pbtxt")
    models = yaml.safe_load(path.read_text())
    extra = models["binary"] | {"checkpoint": "CT-RATE/extra.pth", "optional": False}
    before = targets(stand_ins)
    path.write_text("# in another style\n" + json.dumps(models | {"extra": extra}, indent=7))
    assert "build/onnx/extra.onnx" in targets(stand_ins)
    path.write_text(json.dumps(models | {"extra": extra | {"optional": True}}))
    assert targets(stand_ins) == before
    path.write_text(path.read_text().replace('"extra"', '"Extra one"'))
    assert "Extra one" in stand_ins.fail("repository")


def test_help_and_doctor_need_no_models_yaml(stand_ins: Project) -> None:
    shutil.rmtree(stand_ins.path / ".make/models")
    shutil.rmtree(stand_ins.path / ".venv")
    assert "make repository" in stand_ins.make("help")
    assert not (stand_ins.path / ".venv").exists()
