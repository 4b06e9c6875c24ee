"""Forgetting on indices is forgetting on the pool itself."""

import numpy as np
import torch

from tests.training import reference
from training.evaluate import Memories
from training.examples import ANSWER, NO_LOSS, TEXT, UNKNOWN, Example, Group
from training.model import MemoryModel
from training.pools import follows, gather_pools, leave_out_forgotten, simulate, write_behind


class Scripted:
    """Stands in for numpy's generator and gives the draws it was told."""

    def __init__(self, draws: list[np.ndarray]) -> None:
        self.draws = draws

    def random(self, shape: tuple[int, int], dtype: type) -> np.ndarray:
        draw = self.draws.pop(0)
        assert draw.shape == shape
        return draw.astype(dtype)


def test_simulated_drops_equal_sequential_updates_of_a_pool() -> None:
    k_tokens, num_blocks, layers, d = 4, 6, 2, 3
    rng = np.random.default_rng(0)
    bank = torch.randn(layers, 1, 8 * k_tokens, d)
    draws = [rng.random((layers, k_tokens * num_blocks)) for _ in range(7)]
    ranks = simulate(Scripted(list(draws)), layers, [list(range(7))] * layers, 7, num_blocks, k_tokens)  # type: ignore[arg-type]
    pool = bank[:, 0, 7 * k_tokens :].repeat(1, num_blocks, 1)
    for block, draw in enumerate(draws):
        rows = []
        for layer in range(layers):
            dropped = set(np.argsort(draw[layer].astype(np.float32))[:k_tokens].tolist())
            kept = [rank for rank in range(k_tokens * num_blocks) if rank not in dropped]
            rows.append(
                torch.cat([pool[layer, kept], bank[layer, 0, block * k_tokens : (block + 1) * k_tokens]])
            )
        pool = torch.stack(rows)
    simulated = gather_pools(bank, torch.from_numpy(ranks).view(layers, 1, -1))
    torch.testing.assert_close(simulated[:, 0], pool)


def test_survival_follows_the_exponential_law() -> None:
    ranks = simulate(np.random.default_rng(1), 400, [list(range(11))] * 400, 11, 50, 16)
    survived = (ranks // 16 == 0).sum() / (400 * 16)
    assert abs(survived - (1 - 1 / 50) ** 10) < 0.02
    assert (ranks[:, -16:] // 16 == 10).all()


def test_each_pool_takes_its_blocks_in_its_own_order() -> None:
    ranks = simulate(np.random.default_rng(2), 2, [[0, 1], [1, 0]], 2, 50, 16)
    assert (ranks[0, -16:] // 16 == 1).all()
    assert (ranks[1, -16:] // 16 == 0).all()


def test_evaluation_updates_as_the_plain_implementation_does(model: MemoryModel) -> None:
    class Letters:
        """A tokenizer of one id a letter."""

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return [10 + ord(letter) % 400 for letter in text]

    memories = Memories(model, Letters(), 2, seed=70)  # type: ignore[arg-type]
    pool = model.initial_pool(2)[:, 1]
    with torch.no_grad():
        for version, text in enumerate(("a long first text", "two"), 1):
            memories.update(["something", text])
            block = reference.write(model, Letters().encode(text, False), pool[:, -model.config.num_tokens :])
            pool = reference.forget(pool, block, 71, version)
        torch.testing.assert_close(memories.pool[:, 1], pool, atol=1e-4, rtol=1e-4)


def test_answers_from_a_block_that_is_all_but_forgotten_are_left_out_of_the_loss() -> None:
    """Block 0 has 1 of its 8 tokens left, block 1 has 2; what nothing tells stays in."""
    row = [TEXT, ANSWER, ANSWER, TEXT, UNKNOWN]
    first, second = (Example([], [0] * 5, list(row), [-1, block, block, -1, -1]) for block in (0, 1))
    ranks = torch.tensor([[[0, 4, 20, 21, 22]], [[8, 7, 20, 21, 22]]])
    leave_out_forgotten([Group([first, second])], ranks, 4)
    assert first.kinds == [TEXT, NO_LOSS, NO_LOSS, TEXT, UNKNOWN]
    assert second.kinds == row


def test_a_context_written_behind_another_sees_its_new_block(model: MemoryModel) -> None:
    """Group 0 takes 0, 1, 2, 3 with an old block between 2 and 3; group 1 takes all four in a row."""
    order = [[0, 1, 2, 9, 3], [9, 0, 1, 2, 3]]
    behind = follows(order, 4)
    assert behind == [1, 5, 7]
    torch.manual_seed(1)
    config = model.config
    lengths = torch.tensor([7, 9, 6, 8, 4, 9, 7, 8])
    ids = torch.randint(config.vocab_size, (8, 9))
    tails = torch.randn(config.num_layers, 8, config.num_tokens, config.hidden_size)
    written = write_behind(model, ids, lengths, tails, behind)
    with torch.no_grad():
        for context, length in enumerate(lengths.tolist()):
            tail = written[:, context - 1] if context in behind else tails[:, context]
            alone = reference.write(model, ids[context, 9 - length :].tolist(), tail)
            torch.testing.assert_close(written[:, context], alone, atol=1e-4, rtol=1e-4)
    # what is asked of the later context teaches how the earlier one is written
    written[:, 1].sum().backward()
    assert model.embedding.grad is not None
    assert model.embedding.grad[ids[0, 8]].abs().sum() > 0
