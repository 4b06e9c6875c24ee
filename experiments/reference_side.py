"""The official implementation at work, as a subprocess: one JSON request a line in, one JSON answer a line out.

Run by ``experiments.reference`` under an interpreter that can import the official repository; hence nothing
of this package is imported here. The model does what its own ``generate`` and ``inject_memory`` do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any, TextIO


class Reference:
    """The official model, loaded from a checkpoint in the published format."""

    def __init__(self, checkout: str, checkpoint: str, threads: int, attention: str) -> None:
        import torch

        sys.path.insert(0, checkout)
        import transformers
        from modeling_memoryllm import MemoryLLM  # type: ignore[import-not-found]

        torch.set_num_threads(threads)
        self.torch = torch
        self.versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
        }
        self.model = MemoryLLM.from_pretrained(
            checkpoint, torch_dtype=torch.float32, attn_implementation=attention
        ).eval()
        # from_pretrained leaves a memory of the checkpoint's; updates are timed from that state each time
        self.memory = self.model.memory.data

    def generate(self, prompt: list[int], tokens: int, want_logits: bool) -> dict[str, Any]:
        """Greedy ``tokens``; ``times``: seconds from the call until each token's logits were there."""
        torch, model = self.torch, self.model
        times: list[float] = []
        logits: list[list[float]] = []

        def note(ids: Any, scores: Any) -> Any:
            times.append(time.perf_counter() - start)
            if want_logits:
                logits.append(scores[0].tolist())
            return scores

        ids = torch.tensor([prompt])
        with torch.inference_mode():
            start = time.perf_counter()
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
                logits_processor=[note],
                pad_token_id=0,
                eos_token_id=None,
            )
        return {"times": times, "tokens": out[0, len(prompt) :].tolist(), "logits": logits}

    def update(self, context: list[int], want_block: bool) -> dict[str, Any]:
        """One ``inject_memory(update_memory=True)``; ``block`` is the new tokens' sum over layers and d, [K]."""
        torch, model = self.torch, self.model
        ids = torch.tensor([context])
        with torch.inference_mode():
            start = time.perf_counter()
            delta = model.inject_memory(ids, update_memory=True)
            seconds = time.perf_counter() - start
        model.memory.data = self.memory
        block = delta[0] if delta.dim() == 4 else delta
        return {"seconds": seconds, "block": block.sum(dim=(0, 2)).tolist() if want_block else []}


def serve(reference: Reference, answers: TextIO) -> None:
    """Answers until standard input ends."""
    print(json.dumps(reference.versions), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        kind = request.pop("do")
        answer = reference.generate(**request) if kind == "generate" else reference.update(**request)
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkout", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--attention", default="sdpa")
    arguments = parser.parse_args()
    # the official code prints to standard output; answers get a descriptor of their own
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    reference = Reference(arguments.checkout, arguments.checkpoint, arguments.threads, arguments.attention)
    serve(reference, answers)


if __name__ == "__main__":
    main()
