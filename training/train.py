"""Train the pocket model from nothing: `python -m training.train --tokenizer T --text FOLDER --out RUN --minutes 90`.

Each process takes one core and its own contexts; gradients are averaged over gloo. With ``--device cuda`` one process
has the model, and all that is made of it, on a GPU. A run can be stopped and started
again with the same arguments: weights, their moving average, optimizer state and stage are in RUN, and its curve in
RUN/curve.csv. `training.reshape` begins a run from a published model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from training.corpus import Corpus
from training.examples import ANSWER, TEXT, Group, GroupShape, Key, batch_contexts, batch_rows
from training.model import DTYPES, MemoryModel, ModelConfig, compute_dtype
from training.optimizer import Optimizer
from training.pools import compacted, follows, leave_out_forgotten, simulate, write_behind
from training.progress import Point, cut_back, matched, replace_text
from training.stages import Mixture, Old, curriculum
from training.tokenizer import running_text

MATRICES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
CACHE_BLOCKS = 768
PAUSE = 10.0  # seconds; of a longer step only these count, so that a stopped process does not use up its time


class Trainer:
    """One process of a run."""

    def __init__(self, arguments: argparse.Namespace, rank: int) -> None:
        self.arguments, self.rank, self.world = arguments, rank, arguments.processes or 1
        self.device = torch.get_default_device()
        torch.manual_seed(arguments.seed)
        tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
        config = ModelConfig(
            vocab_size=tokenizer.get_vocab_size(), rope_theta=arguments.rope_theta, hidden_size=arguments.width,
            num_layers=arguments.layers, num_heads=arguments.heads, intermediate_size=arguments.inner,
        )  # fmt: skip
        if (arguments.out / "state.json").exists():
            config = ModelConfig(**json.loads((arguments.out / "state.json").read_text())["config"])
        self.model = MemoryModel(config, compute_dtype(arguments.dtype))
        self.optimizer = Optimizer(self.model, set() if arguments.adamw else MATRICES, self.model.dtype)
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.step = self.stage = 0
        self.minutes = self.exact = 0.0
        if (arguments.out / "state.json").exists():
            self.load()
        seed = arguments.seed + 1000 * rank + 7919 * self.step
        torch.manual_seed(seed)
        self.rng, self.numpy_rng = random.Random(seed), np.random.default_rng(seed)
        lines = list(running_text(arguments.text)) if arguments.text else []
        words = sorted({w for line in lines for w in line.split() if w.isalpha() and 3 < len(w) < 11})
        names, nouns = [w for w in words if w.istitle()], [w for w in words if w.islower()]
        texts = [line for line in lines if len(line) > 200 and "<unk>" not in line]
        self.corpus = Corpus(tokenizer, seed, config.num_tokens, names, nouns, texts)
        self.stages = curriculum(arguments.batch, config.num_blocks)
        self.cache = torch.zeros(config.num_layers, 0, config.num_tokens, config.hidden_size)
        self.cache_keys: list[frozenset[Key]] = []

    def load(self) -> None:
        """Take up a run where its last checkpoint was written."""
        out = self.arguments.out
        device = str(self.device)
        self.model.load_state_dict(load_file(out / "weights.safetensors", device))
        self.average = load_file(out / "average.safetensors", device)
        self.optimizer.state = load_file(out / "optimizer.safetensors", device)
        state = json.loads((out / "state.json").read_text())
        self.step = self.optimizer.count = state["step"]
        self.stage, self.minutes, self.exact = state["stage"], state["minutes"], state["exact"]
        if self.rank == 0:
            cut_back(out / "curve.csv", self.step)

    def save(self) -> None:
        """Write a checkpoint; state.json last, each file replaced at once."""
        out: Path = self.arguments.out
        tensors = {
            "weights": dict(self.model.state_dict()), "average": self.average, "optimizer": self.optimizer.state,
        }  # fmt: skip
        for name, state in tensors.items():
            save_file({k: v.detach().contiguous() for k, v in state.items()}, out / f"{name}.tmp")
            os.replace(out / f"{name}.tmp", out / f"{name}.safetensors")
        record = {
            "step": self.step, "stage": self.stage, "minutes": self.minutes, "exact": self.exact,
            "config": self.model.config.as_dict(),
        }  # fmt: skip
        replace_text(out / "state.json", json.dumps(record, indent=1))

    def _tails(self, count: int) -> Tensor:
        """The newest block each context sees: an older step's block, or now and then the initial one."""
        initial = self.model.initial_block[:, None].expand(-1, count, -1, -1)
        if self.cache.shape[1] < count:
            return initial
        chosen = self.cache[:, torch.randint(self.cache.shape[1], (count,))]
        fresh = (torch.rand(count) < 0.2).view(1, count, 1, 1)
        return torch.where(fresh, initial, chosen)

    def _old(self, mixture: Mixture) -> Old:
        """How many blocks of earlier steps each group's pool takes; none before there are enough."""
        return mixture.old(self.rng) if self.cache.shape[1] >= CACHE_BLOCKS // 2 else Old(0, 0, 0)

    def _groups(self, count: int, shape: GroupShape, old: Old) -> tuple[list[Group], list[list[int]]]:
        """Groups, and the blocks of earlier steps that each one's pool takes besides its own."""
        picks = [self.rng.sample(range(self.cache.shape[1]), old.count) for _ in range(count)]
        told = [frozenset().union(*(self.cache_keys[pick] for pick in picked)) for picked in picks]
        return [self.corpus.group(shape, keys) for keys in told], picks

    def _order(self, groups: list[Group], picks: list[list[int]], old: Old) -> list[list[int]]:
        """The order in which each group's pool takes the blocks of its bank: the group's own, its old ones and the
        initial one."""
        own = len(groups[0].examples)
        order = []
        for group, picked in zip(groups, picks, strict=True):
            if not group.told:
                order.append([own + old.count] * (own + old.count))
                continue
            blocks = old.order(own, self.rng)
            # What is said later wins, so an old block that speaks of the same goes first.
            keys = group.keys
            same = {own + i for i, pick in enumerate(picked) if self.cache_keys[pick] & keys}
            order.append([b for b in blocks if b in same] + [b for b in blocks if b not in same])
        return order

    def _ranks(self, order: list[list[int]], mixture: Mixture) -> Tensor:
        """The row of the bank at each of the newest window·K ranks of each group's pool, int64 [L, G, window·K], on the
        host."""
        config = self.model.config
        ranks = simulate(
            self.numpy_rng, config.num_layers * len(order), order * config.num_layers, len(order[0]),
            config.num_blocks, config.num_tokens,
        ).reshape(config.num_layers, len(order), -1)  # fmt: skip
        return torch.from_numpy(ranks[:, :, -mixture.window * config.num_tokens :].copy())

    def _bank(self, new: Tensor, ranks: Tensor, picks: list[list[int]]) -> tuple[Tensor, Tensor]:
        """[L, G, C, d]: each group's own blocks, what is left of its old ones, and the initial block; the rows at each
        rank of it."""
        layers, _, k_tokens, d = new.shape
        count = len(picks)
        bank = [new.view(layers, count, -1, d)]
        if picks[0]:
            ranks, kept = compacted(ranks, bank[0].shape[2], len(picks[0]) * k_tokens)
            blocks = torch.tensor(picks).expand(layers, -1, -1).gather(2, kept // k_tokens)
            bank.append(self.cache[torch.arange(layers)[:, None, None], blocks, kept % k_tokens])
        bank.append(self.model.initial_block[:, None].expand(-1, count, -1, -1))
        return torch.cat(bank, 2), ranks

    def loss(self) -> tuple[Tensor, list[float]]:
        """One batch: the loss, and its answer loss, answers known and right, known, unknown and right, unknown."""
        mixtures = self.stages[self.stage].mixtures
        # The same draw in every process, or one would wait for the other.
        draw = random.Random(self.arguments.seed * 1_000_003 + self.step)
        mixture = draw.choices(mixtures, [mixture.share for mixture in mixtures])[0]
        shape, count = mixture.shape, mixture.groups
        if self.stage and self.rng.random() < 0.06:
            shape = replace(shape, in_prompt=0.5)
        old = self._old(mixture)
        groups, picks = self._groups(count, shape, old)
        # with a window of one block a context's own block alone is read
        order = None if mixture.window == 1 else self._order(groups, picks, old)
        ranks = None if order is None else self._ranks(order, mixture)
        if ranks is not None:
            leave_out_forgotten(groups, ranks, self.model.config.num_tokens)
        examples = [example for group in groups for example in group.examples]
        own = len(examples) // count
        ids, lengths = batch_contexts([e.context for e in examples], self.model.config.num_tokens)
        rows, kinds, row_lengths = batch_rows([e.row for e in examples], [e.kinds for e in examples])
        layers = self.model.layer_weights()
        behind = [] if order is None else follows(order, own)
        new = write_behind(self.model, ids, lengths, self._tails(len(examples)), behind, layers)
        bank = new.view(len(new), count, -1, new.shape[-1])
        if ranks is not None:
            bank, ranks = self._bank(new, ranks.to(self.device), picks)
        hidden = self.model.read(
            rows.view(count, own, -1),
            row_lengths.view(count, own),
            self.model.project(bank, layers, ranks),
            layers,
        )
        target, kind = rows[:, 1:], kinds[:, 1:]
        chosen = kind > 0
        real = torch.arange(rows.shape[1]) < row_lengths[:, None]
        logits = self.model.logits(hidden[F.pad(chosen, (0, 1))[real]])
        losses = F.cross_entropy(logits, target[chosen], reduction="none")
        answer_loss = losses[kind[chosen] >= ANSWER].mean()
        loss = answer_loss + self.arguments.question_weight * losses[kind[chosen] == TEXT].mean()
        with torch.no_grad():
            right = torch.ones_like(kind, dtype=torch.bool)
            right[chosen] = logits.argmax(-1) == target[chosen]
            counts = matched(kind, right)
        self.cache = torch.cat([self.cache, new.detach()], 1)[:, -CACHE_BLOCKS:]
        self.cache_keys = (self.cache_keys + [e.keys for e in examples])[-CACHE_BLOCKS:]
        return loss, [answer_loss.item(), *counts]

    def gradients(self, loss: Tensor, numbers: list[float]) -> tuple[dict[str, Tensor], list[float]]:
        """Backward pass; averages gradients and `numbers` over the processes and clips the norm to 1."""
        named = dict(self.model.named_parameters())
        for parameter in named.values():
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        flat = torch.cat(
            [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in named.values()]
            + [torch.tensor(numbers)]
        )
        if self.world > 1:
            dist.all_reduce(flat)
            flat /= self.world
        numbers = flat[-len(numbers) :].tolist()
        flat = flat[: -len(numbers)]
        flat *= 1.0 / max(1.0, float(flat.norm()))
        pieces = torch.split(flat, [p.numel() for p in named.values()])
        return {n: piece.view_as(p) for (n, p), piece in zip(named.items(), pieces, strict=True)}, numbers

    def rate(self) -> float:
        """Learning-rate factor: a short warm-up, constant, then linear decay over the last part of the time."""
        left = 1 - self.minutes / self.arguments.minutes
        decay = self.arguments.decay
        return min(1.0, (self.step + 1) / 150) * (
            1.0 if left > decay else 0.03 + 0.97 * max(0.0, left) / decay
        )

    def run(self) -> None:
        """Train until the time is spent."""
        arguments = self.arguments
        master = self.rank == 0
        saved = logged = last = time.time()
        since: list[list[float]] = []
        while self.minutes < arguments.minutes:
            loss, counts = self.loss()
            now = time.time()
            minutes, last = self.minutes + min(now - last, PAUSE) / 60, now
            gradients, (self.minutes, *counts) = self.gradients(loss, [minutes, *counts])
            factor = self.rate()
            self.optimizer.step(gradients, arguments.rate * factor, arguments.muon_rate * factor)
            self.step += 1
            keep = min(0.99, self.step / (self.step + 10))
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    self.average[name].lerp_(parameter, 1 - keep)
            self.exact += 0.02 * (counts[1] / max(counts[2], 1e-9) - self.exact)
            since.append(counts)
            if self.step % arguments.log_every == 0 and master:
                now = time.time()
                point = Point.of(self.step, self.minutes, self.stages[self.stage].name, since, factor)
                print(point.line(len(since) / (now - logged), arguments.batch * self.world), flush=True)
                point.keep(arguments.out / "curve.csv")
                since, logged = [], now
            if self.exact > self.stages[self.stage].leave_at:
                self.stage, self.exact = self.stage + 1, 0.0
                if master:
                    print(f"--- step {self.step}: on to {self.stages[self.stage].name}", flush=True)
            if master and time.time() - saved > 90:
                self.save()
                saved = time.time()
        if master:
            self.save()
            print(
                f"done after {self.step} steps, {self.step * arguments.batch * self.world} contexts",
                flush=True,
            )


def work(rank: int, arguments: argparse.Namespace) -> None:
    """One process of the run."""
    torch.set_num_threads(1)
    torch.set_default_device(arguments.device)
    if arguments.processes > 1:
        address = f"tcp://127.0.0.1:{arguments.port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=arguments.processes)
    Trainer(arguments, rank).run()


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    add = parser.add_argument
    add("--tokenizer", type=Path, required=True)
    add("--text", type=Path, help="folder of running English, for a few contexts and for unusual words")
    add("--out", type=Path, required=True, help="folder of the run's checkpoints")
    add("--minutes", type=float, required=True, help="the learning rate reaches its end when they are over")
    add("--batch", type=int, default=48, help="contexts a step and process")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--processes", type=int, help="default: 2; on a GPU there is one")
    add("--port", type=int, default=29533)
    add("--rate", type=float, default=3e-3)
    add("--muon-rate", type=float, default=4e-3)
    add("--adamw", action="store_true", help="AdamW for the matrices too")
    add("--question-weight", type=float, default=0.2)
    add("--decay", type=float, default=0.3, help="share of the time the learning rate decays over")
    add("--rope-theta", type=float, default=10_000.0)
    usual = ModelConfig()
    add("--width", type=int, default=usual.hidden_size, help="d; a run that goes on keeps its own sizes")
    add("--layers", type=int, default=usual.num_layers)
    add("--heads", type=int, default=usual.num_heads, help="each of width / heads, an even number")
    add("--inner", type=int, default=usual.intermediate_size, help="width of the feed-forward part")
    add("--log-every", type=int, default=50)
    add("--dtype", choices=DTYPES, default="auto", help="of the matrix products")
    add("--seed", type=int, default=0)
    return parser


def main() -> None:
    parser = options()
    arguments = parser.parse_args()
    if arguments.width % (2 * arguments.heads):
        parser.error("--width has to be an even number of times --heads")
    alone = arguments.device == "cuda"
    if alone and (arguments.processes or 1) != 1:
        parser.error("a GPU takes one process")
    if alone and not torch.cuda.is_available():
        parser.error("torch finds no GPU here")
    arguments.processes = arguments.processes or (1 if alone else 2)
    arguments.out.mkdir(parents=True, exist_ok=True)
    # Fresh pages from the kernel for every large tensor cost a tenth of the time: let glibc keep its memory. Only a
    # new process heeds this, so that one is started even for a single one.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    spawn(work, (arguments,), nprocs=arguments.processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
