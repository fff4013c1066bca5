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
from beyond.lab import figures, functions, judge, peers
from beyond.tests.conftest import (ROOT, close, read_by_transformers, reference, refused,
                                   thresholds_of, tiny_model, tokens_like)
from calibrate import (LINEARS, SINKS, Calibration, calibrate, load_calibration, quantile,
                       some_windows)
from model import (DEMO, InputError, Llama, linear_names, load_model, load_tokenizer, read_json,
                   read_safetensors, windows_of, write_json, write_safetensors)
from sparsify import (counted, perplexity, quality, realised_sparsity, sparse_mode, sparsify)

SIZE = sum(linear.numel() for linear in tiny_model().model.layers.parameters() if linear.ndim == 2)


# --------------------------------------------------------------------------------------------------
# allocate.py

@pytest.fixture(scope="module")
def calibrated():
    """(model, tokens, its calibration with every allocation of the chapter); not to be changed."""
    model = tiny_model()
    tokens = tokens_like(model, 1500)
    with torch.no_grad():
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


def test_settled_thresholds_drop_what_they_are_to_drop(calibrated, settled):
    """In the sparse model, each linear, on the text that they were found on."""
    _, tokens, calibration = calibrated
    sizes = calibration.weight_shares()
    model = sparsify(tiny_model(), settled.thresholds(0.5))
    windows = some_windows(model, tokens, *allocate.WINDOWS)
    dropped = {}
    for name in linear_names(model.config):
        def see(module, inputs, name=name):
            dropped[name] = 1 - module.keep(inputs[0])[:, SINKS:].double().mean().item()
        model.get_submodule(name).register_forward_pre_hook(see)
    assert calibration.allocations == settled.allocations == ["priced", "balanced", "uniform"]
    for allocation in settled.allocations:
        for level in (0.0, 0.02, 0.33, 0.8, 0.97):
            shares = calibration.shares(level, allocation)
            assert (shares @ sizes).mean().item() == pytest.approx(level, abs=1e-4)
        for level in (0.25, 0.65):
            thresholds = settled.thresholds(level, allocation)
            with counted(model), sparse_mode(model, "all", thresholds, SINKS):
                model(windows)
            assert realised_sparsity(model) == pytest.approx(level, abs=0.002)
            wanted = calibration.shares(level, allocation).flatten().tolist()
            found = [dropped[name] for name in linear_names(model.config)]
            assert found == pytest.approx(wanted, abs=0.01)


@torch.enable_grad()
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


def test_allocations_by_gradients_are_nearer_to_the_dense_model(calibrated, settled):
    """At the same sparsity: priced shares nearer than balanced ones, and these than uniform."""
    _, tokens, _ = calibrated
    settings = [judge.own(name, level, settled.thresholds(level, name))
                for level in (0.3, 0.5, 0.7) for name in ("uniform", "balanced", "priced")]
    rows = judge.judge(tiny_model(), tokens, settings)[1:]
    for i, (level, margin) in enumerate([(0.3, 0.97), (0.5, 1.02), (0.7, 1.02)]):
        uniform, balanced, priced = rows[3 * i:3 * i + 3]
        assert priced["sparsity"] == pytest.approx(balanced["sparsity"], abs=0.01)
        assert priced["kl"] < margin * balanced["kl"]
        assert balanced["kl"] < uniform["kl"]


def test_a_quantized_model_is_calibrated_like_others_and_a_sparse_one_is_not():
    shares = {}
    for bits in (16, 8, 4):
        model = tiny_model(hidden_size=64, head_dim=16, intermediate_size=64, num_hidden_layers=1)
        if bits < 16:
            codes.quantize(model, bits, 32)
        tokens = tokens_like(model, 200)
        calibration = calibrate(model, tokens, 16)
        allocate.add_balanced(calibration, model, tokens, 16)
        allocate.add_priced(calibration, model, tokens)
        calibration.check(model)
        shares[bits] = calibration.shares(0.5, "balanced")
        assert (shares[bits] - shares[16]).abs().max() < 0.15
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
            for key in ("h1", "h2") + ("h1.5",) * (part == "mlp"):         # as their utils.py does
                x = (torch.randn(20_000) * torch.rand(())).sort().values
                bins = torch.cat((x[:1], torch.linspace(x[200], x[-200], 9999), x[-1:]))
                tensors[key] = torch.histogram(x, bins=bins)[0]
                tensors[f"{key}_centers"] = (bins[:-1] + bins[1:]) / 2
            path = folder / "histograms" / f"layer-{layer}" / part / "histograms.pt"
            path.parent.mkdir(parents=True)
            torch.save(tensors, path)
        path = folder / "lookup" / f"layer-{layer}" / "results.csv"
        path.parent.mkdir(parents=True)
        path.write_text("Effective Sparsity,Activation Error,Baseline Error,q,k,v,o,gate,up,down\n"
                        + rows)
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
    row = shares[9].double()             # a row of theirs: the same shares at the same sparsity
    found = loaded.shares((row @ sizes).item(), "greedy")
    assert torch.allclose(found, row.expand(3, 7), atol=1e-4)


def test_what_the_authors_files_may_hold_and_what_not(published):
    folder, histograms, _ = published
    config = tiny_model().config
    before = teal.import_teal(folder, config)
    histogram = histograms[1, "mlp"]
    histogram_path = folder / "histograms" / "layer-1" / "mlp" / "histograms.pt"
    torch.save({key: x for key, x in histogram.items() if "h1.5" not in key}, histogram_path)
    for path in folder.glob("lookup/*/*.csv"):           # where shares reach 1 a path is cut
        path.write_text(path.read_text() + "0,0,0,1,.95,.7,1,.95,.95,1\n"
                                           "0,0,0,1.2,.95,.7,1.1,.95,.95,1\n")
    after = teal.import_teal(folder, config)
    assert torch.equal(after.tables["greedy"].shares, before.tables["greedy"].shares)
    for layers, message in [(4, "layer-3/.*cannot be read: No such file"),
                            (2, "more layers than the model's 2")]:
        with refused(match=message):
            teal.import_teal(folder, tiny_model(num_hidden_layers=layers).config)
    falling = ".5,.5,.5,.5,.5,.5,.5\n.4,.5,.5,.5,.5,.5,.5\n"
    for text in ("", "q,k\n1,2\n", f"q,k,v,o,gate,up,down\n{falling}"):
        path.write_text(text)
        with refused(match="results.csv: not a greedy path"):
            teal.import_teal(folder, config)
    for bad in ({}, histogram | {"h2": histogram["h2"][1:]}, histogram | {"h1": -histogram["h1"]}):
        torch.save(bad, histogram_path)
        with refused(match="not a histogram of TEAL's authors: expected h[12] "):
            teal.import_teal(folder, config)


# --------------------------------------------------------------------------------------------------
# rotate.py

def rotate_by(model, windows, folder, out):
    """Rotate a folder to the principal directions of a model on windows."""
    Q, R = map(rotate.principal_directions, rotate.covariances(model, windows))
    rotate.rotate(folder, out, Q, R, torch.float32)


def test_a_rotated_checkpoint_is_written_in_its_principal_directions(tmp_path):
    """In as many files as it had; a head that is stored counts, whatever config.json says."""
    model = tiny_model()
    tokens = tokens_like(model, 1, 12)
    plain, out = tmp_path / "plain", tmp_path / "turned"
    model.save_pretrained(plain)
    config = read_json(plain / "config.json")
    write_json(plain / "config.json", config | {"tie_word_embeddings": True})
    tensors = read_safetensors(plain / "model.safetensors")
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        write_safetensors(plain / file, {name: tensor for name, tensor in tensors.items()
                                         if files[name] == file})
    write_json(plain / "model.safetensors.index.json", {"weight_map": files})
    (plain / "model.safetensors").unlink()
    windows = windows_of(tokens_like(model, 600), 20)
    rotate_by(model, windows, plain, out)
    turned = Llama.from_pretrained(out)
    assert close(turned(tokens), model(tokens))
    assert (out / "model-1.safetensors").exists()
    assert read_json(out / "config.json")["tie_word_embeddings"] is False
    # In the new basis the directions are uncorrelated, and the first carries the most.
    stream, heads = rotate.covariances(turned, windows)
    assert close(stream, stream.diag().diag(), 1e-4)
    assert (stream.diag().diff() <= 1e-3 * stream.max()).all()
    assert close(heads, torch.diag_embed(heads.diagonal(dim1=-2, dim2=-1)), 1e-4)
    with refused(match="exists already"):
        rotate_by(model, windows, plain, out)
    with refused(match="the text is too short"):
        rotate_by(model, windows[:1, :7], plain, tmp_path / "other")


@pytest.mark.parametrize("kind, settings", [
    ("Llama", {"num_key_value_heads": 2, "head_dim": 24, "attention_bias": True, "mlp_bias": True}),
    ("Llama", {"tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}),
    ("Mistral", {"num_key_value_heads": 2, "sliding_window": 7}),
])
def test_a_rotated_checkpoint_is_the_same_in_transformers(tmp_path, kind, settings):
    """Rotated once and twice."""
    theirs = reference(tmp_path / "plain", kind, **settings)
    tokens = tokens_like(theirs, 2, 40)
    expected = theirs(tokens).logits
    for source, out in (("plain", "once"), ("once", "twice")):
        model = Llama.from_pretrained(tmp_path / source)
        windows = windows_of(tokens_like(model, 32 * 12 + 1), 32)
        rotate_by(model, windows, tmp_path / source, tmp_path / out)
        assert close(Llama.from_pretrained(tmp_path / out)(tokens), expected, 1e-4)
        assert close(read_by_transformers(tmp_path / out)(tokens).logits, expected, 1e-4)


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

    def stop(*arguments):
        seen.append(next(of for of in arguments if isinstance(of, torch.Tensor)))
        raise InputError("stopped")

    text = tmp_path / "text"
    text.write_text("".join(f"line {i}\n" for i in range(3000)))
    monkeypatch.setattr(calibrate_module, "calibrate", stop)
    monkeypatch.setattr(rotate, "covariances", stop)
    for module in (allocate, rotate):
        run.refused(module, "--text", text, "--tokens", 1100, "--out", tmp_path / "x")
    lines = []
    for tokens in seen:
        written = load_tokenizer(DEMO).decode(tokens.flatten().tolist())
        lines.append([int(of) for of in re.findall(r"line (\d+)(?=\n)", written)])
    assert min(map(len, lines)) > 50
    assert max(lines[0]) < 1510 and min(lines[1]) > 1490   # spread over each half
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
    # The paper's protocol: part of each window is context only, and its start is dense.
    late = judge.judge(model, tokens, [judge.own("own", 0.5, thresholds, 4)], 12, scored=4)[1]
    sparsify(model, thresholds)
    assert rows[1]["perplexity"] == pytest.approx(perplexity(model, tokens, 8))
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
    assert [row["perplexity_at_target"] for row in rows] == [
        10, pytest.approx(10 * 2 ** (5 / 6)), 30, None]


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
    for setting in (judge.DENSE, judge.own("own", 0.5, thresholds_of(model, 0.05))):
        share = functions.share_of_functions(model, tokenizer, beginnings[:1] * 2, setting, 24)
        assert share in (0.0, 1.0)                         # twice the same beginning
    assert 0 < realised_sparsity(model) < 1


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


def test_judge_prints_a_table(run, tmp_path):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "quality.png"
    options = ["--text", ROOT / "kernel.py", "--tokens", 300, "--context", 256]
    out = run(judge, *options, "--sparsity", 0.5, 0.25, "--allocation", "uniform", "greedy",
              "--figure", figure)
    about, columns, *rows = out.splitlines()
    assert about.startswith("model: ") and "context: 256, scored: 256" in about
    assert columns.split() == "target realised perplexity at target agreement KL".split()
    assert [" ".join(row.split()[:2]) for row in rows] == [
        "dense 0%", "uniform 25%", "uniform 50%", "greedy 25%", "greedy 50%"]
    assert figure.read_bytes()[:4] == b"\x89PNG"
    printed = json.loads(run(judge, *options, "--beside", DEMO, "--allocation", "uniform",
                             "--sparsity", 0.5, "--json"))
    assert printed["dense_prefix"] == SINKS
    names = [row["allocation"] for row in printed["rows"]]
    assert names == ["dense", "uniform", "demo dense", "demo uniform"]


def test_judge_answers_the_other_questions(run):
    lines = run(judge, "--batch", 1, 4, "--text", ROOT / "kernel.py", "--tokens", 1100).splitlines()
    read = [float(line.split()[1].rstrip("%")) for line in lines[1:]]
    assert 40 < read[0] < read[1] < 100
    out = run(judge, "--sources", "--text", ROOT / "kernel.py", "--tokens", 70, "--context", 64,
              "--held-in", ROOT / "LICENSE", "--json")
    rows = json.loads(out)["rows"]
    linears = [name.split(".")[1] for name in LINEARS]     # each drops half of its own weights
    assert [row["allocation"] for row in rows[1:]] == [
        *(f"{prefix} dense" for prefix in (0, 1, 4, 16, 64)), *linears, *["lm_head"] * 3]
    assert sum(row["sparsity"] for row in rows[6:13]) == pytest.approx(0.5, abs=0.05)
    assert rows[5]["kl"] == pytest.approx(0, abs=1e-5)     # all of a window is dense
    assert not any(row["sparsity"] for row in rows[13:])
    assert 0 < rows[13]["kl"] < rows[14]["kl"] < rows[15]["kl"]


# --------------------------------------------------------------------------------------------------
# lab/peers.py

def test_cats_drops_channels_with_a_small_gate(calibrated):
    model, tokens, calibration = calibrated
    windows = windows_of(tokens, 16)
    settings = judge.table_settings(model, calibration, ["cats"], [0.1, 0.25, 0.75], 0, windows)
    rows = judge.judge(model, tokens, settings, 16)
    assert [row["sparsity"] for row in rows] == pytest.approx([0, 0.1, 0.25], abs=0.02)
    with refused(match="nothing to measure: cats reach none"):
        judge.table_settings(model, calibration, ["cats"], [0.75], 0, windows)

    by_hand = tiny_model()
    share = 0.25 * SIZE / (3 * 2 * 32 * 56)                # of the weights of up and down
    for block, gates in zip(by_hand.model.layers, peers.gate_counts(model, windows)):
        def drop(module, inputs, output, threshold=quantile(gates, share).float()):
            return output * (F.silu(output).abs() > threshold)
        block.mlp.gate_proj.register_forward_hook(drop)
    assert rows[2]["perplexity"] == pytest.approx(perplexity(by_hand, tokens, 16))

    changed = tiny_model()               # gates are counted after the activation of the model
    for block in changed.model.layers:
        block.mlp.activation = F.relu
    zeros = [(counts[:, 0].sum() / counts.sum()).item()
             for counts in (peers.gate_counts(model, windows), peers.gate_counts(changed, windows))]
    assert zeros[0] < 0.01 and zeros[1] == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize("kind", ["wina", "wina, turned", "larosa", "rsparse"])
def test_a_peer_does_to_a_linear_what_its_paper_says(calibrated, kind):
    """In the first block, where no input has changed. One that drops nothing is dense."""
    model, tokens, calibration = calibrated
    tokens = tokens[None, :30]
    dense = model(tokens)
    name = "model.layers.0.self_attn.v_proj"
    linear = model.get_submodule(name)
    x = model.model.layers[0].input_layernorm(model.embed(tokens))
    if kind == "rsparse":                # what is dropped goes through a low rank
        ranks = peers.low_ranks(model)
        rank = round(0.1 * linear.weight.numel() / sum(linear.weight.shape))
        left, S, right = torch.linalg.svd(linear.weight)
        low = (left[:, :rank] * S[:rank]) @ right[:rank]
        keep = x.abs() > 0.5
        expected = linear(x * keep) + (x * ~keep) @ low.T
        peer, idle = (functools.partial(peers.rsparse, ranks,
                                        thresholds_of(model, torch.tensor(threshold)))
                      for threshold in (0.5, 0.0))
        read = sum(part.numel() for pair in ranks.values() for part in pair)
    else:                                # in a basis, or as it is, the smallest |z| · ‖column‖
        bases = {"wina": dict.fromkeys(linear_names(model.config)),
                 "wina, turned": peers.wina_bases(model),
                 "larosa": peers.larosa_bases(model, windows_of(calibrated[1], 16)[:20])}[kind]
        norms = {} if kind == "larosa" else peers.column_norms(model, bases)
        basis = torch.eye(32) if bases[name] is None else bases[name]
        z = x @ basis
        size = z.abs() * ((linear.weight @ basis).norm(dim=0) if norms else 1)
        expected = linear((z * (size > size.sort(-1).values[..., 7:8])) @ basis.T)
        peer, idle = (functools.partial(peers.turned, bases, norms, share, 500)
                      for share in (0.25, 0.0))
        read = 500                       # beside the linears
    outputs = []
    with peer(model, "all") as sparsity:
        with linear.register_forward_hook(lambda module, x, y: outputs.append(y)):
            model(tokens)
        assert kind == "rsparse" or sparsity() == pytest.approx(0.25 - read / SIZE, abs=0.01)
    assert torch.allclose(outputs[0], expected, atol=1e-5)
    with idle(model, "decode") as sparsity:
        assert torch.equal(model(tokens), dense) and sparsity() == 0.0
    with idle(model, "all") as sparsity:
        assert torch.allclose(model(tokens), dense, atol=1e-4)
        assert sparsity() == pytest.approx(-read / SIZE)
    assert torch.equal(model(tokens), dense)               # no hook is left
