"""What `make repository` publishes, and checkpoints that the user has put into training/weights/."""

from pathlib import Path

from conftest import ROOT, Project

TREE = {
    "binary_onnx/config.pbtxt",
    "binary_onnx/1/model.onnx",
    "multilabel_onnx/config.pbtxt",
    "multilabel_onnx/1/model.onnx",
    "vit_onnx/config.pbtxt",
    "vit_onnx/1/model.onnx",
    "bpr_model/config.pbtxt",
    "bpr_model/1/model.py",
    "bpr_model/1/requirements.txt",
    "bpr_model/1/weights/model.onnx",
    "bpr_model/1/weights/inference-settings.json",
} | {f"bpr_model/1/bpreg/{path.name}" for path in (ROOT / "convertation/bpr/bpreg").glob("*.py")}
CHECKPOINTS = (
    "CT-RATE/ProjectionVIT_LiPro_V2.pt",
    "CT-RATE/model_binary.pth",
    "CT-RATE/model_multilabel.pth",
    "bpr/model.pt",
    "bpr/inference-settings.json",
)
BINARY = "training/weights/CT-RATE/model_binary.pth"
REAL = "WEIGHTS=yandex"


def put_own_checkpoints(project: Project) -> dict[Path, bytes]:
    """Write own files of the user where checkpoints belong; return their content."""
    own = {project.path / "training/weights" / name: b"my " + name.encode() for name in CHECKPOINTS}
    for path, content in own.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return own


def read_files(files: dict[Path, bytes]) -> dict[Path, bytes]:
    """Return the content that these files have now."""
    return {path: path.read_bytes() for path in files}


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return the content of all files in a folder, by their names in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
