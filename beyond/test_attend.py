"""Tests of attend.py and longtext.py: which positions are read, and that nothing else changes."""
import contextlib
import functools
import io
import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernel
from beyond import __main__ as beyond
from beyond import attend, drafts, longtext, quantize, record
from beyond.attend import Plan, read_less
from beyond.conftest import random_llama
from generate import StaticCache, generate, plain_step
from model import DEMO, InputError, command_line, linear_names, load_model
from model import attend as whole_attention
from sparsify import sparsify

needs_c = pytest.mark.skipif(kernel.c_function(torch.float32) is None, reason="no C compiler")


def tiny_model(dtype=torch.float64, seed=0, **changes):
    """Return a small Llama with three query heads on each of two key-value heads."""
    shape = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=5, num_attention_heads=6,
                 num_key_value_heads=2, head_dim=8, vocab_size=31, max_position_embeddings=256)
    return random_llama(dtype, seed, **shape | changes)


def tokens_of(model, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator)


def random_qkv(S, dtype=torch.float64, seed=0, H=6, G=2, D=8):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(1, heads, rows, D, generator=generator, dtype=torch.float64).to(dtype)
            for heads, rows in ((H, 1), (G, S), (G, S)))


def mask_of(S, first, end):
    """Return a mask (1, S) that shows the positions from `first` to before `end`."""
    position = torch.arange(S)
    return ((position >= first) & (position < end))[None]


# --------------------------------------------------------------------------------------------------
# Choosing

@pytest.mark.parametrize("K, first, recent", [(1, 0, 1), (2, 1, 1), (3, 2, 1), (8, 4, 4),
                                              (64, 4, 32), (128, 4, 64), (1000, 4, 64)])
def test_the_first_and_the_last_positions_are_always_read(K, first, recent):
    assert attend.always_read(K) == (first, recent)
    S = 1200
    scores = torch.zeros(1, 2, S)
    scores[0, 0, 500:600] = 1
    scores[0, 1, 700:800] = -1
    positions = attend.pick(scores, mask_of(S, 0, 1100), K)
    assert positions.shape == (1, 2, K)
    expected = {*range(first), *range(1100 - recent, 1100)}
    for of_head in positions[0].tolist():
        assert len(set(of_head)) == K and expected <= set(of_head) <= set(range(1100))
    others = set(positions[0, 0].tolist()) - expected
    assert len(others & set(range(500, 600))) == min(100, len(others))


@pytest.mark.parametrize("mask", [None, mask_of(90, 0, 90), mask_of(90, 0, 61), mask_of(90, 30, 61),
                                  mask_of(90, 50, 61)])
@pytest.mark.parametrize("K", [7, 40])
def test_those_with_the_largest_scores_are_picked(mask, K):
    scores = torch.randn(1, 2, 90, generator=torch.Generator().manual_seed(0))
    positions = attend.pick(scores.clone(), mask, K)
    shown = range(90) if mask is None else mask[0].nonzero().flatten().tolist()
    first, recent = attend.always_read(K)
    for row, of_head in zip(scores[0], positions[0].tolist()):
        always = {s for s in shown if s < first or s > shown[-1] - recent}
        rest = sorted(set(shown) - always, key=lambda s: -row[s])
        expected = always | set(rest[:K - len(always)])
        assert len(set(of_head)) == K
        assert set(of_head) & set(shown) == expected


@pytest.mark.parametrize("over", ["sum", "max"])
@pytest.mark.parametrize("shared", [False, True])
def test_scores_of_positions(over, shared):
    q, k, _ = random_qkv(40)
    scores = attend.products(q, k, None, over, shared)
    each = torch.einsum("hd,hsd->hs", q[0, :, 0], k[0].repeat_interleave(3, 0))     # (H, S)
    groups = each[None] if shared else each.unflatten(0, (2, 3))
    expected = groups.sum(1) if over == "sum" else groups.amax(1)
    assert torch.allclose(scores[0].double(), expected, atol=1e-5)
    assert torch.equal(attend.recency(q, k, None, over, shared)[0, 0], torch.arange(40.0))


@pytest.mark.parametrize("S", [48, 41])
def test_a_page_has_no_product_above_its_bound(S):
    q, k, _ = random_qkv(S)
    bounds = attend.page_bounds(q, k, None, "max", False)
    assert bounds.shape == (1, 2, S)
    assert (attend.products(q, k, None, "max", False) <= bounds + 1e-6).all()
    pages = bounds[..., :32].unflatten(-1, (2, 16))
    assert (pages == pages[..., :1]).all()
    alone = q.clone()
    alone[..., 1:] = 0                                     # with one channel the bound is reached
    bounds = attend.page_bounds(alone, k, None, "max", False)[..., :32].unflatten(-1, (2, 16))
    scores = attend.products(alone, k, None, "max", False)[..., :32].unflatten(-1, (2, 16))
    assert torch.allclose(bounds[..., 0], scores.amax(-1))


# --------------------------------------------------------------------------------------------------
# Attention to what was chosen

def by_hand(q, k, v, mask, positions):
    """Return attention over positions, head by head."""
    S = k.shape[2]
    heads = []
    for h in range(q.shape[1]):
        g = h * k.shape[1] // q.shape[1]
        listed = positions[0, g if positions.shape[1] > 1 else 0]
        if mask is not None:
            listed = listed[mask[0][listed]]
        assert len(listed.unique()) == len(listed) <= S
        scores = k[0, g, listed] @ q[0, h, 0] * q.shape[-1] ** -0.5
        heads.append(scores.softmax(-1) @ v[0, g, listed])
    return torch.stack(heads)[None, :, None]


@pytest.mark.parametrize("mask", [None, mask_of(50, 0, 44), mask_of(50, 20, 33)])
@pytest.mark.parametrize("heads", [1, 2])
def test_attention_to_chosen_positions(mask, heads):
    q, k, v = random_qkv(50)
    scores = torch.randn(1, heads, 50, generator=torch.Generator().manual_seed(1))
    positions = attend.pick(scores, mask, 17)
    expected = by_hand(q, k, v, mask, positions)
    assert torch.allclose(attend.attend_to(q, k, v, mask, positions), expected, atol=1e-12)


def recorded(forward, *inputs):
    """Return what forward computes of tensors, and what does so again, all of it in C."""
    tape = record.Tape(torch.nn.Module(), inputs)
    with tape:
        results = forward(*inputs)
    assert tape.notes and not any(callable(each) for each in tape.notes)
    tape.finish()
    return results, tape.replay


def chosen_and_attended(q, k, v, mask, K, over="sum", shared=False):
    """Return (scores, positions, attention) of a layer that chooses for itself."""
    scores = attend.products(q, k, mask, over, shared)
    positions = attend.pick(scores, mask, K)
    return scores, positions, attend.attend_to(q, k, v, mask, positions)


@needs_c
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02),
                                              (torch.float16, 0.002)])
@pytest.mark.parametrize("over, shared", [("sum", False), ("max", False), ("sum", True),
                                          ("max", True)])
@pytest.mark.parametrize("first, end", [(0, 300), (0, 290), (100, 250), (200, 240)])
@pytest.mark.parametrize("threads", [1, 5])
def test_c_does_what_pytorch_does(monkeypatch, dtype, tolerance, over, shared, first, end, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    S, K = 300, 100                                        # as much as is shared by threads
    q, k, v = random_qkv(S, dtype, D=136)
    k[:, :, end:] = v[:, :, end:] = float("nan")           # what comes after is not read
    mask = mask_of(S, first, end)
    (scores, positions, y), replay = recorded(
        functools.partial(chosen_and_attended, K=K, over=over, shared=shared), q, k, v, mask)
    scores.fill_(7)
    positions.zero_()
    y.zero_()
    replay()
    assert (scores[..., ~mask[0]] == 7).all()              # no products with hidden keys
    shown = mask[0][positions]
    exact = attend.products(*(x.double().nan_to_num() for x in (q, k)), mask, over, shared)
    expected = attend.pick(exact, mask, K)
    if dtype == torch.float32:                             # in others float32 sums differ
        for row, others in zip(positions[0], expected[0]):
            assert row.tolist() == sorted(row.tolist())
            assert set(row[mask[0][row]].tolist()) == set(others[mask[0][others]].tolist())
    assert (shown.sum(-1) == min(K, end - first)).all()
    exact = by_hand(*(x.double() for x in (q, k, v)), mask, positions)
    assert (y - exact).norm() <= tolerance * exact.norm()


@needs_c
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("first, end", [(0, 300), (0, 289), (120, 260)])
def test_threads_share_a_group(monkeypatch, threads, first, end):
    """All of the cache, by as many threads as there are, which the two groups do not divide by."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    q, k, v = random_qkv(300, torch.float32, D=136)
    k[:, :, end:] = v[:, :, end:] = float("nan")
    mask = mask_of(300, first, end)
    y, replay = recorded(whole_attention, q, k, v, mask)
    y.zero_()
    replay()
    exact = by_hand(*(x.double() for x in (q, k, v)), mask, torch.arange(300)[None, None])
    assert (y - exact).norm() <= 1e-5 * exact.norm()


@needs_c
def test_c_shows_nan():
    q, k, v = random_qkv(300, torch.float32)
    mask = mask_of(300, 0, 300)
    (_, positions, y), replay = recorded(functools.partial(chosen_and_attended, K=20), q, k, v,
                                         mask)
    k[0, 1, 100, 3] = float("nan")
    replay()
    assert 100 in positions[0, 1] and 100 not in positions[0, 0]
    assert y[0, 3:].isnan().all() and y[0, :3].isfinite().all()


@needs_c
def test_c_leaves_to_pytorch_what_it_does_not_know():
    q, k, _ = random_qkv(40, torch.float32)
    mask = mask_of(40, 0, 30)
    assert attend.fits_c(mask, q, k)
    numbers = torch.zeros(1, 40).masked_fill(~mask, float("-inf"))
    for others in ((None, q), (numbers, q), (mask, q, k.half()), (mask, q.double()),
                   (mask, q.expand(2, -1, -1, -1)), (mask, k.mT)):
        assert not attend.fits_c(*others)


# --------------------------------------------------------------------------------------------------
# In the model

PLANS = [Plan(20, (0, 1, 3)), Plan(20, (0, 2), over="max"), Plan(20, (1,), shared=False),
         Plan(20, (0,), by="window"), Plan(32, (0, 1), by="pages"),
         Plan(20, (), by="pages", shared=False), Plan(20, (3,), over="max", shared=False),
         Plan(1, (2,)), Plan(20, ())]


@torch.no_grad()
def reference(model, tokens, plan, past):
    """Return the logits after each of tokens (1, N) from `past` on, layer by layer, by masks.

    All tokens run at once; each sees what it would choose, in a mask (G, N, N) of its own.
    """
    N = tokens.shape[1]
    config = model.config
    G = config.num_key_value_heads
    position = torch.arange(N)
    causal = position <= position[:, None]
    if config.sliding_window:
        causal &= position > position[:, None] - config.sliding_window
    chosen = None

    def attention(layer, q, k, v, _):
        nonlocal chosen
        heads = k.repeat_interleave(q.shape[1] // G, 1)
        values = v.repeat_interleave(q.shape[1] // G, 1)
        sees = causal.expand(G, N, N).clone()
        if layer == 0:
            chosen = None
        if plan.chooses(layer) or chosen is None and layer not in plan.layers:
            by = plan.by if plan.chooses(layer) else "window"
            chosen = causal.expand(G, N, N).clone()
            for t in range(past, N):
                if t + 1 > plan.positions:
                    scores = attend.SCORES[by](q[:, :, t:t + 1], k[:, :, :t + 1], None, plan.over,
                                               plan.shared)
                    picked = attend.pick(scores, causal[None, t, :t + 1].reshape(1, -1),
                                         plan.positions)
                    chosen[:, t] = False
                    chosen[:, t].scatter_(1, picked[0].expand(G, -1), True)
                    chosen[:, t] &= causal[t]
        if layer not in plan.layers:
            sees = chosen
        return F.scaled_dot_product_attention(q, heads, values,
                                              attn_mask=sees.repeat_interleave(q.shape[1] // G, 0))

    attends = [block.self_attn.attend for block in model.model.layers]
    for layer, block in enumerate(model.model.layers):
        block.self_attn.attend = lambda *qkvm, layer=layer: attention(layer, *qkvm)
    logits = model(tokens)[0, past:]
    for block, own in zip(model.model.layers, attends):
        block.self_attn.attend = own
    return logits


@torch.no_grad()
def steps(model, tokens, past, make_step=plain_step, length=None):
    """Return the logits after each of tokens (1, N) from `past` on, one by one."""
    cache = model.make_cache(1, length or tokens.shape[1])
    model(tokens[:, :past], cache)
    step = make_step(model, cache)
    return torch.cat([step(tokens[:, t:t + 1]).clone()[0] for t in range(past, tokens.shape[1])])


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("window", [None, 30])
def test_a_step_reads_what_was_planned(plan, window):
    model = tiny_model(sliding_window=window)
    tokens = tokens_of(model, 70)
    expected = reference(model, tokens, plan, 10)          # the first steps see less than K
    whole = steps(model, tokens, 10)
    read_less(model, plan)
    ours = steps(model, tokens, 10)
    assert torch.allclose(ours, expected, atol=1e-9)
    reads_less = plan.positions < (window or 70)
    assert ((ours - whole)[30:].norm() > 0.01 * whole[30:].norm()) == reads_less
    few = min(plan.positions, 70) - 10
    assert few <= 0 or torch.allclose(ours[:few], whole[:few], atol=1e-12)
    with model.reading.switched(False):
        assert torch.equal(steps(model, tokens, 10), whole)
    assert torch.equal(model(tokens[:, :50]), tiny_model(sliding_window=window)(tokens[:, :50]))


@torch.no_grad()
@pytest.mark.parametrize("make_step", [plain_step, pytest.param(record.make_step, marks=needs_c)])
@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan.by != "pages"], ids=str)
def test_nothing_else_is_read(monkeypatch, plan, make_step):
    """What was not chosen may be no number at all."""
    model = tiny_model(torch.float32)
    sparsify(model, dict.fromkeys([*linear_names(model.config), "lm_head"], 0.0))
    read_less(model, plan)
    tokens = tokens_of(model, 61)
    cache = model.make_cache(1, 64)
    model(tokens[:, :60], cache)
    chosen = []
    attend_to = attend.attend_to
    with monkeypatch.context() as patch:
        patch.setattr(attend, "attend_to",
                      lambda *arguments: chosen.append(arguments[-1]) or attend_to(*arguments))
        expected = model(tokens[:, 60:], cache)
    cache.used = 60
    step = make_step(model, cache)
    layers = [layer for layer in range(5) if layer not in plan.layers]
    assert len(chosen) == len(layers)
    for layer, positions in zip(layers, chosen):
        unread = torch.ones(2, 64, dtype=torch.bool).scatter_(1, positions[0].expand(2, -1), False)
        assert (unread[:, :61].sum(1) == 61 - plan.positions).all()
        for states in (cache.keys, cache.values):
            states[layer, 0, unread] = float("nan")
    assert (step(tokens[:, 60:]) - expected).norm() <= 1e-4 * expected.norm()


@needs_c
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("window", [None, 30])
def test_a_recorded_step_reads_the_same(plan, window):
    model = tiny_model(torch.float32, sliding_window=window)
    sparsify(model, dict.fromkeys([*linear_names(model.config), "lm_head"], 0.0))
    tokens = tokens_of(model, 70)
    read_less(model, plan)
    expected = steps(model, tokens, 10)
    ours = steps(model, tokens, 10, record.make_step, length=100)
    assert (ours - expected).norm() <= 1e-4 * expected.norm()


@needs_c
def test_all_of_a_recorded_step_is_c():
    """The operations of the chapter, too: Python is left for the embedding and the angles."""
    model = tiny_model(torch.bfloat16)
    sparsify(model, dict.fromkeys([*linear_names(model.config), "lm_head"], 0.0))
    numbers = []
    for plan in (None, Plan(20, (0, 1, 3)), Plan(20, (0, 3), over="max", shared=False)):
        if plan:
            read_less(model, plan)
        cache = model.make_cache(1, 100)
        model(tokens_of(model, 50), cache)
        tape, = record.make_step(model, cache).tapes.values()
        numbers.append(sum(callable(each) for each in tape.notes))
    assert numbers[0] == numbers[1] == numbers[2]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("numbers", [False, True])
def test_a_static_step_reads_the_same(plan, window, numbers):
    """So a CUDA graph does: the cache has one length, K is fixed, and the mask is added."""
    model = tiny_model(sliding_window=window)
    read_less(model, plan)
    tokens = tokens_of(model, 70)

    def static_step(model, cache):
        static = StaticCache(cache, 1)
        if numbers:
            static.numbers = cache.keys.new_zeros(()), cache.keys.new_full((), float("-inf"))

        def step(tokens):
            static.follow(cache, 1, model.config.sliding_window)
            logits = model(tokens, static)
            cache.advance(1)
            return logits
        return step
    ours = steps(model, tokens, 10, static_step, length=100)
    assert torch.allclose(ours, steps(model, tokens, 10), atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_texts_side_by_side_choose_for_themselves(plan):
    model = tiny_model()
    read_less(model, plan)
    tokens = torch.cat((tokens_of(model, 50), tokens_of(model, 50, seed=1)))
    cache = model.make_cache(2, 50)
    model(tokens[:, :-1], cache)
    together = model(tokens[:, -1:], cache)[:, 0]
    alone = torch.cat([steps(model, text[None], 49) for text in tokens])
    assert torch.allclose(together, alone, atol=1e-9)


def test_a_second_plan_takes_the_place_of_the_first():
    model = tiny_model()
    tokens = tokens_of(model, 60)
    read_less(model, Plan(20, (0, 1, 3)))
    read_less(model, Plan(12, (0, 2)))
    expected = reference(model, tokens, Plan(12, (0, 2)), 30)
    assert torch.allclose(steps(model, tokens, 30), expected, atol=1e-9)


def test_the_share_that_is_read_is_counted():
    model = tiny_model(sliding_window=50)
    reading = read_less(model, Plan(20, (0, 3)))
    step = attend.make_step
    steps(model, tokens_of(model, 63), 10, lambda *a: step(*a, make_step=plain_step))
    seen = [min(n, 50) for n in range(11, 64)]
    assert reading.there == 5 * sum(seen)
    assert reading.read == sum(2 * n + 3 * min(n, 20) for n in seen)
    assert reading.share == reading.read / reading.there
    reading.reset()
    assert reading.share == 1.0
    assert Plan(20, (0,), by="pages").read(100, 5) == 100 + 4 * (20 + 7)


# --------------------------------------------------------------------------------------------------
# What you read is what runs

def test_another_attention_is_left_alone(capsys):
    def capped(q, k, v, mask):
        return 0.5 * original(q, k, v, mask)
    model = tiny_model()
    original = model.model.layers[2].self_attn.attend
    model.model.layers[2].self_attn.attend = capped
    tokens = tokens_of(model, 60)
    whole = steps(model, tokens, 30)
    reading = read_less(model, Plan(20, (0, 1)))
    said = capsys.readouterr().err
    assert said.count("attend.py steps aside") == 1 and "layer 2" in said
    make_step = attend.make_step
    assert torch.equal(steps(model, tokens, 30, lambda *a: make_step(*a, make_step=plain_step)),
                       whole)
    assert reading.share == 1.0


# --------------------------------------------------------------------------------------------------
# Texts

@torch.no_grad()
@pytest.mark.parametrize("draft_tokens", [1, 3, None])
def test_speculation_loses_nothing(draft_tokens):
    model = tiny_model()
    sparsify(model, dict.fromkeys(linear_names(model.config), 0.0))
    prompt = tokens_of(model, 50)[0].tolist()
    text = list(generate(model, prompt, 40))
    reading = read_less(model, Plan(16, (0, 3)))
    reading.active = False
    thresholds = dict.fromkeys(linear_names(model.config), 0.2)
    run = drafts.speculate(model, prompt, 40, "sparse", thresholds, draft_tokens,
                           kind=attend.Speculation, make_step=attend.make_step)
    assert list(run) == text
    assert not reading.active
    assert draft_tokens is None or reading.there > 0       # the draft has read less
    assert reading.share < 1 or not reading.there


@pytest.mark.parametrize("draft", ["recycle", "a model"])
def test_other_drafts_read_as_they_did(draft):
    model = tiny_model()
    draft = tiny_model(seed=1) if draft == "a model" else draft
    prompt = tokens_of(model, 50)[0].tolist()
    text = list(generate(model, prompt, 20))
    reading = read_less(model, Plan(16, (0, 3)))
    reading.active = False
    run = drafts.speculate(model, prompt, 20, draft, draft_tokens=3, kind=attend.Speculation)
    assert list(run) == text
    assert not reading.there


def command(monkeypatch, *options, main=beyond.main):
    """Return what python -m beyond, or another `main`, prints with options."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, options), "--device", "cpu"])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main()
    return out.getvalue()


measured = functools.partial(command, main=longtext.main)


PROMPT = Path(attend.__file__).read_text()[:600]


def test_the_command_line(monkeypatch):
    options = ["--prompt", PROMPT, "--max-new-tokens", 16, "--temperature", 0]
    whole = command(monkeypatch, *options, "--sparsity", 0)
    compared = command(monkeypatch, *options, "--attend", 64)
    texts = [out.split("--- ")[1].split("\n", 1)[1] for out in (whole, compared)]
    assert texts[0] == texts[1]                            # the dense text reads everything
    assert "100.0% of the cache read" in compared
    assert "--- 50% sparse, 64 positions: 16 tokens" in compared
    for by in attend.SCORES:
        out = command(monkeypatch, *options, "--sparsity", 0, "--attend", 32, "--attend-by", by,
                      "--attend-layers", 0, 2)
        assert 0.2 < float(out.split("% of the cache read")[0].split(" ")[-1]) / 100 < 0.7
    drafted = command(monkeypatch, *options, "--draft", "sparse", "--attend", 32, "--compare")
    assert "the same text, all 16 tokens" in drafted and "the draft read" in drafted


@pytest.mark.parametrize("options, message", [
    (["--attend", "0"], "argument --attend: 0 is not a whole number above 0"),
    (["--attend", "-3"], "argument --attend: -3 is not a whole number above 0"),
    (["--attend", "513"], "--attend 513, expected 1 to 512, the model's context"),
    (["--attend", "64", "--attend-layers", "1", "7", "-1"],
     "--attend-layers -1 7, expected numbers from 0 to 6, the model's layers"),
    (["--attend-layers", "1"], "--attend-layers is for --attend, which is not given"),
    (["--attend-heads", "own"], "--attend-heads is for --attend, which is not given"),
    (["--attend", "64", "--attend-by", "luck"], "argument --attend-by: invalid choice: 'luck'"),
    (["--attend", "64", "--draft", "recycle"],
     "--attend with --draft recycle: --draft sparse alone has steps that read less"),
    (["--attend", "64", "--draft", "sparse", "--model", "random:llama-3.2-1b"],
     "--attend is not for the table of what guesses cost"),
])
def test_bad_options(monkeypatch, options, message):
    with pytest.raises(InputError) as refused:
        command(monkeypatch, *options)
    assert message in str(refused.value)


def test_a_bad_option_ends_the_program_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["beyond", "--attend", "100000"])
    with pytest.raises(SystemExit) as ended:
        command_line(beyond.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# longtext.py

def test_the_best_layers_are_those_of_all_choices():
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(7, 6, generator=generator, dtype=torch.float64)
    costs[torch.arange(7)[:, None] > torch.arange(6)] = float("inf")

    def paid(layers):
        last, total = -1, 0.0
        for layer in range(6):
            if layer in layers:
                last = layer
            else:
                total += costs[last + 1, layer].item()
        return total
    for count in range(7):
        total, layers = longtext.best_layers(costs, count)
        every = min(paid(layers) for layers in itertools.combinations(range(6), count))
        assert len(layers) == count
        assert total == pytest.approx(paid(layers)) == pytest.approx(every)


@torch.no_grad()
@pytest.mark.parametrize("scored", [20, 1])
def test_what_it_costs_to_take_over_is_what_steps_lose(scored):
    """The costs, found for many tokens at once, are those of tokens that are read one by one."""
    model = tiny_model()
    tokens = tokens_of(model, 60)[0]
    plan = Plan(16, ())
    costs = longtext.costs_of_taking_over(model, tokens, scored, plan)
    expected = model(tokens[None])[0, -scored:].log_softmax(-1)
    for layers in ((0, 1, 2, 3), (0, 1, 3, 4), (1, 2, 3, 4)):
        read_less(model, Plan(16, layers))
        log_p = steps(model, tokens[None], 60 - scored).log_softmax(-1)
        kl = F.kl_div(log_p, expected, reduction="sum", log_target=True).item() / scored
        borrower = min(set(range(5)) - set(layers))
        assert costs[borrower, borrower] == pytest.approx(kl, rel=1e-5) and kl > 1e-6
    assert all(costs[i, layer] == float("inf") for layer in range(5) for i in range(layer + 1, 6))


@torch.no_grad()
def test_losses_are_those_of_the_whole_text():
    model = tiny_model()
    tokens = tokens_of(model, 61)[0]
    cache = longtext.behind(model, tokens[:40], 20)
    setting = longtext.Setting("dense", "whole", 1, Plan(256, ()))
    losses = longtext.losses_behind(model, cache, 40, tokens[40:], setting)
    logits = model(tokens[None, :60])[0, 40:]
    assert torch.allclose(losses, F.cross_entropy(logits, tokens[41:], reduction="none"), atol=1e-9)


def test_a_needle_is_hidden_at_the_end_of_a_line():
    _, tokenizer = load_model(DEMO)
    lines = "one two\nthree four\nfive six seven\neight\n" * 5
    text = torch.tensor(tokenizer.encode(lines, bos=False))
    for depth in (0.05, 0.5, 0.95):
        tokens, question = longtext.hide(tokenizer, text, 48217, "Oslo", depth)
        written = tokenizer.decode(tokens.tolist())
        sentence = "\nThe secret number of Oslo is 48217.\n"
        assert written.count(sentence) == 1
        before = written.index(sentence)
        assert before == 0 or written[before - 1] == "\n"
        assert abs(before / (len(written) - len(sentence)) - depth) < 0.1
        assert tokenizer.decode(question.tolist()) == "\nThe secret number of Oslo is"


def test_each_measurement_runs(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text(Path(attend.__file__).read_text() * 2)
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__", "training"))
    text = ["--model", folder, "--text", text]
    common = [*text, "--context", 96]
    out = measured(monkeypatch, "layers", *common, "--texts", 1, "--part", 8, "--scored", 12,
                   "--count", 2)
    layers = json.loads((folder / "attend.json").read_text())["layers"]
    assert len(layers) == 2 and out.endswith(f"attend.json: {layers[0]} {layers[1]}\n")
    costs = [float(line.split()[1]) for line in out.splitlines()[2:-1]]
    assert costs == sorted(costs, reverse=True) and costs[-1] < costs[0]
    to = ["--out", tmp_path]
    common += ["--parts", 8]
    out = measured(monkeypatch, "perplexity", *common, *to, "--scored", 12, "--texts", 1)
    rows = [line.split() for line in out.splitlines()[2:]]
    assert [row[2] for row in rows] == 2 * ["whole", "tidal", "window", "pages"]
    assert {row[1] for row in rows[:4]} == {"0.0%"} and "0.0%" not in {row[1] for row in rows[4:]}
    assert [row[4] for row in rows[:2]] == ["100.0%", rows[2][4]] and rows[2][4] < "50"
    assert f"layers that read all: {layers[0]} {layers[1]}" in out
    out += measured(monkeypatch, "needle", *common, *to, "--prompts", 3, "--by", "tidal")
    assert out.count(" of  3") == 2
    out += measured(monkeypatch, "draft", *text, *to, "--behind", 60, "--texts", 1, "--part", 8,
                    "--max-new-tokens", 8)
    assert out.splitlines()[-5].split()[0] == "none" and "50% sparse, less cache" in out
    assert not list(tmp_path.glob("*.partial"))
    for name in ("perplexity", "needle", "draft"):
        told = (tmp_path / f"attend_{name}.txt").read_text()
        assert told in out and told
        assert (tmp_path / f"attend_{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_speed_is_measured(monkeypatch):
    monkeypatch.setattr(longtext, "memory_bandwidth", lambda device: 1e10)
    out = measured(monkeypatch, "speed", "--behind", 40, 80, "--part", 4)
    rows = [line.split() for line in out.splitlines()[3:]]
    assert [row[0] for row in rows] == ["40", "80"]
    assert all(float(row[5][:-1]) > 0 and row[6].endswith("%") for row in rows)


def test_the_bytes_of_a_step():
    model = tiny_model(torch.bfloat16)
    names = linear_names(model.config)
    blocks = sum(model.get_submodule(name).weight.numel() for name in names)
    head = model.lm_head.weight.numel()
    expected = 2 * (0.75 * blocks + head + 100 * 2 * 2 * 8)
    assert longtext.bytes_read(model, 0.25, 100) == expected
    sparsify(model, dict.fromkeys(names, 0.0))
    assert longtext.bytes_read(model, 0.25, 100) == expected
    model = quantize.quantize(tiny_model(torch.bfloat16), 8)
    blocks = sum(model.get_submodule(name).weight_t.nbytes for name in names)
    head = model.lm_head.weight_t.nbytes
    assert longtext.bytes_read(model, 0.25, 100) == 0.75 * blocks + head + 2 * 100 * 2 * 2 * 8


@torch.no_grad()
def test_interrupted_work_goes_on(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text(Path(attend.__file__).read_text())
    options = ["perplexity", "--text", text, "--context", 64, "--scored", 8, "--texts", 2,
               "--parts", 8, "--by", "tidal", "--sparsity", 0, "--out", tmp_path]
    expected = measured(monkeypatch, *options)
    losses_behind, left = longtext.losses_behind, [3]

    def interrupted(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return losses_behind(*arguments)
    monkeypatch.setattr(longtext, "losses_behind", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(monkeypatch, *options)
    assert (tmp_path / "attend_perplexity.partial").exists()
    left[0] = 1                          # of four there is one left
    assert measured(monkeypatch, *options) == expected
    left[0] = 3
    with pytest.raises(KeyboardInterrupt):
        measured(monkeypatch, *options)
    left[0] = 4                          # with another --scored all are
    assert "of the last 9 of 64 tokens" in measured(monkeypatch, *options, "--scored", 9)


def test_an_interrupted_draft_counts_for_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(longtext, "stream", lambda *_: ([1, 2, 3], 0.1, 0.1, True))
    text = tmp_path / "text.txt"
    text.write_text(PROMPT)
    with pytest.raises(KeyboardInterrupt):
        measured(monkeypatch, "draft", "--text", text, "--behind", 60)


@pytest.mark.parametrize("options, message", [
    (["perplexity", "--model", "random:llama-3.2-1b"], "has random weights: only its speed"),
    (["perplexity", "--context", "513"], "--context 513 does not fit the model's context of 512"),
    (["perplexity", "--context", "100"], "--scored 512, expected less than the 100 tokens of"),
    (["speed", "--behind", "512"], "--behind 512 does not fit the model's context of 512"),
    (["needle", "--out", "nowhere"], "nowhere is no folder; see --out"),
    (["needle", "--context", "64"], "--context 64, expected more than 64: so many are for the"),
    (["layers", "--count", "8"], "--count 8, expected at most 7, the model's layers"),
    (["draft", "--behind", "40", "--max-new-tokens", "1"], "--max-new-tokens 1, expected at least"),
    (["heat"], "invalid choice: 'heat'"),
    (["speed", "--behind", "40", "--attend-layers", "9"], "--attend-layers 9, expected numbers"),
])
def test_bad_options_of_measurements(monkeypatch, options, message):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(longtext, "memory_bandwidth", lambda device: 1e10)
    with pytest.raises(InputError) as refused:
        measured(monkeypatch, *options)
    assert message in str(refused.value)


@pytest.mark.parametrize("layers", ["[0, 7]", "3", "[-1]", "[true]", "null"])
def test_a_bad_file_of_layers_is_refused(tmp_path, layers):
    (tmp_path / "attend.json").write_text(f'{{"layers": {layers}}}')
    with pytest.raises(InputError, match="attend.json: layers is .*, expected a list of numbers"):
        attend.layers_beside(tmp_path, tiny_model(num_hidden_layers=7).config)
    assert attend.layers_beside("random:x", tiny_model(num_hidden_layers=9).config) == [2, 5, 8]
    assert attend.layers_beside("random:x", tiny_model(num_hidden_layers=1).config) == [0]
