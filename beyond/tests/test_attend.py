"""Tests of attend.py and lab/longtext.py: which positions are read, and nothing else changes."""
import functools
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from beyond import __main__ as beyond
from beyond import attend, record
from beyond.attend import Plan, read_less
from beyond.lab import longtext
from beyond.tests import conftest
from beyond.tests.conftest import close, refused, tokens_like
from generate import plain_step
from model import DEMO, load_model, load_tokenizer
from model import attend as whole_attention
from sparsify import sparsify

needs_c = pytest.mark.skipif(record.c_functions() is None, reason="no C compiler")
PROMPT = Path(attend.__file__).read_text()[:600]


def tiny_model(dtype=torch.float64, **changes):
    """Return a small Llama with three query heads on each of two key-value heads, sparse at 0."""
    shape = dict(hidden_size=48, num_hidden_layers=5, num_attention_heads=6, head_dim=8,
                 vocab_size=31, max_position_embeddings=256)
    return sparsify(conftest.tiny_model(dtype, threshold=0.0, **shape | changes), {"lm_head": 0.0})


def random_qkv(S, D=8):
    """Return q of six heads, k and v of two, of S positions."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, rows, D, generator=generator, dtype=torch.float64)
            for heads, rows in ((6, 1), (2, S), (2, S))]


def mask_of(S, first, end):
    """Return a mask (1, S) that shows the positions from `first` to before `end`."""
    position = torch.arange(S)
    return ((position >= first) & (position < end))[None]


# --------------------------------------------------------------------------------------------------
# Choosing, and attention to the chosen positions

@pytest.mark.parametrize("by", attend.SCORES)
@pytest.mark.parametrize("K", [1, 3, 20])
@pytest.mark.parametrize("shows", [None, (0, 61), (30, 61), (50, 61)])
@pytest.mark.parametrize("numbers", [False, True])
def test_the_positions_with_the_largest_scores_are_chosen_and_attended_to(by, K, shows, numbers):
    """By hand: scores, the K largest of them, and attention head by head."""
    q, k, v = random_qkv(90)
    shown = list(range(*(shows or (0, 90))))
    mask = mask_of(90, *shows) if shows else None
    if shows and numbers:                # as a CUDA graph has it: added to q kᵀ
        mask = torch.zeros(1, 90).double().masked_fill(~mask, -torch.inf)
    positions = attend.choose(q, k, mask, K, by)
    products = torch.einsum("hd,hsd->hs", q[0, :, 0], k[0].repeat_interleave(3, 0))
    scores = {"tidal": products, "window": torch.arange(90.0).expand(6, 90)}.get(by)
    if by == "pages":                    # a page whose last positions are not there ends earlier
        pages = [k[0, :, start:min(start + 16, shown[-1] + 1)].repeat_interleave(3, 0)
                 for start in range(0, shown[-1] + 1, 16)]
        bounds = [torch.maximum(q[0] * page.amax(1, keepdim=True),
                                q[0] * page.amin(1, keepdim=True)).sum(-1) for page in pages]
        scores = torch.cat(bounds, 1).repeat_interleave(16, 1)
    first, recent = {1: (0, 1), 3: (2, 1), 20: (4, 10)}[K]
    always = {s for s in shown if s < first or s > shown[-1] - recent}
    rest = sorted(set(shown) - always, key=lambda s: -scores.sum(0)[s])
    expected = sorted(always | set(rest[:K - len(always)]))
    chosen = positions.flatten().tolist()
    assert len(set(chosen)) == K and sorted({*chosen} & {*shown}) == expected
    known = v.clone()
    unread = [s for s in range(90) if s not in chosen]
    k[:, :, unread] = v[:, :, unread] = float("nan")       # nothing else is read
    y = attend.attend_to(whole_attention, q, k, v, mask, positions)
    for h in range(6):
        weights = (products[h, expected] * 8 ** -0.5).softmax(-1)
        assert torch.allclose(y[0, h, 0], weights @ known[0, h // 3, expected], atol=1e-12)


def choose_and_attend(q, k, v, mask):
    positions = attend.choose(q, k, mask, 100, "tidal")
    return positions, attend.attend_to(whole_attention, q, k, v, mask, positions)


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("first, end", [(0, 300), (0, 290), (100, 250), (200, 240)])
def test_c_does_what_pytorch_does(monkeypatch, dtype, threads, first, end):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    q, k, v = random_qkv(300, D=136)                       # as much as is shared by threads
    q, k, v = q.float(), k.to(dtype), v.to(dtype)
    mask = mask_of(300, first, end)
    expected, exact = choose_and_attend(q.double(), k.double(), v.double(), mask)
    k[:, :, end:] = v[:, :, end:] = float("nan")           # positions to come are not read
    tape = record.Tape([q, k, v, mask])
    with tape:
        positions, y = choose_and_attend(q, k, v, mask)
    tape.finish(y)
    assert tape.notes and not any(map(callable, tape.notes))
    positions.zero_()
    y.zero_()
    tape.replay()
    row = positions.flatten().tolist()
    assert row == sorted(row)
    seen = {*range(first, end)}
    assert {*row} & seen == {*expected.flatten().tolist()} & seen
    assert close(y, exact)
    k[0, 1, end - 90, 3] = float("nan")                    # NaN scores highest, and shows
    tape.replay()
    assert y[0, 3:].isnan().all() == (end - 90 >= first)
    assert end - 90 < first or end - 90 in positions


# --------------------------------------------------------------------------------------------------
# In the model

PLANS = [Plan(20, (0, 1, 3)), Plan(20, (1,)), Plan(20, (0,), by="window"),
         Plan(32, (0, 1), by="pages"), Plan(1, (2,)), Plan(20, ())]


def by_masks(model, tokens, plan, past):
    """Return the logits after each of tokens (1, N) from `past` on, all tokens at once.

    Each of them sees what it would choose, in a mask (N, N), those before `past` all.
    """
    N = tokens.shape[1]
    sees = torch.ones(N, N, dtype=torch.bool).tril().triu(1 - (model.config.sliding_window or N))
    chosen = None

    def attention(layer, q, k, v, _):
        nonlocal chosen
        own = plan.by if plan.chooses(layer) else "window" if chosen is None else None
        if own and (plan.chooses(layer) or layer not in plan.layers):
            chosen = longtext.choices(q, k, sees, plan.positions, own).reshape(-1, N, N)[0]
            chosen[:past] = sees[:past]
        return whole_attention(q, k, v, sees if layer in plan.layers else chosen)

    for layer, block in enumerate(model.model.layers):
        block.self_attn.attend = functools.partial(attention, layer)
    return model(tokens)[0, past:]


def steps(model, tokens, past, make_step=plain_step):
    """Return the logits after each of tokens (B, N) from `past` on, one by one."""
    cache = model.make_cache(len(tokens), 100)
    model(tokens[:, :past], cache)
    step = make_step(model, cache)
    return torch.cat([step(tokens[:, t:t + 1])[:, 0].clone() for t in range(past, tokens.shape[1])])


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("window", [None, 26])
@pytest.mark.parametrize("dtype, make_step", [(torch.float64, plain_step),
                                              (torch.float32, record.make_step)])
def test_a_step_reads_what_was_planned(plan, window, dtype, make_step):
    """The first steps see less than K positions, the last ones more."""
    model = tiny_model(dtype, sliding_window=window)
    tokens = tokens_like(model, 1, 44)
    whole = steps(model, tokens, 16)
    read_less(model, Plan(12, (0, 2)))                     # the second plan counts
    reading = read_less(model, plan)
    ours = steps(model, tokens, 16, make_step)
    assert close(ours[-8:], whole[-8:], 0.01) == (plan.positions >= (window or 44))
    reading.active = False
    assert close(steps(model, tokens, 16, make_step), whole)
    assert close(ours, by_masks(model, tokens, plan, 16))


def test_texts_side_by_side_choose_for_themselves():
    model = tiny_model()
    tokens = tokens_like(model, 2, 50)
    for plan in PLANS:
        read_less(model, plan)
        alone = torch.cat([steps(model, text[None], 49) for text in tokens])
        assert torch.allclose(steps(model, tokens, 49), alone, atol=1e-5)


def test_the_share_that_is_read():
    config = tiny_model(sliding_window=50).config
    seen = [min(n, 50) for n in range(11, 64)]
    read = sum(2 * n + 3 * min(n, 20) for n in seen)
    assert Plan(20, (0, 3)).share(config, 10, 63) == read / (5 * sum(seen))
    assert Plan(20, (0,), by="pages").share(config, 49, 50) == (50 + 4 * (20 + 4)) / 250
    assert Plan(20, (0,)).share(config, 10, 10) == 1.0


def test_another_attention_is_followed_or_left_alone(capsys):
    """One that is the same in any order of the positions is given the chosen ones."""
    def half(q, k, v, mask):
        return 0.5 * whole_attention(q, k, v, mask)

    def recent(q, k, v, mask):
        return whole_attention(q, k * torch.arange(k.shape[2])[:, None] / k.shape[2], v, mask)

    for attention, stays in ((half, False), (recent, True)):
        model = tiny_model()
        model.model.layers[2].self_attn.attend = attention
        tokens = tokens_like(model, 1, 60)
        whole = steps(model, tokens, 30)
        reading = read_less(model, Plan(20, (0, 1)))
        said = capsys.readouterr().err
        assert torch.equal(steps(model, tokens, 30), whole) == stays
        assert (reading.plan.share(model.config, 30, 60) == 1) == stays
        assert said.count("attend.py steps aside") == said.count("of layer 2 depends") == stays


def test_the_command_line(run):
    write = functools.partial(run, beyond, "--prompt", PROMPT, "--max-new-tokens", 16,
                              "--temperature", 0, "--device", "cpu")
    whole, compared = write("--sparsity", 0), write("--attend", 64)
    texts = [out.split("--- ")[1].split("\n", 1)[1] for out in (whole, compared)]
    assert texts[0] == texts[1]                            # the dense text reads everything
    assert "--- 50% sparse, 64 positions: 16 tokens" in compared
    for by in attend.SCORES:
        out = write("--sparsity", 0, "--attend", 32, "--attend-by", by, "--attend-layers", 0, 2)
        assert 0.2 < float(out.split("% of the cache read")[0].split()[-1]) / 100 < 0.7


# --------------------------------------------------------------------------------------------------
# lab/longtext.py

def test_the_best_layers_are_those_of_all_choices():
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(7, 6, generator=generator, dtype=torch.float64)
    costs[torch.arange(7)[:, None] > torch.arange(6)] = float("inf")

    def paid(layers):
        last = [max([other for other in layers if other < layer], default=-1) for layer in range(6)]
        return sum(costs[last[layer] + 1, layer].item() for layer in {*range(6)} - {*layers})
    for count in range(7):
        total, layers = longtext.best_layers(costs, count)
        every = min(map(paid, itertools.combinations(range(6), count)))
        assert len(layers) == count
        assert total == pytest.approx(paid(layers)) == pytest.approx(every)


def test_what_it_costs_to_take_over_is_what_steps_lose():
    """The costs, found for many tokens at once, are those of tokens that are read one by one."""
    model = tiny_model()
    tokens = tokens_like(model, 60)
    costs = longtext.costs_of_taking_over(model, tokens, 20, 16)
    expected = model(tokens[None])[0, -20:].log_softmax(-1)
    for layers in ((0, 1, 2, 3), (0, 1, 3, 4), (1, 2, 3, 4)):
        read_less(model, Plan(16, layers))
        log_p = steps(model, tokens[None], 40).log_softmax(-1)
        kl = F.kl_div(log_p, expected, reduction="sum", log_target=True).item() / 20
        borrower = min({*range(5)} - {*layers})
        assert costs[borrower, borrower] == pytest.approx(kl, rel=1e-3) and kl > 1e-6
    assert all(costs[i, layer] == float("inf") for layer in range(5) for i in range(layer + 1, 6))


def test_a_needle_is_hidden_at_the_end_of_a_line():
    tokenizer = load_tokenizer(DEMO)
    text = torch.tensor(tokenizer.encode("one two\nthree four\nfive six seven\n" * 5, bos=False))
    for depth in (0.05, 0.5, 0.95):
        tokens, question = longtext.hide(tokenizer, text, 48217, "Oslo", depth)
        assert tokenizer.decode(question.tolist()) == "\nThe secret number of Oslo is"
        written = tokenizer.decode(tokens.tolist())
        before, after = written.split("\nThe secret number of Oslo is 48217.\n")
        assert not before or before.endswith("\n")
        assert abs(len(before) / len(before + after) - depth) < 0.1


def test_each_measurement_runs(run, tmp_path):
    pytest.importorskip("matplotlib")
    text, folder = tmp_path / "text.txt", tmp_path / "model"
    text.write_text(Path(attend.__file__).read_text())
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__", "training"))
    common = ["--model", folder, "--text", text, "--context", 96, "--device", "cpu"]
    out = run(longtext, "layers", *common, "--texts", 1, "--part", 8)
    layers = json.loads((folder / "attend.json").read_text())["layers"]
    assert len(layers) == 2 and out.endswith(f"attend.json: {layers[0]} {layers[1]}\n")
    costs = [float(line.split()[1]) for line in out.splitlines()[2:-1]]
    assert costs == sorted(costs, reverse=True) and costs[-1] < costs[0]
    common += ["--parts", 8, "--out", tmp_path]
    told = run(longtext, "perplexity", *common, "--texts", 1)
    rows = [line.split() for line in told.splitlines()[2:]]
    assert [row[1] for row in rows] == 2 * ["whole", "tidal", "window", "pages"]
    model, tokenizer = load_model(DEMO)
    tokens = torch.tensor(tokenizer.encode(text.read_text()))[:97]
    loss = F.cross_entropy(model(tokens[None, :96])[0, 48:].double(), tokens[49:])
    assert float(rows[0][4]) == pytest.approx(loss.exp().item(), rel=1e-3)
    assert rows[0][3] == "100.0%" and rows[1][3] == rows[2][3] < "50"
    assert f"layers that read all: {layers[0]} {layers[1]}; sparse weights: " in told
    assert told == (tmp_path / "attend_perplexity.txt").read_text()
    needle = run(longtext, "needle", *common, "--prompts", 3, "--by", "tidal")
    assert needle.count(" of  3") == 2
    out = run(longtext, "speed", "--behind", 40, 80, "--part", 4, "--out", tmp_path)
    assert [line.split()[0] for line in out.splitlines()[3:]] == ["40", "80"]
    for name in ("perplexity", "needle", "speed"):
        assert (tmp_path / f"attend_{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_bytes_of_a_step(run):
    row = run(longtext, "sizes", "--model", "random:llama-2-7b").splitlines()[-1]    # the README's
    assert row.split() == "llama-2-7b 13,214 6,738 0.524 524 2,097 4,194 16,777".split()


def test_the_file_of_layers(tmp_path):
    for count, default in ((9, (2, 5, 8)), (1, (0,))):
        config = tiny_model(num_hidden_layers=count).config
        assert attend.layers_of(tmp_path, config) == default
    for layers in ("[0, 1]", "3", "[-1]", "null"):
        (tmp_path / "attend.json").write_text(f'{{"layers": {layers}}}')
        with refused(match="attend.json: layers is .*, expected a list of numbers"):
            attend.layers_of(tmp_path, config)
