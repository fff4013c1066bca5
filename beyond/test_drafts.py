"""Tests of drafts.py: trees, Token Recycling, adaptive lengths, and that nothing is lost."""
import itertools

import pytest
import torch

import kernel
from beyond import drafts, record
from beyond.conftest import random_llama
from beyond.drafts import TreeCache, chain, draft_tree, speculate
from generate import Sampling, generate, plain_step
from model import Config, InputError, Llama, linear_names
from sparsify import sparse_mode, sparsify

CPU = torch.device("cpu")
KINDS = ["sparse", "recycle", "model"]


def tiny_verifier(dtype=torch.float64, seed=0, **changes):
    """Return a small Llama, see conftest.py."""
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=8, vocab_size=13, max_position_embeddings=64)
    return random_llama(dtype, seed, **shape | changes)


def prompt_like(model, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()


def disturbed(model, noise, sign=1):
    """Return a copy with other weights: a draft that is often right, and sometimes not.

    sign -1: with the head negated, so that it is always wrong.
    """
    torch.manual_seed(5)
    other = Llama(model.config).to(model.device, model.dtype).eval()
    for theirs, own in zip(other.parameters(), model.parameters()):
        theirs.requires_grad_(False)
        theirs.copy_(own)
        if own.ndim == 2:
            theirs.add_(noise * own.std() * torch.randn(own.shape, dtype=own.dtype).to(own.device))
    other.lm_head.weight.mul_(sign)
    return other


def draft_of(kind, model, threshold=0.35, noise=0.2):
    """Return (draft, draft_thresholds) for a model that is not sparse; "sparse" makes it so."""
    if kind == "model":
        return disturbed(model, noise), None
    if kind == "wrong":
        return disturbed(model, 0.0, sign=-1), None
    if kind == "sparse":
        sparsify(model, dict.fromkeys(linear_names(model.config), 0.0))
        return kind, dict.fromkeys(linear_names(model.config), threshold)
    return kind, None


# --------------------------------------------------------------------------------------------------
# Trees

def test_draft_trees():
    whole = draft_tree(79, CPU)
    for size in (1, 3, 7, 31, 79):
        tree = draft_tree(size, CPU)
        assert tree.parents == whole.parents[:size]
        assert tree.ranks == whole.ranks[:size]
        assert tree.sees.shape == (size + 1, size + 1)
        assert len(set(zip(tree.parents, tree.ranks))) == size             # no guess twice
        for node, parent in enumerate(tree.parents, start=1):
            itself = torch.arange(size + 1) == node
            assert parent < node
            assert node in tree.children[parent]
            assert tree.depths[node] == tree.depths[parent] + 1 == tree.sees[node].sum() - 1
            assert torch.equal(tree.sees[node], tree.sees[parent] | itself)
        nodes = [node for level in tree.levels for node in level[0].tolist()]
        assert sorted(nodes) == list(range(1, size + 1))
        for depth, level in enumerate(tree.levels, start=1):
            assert (tree.depths[level[0]] == depth).all()


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_a_node_sees_what_was_written_and_its_ancestors(window):
    """Each path of a tree has the logits that it has as a text of its own."""
    model = tiny_verifier(sliding_window=window)
    written = prompt_like(model, 20)
    tree = draft_tree(15, CPU)
    nodes = prompt_like(model, 16, seed=1)
    cache = TreeCache(model.make_cache(1, 40))
    model(torch.tensor([written]), cache)
    cache.grow(tree)
    logits = model(torch.tensor([nodes]), cache)[0]
    assert max(tree.depths) > 2 and max(map(len, tree.children)) > 2
    for node, sees in enumerate(tree.sees):
        path = [nodes[i] for i in sees.nonzero().flatten()]
        alone = model(torch.tensor([written + path]))[0, -1]
        assert torch.allclose(logits[node], alone, atol=1e-10)


@torch.no_grad()
def test_a_tree_is_forgotten_and_its_path_moved_together():
    model = tiny_verifier()
    written = prompt_like(model, 20)
    nodes = prompt_like(model, 16, seed=1)
    following = torch.tensor([[3, 1, 4, 1]])
    tree = draft_tree(15, CPU)
    path = [0, 1, tree.children[1][1]]
    assert path[2] > 3
    cache = TreeCache(model.make_cache(1, 40))
    model(torch.tensor([written]), cache)
    cache.grow(tree)
    model(torch.tensor([nodes]), cache)
    cache.keep(20, path)
    logits = model(following, cache)                       # a row again
    text = written + [nodes[node] for node in path]
    plain = model.make_cache(1, 40)
    model(torch.tensor([text]), plain)
    assert torch.allclose(logits, model(following, plain), atol=1e-10)
    assert cache.used == plain.used == 27
    assert torch.allclose(cache.keys[:, :, :, :27], plain.keys[:, :, :, :27], atol=1e-10)
    assert torch.allclose(cache.values[:, :, :, :27], plain.values[:, :, :, :27], atol=1e-10)


@pytest.mark.skipif(kernel.c_function(torch.float32) is None, reason="no C compiler")
@torch.no_grad()
@pytest.mark.parametrize("window", [None, 6, 50])
def test_a_recorded_step_sees_the_tree(window):
    model = tiny_verifier(torch.float32, sliding_window=window, max_position_embeddings=160)
    sparsify(model, dict.fromkeys([*linear_names(model.config), "lm_head"], 0.3))
    tokens = torch.tensor([prompt_like(model, 90)])
    tree = draft_tree(7, CPU)
    logits = []
    with sparse_mode(model, "all"):
        for make_step in (plain_step, record.make_step):
            cache = TreeCache(model.make_cache(1, 100))
            model(tokens[:, :70], cache)
            step = make_step(model, cache)
            cache.grow(tree)
            first = step(tokens[:, 70:78]).clone()
            cache.keep(70, [0, tree.children[0][1]])       # another branch than the first
            cache.grow(tree)
            second = step(tokens[:, 78:86]).clone()
            cache.keep(72, [0])
            row = step(tokens[:, 78:86]).clone()           # without a tree, by the same recording
            logits.append(torch.cat((first, second, row)))
    assert isinstance(step, record.RecordedStep) and step.reason is None
    assert (logits[0] - logits[1]).norm() <= 1e-4 * logits[0].norm()
    assert (logits[0][1] - logits[0][2]).norm() > 0.1 * logits[0][1].norm()


# --------------------------------------------------------------------------------------------------
# The same text

@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "wrong"])
def test_greedy_speculation_is_greedy_decoding(kind):
    model = tiny_verifier(max_position_embeddings=40)
    prompts = [prompt_like(model, 1 + 9 * seed, seed) for seed in range(3)]
    texts = [list(generate(model, prompt, 24)) for prompt in prompts]
    assert len(texts[2]) == 21                             # the context ends
    draft, thresholds = draft_of(kind, model)
    acceptance = []
    for draft_tokens in (1, 3, 8, 16, None):
        for prompt, text in zip(prompts, texts):
            run = speculate(model, prompt, 24, draft, thresholds, draft_tokens)
            assert list(run) == text
            did = run.statistics
            assert did.tokens == len(text) - 1             # the first is the prompt's
            assert did.passes == sum(map(len, did.times.values())) <= did.tokens
            assert did.tokens_a_pass == did.tokens / did.passes
            assert all(a <= r for a, r in zip(did.accepted, did.reached))
            if draft_tokens:
                assert max(did.times) == draft_tokens or kind != "recycle"
            acceptance += did.acceptance
    if kind == "wrong":
        assert max(acceptance) == 0
    else:
        assert 0.2 < sum(acceptance) / len(acceptance) < 1


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [2, 5, 12])
def test_speculation_with_a_sliding_window(kind, window):
    model = tiny_verifier(model_type="mistral", sliding_window=window)
    prompt = prompt_like(model, 9)
    text = list(generate(model, prompt, 20))
    draft, thresholds = draft_of(kind, model)
    for draft_tokens in (4, 15):
        assert list(speculate(model, prompt, 20, draft, thresholds, draft_tokens)) == text


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_verifier_may_be_sparse(kind):
    """Then the text is that of `generate` in the mode in force."""
    model = tiny_verifier()
    prompt = prompt_like(model, 5)
    draft, draft_thresholds = draft_of(kind, model)
    sparsify(model, dict.fromkeys([*linear_names(model.config), "lm_head"], 0.4))
    with sparse_mode(model, "off"):
        texts = [list(generate(model, prompt, 20))]
    run = speculate(model, prompt, 20, draft, draft_thresholds, 3)
    assert run.against == "the dense model" and list(run) == texts[0]
    for mode in ("decode", "all"):
        with sparse_mode(model, mode):
            text = list(generate(model, prompt, 20))
            for draft_tokens in (1, 7, 12):                # 13 nodes are more than the kernel takes
                run = speculate(model, prompt, 20, draft, draft_thresholds, draft_tokens,
                                sparse_verifier=True)
                assert run.against == "the sparse model" and list(run) == text
        texts.append(text)
    assert len(set(map(tuple, texts))) == 3


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_head_is_sparse_where_it_is_in_plain_decoding(kind):
    """A prompt of one token is sparse in mode "decode", a longer one is not, whatever its parts."""
    model = tiny_verifier(vocab_size=32, max_position_embeddings=300)
    lengths = [1, 2, drafts.PART, drafts.PART + 1, drafts.PART + 2]
    prompts = [prompt_like(model, length, seed) for length in lengths for seed in range(4)]
    draft, draft_thresholds = draft_of(kind, model)
    with_head = [*linear_names(model.config), "lm_head"]
    sparsify(model, dict.fromkeys(with_head, 0.3) | {"lm_head": 0.8})          # of it about half
    model.sparse_state.counts.zero_()
    texts = {}
    for mode in ("off", "all", "decode"):
        with sparse_mode(model, mode):
            texts[mode] = [list(generate(model, prompt, 5)) for prompt in prompts]
    kept, seen = model.lm_head.kept.item(), model.lm_head.seen.item()
    assert 0.4 < kept / seen < 0.6
    firsts = {mode: [text[0] for text in texts[mode][4:]] for mode in texts}
    assert firsts["decode"] == firsts["off"] != firsts["all"]        # of prompts of several tokens
    assert texts["decode"] != texts["off"]
    for mode, sparse_verifier in (("off", False), ("decode", True)):
        for prompt, text in zip(prompts, texts[mode]):
            run = speculate(model, prompt, 5, draft, draft_thresholds, 3,
                            sparse_verifier=sparse_verifier)
            assert list(run) == text, (mode, len(prompt))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_speculation_stops_inside_an_accepted_run(kind):
    model = tiny_verifier()
    prompt = prompt_like(model, 5)
    text = list(generate(model, prompt, 24))
    draft, thresholds = draft_of(kind, model, threshold=0.0, noise=0.0)        # mostly accepted
    inside = 0
    for eos in set(text):
        run = speculate(model, prompt, 24, draft, thresholds, 7, eos_ids=(eos,))
        assert list(run) == text[:text.index(eos)]
        did = run.statistics
        inside += sum(did.accepted or ()) + did.passes > did.tokens    # more was verified
    assert inside
    for limit in range(1, 10):
        run = speculate(model, prompt, limit, draft, thresholds, 7)
        assert list(run) == text[:limit]
        if limit == 2:                                     # the last token is the verifier's own
            assert list(run.statistics.times) == ([7] if kind == "recycle" else [0])


@torch.no_grad()
def test_a_draft_model_may_end_before_the_text_does():
    model = tiny_verifier()
    prompt = prompt_like(model, 5)
    text = list(generate(model, prompt, 24))
    draft = disturbed(model, 0.2)
    draft.config = Config(**vars(model.config) | {"max_position_embeddings": 12})
    run = speculate(model, prompt, 24, draft, None, 7)
    assert list(run) == text
    assert max(run.statistics.times) == 7 and 0 in run.statistics.times
    draft.config.max_position_embeddings = 3               # it does not even hold the prompt
    assert list(speculate(model, prompt, 24, draft, None, 7)) == text


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "wrong"])
def test_a_rejected_draft_leaves_the_cache_as_it_was(kind):
    model = tiny_verifier()
    prompt = prompt_like(model, 6)
    draft, thresholds = draft_of(kind, model)
    run = speculate(model, prompt, 20, draft, thresholds, 5)
    written = list(itertools.islice(run, 15))
    assert sum(run.statistics.reached) > sum(run.statistics.accepted)
    plain = model.make_cache(1, 40)
    with sparse_mode(model, "off"):
        model(torch.tensor([prompt + written]), plain)
    used = min(run.cache.used, plain.used)
    assert used >= 15
    for ours, theirs in ((run.cache.keys, plain.keys), (run.cache.values, plain.values)):
        assert torch.allclose(ours[:, :, :, :used], theirs[:, :, :, :used], atol=1e-10)


@torch.no_grad()
def test_interleaved_speculations_leave_no_trace():
    model = tiny_verifier()
    prompts = [prompt_like(model, 5, seed) for seed in range(3)]
    texts = [list(generate(model, prompt, 16)) for prompt in prompts]
    sparsify(model, dict.fromkeys(linear_names(model.config), 0.2))
    before = model.sparse_state.thresholds.clone()
    thresholds = dict.fromkeys(linear_names(model.config), 0.5)
    kinds = [("sparse", thresholds), ("recycle", None), (disturbed(tiny_verifier(), 0.2), None)]
    runs = [speculate(model, prompt, 16, *kind) for prompt, kind in zip(prompts, kinds)]
    for place in range(12):                                # none comes to its end
        for run, text in zip(runs, texts):
            assert next(run) == text[place]
            assert model.sparse_state.mode == "decode"
            assert torch.equal(model.sparse_state.thresholds, before)


@pytest.mark.skipif(kernel.c_function(torch.float32) is None, reason="no C compiler")
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_speculation_by_recorded_steps(kind):
    model = tiny_verifier(torch.float32)
    prompt = prompt_like(model, 5)
    draft, thresholds = draft_of(kind, model)
    sparsify(model, dict.fromkeys(linear_names(model.config), 0.2))
    for mode, sparse_verifier in (("off", False), ("decode", True)):
        with sparse_mode(model, mode):
            text = list(generate(model, prompt, 16))
            for draft_tokens in (3, None):
                run = speculate(model, prompt, 16, draft, thresholds, draft_tokens,
                                sparse_verifier=sparse_verifier, make_step=record.make_step)
                assert list(run) == text
                assert run.verify.tapes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_speculation_by_cuda_graphs(kind):
    model = tiny_verifier(torch.float32).to("cuda")
    prompt = prompt_like(model, 5)
    draft, thresholds = draft_of(kind, model)
    sparsify(model, dict.fromkeys(linear_names(model.config), 0.2))
    for mode, sparse_verifier in (("off", False), ("decode", True)):
        with sparse_mode(model, mode):
            text = list(generate(model, prompt, 20))
            for draft_tokens in (3, 12, None):
                run = speculate(model, prompt, 20, draft, thresholds, draft_tokens,
                                sparse_verifier=sparse_verifier)
                assert list(run) == text


# --------------------------------------------------------------------------------------------------
# The same distribution

SAMPLING = Sampling(temperature=1.2, top_k=4, top_p=0.97)


@torch.no_grad()
def p_value_of_drafts(kind, draft_tokens=3, new_tokens=800):
    """Return how probable it is that a text sampled with drafts follows the model's distribution.

    The model is one layer that sees two tokens, so its text is a Markov chain: every token of one
    long text is a draw from a distribution that the two before it decide. Pearson's chi-square
    compares how often each follows each pair with how often it should.
    """
    model = tiny_verifier(torch.float32, seed=32, vocab_size=5, num_hidden_layers=1,
                          sliding_window=2, max_position_embeddings=4096)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))                    # (25, 2)
    p = SAMPLING.probabilities(model(pairs)[:, -1]).double()                          # (25, 5)
    draft, thresholds = draft_of(kind, model, threshold=0.8, noise=0.6)
    prompt = [0, 3, 1, 4, 2, 2, 0]
    run = speculate(model, prompt, new_tokens, draft, thresholds, draft_tokens, seed=0,
                    **vars(SAMPLING))
    text = torch.tensor(prompt[-2:] + list(run))
    pair = 5 * text[:-2] + text[1:-1]
    counts = torch.bincount(5 * pair + text[2:], minlength=125).view(25, 5).double()
    did = run.statistics
    assert 0.1 < sum(did.accepted) / sum(did.reached) < 0.95         # p and q differ, and meet
    assert len(did.reached) >= 2
    if counts[p == 0].any():                               # what cannot be was written
        return 0.0
    expected = counts.sum(1, keepdim=True) * p
    cells = (p > 0) & (expected.where(p > 0, torch.inf).amin(1, keepdim=True) >= 2)   # whole rows
    rows = cells.any(1).sum()
    assert rows > 8
    statistic = ((counts - expected) ** 2 / expected)[cells].sum()
    freedom = cells.sum() - rows                           # each row's counts add up
    return torch.special.gammaincc(freedom.double() / 2, statistic / 2).item()


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_speculation_has_the_models_distribution(kind):
    assert p_value_of_drafts(kind) > 1e-3


def test_a_tree_taken_for_drawn_guesses_is_found_out(monkeypatch):
    guess = drafts.RecycleDraft.guess

    def claims_to_be_drawn(self, ids, n):
        tokens, _ = guess(self, ids, n)
        return tokens, torch.full((n, 5), 0.2)

    monkeypatch.setattr(drafts.RecycleDraft, "guess", claims_to_be_drawn)
    assert p_value_of_drafts("recycle") < 1e-6


def test_a_tree_that_sees_all_before_it_is_found_out(monkeypatch):
    """Each node then sees the guesses that lie before it in the row, another branch's too."""
    monkeypatch.setattr(TreeCache, "grow", lambda self, tree: None)
    assert p_value_of_drafts("recycle", 7) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_speculation_repeats_with_a_seed_and_a_fixed_draft(kind):
    model = tiny_verifier()
    plain = [list(generate(model, [1, 2], 12, 1.0, seed=seed)) for seed in range(3)]
    draft, thresholds = draft_of(kind, model)
    texts = [list(speculate(model, [1, 2], 12, draft, thresholds, 3, 1.0, seed=seed))
             for seed in (0, 1, 2, 0)]
    assert texts[0] == texts[3] != texts[1]
    if kind == "recycle":                                  # one draw a token, as without drafts
        assert texts[:3] == plain


# --------------------------------------------------------------------------------------------------
# What drafts learn, and how long they are

def test_recycling_learns_the_likeliest_of_the_last_of_equal_tokens():
    draft = drafts.RecycleDraft(tiny_verifier())
    logits = torch.randn(4, 13, generator=torch.Generator().manual_seed(0))
    draft.learn(torch.tensor([2, 5, 2, 7]), logits)
    likeliest = logits.argsort(descending=True)[:, :8]
    assert torch.equal(draft.candidates[[2, 5, 7]], likeliest[[2, 1, 3]])
    assert not draft.candidates[[0, 1, 3, 4, 6, *range(8, 13)]].any()
    tokens, q = draft.guess([9, 2], 7)
    tree = draft_tree(7, CPU)
    nodes = [2, *tokens]
    assert q is None
    for node, (parent, rank) in enumerate(zip(tree.parents, tree.ranks), start=1):
        assert nodes[node] == draft.candidates[nodes[parent], rank]


def test_a_vocabulary_smaller_than_the_table_is_wide():
    model = tiny_verifier(vocab_size=5)
    text = list(generate(model, [1, 2, 3], 16))
    assert list(speculate(model, [1, 2, 3], 16, "recycle", None, 31)) == text


def test_a_draft_object_guesses_a_chain_and_learns_if_it_can():
    """Here it guesses what followed the last token when that last occurred."""
    class Lookup:
        def __init__(self):
            self.learned = []

        def learn(self, tokens, logits):
            assert len(tokens) == len(logits)
            self.learned += tokens.tolist()

        def guess(self, ids, n):
            before = [i for i, token in enumerate(ids[:-1]) if token == ids[-1]]
            return ids[before[-1] + 1:][:n] if before else [], None

    model = tiny_verifier()
    prompt = prompt_like(model, 5)
    text = list(generate(model, prompt, 30))
    for draft_tokens in (3, None):
        draft = Lookup()
        run = speculate(model, prompt, 30, draft, None, draft_tokens)
        assert list(run) == text
        assert draft.learned[:5] == prompt and len(draft.learned) > 20
        assert sum(run.statistics.accepted or ()) > 0 or draft_tokens is None


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

    did = drafts.Statistics(drafts.CHAINS)
    torch.manual_seed(0)
    for i in range(300):
        size = did.best_size()
        right = int((torch.rand(size) < acceptance).long().cumprod(0).sum())
        seconds = verify_time(size + 1) * (20 if i in slow else 1)
        did.record(chain(size, CPU), list(range(right + 1)), size * draft_time, seconds)
    best = max(range(8), key=tokens_a_second)
    usual = max(did.times, key=lambda size: len(did.times[size]))
    assert abs(usual - best) <= (best > 0)
    assert did.acceptance[0] == pytest.approx(acceptance, abs=0.12)
    assert best or len(did.times[1]) > 5                   # it tries again


def test_the_size_of_a_tree_adapts():
    """The tree grows to where the verify pass becomes dear."""
    did = drafts.Statistics(drafts.TREES)
    torch.manual_seed(0)
    for _ in range(200):
        size = did.best_size()
        tree = draft_tree(size, CPU)
        path = [0]
        while tree.children[path[-1]] and torch.rand(()) < 0.6:
            path.append(tree.children[path[-1]][0])
        did.record(tree, path, 0.0, 1.0 if size < 10 else 2.0)
    assert max(did.times, key=lambda size: len(did.times[size])) == 7
    assert sorted(did.times) == [0, 1, 3, 7, 15]           # 31 would not have paid


def test_statistics_of_a_tree():
    did = drafts.Statistics(drafts.TREES)
    tree = draft_tree(7, CPU)
    leaf = next(node for node in tree.children[0] if not tree.children[node])
    did.record(tree, [0, leaf], 1.0, 2.0)
    assert did.reached == [1] and did.accepted == [1]      # after a leaf nothing was guessed
    did.record(tree, [0], 1.0, 2.0)
    assert did.reached == [2] and did.accepted == [1]
    assert did.acceptance == [0.5]
    assert did.draft_seconds == 2 and did.verify_seconds == 4
    assert did.times == {7: [3.0, 3.0]}


def test_logits_that_are_no_numbers_end_a_text():
    model = tiny_verifier()
    model.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match="position 1 of the text are NaN"):
        next(speculate(model, [1, 2], 9, "recycle"))
    model = tiny_verifier()

    def spoiled(model, cache, tokens=1):
        return lambda tokens: model(tokens, cache) * float("inf")

    tokens = speculate(model, [1, 2], 9, "recycle", draft_tokens=3, make_step=spoiled)
    next(tokens)                                           # the prompt's
    with pytest.raises(InputError, match="position 2 of the text are NaN"):
        next(tokens)


def test_speculate_refuses_what_does_not_fit():
    model = tiny_verifier()
    cases = [
        ({}, 'draft "sparse" needs a model made sparse'),
        ({"draft": "other"}, 'draft is "sparse", "recycle", a Llama, or an object with guess'),
        ({"draft": tiny_verifier(vocab_size=12)}, "the draft model has 12 tokens, the model 13"),
        ({"draft": "recycle", "draft_tokens": 0}, "draft_tokens is 0, expected 1 to 79"),
        ({"draft": "recycle", "draft_tokens": 99}, "draft_tokens is 99"),
        ({"draft": "recycle", "top_p": 0.0}, "top_p is 0.0"),
        ({"draft": "recycle", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"draft": "recycle", "seed": -1}, "seed is -1"),
    ]
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            speculate(model, [1, 2], **{"max_new_tokens": 4} | options)
    sparsify(model, dict.fromkeys(linear_names(model.config), 0.2))
    with sparse_mode(model, "all", dense_prefix=2):
        with pytest.raises(InputError, match="a dense prefix"):
            speculate(model, [1, 2], 4, "recycle")
