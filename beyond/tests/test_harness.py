"""Tests of harness.py: the numbers of a dense model are those of the harness's own `hf` model."""
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lm_eval", reason="needs lm_eval: see requirements-dev.txt")

from lm_eval.models.huggingface import HFLM

from beyond import harness
from beyond.harness import MinTEAL, bundles, grow
from beyond.lab import choices
from calibrate import add_greedy, calibrate
from generate import generate
from model import InputError, windows_of
from sparsify import counted, realised_sparsity, sparse_mode

SMOLLM2 = Path(os.environ.get("MINTEAL_SMOLLM2", "smollm2"))
CONTEXT = 48             # of the tiny model
WORDS = ("the sun rose over a quiet town and no one in the street said a word until the baker "
         "opened his door, put out a sign and called: bread! who wants bread?").split()


def request(*args):
    return SimpleNamespace(args=args, task_name="test", doc_id=0)


def make_tiny(folder, begins):
    """Write a tiny Llama by transformers, whose tokenizer begins texts or does not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([" ".join(WORDS)], trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>",
                            eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        initializer_range=0.3, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=False)).save_pretrained(folder)


@pytest.fixture(scope="module", params=[True, False], ids=["begin", "no-begin"])
def tiny(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder, request.param)
    return str(folder)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A MinTEAL of a tiny Llama, calibrated."""
    folder = tmp_path_factory.mktemp("sparse")
    make_tiny(folder, True)
    lm = MinTEAL(str(folder), dtype="float32", device="cpu")
    tokens = torch.randint(320, (400,), generator=torch.Generator().manual_seed(0))
    calibration = calibrate(lm.model, tokens, CONTEXT)
    add_greedy(calibration, lm.model, tokens)
    calibration.save(folder / "calibration.safetensors")
    return lm


def scored_requests():
    """Return a hundred requests: contexts empty, shared, cut, with blanks at their edges."""
    contexts = ["", "the", " the sun ", "the sun rose over", "bread!\n\n", "<s>the sun", "  ",
                " ".join(WORDS), " ".join(WORDS * 3), "ein Satz mit Ä"]
    targets = [" a quiet town", "town", " ", "\n", " who wants bread?", "s", " the", " the sun",
               " " + " ".join(WORDS[:12]), "日本"]
    return [request(context, target) for context in contexts for target in targets]


def test_scores_are_those_of_the_hf_model(tiny):
    ours = MinTEAL(tiny, dtype="float32", device="cpu")
    # Its cache of logits is wrong for two texts of the same tokens that are split elsewhere.
    theirs = HFLM(tiny, dtype="float32", device="cpu", batch_size=8, logits_cache=False)
    requests = scored_requests()
    assert len(requests) == 100
    if ours.tok_encode("") == []:        # the hf model cannot score what has nothing before it
        requests = [each for each in requests if each.args[0] != "  "]
    # Answers that are the greedy ones: each context continued as the model itself would.
    options = {"until": ["\n"], "max_gen_toks": 3, "do_sample": False}
    requests += [request(context, ours.write(context, options.copy()) or " a")
                 for context in dict(each.args for each in requests)]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests)
    for each, (value, greedy), (other, other_greedy) in zip(requests, found, expected):
        assert abs(value - other) < 1e-4 and greedy == other_greedy, each.args
    assert any(greedy for _, greedy in found)
    whole = [request(text) for text in ("", "the", " ".join(WORDS), " ".join(WORDS * 4))][1:]
    for value, other in zip(ours.loglikelihood_rolling(whole), theirs.loglikelihood_rolling(whole)):
        assert abs(value - other) < 1e-4


def test_texts_are_those_of_the_hf_model(tiny):
    ours = MinTEAL(tiny, dtype="float32", device="cpu")
    theirs = HFLM(tiny, dtype="float32", device="cpu")
    contexts = ["the sun", " bread! ", " ".join(WORDS * 3), "<s>no one", "a\n", "who wants"]
    plain = [request(context, {"until": [], "max_gen_toks": 16}) for context in contexts]
    written = ours.generate_until(plain)
    assert written == theirs.generate_until(plain, disable_tqdm=True) and all(written)
    stops = [[text[3:7] or "~", "bread"] for text in written] + [[text[5:6] or "~"]
                                                                 for text in written]
    stopped = [request(context, {"until": stop, "max_gen_toks": 16, "do_sample": False})
               for context, stop in zip(contexts * 2, stops)]
    texts = ours.generate_until(stopped)
    assert texts == theirs.generate_until(stopped, disable_tqdm=True)
    assert sum(a != b for a, b in zip(texts, written * 2)) > 6


def test_a_folder_with_tokenizer_model_alone_is_read_by_the_model_s_own():
    lm = MinTEAL("demo", device="cpu")
    ids = lm.own_tokenizer.encode("def walk(x):\n")
    assert lm.tok_encode("def walk(x):\n") == ids and ids[0] == lm.prefix_token_id
    assert lm.tok_decode(ids) == "def walk(x):\n"
    (text,) = lm.generate_until([request("def walk(x):\n", {"until": ["\n"], "max_gen_toks": 9})])
    assert text.strip() and "\n" not in text


@pytest.mark.skipif(not SMOLLM2.exists(), reason="needs SmolLM2: see beyond/gguf.py")
def test_smollm2_is_scored_as_the_hf_model_does():
    ours = MinTEAL(SMOLLM2, dtype="float32", device="cpu")
    theirs = HFLM(str(SMOLLM2), dtype="float32", device="cpu", batch_size=4)
    # Of what ends a word of its context the tokenizer would leave no token to score.
    requests = [each for each in scored_requests()
                if each.args[0] != "  " and each.args[1].startswith(" t")]
    for (value, greedy), (other, other_greedy) in zip(
            ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)):
        assert abs(value - other) < 1e-4 and greedy == other_greedy
    written = [request("Photosynthesis is", {"until": ["\n", " by which"], "max_gen_toks": 12})]
    assert ours.generate_until(written) == theirs.generate_until(written, disable_tqdm=True)


def test_a_tree_holds_each_beginning_once():
    texts = [harness.Scored([1, 2, 3, 4], 1, [9], 0), harness.Scored([1, 2, 3, 5], 1, [9, 8], 1),
             harness.Scored([1, 2], 1, [3], 2), harness.Scored([7], 1, [8], 3)]
    lists = bundles(texts)
    assert len(lists) == 1
    nodes = grow(lists[0])
    assert [node.token for node in nodes] == [1, 7, 2, 3, 4, 5]
    assert [node.late for node in nodes] == [False, True, True, True, True, True]
    assert sum(len(node.asked) for node in nodes) == 5
    apart = [harness.Scored([1, 2, 3, 4], 2, [9], 0), harness.Scored([1, 2, 3, 4], 3, [9], 1)]
    assert len(grow(bundles(apart)[0])) == 6       # the third token is sparse in one, dense in one


@pytest.mark.parametrize("dense_prompt", [False, True])
def test_sparse_scores_are_those_of_each_text_alone(sparse, dense_prompt, monkeypatch):
    sparse.dense_prompt = dense_prompt
    sparse.set(0.5, "greedy")
    monkeypatch.setattr(harness, "TOKENS", 40)     # trees of several calls
    requests = scored_requests()
    found = sparse.loglikelihood(requests)
    assert 0.3 < sparse.realised() < 0.7
    sparse.dense_prompt = False
    for each, (value, greedy) in zip(requests, found):
        context, target = each.args
        if context:
            context, target = sparse._encode_pair(context, target)
        else:
            context, target = [0], sparse.tok_encode(target, add_special_tokens=False)
        ids = (context + target)[-CONTEXT - 1:]
        dense = len(ids) - len(target) if dense_prompt else 4
        with torch.no_grad(), sparse_mode(sparse.model, "all", dense_prefix=dense):
            logits = sparse.model(torch.tensor([ids[:-1]]))[0, -len(target):]
        target = torch.tensor(target)
        assert abs(value + F.cross_entropy(logits, target, reduction="sum").item()) < 1e-4
        assert greedy == bool((logits.argmax(-1) == target).all())


def test_windows_of_a_text_are_those_of_the_other_measures(sparse):
    ids = torch.randint(2, 320, (4 * CONTEXT,), generator=torch.Generator().manual_seed(1))
    sparse.set(0.4, "uniform")
    sparse.tok_encode = lambda text, **more: ids.tolist()
    (value,) = sparse.loglikelihood_rolling([request("the text")])
    del sparse.tok_encode
    windows = windows_of(torch.cat((torch.tensor([0]), ids)), CONTEXT)
    with torch.no_grad(), counted(sparse.model), sparse_mode(sparse.model, "all", dense_prefix=4):
        logits = sparse.model(windows[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
    assert abs(value + loss.item()) < 1e-4
    assert sparse.realised() == pytest.approx(realised_sparsity(sparse.model))


def test_sparse_texts_are_those_of_generate(sparse):
    sparse.set(0.5)
    (text,) = sparse.generate_until([request("the sun", {"until": ["~"], "max_gen_toks": 12})])
    ids = generate(sparse.model, sparse.tok_encode("the sun"), 12, eos_ids=[1])
    assert text == sparse.tok_decode(list(ids), skip_special_tokens=True).split("~")[0]
    assert 0.3 < sparse.realised() < 0.7
    sampled = request("the sun", {"until": [], "max_gen_toks": 6, "do_sample": True,
                                  "temperature": 0.8, "top_k": 5})
    torch.manual_seed(3)
    once = sparse.generate_until([sampled])
    torch.manual_seed(3)
    assert sparse.generate_until([sampled]) == once


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with the tasks of choices.py, and a function that runs a command line."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    text = "".join(f" = Article {i} = \n" + " ".join(WORDS[(i * j) % 7:] + [str(j)])
                   for i in range(3) for j in range(30))
    (tmp_path / "text").write_text(text)

    def run(main, *words):
        monkeypatch.setattr(sys, "argv", ["harness", *map(str, words)])
        main()

    run(choices.main, "--text", tmp_path / "text", "--out", tmp_path / "tasks", "--items", 12,
        "--before", 5, "--after", 2)
    return tmp_path, run


def test_the_command_prints_a_table(sparse, tasks, capsys):
    folder, run = tasks
    run(harness.main, "--model", sparse.folder, "--dtype", "float32", "--device", "cpu", "--tasks",
        "choices", "pages", "--include-path", folder / "tasks", "--sparsity", 0, 0.5,
        "--allocation", "uniform", "greedy", "--limit", 8, "--out", folder / "out.json")
    out = capsys.readouterr().out
    assert "all tokens but the first 4 are sparse" in out and "choices, 8 documents" in out
    assert out.count("greedy") == 2 and out.count("±") == 6
    rows = json.loads((folder / "out.json").read_text())["rows"]
    assert [row["allocation"] for row in rows] == ["dense", "uniform", "greedy"]
    assert rows[0]["realised"] == 0 and 0.3 < rows[1]["realised"] < 0.7
    assert rows[0]["results"]["pages"]["word_perplexity,none"] > 1


def test_the_harness_s_own_command_line_knows_minteal(sparse, tasks, capsys):
    folder, run = tasks
    run(harness.main, "run", "--model", "minteal", "--model_args",
        f"pretrained={sparse.folder},sparsity=0.5,allocation=greedy,dtype=float32,"
        f"dense_prompt=True", "--tasks", "choices", "--include_path", folder / "tasks",
        "--limit", 4, "--device", "cpu", "--use_cache", folder / "cache" / "answers")
    out = capsys.readouterr().out
    assert "minteal" in out and "|acc_norm|" in out
    assert list((folder / "cache").glob("answers*.db"))


def test_bad_input_is_named(sparse, tasks):
    folder, run = tasks
    options = ("--model", sparse.folder, "--include-path", folder / "tasks", "--device", "cpu")
    for words, message in [
            ((*options, "--tasks", "choises"), "--tasks choises: no such task"),
            ((*options, "--tasks", "choices", "--limit", "0"), "0 is not a whole number above 0"),
            ((*options, "--tasks", "choices", "--sparsity", "1"), "at least 0 and below 1"),
            ((*options, "--tasks", "choices", "--allocation", "best", "--sparsity", "0.5"), "best"),
            (("--model", "random:llama-0b", *options[2:], "--tasks", "pages"), "llama-0b"),
            (("run", "--model", "minteal", "--tasks", "pages", "--limit", "0"), "--limit 0")]:
        with pytest.raises(InputError, match=message):
            run(harness.main, *words)
    (folder / "empty").mkdir()
    shutil.copy(Path(sparse.folder) / "config.json", folder / "empty")
    with pytest.raises(InputError, match="no tokenizer"):
        MinTEAL(folder / "empty")
    with pytest.raises(InputError, match="no model_args sparse"):
        MinTEAL(sparse.folder, sparse=1)
    sparse.set(0)
    with pytest.raises(InputError, match="expected 1 to 48"):
        sparse.loglikelihood([request("the", " ".join(WORDS * 3))])
    with pytest.raises(InputError, match="is empty"):
        sparse.loglikelihood([request("the", "")])
    with pytest.raises(InputError, match="leave no room"):
        sparse.generate_until([request("the", {"until": [], "max_gen_toks": CONTEXT})])
    with pytest.raises(InputError, match="num_beams"):
        sparse.generate_until([request("the", {"max_gen_toks": 4, "num_beams": 2})])
