"""What a run says of itself."""

from pathlib import Path

import torch

from training.examples import ANSWER, NO_LOSS, TEXT, UNKNOWN
from training.progress import Point, matched


def test_an_answer_is_right_if_all_of_its_tokens_are() -> None:
    kind = torch.tensor(
        [
            [TEXT, ANSWER, ANSWER, TEXT, UNKNOWN, UNKNOWN],
            [TEXT, ANSWER, ANSWER, TEXT, ANSWER, NO_LOSS],
            [TEXT, NO_LOSS, NO_LOSS, TEXT, UNKNOWN, UNKNOWN],
        ]
    )
    right = torch.tensor(
        [
            [False, True, True, False, True, False],
            [True, True, False, True, True, True],
            [False, False, False, False, True, True],
        ]
    )
    assert matched(kind, right) == [2.0, 3.0, 1.0, 2.0]


def test_the_curve_is_appended_to(tmp_path: Path) -> None:
    counts = [[1.0, 3.0, 4.0, 0.0, 0.0], [2.0, 3.0, 4.0, 1.0, 2.0]]
    point = Point.of(50, 1.5, "full pool", counts, 0.5)
    assert (point.answer_loss, point.known, point.unknown) == (1.5, 0.75, 0.5)
    for _ in range(2):
        point.keep(tmp_path / "curve.csv")
    lines = (tmp_path / "curve.csv").read_text().splitlines()
    assert lines == [
        "step,minutes,stage,known,unknown,answer_loss,rate",
        *["50,1.5000,full pool,0.7500,0.5000,1.5000,0.5000"] * 2,
    ]
    assert "known 0.750" in point.line(2.0, 96)
