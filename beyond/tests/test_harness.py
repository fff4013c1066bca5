"""Tests of harness.py: the numbers of a dense model are those of the harness's own `hf` model."""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lm_eval", reason="needs lm_eval: see requirements-dev.txt")

import datasets
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from beyond import harness
from beyond.harness import MinTEAL
from beyond.lab import choices
from beyond.tests.conftest import (NEEDS_SMOLLM2, ROOT, SMOLLM2, refused, tiny_model, tokens_like,
                                   write_byte_level)
from calibrate import add_greedy, calibrate
from generate import generate
from model import read_json, windows_of, write_json
from sparsify import counted, realised_sparsity, sparse_mode

CONTEXT = 48             # of the tiny model
TEXT = ("the sun rose over a quiet town and no one in the street said a word until the baker "
        "opened his door, put out a sign and called: bread! who wants bread?")


def request(*args):
    return SimpleNamespace(args=args, task_name="test", doc_id=0)


def loaded(folder):
    return MinTEAL(str(folder), dtype="float32", device="cpu")


def make_tiny(folder, begins):
    """Write a tiny Llama whose tokenizer begins texts or does not; return its folder."""
    tokens = write_byte_level(folder, [TEXT], ["<s>", "</s>"], begins)
    tiny_model(vocab_size=tokens, max_position_embeddings=CONTEXT).save_pretrained(folder)
    config = read_json(folder / "config.json") | {"bos_token_id": 0, "eos_token_id": 1}
    write_json(folder / "config.json", config)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["begin", "no-begin"])
def both(request, tmp_path_factory):
    """A tiny Llama as minTEAL and as transformers have it."""
    folder = make_tiny(tmp_path_factory.mktemp("tiny"), request.param)
    # Its cache of logits is wrong for two texts of the same tokens that are split elsewhere.
    return loaded(folder), HFLM(str(folder), dtype="float32", device="cpu", logits_cache=False)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A MinTEAL of a tiny Llama, calibrated."""
    folder = make_tiny(tmp_path_factory.mktemp("sparse"), True)
    lm = loaded(folder)
    calibration = calibrate(lm.model, tokens_like(lm.model, 400), CONTEXT)
    add_greedy(calibration, lm.model, tokens_like(lm.model, 400))
    calibration.save(folder / "calibration.safetensors")
    return lm


def scored_requests():
    """Return many requests: contexts empty, shared, cut, with blanks at their edges."""
    contexts = ["", "the", " the sun ", "the sun rose over", "bread!\n\n", "<s>the sun", "  ",
                " ".join([TEXT] * 3)]
    targets = [" a quiet town", "\n", "s", " the", " the sun", " " + TEXT[:51], "日本"]
    return [request(context, target) for context in contexts for target in targets]


def check_scores(ours, theirs, requests):
    """Check that both give the same sums of log-probabilities, and find the same ones greedy."""
    found = ours.loglikelihood(requests)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for each, (value, greedy), (other, other_greedy) in zip(requests, found, expected):
        assert abs(value - other) < 2e-4 and greedy == other_greedy, each.args
    return found


def test_scores_are_those_of_the_hf_model(both):
    ours, theirs = both
    requests = scored_requests()
    if ours.tok_encode("") == []:        # the hf model cannot score what has nothing before it
        requests = [each for each in requests if each.args[0] != "  "]
    # Answers that are the greedy ones: each context continued as the model itself would.
    contexts = list(dict(each.args for each in requests))
    written = ours.generate_until([request(context, {"until": ["\n"], "max_gen_toks": 3})
                                   for context in contexts])
    requests += [request(context, text or " a") for context, text in zip(contexts, written)]
    assert any(greedy for _, greedy in check_scores(ours, theirs, requests))
    whole = [request(text) for text in ("the", TEXT, " ".join([TEXT] * 4))]
    assert ours.loglikelihood_rolling(whole) == pytest.approx(
        theirs.loglikelihood_rolling(whole), abs=2e-4)


def test_texts_are_those_of_the_hf_model(both):
    ours, theirs = both
    contexts = ["the sun", " bread! ", " ".join([TEXT] * 3), "<s>no one", "who wants"]

    def written(stops):
        requests = [request(context, {"until": stop, "max_gen_toks": 16, "do_sample": False})
                    for context, stop in zip(contexts * 2, stops)]
        texts = ours.generate_until(requests)
        assert texts == theirs.generate_until(requests, disable_tqdm=True)
        return texts

    whole = written([[]] * 5)
    stopped = written([[text[3:7] or "~", "bread"] for text in whole]
                      + [[text[5:6] or "~"] for text in whole])
    assert all(whole) and sum(a != b for a, b in zip(stopped, whole * 2)) > 5


def test_a_folder_with_tokenizer_model_alone_is_read_by_the_model_s_own():
    lm = MinTEAL(str(ROOT / "demo"), device="cpu")
    ids = lm.own_tokenizer.encode("def walk(x):\n")
    assert lm.tok_encode("def walk(x):\n") == ids and ids[0] == lm.prefix_token_id
    assert lm.tok_decode(ids) == "def walk(x):\n"
    text, = lm.generate_until([request("def walk(x):\n", {"until": ["\n"], "max_gen_toks": 9})])
    assert text.strip() and "\n" not in text


@NEEDS_SMOLLM2
def test_smollm2_is_scored_as_the_hf_model_does():
    ours = loaded(SMOLLM2)
    theirs = HFLM(str(SMOLLM2), dtype="float32", device="cpu", batch_size=4)
    # Of what ends a word of its context the tokenizer would leave no token to score.
    check_scores(ours, theirs, [each for each in scored_requests()
                                if each.args[0] != "  " and each.args[1] == " the sun"])
    written = [request("Photosynthesis is", {"until": ["\n", " by which"], "max_gen_toks": 12})]
    assert ours.generate_until(written) == theirs.generate_until(written, disable_tqdm=True)


def test_what_texts_share_is_run_once(sparse):
    sparse.set(0)
    counts = []
    with sparse.model.model.layers[0].register_forward_pre_hook(
            lambda block, inputs: counts.append(inputs[0].shape[:2].numel())):
        sparse.loglikelihood([request(TEXT[:80], " quiet")])
        alone = sum(counts)
        sparse.loglikelihood([request(TEXT[:80], target) for target in (" quiet", " town", " a")])
    assert alone > 10 and sum(counts) - alone < 1.5 * alone


@pytest.mark.parametrize("dense_prompt", [False, True])
def test_sparse_scores_are_those_of_each_text_alone(sparse, dense_prompt, monkeypatch):
    monkeypatch.setattr(sparse, "dense_prompt", dense_prompt)
    sparse.set(0.5, "greedy")
    monkeypatch.setattr(harness, "TOKENS", 40)     # trees of several calls
    requests = scored_requests()
    found = sparse.loglikelihood(requests)
    for each, (value, greedy) in zip(requests, found):
        context, target = each.args
        if context:
            context, target = sparse._encode_pair(context, target)
        else:
            context, target = [0], sparse.tok_encode(target, add_special_tokens=False)
        ids = (context + target)[-CONTEXT - 1:]
        dense = len(ids) - len(target) if dense_prompt else 4
        with sparse_mode(sparse.model, "all", dense_prefix=dense):
            logits = sparse.model(torch.tensor([ids[:-1]]))[0, -len(target):]
        target = torch.tensor(target)
        assert abs(value + F.cross_entropy(logits, target, reduction="sum").item()) < 2e-4
        assert greedy == bool((logits.argmax(-1) == target).all())


def test_windows_of_a_text_are_those_of_the_other_measures(sparse, monkeypatch):
    ids = tokens_like(sparse.model, 4 * CONTEXT, seed=1)
    sparse.set(0.4, "uniform")
    monkeypatch.setattr(sparse, "tok_encode", lambda text, **more: ids.tolist())
    value, = sparse.loglikelihood_rolling([request("the text")])
    windows = windows_of(torch.cat((torch.tensor([0]), ids)), CONTEXT)
    realised = sparse.realised()
    with counted(sparse.model), sparse_mode(sparse.model, "all", dense_prefix=4):
        logits = sparse.model(windows[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
    assert value == pytest.approx(-loss.item(), abs=1e-3)
    assert realised == pytest.approx(realised_sparsity(sparse.model))


def test_sparse_texts_are_those_of_generate(sparse):
    sparse.set(0.5)
    text, = sparse.generate_until([request("the sun", {"until": ["~"], "max_gen_toks": 12})])
    ids = generate(sparse.model, sparse.tok_encode("the sun"), 12, eos_ids=[1])
    assert text == sparse.tok_decode(list(ids), skip_special_tokens=True).split("~")[0]
    assert 0.3 < sparse.realised() < 0.7
    sampled = request("the sun", {"max_gen_toks": 6, "do_sample": True, "temperature": 0.8})
    texts = [torch.manual_seed(3) and sparse.generate_until([sampled]) for _ in range(2)]
    assert texts[0] == texts[1]


@pytest.fixture
def tasks(tmp_path, monkeypatch, run):
    """A folder with the tasks of choices.py; the harness's own, 13,000 files, are not looked at."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    make = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", lambda self, *each, **options: make(
        self, *each, **options | {"include_defaults": False}))
    (tmp_path / "text").write_text("".join(
        f" = Article {i} = \n" + " ".join(TEXT.split()[i % 7:]) for i in range(30)))
    run(choices, "--text", tmp_path / "text", "--out", tmp_path / "tasks", "--items", 12,
        "--before", 5, "--after", 2)
    return tmp_path


def test_the_command_prints_a_table(sparse, tasks, run):
    out = run(harness, "--model", sparse.folder, "--dtype", "float32", "--device", "cpu", "--tasks",
              "choices", "pages", "--include-path", tasks / "tasks", "--sparsity", 0, 0.5,
              "--allocation", "uniform", "greedy", "--limit", 8, "--out", tasks / "out.json")
    assert "all tokens but the first 4 are sparse" in out and "choices" in out
    assert out.count("greedy") == 2 and out.count("±") >= 6
    rows = json.loads((tasks / "out.json").read_text())["rows"]
    assert [row["allocation"] for row in rows] == ["dense", "uniform", "greedy"]
    assert rows[0]["realised"] == 0 and 0.3 < rows[1]["realised"] < 0.7
    assert rows[0]["results"]["pages"]["word_perplexity,none"] > 1


def test_the_harness_s_own_command_line_knows_minteal(sparse, tasks, run):
    out = run(harness, "run", "--model", "minteal", "--model_args",
              f"pretrained={sparse.folder},sparsity=0.5,allocation=greedy,dtype=float32,"
              f"dense_prompt=True", "--tasks", "choices", "--include_path", tasks / "tasks",
              "--limit", 4, "--device", "cpu", "--use_cache", tasks / "cache" / "answers")
    assert "minteal" in out and "|acc_norm|" in out
    assert list((tasks / "cache").glob("answers*.db"))


def test_bad_input_is_named(sparse, tasks, run):
    options = ("--model", sparse.folder, "--include-path", tasks / "tasks", "--device", "cpu")
    for words, message in [
            ((*options, "--tasks", "choises"), "--tasks choises: no such task"),
            ((*options, "--tasks", "choices", "--allocation", "best", "--sparsity", "0.5"), "best"),
            (("run", "--model", "minteal", "--tasks", "pages"), "Tasks not found: pages")]:
        assert message in run.refused(harness, *words)
    (tasks / "empty").mkdir()
    shutil.copy(sparse.folder + "/config.json", tasks / "empty")
    sparse.set(0)
    many = " ".join([TEXT] * 3)
    for message, act in [
            ("no tokenizer", lambda: MinTEAL(tasks / "empty")),
            ("no model_args sparse", lambda: MinTEAL(sparse.folder, sparse=1)),
            ("expected 1 to 48", lambda: sparse.loglikelihood([request("the", many)])),
            ("is empty|has 0 tokens", lambda: sparse.loglikelihood([request("the", "")])),
            ("leave no room", lambda: sparse.generate_until([
                request("the", {"until": [], "max_gen_toks": CONTEXT})])),
            ("num_beams", lambda: sparse.generate_until([
                request("the", {"max_gen_toks": 4, "num_beams": 2})]))]:
        with refused(match=message):
            act()
