"""What the papers report, with where it is from; nothing stands here that has no source."""

from __future__ import annotations

MEMORYLLM = "[MemoryLLM](https://arxiv.org/abs/2402.04624)"
MPLUS = "[M+](https://arxiv.org/abs/2502.00592)"

RETENTION = (
    f"{MEMORYLLM}, section 4.5: on SQuAD and NaturalQA, with N = 7,680 and K = 256, the 7B model still answers after "
    "20 updates, less often than the closed form says; asked for are answers of at most three (four) tokens, which "
    f"must stand in the ten that it generates. {MPLUS}, abstract: MemoryLLM struggles to keep knowledge beyond 20,000 "
    "tokens, M+ keeps it beyond 160,000."
)
INTEGRITY = (
    f"{MEMORYLLM}, abstract: no sign of degradation after nearly a million updates; section 4.6 and figure 6 show "
    "650,000, with SQuAD and NaturalQA."
)
# by data: the 7B model's efficacy, generalization, specificity, before and after the edit
EDITING: dict[str, dict[str, tuple[float, float, float]]] = {
    "zsre": {"unedited": (0.500, 0.491, 0.548), "edited": (0.998, 0.967, 0.571)},
    "counterfact": {"unedited": (0.157, 0.176, 0.821), "edited": (0.985, 0.822, 0.570)},
}
EDITING_NOTE = (
    f"The 7B model's rows are those of {MEMORYLLM}, table 1, of the first 10,000 records of zsRE and the first 2,000 "
    "of CounterFact."
)
FORGETTING = (
    f"{MEMORYLLM}, section 3.1.3: a token survives t updates with probability (1 - K/N)^t; figure 7 compares models of "
    "other N and K, trained alike, by how much of their first accuracy they keep."
)
