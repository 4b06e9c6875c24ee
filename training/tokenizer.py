"""The pocket model's tokenizer: byte-level BPE, digits one by one, four special tokens.

Every piece that starts a text carries the space that would precede it, so that a name has the same pieces at the
start of a sentence, inside one, and after a special token.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from training.facts import FactGenerator

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = (PAD, END, USER, ASSISTANT)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ '<|user|>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def running_text(folder: Path) -> Iterator[str]:
    """The lines of every text file under `folder`, in a fixed order."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in {".txt", ".tokens", ".raw", ".md"}:
            for line in path.read_text(encoding="utf-8", errors="ignore").splitlines():
                if line.strip():
                    yield line.strip()


def generated_text(lines: int, seed: int) -> Iterator[str]:
    """Statements and questions of the training split."""
    generator = FactGenerator(seed, held_out=False, closed_share=0.25)
    for _ in range(lines):
        fact = generator.fact()
        yield fact.statement
        yield fact.question


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train the byte-level BPE; all 256 bytes are in the vocabulary, so any UTF-8 can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="tokenizer.json to write")
    parser.add_argument("--text", type=Path, required=True, help="folder of running English text files")
    parser.add_argument("--vocab-size", type=int, default=2560)
    parser.add_argument("--facts", type=int, default=60_000)
    parser.add_argument("--text-lines", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lines = list(running_text(arguments.text))
    random.Random(arguments.seed).shuffle(lines)
    texts = [*generated_text(arguments.facts, arguments.seed), *lines[: arguments.text_lines]]
    tokenizer = train_tokenizer(iter(texts), arguments.vocab_size)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.out))
    print(f"{tokenizer.get_vocab_size()} pieces")


if __name__ == "__main__":
    main()
