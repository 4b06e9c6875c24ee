"""What a run says of itself."""

from pathlib import Path

import pytest
import torch

from training.examples import ANSWER, NO_LOSS, TEXT, UNKNOWN
from training.progress import Point, cut_back, matched, replace_text


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


def test_a_resumed_run_does_not_tell_a_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"
    cut_back(path, 0)
    assert not path.exists()
    for step in (50, 100, 150):
        Point(step, 1.0, "full pool", 0.5, 0.25, 1.0, 1.0).keep(path)
    whole = path.read_text()
    cut_back(path, 150)
    assert path.read_text() == whole
    path.write_text(whole + "20")  # torn
    cut_back(path, 100)
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["step", "50", "100"]


def test_a_file_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    replace_text(path, "old")
    write = Path.write_text

    def torn(self: Path, text: str, **given: str) -> int:
        write(self, text[:2], **given)
        raise OSError("full")

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(OSError, match="full"):
        replace_text(path, "newer")
    assert path.read_text() == "old"
