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
from sparsify import sparse_mode, sparsify

pytest.importorskip("matplotlib")


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
    size = sum(linear.weight.numel() for linear in model.model.layers[0].modules()
               if hasattr(linear, "weight_t"))
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
    kl = F.kl_div(log_p["decode"], log_p["off"], reduction="none", log_target=True).sum(-1)
    same = log_p["decode"].argmax(-1) == log_p["off"].argmax(-1)
    assert torch.allclose(watched[0], skipped, atol=1e-12)
    assert torch.allclose(watched[1], kl, atol=1e-5)       # the head of a step sums in float32
    assert torch.equal(watched[2], same) and 0 < same.sum() < 15


def test_the_picture_shows_greedy_texts_and_what_was_skipped(drawn):
    model, tokenizer = load_model(DEMO, dtype=torch.float32)
    sparsify(model, load_calibration(model, DEMO).thresholds(0.75, "uniform"))
    figure, said = drawn("--sparsity", 0.75, "--allocation", "uniform", "--tokens", 30,
                         "--dtype", "float32", "--device", "cpu")
    prompt = tokenizer.encode(PROMPT)
    sparse = list(generate(model, prompt, 30))
    with sparse_mode(model, "off"):
        dense = list(generate(model, prompt, 30))
    parting = first_difference(dense, sparse)
    assert f"the greedy texts part after {parting} tokens: " in said
    assert repr(tokenizer.decode(dense)) in said and repr(tokenizer.decode(sparse)) in said
    skipped, kl, _ = watch.watch(model, prompt, dense)
    assert f"75% uniform: {skipped.mean():.1%} of the blocks' weights skipped" in said
    bars, blocks, *rows = figure.axes[:4]
    assert torch.allclose(torch.tensor(blocks.images[0].get_array()), 100 * skipped.T, atol=1e-3)
    same, another = [[bar.get_height() for bar in bars.patches[i:i + 30]] for i in (0, 30)]
    assert [a + b for a, b in zip(same, another)] == pytest.approx(kl.tolist(), abs=1e-4)
    assert [height > 0 for height in another].index(True) == parting - 1
    for row, red in zip(rows, (0, 30 - parting)):
        name, *texts = row.texts
        assert len(texts) == 30
        assert sum(text.get_color() == "tab:red" for text in texts) == red
    assert all(axis.lines[0].get_xdata()[0] == parting - 0.5 for axis in (bars, blocks, *rows))


def test_the_text_of_a_file_is_watched_behind_its_beginning(drawn, tmp_path):
    path = tmp_path / "text.py"
    path.write_text("def add(a, b):\n    return a + b\n\n\ndef Ω_is_$x$(values):\n\tx = 1\n" * 2)
    _, tokenizer = load_model(DEMO)
    ids = tokenizer.encode(path.read_text())
    figure, said = drawn("--text", path, "--tokens", 26)
    assert [row.texts[0].get_text() for row in figure.axes[2:5]] == ["text", "dense", "sparse"]
    labels = [text.get_text() for text in figure.axes[2].texts[1:]]
    assert labels == watch.labels(tokenizer, ids[:16], ids[16:42])
    assert {"↵", "⇥", "Ω"} <= set(labels) and "watched: text, 26 tokens" in said
    assert watch.labels(tokenizer, ids, [4100]) == ["<4100>"]        # only pads the vocabulary
    figure, said = drawn("--text", path, "--tokens", 500, "--sparsity", 0)     # all that it has
    assert figure.axes[1].images[0].get_array().shape == (7, len(ids) - 16)
    assert "mean KL 0.000" in said
