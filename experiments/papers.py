"""What the papers report, with where it is from; nothing stands here that has no source."""

from __future__ import annotations

MEMORYLLM = "[MemoryLLM](https://arxiv.org/abs/2402.04624)"
MPLUS = "[M+](https://arxiv.org/abs/2502.00592)"

RETENTION = (
    f"{MPLUS}, abstract: MemoryLLM struggles to keep knowledge beyond 20,000 tokens, M+ keeps it beyond 160,000. "
    "At second hand: 96.6 % right after 50 contexts; it was not compared with the paper's own text."
)
INTEGRITY = f"{MEMORYLLM}, abstract: no sign of degradation after nearly a million updates."
# by data: efficacy, generalization, specificity of the 7B model
EDITING: dict[str, tuple[float, float, float]] = {"zsre": (0.998, 0.967, 0.571)}
EDITING_NOTE = (
    f"The row of the 7B model is {MEMORYLLM}'s on the evaluation split of zsRE, at second hand: it was not "
    "compared with the paper's own table."
)
FORGETTING = f"{MEMORYLLM}: a token survives t updates with probability (1 - K/N)^t."
