"""Tests of drafts.py: Token Recycling, adaptive lengths, sparse verifiers; nothing is lost.

What Speculation itself promises stands in test_all.py.
"""
import copy

import pytest
import torch

from beyond import drafts, record
from beyond.drafts import speculate
from beyond.tests import conftest
from beyond.tests.conftest import DEVICE, NO_COMPILER, thresholds_of, tokens_like
from generate import generate
from sparsify import sparse_mode, sparsify

KINDS = ["sparse", "recycle", "model"]


def tiny_model(dtype=torch.float64, **changes):
    """Return a small Llama of few tokens, see conftest.py."""
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=8, vocab_size=13)
    return conftest.tiny_model(dtype, **shape | changes)


def draft_of(kind, model):
    """Return (draft, draft_thresholds) for a model that is not sparse; "sparse" makes it so.

    A draft model has other weights: it is often right, and sometimes not.
    """
    if kind == "sparse":
        sparsify(model, thresholds_of(model, 0.0))
        return kind, thresholds_of(model, 0.35)
    if kind == "recycle":
        return kind, None
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    for parameter in other.parameters():
        if parameter.ndim == 2:
            parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter))
    return other, None


# --------------------------------------------------------------------------------------------------
# The same text

@pytest.mark.parametrize("kind", KINDS)
def test_greedy_speculation_is_greedy_decoding(kind):
    model = tiny_model(max_position_embeddings=40)
    prompts = [tokens_like(model, 1 + 9 * seed, seed=seed).tolist() for seed in range(3)]
    texts = [list(generate(model, prompt, 24)) for prompt in prompts]
    assert len(texts[2]) == 21                             # the context ends
    draft, thresholds = draft_of(kind, model)
    right = judged = 0
    for draft_tokens in (1, 3, 16, None):                  # 17 tokens are more than a kernel takes
        for prompt, text in zip(prompts, texts):
            run = speculate(model, prompt, 24, draft, thresholds, draft_tokens)
            assert list(run) == text
            did = run.statistics
            assert did.tokens == len(text) - 1             # the first is the prompt's
            assert did.passes == sum(map(len, did.times.values())) <= did.tokens
            assert did.right <= did.judged                 # at every place
            assert draft_tokens is None or max(did.times) == min(draft_tokens, len(text) - 2)
            right += did.right.total()
            judged += did.judged.total()
    assert 0.15 < right / judged < 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_verifier_may_be_sparse(kind):
    """Then the text is that of `generate` in the mode in force, whatever the draft's thresholds.

    A prompt of one token is sparse in mode "decode", a longer one is not, whatever its parts. What
    others run between two tokens finds the mode and the thresholds as they were.
    """
    model = tiny_model(vocab_size=32, max_position_embeddings=300)
    prompts = [tokens_like(model, length, seed=seed).tolist()
               for length in (1, 2, drafts.PART + 1) for seed in range(3)]
    draft, draft_thresholds = draft_of(kind, model)
    sparsify(model, thresholds_of(model, 0.4, lm_head=0.4))
    before = model.sparse_state.thresholds.clone()
    texts = {}
    for mode in ("off", "decode", "all"):
        with sparse_mode(model, mode):
            texts[mode] = [list(generate(model, prompt, 8)) for prompt in prompts]
            for prompt, text in zip(prompts, texts[mode]):
                run = speculate(model, prompt, 8, draft, draft_thresholds, len(prompt) % 9 + 2,
                                sparse_verifier=True)
                assert run.against == ("the dense model" if mode == "off" else "the sparse model")
                for token in text:
                    assert next(run) == token, (mode, len(prompt))
                    assert model.sparse_state.mode == mode
                    assert torch.equal(model.sparse_state.thresholds, before)
            run = speculate(model, prompts[0], 8, draft, draft_thresholds, 3)
            assert run.against == "the dense model" and list(run) == texts["off"][0]
    firsts = {mode: [text[0] for text in texts[mode][3:]] for mode in texts}
    assert firsts["decode"] == firsts["off"] != firsts["all"]        # of prompts of several tokens
    assert texts["off"] != texts["decode"] != texts["all"]


@NO_COMPILER
@pytest.mark.parametrize("kind", KINDS)
def test_speculation_by_recorded_steps_and_graphs(kind):
    model = tiny_model(torch.float32).to(DEVICE)
    prompt = tokens_like(model, 5).tolist()
    draft, thresholds = draft_of(kind, model)
    sparsify(model, thresholds_of(model, 0.2))
    for mode, sparse_verifier in (("off", False), ("decode", True)):
        with sparse_mode(model, mode):
            text = list(generate(model, prompt, 16))
            for draft_tokens in (3, None):
                run = speculate(model, prompt, 16, draft, thresholds, draft_tokens,
                                sparse_verifier=sparse_verifier, make_step=record.make_step)
                assert list(run) == text
                assert run.step.tapes if DEVICE.type == "cpu" else run.step.graphs


def test_sampled_recycling_draws_what_is_drawn_without_drafts():
    """One draw a token; meanwhile an object of one's own learns, if it can."""
    model = tiny_model()
    for seed in range(3):
        text = list(generate(model, [1, 2], 12, 1.0, seed=seed))
        draft = drafts.RecycleDraft()
        assert list(speculate(model, [1, 2], 12, draft, None, 3, 1.0, seed=seed)) == text
        assert draft.following.keys() >= {1, 2, *text[:-1]} and any(draft.following.values())


# --------------------------------------------------------------------------------------------------
# What drafts learn, and how long they are

def test_recycling_learns_the_likeliest_after_the_last_of_equal_tokens():
    draft = drafts.RecycleDraft()
    logits = torch.randn(4, 13, generator=torch.Generator().manual_seed(0))
    draft.learn(torch.tensor([2, 5, 2, 7]), logits)
    likeliest = logits.argmax(-1).tolist()
    assert draft.following == {2: likeliest[2], 5: likeliest[1], 7: likeliest[3]}
    draft.following |= {2: 5, 5: 9}
    assert draft.guess([9, 2], 4) == ([5, 9, 0, 0], None)


@pytest.mark.parametrize("acceptance, draft_time, verify_time", [
    (0.9, 0.1, lambda rows: 1.0),
    (0.7, 0.3, lambda rows: 1 + 0.05 * rows),
    (0.8, 0.05, lambda rows: 1.0 if rows < 5 else 3.0),
    (0.3, 0.9, lambda rows: float(rows)),                  # no draft is the best
])
@pytest.mark.parametrize("slow", [(), (3, 5), range(4, 12)])       # rounds that are disturbed
def test_the_draft_length_adapts(acceptance, draft_time, verify_time, slow):
    def tokens_a_second(size):
        tokens = sum(acceptance ** i for i in range(size + 1))
        return tokens / (size * draft_time + verify_time(size + 1))

    did = drafts.Statistics()
    torch.manual_seed(0)
    for i in range(300):
        size = did.best_size()
        right = int((torch.rand(size) < acceptance).long().cumprod(0).sum())
        seconds = verify_time(size + 1) * (20 if i in slow else 1)
        did.record(size, right, size * draft_time, seconds)
    best = max(range(8), key=tokens_a_second)
    usual = max(did.times, key=lambda size: len(did.times[size]))
    assert abs(usual - best) <= (best > 0)
    assert did.acceptance[0] == pytest.approx(acceptance, abs=0.12)
    assert best or len(did.times[1]) > 5                   # it tries again
