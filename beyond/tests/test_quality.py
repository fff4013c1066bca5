"""Tests of allocate.py, teal.py, rotate.py, and of lab/'s judge.py, peers.py and figures.py."""
import copy
import functools
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import calibrate as calibrate_module
import model as core
from beyond import allocate, codes, folders, rotate, teal
from beyond.lab import figures, functions, judge, peers, watch
from beyond.tests.conftest import random_llama
from calibrate import (LINEARS, SINKS, SITE_OF, Calibration, calibrate, evenly, histogram,
                       load_calibration, quantile, some_windows, spread)
from model import (DEMO, InputError, Llama, linear_names, load_model, load_tokenizer, read_json,
                   read_safetensors, windows_of, write_json, write_safetensors)
from sparsify import (counted, perplexity, quality, realised_sparsity, sparse_mode, sparsify)

ROOT = Path(__file__).parent.parent.parent
PICTURE = ["--figure", ROOT / "never-written.png"]
ADDED = ["priced", "balanced", "uniform"]
SHAPE = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=12, vocab_size=61, max_position_embeddings=64)


def tiny_model(dtype=torch.float32, **changes):
    """Return a small Llama, see conftest.py."""
    return random_llama(dtype, **SHAPE | changes)


def tokens_like(model, *shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, shape, generator=generator)


def close(y, expected, tolerance):
    """Return whether the relative error of a whole tensor is small; NaN never passes."""
    y, expected = y.double(), expected.double()
    return bool((y - expected).norm() <= tolerance * expected.norm().clamp(min=1e-30))


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
    allocate.add_balanced(calibration, model, tokens, 16)
    allocate.add_priced(calibration, model, tokens)
    return model, tokens, calibration


@pytest.fixture(scope="module")
def settled(calibrated):
    """The calibration of `calibrated`, its thresholds those of the sparse model."""
    model, tokens, calibration = calibrated
    settled = copy.deepcopy(calibration)
    allocate.settle(settled, model, tokens)
    return settled


def test_windows_are_spread_over_a_text():
    tokens = torch.arange(1001)
    assert evenly(windows_of(tokens, 10), 3)[:, 0].tolist() == [0, 500, 990]
    chosen = spread(tokens, 35, 10)                        # three stretches, and what follows them
    assert chosen.tolist() == [*range(10), *range(500, 510), *range(990, 1001)]
    assert windows_of(chosen, 10)[:, :-1].flatten().tolist() == chosen[:-1].tolist()
    assert spread(tokens[:30], 35, 10).tolist() == list(range(30))         # all there is
    assert spread(tokens, 9, 10).tolist() == list(range(9))                # less than a stretch


def test_share_below_inverts_the_quantile():
    torch.manual_seed(0)
    x = torch.randn(40, 5000) * 3
    x[:, ::10] = 0
    counts = histogram(x)
    for share in (0.2, 0.5, 0.9, 0.999):
        value = quantile(counts, share)
        assert allocate.share_below(counts, value).item() == pytest.approx(share, abs=1e-9)


def test_every_allocation_shares_out_what_is_asked_for(calibrated):
    _, _, calibration = calibrated
    _, sizes = calibration.sizes()
    assert calibration.allocations == ADDED
    for allocation in ADDED:
        for sparsity in (0.0, 0.02, 0.25, 0.33, 0.5, 0.8, 0.95, 0.97):
            shares = calibration.sparsities(sparsity, allocation)
            assert (shares @ sizes).mean().item() == pytest.approx(sparsity, abs=1e-4)


@torch.no_grad()
def test_settled_thresholds_drop_what_they_are_to_drop(calibrated, settled):
    """In the sparse model, each linear, on the text that they were found on."""
    _, tokens, calibration = calibrated
    assert settled.allocations == ADDED
    model = sparsify(tiny_model(), settled.thresholds(0.5))
    windows = some_windows(model, tokens, *allocate.WINDOWS)
    dropped = {}
    for linear in allocate.linears_of(model):
        def see(module, inputs):
            dropped[module] = 1 - module.keep(inputs[0])[:, SINKS:].double().mean().item()
        linear.register_forward_pre_hook(see)
    for allocation in ADDED:
        for level in (0.25, 0.65):
            thresholds = settled.thresholds(level, allocation)
            with counted(model), sparse_mode(model, "all", thresholds, SINKS):
                model(windows)
            assert realised_sparsity(model) == pytest.approx(level, abs=0.002)
            wanted = calibration.sparsities(level, allocation).flatten().tolist()
            found = [dropped[linear] for linear in allocate.linears_of(model)]
            assert found == pytest.approx(wanted, abs=0.01)


def test_fisher_information_is_the_mean_square_gradient():
    """One block at a time, as in one backward pass through the whole; the first block's v alone."""
    model = tiny_model(torch.float64, sliding_window=5)    # which the mask of the context shows
    windows = windows_of(tokens_like(model, 33), 32)
    computed = allocate.fisher_information(model, windows)[0, LINEARS.index("self_attn.v_proj")]
    logits = model(windows[:, :-1])[0]                     # the same labels
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0]
    leaf = None

    def own_leaf(module, inputs):        # that only this linear reads
        nonlocal leaf
        leaf = inputs[0].detach().requires_grad_()
        return leaf

    model.model.layers[0].self_attn.v_proj.register_forward_pre_hook(own_leaf)
    F.cross_entropy(model(windows[:, :-1])[0], labels, reduction="sum").backward()
    assert computed.item() == pytest.approx(leaf.grad[0, SINKS:].square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_go_through_float32_where_there_are_no_instructions(monkeypatch, dtype):
    """The same F as where there are, and no matrix of 16 bits is multiplied on the way back."""
    model = tiny_model(dtype)
    windows = windows_of(tokens_like(model, 33 * 4), 32)
    expected = allocate.fisher_information(tiny_model(dtype).float(), windows)
    monkeypatch.setattr(core, "can_multiply", lambda dtype: dtype in (torch.float32, torch.float64))
    seen = set()

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), named=None):
            if function.__name__ in ("matmul", "__matmul__", "linear", "mm", "bmm"):
                seen.update(x.dtype for x in arguments if isinstance(x, torch.Tensor))
            return function(*arguments, **named or {})
    with Watching():
        information = allocate.fisher_information(model, windows)
    assert seen == {torch.float32}
    assert torch.allclose(information, expected, rtol=1e-3)


def test_balanced_is_halfway_from_one_price_to_one_a_block(calibrated):
    """At one price every linear gives up inputs at the same F t² / out."""
    model, tokens, calibration = calibrated
    outputs, sizes = calibration.sizes()
    counts = calibration.counts[:, list(SITE_OF.values())]
    fisher = allocate.fisher_information(model, windows_of(tokens, 16))
    by_model = allocate.one_price(counts, fisher, outputs, sizes, 0.25)
    thresholds = torch.stack(list(calibration.thresholds_at(by_model).values())).view(3, 7)
    price = fisher * thresholds.double().square() / outputs
    assert torch.allclose(price, price.mean().expand(3, 7), rtol=0.1)           # an empty bin
    by_block = 2 * calibration.sparsities(0.25, "balanced") - by_model
    assert torch.allclose(by_block @ sizes, torch.full((3,), 0.25, dtype=torch.float64), atol=1e-4)
    own = allocate.one_price(counts[1:2], fisher[1:2], outputs, sizes, 0.25)
    assert torch.allclose(by_block[1:2], own, atol=1e-6)


@torch.no_grad()
def test_prices_are_what_weights_cost(calibrated):
    """The gradient near the thresholds foretells what the KL does when a threshold is moved."""
    model, _, calibration = calibrated
    names = linear_names(model.config)
    windows = windows_of(tokens_like(model, 6000), 64)[:, :-1]
    dense = []
    with model.model.norm.register_forward_hook(lambda module, x, y: dense.append(y)):
        exact = model(windows).log_softmax(-1)
    shares = calibration.sparsities(0.1, "balanced")
    foretold, total = allocate.prices(model, windows, dense[0], shares)
    foretold = foretold.flatten()
    with allocate.dropping(model, shares) as found:
        model(windows)
    thresholds = dict(zip(names, found))
    sparse_model = sparsify(tiny_model(), thresholds)

    def kl_to_dense():
        log_p = sparse_model(windows).log_softmax(-1)
        return F.kl_div(log_p, exact, reduction="sum", log_target=True).item()

    def kl_and_dropped(name, factor):
        changed = {name: factor * thresholds[name]}
        with counted(sparse_model), sparse_mode(sparse_model, "all", changed, SINKS):
            kl = kl_to_dense()
        return kl, realised_sparsity(sparse_model) * weights * windows[:, SINKS:].numel()

    weights = sum(model.get_submodule(name).weight.numel() for name in names)
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
            settings.append(judge.own(name, level, settled.thresholds(level, name)))
    rows = judge.judge(tiny_model(), tokens, settings)
    for balanced, priced in zip(rows[1::2], rows[2::2]):
        assert priced["sparsity"] == pytest.approx(balanced["sparsity"], abs=0.01)
        assert priced["kl"] < 1.02 * balanced["kl"]
    assert rows[2]["kl"] < 0.97 * rows[1]["kl"]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_is_calibrated_like_others(bits):
    config = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
    model = codes.quantize(tiny_model(**config), bits, 32)
    tokens = tokens_like(model, 200)
    calibration = calibrate(model, tokens, 16)
    allocate.add_balanced(calibration, model, tokens, 16)
    allocate.add_priced(calibration, model, tokens)
    calibration.check(model)
    plain = tiny_model(**config)
    of_plain = calibrate(plain, tokens, 16)
    allocate.add_balanced(of_plain, plain, tokens, 16)
    difference = calibration.sparsities(0.5, "balanced") - of_plain.sparsities(0.5, "balanced")
    assert difference.abs().max() < 0.15


def test_a_sparse_model_is_not_calibrated(calibrated):
    _, tokens, calibration = calibrated
    model = sparsify(tiny_model(), calibration.thresholds(0.5))
    for add in (allocate.add_balanced, allocate.add_priced, allocate.settle):
        with pytest.raises(InputError, match="this one was made sparse"):
            add(calibration, model, tokens)


def test_allocate_writes_what_figures_draws(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "tiny"
    tiny_model(vocab_size=4096, num_hidden_layers=1).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
    options = ["--model", folder, "--text", ROOT / "kernel.py", "--tokens", 700]
    for more, allocations in [(["--no-gradients", "--greedy"], "greedy, uniform"),
                              (["--tokens", 30, "--context", 16], "balanced, uniform"),   # enough
                              (["--priced", "--greedy"], "priced, balanced, greedy, uniform")]:
        command(monkeypatch, allocate, *options, *more)
        assert f"allocations: {allocations}\n" in capsys.readouterr().out
    model, _ = load_model(folder)
    loaded = load_calibration(model, folder)
    assert ", ".join(loaded.allocations) == allocations
    assert loaded.tables["priced"].shares.shape == (len(allocate.LEVELS), 1, 7)
    command(monkeypatch, figures, "--model", folder, "--out", tmp_path / "figures")
    for name in ("distributions.png", "allocations.png"):
        assert (tmp_path / "figures" / name).read_bytes()[:4] == b"\x89PNG"
    out = tmp_path / "int8.safetensors"
    command(monkeypatch, allocate, *options, "--quantize", "int8", "--out", out)
    assert Calibration.load(out).allocations == ["balanced", "uniform"]


# --------------------------------------------------------------------------------------------------
# teal.py

@pytest.fixture
def published(tmp_path):
    """(folder, histograms, greedy shares (18, 7)) of a model, as TEAL's authors publish them."""
    folder = tmp_path / "Tiny-7B"
    torch.manual_seed(0)
    shares = torch.arange(1, 19)[:, None] * 0.05 * torch.tensor([1.0, 0.9, 0.5, 1, 0.9, 0.9, 1])
    rows = "".join(f"0,0,0,{','.join(map(str, row))}\n" for row in shares.tolist())
    header = "Effective Sparsity,Activation Error,Baseline Error,q,k,v,o,gate,up,down\n"
    histograms = {}
    for layer in range(3):
        for part in ("self_attn", "mlp"):
            tensors = histograms[layer, part] = {}
            for key in ("h1", "h2") + ("h1.5",) * (part == "mlp"):         # as their utils.py does
                x = (torch.randn(20_000) * torch.rand(())).sort().values
                bins = torch.cat((x[:1], torch.linspace(x[200], x[-200], 9999), x[-1:]))
                tensors[key] = torch.histogram(x, bins=bins)[0]
                tensors[f"{key}_centers"] = (bins[:-1] + bins[1:]) / 2
            path = folder / "histograms" / f"layer-{layer}" / part
            path.mkdir(parents=True)
            torch.save(tensors, path / "histograms.pt")
        path = folder / "lookup" / f"layer-{layer}"
        path.mkdir(parents=True)
        (path / "results.csv").write_text(header + rows)
    return folder, histograms, shares


def their_threshold(histogram, key, sparsity):
    """TEAL's: the inverse of the cumulative counts at 0.5 + s/2, linear between bin centers."""
    below = histogram[key].double().cumsum(0)
    centers = histogram[f"{key}_centers"].double()
    target = (0.5 + sparsity / 2) * below[-1]
    at = int(torch.searchsorted(below, target))
    fraction = (target - below[at - 1]) / (below[at] - below[at - 1])
    return (centers[at - 1] + fraction * (centers[at] - centers[at - 1])).item()


def test_the_authors_statistics_are_imported(published, monkeypatch, capsys, tmp_path):
    folder, histograms, shares = published
    tiny_model().save_pretrained(tmp_path)
    command(monkeypatch, teal, "--model", tmp_path, folder)
    assert ("the statistics TEAL's authors publish for Tiny-7B; allocations: greedy, uniform"
            in capsys.readouterr().out)
    loaded = load_calibration(tiny_model(), tmp_path)
    for sparsity in (0.1, 0.25, 0.5, 0.9):
        for name, threshold in loaded.thresholds(sparsity, "uniform").items():
            layer, part, linear = name.split(".")[2:]
            key = "h2" if linear in ("o_proj", "down_proj") else "h1"
            expected = their_threshold(histograms[int(layer), part], key, sparsity)
            assert threshold.item() == pytest.approx(expected, rel=0.01, abs=1e-3)
    _, sizes = loaded.sizes()
    row = shares[9].double()             # a row of theirs: the same shares at the same sparsity
    found = loaded.sparsities((row @ sizes).item(), "greedy")
    assert torch.allclose(found, row.expand(3, 7), atol=1e-4)


def test_what_the_authors_files_may_hold_and_what_not(published):
    folder, histograms, _ = published
    config = tiny_model().config
    before = teal.import_teal(folder, config)
    histogram = histograms[1, "mlp"]
    histogram_path = folder / "histograms" / "layer-1" / "mlp" / "histograms.pt"
    table_path = folder / "lookup" / "layer-2" / "results.csv"
    torch.save({key: x for key, x in histogram.items() if "h1.5" not in key}, histogram_path)
    for path in folder.glob("lookup/*/*.csv"):           # where shares reach 1 a path is cut
        path.write_text(path.read_text() + "0,0,0,1,.95,.7,1,.95,.95,1\n"
                                           "0,0,0,1.2,.95,.7,1.1,.95,.95,1\n")
    after = teal.import_teal(folder, config)
    assert torch.equal(after.tables["greedy"].shares, before.tables["greedy"].shares)
    for layers, message in [(4, "layer-3/.*cannot be read: No such file"),
                            (2, "more layers than the model's 2")]:
        with pytest.raises(InputError, match=message):
            teal.import_teal(folder, tiny_model(num_hidden_layers=layers).config)
    falling = ".5,.5,.5,.5,.5,.5,.5\n.4,.5,.5,.5,.5,.5,.5\n"
    for text in ("", "q,k\n1,2\n", f"q,k,v,o,gate,up,down\n{falling}"):
        table_path.write_text(text)
        with pytest.raises(InputError, match="results.csv: not a greedy path"):
            teal.import_teal(folder, config)
    for bad in ({}, histogram | {"h2": histogram["h2"][1:]}, histogram | {"h1": -histogram["h1"]}):
        torch.save(bad, histogram_path)
        with pytest.raises(InputError, match="not a histogram of TEAL's authors: expected h[12] "):
            teal.import_teal(folder, config)


# --------------------------------------------------------------------------------------------------
# rotate.py

def rotate_by(model, windows, folder, out):
    """Rotate a folder to the principal directions of a model on windows."""
    Q, R = map(rotate.principal_directions, rotate.covariances(model, windows))
    rotate.rotate(folder, out, Q, R, torch.float32)


@torch.no_grad()
def test_a_rotated_checkpoint_is_written_in_its_principal_directions(tmp_path):
    """In as many files as it had; a head that is stored counts, whatever config.json says."""
    model = tiny_model()
    tokens = tokens_like(model, 1, 12)
    plain = tmp_path / "plain"
    model.save_pretrained(plain)
    config = read_json(plain / "config.json")
    write_json(plain / "config.json", config | {"tie_word_embeddings": True})
    tensors = read_safetensors(plain / "model.safetensors")
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        write_safetensors(plain / file, {name: tensors[name] for name in tensors
                                         if weight_map[name] == file})
    write_json(plain / "model.safetensors.index.json", {"weight_map": weight_map})
    (plain / "model.safetensors").unlink()
    windows = windows_of(tokens_like(model, 600), 20)
    rotate_by(model, windows, plain, tmp_path / "turned")
    turned = Llama.from_pretrained(tmp_path / "turned")
    assert close(turned(tokens), model(tokens), 1e-5)
    assert (tmp_path / "turned" / "model-1.safetensors").exists()
    assert read_json(tmp_path / "turned" / "config.json")["tie_word_embeddings"] is False
    # In the new basis the directions are uncorrelated, and the first carries the most.
    stream, heads = rotate.covariances(turned, windows)
    assert close(stream, stream.diag().diag(), 1e-4)
    assert (stream.diag().diff() <= 1e-3 * stream.max()).all()
    assert close(heads, torch.diag_embed(heads.diagonal(dim1=-2, dim2=-1)), 1e-4)
    with pytest.raises(InputError, match="exists already"):
        rotate_by(model, windows, plain, tmp_path / "turned")
    with pytest.raises(InputError, match="the text is too short"):
        rotate_by(model, windows[:1, :7], plain, tmp_path / "other")


REFERENCES = {               # what is special: settings of transformers' configuration
    "grouped heads, explicit head_dim, biases": {
        "num_key_value_heads": 2, "head_dim": 24, "attention_bias": True, "mlp_bias": True},
    "tied head, llama3 rope": {"tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    "mistral, sliding window": {"num_key_value_heads": 2, "sliding_window": 7},
}


@torch.no_grad()
@pytest.mark.parametrize("what", REFERENCES)
def test_a_rotated_checkpoint_is_the_same_in_transformers(tmp_path, what):
    """Rotated once and twice."""
    transformers = pytest.importorskip("transformers", reason="see requirements-dev.txt")
    kind = "Mistral" if "mistral" in what else "Llama"
    maker = getattr(transformers, f"{kind}ForCausalLM")
    torch.manual_seed(0)
    theirs = maker(getattr(transformers, f"{kind}Config")(**{
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 101,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} | REFERENCES[what])).eval()
    for name, parameter in theirs.named_parameters():
        scale = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
        parameter.copy_(torch.randn(parameter.shape) * scale + ("norm" in name))
    theirs.save_pretrained(tmp_path / "plain")
    tokens = tokens_like(theirs, 2, 40)
    expected = theirs(tokens).logits
    for source, out in (("plain", "once"), ("once", "twice")):
        model = Llama.from_pretrained(tmp_path / source)
        windows = windows_of(tokens_like(model, 32 * 12 + 1), 32)
        rotate_by(model, windows, tmp_path / source, tmp_path / out)
        assert close(Llama.from_pretrained(tmp_path / out)(tokens), expected, 1e-4)
        again = maker.from_pretrained(tmp_path / out, dtype=torch.float32)
        assert close(again(tokens).logits, expected, 1e-4)


def test_rotate_writes_a_folder_like_any_other(tmp_path, monkeypatch, capsys):
    out = tmp_path / "turned"
    command(monkeypatch, rotate, "--out", out, "--text", ROOT / "generate.py",
            "--tokens", 1600, "--dtype", "bfloat16")
    said = capsys.readouterr().out
    assert float(re.search(r"by (\S+) relative", said)[1]) < 0.05
    assert (out / "tokenizer.model").read_bytes() == (DEMO / "tokenizer.model").read_bytes()
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    model, _ = load_model(out)
    assert model.dtype == torch.bfloat16 and not folders.is_quantized(out)


def test_calibration_and_rotation_see_two_halves(monkeypatch, tmp_path):
    """Of a text that is long enough: what fits one of them by accident does not fit the other."""
    seen = []

    def stop(*arguments):
        seen.append(next(of for of in arguments if isinstance(of, torch.Tensor)))
        raise InputError("stopped")

    text = tmp_path / "text"
    text.write_text("".join(f"line {i}\n" for i in range(3000)))
    monkeypatch.setattr(calibrate_module, "calibrate", stop)
    monkeypatch.setattr(rotate, "covariances", stop)
    for module in (allocate, rotate):
        with pytest.raises(InputError, match="stopped"):
            command(monkeypatch, module, "--text", text, "--tokens", 1100, "--out", tmp_path / "x")
    lines = []
    for tokens in seen:
        written = load_tokenizer(DEMO).decode(tokens.flatten().tolist())
        lines.append([int(of) for of in re.findall(r"line (\d+)(?=\n)", written)])
    assert min(map(len, lines)) > 50
    assert max(lines[0]) < 1510 and min(lines[1]) > 1490
    assert min(lines[0]) < 10 and max(lines[1]) > 2900


# --------------------------------------------------------------------------------------------------
# lab/judge.py

@pytest.fixture(scope="module")
def thresholds():
    """Thresholds of a tiny model, one a channel, some of them large."""
    model = tiny_model()
    return {name: torch.rand(model.get_submodule(name).in_features) for name
            in linear_names(model.config)}


def test_judge_measures_what_sparsify_does(thresholds):
    model = tiny_model(torch.float64)
    tokens = tokens_like(model, 70)
    nothing = dict.fromkeys(thresholds, 0.0)
    settings = [judge.own("own", 0.5, thresholds), judge.own("none", 0.0, nothing)]
    rows = judge.judge(model, tokens, settings, 8)
    expected = quality(tiny_model(torch.float64), windows_of(tokens, 8), [thresholds, nothing])
    for row, of in zip(rows, expected.tolist()):
        assert [row[key] for key in ("perplexity", "kl", "agreement", "sparsity")] == (
            pytest.approx(of, abs=1e-9))
    assert rows[0]["agreement"] == rows[2]["agreement"] == 1
    sparsify(model, thresholds)
    assert rows[1]["perplexity"] == pytest.approx(perplexity(model, tokens, 8))


@torch.no_grad()
def test_the_papers_protocol(thresholds):
    """Part of each window is context only, and its start is dense."""
    model = tiny_model(torch.float64)
    tokens = tokens_like(model, 70)
    setting = judge.own("own", 0.5, thresholds, 4)
    late = judge.judge(model, tokens, [setting], 12, scored=4)[1]
    losses = []
    with sparse_mode(model, "all", dense_prefix=4):
        for i in range(0, 70 - 12, 4):
            logits = model(tokens[None, i:i + 12])[0, 8:]
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


@torch.no_grad()
def test_functions_are_cut_parsed_and_completed(monkeypatch):
    good = functions.is_function
    head = "    def f(self):\n"
    assert good(head, "        return 1\n\n    def g(self, x\n")              # cut off after f
    assert good(head, "        if self:\n            return 1\n        unfini")
    assert not good(head, "        return (1\n\n    def g(self):\n")
    assert not good(head, "    x = 1\n")                   # nothing in it
    model, tokenizer = load_model(DEMO)
    files = functions.corpus.files("held-out")[:8]
    monkeypatch.setattr(functions.corpus, "files", lambda part: files if part == "held-out" else [])
    beginnings = functions.function_beginnings(tokenizer, 20)
    assert len(beginnings) == 20
    for ids, head in beginnings:
        assert len(ids) == 128 and "def " in head
        assert tokenizer.decode(ids).endswith(head)
    own = judge.own("own", 0.5, dict.fromkeys(linear_names(model.config), 0.05))
    for setting in (judge.DENSE, own):
        share = functions.share_of_functions(model, tokenizer, beginnings[:1] * 2, setting, 24)
        assert share in (0.0, 1.0)                         # twice the same beginning
    assert 0 < realised_sparsity(model) < 1


@torch.no_grad()
def test_what_texts_side_by_side_read(thresholds):
    model = tiny_model()
    tokens = tokens_like(model, 12 * 16 + 1)
    seen = {}
    for name in thresholds:
        def look(module, inputs, name=name):
            seen[name] = inputs[0][:, 8:].abs() > thresholds[name]              # (12, 8, in)
        model.get_submodule(name).register_forward_pre_hook(look)
    sizes = {name: model.get_submodule(name).weight.numel() for name in thresholds}
    for number in (1, 3, 4):
        share = judge.share_read(model, thresholds, tokens, number, 16)
        read = [sizes[name] * torch.stack([part.any(0) for part in keep.split(number)])
                .double().mean().item() for name, keep in seen.items()]
        assert share == pytest.approx(sum(read) / sum(sizes.values()), abs=1e-9)
    with pytest.raises(InputError, match="13 texts of 16 need more"):
        judge.share_read(model, thresholds, tokens, 13, 16)


def test_sources_are_measured_one_by_one(calibrated):
    _, tokens, calibration = calibrated
    model = tiny_model()
    windows = windows_of(tokens, 16)[:20]
    settings = judge.source_settings(model, calibration, windows)
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
    assert rows[13]["kl"] < rows[14]["kl"] < rows[15]["kl"]


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
            "--context", 128, "--held-in", ROOT / "calibrate.py")
    lines = capsys.readouterr().out.splitlines()
    assert "at target" not in lines[1]
    assert len(lines) == 2 + 1 + 15


# --------------------------------------------------------------------------------------------------
# lab/peers.py

@torch.no_grad()
def test_cats_drops_channels_with_a_small_gate(calibrated):
    model, tokens, calibration = calibrated
    windows = windows_of(tokens, 16)
    settings = judge.table_settings(model, calibration, ["cats"], [0.1, 0.25, 0.75], 0, windows)
    rows = judge.judge(model, tokens, settings, 16)
    assert [row["sparsity"] for row in rows] == pytest.approx([0, 0.1, 0.25], abs=0.02)
    with pytest.raises(InputError, match="nothing to measure: cats reach none"):
        judge.table_settings(model, calibration, ["cats"], [0.75], 0, windows)

    by_hand = tiny_model()
    dropped = []
    for block, gates in zip(by_hand.model.layers, peers.gate_counts(model, windows)):
        share = 0.25 / (2 * 32 * 56) * sum(of.numel() for of in block.parameters() if of.ndim == 2)

        def drop(module, inputs, output, threshold=quantile(gates, share).float()):
            keep = F.silu(output).abs() > threshold
            dropped.append(1 - keep.double().mean().item())
            return output * keep
        block.mlp.gate_proj.register_forward_hook(drop)
    assert rows[2]["perplexity"] == pytest.approx(perplexity(by_hand, tokens, 16))
    expected = 0.25 / share * sum(dropped) / len(dropped)
    assert rows[2]["sparsity"] == pytest.approx(expected, rel=1e-3)     # parts differ in length

    changed = tiny_model()               # gates are counted after the activation of the model
    for block in changed.model.layers:
        block.mlp.activation = F.relu
    zeros = [(counts[:, 0].sum() / counts.sum()).item()
             for counts in (peers.gate_counts(model, windows), peers.gate_counts(changed, windows))]
    assert zeros[0] < 0.01
    assert zeros[1] == pytest.approx(0.5, abs=0.2)


@torch.no_grad()
def test_peers_that_drop_nothing_are_dense(calibrated):
    """Their bases are orthogonal, and what they read beside the linears is set off."""
    model, tokens, calibration = calibrated
    inputs = tokens[None, :30]
    dense = model(inputs)
    total = sum(model.get_submodule(name).weight.numel() for name in linear_names(model.config))
    ranks = peers.low_ranks(model)
    nothing = dict.fromkeys(linear_names(model.config), torch.tensor(0.0))
    bases = peers.wina_bases(model)
    directions = peers.larosa_bases(model, windows_of(tokens, 16)[:20])
    for peer, more in (
        (functools.partial(peers.turned, bases, peers.column_norms(model, bases), 0.0, 500), 500),
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
@pytest.mark.parametrize("is_turned", [False, True])
def test_wina_keeps_the_largest_products_with_columns(calibrated, is_turned):
    """As it is, or in a basis in which the first linear's columns are orthogonal."""
    model, tokens, calibration = calibrated
    bases = dict.fromkeys(linear_names(model.config))
    if is_turned:
        bases = peers.wina_bases(model)
        first = model.get_submodule("model.layers.1.mlp.gate_proj").weight
        turned = first @ bases["model.layers.1.mlp.up_proj"]
        gram = turned.T @ turned
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-4 * gram.max()
    drop = functools.partial(peers.turned, bases, peers.column_norms(model, bases), 0.25, 0)
    # In the first block nothing was dropped before q, k and v: the smallest |z| · ‖column‖ are.
    name = "model.layers.0.self_attn.v_proj"
    linear = model.get_submodule(name)
    basis = torch.eye(32) if bases[name] is None else bases[name]
    z = model.model.layers[0].input_layernorm(model.embed(tokens[None, :8])) @ basis
    size = z.abs() * (linear.weight @ basis).norm(dim=0)
    expected = (z * (size > size.sort(-1).values[..., 7:8])) @ basis.T @ linear.weight.T
    outputs = []
    with drop(model, "all") as sparsity:
        with linear.register_forward_hook(lambda module, x, y: outputs.append(y)):
            model(tokens[None, :8])
    assert torch.allclose(outputs[0], expected, atol=1e-5)
    assert sparsity() == pytest.approx(0.25, abs=0.01)


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


# --------------------------------------------------------------------------------------------------
# The command lines

@pytest.mark.parametrize("module, options, message", [
    (allocate, ["--quantize", "int4"], "--quantize needs --out"),
    (allocate, ["--priced", "--no-gradients"], "--priced needs the gradients that"),
    (allocate, ["--import-teal", "x"], "are read by: python -m beyond.teal --model .*demo x"),
    (allocate, ["--model", "random:llama-3.2-1b"], "random weights"),
    (allocate, ["--out", "nowhere/x"], "see --out"),
    (teal, ["--model", DEMO, "x", "--out", "/tmp/x"], "x/histograms/layer-0/.*cannot be read"),
    (teal, ["--model", "nowhere", "x"], "nowhere: no such folder"),
    (teal, ["--model", DEMO, "x", "--out", "nowhere/x"], "see --out"),
    (rotate, ["--out", DEMO], "demo: exists already"),
    (rotate, [], "required: --out"),
    (rotate, ["--model", "random:llama-3.2-1b", "--out", "x"], "random weights"),
    (rotate, ["--model", "nowhere", "--out", "x"], "nowhere: no such folder"),
    (figures, ["--calibration", "nowhere"], "nowhere: no calibration"),
    (judge, ["--context", 4000], "--context 4000 does not fit the model's context of 512"),
    (judge, ["--paper"], "--context 2560 does not fit the model's context of 512"),
    (judge, ["--scored", 600], "--scored is 600, expected 1 to 512"),
    (judge, ["--dense-prefix", 512], "--dense-prefix is 512, expected 0 to 511"),
    (judge, ["--sources", "--sparsity", 0.25], "--sparsity means nothing with --sources"),
    (judge, ["--batch", 2, "--scored", 9], "--scored means nothing with --batch"),
    (judge, ["--batch", 2, "--held-in", "x"], "--held-in means nothing with --batch"),
    (judge, ["--paper", "--context", 64], "--context means nothing with --paper"),
    (judge, ["--beside", "x", "--functions", 3], "--functions means nothing with --beside"),
    (judge, ["--calibration", "nowhere"], "nowhere: no calibration"),
    (judge, ["--functions", -5], "--functions is -5"),
    (judge, ["--figure", "nowhere/x.png"], "see --figure"),
    (judge, ["--figure", "x.pdf"], "--figure is x.pdf, expected a name that ends in .png"),
    (judge, ["--model", "random:llama-3.2-1b"], "random weights: it has no quality to measure"),
    (judge, ["--text", ROOT / "LICENSE", "--tokens", 100],
     "the text has 100 tokens, a window of 512 needs 513"),
    (judge, ["--text", ROOT / "LICENSE", "--allocation", "other"],
     "allocation 'other' is not in this calibration"),
    (watch, [], "the following arguments are required: --figure"),
    (watch, ["--figure", "nowhere/x.png"], "see --figure"),
    (watch, [*PICTURE, "--text", "x", "--prompt", "y"], "--prompt means nothing with --text"),
    (watch, [*PICTURE, "--model", "random:llama-3.2-1b"], "random weights: there is no text to"),
    (watch, [*PICTURE, "--text", os.devnull], "/dev/null has 1 tokens, expected more than the 16"),
    (watch, [*PICTURE, "--calibration", "nowhere"], "nowhere: no calibration"),
    (watch, [*PICTURE, "--prompt", "x " * 600], "the prompt has .* tokens, the model's"),
])
def test_bad_input_on_the_command_line(monkeypatch, module, options, message):
    with pytest.raises((InputError, OSError), match=message) as raised:
        command(monkeypatch, module, *options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("module", [allocate, teal, rotate, judge, figures, watch])
def test_help_names_the_default_of_each_option(monkeypatch, capsys, module):
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, module, "--help")
    assert ended.value.code == 0
    described = re.split(r"\n  (?=-)", capsys.readouterr().out.split("options:")[1])[2:]
    assert all("default" in option or "--import-teal" in option for option in described)
