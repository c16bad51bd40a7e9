"""The trainer: its experts compute what transformers computes, and training repeats bit for bit."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from moescope.data import generate, mixture, sorted_experts, train
from moescope.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    texts = [d.text for name in generate.DOMAINS for d in generate.documents(name, "train", 60)]
    return train_tokenizer(texts, mixture.CONTEXT)


def small_model(seed: int) -> Qwen2MoeForCausalLM:
    torch.manual_seed(seed)
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**{**train.CONFIG, "num_hidden_layers": 1}))


def test_sorted_experts_agree_with_eager_in_values_and_gradients():
    reference = small_model(0)
    model = copy.deepcopy(reference)
    reference.set_experts_implementation("eager")
    sorted_experts.use(model)
    ids = torch.randint(0, 2048, (3, 50), generator=torch.Generator().manual_seed(1))
    losses = [m(input_ids=ids, labels=ids, use_cache=False).loss for m in (reference, model)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(reference.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_balance_loss_is_one_when_balanced_and_grows_when_not():
    uniform = torch.zeros(64, 8)
    uniform[torch.arange(64), torch.arange(64) % 8] = 1e-4  # every expert is chosen as often as any other
    skewed = torch.zeros(64, 8)
    skewed[:, 0] = 10.0
    assert float(train.balance_loss((uniform,), 1)) == pytest.approx(1.0, abs=1e-3)
    assert float(train.balance_loss((skewed,), 1)) == pytest.approx(8.0, rel=0.01)


def test_contexts_are_full_and_begin_a_document(tokenizer):
    counts = mixture.no_counts()
    stream = mixture.contexts(tokenizer, mixture.PHASES[0], counts)
    found = [next(stream) for _ in range(20)]
    assert all(len(ids) == mixture.CONTEXT and ids[0] == tokenizer.bos_token_id for ids in found)
    begun = sum(ids.count(tokenizer.bos_token_id) for ids in found)
    assert sum(int(c.sum()) for c in counts.values()) == 20 * mixture.CONTEXT - begun
    assert all(c.sum() > 0 for c in counts.values())


def test_training_repeats_bit_for_bit(tokenizer):
    weights, phase = [], replace(mixture.PHASES[1], steps=2)
    for _ in range(2):
        model = small_model(5)
        sorted_experts.use(model)
        train.fit(model, mixture.contexts(tokenizer, phase, mixture.no_counts()), phase)
        weights.append(model.state_dict())
    first = small_model(5).state_dict()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], first[name]) for name in first)
