"""Tests of allocate.py, teal.py, rotate.py, and of lab/'s judge.py, peers.py and figures.py."""
import copy
import functools
import json
import re

import pytest
import torch
import torch.nn.functional as F

import calibrate as calibrate_module
from beyond import allocate, codes, folders, rotate, teal
from beyond.lab import figures, judge, peers
from beyond.tests.conftest import (ROOT, close, read_by_transformers, reference, refused,
                                   tiny_model, tokens_like)
from calibrate import LINEARS, SINKS, Calibration, calibrate, load_calibration, some_windows
from model import (DEMO, InputError, Llama, linear_names, load_model, load_tokenizer, read_json,
                   windows_of)
from sparsify import counted, realised_sparsity, sparse_mode, sparsify

SIZE = sum(linear.numel() for linear in tiny_model().model.layers.parameters() if linear.ndim == 2)


# --------------------------------------------------------------------------------------------------
# allocate.py

@pytest.fixture(scope="module")
def calibrated():
    """(tokens, a calibration of the tiny model with every allocation, the same settled)."""
    model = tiny_model()
    tokens = tokens_like(model, 1500)
    with torch.no_grad():
        calibration = calibrate(model, tokens, 16, "a test")
        allocate.add_balanced(calibration, model, tokens, 16)
        allocate.add_priced(calibration, model, tokens)
        settled = copy.deepcopy(calibration)
        allocate.settle(settled, model, tokens)
    return tokens, calibration, settled


def test_settled_thresholds_drop_what_they_are_to_drop(calibrated):
    """In the sparse model, each linear, on the text that they were found on."""
    tokens, calibration, settled = calibrated
    model = sparsify(tiny_model(), settled.thresholds(0.5))
    windows = some_windows(model, tokens, *allocate.WINDOWS)
    dropped = {}
    for name in linear_names(model.config):
        def see(module, inputs, name=name):
            dropped[name] = 1 - module.keep(inputs[0])[:, SINKS:].double().mean().item()
        model.get_submodule(name).register_forward_pre_hook(see)
    assert settled.allocations == ["priced", "balanced", "uniform"]
    for allocation in settled.allocations:
        for level in (0.0, 0.02, 0.25, 0.33, 0.65, 0.97):
            shares = calibration.shares(level, allocation)
            mean = (shares @ calibration.weight_shares()).mean()
            assert mean.item() == pytest.approx(level, abs=1e-4)
            if level in allocate.LEVELS:
                thresholds = settled.thresholds(level, allocation)
                with sparse_mode(model, "all", thresholds, SINKS):
                    model(windows)
                assert list(dropped.values()) == pytest.approx(shares.flatten().tolist(), abs=0.01)


@torch.enable_grad()
def test_fisher_information_is_the_mean_square_gradient():
    """One block at a time, as in one backward pass through the whole; the first block's v alone."""
    model = tiny_model(torch.float64, sliding_window=5)    # which the mask of the context shows
    windows = tokens_like(model, 1, 32)
    computed = allocate.fisher_information(model, windows)[0, LINEARS.index("self_attn.v_proj")]
    logits = model(windows)[0]                             # the same labels
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0]
    leaf = None

    def own_leaf(module, inputs):        # that only this linear reads
        nonlocal leaf
        leaf = inputs[0].detach().requires_grad_()
        return leaf

    model.model.layers[0].self_attn.v_proj.register_forward_pre_hook(own_leaf)
    F.cross_entropy(model(windows)[0], labels, reduction="sum").backward()
    assert computed.item() == pytest.approx(leaf.grad[0, SINKS:].square().mean().item(), rel=1e-4)


def test_allocations_by_gradients_are_nearer_to_the_dense_model(calibrated):
    """At the same sparsity: priced shares nearer than balanced ones, and these than uniform."""
    tokens, _, settled = calibrated
    model = tiny_model()
    settings = judge.dense(model) | judge.table_settings(
        model, settled, ["uniform", "balanced", "priced"], [0.3, 0.5, 0.7])
    rows = judge.judge(model, windows_of(tokens, 64), settings)[1:]
    for i, margin in enumerate((0.97, 1.02, 1.02)):
        uniform, balanced, priced = rows[i::3]
        assert priced["sparsity"] == pytest.approx(balanced["sparsity"], abs=0.01)
        assert priced["kl"] < margin * balanced["kl"]
        assert balanced["kl"] < uniform["kl"]


def test_a_quantized_model_is_calibrated_like_others_and_a_sparse_one_is_not():
    shares = []
    for bits in (16, 8, 4):
        model = tiny_model(hidden_size=64, head_dim=16, intermediate_size=64, num_hidden_layers=1)
        if bits < 16:
            codes.quantize(model, bits, 32)
        tokens = tokens_like(model, 200)
        calibration = calibrate(model, tokens, 16)
        allocate.add_balanced(calibration, model, tokens, 16)
        allocate.add_priced(calibration, model, tokens)
        shares.append(calibration.shares(0.5, "balanced"))
        assert (shares[-1] - shares[0]).abs().max() < 0.15
    sparsify(model, calibration.thresholds(0.5))
    for add in (allocate.add_balanced, allocate.add_priced, allocate.settle):
        with refused(match="this one was made sparse"):
            add(calibration, model, tokens)


def test_allocate_writes_what_figures_draws(run, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "tiny"
    tiny_model(vocab_size=4096, num_hidden_layers=1).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
    options = ["--model", folder, "--text", ROOT / "kernel.py", "--tokens", 700]
    for more, allocations in [(["--no-gradients", "--greedy"], "greedy, uniform"),
                              (["--tokens", 30, "--context", 16], "balanced, uniform"),   # enough
                              (["--priced", "--greedy"], "priced, balanced, greedy, uniform")]:
        assert f"allocations: {allocations}\n" in run(allocate, *options, *more)
    loaded = load_calibration(load_model(folder)[0], folder)
    assert ", ".join(loaded.allocations) == allocations
    run(figures, "--model", folder, "--out", tmp_path / "figures")
    for name in ("distributions.png", "allocations.png"):
        assert (tmp_path / "figures" / name).read_bytes()[:4] == b"\x89PNG"
    out = tmp_path / "int8.safetensors"
    run(allocate, *options, "--quantize", "int8", "--out", out)
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
    histograms = {}
    for layer in range(3):
        for part in ("self_attn", "mlp"):
            tensors = histograms[layer, part] = {}
            for key in ("h1", "h2"):
                x = (torch.randn(20_000) * torch.rand(())).sort().values
                bins = torch.cat((x[:1], torch.linspace(x[200], x[-200], 9999), x[-1:]))
                tensors[key] = torch.histogram(x, bins=bins)[0]
                tensors[f"{key}_centers"] = (bins[:-1] + bins[1:]) / 2
            path = folder / "histograms" / f"layer-{layer}" / part / "histograms.pt"
            path.parent.mkdir(parents=True)
            torch.save(tensors, path)
        path = folder / "lookup" / f"layer-{layer}" / "results.csv"
        path.parent.mkdir(parents=True)
        # In some, shares reach 1: there a path is cut.
        path.write_text("Effective Sparsity,Activation Error,Baseline Error,q,k,v,o,gate,up,down\n"
                        f"{rows}0,0,0,1,.95,.7,1,.95,.95,1\n0,0,0,1.2,.95,.7,1.1,.95,.95,1\n")
    return folder, histograms, shares


def their_threshold(histogram, key, sparsity):
    """TEAL's: the inverse of the cumulative counts at 0.5 + s/2, linear between bin centers."""
    below = histogram[key].double().cumsum(0)
    centers = histogram[f"{key}_centers"].double()
    target = (0.5 + sparsity / 2) * below[-1]
    at = int(torch.searchsorted(below, target))
    fraction = (target - below[at - 1]) / (below[at] - below[at - 1])
    return (centers[at - 1] + fraction * (centers[at] - centers[at - 1])).item()


def test_the_authors_statistics_are_imported(published, run, tmp_path):
    folder, histograms, shares = published
    tiny_model().save_pretrained(tmp_path)
    said = run(teal, "--model", tmp_path, folder)
    assert "TEAL's authors publish for Tiny-7B; allocations: greedy, uniform" in said
    loaded = load_calibration(tiny_model(), tmp_path)
    for sparsity in (0.1, 0.25, 0.5, 0.9):
        for name, threshold in loaded.thresholds(sparsity, "uniform").items():
            layer, part, linear = name.split(".")[2:]
            key = "h2" if linear in ("o_proj", "down_proj") else "h1"
            expected = their_threshold(histograms[int(layer), part], key, sparsity)
            assert threshold.item() == pytest.approx(expected, rel=0.01, abs=1e-3)
    sizes = loaded.weight_shares()
    for row in (shares[9].double(), shares[-2].double()):  # the same shares at the same sparsity
        found = loaded.shares((row @ sizes).item(), "greedy")
        assert torch.allclose(found, row.expand(3, 7), atol=1e-4)


def test_other_files_than_the_authors_are_refused(published):
    folder, histograms, _ = published
    for layers, message in [(4, "layer-3/.*No such file"), (2, "more layers than the model's 2")]:
        with refused(match=message):
            teal.import_teal(folder, tiny_model(num_hidden_layers=layers).config)
    path = folder / "lookup" / "layer-2" / "results.csv"
    falling = ".5,.5,.5,.5,.5,.5,.5\n.4,.5,.5,.5,.5,.5,.5\n"
    for text in ("", "q,k\n1,2\n", f"q,k,v,o,gate,up,down\n{falling}"):
        path.write_text(text)
        with refused(match="results.csv: not a greedy path"):
            teal.authors_path(path)
    histogram = histograms[1, "mlp"]
    path = folder / "histograms" / "layer-1" / "mlp" / "histograms.pt"
    for bad in ({}, histogram | {"h2": histogram["h2"][1:]}, histogram | {"h1": -histogram["h1"]}):
        torch.save(bad, path)
        with refused(match="histograms.pt: not a histogram of TEAL's authors"):
            teal.import_teal(folder, tiny_model().config)


# --------------------------------------------------------------------------------------------------
# rotate.py

def rotate_by(model, windows, folder, out):
    """Rotate a folder to the principal directions of a model on windows."""
    Q, R = map(rotate.principal_directions, rotate.covariances(model, windows))
    rotate.rotate(folder, out, Q, R, torch.float32)


def test_a_rotated_checkpoint_is_written_in_its_principal_directions(tmp_path):
    """In them inputs are uncorrelated, and the first carries the most."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "plain")
    windows = windows_of(tokens_like(model, 600), 20)
    rotate_by(model, windows, tmp_path / "plain", tmp_path / "turned")
    turned = Llama.from_pretrained(tmp_path / "turned")
    stream, heads = rotate.covariances(turned, windows)
    assert close(stream, stream.diag().diag(), 1e-4)
    assert (stream.diag().diff() <= 1e-3 * stream.max()).all()
    assert close(heads, torch.diag_embed(heads.diagonal(dim1=-2, dim2=-1)), 1e-4)
    with refused(match="exists already"):
        rotate_by(model, windows, tmp_path / "plain", tmp_path / "turned")
    with refused(match="the text is too short"):
        rotate_by(model, windows[:1, :7], tmp_path / "plain", tmp_path / "other")


@pytest.mark.parametrize("kind, settings", [
    ("Llama", {"num_key_value_heads": 2, "head_dim": 24, "attention_bias": True, "mlp_bias": True}),
    ("Llama", {"tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}),
    ("Mistral", {"num_key_value_heads": 2, "sliding_window": 7}),
])
def test_a_rotated_checkpoint_is_the_same_in_transformers(tmp_path, kind, settings):
    """Rotated once and twice, in as many files as it had."""
    theirs = reference(tmp_path / "plain", kind, **settings)
    (tmp_path / "plain" / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path / "plain", max_shard_size="100KB")
    tokens = tokens_like(theirs, 2, 40)
    expected = theirs(tokens).logits
    for source, out in (("plain", "once"), ("once", "twice")):
        model = Llama.from_pretrained(tmp_path / source)
        windows = windows_of(tokens_like(model, 32 * 12 + 1), 32)
        rotate_by(model, windows, tmp_path / source, tmp_path / out)
        assert close(Llama.from_pretrained(tmp_path / out)(tokens), expected, 1e-4)
        assert close(read_by_transformers(tmp_path / out)(tokens).logits, expected, 1e-4)
    assert len(list((tmp_path / "twice").glob("model-*.safetensors"))) > 1


def test_rotate_writes_a_folder_like_any_other(tmp_path, run):
    out = tmp_path / "turned"
    said = run(rotate, "--out", out, "--text", ROOT / "generate.py", "--tokens", 1600,
               "--dtype", "bfloat16")
    assert float(re.search(r"by (\S+) relative", said)[1]) < 0.05
    assert (out / "tokenizer.model").read_bytes() == (DEMO / "tokenizer.model").read_bytes()
    assert read_json(out / "config.json")["torch_dtype"] == "bfloat16"
    model, _ = load_model(out)
    assert model.dtype == torch.bfloat16 and not folders.is_quantized(out)


def test_calibration_and_rotation_see_two_halves(monkeypatch, run, tmp_path):
    """Of a text that is long enough: what fits one of them by accident does not fit the other."""
    seen = []

    def stop(model, tokens, *_):
        seen.append(load_tokenizer(DEMO).decode(tokens.flatten().tolist()))
        raise InputError("stopped")

    text = tmp_path / "text"
    text.write_text("".join(f"line {i}\n" for i in range(3000)))
    monkeypatch.setattr(calibrate_module, "calibrate", stop)
    monkeypatch.setattr(rotate, "covariances", stop)
    for module in (allocate, rotate):
        run.refused(module, "--text", text, "--tokens", 1100, "--out", tmp_path / "x")
    first, second = [[int(of) for of in re.findall(r"line (\d+)(?=\n)", each)] for each in seen]
    assert min(first) < 10 and 1000 < max(first) < 1510    # spread over each half
    assert 1490 < min(second) < 2000 and max(second) > 2900


# --------------------------------------------------------------------------------------------------
# lab/judge.py

@pytest.fixture(scope="module")
def thresholds():
    """Thresholds of a tiny model, one a channel, some of them large."""
    model = tiny_model()
    return {name: torch.rand(model.get_submodule(name).in_features) for name
            in linear_names(model.config)}


def test_judge_measures_as_the_paper_does(thresholds):
    """Windows of which the end counts, for the rest is context, and the beginning is dense."""
    model = tiny_model(torch.float64)
    windows = windows_of(tokens_like(model, 70), 12, 4)
    own = functools.partial(judge.by_thresholds, model, thresholds, 3)
    rows = judge.judge(model, windows, judge.dense(model) | {("own", 0.5): own}, scored=4)
    sparsify(model, thresholds)
    by_mode = []
    for mode in ("off", "all"):
        with counted(model), sparse_mode(model, mode, dense_prefix=3):
            by_mode.append(model(windows[:, :-1])[:, -4:].log_softmax(-1))
    dense, sparse = by_mode
    assert rows[1]["sparsity"] == pytest.approx(realised_sparsity(model))
    assert rows[1]["kl"] == pytest.approx((dense.exp() * (dense - sparse)).sum(-1).mean().item())
    assert rows[1]["agreement"] == (dense.argmax(-1) == sparse.argmax(-1)).double().mean()
    for row, log_p in zip(rows, by_mode):
        loss = -log_p.gather(-1, windows[:, -4:, None]).mean()
        assert row["perplexity"] == pytest.approx(loss.exp().item())


def test_perplexity_is_read_at_the_target():
    measured = [("dense", 0.0, 0.0, 10.0), ("own", 0.5, 0.6, 20.0), ("own", 0.7, 0.696, 30.0),
                ("own", 0.9, 0.8, 50.0), ("other", 0.9, 0.95, 60.0)]
    rows = [dict(zip(("allocation", "target", "sparsity", "perplexity"), of)) for of in measured]
    judge.at_target(rows)
    assert [row["perplexity_at_target"] for row in rows] == [
        10, pytest.approx(10 * 2 ** (5 / 6)), 30, None, pytest.approx(10 * 6 ** (90 / 95))]


def test_what_texts_side_by_side_read(thresholds):
    model = tiny_model()
    tokens = tokens_like(model, 12 * 16 + 1)
    seen = {}
    for name in thresholds:
        def look(module, inputs, name=name):
            seen[name] = inputs[0][:, 8:].abs() > thresholds[name]              # (12, 8, in)
        model.get_submodule(name).register_forward_pre_hook(look)
    for number in (1, 3, 4):
        share = judge.share_read(model, thresholds, tokens, number, 16)
        read = [model.get_submodule(name).weight.numel() *
                torch.stack([part.any(0) for part in keep.split(number)]).double().mean().item()
                for name, keep in seen.items()]
        assert share == pytest.approx(sum(read) / SIZE, abs=1e-9)
    with refused(match="13 texts of 16 need more"):
        judge.share_read(model, thresholds, tokens, 13, 16)


def test_judge_prints_what_it_is_asked_for(run, tmp_path):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "quality.png"
    text = ["--text", ROOT / "kernel.py", "--tokens"]
    out = run(judge, *text, 300, "--context", 256, "--sparsity", 0.25, 0.5, "--allocation",
              "uniform", "greedy", "--figure", figure)
    about, columns, *rows = out.splitlines()
    assert about.startswith("model: ") and "context: 256, scored: 256" in about
    assert columns.split() == "target realised perplexity at target agreement KL".split()
    assert [" ".join(row.split()[:2]) for row in rows] == [
        "dense 0%", "uniform 25%", "uniform 50%", "greedy 25%", "greedy 50%"]
    assert figure.read_bytes()[:4] == b"\x89PNG"
    printed = json.loads(run(judge, *text, 70, "--context", 64, "--beside", DEMO, "--allocation",
                             "uniform", "--sparsity", 0.5, "--json"))
    assert [row["allocation"] for row in printed["rows"]] == [
        "dense", "uniform", "demo dense", "demo uniform"]
    lines = run(judge, *text, 1100, "--batch", 1, 4).splitlines()
    read = [float(line.split()[1].rstrip("%")) for line in lines[1:]]
    assert 40 < read[0] < read[1] < 100
    rows = json.loads(run(judge, *text, 70, "--context", 64, "--sources", "--held-in",
                          ROOT / "LICENSE", "--json"))["rows"]
    linears = [name.split(".")[1] for name in LINEARS]     # each drops half of its own weights
    assert [row["allocation"] for row in rows[1:]] == [
        *(f"{prefix} dense" for prefix in (0, 1, 4, 16, 64)), *linears, *["lm_head"] * 3]
    assert sum(row["sparsity"] for row in rows[6:13]) == pytest.approx(0.5, abs=0.05)
    assert rows[5]["kl"] == pytest.approx(0, abs=1e-5)     # all of a window is dense
    assert not any(row["sparsity"] for row in rows[13:])
    assert 0 < rows[13]["kl"] < rows[14]["kl"] < rows[15]["kl"]


# --------------------------------------------------------------------------------------------------
# lab/peers.py

@pytest.mark.parametrize("kind", peers.PEERS)
def test_a_peer_does_to_a_linear_what_its_paper_says(calibrated, kind):
    """At 20 %, in the first block, where no input has changed, behind three dense positions."""
    tokens, calibration, _ = calibrated
    model = tiny_model()
    windows = tokens.unfold(0, 16, 16)                                          # (W, 16)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    seen = []
    hooks = [each.register_forward_hook(lambda module, inputs, y: seen.append(inputs[0]))
             for each in (attention.k_proj, mlp.gate_proj)]
    dense = model(windows)
    for hook in hooks:
        hook.remove()
    x, x_mlp = seen                                                             # (W, 16, 32)
    linear = attention.v_proj
    if kind == "cats":                   # channels of up and down with a small gate
        linear = mlp.gate_proj
        x = x_mlp
    way_at = peers.peer_maker(kind, model, calibration, windows)
    with way_at(0.2)(3):
        outputs = []
        with linear.register_forward_hook(lambda module, inputs, y: outputs.append(y)):
            model(windows)
    y = outputs[0]
    assert realised_sparsity(model) == pytest.approx(0.2, abs=0.01)
    if kind == "cats":
        size = F.silu(linear(x)).abs()
        dropped = y == 0
        assert size[dropped].max() < size[:, 3:][~dropped[:, 3:]].min()
        expected = linear(x) * ~dropped
        assert way_at(0.75) is None      # out of reach
    elif kind == "rsparse":              # what is dropped goes through a low rank
        ranks = {shape: round(0.1 * shape.numel() / sum(shape)) for shape in
                 (model.get_submodule(name).weight.shape for name in linear_names(model.config))}
        more = sum(ranks[each.weight.shape] * sum(each.weight.shape)
                   for each in map(model.get_submodule, linear_names(model.config)))
        threshold = calibration.thresholds(0.2 + more / SIZE, "uniform")[
            "model.layers.0.self_attn.v_proj"]
        keep = x.abs() > threshold
        rank = ranks[linear.weight.shape]
        U, S, Vh = torch.linalg.svd(linear.weight)
        expected = linear(x * keep) + (x * ~keep) @ ((U[:, :rank] * S[:rank]) @ Vh[:rank]).T
    else:                                # in a basis, or as it is, the smallest |z| · ‖column‖
        late = torch.cat((x, x_mlp))[:, SINKS:].flatten(0, 1)
        basis = {"wina": torch.eye(32), "larosa": torch.linalg.svd(late).Vh.T,
                 "wina-turned": torch.linalg.svd(attention.k_proj.weight).Vh.T}[kind]
        z = x @ basis
        size = z.abs() if kind == "larosa" else z.abs() * (linear.weight @ basis).norm(dim=0)
        read = {"wina": 0, "larosa": 1, "wina-turned": 2}[kind] * 3 * 32**2     # beside the linears
        dropped = round((0.2 + read / SIZE) * 32)
        largest = size > size.sort(-1).values[..., dropped - 1:dropped]
        expected = linear((z * largest) @ basis.T)
    expected[:, :3] = linear(x)[:, :3]
    assert close(y, expected, 1e-3)
    assert torch.equal(model(windows), dense)              # no hook is left
