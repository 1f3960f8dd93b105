"""Check the value of each knob of knobs.mk. Standard library only: this runs before every make (before_make.py).

`check_knobs` raises SystemExit with one sentence: the knob, its value, what was expected, and often what to type.
"""

import os  # nothing slower is imported here: this runs before every make

from scripts.steps.records import read_text, record_path

ONE_OF = {
    "FROM": ("weights", "prebuilt"),
    "WEIGHTS": ("yandex", "synthetic"),
    "VIT": ("LiPro", "Base", "VocabFine"),
    "PRECISION": ("fp32", "tf32", "fp16"),
    "FORMAT": ("onnx", "plan", "both"),
    "TARGET": ("triton", "inference"),
    "DEVICE": ("gpu", "cpu"),
    "CACHE_MODE": ("write", "read"),
    "DRY": ("", "1"),
    "AGAIN": ("", "1"),
    "LOCK": ("", "1"),
    "KNOBS": ("", "1"),
}
ONE_WORD = ("NGC_RELEASE", "REGISTRY", "IMAGE", "BASE", "TRITON", "ADDRESS", "PYTHON", "OPSET", "FILE", "KEY")
BARE = ("NGC_RELEASE", "REGISTRY", "IMAGE", "BASE", "ADDRESS", "PORTS", "PYTHON", "PLANS", "OPSET", "KEY")
SPECIAL = "'\"`&;|<>*?[]{}!~^\\%$#()"
SOURCES = (".ci", ".git", ".github", "convertation", "docker", "docs", "scripts", "tests", "training")
# Targets about the published repository: they use its kind of weights and its precision
OF_THE_PUBLISHED = {"verify", "status", "graph", "provenance", "fidelity", "report", "image"}
NOT_OF_PREBUILT = {"status", "graph", "report"}


def check_knobs(knobs: dict[str, str], goals: set[str]) -> None:
    """Raise SystemExit for the first wrong value; replace REPOSITORY by the one spelling that records use."""
    for path in " ", "%":
        if path in os.getcwd():
            raise SystemExit(
                f'this checkout lies in "{os.getcwd()}": make cannot work in a path with a space or %; '
                "move it to one without"
            )
    for name, allowed in ONE_OF.items():
        if knobs[name] not in allowed:
            raise SystemExit(f"{name}={knobs[name]}: expected one of {' '.join(allowed).strip()}")
    for name in ONE_WORD:
        if len(knobs[name].split()) > 1:
            raise SystemExit(f"{name}={knobs[name]}: expected one word")
    knobs["REPOSITORY"] = expand_home(knobs["REPOSITORY"])
    for name in BARE:
        if found := find_special_characters(knobs[name]):
            raise SystemExit(f"{name}={knobs[name]}: expected no character with a meaning to shells or make: {found}")
    if len(knobs["CACHE"].split()) > 1:
        raise SystemExit(f"CACHE={knobs['CACHE']}: expected a folder, its name without spaces, or s3://bucket/prefix")
    if "compare" in goals and len(knobs["WITH"].split()) != 1:
        raise SystemExit(
            f"make compare WITH={knobs['WITH']}: expected the folder of another repository, its name without spaces"
        )
    if "infer" in goals and not (knobs["INPUT"] and knobs["OUTPUT"]):
        raise SystemExit("make infer INPUT=folder OUTPUT=folder: expected both")
    pair = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
    if knobs["KEY"] and not os.path.exists(knobs["KEY"]):
        raise SystemExit(
            f"KEY={knobs['KEY']}: no such file; a pair of keys: {pair} && openssl ec -in key.pem -pubout -out key.pub"
        )
    if "sign" in goals and not knobs["KEY"]:
        raise SystemExit(f"make sign KEY=key.pem: expected a private key; {pair} makes one")
    if "trt-fleet" in goals and knobs["DRY"]:
        raise SystemExit("DRY=1 prints what make trt runs; make -n trt-fleet GPUS=... prints this")
    check_combinations(knobs, goals)
    knobs["REPOSITORY"] = spell_repository(knobs["REPOSITORY"])


def check_combinations(knobs: dict[str, str], goals: set[str]) -> None:
    """Raise SystemExit for values that contradict each other."""
    prebuilt = knobs["FROM"] == "prebuilt"
    if knobs["REPOSITORY_ZIP"] and not prebuilt:
        raise SystemExit("REPOSITORY_ZIP is read only with FROM=prebuilt; add that, or leave it out")
    if knobs["WEIGHTS_ZIP"] and knobs["WEIGHTS"] == "synthetic":
        raise SystemExit("WEIGHTS_ZIP is not read with WEIGHTS=synthetic; leave one of them out")
    if prebuilt and knobs["FORMAT"] != "onnx":
        raise SystemExit(
            f"FORMAT={knobs['FORMAT']} builds plans of our own ONNX files, FROM=prebuilt has none; "
            "leave one of them out"
        )
    if prebuilt and knobs["PRECISION"] != "fp32":
        raise SystemExit(
            f"PRECISION={knobs['PRECISION']} is for models built here, not for FROM=prebuilt; leave one of them out"
        )
    for folder in knobs["PLANS"].split():
        if not any(name.endswith(".plan") for below in list_folders(folder) for name in os.listdir(below)):
            raise SystemExit(
                f"PLANS={folder}: no plan there; expected a folder like build/plan of another machine, "
                "with sm86/vit.plan or so in it"
            )
    if (knobs["PLANS"] or knobs["TRTEXEC_FLAGS"]) and "repository" in goals and knobs["FORMAT"] == "onnx":
        raise SystemExit("PLANS and TRTEXEC_FLAGS have no effect with FORMAT=onnx; add FORMAT=both")


def list_folders(path: str) -> list[str]:
    """Return the folders in a folder, an empty list if `path` is no folder."""
    below = [f"{path}/{name}" for name in os.listdir(path)] if os.path.isdir(path) else []
    return [name for name in below if os.path.isdir(name)]


def expand_home(path: str) -> str:
    """Return the path with ~/ replaced by the home folder: make's words do not pass through a shell."""
    return f"{os.environ.get('HOME', '~')}/{path[2:]}" if path.startswith("~/") else path


def find_special_characters(value: str) -> str:
    """Return the characters of `value` that mean something to a shell or to make."""
    return " ".join(sorted({letter for letter in value if letter in SPECIAL}, key=SPECIAL.index))


def spell_repository(repository: str) -> str:
    """Return the folder as records spell it: links resolved, relative if it is below this checkout.

    SystemExit if models cannot be published there.
    """
    here, path = os.getcwd(), os.path.realpath(repository)
    for name in repository, path:
        if len(name.split()) != 1:
            raise SystemExit(f"REPOSITORY={name}: expected one folder, its name without spaces")
        if found := find_special_characters(name):
            raise SystemExit(
                f"REPOSITORY={name}: expected a folder without characters that have a meaning to shells or make: "
                f"{found}"
            )
    path = path[len(here) + 1 :] if path.startswith(f"{here}/") else path
    top = path.split("/")[0]
    if top in SOURCES or f"{here}/".startswith(f"{path.rstrip('/')}/"):
        raise SystemExit(
            f"REPOSITORY={path}: expected a folder apart from the sources, such as model_repository_running"
        )
    if top in ("build", ".make") or top.startswith(".venv"):
        raise SystemExit(
            f"REPOSITORY={path}: expected a folder for published models alone, such as model_repository_running"
        )
    return path


def follow_published(knobs: dict[str, str], given: set[str], goals: set[str]) -> None:
    """Set WEIGHTS and PRECISION to those of the published repository if a goal is about it, unless they were given.

    SystemExit if a goal needs a build and the published models come from a finished archive, or if publishing would
    replace another kind of weights.
    """
    repository = knobs["REPOSITORY"]
    kind = read_text(record_path("published", repository)).partition("\n")[0].strip()
    unlike = NOT_OF_PREBUILT | (set() if knobs["KEY"] else {"verify"}) | (set() if knobs["CHECK"] else {"provenance"})
    if kind == "prebuilt" and goals & unlike:
        raise SystemExit(
            f"{repository} holds the models of a finished archive, and nothing of them was built here; "
            "make repository FROM=prebuilt checks it"
        )
    if goals & OF_THE_PUBLISHED:
        if "WEIGHTS" not in given and kind == "synthetic":
            knobs["WEIGHTS"] = kind
        if "PRECISION" not in given:
            knobs["PRECISION"] = read_published_precision(repository) or knobs["PRECISION"]
    if "weights" in goals:
        knobs["WEIGHTS"] = "yandex"
    publishes = "prebuilt" if knobs["FROM"] == "prebuilt" else "real" if knobs["WEIGHTS"] == "yandex" else "synthetic"
    if "repository" in goals and kind != publishes and holds_models(repository):
        other = f"is made from {kind} weights and these are {publishes}" if kind else "was not made by this build"
        raise SystemExit(
            f"{repository} {other}; move it away (mv {repository} {repository}.old) or publish elsewhere "
            "(make repository REPOSITORY=dir)"
        )


def read_published_precision(repository: str) -> str:
    """Return tf32 or fp16 if the published ViT has it, else ""; with plans only, the verdict's record says it."""
    sha = read_text(record_path("seen", f"{repository}/vit_onnx/1/model.onnx")).split(" ")[0]
    judged = read_text(record_path("made", "build/checks/verdict.json"))
    for precision in "tf32", "fp16":
        wrote = read_text(record_path("made", f"build/onnx/vit.{precision}.onnx")).split(" ")[0].rpartition("=")[2]
        if (sha and sha == wrote) if os.path.isdir(f"{repository}/vit_onnx") else f"/vit.{precision}." in judged:
            return precision
    return ""


def holds_models(repository: str) -> bool:
    """Tell whether a model lies in the folder, published from here or not."""
    there = os.listdir(repository) if os.path.isdir(repository) else []
    return any(
        os.path.exists(f"{repository}/{name}/config.pbtxt") or name.endswith(("_onnx", "_trt")) or name == "bpr_model"
        for name in there
    )
