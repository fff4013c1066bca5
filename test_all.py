"""What must stay true of the core, file by file: a specification to read.

    pytest test_all.py        under a minute on two old cores

Without a GPU the Triton kernels run in Triton's interpreter. What is compared with transformers is
skipped where it is not installed. The chapters of beyond/ have tests of their own, and odd machines
and odd folders theirs (beyond/tests/test_corners.py).
"""
import contextlib
import copy
import doctest
import functools
import json
import math
import os
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                   # read when triton is imported

import calibrate
import generate
import kernel
import model as llama
import sparsify
from calibrate import BINS, LINEARS, SINKS, Calibration
from demo import corpus
from generate import Sampling, generate_speculative, stream
from model import (Config, InputError, Llama, block_linears, linear_names, load_tokenizer,
                   read_safetensors, windows_of, write_safetensors)
from sparsify import SparseLinear, counted, perplexity, realised_sparsity, sparse_mode

HERE = Path(__file__).parent
DEMO = HERE / "demo"
RANDOM = "random:llama-3.2-1b"
CORE = ["model", "kernel", "sparsify", "calibrate", "generate"]        # each imports earlier ones
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

needs_c = pytest.mark.skipif(not kernel.fits_c(torch.zeros(1)), reason="no C compiler")
needs_triton = pytest.mark.skipif(kernel.triton is None, reason="no Triton")
refused = functools.partial(pytest.raises, InputError)     # refused(match="what it says")

torch.set_num_threads(1)                                   # models here are too small for more


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


CONFIG = Config(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, head_dim=12, vocab_size=61, max_position_embeddings=64)
NAMES = linear_names(CONFIG)
INPUTS = [inputs for _, inputs in block_linears(CONFIG).values()] * 3
THRESHOLDS = {name: (0.4, torch.tensor(0.2), torch.linspace(0, 1, inputs))[i % 3]
              for i, (name, inputs) in enumerate(zip(NAMES, INPUTS))}


def tiny_model(dtype=torch.float64, seed=0, **changes):
    """Return a Llama with weights so large that its next tokens differ and activations matter."""
    torch.manual_seed(seed)
    model = Llama(replace(CONFIG, **changes)).requires_grad_(False)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape)
        matrix = parameter.ndim == 2
        parameter.copy_(noise * 1.5 * parameter.shape[1] ** -0.5 if matrix else 1 + 0.2 * noise)
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def dense():
    """The tiny model in float64: not to be changed."""
    return tiny_model()


def sparse_model(thresholds=THRESHOLDS, dtype=torch.float64, **changes):
    """Return a tiny model made sparse; thresholds: a dict, or a number for all linears."""
    if not isinstance(thresholds, dict):
        thresholds = dict.fromkeys(NAMES, thresholds)
    return sparsify.sparsify(tiny_model(dtype, **changes), thresholds)


def tokens_of(model, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)


def drop(x, threshold):
    """The rule, written out once more."""
    return torch.where(x.abs() > threshold, x, 0)


def by_hand(model, tokens, thresholds, prefix=0):
    """Return the logits of a dense model whose linears see what is kept of their inputs."""
    with contextlib.ExitStack() as hooks:
        for name, threshold in thresholds.items():
            def keep(module, inputs, threshold=threshold):
                x, = inputs
                return torch.cat((x[:, :prefix], drop(x[:, prefix:], threshold)), 1)
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(keep))
        return model(tokens)


def inputs_of(model, name, tokens):
    """Return what a linear reads while the model runs tokens (B, T): (B, T, in)."""
    inputs = []
    with model.get_submodule(name).register_forward_pre_hook(lambda _, x: inputs.extend(x)):
        model(tokens)
    return inputs[0]


def stepwise(model, tokens, pieces):
    """Return the logits of tokens (B, T), so many at a time, through a cache."""
    cache = model.make_cache(*tokens.shape)
    return torch.cat([model(part, cache) for part in tokens.split(pieces, dim=1)], 1)


def greedy(model, prompt, count, **options):
    return list(generate.generate(model, prompt, count, **options))


def distance(actual, expected):
    """Return ‖actual - expected‖ / ‖expected‖."""
    assert actual.shape == expected.shape
    actual, expected = (tensor.double().cpu() for tensor in (actual, expected))
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture
def run(capsys, monkeypatch):
    """Return a function that runs a file of ours as a script, in this process.

    It returns standard output; of a script that fails, with status 2, standard error.
    """
    def run_file(file, *options, fails=False):
        monkeypatch.setattr(sys, "argv", [file, *map(str, options)])
        status = 0
        try:
            with torch.enable_grad():
                runpy.run_path(str(HERE / file), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
        out, err = capsys.readouterr()
        assert status == 2 * fails, err
        return err if fails else out
    return run_file


# --------------------------------------------------------------------------------------------------
# model.py: the model

def llama_of_the_papers(model, tokens):
    """Return Llama's logits of tokens (T,) in float64, head by head (model.py has sources)."""
    config = model.config
    weights = {name: parameter.double() for name, parameter in model.named_parameters()}
    pairs = torch.arange(config.head_dim // 2).double()
    angles = torch.outer(torch.arange(len(tokens)).double(),
                         config.rope_theta ** (-2 * pairs / config.head_dim))         # (T, D/2)
    future = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)

    def norm(x, name):                                     # RMSNorm
        scale = (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        return x * scale * weights[f"model.{name}.weight"]

    def turned(x):                                         # RoPE: pairs are complex numbers
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * angles)          # (T, D/2)
        return torch.cat((turned.real, turned.imag), -1)

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in (f"layers.{i}" for i in range(config.num_hidden_layers)):
        w = {name.split(".")[1]: weights[f"model.{layer}.{name}.weight"].T
             for name in block_linears(config)}
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = ((h @ w[f"{name}_proj"]).split(config.head_dim, -1) for name in "qkv")
        heads = []
        for i, query in enumerate(q):
            shared = i * len(k) // len(q)                  # grouped-query attention
            scores = turned(query) @ turned(k[shared]).T / math.sqrt(config.head_dim)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[shared])
        x = x + torch.cat(heads, -1) @ w["o_proj"]
        h = norm(x, f"{layer}.post_attention_layernorm")
        x = x + (F.silu(h @ w["gate_proj"]) * (h @ w["up_proj"])) @ w["down_proj"]    # SwiGLU
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return norm(x, "norm") @ weights[f"{head}.weight"].T


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4},
    {"num_key_value_heads": 1, "rope_theta": 5e5, "head_dim": 8}])
def test_logits_are_those_of_the_papers(changes, dtype, tolerance):
    """At once, and piece by piece through a cache."""
    model = tiny_model(**changes)
    tokens = tokens_of(model, 2, 20)
    expected = torch.stack([llama_of_the_papers(model, row) for row in tokens])
    model.to(dtype)
    assert model(tokens).dtype == torch.promote_types(dtype, torch.float32)
    assert distance(model(tokens), expected) < tolerance
    assert distance(model(tokens, last_only=True), expected[:, -1:]) < tolerance
    for pieces in ([20], [1] * 20, [7, 1, 1, 5, 6]):
        assert distance(stepwise(model, tokens, pieces), expected) < tolerance


def test_a_cache_can_forget_and_is_never_overrun(dense):
    tokens = tokens_of(dense, 2, 20)
    cache = dense.make_cache(2, 20)
    logits = dense(tokens, cache)
    with refused(match="3 tokens do not fit a cache of 20 positions, 20 of them used"):
        dense(tokens[:, :3], cache)
    cache.used = 11                      # forget, and go on from there
    assert distance(dense(tokens[:, 11:], cache), logits[:, 11:]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_on_a_cpu_are_float32(dtype):
    """So a model of 16 bits is the model of its rounded weights, nearly."""
    model, exact = (tiny_model(torch.float32).to(dtype) for _ in range(2))
    exact.float()
    tokens = tokens_of(exact, 1, 6)
    assert model.embed(tokens).dtype == model(tokens).dtype == torch.float32
    assert model.make_cache(1, 4).keys.dtype == dtype
    assert distance(model(tokens), exact(tokens)) < 0.02
    sparsify.sparsify(model, dict.fromkeys([*NAMES, "lm_head"]))
    assert distance(model(tokens), exact(tokens)) < 1e-5   # few rows: sums are not rounded either


# --------------------------------------------------------------------------------------------------
# model.py: config.json

def read_config(folder, **changes):
    raw = {"model_type": "llama", **vars(CONFIG), **changes}
    (folder / "config.json").write_text(json.dumps(raw))
    return Config.read(folder)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "gpt2"}, 'model_type is "gpt2", expected "llama" or "mistral"'),
    ({"hidden_act": "gelu"}, 'hidden_act is "gelu", expected "silu"'),
    ({"hidden_size": 0}, "hidden_size is 0, expected a number above 0"),
    ({"hidden_size": 2**63}, "hidden_size is 9223372036854775808"),
    ({"vocab_size": "many"}, 'vocab_size is "many"'),
    ({"num_attention_heads": None}, "num_attention_heads is null"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    ({"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false"'),
    ({"rope_theta": float("nan")}, "rope_theta is NaN"),
    ({"is_causal": False}, "is_causal is false, expected true"),
    ({"model_type": "mistral", "sliding_window": 8,
      "layer_types": ["sliding_attention", "full_attention"]}, "layer_types is"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 'rope_type is "yarn"'),
    ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "factor is 8.0, expected null"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor is null, expected a number above 0"),
    ({"rope_parameters": {"full_attention": {}}}, "full_attention is {}, expected null"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"rope_scaling": "linear"}, "not the config.json of a Llama"),
])
def test_what_a_config_asks_for_is_done_or_refused_by_name(tmp_path, changes, message):
    with refused(match=f"config.json: .*{re.escape(message)}") as error:
        read_config(tmp_path, **changes)
    assert re.search("beyond reads more|expected a num|not the config", str(error.value))


# --------------------------------------------------------------------------------------------------
# model.py: safetensors

def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in llama.DTYPE_NAMES}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(7.0),
                "transposed": torch.randn(4, 3).t()}
    write_safetensors(path, tensors, {"written by": "a test"})
    metadata = {}
    read = read_safetensors(path, metadata)
    assert metadata == {"written by": "a test"}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    before = path.read_bytes()
    read["transposed"].zero_()           # what is mapped is a private copy
    assert path.read_bytes() == before


def test_a_write_that_fails_leaves_things_as_they_were(tmp_path, monkeypatch):
    def interrupt(file):
        raise KeyboardInterrupt

    path = tmp_path / "x"
    write_safetensors(path, {"x": torch.ones(3)})
    (tmp_path / "folder").mkdir()
    for place, message in [
        (tmp_path / "absent" / "x", "cannot be written: No such file"),
        (tmp_path / "folder", "folder: cannot be written"),
    ]:
        with refused(match=message):
            write_safetensors(place, {"x": torch.ones(2)})
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, {"x": torch.zeros(3)})
    assert read_safetensors(path)["x"].tolist() == [1, 1, 1]
    assert sorted(os.listdir(tmp_path)) == ["folder", "x"]


# --------------------------------------------------------------------------------------------------
# model.py: checkpoint folders

REFERENCES = {  # what is special: settings of transformers' configuration, or of `reference`
    "plain": {},
    "tied head": {"tie_word_embeddings": True},
    "float16, in shards": {"dtype": torch.float16, "shard": "60KB", "num_key_value_heads": 2},
    "bfloat16, in shards": {"dtype": torch.bfloat16, "shard": "60KB"},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2, "head_dim": 24},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3 rope": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
    "mistral, sliding window": {"model_type": "mistral", "sliding_window": 7},
}


def reference(folder, dtype=torch.float32, shard="10GB", model_type="llama", rope_theta=10000.0,
              rope_scaling=None, **settings):
    """Save a small random model of transformers, every part of which matters; return it."""
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": rope_theta} | (rope_scaling or {})
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=4, vocab_size=101, max_position_embeddings=128)
    config = getattr(transformers, f"{model_type.capitalize()}Config")(
        **{**shape, "rope_parameters": rope, **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        scale = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
        parameter.copy_(torch.randn(parameter.shape) * scale + ("norm" in name))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return read_by_transformers(folder)


def read_by_transformers(folder):
    import transformers
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("settings", REFERENCES.values(), ids=REFERENCES)
def test_logits_are_those_of_transformers(tmp_path, settings):
    theirs = reference(tmp_path, **settings)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == ("shard" in settings)
    assert Llama.from_pretrained(tmp_path).dtype == settings.get("dtype", torch.float32)
    ours = Llama.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = tokens_of(ours, 2, 40)
    expected = theirs(tokens).logits
    pieces = [9, 5, *[1] * 26]           # a prompt, a few tokens at once, then token by token
    assert distance(ours(tokens), expected) < 1e-4
    assert distance(stepwise(ours, tokens, pieces), expected) < 1e-4
    sparsify.sparsify(ours, dict.fromkeys(NAMES, 0.0))
    assert distance(stepwise(ours, tokens, pieces), expected) < 1e-4
    ours.save_pretrained(tmp_path / "again")               # and what we write, they read
    again = read_by_transformers(tmp_path / "again")
    assert distance(again(tokens).logits, expected) < 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_is_saved_comes_back(tmp_path, tied):
    """A sparse one, too: as the dense one."""
    model = tiny_model(torch.float32, tie_word_embeddings=tied)
    tokens = tokens_of(model, 1, 12)
    expected = model(tokens)
    for change in (lambda: None, lambda: sparsify.sparsify(model, THRESHOLDS | {"lm_head": 0.3})):
        change()
        model.save_pretrained(tmp_path)
        loaded = Llama.from_pretrained(tmp_path)
        assert loaded.config == model.config
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert torch.equal(loaded(tokens), expected)
    assert Llama.from_pretrained(tmp_path, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("tied", [False, True])
def test_random_weights(monkeypatch, tied):
    monkeypatch.setitem(llama.PRESETS, "tiny", replace(CONFIG, tie_word_embeddings=tied))
    model, again = (Llama.random("tiny", dtype=torch.float32) for _ in range(2))
    tokens = tokens_of(model, 1, 5)
    assert torch.equal(model(tokens), again(tokens))
    assert 0.5 < model.model.layers[0].mlp.down_proj.weight.std() * 56 ** 0.5 < 1.5
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config is not llama.PRESETS["tiny"]       # but the model's own
    assert Llama.random("tiny").dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------------
# model.py: text

TEXTS = ["def f(x):\n    return x + 1\n", "  spaces  and\ttabs\n\n\n", "\x00\x7f\r\n", "",
         "naïve café – 你好, мир! 🙂👩‍👩‍👧", "a" * 50 + "🙂" * 20, "<s> is text </s>"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_at_once_and_streamed(text):
    tokenizer = load_tokenizer(DEMO)
    ids = tokenizer.encode(text, bos=False)
    assert tokenizer.encode(text) == [1, *ids]
    assert not {1, 2} & set(ids)                           # written out, <s> is text
    assert tokenizer.decode([4096, *ids, 5000]) == text    # some ids only pad a vocabulary
    for prompt in ([], tokenizer.encode("x = ")):
        seen = [*prompt]
        parts = list(stream(ids, tokenizer.decode, seen))
        assert seen == [*prompt, *ids]
        assert len(parts) == len(ids)
        assert not any("\ufffd" in part for part in parts)
        assert "".join(parts) == text


def test_a_character_that_never_ends():
    tokenizer = load_tokenizer(DEMO)
    first, second, rest = stream(tokenizer.encode("🙂", bos=False)[:2], tokenizer.decode, [])
    assert first == second == ""
    assert "\ufffd" in rest


def test_the_tokens_that_end_a_text(tmp_path):
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    assert load_tokenizer(tmp_path).eos_ids == (2,)        # the tokenizer's own
    (tmp_path / "config.json").write_text('{"eos_token_id": 8}')
    assert load_tokenizer(tmp_path).eos_ids == (8,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load_tokenizer(tmp_path).eos_ids == (7, 9)


# --------------------------------------------------------------------------------------------------
# kernel.py

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 2**-45, torch.float32: 2**-20, torch.bfloat16: 2**-7,
            torch.float16: 2**-10}
BACKENDS = ["torch", pytest.param("c", marks=needs_c), pytest.param("triton", marks=needs_triton)]
ONES = torch.ones(8, 4)


@pytest.fixture(params=BACKENDS)
def gemv(request, monkeypatch):
    """sparse_gemv of one backend, on its device, of C on three threads; the result on the CPU."""
    monkeypatch.setattr(kernel, "THREADS", 3)

    def product(*inputs):
        device = DEVICE if request.param == "triton" else torch.device("cpu")
        return kernel.sparse_gemv(*(torch.as_tensor(each).to(device) for each in inputs),
                                  request.param).cpu()

    product.cases = 15 if request.param == "triton" and DEVICE.type == "cpu" else 240
    product.rounds_inputs = request.param == "triton"      # float32 ones, to the weight's 16 bits
    return product


def gemv_case(seed):
    """Return (x, weight_t, threshold): each pair of dtypes with 1 to 8 rows in turn.

    Some channels stand at the threshold. A weight that no row keeps is NaN: if read, it shows.
    """
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[torch.randint(len(choices), (), generator=generator)]

    dtype = DTYPES[seed % 3]
    channels = pick(0, 1, 7, 64, 129, 300)
    outputs = pick(0, 1, 2, 63, 128, 257, 600)
    x = torch.randn(1 + seed % 8, channels, generator=generator).to(pick(dtype, torch.float32))
    x[:, ::3] = x[:, ::3].sign() * pick(0.0, 0.5, 0.75)
    weight_t = torch.randn(channels, outputs, generator=generator).to(dtype)
    each, strided = torch.rand(2, channels, 2, generator=generator) * 1.5
    drop_all, keep_all = 1e9, -1.0
    threshold = pick(0.0, 0.5, torch.tensor(0.75), drop_all, keep_all, each[:, 0].clone(),
                     strided[:, 1])
    weight_t[~kernel.kept(x, torch.as_tensor(threshold)).any(0)] = math.nan
    return x, weight_t, threshold


def assert_right(y, x, weight_t, threshold, rounds_inputs=False):
    """Check y against float64; rounding is proportional to the sum of magnitudes."""
    kept = drop(x.double(), torch.as_tensor(threshold).double())
    weight_t = weight_t.nan_to_num()
    error = (y.double() - kept @ weight_t.double()).abs()
    magnitude = kept.abs() @ weight_t.double().abs()
    rounding = max(ROUNDING[dtype] for dtype in (x.dtype, weight_t.dtype)[:1 + rounds_inputs])
    assert y.dtype == x.dtype and (error <= rounding * magnitude + 1e-30).all()


def test_sparse_gemv_against_float64(gemv):
    """What is at the threshold is dropped, what no row keeps is unread, and bits repeat."""
    for seed in range(gemv.cases):
        case = gemv_case(seed)
        y = gemv(*case)
        assert_right(y, *case, gemv.rounds_inputs)
        assert torch.equal(y, gemv(*case))


def test_nan_is_kept_and_a_product_without_inputs_is_zero(gemv):
    x = torch.tensor([[math.nan, 1.0]])
    assert gemv(x, torch.ones(2, 16), 0.5).isnan().all()
    assert kernel.dense(x, torch.ones(2, 16)).isnan().all()
    assert kernel.kept(x, torch.tensor(2.0)).tolist() == [[True, False]]
    assert gemv(torch.zeros(2, 0), torch.zeros(0, 5), 0.1).tolist() == [[0.0] * 5] * 2
    assert gemv(torch.zeros(2, 5), torch.zeros(5, 0), 0.1).shape == (2, 0)


@pytest.mark.parametrize("x, weight_t, threshold, backend, message", [
    (torch.ones(9, 8), ONES, 0.0, None, r"x is torch.float32 \(9, 8\).*1 to 8"),
    (torch.ones(1, 8).long(), ONES.long(), 0.0, None, "x is torch.int64 .*floating point"),
    (torch.ones(1, 8), torch.ones(4, 8), 0.0, None, r"weight_t .*\(4, 8\)"),
    (torch.ones(1, 8), ONES.double(), 0.0, None, "weight_t .*torch.float64"),
    (torch.ones(1, 8).half(), ONES, 0.0, None, "weight_t .*torch.float32"),
    (torch.ones(1, 8).half(), ONES.bfloat16(), 0.0, None, "weight_t .*torch.bfloat16"),
    (torch.ones(1, 8), torch.ones(4, 8).T, 0.0, None, "contiguous"),
    (torch.ones(1, 8), ONES, torch.zeros(4), None, r"is \(4,\), expected a number or \(8,\)"),
    (torch.ones(1, 8), ONES, 0.0, "cublas", "backend is triton, c, torch.* or None, not 'cublas'"),
    (torch.ones(1, 8).double(), ONES.double(), 0.0, "c", 'backend "c" needs'),
    (torch.ones(1, 8).double(), ONES.double(), 0.0, "triton", 'backend "triton" needs'),
])
def test_sparse_gemv_refuses_what_does_not_fit(x, weight_t, threshold, backend, message):
    with pytest.raises(ValueError, match=message):
        kernel.sparse_gemv(x, weight_t, threshold, backend)


def test_backends_may_be_added_and_float64_stays_float64(monkeypatch):
    monkeypatch.setitem(kernel.BACKENDS, "mine", lambda x, weight_t, t: drop(x, t) @ weight_t)
    x = torch.randn(3, 50, dtype=torch.float64)
    weight_t = torch.randn(50, 20, dtype=torch.float64)
    for backend in (None, "mine"):
        y = kernel.sparse_gemv(x, weight_t, 0.5, backend)
        assert y.dtype == torch.float64
        assert distance(y, drop(x, 0.5) @ weight_t) < 1e-14


@pytest.mark.parametrize("compiler", [pytest.param(True, marks=needs_c), False])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_dense_of_any_length(monkeypatch, dtype, compiler):
    """In C, as where the processor cannot multiply: up to 48 rows; longer ones in PyTorch."""
    monkeypatch.setattr(kernel, "can_multiply", lambda dtype: False)
    if not compiler:
        monkeypatch.setattr(kernel, "fits_c", lambda weight_t: False)
    torch.manual_seed(0)
    weight_t = torch.randn(96, 40).to(dtype)
    with pytest.raises(RuntimeError, match="shape"):
        kernel.dense(torch.ones(1, 95, dtype=dtype), weight_t)
    for shape in ((96,), (1, 1, 96), (3, 96), (2, 4, 96), (11, 96), (2, 35, 96)):
        for dtype_of_x in {dtype, torch.promote_types(dtype, torch.float32)}:
            x = torch.randn(shape).to(dtype_of_x)
            y = kernel.dense(x, weight_t)
            assert y.dtype == x.dtype
            assert distance(y, x.double() @ weight_t.double()) < ROUNDING[dtype]


def test_time_shape_drops_what_it_says(monkeypatch, capsys):
    x = torch.tensor([[-3.0, 1.0, 2.0, -4.0]])
    for sparsity, count in ((0, 4), (0.5, 2), (1, 0)):
        assert kernel.kept(x, kernel.threshold_dropping(x, sparsity)).sum() == count
    ways = kernel.time_shape(512, 96, torch.bfloat16, torch.device("cpu"), [0, 0.5], 0, total=0)
    assert list(ways) == ["F.linear", "torch.mv", "x @ weight_t", "ours, 0%", "ours, 50%"]
    assert min(ways.values()) > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "512 x 96 bfloat16, 0 MB" and len(lines) == 8


# --------------------------------------------------------------------------------------------------
# sparsify.py

@pytest.mark.parametrize("dtype, tolerance, tied", [
    (torch.float64, 1e-12, False), (torch.float64, 1e-12, True), (torch.float32, 1e-4, False)])
def test_modes(dtype, tolerance, tied):
    model = tiny_model(dtype, tie_word_embeddings=tied)
    tokens = tokens_of(model, 2, 10)
    thresholds = THRESHOLDS | {"lm_head": 0.3}             # the paper leaves the head dense
    dense = model(tokens)
    dropped = by_hand(model, tokens, thresholds)
    prefixed = by_hand(model, tokens, thresholds, prefix=4)
    assert distance(dropped, dense) > 0.01
    names = [name for name, _ in model.named_parameters()]
    assert sparsify.sparsify(model, thresholds) is model
    assert [name.removesuffix("_t") for name, _ in model.named_parameters()] == names
    zeros = torch.zeros_like(model.sparse_state.thresholds)
    one_by_one = [1] * 10
    for pieces, mode, expected in [
        ([10], {}, dense),               # calls of several tokens are dense, of one sparse
        ([2] * 5, {}, dense),
        (one_by_one, {}, dropped),
        ([10], dict(where="all"), dropped),
        ([5, 3, 1, 1], dict(where="all"), dropped),
        ([10], dict(where="all", dense_prefix=4), prefixed),
        (one_by_one, dict(where="off"), dense),
        (one_by_one, dict(thresholds=dict.fromkeys(thresholds, 0.0)), dense),
        (one_by_one, dict(thresholds=zeros), dense),
    ]:
        with sparse_mode(model, **mode):
            assert distance(stepwise(model, tokens, pieces), expected) < tolerance
    # The tokens of a call decide for every linear, even for a head that reads one of them.
    assert distance(model(tokens, last_only=True), dense[:, -1:]) < tolerance
    with pytest.raises(KeyError), sparse_mode(model, "off", {NAMES[0]: 9.0}):
        raise KeyError
    assert distance(stepwise(model, tokens, one_by_one), dropped) < tolerance      # as it was


def test_linears_that_are_not_named_or_have_no_threshold(dense):
    tokens = tokens_of(dense, 1, 6)
    some = {name: 0.5 for name in NAMES if "q_proj" in name or "up_proj" in name}
    others = {name: 0.3 for name in NAMES if "q_proj" not in name}
    none = dict.fromkeys([*NAMES, "lm_head"])
    model = tiny_model()
    with sparse_mode(model, "all"):      # before it is sparse: no mode
        assert torch.equal(model(tokens), dense(tokens))
    for thresholds, in_force in [
        (some, some),                    # a linear not named is dense,
        (others, some | others),         # or as it was
        (none, {}),                      # None: dense, but transposed
        (others, others),
    ]:
        sparsify.sparsify(model, thresholds)
        with counted(model), sparse_mode(model, "all"):
            assert distance(model(tokens), by_hand(dense, tokens, in_force)) < 1e-12
        assert (realised_sparsity(model) == 0) == (thresholds is none)
        assert all(isinstance(model.get_submodule(name), SparseLinear) for name in thresholds)


def test_thresholds_that_do_not_fit_change_nothing():
    first, second, third = NAMES[:3]
    model = tiny_model()
    for thresholds, message in [
        ({"lm_tail": 0.1}, "lm_tail, which is not a linear"),
        ({"model.norm": 0.1}, "not a linear of this model"),
        ({first: torch.zeros(5)}, r"shape \(5,\), expected finite numbers, \(\) or \(32,\)"),
        ({first: 0.5, second: math.nan}, "expected finite numbers"),
    ]:
        with refused(match=message):
            sparsify.sparsify(model, thresholds)
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    sparsify.sparsify(model, {first: 0.1, second: None})
    for arguments, message in [
        (dict(where="never"), 'where is "decode", "all" or "off", not \'never\''),
        (dict(dense_prefix=-1), "dense_prefix is -1"),
        (dict(thresholds={third: 0.1}), "not a sparse linear|is dense"),
        (dict(thresholds={second: 0.1}), "is dense, or would become so"),
    ]:
        with refused(match=message), sparse_mode(model, **arguments):
            pass
    with refused(match="expected finite numbers"):
        sparsify.sparsify(model, {first: 0.9, second: math.inf})
    assert (model.sparse_state.thresholds == 0.1).all()


def test_realised_sparsity_counts_what_is_not_read(dense):
    name = "model.layers.1.mlp.down_proj"
    tokens = tokens_of(dense, 1, 8)
    block = sum(outputs * inputs for outputs, inputs in block_linears(CONFIG).values())
    dropped = (inputs_of(dense, name, tokens).abs() <= 0.3).double().mean().item()
    expected = dropped * 56 * 32 / (3 * block)
    model = sparse_model({name: 0.3, "lm_head": 0.3})      # the share is one of the blocks
    assert realised_sparsity(model) == 0
    # 8 rows are the kernel's work, 16 are not. A call of 8 tokens is dense in mode "decode".
    for where, batch, pieces, share in [("all", 1, [8], expected), ("decode", 1, [1] * 8, expected),
                                        ("all", 2, [8], expected), ("decode", 1, [8], 0)]:
        with counted(model), sparse_mode(model, where):
            stepwise(model, tokens.repeat(batch, 1), pieces)
        assert realised_sparsity(model) == pytest.approx(share)
    with counted(model):
        stepwise(model, tokens[:, :-1], [3, 1, 1, 1, 1])
    expected = realised_sparsity(model)  # of a text, its prompt of 3 tokens and four steps
    assert sparsify.skipped_share(model, tokens[0].tolist(), 3) == pytest.approx(expected)


def test_quality_and_perplexity(dense):
    tokens = tokens_of(dense, 40)
    windows = windows_of(tokens, 12)
    assert windows.shape == (3, 13)      # a fourth would need 49 tokens
    exact = dense(windows[:, :-1])
    model = sparse_model()
    ways = [functools.partial(sparse_mode, model, *mode)
            for mode in (("off",), ("all", dict.fromkeys(NAMES, 0.0)), ("all", None, 3))]
    logits = [exact, exact, by_hand(dense, windows[:, :-1], THRESHOLDS, prefix=3)]
    with ways[2](), counted(model):
        model(windows[:, :-1])
    realised = realised_sparsity(model)
    for scored in (4, 12):
        log_p = exact[:, -scored:].log_softmax(-1)
        rows = sparsify.quality(model, windows, ways, scored).tolist()
        for row, each in zip(rows, logits):
            log_q = each[:, -scored:].log_softmax(-1)
            ppl = F.nll_loss(log_q.mT, windows[:, -scored:]).exp().item()
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
            agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
            assert row[:3] == pytest.approx([ppl, kl, agreement], rel=1e-6, abs=1e-9)
        assert [rows[0][3], rows[2][3]] == pytest.approx([0, realised])
    assert perplexity(model, tokens, 12, dense_prefix=3) == pytest.approx(rows[2][0])
    assert realised_sparsity(model) == pytest.approx(realised)
    with sparse_mode(model, "off"):
        assert perplexity(model, tokens, 12) == pytest.approx(rows[0][0])
    assert perplexity(dense, tokens, 12) == pytest.approx(rows[0][0])
    for wrong, message in [(tokens[:12], "the text has 12 tokens, a window of 12 needs 13"),
                           (torch.tensor([99] * 13), "token id 99 is outside the vocabulary")]:
        with refused(match=message):
            perplexity(model, wrong, 12)


# --------------------------------------------------------------------------------------------------
# calibrate.py

@pytest.fixture(scope="module")
def calibrated():
    """(model, tokens, its calibration with both allocations): not to be changed."""
    model = tiny_model(torch.float32)
    tokens = tokens_of(model, 1500)
    calibration = calibrate.calibrate(model, tokens, 16, "a test")
    calibrate.add_greedy(calibration, model, tokens)
    return model, tokens, calibration


def test_quantiles_of_a_histogram():
    torch.manual_seed(0)
    x = torch.randn(40, 5000) * 3
    x[:, ::10] = 0
    counts = calibrate.histogram(x)
    assert counts.shape == (BINS,)
    assert counts.sum() == x.numel()
    shares = torch.tensor([0.2, 0.5, 0.9, 0.999])
    expected = x.abs().flatten().sort().values[(shares * x.numel()).long()].tolist()
    found = calibrate.quantile(counts.expand(4, BINS), shares).tolist()
    assert found == pytest.approx(expected, rel=0.022)
    assert calibrate.quantile(counts, 0) == 0
    assert calibrate.quantile(counts, 0.05) < 1e-5
    tiny = torch.randn(1000) * 1e-8      # below the scale: nothing but zeros is dropped
    assert calibrate.quantile(calibrate.histogram(tiny), 0.5) <= tiny.abs().median()


def test_the_first_tokens_of_a_window_are_left_out(calibrated):
    model, tokens, calibration = calibrated
    inputs = inputs_of(model, "model.layers.1.mlp.down_proj", windows_of(tokens, 16)[:, :-1])
    counts = calibrate.histogram(inputs[:, SINKS:])
    assert calibration.counts.shape == (3, 4, BINS)
    assert counts.sum() == calibration.counts[1, 3].sum()
    # A larger batch sums in another order: a few numbers fall into the next bin.
    assert (counts - calibration.counts[1, 3]).abs().sum() < 0.001 * counts.sum()


def test_every_allocation_reaches_its_target(calibrated):
    _, tokens, calibration = calibrated
    assert calibration.allocations == ["greedy", "uniform"]
    sizes = calibration.weight_shares()
    for allocation in calibration.allocations:
        for sparsity in (0.0, 0.25, 0.5, 0.8, 0.95):
            shares = calibration.shares(sparsity, allocation)
            assert (shares @ sizes).mean().item() == pytest.approx(sparsity, abs=1e-6)
            model = sparse_model(calibration.thresholds(sparsity, allocation), torch.float32)
            perplexity(model, tokens, 16, dense_prefix=SINKS)
            # Not exact: with inputs dropped before them, the inputs of later layers are others.
            assert realised_sparsity(model) == pytest.approx(sparsity, abs=0.04)


def test_shares_between_the_levels_of_a_table():
    first, second = torch.rand(2, 2, 7) * 0.5
    calibration = Calibration(CONFIG, "", None, {
        "uniform": (torch.zeros(0), torch.zeros(0, 2, 7)),
        "own": (torch.tensor([0.25, 0.5]), torch.stack((first, second)))})
    assert (calibration.shares(0.3, "uniform") == 0.3).all()
    for sparsity, expected in [
        (0.0, torch.zeros(2, 7)), (0.125, first / 2), (0.25, first), (0.375, (first + second) / 2),
        (0.5, second), (0.75, (second + 1) / 2), (1 - 1e-12, torch.ones(2, 7)),
    ]:
        assert torch.allclose(calibration.shares(sparsity), expected.double(), atol=1e-7)


def test_the_greedy_path_is_monotone_and_each_step_is_the_best(calibrated):
    model, tokens, calibration = calibrated
    sizes = calibration.weight_shares()
    levels, shares = calibration.tables["greedy"]
    assert levels.tolist() == pytest.approx([i / 100 for i in range(1, 91)])
    path = torch.cat((torch.zeros(1, 7), shares[:, 0])).double()           # of the first block
    steps = path.diff(dim=0)
    assert ((steps > 1e-6).sum(1) == 1).all() and (steps > -1e-6).all() and (path < 1).all()
    assert (steps @ sizes).tolist() == pytest.approx([0.01] * 90, abs=1e-6)
    windows = calibrate.some_windows(model, tokens, *calibrate.GREEDY)
    block, x, context = model.model.layers[0], model.embed(windows), model.context(windows)
    exact = block(x, context)[:, 16:]

    def error_of(shares):
        with contextlib.ExitStack() as hooks:
            for linear, share in zip(LINEARS, shares):
                counts = calibration.counts[0, calibrate.SITE_OF[linear]]
                threshold = calibrate.quantile(counts, share).item()
                hooks.enter_context(block.get_submodule(linear).register_forward_pre_hook(
                    lambda _, inputs, threshold=threshold: drop(inputs[0], threshold)))
            return (block(x, context)[:, 16:] - exact).norm().item()

    for step in range(0, 60, 6):         # tried by hand, all seven
        errors = [error_of(shares) for shares in path[step] + torch.diag(0.01 / sizes)]
        taken = errors[steps[step].argmax()]
        assert taken < 1.02 * min(errors)
        assert taken <= sorted(errors)[3]


def test_calibration_file(calibrated, tmp_path):
    model, _, calibration = calibrated
    path = tmp_path / "x"
    calibration.save(path)
    loaded = Calibration.load(path)
    assert loaded.source == "1,488 tokens of a test"
    for allocation in (None, "greedy", "uniform"):
        expected = calibration.thresholds(0.4, allocation)
        assert list(expected) == NAMES
        assert loaded.thresholds(0.4, allocation) == expected
    for same in (model, tiny_model(torch.bfloat16), sparse_model()):
        assert calibrate.load_calibration(same, "x", path).counts.equal(calibration.counts)
    with refused(match="x was made for another model: intermediate_size is 56 in it, 60 in the"):
        calibrate.load_calibration(tiny_model(intermediate_size=60), "x", path)
    half = torch.rand(1, 3, 7)
    loaded.tables["half"] = torch.tensor([0.5]), half                # as a chapter adds one
    loaded.save(path)
    loaded = Calibration.load(path)
    assert loaded.allocations == ["half", "greedy", "uniform"]
    expected = calibrate.quantile(loaded.counts[2, 3], 0.6 * half[0, 2, 6].double())
    assert loaded.thresholds(0.3)["model.layers.2.mlp.down_proj"] == expected.float()
    del loaded.tables["greedy"]
    write_safetensors(path, {"x": torch.zeros(1)})
    broken = tiny_model(torch.float32)
    broken.model.layers[1].input_layernorm.weight[3] = math.nan
    tokens = tokens_of(model, 100)
    for call, message in [
        *((lambda s=s: loaded.thresholds(s), "expected at least 0 and below 1")
          for s in (-0.1, 1.0, math.nan)),
        (lambda: loaded.thresholds(0.5, "greedy"),
         "'greedy' is not in .* greedy is made by python calibrate.py --greedy"),
        (lambda: Calibration.load(path), "not a calibration of this version.*: format is None"),
        (lambda: calibrate.calibrate(sparse_model(), tokens), "this one was made sparse"),
        (lambda: calibrate.calibrate(broken, tokens), "the activations hold NaN or infinity"),
        (lambda: calibrate.calibrate(model, tokens, 4), "4 tokens leaves none after the first 4"),
        (lambda: calibrate.calibrate(model, tokens + 50), "token id .* is outside"),
    ]:
        with refused(match=message):
            call()


# --------------------------------------------------------------------------------------------------
# generate.py: one token after another

def by_prefill(model, prompt, count):
    """Return greedy tokens, each from a pass over all that is before it."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt):]


def test_greedy_is_the_argmax_of_the_whole_sequence():
    model = tiny_model()
    prompt = tokens_of(model, 5).tolist()
    text = greedy(model, prompt, 20)
    assert text == by_prefill(model, prompt, 20)
    assert len(set(text)) > 3
    for small in (1e-320, 1e-50, 1e-39):                   # too small to divide by
        assert greedy(model, prompt, 20, temperature=small) == text
    assert greedy(model, prompt, 20, eos_ids=text[7:8]) == text[:text.index(text[7])]
    model.config.max_position_embeddings = 10              # the text ends with the context
    assert greedy(model, prompt, 100) == text[:5]
    model = sparse_model()               # sparse after the prompt
    text = greedy(model, prompt, 12)
    assert text != by_prefill(model, prompt, 12)
    with sparse_mode(model, "all", dense_prefix=5):
        assert text == by_prefill(model, prompt, 12)


def soft(self, x):
    """Another rule: what stays shrinks by its threshold."""
    return (x.sign() * (x.abs() - self.threshold).clamp(min=0)) @ self.weight_t


@pytest.mark.parametrize("owner, name, change", [
    (llama.MLP, "gated", lambda self, x: F.gelu(self.gate_proj(x)) * self.up_proj(x)),
    (llama, "rotate", lambda x, cos, sin: x),
    (llama.RMSNorm, "forward", lambda self, x: x * self.weight),
    (SparseLinear, "product", soft),
])
def test_what_you_read_is_what_runs(monkeypatch, owner, name, change):
    """A change to the model shows in its text."""
    before = greedy(sparse_model(0.3), [1], 6)
    monkeypatch.setattr(owner, name, change)
    model = sparse_model(0.3)
    text = greedy(model, [1], 6)
    assert text != before
    with sparse_mode(model, "all"):
        assert text == by_prefill(model, [1], 6)


@pytest.mark.parametrize("prompt, options, message", [
    ([], {}, "the prompt is empty"),
    ([1] * 64, {}, "the prompt has 64 tokens, the model's context holds 64"),
    ([99], {}, "token id 99 is outside the vocabulary of 61"),
    ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ([1], {"temperature": -1.0}, "temperature is -1.0"),
    ([1], {"temperature": math.nan}, "temperature is nan"),
    ([1], {"top_k": 0}, "top_k is 0"),
    ([1], {"top_p": 0.0}, "top_p is 0.0"),
    ([1], {"seed": -1}, "seed is -1"),
    ([1], {"seed": 10**30}, "seed is 1000"),
    ([1], {"draft": "sparse"}, 'draft "sparse" needs a model made sparse'),
    ([1], {"draft": "other"}, "draft is"),
    ([1], {"draft": tiny_model(vocab_size=12)}, "the draft model has 12 tokens, .* model has 61"),
    ([1], {"draft_tokens": 0}, "draft_tokens is 0"),
])
def test_what_cannot_be_generated_is_refused_at_once(dense, prompt, options, message):
    plain = () if {"draft", "draft_tokens"} & options.keys() else (generate.generate,)
    for function in (*plain, generate_speculative):
        with refused(match=message):
            function(dense, prompt, **{"max_new_tokens": 3, **options})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_end_a_text(value, temperature):
    healthy, poisoned = (tiny_model(vocab_size=62) for _ in range(2))
    poisoned.model.embed_tokens.weight[61] = value

    def late(model, cache, tokens=1):
        """Return a step that is poisoned at position 6."""
        def step(tokens):
            start = cache.used
            logits = model(tokens, cache)
            logits[:, torch.arange(start, cache.used) == 6] = value
            return logits
        return step

    settings = {"temperature": temperature, "seed": 3}
    speculate = functools.partial(generate_speculative, draft=poisoned)
    for function in (generate.generate, speculate):
        with refused(match="position 2 of the text are NaN or infinite"):
            next(function(poisoned, [1, 3, 61], 9, **settings))
        text = []
        with refused(match="position 6 of the text are NaN or .*bfloat16 or float32"):
            text.extend(function(healthy, [1, 2, 3], 9, make_step=late, **settings))
        assert len(text) == 4 or function is speculate     # positions 3 to 6


@pytest.mark.parametrize("temperature, top_k, top_p, expected", [
    (1.0, None, None, [0.5, 0.25, 0.15, 0.1]),
    (0.5, None, None, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
    (1.0, 2, None, [2 / 3, 1 / 3, 0.0, 0.0]),
    (1.0, None, 0.7, [2 / 3, 1 / 3, 0.0, 0.0]),
    (1.0, None, 1e-46, [1.0, 0.0, 0.0, 0.0]),
    (1.0, 9, 1.0, [0.5, 0.25, 0.15, 0.1]),
    (1.0, None, 0.75, [2 / 3, 1 / 3, 0.0, 0.0]),
    (1.0, 3, 0.6, [2 / 3, 1 / 3, 0.0, 0.0]),
    (2**-126, None, None, [1.0, 0.0, 0.0, 0.0]),
])
def test_probabilities(temperature, top_k, top_p, expected):
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    p = Sampling(temperature, top_k, top_p).probabilities(logits)
    assert torch.allclose(p, torch.tensor(expected))


def test_probabilities_of_ties_and_of_many_tokens():
    assert (Sampling(1.0, top_k=1).probabilities(torch.ones(4)) > 0).sum() == 1    # not widened
    p = Sampling(1.0, top_p=0.9).probabilities(torch.zeros(2, 3000))       # more than are looked at
    assert ((p > 0).sum(1) == 2700).all()
    logits = torch.randn(1, 50_000)                        # running sums in float32 would lose some
    p = Sampling(1.0).probabilities(logits)
    assert torch.equal(Sampling(1.0, top_p=1.0).probabilities(logits), p)
    lost = p[Sampling(1.0, top_p=1 - 1e-6).probabilities(logits) == 0].sum(dtype=torch.float64)
    assert 0 < lost <= 1e-6


def p_value(counts, expected, totals=1):
    """Return the p-value of Pearson's chi-square test of counts.

    Cells that are expected under 5 are pooled. totals: how many sums of counts are given.
    """
    assert counts[expected == 0].sum() == 0
    large = expected >= 5
    counts = torch.cat((counts[large], counts[~large].sum()[None])).double()
    expected = torch.cat((expected[large], expected[~large].sum()[None])).double()
    statistic = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    freedom = (expected > 0).sum() - totals
    assert freedom >= 8
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


def test_sampling_repeats_with_a_seed_and_follows_the_distribution(dense):
    seeds = {generate.random_source(dense, None).initial_seed() for _ in range(64)}
    assert len(seeds) == 64              # and what is drawn can be given:
    assert all(generate.random_source(dense, seed).initial_seed() == seed for seed in seeds)
    texts = [greedy(dense, [1, 2], 8, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    logits = dense(torch.tensor([[1, 2]]))[0, -1:]
    sampling = Sampling(0.7, top_k=12)
    source = generate.random_source(dense, 5)
    token, = greedy(dense, [1, 2], 1, temperature=0.7, top_k=12, seed=5)
    assert token == sampling.choose(logits, source)[0]
    tokens, p = sampling.choose(logits.expand(20_000, -1), source)
    counts = tokens.flatten().bincount(minlength=61)
    assert p_value(counts, 20_000 * p[0]) > 0.001
    assert p_value(counts, 20_000 * Sampling(0.8, top_k=12).probabilities(logits)[0]) < 1e-6


# --------------------------------------------------------------------------------------------------
# generate.py: steps

def test_every_step_is_one_of_make_step(dense):
    passes, steps = [], []               # (model, tokens) of all passes, and of those by a step

    def make_step(model, cache, tokens=1):
        def step(tokens):
            steps.append((model, tokens.shape[1]))
            return model(tokens, cache)
        return step

    draft = tiny_model(seed=1)
    with contextlib.ExitStack() as hooks:
        for each in (dense, draft):
            hooks.enter_context(each.register_forward_pre_hook(
                lambda model, inputs: passes.append((model, inputs[0].shape[1]))))
        text = greedy(dense, [1, 2, 3, 4, 5], 8, make_step=make_step)
        assert steps == [(dense, 1)] * 7
        assert passes == [(dense, 5), *steps]
        passes.clear()
        steps.clear()
        assert text == list(generate_speculative(dense, [1, 2, 3, 4, 5], 8, draft, None, 2,
                                                 make_step=make_step))
        assert passes == [(dense, 5), (draft, 6), *steps]


# --------------------------------------------------------------------------------------------------
# generate.py: speculation

def known(text):
    """Return a draft object that knows a text, but is wrong at every third place."""
    def guess(ids, n):
        places = range(len(ids), min(len(ids) + n, len(text)))
        return [text[place] ^ (place % 3 == 0) for place in places], None
    return SimpleNamespace(guess=guess)


def drawn(vocabulary):
    """Return a draft object that draws its guesses from one distribution, whatever was written."""
    generator = torch.Generator().manual_seed(0)

    def guess(ids, n):
        q = (torch.arange(vocabulary) / 2).softmax(0).expand(n, -1)
        return generate.draw(q, generator).flatten().tolist(), q
    return SimpleNamespace(guess=guess)


KINDS = ["sparse", "model", "object"]


def draft_of(kind, model, text, error=0.3):
    """Return (draft, draft_thresholds) for generate_speculative; sparse: make the model sparse.

    error: how much a draft differs from the model. "short": its context ends before the text does;
    "wrong": it guesses the model's least likely token.
    """
    if kind == "sparse":
        names = linear_names(model.config)
        sparsify.sparsify(model, dict.fromkeys(names, 0.0))
        return "sparse", dict.fromkeys(names, error)
    if kind == "object":
        return known(text), None
    if kind == "drawn":
        return drawn(model.config.vocab_size), None
    torch.manual_seed(5)
    draft = copy.deepcopy(model)
    for parameter in draft.parameters():
        parameter += (kind == "model") * error / 3 * parameter.std() * torch.randn(parameter.shape)
    if kind == "wrong":
        draft.lm_head.weight.neg_()
    if kind == "short":
        draft.config.max_position_embeddings = 12
    return draft, None


def case(kind, length=5, error=0.3, **changes):
    """Return (model, prompt, its greedy text, a function(n=3, limit=24) that speculates)."""
    model = tiny_model(**{"vocab_size": 14, **changes})
    prompt = tokens_of(model, length, seed=length).tolist()
    plain = greedy(model, prompt, 24)
    draft, thresholds = draft_of(kind, model, prompt + plain, error)

    def speculate(n=3, limit=24, **options):
        return generate_speculative(model, prompt, limit, draft, thresholds, n, **options)
    return model, prompt, plain, speculate


@pytest.mark.parametrize("kind", [*KINDS, "drawn", "wrong", "short"])
def test_speculative_greedy_is_plain_greedy(kind):
    passes = tokens = 0
    for length, n in [(1, 1), (1, 7), (9, 3), (9, 12), (30, 1), (30, None)]:
        _, _, plain, speculate = case(kind, length, max_position_embeddings=48)
        run = speculate(n)               # of 30 tokens: the context ends before the text
        assert list(run) == plain
        assert run.against == "the dense model"
        assert run.statistics.passes <= run.statistics.tokens == len(plain) - 1    # the prompt's
        passes += run.statistics.passes
        tokens += run.statistics.tokens
    assert passes == tokens or kind != "wrong"             # none of its guesses was right
    assert passes < 0.8 * tokens or kind not in KINDS
    for window, n in [(2, 1), (5, 4), (12, 7)]:
        _, _, plain, speculate = case(kind, 9, model_type="mistral", sliding_window=window)
        assert list(speculate(n)) == plain


@pytest.mark.parametrize("kind", KINDS)
def test_speculation_stops_inside_an_accepted_run(kind):
    _, _, plain, speculate = case(kind, error=0.0)
    for eos in set(plain):
        assert list(speculate(7, eos_ids=(eos,))) == plain[:plain.index(eos)]
    for limit in range(1, 12):
        assert list(speculate(7, limit)) == plain[:limit]


def test_an_abandoned_or_interleaved_speculation_leaves_no_trace():
    model = sparse_model(0.2, vocab_size=13)
    before = model.sparse_state.thresholds.clone()
    prompts = [tokens_of(model, 5, seed=seed).tolist() for seed in range(2)]
    with sparse_mode(model, "off"):
        plain = [greedy(model, prompt, 15) for prompt in prompts]
    runs = [generate_speculative(model, prompt, 20, "sparse", dict.fromkeys(NAMES, 0.5))
            for prompt in prompts]
    texts = [], []
    for _ in range(15):
        for run, text in zip(runs, texts):
            text.append(next(run))
            assert model.sparse_state.mode == "decode"
            assert torch.equal(model.sparse_state.thresholds, before)
    assert list(texts) == plain


SAMPLING = dict(temperature=0.9, top_k=4, top_p=0.97)


def p_value_of_drafts(kind, length=800):
    """Return how probable it is that a text sampled with drafts follows the model's distribution.

    The model sees one token at a time. So each token is drawn given the one before it, and one long
    text holds many draws from each of a few distributions.
    """
    shape = dict(vocab_size=5, num_hidden_layers=1, sliding_window=1, max_position_embeddings=1000)
    model = tiny_model(torch.float32, seed=3, **shape)
    p = Sampling(**SAMPLING).probabilities(model(torch.arange(5)[:, None])[:, 0])          # (5, 5)
    draft, thresholds = draft_of(kind, model, length * [1, 3], error=1.0)
    run = generate_speculative(model, [0], length, draft, thresholds, 3, seed=1, **SAMPLING)
    text = torch.tensor(list(run))
    did = run.statistics
    assert 1.1 < did.tokens / did.passes < 3.9             # p and q differ, and meet
    counts = torch.zeros(5, 5).index_put_((text[:-1], text[1:]), torch.ones(()), accumulate=True)
    expected = counts.sum(1, keepdim=True) * p
    return p_value(counts.flatten(), expected.flatten(), totals=5)


@pytest.mark.parametrize("kind", [*KINDS, "drawn"])
def test_speculative_sampling_has_the_models_distribution(kind):
    assert p_value_of_drafts(kind) > 1e-3


@pytest.mark.parametrize("kind", ["sparse", "model", "drawn"])
def test_a_wrong_acceptance_rule_is_found_out(monkeypatch, kind):
    def from_guess(p, q, guess, generator):
        if torch.rand((), generator=generator) < p[guess]:                 # should be p / q
            return guess
        return generate.draw((p - q).clamp(min=1e-9)[None], generator).item()
    monkeypatch.setattr(generate, "from_guess", from_guess)
    assert p_value_of_drafts(kind) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_speculation_repeats_with_a_seed(kind):
    model, prompt, _, speculate = case(kind)
    texts = [list(speculate(temperature=1.0, seed=seed)) for seed in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]
    if kind == "object":                 # one draw a token, as without it: the text is even plain's
        assert texts[1] == greedy(model, prompt, 24, temperature=1.0, seed=1)


# --------------------------------------------------------------------------------------------------
# demo/

def test_corpus_parts_do_not_meet():
    train, held_out = (dict(corpus.files(part)) for part in ("train", "held-out"))
    assert train and held_out and not train.keys() & held_out.keys()
    assert not any({"test", "tests", "site-packages"} & set(path.split("/")) for path in held_out)
    assert corpus.is_held_out("asyncio/locks.py")
    assert not corpus.is_held_out("test/test_ast.py")


def test_the_demo_tokenizer_gives_every_source_back():
    tokenizer = load_tokenizer(DEMO)
    texts = [text for _, text in corpus.files("held-out") if "\u2581" not in text]        # a space
    ids = [tokenizer.encode(text, bos=False) for text in texts]
    assert [tokenizer.decode(each) for each in ids] == texts
    assert sum(map(len, texts)) > 2.5 * sum(map(len, ids))
    newline, = tokenizer.encode("\n", bos=False)
    assert tokenizer.encode("a\n\nb", bos=False).count(newline) == 2


def test_the_demo_model_is_small_and_knows_python():
    assert sum(file.stat().st_size for file in DEMO.iterdir() if file.is_file()) < 16e6
    model, tokenizer = llama.load_model(DEMO, DEVICE)
    calibration = calibrate.load_calibration(model, DEMO)
    assert {"greedy", "uniform"} <= set(calibration.allocations)
    tokens, source = llama.read_tokens(tokenizer, None, "held-out")
    assert source.startswith("held-out part of the standard library of Python")
    dense = perplexity(model, tokens[:4000])
    sparsify.sparsify(model, calibration.thresholds(0.5))
    assert dense < 20
    assert dense < perplexity(model, tokens[:4000]) < 1.2 * dense
    assert realised_sparsity(model) == pytest.approx(0.5, abs=0.04)


# --------------------------------------------------------------------------------------------------
# The commands

def test_the_demo_runs(run, monkeypatch):
    monkeypatch.setattr(kernel, "median_time", lambda call, *_, **more: call(0) is None or 1e-3)
    out = run("generate.py", "--max-new-tokens", 16)
    for line in ("--- dense: 16 tokens", "--- 50% sparse: 16 tokens", r"sparse over dense: \d.*x",
                 r"(4\d|5\d)\.\d% of the blocks' weights skipped: 7.\d MB read a token, of 13.1",
                 "4096 x 11008 bfloat16", r"try next: .*random:llama-3.2-1b(?!.*beyond)"):
        assert re.search(line, out)
    assert out.count("class Stack:") == 2


@pytest.mark.parametrize("draft", ["sparse", "demo"])
def test_the_demo_speculates(run, draft):
    out = run("generate.py", "--draft", draft, "--compare", "--dtype", "float32",
              "--max-new-tokens", 24)
    assert re.search("the same text for (24 of 24 tokens$|.* of 24 tokens, which rounding)", out,
                     re.MULTILINE)
    assert "lossless against the dense model: " in out
    assert re.search(r"in turn, the best of three: plain .*\nspeculative over plain: \d.*x", out)


def test_a_checkpoint_from_calibration_to_text(run, tmp_path):
    tiny_model(torch.float32, vocab_size=4096).save_pretrained(tmp_path)
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("import os\nfor i in range(10):\n    print(i, os)\n" * 40)
    err = run("generate.py", "--model", tmp_path, fails=True)
    assert f"make one with: python calibrate.py --model {tmp_path}" in err
    out = run("calibrate.py", "--model", tmp_path, "--text", text, "--greedy")
    assert "text.txt; allocations: greedy, uniform" in out
    out = run("sparsify.py", "--model", tmp_path, "--text", text, "--tokens", 400,
              "--sparsity", 0.25, 0.5)
    rows = [" ".join(line.split()[:2]) for line in out.splitlines()[2:]]
    assert rows == ["dense 0%", "uniform 25%", "uniform 50%", "greedy 25%", "greedy 50%"]
    out = run("generate.py", "--model", tmp_path, "--sparsity", 0.4, "--seed", 1,
              "--allocation", "uniform", "--temperature", 1, "--max-new-tokens", 4)
    assert "40% sparse: 4 tokens" in out
    assert 30 < float(re.search(r"([\d.]+)% of the blocks' weights skipped", out)[1]) < 50
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(tokenizer.read_bytes().replace(b"self", b"fles", 1))
    err = run("generate.py", "--draft", tmp_path, fails=True)
    assert f"--draft {tmp_path}: its tokenizer is not the model's" in err


def test_random_weights_are_calibrated_as_they_are(run, monkeypatch):
    small = replace(CONFIG, max_position_embeddings=256)
    monkeypatch.setitem(llama.PRESETS, "small", small)
    out = run("generate.py", "--model", "random:small", "--max-new-tokens", 8)
    assert "random weights, for speed alone" in out
    assert "50% sparse: 8 tokens" in out
    err = run("generate.py", "--model", "random:small", "--prompt", "x", fails=True)
    assert "random weights and no tokenizer" in err


@pytest.mark.parametrize("folder, parameters", [           # and the published numbers
    (DEMO, "6,557,440"), ("random:llama-2-7b", "6,738,415,616"), (RANDOM, "1,235,814,400")])
def test_model_prints_the_shape_of_a_checkpoint(run, folder, parameters):
    out = run("model.py", folder)
    assert parameters in out
    assert "sparsity can skip from attention and MLP" in out


@pytest.mark.parametrize("file", [*(f"{name}.py" for name in CORE), "demo/train.py"])
def test_help_says_every_default(run, file):
    usage, options = run(file, "--help").split("options:")
    assert "usage:" in usage
    options = re.split(r"\n  (?=-)", options)[2:]          # after --help
    assert [option for option in options if "default" not in option] == []


@pytest.mark.parametrize("command, message", [
    (["model.py", "nowhere"], "config.json: cannot be read: No such file or directory"),
    (["kernel.py", "--device", "warp"], "device warp cannot be used"),
    (["sparsify.py", "--calibration", "nowhere"], "nowhere: no calibration"),
    (["sparsify.py", "--model", RANDOM], "random weights"),
    (["sparsify.py", "--text", "nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
    (["sparsify.py", "--tokens", "100"], "the text has 100 tokens, a window of 512 needs 513"),
    (["sparsify.py", "--sparsity", "1.5"], "--sparsity: 1.5, expected at least 0 and below 1"),
    (["sparsify.py", "--context", "4000"], "does not fit the model's context of 512"),
    (["calibrate.py", "--model", RANDOM], "random weights"),
    (["calibrate.py", "--text", DEMO / "model.safetensors"], "not UTF-8 text"),
    (["calibrate.py", "--out", "nowhere/x"], "nowhere/x: cannot be written there; see --out"),
    (["--model", "nowhere"], "nowhere: no such folder"),
    (["--model", HERE], "no tokenizer: neither tokenizer.json nor a tokenizer.model"),
    (["--model", "random:gpt"], "preset 'gpt' is not known"),
    (["--model", RANDOM, "--draft", "sparse"], "python -m beyond.lab.costs shows"),
    (["--device", "meta"], "device meta cannot be used"),
    (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    (["--prompt", "\udcff"], "surrogates not allowed"),
    (["--prompt", "x " * 2000], "the model's context holds 512"),
    (["--max-new-tokens", "-3"], "-3 is not a whole number above 0"),
    (["--seed", "9" * 30], "seed is 999"),
    (["--sparsity", "half"], "--sparsity: invalid share value: 'half'"),
    (["--allocation", "other"], "allocation 'other' is not in this calibration"),
    (["--calibration", DEMO / "config.json"], "config.json: "),
    (["--top-p", "2"], "top_p is 2.0"),
    (["--draft", "nowhere"], "nowhere: no such folder"),
    (["--draft", "sparse", "--sparsity", "0.5"], "a sparse verifier, is for python -m beyond"),
    (["--draft", "demo", "--draft-sparsity", "0.5"], "is for --draft sparse"),
    (["--draft-tokens", "3"], "--compare and --draft-tokens are for --draft"),
    (["--compare"], "--compare and --draft-tokens are for --draft"),
    (["--unheard-of"], "unrecognized arguments: --unheard-of"),
    (["demo/train.py", "--tokens", "5"], "expected at least the 4096 of a step"),
])
def test_bad_input_on_the_command_line(run, command, message):
    if command[0].startswith("--"):
        command = ["generate.py", *command]
    err = run(*command, fails=True)
    assert message in err
    assert err.startswith(f"{Path(command[0]).name}: error: ")
    assert len(err.splitlines()) == 1


def test_ctrl_c_keeps_what_was_written(capsys):
    def interrupted():
        yield from (70, 71, 72)
        raise KeyboardInterrupt

    writer = SimpleNamespace(tokenizer=None)
    with pytest.raises(SystemExit, match="130"):
        llama.command_line(lambda: generate.Writer.show(writer, "dense", [1], interrupted()))
    written, said = capsys.readouterr()
    assert written.startswith("--- dense\n 1 70 71 72\n--- dense: 3 tokens, ")
    assert said.endswith(": interrupted\n")


def test_the_lines_of_the_readme_print_what_stands_below_them(monkeypatch):
    monkeypatch.chdir(HERE)
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    runner = doctest.DocTestRunner()
    runner.run(doctest.DocTestParser().get_doctest(lines, {}, "README.md", None, None))
    assert runner.failures == 0 and runner.tries > 15


# --------------------------------------------------------------------------------------------------
# The rules of the house

@pytest.mark.parametrize("name", [*CORE, "test_all", "demo/corpus", "demo/train"])
def test_imports_run_one_way_and_lines_are_short(name):
    source = (HERE / f"{name}.py").read_text(encoding="utf-8")
    imported = source.partition("\nif __name__ ==")[0]     # below it are those of a command
    later = CORE[CORE.index(name):] if name in CORE else []
    assert not {"beyond", *later} & set(re.findall(r"^ *(?:import|from) (\w+)", imported, re.M))
    assert [i for i, line in enumerate(source.splitlines(), 1) if len(line) > 100] == []


def test_the_activation_is_named_once():
    sources = [(HERE / f"{name}.py").read_text(encoding="utf-8") for name in CORE]
    assert sum(source.count("F.silu") for source in sources) == 1
