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

The mechanical clock was invented in Europe towards the end of the thirteenth century. A weight on
a rope turned a wheel, and a device called the escapement let the wheel move on by one tooth at a
time. These clocks stood in church towers, they had no hands, and they were wrong by a quarter of
an hour a day. This changed when Christiaan Huygens built the first pendulum clock in 1656. A
pendulum of a given length takes the same time for each swing, whether the swing is wide or narrow,
and his clock was wrong by less than a minute a day.

At sea a pendulum is of no use, because the ship itself swings. But sailors needed a good clock
more than anybody else, since it told them how far east or west they were. In 1714 the British
government promised twenty thousand pounds to whoever solved the problem. John Harrison, a
carpenter, worked on it for most of his life. His fourth clock, which looked like a large watch,
was tested on a voyage to Jamaica in 1761, and after two months at sea it was five seconds slow.
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


@pytest.fixture(scope="module")
def held_in(real):
    """1025 tokens to calibrate with, (N,): what Python's help says, another kind of English."""
    topics = pytest.importorskip("pydoc_data.topics").topics
    ids = real[1].encode("\n".join(topics[name] for name in sorted(topics))[:8000])
    return torch.tensor(ids[:2 * CONTEXT + 1])


@pytest.fixture(scope="module")
def rotated(real, held_in, tmp_path_factory):
    """The folder, in the principal directions of the activations."""
    stream, heads = rotate.covariances(real[0], windows_of(held_in, CONTEXT))
    out = tmp_path_factory.mktemp("smollm2") / "rotated"
    rotate.rotate(SMOLLM2, out, rotate.principal_directions(stream),
                  rotate.principal_directions(heads), torch.float32)
    return out


@pytest.fixture(scope="module")
def page(real):
    """The tokens of the page, (N,)."""
    return torch.tensor(real[1].encode(PAGE))


def test_logits_are_those_of_transformers(real, theirs, page):
    assert close(real[0](page[None]), theirs(page[None]).logits, 1e-4)


def test_it_knows_the_capital_of_france(real):
    model, tokenizer = real
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


# The tolerances are wide: Python's help is not the same in all versions. The rotated model realises
# less than 50 %, since the directions of so short a text are its own.
@pytest.mark.parametrize("kind, expected, realised", [("plain", 36.9, 0.52),
                                                      ("rotated", 28.8, 0.39)])
def test_the_perplexity_of_a_page_at_half_of_the_weights(request, page, held_in, kind, expected,
                                                         realised):
    folder = request.getfixturevalue("rotated") if kind == "rotated" else SMOLLM2
    model = Llama.from_pretrained(folder, dtype=torch.float32)
    dense = perplexity(model, page, len(page) - 1)
    assert dense == pytest.approx(19.34, rel=0.01)         # a rotation changes nothing
    sparsify(model, calibrate(model, held_in, CONTEXT).thresholds(0.5))
    sparse = perplexity(model, page, len(page) - 1)
    assert sparse == pytest.approx(expected, rel=0.15)
    assert realised_sparsity(model) == pytest.approx(realised, abs=0.04)
