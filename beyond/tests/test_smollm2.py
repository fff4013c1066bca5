"""Tests with a real model: SmolLM2-135M-Instruct, where it is.

It lies in the folder smollm2, or in the one that MINTEAL_SMOLLM2 names; gguf.py makes it. Figures
are those of float32, and the text that they were measured on stands here.
"""
import pytest
import torch

from beyond import __main__ as fast
from beyond import rotate
from beyond.tests.conftest import NEEDS_SMOLLM2, SMOLLM2, close
from calibrate import calibrate
from generate import generate
from model import Llama, load_model, windows_of
from sparsify import perplexity, realised_sparsity, sparsify

pytestmark = NEEDS_SMOLLM2

PAGE = """
Before there were clocks, people told the time by the sun. A stick in the ground was enough. In the
morning its shadow was long and pointed to the west, at noon it was short, and in the evening it
pointed to the east. Whoever drew lines on the ground where the shadow fell at each hour had a
sundial. It worked well, but only by day, and only when there were no clouds.

For the night, and for rooms without windows, there were water clocks. A bowl with a small hole in
the bottom was filled in the evening, and marks on its side showed how many hours had passed when
the water had sunk to them. There was one difficulty. When the bowl is full, the water presses
harder and runs out faster; when it is nearly empty, it only drips. So the marks had to be closer
together at the bottom than at the top, or the bowl had to be narrower there. Greek and Arab
engineers built clocks of this kind that rang bells, opened doors and moved figures.
"""
CONTEXT = 512            # tokens a window where the model is calibrated


@pytest.fixture(scope="module")
def real():
    """(model in float32, tokenizer); not to be changed."""
    return load_model(SMOLLM2, dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs():
    """transformers' model of the folder."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)


def test_it_is_the_model_of_transformers(real, theirs):
    model, tokenizer = real
    page = torch.tensor([tokenizer.encode(PAGE)])
    assert close(model(page), theirs(page).logits, 1e-4)
    prompt = tokenizer.encode("The capital of France is")
    assert tokenizer.decode(list(generate(model, prompt, 1))).strip() == "Paris"


@pytest.mark.parametrize("system", [None, "You are a pirate."])
def test_a_turn_of_a_chat_is_that_of_transformers(real, theirs, run, system):
    _, tokenizer = real
    said = "Name three colours of the rainbow."
    messages = [{"role": "system", "content": system}] if system else []
    prompt = tokenizer.tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": said}], add_generation_prompt=True,
        return_tensors="pt", return_dict=True)
    ids = theirs.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
    answer = tokenizer.decode(ids[prompt["input_ids"].shape[1]:])
    assert len(answer) > 20
    assert answer + "\n" == run(fast, "--chat", "--model", SMOLLM2, "--device", "cpu", "--dtype",
                                "float32", "--max-new-tokens", 20, typed=said + "\n",
                                *(["--system", system] if system else []))


def test_the_perplexity_of_a_page_at_half_of_the_weights(real, tmp_path):
    """The tolerances are wide: what it is calibrated on, Python's help, differs between versions.

    The rotated model realises less than 50 %, since the directions of so short a text are its own.
    """
    topics = pytest.importorskip("pydoc_data.topics").topics
    model, tokenizer = real
    text = "\n".join(topics[name] for name in sorted(topics))[:8000]
    held_in = torch.tensor(tokenizer.encode(text)[:2 * CONTEXT + 1])
    page = torch.tensor(tokenizer.encode(PAGE))
    Q, R = map(rotate.principal_directions,
               rotate.covariances(model, windows_of(held_in, CONTEXT)))
    rotate.rotate(SMOLLM2, tmp_path / "rotated", Q, R, torch.float32)
    for folder, expected, realised in ((SMOLLM2, 43.5, 0.52), (tmp_path / "rotated", 34.7, 0.39)):
        model = Llama.from_pretrained(folder, dtype=torch.float32)
        dense = perplexity(model, page, len(page) - 1)
        assert dense == pytest.approx(23.75, rel=0.01)     # a rotation changes nothing
        sparsify(model, calibrate(model, held_in, CONTEXT).thresholds(0.5))
        sparse = perplexity(model, page, len(page) - 1)
        assert sparse == pytest.approx(expected, rel=0.15)
        assert realised_sparsity(model) == pytest.approx(realised, abs=0.04)
