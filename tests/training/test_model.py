"""The batched passes equal a plain one-at-a-time implementation, for long, short and repeated contexts."""

import numpy as np
import pytest
import torch

from tests.training import reference
from training.examples import batch_contexts, batch_rows
from training.model import MemoryModel
from training.packing import Packing
from training.pools import gather_pools, simulate


def random_ids(generator: torch.Generator, length: int) -> list[int]:
    return torch.randint(4, 500, (length,), generator=generator).tolist()


@pytest.mark.parametrize("lengths", [[9, 6, 13, 7], [2, 11, 6, 5], [1, 3]])
def test_write_equals_the_plain_self_update(model: MemoryModel, lengths: list[int]) -> None:
    g = torch.Generator().manual_seed(1)
    c = model.config
    contexts = [random_ids(g, length) for length in lengths]
    tails = torch.randn(c.num_layers, len(lengths), c.num_tokens, c.hidden_size, generator=g)
    blocks = model.write(*batch_contexts(contexts, c.num_tokens), tails)
    for index, context in enumerate(contexts):
        torch.testing.assert_close(
            blocks[:, index], reference.write(model, context, tails[:, index]), atol=1e-4, rtol=1e-4
        )


def test_read_equals_the_plain_decode_of_every_row(model: MemoryModel) -> None:
    g = torch.Generator().manual_seed(2)
    c = model.config
    rows = [random_ids(g, length) for length in (5, 12, 3, 8)]
    pools = torch.randn(c.num_layers, 2, c.pool_size, c.hidden_size, generator=g)
    ids, _, lengths = batch_rows(rows, [[]] * 4)
    hidden = model.read(ids.view(2, 2, -1), lengths.view(2, 2), model.project(pools))
    expected = torch.cat([reference.read(model, row, pools[:, index // 2]) for index, row in enumerate(rows)])
    torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)


def test_a_cut_pool_keeps_the_positions_of_the_full_one(model: MemoryModel) -> None:
    g = torch.Generator().manual_seed(3)
    c = model.config
    pool = torch.randn(c.num_layers, 1, c.pool_size, c.hidden_size, generator=g)
    newest = 2 * c.num_tokens
    full, cut = model.project(pool), model.project(pool[:, :, -newest:])
    for (full_k, full_v), (cut_k, cut_v) in zip(full, cut, strict=True):
        torch.testing.assert_close(cut_k[..., -newest:], full_k[..., -newest:])
        torch.testing.assert_close(cut_v[:, :, -newest:], full_v[:, :, -newest:])


def test_gradients_pass_through_the_packing() -> None:
    used = torch.tensor([[True, False, True], [False, True, True]])
    packing = Packing(used)
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packing.take, (x,))
    y = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: packing.take(packing.pad(t)), (y,))


def test_gradients_agree_with_the_plain_implementation(model: MemoryModel) -> None:
    g = torch.Generator().manual_seed(4)
    c = model.config
    context, row = random_ids(g, 4), random_ids(g, 7)
    tail = torch.randn(c.num_layers, 1, c.num_tokens, c.hidden_size, generator=g)

    block = model.write(*batch_contexts([context], c.num_tokens), tail)
    pool = torch.cat([model.initial_pool(1)[:, :, c.num_tokens :], block], 2)
    model.read(torch.tensor([[row]]), torch.tensor([[7]]), model.project(pool)).square().sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    block = reference.write(model, context, tail[:, 0])
    pool = torch.cat([model.initial_pool(1)[:, 0, c.num_tokens :], block], 1)
    reference.read(model, row, pool).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, atol=2e-3, rtol=2e-3, msg=name)


def test_a_bank_with_ranks_equals_the_pool_it_describes(model: MemoryModel) -> None:
    g = torch.Generator().manual_seed(5)
    c = model.config
    order = [[0, 2, 1], [2, 1, 0]] * c.num_layers
    ranks = simulate(np.random.default_rng(0), 2 * c.num_layers, order, 3, c.num_blocks, c.num_tokens)
    places = torch.from_numpy(ranks).view(c.num_layers, 2, -1)
    bank = torch.randn(c.num_layers, 2, 4 * c.num_tokens, c.hidden_size, generator=g).requires_grad_()
    pool = gather_pools(bank, places)
    weights = [
        torch.randn(2, c.num_heads, c.head_size, 1 + c.pool_size, generator=g) for _ in range(c.num_layers)
    ]

    def objective(memory: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        return torch.stack(
            [(w * k * v.transpose(2, 3)).sum() for w, (k, v) in zip(weights, memory, strict=True)]
        ).sum()

    plain, placed = objective(model.project(pool)), objective(model.project(bank, ranks=places))
    torch.testing.assert_close(placed, plain)
    expected, found = torch.autograd.grad(plain, bank)[0], torch.autograd.grad(placed, bank)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
