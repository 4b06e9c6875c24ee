"""What blocks of this model look like: written of random tokens, as a sample for the scales of 8-bit pools."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from app.model.backbone import Backbone
from app.model.batch import Batch, UpdateSpan
from app.model.pools import Pools

# new memory tokens that are enough, of no more contexts than these; of a published model, whose own pool is a sample
# already, a few contexts
TOKENS, FEWEST, MOST = 2048, 8, 64
# contexts of one pass: what it takes is that of as many updates at work
AT_ONCE = 4


@torch.inference_mode()
def sampled_blocks(backbone: Backbone, pools: Pools) -> Iterator[Tensor]:
    """Blocks, side by side [L, n K, d], of contexts as short as a block and as long as there may be, behind the newest
    block of the checkpoint's own pool. The same ones every time. ``pools`` are those of the device; nothing is read
    from them or written to them."""
    c, device = backbone.config, backbone.device
    draw = torch.Generator().manual_seed(0)
    tail = backbone.weights.memory[:, -c.num_tokens :].to(device, backbone.dtype)
    cache = backbone.new_context_cache(1)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    for number in range(min(MOST, max(FEWEST, TOKENS // c.num_tokens)) // AT_ONCE):
        length = max(c.num_tokens, c.max_context) if number % 2 else c.num_tokens
        own = AT_ONCE * length
        tokens = torch.randint(c.vocab_size, (own,), generator=draw)
        updates = [backbone.begin_update(tail, length) for _ in range(AT_ONCE)]
        contexts = torch.arange(length) + updates[0].prefix
        ranks = torch.arange(c.num_tokens) + c.first_rank_position
        spans = [
            UpdateSpan(
                update,
                slice(index * length, (index + 1) * length),
                0,
                length,
                slice(own + index * c.num_tokens, own + (index + 1) * c.num_tokens),
            )
            for index, update in enumerate(updates)
        ]
        positions = torch.cat([contexts.repeat(AT_ONCE), ranks.repeat(AT_ONCE)])
        batch = Batch(tokens.to(device), positions.to(device), nothing, nothing, attend=None, updates=spans)
        backbone.forward(batch, pools, cache)
        yield torch.cat([update.block for update in updates], dim=1)
