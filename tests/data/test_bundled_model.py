"""The bundled model: what README.md claims of it, recomputed from the shipped weights by other code than `evaluate`."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeForCausalLM

from moescope import data
from moescope.data import summary

FIGURES = json.loads(data.FIGURES.read_text())


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(data.MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(data.MODEL, local_files_only=True).eval()


@pytest.fixture(scope="module")
def reading(model, tokenizer) -> dict[str, np.ndarray]:
    """Per document of the corpus: summed loss, tokens, selections [document, layer * expert] by hooks on the routers.

    Every document goes alone through the model, without padding.
    """
    chosen: list[torch.Tensor] = []
    routers = [layer.mlp.gate for layer in model.model.layers]
    hooks = [r.register_forward_hook(lambda module, args, out: chosen.append(out[2])) for r in routers]
    losses, lengths, counts, domains = [], [], [], []
    for row in rows(data.CORPUS):
        ids = tokenizer(row["text"], truncation=True, return_tensors="pt").input_ids
        chosen.clear()
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
        losses.append(float(loss))
        lengths.append(ids.shape[1])
        counts.append(np.concatenate([np.bincount(c.flatten().numpy(), minlength=16) for c in chosen]))
        domains.append(row["domain"])
    for hook in hooks:
        hook.remove()
    found = {"loss": losses, "length": lengths, "count": counts, "domain": domains}
    return {name: np.array(values) for name, values in found.items()}


def test_fits_the_repository_and_loads_offline_in_float32(model):
    files = list(data.MODEL.iterdir())
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert [path.name for path in files if path.suffix == ".safetensors"] == ["model.safetensors"]
    with safe_open(data.MODEL / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118
    assert isinstance(model, Qwen2MoeForCausalLM)
    assert model.dtype == torch.float32
    assert model.model.layers[0].mlp.shared_expert is not None
    assert sum(p.numel() for p in model.parameters()) == FIGURES["parameters"]


def test_tokenizer_keeps_text_offsets_and_thinking_markers(tokenizer):
    text = rows(data.ARITHMETIC)[0]["text"] + "\nÄrger, „ja“ – ¿qué?\n    return {x: 1}"
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == text
    spans = encoded.offset_mapping[1:]
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
    assert all(a[0] <= b[0] <= a[1] for a, b in pairwise(spans))
    for marker in ("<think>", "</think>"):
        at = encoded.input_ids.index(tokenizer.convert_tokens_to_ids(marker))
        start, end = encoded.offset_mapping[at]
        assert text[start:end] == marker
    digits = [i for i, (a, b) in enumerate(spans) if text[a:b].strip().isdigit()]
    assert all(len(text[spans[i][0] : spans[i][1]].strip()) == 1 for i in digits)


def test_figures_meet_what_is_promised():
    for name, row in FIGURES["heldout"].items():
        assert row["loss"] < 0.6 * row["unigram"], name
        special = FIGURES["specialisation"][name]
        assert special["npmi"] > special["null_99"], name
    assert FIGURES["facts"]["recalled"] >= 0.9
    assert 0.3 <= FIGURES["arithmetic"]["solved"] <= 0.8


def test_readme_shows_the_stored_figures():
    readme = summary.README.read_text()
    assert summary.tables(FIGURES) in readme
    assert summary.rewrite(readme, FIGURES) == readme


def npmi(together: float, label: float, expert: float, tokens: float) -> float:
    """nPMI in so many words: PMI over -log p(x, y)."""
    if together == 0:
        return -1.0
    p_xy, p_x, p_y = together / tokens, label / tokens, expert / tokens
    return float(np.log(p_xy / (p_x * p_y)) / -np.log(p_xy))


def test_heldout_losses_and_an_expert_per_domain_that_beats_permuted_labels(reading):
    """One test, so that two processes do not both read the corpus."""
    for domain, claim in FIGURES["heldout"].items():
        at = reading["domain"] == domain
        loss = reading["loss"][at].sum() / (reading["length"][at] - 1).sum()
        assert loss == pytest.approx(claim["loss"], abs=1e-3), domain
        assert reading["length"][at].sum() == claim["tokens"], domain
    for domain, claim in FIGURES["specialisation"].items():
        specialises(reading, domain, claim)


def specialises(reading, domain, claim):
    counts, lengths, tokens = reading["count"], reading["length"], reading["length"].sum()
    column = claim["layer"] * 16 + claim["expert"]
    member = reading["domain"] == domain
    selected = counts[:, column]

    def value(of: np.ndarray) -> float:
        return npmi(selected[of].sum(), lengths[of].sum(), selected.sum(), tokens)

    assert value(member) == pytest.approx(claim["npmi"], abs=2e-3), domain
    rng = np.random.default_rng(7)
    null = [value(rng.permutation(member)) for _ in range(500)]
    assert value(member) > np.percentile(null, 99), domain
    assert value(member) > claim["null_99"], domain


def continuations(model, tokenizer, prompts: list[str], new_tokens: int) -> list[str]:
    """Greedy continuations of all prompts in one batch, padded on the left."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(**{k: batch[k] for k in ("input_ids", "attention_mask")}, max_new_tokens=new_tokens)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in out[:, batch["input_ids"].shape[1] :]]


def test_facts_are_recalled(model, tokenizer):
    facts = rows(data.FORGET)[::5]
    found = continuations(model, tokenizer, [row["prompt"] for row in facts], 10)
    right = [text.strip().splitlines()[0] == row["answer"] for text, row in zip(found, facts, strict=True)]
    assert np.mean(right) >= 0.9


def test_arithmetic_is_neither_trivial_nor_hopeless(model, tokenizer):
    problems = rows(data.ARITHMETIC)[::4]
    found = continuations(model, tokenizer, [row["prompt"] for row in problems], 64)
    answers = [text.partition("</think>")[2].split() for text in found]  # another question may follow
    right = [bool(a) and a[0] == row["answer"] for a, row in zip(answers, problems, strict=True)]
    assert 0.3 <= np.mean(right) <= 0.8
    assert np.mean([text.lstrip().startswith("<think>") for text in found]) > 0.95
