"""Begin a run from a published model with another K or N, so that models of several shapes are trained alike.

`python -m training.reshape --model app/pocket --num-tokens 8 --num-blocks 50 --out RUN`; then `training.train --out
RUN` goes on with the last stage of the curriculum.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from training.model import MemoryModel
from training.optimizer import Optimizer
from training.progress import replace_text
from training.published import load_published
from training.stages import curriculum
from training.train import MATRICES


def reshaped(model: MemoryModel, num_tokens: int, num_blocks: int) -> MemoryModel:
    """The same weights with blocks of `num_tokens`: the initial block, [L, K, d], is cut short, or repeated."""
    made = MemoryModel(replace(model.config, num_tokens=num_tokens, num_blocks=num_blocks))
    state = model.state_dict()
    times = torch.arange(num_tokens) % model.config.num_tokens
    state["initial_block"] = state["initial_block"][:, times]
    made.load_state_dict(state)
    return made


def begin(model: MemoryModel, out: Path) -> None:
    """Write a run that has taken no step and stands in the last stage."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    for name in ("weights", "average"):
        save_file(state, out / f"{name}.safetensors")
    save_file(Optimizer(model, MATRICES).state, out / "optimizer.safetensors")
    record = {
        "step": 0,
        "stage": len(curriculum(48, model.config.num_blocks)) - 1,
        "minutes": 0.0,
        "exact": 0.0,
    }
    replace_text(out / "state.json", json.dumps(record | {"config": model.config.as_dict()}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a folder that training.published wrote")
    parser.add_argument("--num-tokens", type=int, required=True, help="K, the tokens of a block")
    parser.add_argument("--num-blocks", type=int, required=True, help="N / K")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    arguments = parser.parse_args()
    begin(
        reshaped(load_published(arguments.model), arguments.num_tokens, arguments.num_blocks), arguments.out
    )


if __name__ == "__main__":
    main()
