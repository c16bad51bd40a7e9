"""Router logits, ids and weights of the same batches by MoEscope, by an nnsight trace and by `run_with_cache`.

Needs both extras (``pip install 'moescope[nnsight,transformer-lens]'``), so it is run by hand:
``python -m tests.benchmarks.backends``. All three run the same weights with eager attention, which a bridge insists on,
and end with the values of every layer on the host. The peers run the language-model head, which MoEscope's capture
leaves out where no loss is wanted; "head too" runs it. They take turns; each turn is compared with MoEscope's own.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import moescope as ms
from moescope.capturing.batches import batches
from moescope.capturing.run import readings
from moescope.data import MODEL
from moescope.hooks import Tap, Want
from moescope.hooks.readings import HostCopy
from tests.benchmarks.capture import BATCH_TOKENS, alternate, build, mixed_lengths

RESULTS = Path(__file__).with_name("backends.json")
ROUNDS = 15
OURS, WITH_HEAD = "moescope", "moescope, head too"
PEERS = ("nnsight trace", "run_with_cache")


def contestants() -> tuple[int, dict[str, Callable[[], Any]]]:
    """Tokens of the batch, and what each peer does with it."""
    from nnsight import NNsight
    from transformer_lens.model_bridge import TransformerBridge

    from moescope.hooks import nnsight as ns
    from moescope.hooks import transformer_lens as tl

    models = [build() for _ in range(4)]
    for model in models:
        model.hf.set_attn_implementation("eager")
    native, plain_model, traced, bridged = models
    batch = next(batches(ms.Corpus(mixed_lengths(200)), native.tokenizer, max_length=512, batch_tokens=BATCH_TOKENS))
    ids, mask = (torch.from_numpy(array) for array in batch.padded(native.pad_id))
    envoy = NNsight(traced.hf)
    bridged.hf.config.architectures = [type(bridged.hf).__name__]
    bridge = TransformerBridge.boot_transformers(
        "qwen3_moe", hf_model=bridged.hf, tokenizer=AutoTokenizer.from_pretrained(MODEL), device="cpu"
    )
    names = tl.names(tl.wrap(bridge, bridged.tokenizer))

    def plain() -> None:
        with torch.inference_mode():
            plain_model.forward(ids, mask)

    def tapped() -> Any:
        return list(readings(native, iter([batch]), Want(logits=True)))

    def tapped_with_head() -> Any:
        with torch.inference_mode(), Tap(native.hf, native.sites, native.semantics, Want(logits=True)) as tap:
            tap.begin(ids.numel(), mask.flatten().nonzero().flatten())
            native.forward(ids, mask)
            return HostCopy(tap.take()).arrays()

    def trace() -> Any:
        values: list[Any] = []
        with torch.inference_mode(), envoy.trace(input_ids=ids, attention_mask=mask):
            for site in traced.sites:
                routed = ns.routed(envoy, traced, site.key)
                values.append(routed.logits.save())
                values.append(routed.ids.save())
                values.append(routed.weights.save())
        return values

    def run_with_cache() -> Any:
        with torch.inference_mode():
            return bridge.run_with_cache(ids, attention_mask=mask, names_filter=names)[1]

    return batch.n_tokens, {
        "plain forward": plain,
        OURS: tapped,
        WITH_HEAD: tapped_with_head,
        PEERS[0]: trace,
        PEERS[1]: run_with_cache,
    }


def same_values(runs: dict[str, Callable[[], Any]]) -> bool:
    """Whether all three give the same router logits, pads aside, for the first and the last layer."""
    (batch, ours), traced, cached = runs[OURS]()[0], runs[PEERS[0]](), runs[PEERS[1]]()
    lengths = [len(sequence) for sequence in batch.sequences]
    keys = sorted({name[1] for name in ours})
    caches = [value for name, value in cached.items() if name.endswith("gate.hook_out")]
    for layer in (0, len(keys) - 1):
        want = torch.from_numpy(ours[("site", keys[layer], "logits")])
        for values in (traced[3 * layer], caches[layer]):
            rows = values.reshape(len(lengths), -1, values.shape[-1])
            if not torch.equal(torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)]), want):
                return False
    return True


def measure() -> dict[str, Any]:
    """Tokens per second of each, and MoEscope's speed over each peer's, with and without the head."""
    tokens, runs = contestants()
    same = same_values(runs)
    seconds = alternate(runs, ROUNDS)
    return {
        "tokens": tokens,
        "values_equal": same,
        "tokens_per_second": {name: tokens / statistics.median(taken) for name, taken in seconds.items()},
        "times_faster": {
            ours: {
                name: statistics.median(theirs / own for theirs, own in zip(seconds[name], seconds[ours], strict=True))
                for name in PEERS
            }
            for ours in (OURS, WITH_HEAD)
        },
    }


def main() -> None:
    """Measure, print, and write the results file; `make bench` puts it into the README."""
    from importlib.metadata import version

    results = {
        "model": "Qwen3-MoE, 8 layers x 512, 64 experts, top-8, float32, eager attention",
        "versions": {name: version(name) for name in ("torch", "transformers", "nnsight", "transformer_lens")},
        "machine": f"{torch.get_num_threads()} CPU threads",
        **measure(),
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
