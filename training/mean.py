"""The mean of two published models, of which one was trained on from the other: `python -m training.mean A B --out C`.

What the second has learnt is mostly there, and what it has lost on the way mostly back (Wortsman et al., 2022,
arXiv 2203.05482).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def mean(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensor by tensor, in the dtype of `one`. Raises ValueError unless names and shapes are the same."""
    if {name: t.shape for name, t in one.items()} != {name: t.shape for name, t in other.items()}:
        raise ValueError("the models differ in their tensors")
    return {name: (0.5 * (t.float() + other[name].float())).to(t.dtype) for name, t in one.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs=2, help="folders that training.published wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of their mean")
    arguments = parser.parse_args()
    one, other = (load_file(folder / "model.safetensors") for folder in arguments.models)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in arguments.models[1].iterdir():
        if path.suffix == ".json":
            shutil.copy(path, arguments.out)
    save_file(mean(one, other), arguments.out / "model.safetensors", metadata={"format": "pt"})
    (arguments.out / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
