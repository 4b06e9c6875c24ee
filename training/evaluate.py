"""Measure an exported model: real sequential updates, real drops, greedy free-running generation.

`python -m training.evaluate --model app/pocket --facts 500` prints one table. Each fact has a memory of its own;
an answer counts if the generated text, stripped, equals the value. Names and values are from the held-out split.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from training.corpus import DONT_KNOW
from training.examples import batch_contexts, batch_rows
from training.facts import Fact, FactGenerator
from training.model import MemoryModel
from training.pools import gather_pools
from training.published import load_published

MAX_NEW_TOKENS = 16
TOLD = 4  # facts that a memory holds when it is asked for one that it was not told


class Memories:
    """One memory for each of B facts, updated and read together; the draw of what is forgotten is the served one."""

    def __init__(self, model: MemoryModel, tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> None:
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.version = 0
        # Blocks stay where they are and only their ranks change: moving whole pools took most of the time.
        self.blocks = [model.initial_block[:, None].expand(-1, count, -1, -1)]
        first = torch.arange(model.config.num_tokens).repeat(model.config.num_blocks)
        self.ranks = first.expand(model.config.num_layers, count, -1)

    @property
    def pool(self) -> Tensor:
        """The pools themselves, [L, B, N, d]."""
        return gather_pools(torch.cat(self.blocks, 2), self.ranks)

    def update(self, texts: Sequence[str], repeat: bool = False) -> None:
        """Write one text into each memory; `repeat` repeats a short one until it has K tokens."""
        config = self.model.config
        k_tokens = config.num_tokens
        contexts = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        if repeat:
            contexts = [c * -(-k_tokens // len(c)) if len(c) < k_tokens else c for c in contexts]
        ids, lengths = batch_contexts(contexts, k_tokens)
        new = self.model.write(ids, lengths, self.blocks[-1])
        self.version += 1
        kept = []
        for tenant in range(len(texts)):
            draw = torch.Generator().manual_seed((self.seed + tenant) * 1_000_003 + self.version)
            for _ in range(config.num_layers):
                order = torch.randperm(config.pool_size, generator=draw)
                kept.append(order[: config.pool_size - k_tokens].sort().values)
        index = torch.stack(kept).view(len(texts), config.num_layers, -1).transpose(0, 1)
        written = (self.version * k_tokens + torch.arange(k_tokens)).expand(config.num_layers, len(texts), -1)
        self.ranks = torch.cat([self.ranks.gather(2, index), written], 2)
        self.blocks.append(new)

    def generate(self, prompts: Sequence[list[int]]) -> list[str]:
        """Greedy continuation of one prompt per memory, until the model ends it."""
        memory = self.model.project(torch.cat(self.blocks, 2), ranks=self.ranks)
        rows = [list(prompt) for prompt in prompts]
        open_rows = set(range(len(rows)))
        for _ in range(MAX_NEW_TOKENS):
            ids, _, lengths = batch_rows(rows, [[]] * len(rows))
            hidden = self.model.read(ids[:, None], lengths[:, None], memory)
            best = self.model.logits(hidden[lengths.cumsum(0) - 1]).argmax(-1).tolist()
            for index in list(open_rows):
                rows[index].append(best[index])
                if best[index] == self.tokenizer.eos_token_id:
                    open_rows.discard(index)
            if not open_rows:
                break
        starts = [len(prompt) for prompt in prompts]
        texts = []
        for row, start in zip(rows, starts, strict=True):
            answer = row[start:]
            if self.tokenizer.eos_token_id in answer:
                answer = answer[: answer.index(self.tokenizer.eos_token_id)]
            texts.append(self.tokenizer.decode(answer, skip_special_tokens=True).strip())
        return texts

    def answers(self, facts: Sequence[Fact], form: str = "chat", with_text: bool = False) -> list[str]:
        """Ask each memory for its fact."""
        prompts = []
        for fact in facts:
            question = f"{fact.statement} {fact.question}" if with_text else fact.question
            if form == "chat":
                messages = [{"role": "user", "content": question}]
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            else:
                text = fact.completion_prompt if form == "unfinished" and fact.completion_prompt else question
            prompts.append(self.tokenizer.encode(text, add_special_tokens=False))
        return self.generate(prompts)

    def ask(self, facts: Sequence[Fact], form: str = "chat", with_text: bool = False) -> Tensor:
        """Ask each memory for its fact: bool [B], whether the answer is exactly the value."""
        answers = self.answers(facts, form, with_text)
        return torch.tensor([answer == fact.answer for answer, fact in zip(answers, facts, strict=True)])

    def refuses(self, facts: Sequence[Fact]) -> Tensor:
        """Ask each memory for a fact it was not told: bool [B], whether it says that it does not know."""
        return torch.tensor([answer == DONT_KNOW for answer in self.answers(facts)])


class Evaluation:
    """The protocols, over a batch of facts at a time; results are collected by the row's name."""

    def __init__(self, model: MemoryModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.generator = FactGenerator(seed, held_out=True)
        self.results: dict[str, list[Tensor]] = {}

    def _memories(self, count: int) -> Memories:
        self.seed += count
        return Memories(self.model, self.tokenizer, count, self.seed)

    def _keep(self, row: str, right: Tensor) -> None:
        self.results.setdefault(row, []).append(right)

    def _others(self, facts: Sequence[Fact]) -> list[str]:
        return [self.generator.unrelated(fact).statement for fact in facts]

    def run(self, facts: Sequence[Fact], updates: Sequence[int], warm: int) -> None:
        """All protocols for these facts."""
        statements = [fact.statement for fact in facts]
        empty = self._memories(len(facts))
        self._keep("empty memory", empty.ask(facts))
        self._keep("empty memory, says it does not know", empty.refuses(facts))
        self._keep("empty memory, text in the prompt", empty.ask(facts, with_text=True))
        repeated = self._memories(len(facts))
        repeated.update(statements, repeat=True)
        self._keep("just written, short text repeated", repeated.ask(facts))
        self._keep("just written, short text repeated, raw question", repeated.ask(facts, "raw"))
        memories = self._memories(len(facts))
        memories.update(statements)
        for form in ("raw", "unfinished"):
            self._keep(f"just written, {form} prompt", memories.ask(facts, form))
        for count in range(max(updates) + 1):
            if count in updates:
                self._keep(f"after {count} unrelated updates", memories.ask(facts))
            memories.update(self._others(facts))
        three = self._memories(len(facts))
        three.update(
            [" ".join([*self._others([fact]), fact.statement, *self._others([fact])]) for fact in facts]
        )
        self._keep("just written, the second of three facts", three.ask(facts))
        strangers = self._memories(len(facts))
        for _ in range(TOLD):
            strangers.update(self._others(facts))
        row = f"told {TOLD} facts of others, asked for another, says it does not know"
        self._keep(row, strangers.refuses(facts))
        changed = self._memories(len(facts))
        changed.update(statements)
        for _ in range(3):
            changed.update(self._others(facts))
        newer = [self.generator.changed(fact) for fact in facts]
        changed.update([fact.statement for fact in newer])
        self._keep("changed three updates later, the newest value", changed.ask(newer))
        if warm:
            used = self._memories(len(facts))
            for _ in range(warm):
                used.update(self._others(facts))
            used.update(statements)
            self._keep(f"just written into a pool of {warm} other updates", used.ask(facts))
            for _ in range(10):
                used.update(self._others(facts))
            self._keep(f"10 unrelated updates later, pool of {warm}", used.ask(facts))

    def collisions(self, facts: Sequence[Fact], counts: Sequence[int]) -> None:
        """Facts of the same relation about other people, written after the fact that is asked for."""
        facts = [fact for fact in facts if fact.subject is not None]
        memories = self._memories(len(facts))
        memories.update([fact.statement for fact in facts])
        for count in range(max(counts) + 1):
            if count in counts:
                self._keep(f"after {count} others of the same relation", memories.ask(facts))
            if count == max(counts):
                others = [self.generator.about_others(fact) for fact in facts]
                row = f"told of {count + 1} people, asked for another, says it does not know"
                self._keep(row, memories.refuses(others))
            memories.update([self.generator.about_others(fact).statement for fact in facts])


def table(results: dict[str, list[Tensor]], title: Callable[[str], str] = str) -> str:
    """Rows of "what, exact match, questions"."""
    lines = ["| memory | exact match | questions |", "|---|---|---|"]
    for row, parts in results.items():
        right = torch.cat(parts)
        lines.append(f"| {title(row)} | {right.float().mean():.3f} | {len(right)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--facts", type=int, default=500)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--updates", type=int, nargs="+", default=[0, 1, 5, 10, 20, 50])
    parser.add_argument(
        "--warm", type=int, default=100, help="unrelated updates before the fact; 0 leaves it out"
    )
    parser.add_argument("--collisions", type=int, nargs="*", default=[0, 1, 2, 4, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bfloat16", action="store_true", help="compute in bf16: faster, not what is served")
    parser.add_argument("--progress", type=Path, help="file for the table so far, after every batch")
    parser.add_argument("--seed", type=int, default=20261123)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    begin = time.time()
    model = load_published(arguments.model, torch.bfloat16 if arguments.bfloat16 else torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(arguments.model))
    evaluation = Evaluation(model, tokenizer, arguments.seed)
    with torch.inference_mode():
        for start in range(0, arguments.facts, arguments.batch):
            count = min(arguments.batch, arguments.facts - start)
            facts = [evaluation.generator.fact() for _ in range(count)]
            evaluation.run(facts, arguments.updates, arguments.warm)
            if arguments.collisions:
                evaluation.collisions(facts, arguments.collisions)
            done = start + count
            print(f"{done} facts, {time.time() - begin:.0f} seconds", file=sys.stderr, flush=True)
            if arguments.progress:
                arguments.progress.write_text(table(evaluation.results) + "\n")
    print(table(evaluation.results))
    print(f"\n{time.time() - begin:.0f} seconds")


if __name__ == "__main__":
    main()
