"""Tests of allocate.py, judge.py and timing.py: what thresholds come from, what is measured."""
import copy
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import calibrate as calibrate_module
import kernel
from beyond import allocate, judge, peers, quantize, record, rotate, timing, watch
from beyond.conftest import random_llama
from calibrate import (SINKS, SITE_OF, Calibration, Partial, Table, calibrate, evenly, histogram,
                       origin_of, quantile, spread)
from demo import corpus
from model import (DEMO, Config, InputError, linear_names, load_model, load_tokenizer,
                   windows_of)
from sparsify import perplexity, quality, realised_sparsity, reset_counts, sparse_mode, sparsify

ROOT = Path(__file__).parent.parent
PICTURE = ["--figure", ROOT / "never-written.png"]
ADDED = ["priced", "balanced", "fisher-channel", "fisher", "uniform", "wina"]


def tiny_model(dtype=torch.float32, **changes):
    """Return a small Llama, see conftest.py."""
    shape = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=12, vocab_size=61, max_position_embeddings=64)
    return random_llama(dtype, **shape | changes)


def tokens_like(model, *shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, shape, generator=generator)


def some_thresholds(model):
    """Return thresholds of all three kinds: numbers, tensors (), tensors (in,)."""
    generator = torch.Generator().manual_seed(3)
    thresholds = {}
    for i, name in enumerate(linear_names(model.config)):
        inputs = model.get_submodule(name).in_features
        kinds = [0.4, torch.tensor(0.2), torch.rand(inputs, generator=generator)]
        thresholds[name] = kinds[i % 3]
    return thresholds


def by_hand(model, tokens, thresholds, prefix=0):
    """Return the logits of a dense model whose linears see thresholded inputs, put in by hooks."""
    hooks = []
    for name, threshold in thresholds.items():
        def drop(module, inputs, threshold=threshold):
            keep = inputs[0].abs() > threshold
            keep[:, :prefix] = True
            return inputs[0] * keep
        hooks.append(model.get_submodule(name).register_forward_pre_hook(drop))
    logits = model(tokens)
    for hook in hooks:
        hook.remove()
    return logits


def command(monkeypatch, module, *arguments):
    """Run a chapter's command line in this process."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


# --------------------------------------------------------------------------------------------------
# allocate.py

@pytest.fixture(scope="module")
def calibrated():
    """(model, tokens, its calibration with every allocation of the chapter); not to be changed."""
    model = tiny_model()
    tokens = tokens_like(model, 1500)
    calibration = calibrate(model, tokens, 16, "a test")
    allocate.add_allocations(calibration, model, tokens, 16)
    allocate.add_priced(calibration, model, tokens)
    return model, tokens, calibration


@pytest.fixture(scope="module")
def information():
    """The mean F (layers, 7) of the model of `calibrated`."""
    model = tiny_model()
    windows = windows_of(tokens_like(model, 1500), 16)
    of = allocate.fisher_information(model, windows, linear_names(model.config))
    return torch.stack([values.mean() for values in of.values()]).view(3, 7)


def test_the_best_allocation_is_the_default(calibrated):
    _, _, calibration = calibrated
    assert calibration.allocations == ADDED
    assert calibration.distributions["gate"].sum() == 3 * 93 * (16 - SINKS) * 56


def test_without_fisher_only_wina_is_added():
    model = tiny_model()
    tokens = tokens_like(model, 200)
    calibration = calibrate(model, tokens, 16)
    calibration.tables["greedy"] = Table(torch.tensor([0.5]), torch.full((1, 3, 7), 0.5))
    allocate.add_allocations(calibration, model, tokens, 16, fisher=False)
    assert calibration.allocations == ["greedy", "uniform", "wina"]
    calibration.check_whole()


def test_allocations_go_on_where_they_were_killed(calibrated, tmp_path, monkeypatch):
    """With other options, too: what was counted for them is not taken for the rest."""
    model, tokens, calibration = calibrated
    path = tmp_path / "partial"

    def run(fisher):
        partial = Partial(path, "the same")
        again = calibrate(model, tokens, 16, partial=partial)
        allocate.add_allocations(again, model, tokens, 16, fisher, partial)
        if fisher:
            allocate.add_priced(again, model, tokens, partial)
        return again

    run(fisher=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        prices, begun = allocate.prices, []

        def killed(*arguments):
            begun.append(0)
            if len(begun) == 4:
                raise KeyboardInterrupt
            return prices(*arguments)
        patch.setattr(allocate, "prices", killed)
        run(fisher=True)
    with monkeypatch.context() as patch:
        asked = []
        patch.setattr(allocate, "prices", lambda *of: asked.append(0) or prices(*of))
        patch.setattr(allocate, "backpropagate", no_gradients(allocate.backpropagate))
        again = run(fisher=True)
    assert len(asked) == 9               # of twelve: three were done
    for name, counts in calibration.distributions.items():
        assert torch.equal(again.distributions[name], counts)
    for name, table in calibration.tables.items():
        assert torch.allclose(again.tables[name].shares, table.shares, atol=1e-6)


def no_gradients(backpropagate):
    """Return a backpropagate that fails for Fisher's labels, whose work is done."""
    def only_prices(model, tokens, loss, *more):
        assert "prices" in loss.__qualname__
        return backpropagate(model, tokens, loss, *more)
    return only_prices


def test_partial_work_belongs_to_one_model():
    tokens = tokens_like(tiny_model(), 100)
    models = [tiny_model(), tiny_model(torch.bfloat16), tiny_model(), quantize.quantize(
        tiny_model(hidden_size=64, head_dim=16, intermediate_size=64), 4, 32)]
    models[2].model.layers[1].mlp.down_proj.weight += 1
    origins = [origin_of(model, tokens, 16) for model in models]
    origins += [origin_of(models[0], tokens, 8), origin_of(models[0], tokens[1:], 16)]
    assert len(set(origins)) == 6
    assert origin_of(tiny_model(), tokens, 16) == origins[0]


def test_a_short_text_is_enough_for_all():
    model = tiny_model()
    tokens = tokens_like(model, 30)
    calibration = calibrate(model, tokens, 16)
    allocate.add_allocations(calibration, model, tokens, 16)
    allocate.add_priced(calibration, model, tokens)
    allocate.settle(calibration, model, tokens)
    calibration.check_whole()


def test_windows_are_spread_over_a_text():
    tokens = torch.arange(1001)
    assert evenly(windows_of(tokens, 10), 3)[:, 0].tolist() == [0, 500, 990]
    chosen = spread(tokens, 35, 10)                        # three stretches, and what follows them
    assert chosen.tolist() == [*range(10), *range(500, 510), *range(990, 1001)]
    assert windows_of(chosen, 10)[:, :-1].flatten().tolist() == chosen[:-1].tolist()
    assert spread(tokens[:30], 35, 10).tolist() == list(range(30))         # all there is
    assert spread(tokens, 9, 10).tolist() == list(range(9))                # less than a stretch


def test_calibration_and_rotation_see_two_halves(monkeypatch, tmp_path):
    """Of a text that is long enough: what fits one of them by accident does not fit the other."""
    seen = []

    def stop(*arguments):
        seen.append(next(of for of in arguments if isinstance(of, torch.Tensor)))
        raise InputError("stopped")

    text = tmp_path / "text"
    text.write_text("".join(f"line {i}\n" for i in range(3000)))
    options = ["--text", text, "--tokens", 1100]
    monkeypatch.setattr(calibrate_module, "calibrate", stop)
    monkeypatch.setattr(rotate, "covariances", stop)
    for module, more in ((allocate, tmp_path / "calibration"), (rotate, tmp_path / "rotated")):
        with pytest.raises(InputError, match="stopped"):
            command(monkeypatch, module, *options, "--out", more)
    tokenizer = load_tokenizer(DEMO)
    lines = []
    for tokens in seen:
        written = tokenizer.decode(tokens.flatten().tolist())
        lines.append([int(of) for of in re.findall(r"line (\d+)(?=\n)", written)])
    assert len(lines[0]) > 50 and len(lines[1]) > 50
    assert max(lines[0]) < 1510 and min(lines[1]) > 1490
    assert min(lines[0]) < 10 and max(lines[1]) > 2900


def test_share_below_inverts_the_quantile():
    torch.manual_seed(0)
    x = torch.randn(40, 5000) * 3
    x[:, ::10] = 0
    counts = histogram(x)
    for share in (0.2, 0.5, 0.9, 0.999):
        value = quantile(counts, share)
        assert allocate.share_below(counts, value).item() == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize("allocation", ADDED)
def test_every_allocation_reaches_its_target(calibrated, allocation):
    _, tokens, calibration = calibrated
    _, sizes = calibration.sizes()
    model = tiny_model()
    for sparsity in (0.0, 0.02, 0.25, 0.33, 0.5, 0.8, 0.95, 0.97):
        shares = calibration.sparsities(sparsity, allocation)
        assert (shares @ sizes).mean().item() == pytest.approx(sparsity, abs=1e-4)
        if sparsity in (0.0, 0.25, 0.5, 0.8, 0.95):
            sparsify(model, calibration.thresholds(sparsity, allocation))
            perplexity(model, tokens, 16, dense_prefix=SINKS)
            # Not exact: with inputs dropped before them, the inputs of later layers are others.
            assert realised_sparsity(model) == pytest.approx(sparsity, abs=0.04)


@pytest.fixture(scope="module")
def settled(calibrated):
    """The calibration of `calibrated`, its thresholds those of the sparse model."""
    model, tokens, calibration = calibrated
    settled = copy.deepcopy(calibration)
    allocate.settle(settled, model, tokens)
    return settled


@torch.no_grad()
def test_settled_thresholds_drop_what_they_are_to_drop(calibrated, settled):
    """In the sparse model, each linear, on the text that they were found on."""
    _, tokens, calibration = calibrated
    assert settled.allocations == calibration.allocations
    settled.check_whole()
    model = sparsify(tiny_model(), settled.thresholds(0.5))
    windows = allocate.some_windows(model, tokens, *allocate.WINDOWS)
    for allocation in ("uniform", "wina", "fisher", "balanced", "priced"):
        for level in (0.25, 0.65):
            reset_counts(model)
            with sparse_mode(model, "all", settled.thresholds(level, allocation), SINKS):
                model(windows)
            assert realised_sparsity(model) == pytest.approx(level, abs=0.002)
            if allocation in ("uniform", "wina"):
                kept, seen = model.sparse_state.counts.double().T
                assert (1 - kept / seen).tolist() == pytest.approx([level] * 21, abs=0.01)


def test_fisher_information_is_the_mean_square_gradient():
    model = tiny_model(torch.float64)
    name = "model.layers.1.self_attn.k_proj"
    windows = windows_of(tokens_like(model, 33), 32)
    computed = allocate.fisher_information(model, windows, [name])[name].double()

    # By hand: the same labels, and a leaf that only this linear reads.
    logits = model(windows[:, :-1])[0]
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0]
    leaf = None

    def own_leaf(module, inputs):
        nonlocal leaf
        leaf = inputs[0].detach().requires_grad_()
        return leaf

    hook = model.get_submodule(name).register_forward_pre_hook(own_leaf)
    F.cross_entropy(model(windows[:, :-1])[0], labels, reduction="sum").backward()
    hook.remove()
    expected = leaf.grad[0, SINKS:].square().mean(0)
    assert (computed - expected).norm() < 1e-4 * expected.norm()


def test_backpropagation_by_blocks_is_that_of_the_whole():
    model = tiny_model(torch.float64, sliding_window=5)    # which the mask of the context shows
    tokens = tokens_like(model, 2, 12)
    targets = tokens_like(model, 2, 12)
    gradients = []

    def see(module, grad_input, grad_output):
        gradients.append(grad_output[0])

    with model.model.layers[0].self_attn.v_proj.register_full_backward_hook(see):
        value = allocate.backpropagate(
            model, tokens, lambda y, i: F.cross_entropy(y, targets[i], reduction="sum"))
        x = model.embed(tokens).requires_grad_()
        model.embed = lambda tokens: x
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
        loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-6)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-9)


def test_fisher_drops_by_one_price(calibrated, information):
    """Every linear gives up inputs at the same F t² / out, in fisher-channel each channel does."""
    _, _, calibration = calibrated
    outputs, sizes = calibration.sizes()
    for level in (0.1, 0.5, 0.75):
        thresholds = calibration.thresholds(level, "fisher").values()
        scalar = torch.stack(list(thresholds)).view(3, 7).double()
        price = information.double() * scalar.square() / outputs
        assert torch.allclose(price, price.mean().expand(3, 7), rtol=0.05)    # an empty bin, twice
    name = "model.layers.2.mlp.down_proj"
    vector = calibration.thresholds(0.5, "fisher-channel")[name]
    weight = calibration.weights["fisher-channel"][name]
    weighted = vector * weight
    assert vector.shape == (56,)
    assert torch.allclose(weighted, weighted.mean().expand(56), rtol=1e-4)
    assert weight.square().mean().sqrt().item() == pytest.approx(1, rel=1e-3)


def test_balanced_is_halfway_to_one_price_a_block(calibrated):
    _, _, calibration = calibrated
    _, sizes = calibration.sizes()
    balanced = calibration.sparsities(0.5, "balanced")
    by_block = 2 * balanced - calibration.sparsities(0.5, "fisher-channel")
    assert torch.allclose(by_block @ sizes, torch.full((3,), 0.5, dtype=torch.float64), atol=1e-4)


def test_between_levels_fisher_is_near_to_one_price(calibrated, information):
    """A table is linear between levels; what bisection finds in between differs little."""
    _, _, calibration = calibrated
    outputs, sizes = calibration.sizes()
    counts = calibration.distributions["input"][:, list(SITE_OF.values())]
    for level in (0.225, 0.475, 0.625):
        exact = allocate.one_price(counts, information, outputs, sizes, level)
        assert (exact - calibration.sparsities(level, "fisher")).abs().max() < 0.01


def test_wina_weighs_by_the_norm_of_the_column(calibrated):
    model, _, calibration = calibrated
    name = "model.layers.1.mlp.up_proj"
    threshold = calibration.thresholds(0.5, "wina")[name]
    product = threshold * model.get_submodule(name).weight.norm(dim=0)
    assert torch.allclose(product, product.mean().expand(32), rtol=1e-4)


def test_gates_are_counted_after_the_activation_of_the_model():
    model = tiny_model()
    windows = windows_of(tokens_like(model, 200), 16)
    zeros = []
    for activation in (F.silu, F.relu):
        for block in model.model.layers:
            block.mlp.activation = activation
        counts = allocate.count_weighted(model, windows, {})["gate"]
        zeros.append((counts[:, 0].sum() / counts.sum()).item())
    assert zeros[0] < 0.01
    assert zeros[1] == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_is_calibrated_like_others(bits):
    config = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
    model = quantize.quantize(tiny_model(**config), bits, 32)
    tokens = tokens_like(model, 200)
    calibration = calibrate(model, tokens, 16)
    allocate.add_allocations(calibration, model, tokens, 16)
    allocate.add_priced(calibration, model, tokens)
    calibration.check_whole()
    calibration.check(model)
    assert calibration.allocations == ADDED


@torch.no_grad()
def test_prices_are_what_weights_cost(calibrated):
    """The gradient near the thresholds foretells what the KL does when a threshold is moved."""
    model, _, calibration = calibrated
    names = linear_names(model.config)
    windows = windows_of(tokens_like(model, 6000), 64)[:, :-1]
    dense = []
    with model.model.norm.register_forward_hook(lambda module, x, y: dense.append(y)):
        exact = model(windows).log_softmax(-1)
    dropping = allocate.Dropping(model, calibration.sparsities(0.1, "balanced"),
                                 calibration.weights["fisher-channel"])
    foretold, total = allocate.prices(model, windows, dense[0], dropping)
    foretold = foretold.flatten()
    thresholds = dropping.thresholds
    sparse_model = sparsify(tiny_model(), thresholds)

    def kl_to_dense():
        log_p = sparse_model(windows).log_softmax(-1)
        return F.kl_div(log_p, exact, reduction="sum", log_target=True).item()

    def kl_and_dropped(name, factor):
        reset_counts(sparse_model)
        with sparse_mode(sparse_model, "all", {name: factor * thresholds[name]}, SINKS):
            kl = kl_to_dense()
        linear = sparse_model.get_submodule(name)
        return kl, (linear.seen - linear.kept).item() * linear.out_features

    with sparse_mode(sparse_model, "all", dense_prefix=SINKS):
        assert total == pytest.approx(kl_to_dense(), rel=1e-3)
    measured = []
    for name in names:
        low, fewer = kl_and_dropped(name, 1 / 1.3)
        high, more = kl_and_dropped(name, 1.3)
        measured.append((high - low) / (more - fewer))
    measured = torch.tensor(measured, dtype=torch.float64)
    assert torch.corrcoef(torch.stack((foretold, measured)))[0, 1] > 0.9
    assert 0.5 < (foretold / measured).median() < 1.2


def test_priced_shares_are_nearer_to_the_dense_model(calibrated, settled):
    _, tokens, _ = calibrated
    settings = []
    for level in (0.3, 0.5, 0.7):
        for name in ("balanced", "priced"):
            settings.append(judge.Setting(name, level, settled.thresholds(level, name)))
    rows = judge.judge(tiny_model(), tokens, settings)
    for balanced, priced in zip(rows[1::2], rows[2::2]):
        assert priced["sparsity"] == pytest.approx(balanced["sparsity"], abs=0.01)
        assert priced["kl"] < 1.02 * balanced["kl"]
    assert rows[2]["kl"] < 0.97 * rows[1]["kl"]


def test_calibration_file(calibrated, tmp_path):
    model, _, calibration = calibrated
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    loaded = Calibration.load(path)
    loaded.check(model)
    assert loaded.allocations == ADDED
    assert loaded.distributions.keys() == {"input", "head", "gate", "wina", "fisher-channel"}
    for allocation in ADDED:
        thresholds = loaded.thresholds(0.4, allocation)
        for name, threshold in calibration.thresholds(0.4, allocation).items():
            assert torch.allclose(thresholds[name], threshold, rtol=1e-4)


def test_a_sparse_model_is_not_calibrated(calibrated):
    _, tokens, calibration = calibrated
    model = sparsify(tiny_model(), calibration.thresholds(0.5))
    for add in (allocate.add_allocations, allocate.add_priced):
        with pytest.raises(InputError, match="this one was made sparse"):
            add(calibration, model, tokens)


def test_allocate_writes_and_draws(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "tiny"
    tiny_model(vocab_size=4096, num_hidden_layers=1).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
    options = ["--model", folder, "--text", ROOT / "kernel.py", "--tokens", 700]
    command(monkeypatch, allocate, *options)
    assert f"allocations: {', '.join(ADDED)}" in capsys.readouterr().out
    command(monkeypatch, allocate, "--model", folder, "--figures", tmp_path / "figures")
    for name in ("distributions.png", "allocations.png"):
        assert (tmp_path / "figures" / name).read_bytes()[:4] == b"\x89PNG"
    out = tmp_path / "int8.safetensors"
    command(monkeypatch, allocate, *options, "--no-fisher", "--greedy", "--quantize", "int8",
            "--out", out)
    assert Calibration.load(out).allocations == ["greedy", "uniform", "wina"]
    assert not list(tmp_path.glob("*.greedy"))


# --------------------------------------------------------------------------------------------------
# judge.py

def test_judge_agrees_with_perplexity():
    model = tiny_model(torch.float64)
    tokens = tokens_like(model, 70)
    windows = windows_of(tokens, 8)
    thresholds = some_thresholds(model)
    nothing = dict.fromkeys(thresholds, 0.0)
    gate_thresholds = torch.tensor([0.1, 0.2, 0.05])
    with torch.no_grad():
        dense_log_p = model(windows[:, :-1]).flatten(0, 1).log_softmax(-1)
        log_p = by_hand(model, windows[:, :-1], thresholds).flatten(0, 1).log_softmax(-1)
    settings = [judge.Setting("own", 0.5, thresholds), judge.Setting("none", 0.0, nothing),
                judge.Setting("cats", 0.3, None, functools.partial(peers.cats, gate_thresholds))]
    dense, own, zero, cats = judge.judge(model, tokens, settings, 8)
    assert dense["agreement"] == zero["agreement"] == 1
    assert dense["sparsity"] == 0
    assert dense["perplexity"] == pytest.approx(zero["perplexity"])
    assert abs(zero["kl"]) < 1e-9
    kl = (dense_log_p.exp() * (dense_log_p - log_p)).sum(-1).mean().item()
    assert own["kl"] == pytest.approx(kl)
    same = (dense_log_p.argmax(-1) == log_p.argmax(-1)).double().mean().item()
    assert own["agreement"] == pytest.approx(same)
    sparsify(model, thresholds)
    assert own["perplexity"] == pytest.approx(perplexity(model, tokens, 8))
    assert own["sparsity"] == pytest.approx(realised_sparsity(model))
    # sparsify.py's measures are the same.
    expected = [own["perplexity"], own["kl"], own["agreement"], own["sparsity"]]
    assert quality(model, windows, [thresholds])[1].tolist() == pytest.approx(expected)
    assert 0 < cats["sparsity"] < 0.5


@torch.no_grad()
def test_cats_drops_channels_with_a_small_gate():
    model = tiny_model(torch.float64)
    tokens = tokens_like(model, 70)
    thresholds = torch.tensor([0.1, 0.2, 0.05])
    setting = judge.Setting("cats", 0.3, None, functools.partial(peers.cats, thresholds))
    cats = judge.judge(model, tokens, [setting], 8)[1]
    dropped = []

    def drop(module, inputs, output, threshold):
        keep = F.silu(output).abs() > threshold
        dropped.append(1 - keep.double().mean().item())
        return output * keep

    for block, threshold in zip(model.model.layers, thresholds):
        block.mlp.gate_proj.register_forward_hook(
            lambda module, inputs, output, t=threshold: drop(module, inputs, output, t))
    assert cats["perplexity"] == pytest.approx(perplexity(model, tokens, 8))
    sizes = {name: model.get_submodule(name).weight.numel() for name in linear_names(model.config)}
    skipped = sum(size for name, size in sizes.items() if "up_proj" in name or "down_proj" in name)
    expected = sum(dropped) / len(dropped) * skipped / sum(sizes.values())
    assert cats["sparsity"] == pytest.approx(expected)


@torch.no_grad()
def test_peers_that_drop_nothing_are_dense(calibrated):
    """Their bases are orthogonal, and what they read beside the linears is set off."""
    model, tokens, calibration = calibrated
    inputs = tokens[None, :30]
    dense = model(inputs)
    total = sum(model.get_submodule(name).weight.numel() for name in linear_names(model.config))
    ranks = peers.low_ranks(model)
    nothing = dict.fromkeys(linear_names(model.config), torch.tensor(0.0))
    bases, weights = peers.wina_basis(model)
    directions = peers.larosa_basis(model, windows_of(tokens, 16)[:20])
    for peer, more in (
        (functools.partial(peers.turned, bases, weights, 0.0, 500), 500),
        (functools.partial(peers.turned, directions, {}, 0.0, 700), 700),
        (functools.partial(peers.rsparse, ranks, nothing),
         sum(part.numel() for pair in ranks.values() for part in pair)),
    ):
        with peer(model, "decode") as sparsity:
            assert torch.equal(model(inputs), dense)
            assert sparsity() == 0.0
        with peer(model, "all") as sparsity:
            assert torch.allclose(model(inputs), dense, atol=1e-4)
            assert sparsity() == pytest.approx(-more / total)
        assert torch.equal(model(inputs), dense)           # no hook is left


@torch.no_grad()
def test_a_peer_keeps_the_largest_in_its_basis(calibrated):
    model, tokens, calibration = calibrated
    name = "model.layers.1.mlp.up_proj"
    linear = model.get_submodule(name)
    bases, weights = peers.wina_basis(model)
    first = model.get_submodule("model.layers.1.mlp.gate_proj").weight
    gram = (first @ bases[name]).T @ (first @ bases[name])
    assert (gram - gram.diagonal().diag()).abs().max() < 1e-4 * gram.max()      # orthogonal columns
    seen = []
    with linear.register_forward_hook(lambda module, x, y: seen.append((x[0], y))):
        model(tokens[None, :8])
        with peers.turned(bases, weights, 0.25, 0, model, "all") as sparsity:
            hook = linear.register_forward_hook(lambda module, x, y: seen.append((x[0], y)))
            model(tokens[None, :8])
            hook.remove()
    z = seen[-1][0] @ bases[name]                          # what was read, in the basis
    assert ((z.abs() < 1e-5).sum(-1) == 8).all()           # a quarter of 32
    assert sparsity() == pytest.approx(0.25, abs=0.01)
    # In the first block nothing was dropped before q, k and v: the smallest |z| · ‖column‖ are.
    name = "model.layers.0.self_attn.v_proj"
    linear = model.get_submodule(name)
    x = model.model.layers[0].input_layernorm(model.embed(tokens[None, :8]))
    z = x @ bases[name]
    size = z.abs() * (linear.weight @ bases[name]).norm(dim=0)
    expected = (z * (size > size.sort(-1).values[..., 7:8])) @ bases[name].T @ linear.weight.T
    with peers.turned(bases, weights, 0.25, 0, model, "all"):
        outputs = []
        with linear.register_forward_hook(lambda module, x, y: outputs.append(y)):
            model(tokens[None, :8])
    assert torch.allclose(outputs[0], expected, atol=1e-5)


@torch.no_grad()
def test_rsparse_sends_what_is_dropped_through_a_low_rank(calibrated):
    model, tokens, calibration = calibrated
    name = "model.layers.0.self_attn.q_proj"
    linear = model.get_submodule(name)
    ranks = peers.low_ranks(model)
    U, V = ranks[name]
    left, S, right = torch.linalg.svd(linear.weight)
    assert U.shape[0] == round(0.1 * linear.weight.numel() / sum(linear.weight.shape))
    low = (left[:, :len(U)] * S[:len(U)]) @ right[:len(U)]
    x = model.model.layers[0].input_layernorm(model.embed(tokens[None, :8]))
    keep = x.abs() > 0.5
    expected = (x * keep) @ linear.weight.T + (x * ~keep) @ low.T
    thresholds = dict.fromkeys(linear_names(model.config), torch.tensor(0.5))
    outputs = []
    with peers.rsparse(ranks, thresholds, model, "all"):
        with linear.register_forward_hook(lambda module, x, y: outputs.append(y)):
            model(tokens[None, :8])
    assert torch.allclose(outputs[0], expected, atol=1e-5)


def test_the_papers_protocol():
    """Part of each window is context only, and its start is dense."""
    model = tiny_model(torch.float64)
    tokens = tokens_like(model, 70)
    thresholds = some_thresholds(model)
    setting = judge.Setting("own", 0.5, thresholds, dense_prefix=4)
    late = judge.judge(model, tokens, [setting], 12, scored=4)[1]
    fresh = tiny_model(torch.float64)
    losses = []
    for i in range(0, 70 - 12, 4):
        logits = by_hand(fresh, tokens[None, i:i + 12], thresholds, 4)[0, 8:]
        losses.append(F.cross_entropy(logits, tokens[i + 9:i + 13]))
    assert late["perplexity"] == pytest.approx(torch.stack(losses).mean().exp().item())


def test_perplexity_is_read_at_the_target():
    measured = [(0.0, 0.0, 10.0), (0.5, 0.6, 20.0), (0.7, 0.696, 30.0), (0.9, 0.8, 50.0)]
    rows = [{"target": target, "sparsity": sparsity, "perplexity": perplexity}
            for target, sparsity, perplexity in measured]
    judge.at_target(rows)
    at = [row["perplexity_at_target"] for row in rows]
    assert at[0] == 10
    assert at[1] == pytest.approx(10 * 2 ** (5 / 6))
    assert at[2] == 30
    assert at[3] is None


def test_functions_are_cut_and_parsed():
    head = "    def f(self):\n"
    assert judge.is_function(head, "        return 1\n\n    def g(self, x\n")    # cut off after f
    assert judge.is_function(head, "        if self:\n            return 1\n        unfini")
    assert not judge.is_function(head, "        return (1\n\n    def g(self):\n")
    assert not judge.is_function(head, "    x = 1\n")      # nothing in it
    tokenizer = load_tokenizer(DEMO)
    beginnings = judge.function_beginnings(tokenizer, corpus.files("held-out")[:8], 20)
    assert len(beginnings) == 20
    for ids, head in beginnings:
        assert len(ids) == 128
        assert "def " in head
        assert tokenizer.decode(ids).endswith(head)


@torch.no_grad()
def test_functions_are_completed_greedily():
    model, tokenizer = load_model(DEMO)
    head = "def first(values):\n"
    beginnings = [(tokenizer.encode(f"import os\n\n\n{head}"), head)] * 2
    own = judge.Setting("own", 0.5, dict.fromkeys(linear_names(model.config), 0.05))
    for setting in (judge.Setting("dense", 0.0), own):
        share = judge.share_of_functions(model, tokenizer, beginnings, setting, 24)
        assert share in (0.0, 1.0)                         # twice the same beginning
    assert 0 < realised_sparsity(model) < 1


def test_what_texts_side_by_side_read():
    model = tiny_model()
    names = linear_names(model.config)
    tokens = tokens_like(model, 12 * 16 + 1)
    thresholds = {name: torch.tensor(1.0) for name in names}
    seen = {}
    hooks = []
    for name in names:
        def look(module, inputs, name=name):
            seen[name] = inputs[0][:, 8:].abs() > 1
        hooks.append(model.get_submodule(name).register_forward_pre_hook(look))
    model(tokens[:-1].view(12, 16))
    for hook in hooks:
        hook.remove()
    sizes = torch.tensor([model.get_submodule(name).weight.numel() for name in names]).double()
    for count in (1, 3, 4):
        read = []
        for keep in seen.values():
            parts = [(part.sum(0) > 0).double().mean() for part in keep.split(count)]
            read.append(torch.stack(parts).mean())
        expected = (torch.stack(read) @ sizes) / sizes.sum()
        share = judge.share_read(model, thresholds, tokens, count, 16)
        assert share == pytest.approx(expected.item(), abs=1e-9)
    with pytest.raises(InputError, match="13 texts of 16 need more"):
        judge.share_read(model, thresholds, tokens, 13, 16)


def test_a_calibration_without_gates_has_no_cats(calibrated):
    model, tokens, _ = calibrated
    calibration = calibrate(model, tokens[:200], 16, "a test")
    with pytest.raises(InputError, match="no distribution of the gate, which cats needs: it is"):
        judge.table_settings(tiny_model(), calibration, ["cats"], [0.25])


def test_sources_are_measured_one_by_one(calibrated):
    model, tokens, calibration = calibrated
    model = tiny_model()
    settings = judge.source_settings(model, calibration)
    rows = judge.judge(model, tokens[:300], settings, 16)
    assert [row["allocation"] for row in rows[1:]] == [
        "0 dense", "1 dense", "4 dense", "16 dense", "64 dense", "q_proj", "k_proj", "v_proj",
        "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "lm_head", "lm_head"]
    _, sizes = calibration.sizes()
    for row, size in zip(rows[6:13], sizes.tolist()):      # each drops half of its own weights
        assert row["sparsity"] == pytest.approx(0.5 * size, abs=0.05 * size)
    assert rows[4]["kl"] == pytest.approx(0, abs=1e-9)     # all of a window is dense
    for row in rows[13:]:
        assert row["sparsity"] == 0
        assert row["kl"] > 0


def test_judge_prints_a_table(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "quality.png"
    options = ["--text", ROOT / "kernel.py", "--tokens", 600, "--sparsity", 0.5, 0.25]
    command(monkeypatch, judge, *options, "--allocation", "uniform", "greedy", "--figure", figure)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("model: ") and "context: 512, scored: 512" in lines[0]
    columns = "target realised perplexity at target agreement KL"
    assert lines[1].split() == columns.split()
    rows = ["dense 0%", "uniform 25%", "uniform 50%", "greedy 25%", "greedy 50%"]
    assert [" ".join(line.split()[:2]) for line in lines[2:]] == rows
    assert figure.read_bytes()[:4] == b"\x89PNG"
    command(monkeypatch, judge, *options, "--beside", DEMO, "--allocation", "uniform", "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed["dense_prefix"] == SINKS
    names = [row["allocation"] for row in printed["rows"]]
    assert names == ["dense", "uniform", "uniform", "demo dense", "demo uniform", "demo uniform"]


def test_judge_answers_the_other_questions(monkeypatch, capsys):
    command(monkeypatch, judge, "--batch", 1, 4, "--tokens", 1100)
    lines = capsys.readouterr().out.splitlines()
    read = [float(line.split()[1].rstrip("%")) for line in lines[1:]]
    assert 40 < read[0] < read[1] < 100
    command(monkeypatch, judge, "--sources", "--text", ROOT / "kernel.py", "--tokens", 260,
            "--context", 128)
    lines = capsys.readouterr().out.splitlines()
    assert "at target" not in lines[1]
    assert len(lines) == 2 + 1 + 15


# --------------------------------------------------------------------------------------------------
# timing.py

@pytest.fixture
def instantly(monkeypatch):
    """Nothing is timed: each call is made once and takes a millisecond; two copies of a weight."""
    def once(call, device):
        call(0)
        return 1e-3

    def two(inputs, outputs, dtype, device):
        return [torch.randn(inputs, outputs).to(dtype) for _ in range(2)]

    for module in (kernel, timing):
        monkeypatch.setattr(module, "median_time", once)
        monkeypatch.setattr(module, "copies_of", two)
    monkeypatch.setattr(kernel, "memory_bandwidth", lambda device: 1e9)
    small = Config(128, 256, 1, 2, 1, 64, 61, 64)
    monkeypatch.setitem(kernel.PRESETS, "small", small)


def test_products_are_timed_and_drawn(monkeypatch, capsys, instantly, tmp_path):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "speed.png"
    command(monkeypatch, timing, "--shapes", "small", "--dtype", "float32", "int8", "int4",
            "--sparsity", 0, 0.5, "--rows", 1, 3, "--figure", figure, "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if line.startswith("128 x 256")]
    kinds = [title.split()[3].rstrip(",") for title in titles]
    assert kinds == ["float32", "float32", "int8", "int8", "int4", "int4"]
    assert ["1 row;" in title for title in titles] == 3 * [True, False]
    start = lines.index(titles[2])
    table = [line.split()[0] for line in lines[start + 1:start + 5]]
    assert table == ["sparsity", "dense", "0%", "50%"]
    half = lines[start + 4].split()
    bytes_read = 0.5 * (128 * 256 + 4 * 256)               # codes, and a scale for each output
    assert float(half[2]) == pytest.approx(bytes_read / 1e-3 / 1e9, abs=0.05)
    assert half[4] == "1.00x"
    assert figure.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(kernel.c_function(torch.float32) is None, reason="no C compiler")
def test_steps_show_what_a_step_takes(monkeypatch, capsys):
    monkeypatch.setattr(timing, "ROUNDS", 5)
    for options in ([], ["--quantize", "int8"]):
        command(monkeypatch, timing, "--steps", "--behind", 40, "--sparsity", 0.4, "--device",
                "cpu", *options)
        lines = capsys.readouterr().out.splitlines()
        assert "behind 40 tokens" in lines[1]
        assert "40% sparse" in lines[1]
        names = [line[:28].strip() for line in lines[2:]]
        assert names == ["recorded", "not recorded", "recorded, but for products",
                         "a prompt of 40 tokens"]
        values = [line[28:].replace("%", "").split() for line in lines[2:]]
        assert all(float(value) >= 0 for row in values for value in row)


@torch.no_grad()
def test_the_products_of_a_step_are_noted_while_it_is_recorded():
    if kernel.c_function(torch.float32) is None:
        pytest.skip("no C compiler")
    model = sparsify(tiny_model(), dict.fromkeys(linear_names(tiny_model().config), 0.5))
    before = dict(kernel.C_CALLS)
    calls = []
    with timing.noting_products(calls):
        record.make_step(model, model.make_cache(1, 4))
    assert kernel.C_CALLS == before
    assert len(calls) == 3 * 7                             # the head is not transposed
    times = timing.time_steps(model, 3)
    assert times.keys() == {(name, mode) for name in ("recorded", "not recorded", "products")
                            for mode in ("off", "decode")} | {("prompt", "off")}


@pytest.mark.parametrize("draft, sizes", [("sparse", [1, 2, 3, 4, 5, 6, 7]),
                                          ("recycle", [1, 3, 7, 15, 31, 79])])
def test_guesses_have_their_price(monkeypatch, capsys, draft, sizes):
    monkeypatch.setattr(timing, "demo_tokens_a_pass",
                        lambda draft, sparsity, sizes: {size: 2.0 for size in sizes})
    clock = itertools.count()            # each call takes a second, by a clock that counts looks
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    model = tiny_model(max_position_embeddings=256, vocab_size=100)
    sparsify(model, dict.fromkeys(linear_names(model.config), 0.5) | {"lm_head": None})
    timing.draft_costs(model, draft, 0.75)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a plain step 1000.0 ms, 1.0 tokens/s"
    assert ("a draft step at 75% 1000.0 ms" in lines) == (draft == "sparse")
    rows = [line.split() for line in lines if line.endswith("x")]
    assert [int(row[0]) for row in rows] == sizes
    for size, drafting, verifying, brought, rate, ratio in rows:
        seconds = int(size) if draft == "sparse" else 1
        assert float(drafting) == 1000 * seconds
        assert float(verifying) == 1000
        assert brought == "2.00"
        assert float(rate) == pytest.approx(2 / (seconds + 1), abs=0.06)
        assert float(ratio.rstrip("x")) == pytest.approx(2 / (seconds + 1), abs=0.006)


@pytest.mark.parametrize("draft", ["sparse", "recycle"])
def test_the_demo_says_what_guesses_bring(draft):
    brought = timing.demo_tokens_a_pass(draft, 0.75, [3], prompts=2, new_tokens=16)
    assert 1 <= brought[3] <= 4


# --------------------------------------------------------------------------------------------------
# The command lines

@pytest.mark.parametrize("module, options, message", [
    (allocate, ["--quantize", "int4"], "--quantize needs --out"),
    (allocate, ["--figures", "x", "--greedy"], "--greedy means nothing with --figures"),
    (allocate, ["--import-teal", "x", "--no-fisher"],
     "--no-fisher means nothing with --import-teal"),
    (allocate, ["--import-teal", "x"], "x/histograms/layer-0/.*cannot be read"),
    (allocate, ["--text", DEMO / "model.safetensors"], "not UTF-8 text"),
    (allocate, ["--model", "random:llama-3.2-1b"], "random weights"),
    (allocate, ["--out", "nowhere/x"], "nowhere is no folder; see --out"),
    (judge, ["--context", 4000], "a window of 4000 tokens does not fit the model's context of 512"),
    (judge, ["--paper"], "a window of 2560 tokens does not fit the model's context of 512"),
    (judge, ["--scored", 600], "--scored is 600, expected 1 to 512"),
    (judge, ["--dense-prefix", 512], "--dense-prefix is 512, expected 0 to 511"),
    (judge, ["--sources", "--sparsity", 0.25], "--sparsity means nothing with --sources"),
    (judge, ["--batch", 2, "--scored", 9], "--scored means nothing with --batch"),
    (judge, ["--held-in", "x"], "--held-in means nothing without --allocation larosa"),
    (judge, ["--paper", "--context", 64], "--context means nothing with --paper"),
    (judge, ["--beside", "x", "--functions", 3], "--functions means nothing with --beside"),
    (judge, ["--calibration", "nowhere"], "nowhere: no calibration"),
    (judge, ["--batch", 0], "0 is not a whole number above 0"),
    (judge, ["--functions", -5], "--functions is -5"),
    (judge, ["--figure", "nowhere/x.png"], "nowhere is no folder; see --figure"),
    (judge, ["--figure", "x.pdf"], "--figure is x.pdf, expected a name that ends in .png"),
    (judge, ["--model", "random:llama-3.2-1b"], "random weights: it has no quality to measure"),
    (judge, ["--text", "nowhere.txt"], "nowhere.txt: cannot be read"),
    (judge, ["--text", ROOT / "LICENSE", "--tokens", 100],
     "the text has 100 tokens, a window of 512 needs 513"),
    (judge, ["--sparsity", 1.5], "argument --sparsity: 1.5, expected at least 0 and below 1"),
    (judge, ["--text", ROOT / "LICENSE", "--allocation", "other"],
     "allocation 'other' is not in this calibration"),
    (watch, [], "the following arguments are required: --figure"),
    (watch, ["--figure", "x.pdf"], "--figure is x.pdf, expected a name that ends in .png"),
    (watch, ["--figure", "nowhere/x.png"], "nowhere is no folder; see --figure"),
    (watch, [*PICTURE, "--text", "x", "--prompt", "y"], "--prompt means nothing with --text"),
    (watch, [*PICTURE, "--model", "random:llama-3.2-1b"], "random weights: there is no text to"),
    (watch, [*PICTURE, "--text", os.devnull], "/dev/null has 1 tokens, expected more than the 16"),
    (watch, [*PICTURE, "--calibration", "nowhere"], "nowhere: no calibration"),
    (watch, [*PICTURE, "--prompt", "x " * 600], "the prompt has .* tokens, the model's"),
    (watch, [*PICTURE, "--tokens", 0], "0 is not a whole number above 0"),
    (timing, ["--device", "warp"], "device warp cannot be used"),
    (timing, ["--figure", "x.pdf"], "expected a name that ends in .png"),
    (timing, ["--shapes", "gpt"], "invalid choice: 'gpt'"),
    (timing, ["--sparsity", 2], "argument --sparsity: 2, expected at least 0 and below 1"),
    (timing, ["--rows", 9], "--rows 9 is outside 1 to 8"),
    (timing, ["--steps", "--sparsity", 2], "argument --sparsity: 2, expected at least 0"),
    (timing, ["--steps", "--behind", 0], "0 is not a whole number above 0"),
])
def test_bad_input_on_the_command_line(monkeypatch, module, options, message):
    with pytest.raises(InputError, match=message) as raised:
        command(monkeypatch, module, *options)
    assert "\n" not in str(raised.value)


def test_cats_reaches_few_levels(calibrated):
    _, _, calibration = calibrated
    settings = judge.table_settings(tiny_model(), calibration, ["cats"], [0.1, 0.25, 0.75])
    assert [setting.target for setting in settings] == [0.1, 0.25]
    with pytest.raises(InputError, match="nothing to measure: cats reach none"):
        judge.table_settings(tiny_model(), calibration, ["cats"], [0.75])


def test_a_command_that_fails_says_so_in_one_line():
    failed = subprocess.run([sys.executable, "-m", "beyond.judge", "--sparsity", "1.5"], cwd=ROOT,
                            capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("judge.py: error: argument --sparsity")


@pytest.mark.parametrize("module, options", [(allocate, []), (judge, []), (timing, []),
                                             (timing, ["--steps"]), (watch, [])])
def test_help_names_the_default_of_each_option(monkeypatch, capsys, module, options):
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, module, *options, "--help")
    assert ended.value.code == 0
    described = re.split(r"\n  (?=-)", capsys.readouterr().out.split("options:")[1])[2:]
    assert all("default" in option for option in described)    # after --help
