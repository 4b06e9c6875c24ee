"""Cases of model editing: what is edited, and the prompts that are scored before and after.

zsRE in MEND's form (``zsre_mend_eval.json``) and CounterFact (``counterfact.json``) are published beside ROME,
https://rome.baulab.info/data/dsets/; CounterFact is read in that form and in the flat one of later collections
(``prompt``, ``rephrase_prompt``, ``locality_prompt``, ...). Prompts are built as in the MemoryLLM authors' evaluation
(https://github.com/wangyu-ustc/EditingLlama). Nothing is downloaded here and nothing of the files is kept.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.data import fair_fact, generator
from training.facts import FactGenerator
from training.relations import word_it

KNOWN = 8


@dataclass(frozen=True)
class Probe:
    """A prompt, what should follow it, and for CounterFact what must be less likely; both begin with their space."""

    prompt: str
    target: str
    rival: str | None = None


@dataclass(frozen=True)
class Case:
    """``text`` is told; each list of probes is one measure."""

    text: str
    efficacy: tuple[Probe, ...]
    generalization: tuple[Probe, ...]
    specificity: tuple[Probe, ...]


@dataclass(frozen=True)
class Cases:
    """``worlds`` are texts that a memory holds before; case i begins with a copy of world ``world_of[i]``."""

    kind: str
    cases: list[Case]
    worlds: list[list[str]]
    world_of: list[int]


def _space(text: str) -> str:
    return " " + text.strip()


def zsre(records: list[dict[str, Any]], target: str) -> list[Case]:
    """The answer in ``answers`` (as ROME and MemoryLLM do) or the one in ``alt`` (as MEND does) is the new one."""
    cases = []
    for record in records:
        new = record["answers"][0] if target == "answers" else record["alt"]
        asked = [f"{record[key]} Answer:" for key in ("src", "rephrase")]
        nearby = record["loc"].removeprefix("nq question: ") + "? Answer:"
        cases.append(
            Case(
                f"{asked[0]}{_space(new)}",
                (Probe(asked[0], _space(new)),),
                (Probe(asked[1], _space(new)),),
                (Probe(nearby, _space(record["loc_ans"])),),
            )
        )
    return cases


def counterfact(records: list[dict[str, Any]]) -> list[Case]:
    cases = []
    for record in records:
        if "requested_rewrite" in record:
            asked = record["requested_rewrite"]
            prompt = asked["prompt"].format(asked["subject"])
            new, true = asked["target_new"]["str"], asked["target_true"]["str"]
            rephrased, near = record["paraphrase_prompts"], record["neighborhood_prompts"]
            kept = true
        else:
            prompt, new, true = record["prompt"], record["target_new"], record["ground_truth"]
            rephrased, near = [record["rephrase_prompt"]], [record["locality_prompt"]]
            kept = record["locality_ground_truth"]
        new, true, kept = _space(new), _space(true), _space(kept)
        cases.append(
            Case(
                f"{prompt}{new}.",
                (Probe(prompt, new, true),),
                tuple(Probe(text, new, true) for text in rephrased),
                tuple(Probe(text, kept, new) for text in near),
            )
        )
    return cases


def generated(seed: int, count: int, cases_a_world: int = 10) -> Cases:
    """zsRE's protocol on facts of people who do not exist.

    A memory knows KNOWN facts before; an edit tells one more, of somebody else and another relation. Generalization
    asks in another wording; specificity for one of the facts known before.
    """
    cases: list[Case] = []
    worlds: list[list[str]] = []
    world_of: list[int] = []
    for index in range(count):
        world = index // cases_a_world
        stream = generator(seed + 77, world)
        known = [fair_fact(stream) for _ in range(KNOWN)]
        if len(worlds) == world:
            worlds.append([fact.statement for fact in known])
        draw = generator(seed, index)
        while True:
            fact = fair_fact(draw)
            again = rewording(draw, fact.relation, fact.subject, fact.question)
            if again and fact.relation not in {one.relation for one in known}:
                break
        target = _space(fact.answer)
        kept = random.Random(f"{seed}/{index}").choice(known)
        cases.append(
            Case(
                fact.statement,
                (Probe(fact.question, target),),
                (Probe(again, target),),
                (Probe(kept.question, _space(kept.answer)),),
            )
        )
        world_of.append(world)
    return Cases("generated", cases, worlds, world_of)


def rewording(draw: FactGenerator, relation: str, subject: str | None, question: str) -> str | None:
    """Another wording of the question; None if there is none."""
    found = draw.relations[relation]
    others = [text for text in (word_it(one, subject) for one in found.questions) if text != question]
    return draw.rng.choice(others) if others else None


def read(path: Path, kind: str, count: int, target: str) -> Cases:
    """The first ``count`` cases of a file. Raises ValueError if it is not of this ``kind``."""
    readers: dict[str, Callable[[list[dict[str, Any]]], list[Case]]] = {
        "zsre": lambda records: zsre(records, target),
        "counterfact": counterfact,
    }
    try:
        records = json.loads(path.read_text("utf-8"))
        cases = readers[kind](records[:count])
    except (KeyError, TypeError, IndexError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} is not in the form of {kind}: {error!r}") from None
    return Cases(kind, cases, [[]], [0] * len(cases))
