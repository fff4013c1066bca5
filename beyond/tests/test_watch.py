"""Tests of watch.py: what the picture shows is what a model that decodes does."""
import contextlib

import pytest
import torch
import torch.nn.functional as F

from beyond.lab import watch
from beyond.tests.conftest import tiny_model, tokens_like
from calibrate import calibrate, load_calibration
from generate import PROMPT, first_difference, generate
from kernel import kept
from model import DEMO, linear_names, load_model
from sparsify import counted, realised_sparsity, sparse_mode, sparsify

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def demo():
    """(model, tokenizer): the demo model, 75 % sparse by uniform thresholds."""
    model, tokenizer = load_model(DEMO, dtype=torch.float32)
    return sparsify(model, load_calibration(model, DEMO).thresholds(0.75, "uniform")), tokenizer


@pytest.fixture
def drawn(run, monkeypatch):
    """Return a function that runs the command: (the figure that it would write, its output)."""
    def draw(*arguments):
        figures = []
        monkeypatch.setattr(watch, "save_figure", lambda figure, path: figures.append(figure))
        out = run(watch, "--figure", "watch.png", *arguments)
        return figures[0], out
    return draw


def test_each_token_is_what_decoding_says():
    """Token by token behind a dense prompt, with a cache: hooks see the same in every step."""
    model = tiny_model(torch.float64)
    tokens = tokens_like(model, 400)
    ids = tokens[:20].tolist()
    sparsify(model, calibrate(model, tokens, 16).thresholds(0.5))
    watched = watch.watch(model, ids[:5], ids[5:])
    size = sum(linear.weight.numel() for linear in watch.linears_of(model.model.layers[0]))
    skipped = torch.zeros(15, 3, dtype=torch.float64)
    log_p = {}
    for mode in ("off", "decode"):
        cache = model.make_cache(1, 20)
        steps = []
        with sparse_mode(model, mode), contextlib.ExitStack() as hooks:
            model(tokens[None, :5], cache)
            for name in linear_names(model.config):
                def see(linear, inputs, layer=int(name.split(".")[2])):
                    share = 1 - kept(inputs[0], linear.threshold).double().mean()
                    if mode == "decode":
                        skipped[len(steps), layer] += share * linear.weight.numel() / size
                hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(see))
            for token in ids[5:]:
                steps.append(model(torch.tensor([[token]]), cache)[0, 0].log_softmax(-1))
        log_p[mode] = torch.stack(steps)
    assert torch.allclose(watched.skipped, skipped, atol=1e-12)
    kl = F.kl_div(log_p["decode"], log_p["off"], reduction="none", log_target=True).sum(-1)
    assert torch.allclose(watched.kl, kl, atol=1e-5)       # the head of a step sums in float32
    assert kl.min() > 1e-4
    assert torch.equal(watched.same, log_p["decode"].argmax(-1) == log_p["off"].argmax(-1))
    assert 0 < watched.same.sum() < 15


def test_the_picture_shows_what_was_skipped(demo, drawn):
    model, tokenizer = demo
    figure, said = drawn("--sparsity", 0.75, "--allocation", "uniform", "--tokens", 30,
                         "--dtype", "float32", "--device", "cpu")
    prompt = tokenizer.encode(PROMPT)
    with sparse_mode(model, "off"):
        dense = list(generate(model, prompt, 31))
    cache = model.make_cache(1, len(prompt) + 30)
    with counted(model):
        for part in (prompt, *([token] for token in dense[:30])):
            model(torch.tensor([part]), cache)
    realised = realised_sparsity(model)
    bars, blocks, *rows = figure.axes[:4]
    image = blocks.images[0].get_array()
    assert image.shape == (7, 30)
    assert image.mean() == pytest.approx(100 * realised)
    assert f"75% uniform: {realised:.1%} of the blocks' weights skipped" in said
    sparse = list(generate(model, prompt, 30))
    parting = first_difference(dense[:30], sparse)
    assert f"the greedy texts part after {parting} tokens: " in said
    assert repr(tokenizer.decode(dense[:30])) in said and repr(tokenizer.decode(sparse)) in said
    for row, red in zip(rows, (0, 30 - parting)):
        name, *texts = row.texts
        assert len(texts) == 30
        assert sum(text.get_color() == "tab:red" for text in texts) == red
    assert all(axis.lines[0].get_xdata()[0] == parting - 0.5 for axis in (bars, blocks, *rows))
    same, another = [[bar.get_height() > 0 for bar in bars.patches[i:i + 30]] for i in (0, 30)]
    assert same == [not red for red in another]
    assert another.index(True) == parting - 1


def test_the_text_of_a_file_is_watched_behind_its_beginning(drawn, tmp_path):
    path = tmp_path / "text.py"
    path.write_text("def add(a, b):\n    return a + b\n\n\ndef Ω_is_$x$(values):\n\tx = 1\n" * 2)
    figure, said = drawn("--text", path, "--tokens", 26)
    names = [row.texts[0].get_text() for row in figure.axes[2:5]]
    assert names == ["text", "dense", "sparse"]
    labels = [text.get_text() for text in figure.axes[2].texts[1:]]
    _, tokenizer = load_model(DEMO)
    ids = tokenizer.encode(path.read_text())[16:16 + 26]
    assert labels == watch.labels(tokenizer, tokenizer.encode(path.read_text())[:16], ids)
    assert {"↵", "⇥", "Ω"} <= set(labels)
    assert watch.labels(tokenizer, ids, [4100]) == ["<4100>"]        # only pads the vocabulary
    assert "watched: text, 26 tokens" in said
    figure, _ = drawn("--text", path, "--tokens", 500)                         # all that it has
    assert figure.axes[1].images[0].get_array().shape[1] < 100


def test_long_texts_are_numbered(run, drawn, tmp_path):
    path = tmp_path / "watch.png"
    run(watch, "--figure", path, "--tokens", 90)
    assert path.read_bytes().startswith(b"\x89PNG")
    figure, said = drawn("--tokens", 90, "--sparsity", 0)
    assert figure.axes[1].get_xlabel() == "tokens behind the prompt"
    assert figure.axes[1].images[0].get_array().shape == (7, 90)
    assert "mean KL 0.000" in said
