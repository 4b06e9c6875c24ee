"""The evaluation's rows: what counts as right, and what as not known."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from training.corpus import DONT_KNOW
from training.evaluate import Evaluation, Memories, table
from training.facts import Fact
from training.model import MemoryModel
from training.published import save_published


@pytest.mark.parametrize("knows", [False, True])
def test_the_rows_of_one_that_knows_nothing_and_of_one_that_knows_all(
    knows: bool, model: MemoryModel, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_published(dict(model.state_dict()), model.config, tokenizer, tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))

    def answers(self: Memories, facts: list[Fact], form: str = "chat", with_text: bool = False) -> list[str]:
        return [fact.answer if knows else DONT_KNOW for fact in facts]

    monkeypatch.setattr(Memories, "answers", answers)
    evaluation = Evaluation(model, loaded, 3)
    facts = [evaluation.generator.fact("dog") for _ in range(3)]
    with torch.inference_mode():
        evaluation.run(facts, [0, 1], warm=1)
        evaluation.collisions(facts, [0, 2])
    shares = {row: torch.cat(parts).float().mean().item() for row, parts in evaluation.results.items()}
    refusals = {row for row in shares if "does not know" in row}
    assert refusals == {
        "empty memory, says it does not know",
        "told of 3 people, asked for another, says it does not know",
        "told 4 facts of others, asked for another, says it does not know",
    }
    for row, share in shares.items():
        assert share == (knows != (row in refusals)), row
    assert f"| after 0 unrelated updates | {knows:.3f} | 3 |" in table(evaluation.results)


def test_an_answer_is_generated_for_every_memory(
    model: MemoryModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_published(dict(model.state_dict()), model.config, tokenizer, tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    evaluation = Evaluation(model, loaded, 3)
    facts = [evaluation.generator.fact() for _ in range(2)]
    memories = Memories(model, loaded, 2, 1)
    with torch.inference_mode():
        assert len(memories.answers(facts)) == 2
        assert memories.ask(facts, "unfinished").tolist() == [False, False]
        assert memories.refuses(facts).tolist() == [False, False]
