"""What decoding under edits costs, on the bundled model: ratios in one run, the contestants taking turns.

Self-contrast (both streams in one doubled batch) against plain greedy decoding and against two separate forward passes
with a cache each, and greedy decoding under a recipe against none: an idle one, whose rows are not in the batch, and an
active one in every layer. Batch 1 and 8, the same number of tokens for all.

`python -m tests.benchmarks.decoding` writes the results file; what the answers are worth is in `answers`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, Qwen2MoeForCausalLM

import moescope as ms
from moescope import decoding
from moescope.decoding.contrast import weak_routing
from moescope.edits.edit import Rows
from moescope.hooks import Model
from tests.benchmarks.capture import alternate

RESULTS = Path(__file__).with_name("decoding.json")
TOKENS, ROUNDS = 48, 5
# What transformers calls the key-value cache changed in 5.24.
CACHE = "cache" if "cache" in inspect.signature(Qwen2MoeForCausalLM.forward).parameters else "past_key_values"
PLAIN, CONTRAST, TWO, IDLE, ACTIVE = "plain", "self-contrast", "two forwards", "idle recipe", "active recipe"
OVER = ((CONTRAST, PLAIN), (CONTRAST, TWO), (IDLE, PLAIN), (ACTIVE, PLAIN))


class _Never(LogitsProcessor):
    """Never ends, so that every contestant writes as many tokens."""

    def __init__(self, end: int) -> None:
        self._end = end

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores[:, self._end] = -torch.inf
        return scores


class Contestants:
    """Ways of writing the same number of tokens after the same prompt.

    Args:
        model: the model.
        batch: rows, all of them the same prompt.
        tokens: how many each writes.
    """

    def __init__(self, model: Model, batch: int, tokens: int) -> None:
        self._model, self._tokens = model, tokens
        prompt = "Question: What is 8 + 3 * 9?\nAnswer:"
        self._ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"].expand(batch, -1)
        self._end = int(model.hf.generation_config.eos_token_id)
        self._contrast, self._weak = decoding.SelfContrast(model), weak_routing(model)

    def ways(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Name -> what writes, and gives ids [batch, prompt + tokens]."""
        layers = [site.layer for site in self._model.sites]
        absent = Rows(batch=(10**6,))
        idle = ms.Recipe([ms.Scale(layer=layer, expert=0, factor=2.0, rows=absent) for layer in layers])
        active = ms.Recipe([edit(layer) for layer in layers for edit in (_scale, _mask)])
        return {
            PLAIN: self.greedy,
            CONTRAST: lambda: self.greedy(custom_generate=self._contrast),
            TWO: self.two_forwards,
            IDLE: lambda: self.under(idle),
            ACTIVE: lambda: self.under(active),
        }

    def greedy(self, **more: Any) -> torch.Tensor:
        """Greedy decoding by `generate`."""
        with torch.inference_mode():
            return self._model.hf.generate(
                self._ids, attention_mask=torch.ones_like(self._ids), max_new_tokens=self._tokens, do_sample=False,
                logits_processor=LogitsProcessorList([_Never(self._end)]), pad_token_id=self._model.pad_id, **more,
            )  # fmt: skip

    def under(self, recipe: ms.Recipe) -> torch.Tensor:
        """The same, with a recipe live."""
        with self._model.edited(recipe, check=False):
            return self.greedy()

    def two_forwards(self) -> torch.Tensor:
        """Each token: a pass with the model's routing and one with the weak routing, each with its own cache."""
        caches: list[Any] = [None, None]
        step, written = self._ids, [self._ids]
        with torch.inference_mode():
            for _ in range(self._tokens):
                strong = self._pass(step, caches, 0)
                with self._model.edited(self._weak, check=False):
                    weak = self._pass(step, caches, 1)
                z = self._contrast.scores(strong, weak)
                z[:, self._end] = -torch.inf
                step = z.argmax(-1, keepdim=True)
                written.append(step)
        return torch.cat(written, -1)

    def _pass(self, step: torch.Tensor, caches: list[Any], stream: int) -> torch.Tensor:
        options = {} if caches[stream] is None else {CACHE: caches[stream]}
        output = self._model.hf(input_ids=step, use_cache=True, **options)
        caches[stream] = getattr(output, CACHE)
        return output.logits[:, -1].float()


def _scale(layer: int) -> Any:
    return ms.Scale(layer=layer, expert=0, factor=2.0)


def _mask(layer: int) -> Any:
    return ms.Mask(layer=layer, expert=1)


def speed(model: Model, batch: int, tokens: int = TOKENS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Milliseconds per token of each way of decoding, and ratios within each turn (their median)."""
    seconds = alternate(Contestants(model, batch, tokens).ways(), rounds)  # type: ignore[arg-type]
    return {
        "milliseconds_per_step": {name: 1000 * statistics.median(taken) / tokens for name, taken in seconds.items()},
        "time_over": {
            f"{one} over {other}": statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))
            for one, other in OVER
        },
    }


def main() -> None:
    """Measure, print and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    model = ms.load("tiny-qwen-moe")
    results = {
        "model": "tiny-qwen-moe",
        "machine": f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}",
        "tokens": options.tokens,
        "speed": {f"batch {batch}": speed(model, batch, options.tokens, options.rounds) for batch in (1, 8)},
    }
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
