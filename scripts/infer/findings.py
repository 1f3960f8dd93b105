"""The result of a study from the outputs of the heads."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# In the order of the outputs of multilabel
FINDINGS = (
    "Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion",
    "Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis", "Lung nodule",
    "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion", "Mosaic attenuation pattern",
    "Peribronchial thickening", "Consolidation", "Bronchiectasis", "Interlobular septal thickening", "COVID-19",
    "Cancer",
)  # fmt: skip
# The most dangerous first
BY_DANGER = (
    "Cancer", "COVID-19", "Pulmonary fibrotic sequela", "Pleural effusion", "Pericardial effusion", "Cardiomegaly",
    "Consolidation", "Emphysema", "Bronchiectasis", "Atelectasis", "Lung nodule", "Lung opacity",
    "Mosaic attenuation pattern", "Interlobular septal thickening", "Peribronchial thickening", "Lymphadenopathy",
    "Arterial wall calcification", "Coronary artery wall calcification", "Hiatal hernia", "Medical material",
)  # fmt: skip
THRESHOLD = 0.5  # of the pathology and of each finding
UNDETERMINED = "cannot be determined"


@dataclass(frozen=True)
class Result:
    """What the heads say of a study."""

    probability: float  # of any pathology
    findings: dict[str, float]  # of each of FINDINGS

    @property
    def pathology(self) -> int:
        return int(self.probability > THRESHOLD)

    @property
    def most_dangerous(self) -> str:
        """The first of BY_DANGER above the threshold, else UNDETERMINED; "" without pathology."""
        if not self.pathology:
            return ""
        return next((name for name in BY_DANGER if self.findings[name] > THRESHOLD), UNDETERMINED)


def normalise_embedding(embedding: NDArray[Any]) -> NDArray[np.float32]:
    """The ViT's output (1, d) -> float32 (1, d) of length 1, the input of the heads."""
    unit: NDArray[np.float32] = (embedding / np.linalg.norm(embedding, axis=1, keepdims=True)).astype(np.float32)
    return unit


def make_result(binary: NDArray[Any], multilabel: NDArray[Any]) -> Result:
    """Logits (1, 2) and (1, 20) of the heads -> probabilities: softmax, where index 1 is pathology; sigmoid."""
    none, some = (float(logit) for logit in binary[0])
    sigmoids = 1 / (1 + np.exp(-multilabel[0].astype(np.float64)))
    return Result(
        float(1 / (1 + np.exp(none - some))),
        {name: float(probability) for name, probability in zip(FINDINGS, sigmoids, strict=True)},
    )
