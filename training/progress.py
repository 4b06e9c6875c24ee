"""How a run does: which answers were right, a line in the terminal and a point of the curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from training.examples import ANSWER, UNKNOWN


@dataclass(frozen=True)
class Point:
    """One point of the curve: means over the steps since the last one."""

    step: int
    minutes: float
    stage: str
    known: float
    unknown: float
    answer_loss: float
    rate: float

    @classmethod
    def of(
        cls, step: int, minutes: float, stage: str, counts: Sequence[Sequence[float]], rate: float
    ) -> Point:
        """`counts` of every step: its answer loss, and right and all answers, known ones and then unknown ones."""
        loss, right, known, refused, unknown = np.asarray(counts).mean(0).tolist()
        return cls(step, minutes, stage, right / max(known, 1e-9), refused / max(unknown, 1e-9), loss, rate)

    def line(self, steps_a_second: float, contexts_a_step: int) -> str:
        return (
            f"{self.minutes:6.2f} min  step {self.step}  {self.stage}  known {self.known:.3f}  "
            f"unknown {self.unknown:.3f}  answer loss {self.answer_loss:.3f}  rate {self.rate:.2f}  "
            f"{steps_a_second:.2f} steps/s  {steps_a_second * contexts_a_step:.0f} contexts/s"
        )

    def keep(self, path: Path) -> None:
        """Append it to a CSV file, which is begun if there is none."""
        names = [field.name for field in fields(self)]
        values = [getattr(self, name) for name in names]
        told = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in values]
        with path.open("a", encoding="utf-8") as curve:
            curve.write(("" if curve.tell() else ",".join(names) + "\n") + ",".join(told) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that whoever is interrupted leaves the old one or the new one."""
    part = path.with_name(f"{path.name}.tmp")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def cut_back(path: Path, step: int) -> None:
    """Takes points behind `step` off a curve, if there is one: a run that goes on from there comes to them again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    if lines:
        # a kill may have torn the last one
        kept = [line for line in lines[1:] if line.endswith("\n") and int(line.split(",", 1)[0]) <= step]
        replace_text(path, lines[0] + "".join(kept))


def matched(kind: Tensor, right: Tensor) -> list[float]:
    """How many answers are right in every token, and how many there are: known ones, then unknown ones.

    kind: int64 [B, T]; right: bool [B, T]. A row has two answers at most.
    """
    is_answer = kind >= ANSWER
    segment = (is_answer & ~F.pad(is_answer, (1, 0))[:, :-1]).cumsum(1)
    counts = []
    for wanted in (ANSWER, UNKNOWN):
        hits = asked = 0
        for number in (1, 2):
            inside = (kind == wanted) & (segment == number)
            has = inside.any(1)
            asked += int(has.sum())
            hits += int(((right | ~inside).all(1) & has).sum())
        counts += [float(hits), float(asked)]
    return counts
