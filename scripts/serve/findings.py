"""Collect the faults and recommendations of the offline check."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Findings:
    """Lines `file: rule; expected …, found …`, each once."""

    root: Path
    faults: list[str] = field(default_factory=list)
    recommendations: list[str] = field(default_factory=list)

    def add(self, path: Path, rule: str, expected: object, found: object, recommendation: bool = False) -> None:
        line = f"{path.relative_to(self.root.parent)}: {rule}; expected {expected}, found {found}"
        lines = self.recommendations if recommendation else self.faults
        if line not in lines:
            lines.append(line)
