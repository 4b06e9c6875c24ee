"""What K and N do to forgetting (MemoryLLM): models of several shapes, trained alike, their retention.

    python -m experiments.forgetting --num-tokens 8 16 --num-blocks 25 50 --minutes 10
    python -m experiments.forgetting --models K16-N800=app/pocket K16-N400=http://127.0.0.1:8001

A block has K tokens, a pool N = K times ``--num-blocks``. Every shape begins with the weights of ``--start`` and is
trained for ``--minutes`` on the curriculum's last stage, with the same seed; or the checkpoints or running servers that
are given are measured as they are. A checkpoint is served by ``memoryllm serve`` on a free port. All are measured by
``experiments.retention``, and judged alike: by "exact" if they are trained here, by "holds" if they are given. What is
trained and measured already is not done again; a model that was trained with other settings is refused, or trained
anew with ``--fresh``.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tokenizers import Tokenizer

from experiments import children, plot, retention
from experiments.closed_form import survival
from experiments.machine import machine
from experiments.served import Served
from experiments.session import conduct, judging, measured, parser
from experiments.tables import percent, print_rows
from training.model import ModelConfig
from training.progress import replace_text
from training.published import load_published, save_published
from training.reshape import begin, reshaped

ADDRESSES = ("http://", "https://")


def hash_of(paths: Iterable[Path], whole: bool) -> str:
    """A short hash of files' names and of what they hold, or only of their sizes. Raises OSError."""
    found = hashlib.sha256()
    for path in sorted(paths):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if whole else path.stat().st_size
        found.update(f"{path.name} {content}\n".encode())
    return found.hexdigest()[:16]


def recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a model's training depends on besides its shape. Raises SystemExit if there is no such file."""
    try:
        start = [arguments.start / name for name in ("config.json", "model.safetensors", "tokenizer.json")]
        text = arguments.text and [path for path in arguments.text.rglob("*") if path.is_file()]
        return {
            "seed": arguments.seed,
            "start": hash_of(start, whole=True),
            "text": text and hash_of(text, whole=False),
            "processes": arguments.processes,
            "minutes": arguments.minutes,
        }
    except OSError as error:
        raise SystemExit(str(error)) from None


def prepared(run: Path, asked: dict[str, Any], fresh: bool) -> None:
    """Makes the folder of a training by this recipe, or goes on with it.

    One of another recipe is removed if ``fresh``; else raises SystemExit.
    """
    record = run / "made.json"
    kept = json.loads(record.read_text()) if record.exists() else {}
    if run.exists() and kept != asked:
        if not fresh:
            others = ", ".join(name for name in asked if kept.get(name) != asked[name])
            raise SystemExit(f"{run} was trained with other settings ({others}); --fresh trains it anew")
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    replace_text(record, json.dumps(asked, indent=1) + "\n")


def trained(arguments: argparse.Namespace, num_tokens: int, num_blocks: int) -> Path:
    """A checkpoint of this shape in the published layout, trained unless it was already."""
    run = arguments.results / arguments.name / f"K{num_tokens}-N{num_tokens * num_blocks}"
    model: Path = run / f"model-{arguments.minutes:g}"
    prepared(run, recipe(arguments), arguments.fresh)
    if model.exists():
        return model
    tokenizer = arguments.start / "tokenizer.json"
    if not (run / "state.json").exists():
        begin(reshaped(load_published(arguments.start), num_tokens, num_blocks), run)
    if arguments.minutes > 0:
        words = [
            "--tokenizer",
            tokenizer,
            "--out",
            run,
            "--minutes",
            arguments.minutes,
            "--seed",
            arguments.seed,
        ]
        text = ["--text", arguments.text] if arguments.text else []
        words = [*words, *text, "--processes", arguments.processes]
        if children.run([sys.executable, "-m", "training.train", *map(str, words)]):
            raise SystemExit(f"the training of {run} failed; the same command goes on from here")
    export(run, tokenizer, model)
    return model


def export(run: Path, tokenizer: Path, model: Path) -> None:
    """The run's averaged weights in the published layout; the folder is there when all of it is."""
    config = ModelConfig(**json.loads((run / "state.json").read_text())["config"])
    part = model.with_name(f"{model.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    save_published(load_file(run / "average.safetensors"), config, Tokenizer.from_file(str(tokenizer)), part)
    part.rename(model)


def measure(arguments: argparse.Namespace, name: str, model: str) -> dict[str, Any]:
    """The retention of one model: a folder or the address of a server; resumed where it was."""
    words = ["--items", str(arguments.items), "--steps", *map(str, arguments.steps)]
    words += ["--seed", str(arguments.seed), "--concurrency", str(arguments.concurrency)]
    words += ["--judge", rule(arguments)]
    given = retention.options().parse_args(words)
    given.results, given.name, given.quiet = arguments.results / arguments.name, name, arguments.quiet
    given.fresh, given.words = arguments.fresh, words
    if model.startswith(ADDRESSES):
        return retained(given, model)
    with tempfile.TemporaryDirectory(prefix="memoryllm-forgetting-") as store:
        log = arguments.results / arguments.name / "journal" / f"{name}.log"
        with Served(Path(model), Path(store) / "store", log) as url:
            return retained(given, url)


def rule(arguments: argparse.Namespace) -> str:
    """One for all models: those that are trained here answer as the pocket model does."""
    chosen: str = arguments.judge or ("holds" if arguments.models else "exact")
    return chosen


def retained(given: argparse.Namespace, url: str) -> dict[str, Any]:
    given.url = url
    return conduct(
        "retention", given, lambda session: retention.Retention(session).run(), retention.extendable(given)
    )


def chart(shapes: dict[str, dict[str, Any]]) -> str:
    """Of every shape the measured retention and, dashed, the closed form of its tokens' survival."""
    curves = []
    for name, told in shapes.items():
        points = [(row["step"], row["memory"]) for row in told["rows"]]
        curves.append(plot.Curve(name, points))
    for name, told in shapes.items():
        k, pool = told["shape"]["num_tokens"], told["shape"]["num_tokens"] * told["shape"]["num_blocks"]
        steps = range(told["rows"][-1]["step"] + 1)
        curves.append(
            plot.Curve(f"{name}: (1 - K/N)^t", [(t, survival(k, pool, t)) for t in steps], dashed=True)
        )
    return plot.line_chart(
        "Forgetting by K and N", "other contexts since", "right", curves, y_range=(0, 1), y_percent=True
    )


def options() -> argparse.ArgumentParser:
    made = parser("forgetting", __doc__)
    judging(made)
    add = made.add_argument
    add("--num-tokens", type=int, nargs="+", default=[8, 16], help="K")
    add("--num-blocks", type=int, nargs="+", default=[25, 50], help="N / K")
    add("--start", type=Path, default=Path("app/pocket"), help="the weights that every shape begins with")
    add("--minutes", type=float, default=10.0, help="of training a shape")
    add("--processes", type=int, default=1, help="of the training, each on a core")
    add("--text", type=Path, help="folder of running English for the training")
    add("--models", nargs="+", metavar="NAME=MODEL", help="measure these instead: folders or addresses")
    add("--items", type=int, default=200)
    add("--steps", type=int, nargs="+", default=[0, 1, 5, 10, 20, 50])
    return made


def checkpoints(arguments: argparse.Namespace) -> dict[str, str]:
    """Names and models, trained first if none are given. Raises SystemExit for a model without a name."""
    if arguments.models is None:
        shapes = [(k, blocks) for k in arguments.num_tokens for blocks in arguments.num_blocks]
        return {f"K{k}-N{k * blocks}": str(trained(arguments, k, blocks)) for k, blocks in shapes}
    named = dict(word.partition("=")[::2] for word in arguments.models)
    if not all(named.values()):
        raise SystemExit("--models takes NAME=MODEL")
    return named


def shape_of(model: Path) -> str:
    """The name of a checkpoint's shape."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    return f"K{config['num_tokens']}-N{config['num_tokens'] * config['num_blocks']}"


def report(
    arguments: argparse.Namespace,
    models: dict[str, str],
    shapes: dict[str, dict[str, Any]],
    words: Sequence[str],
) -> None:
    told = {
        "experiment": "forgetting",
        "command": " ".join(["python", "-m", "experiments.forgetting", *measured(words)]),
        "seed": arguments.seed,
        "machine": machine(*(url for url in models.values() if url.startswith(ADDRESSES))),
        "device": next(iter(shapes.values()))["device"],
        "date": datetime.date.today().isoformat(),
        "judge": rule(arguments),
        "minutes": None if arguments.models else arguments.minutes,
        "start": None if arguments.models else recipe(arguments)["start"],
        "start_shape": None if arguments.models else shape_of(arguments.start),
        "shapes": {
            name: {"fingerprint": one["settings"]["fingerprint"], "shape": one["shape"], "rows": one["rows"]}
            for name, one in shapes.items()
        },
    }
    path = arguments.results / f"{arguments.name}.json"
    path.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    plot.write(path.with_suffix(".svg"), chart(shapes))


def main() -> int:
    arguments = options().parse_args()
    # what is being trained or served ends with this process
    with children.orderly():
        models = checkpoints(arguments)
        shapes = {name: measure(arguments, name, model) for name, model in models.items()}
    report(arguments, models, shapes, sys.argv[1:])
    steps = [row["step"] for row in next(iter(shapes.values()))["rows"]]
    print_rows(
        "right, and tokens left by the closed form",
        ["shape", *(f"{step} since" for step in steps)],
        [
            [
                name,
                *(
                    f"{percent(row['memory'])} ({percent(row['survival']['closed_form'])})"
                    for row in told["rows"]
                ),
            ]
            for name, told in shapes.items()
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
