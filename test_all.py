"""What must stay true of the core, file by file: a specification to read.

    pytest test_all.py        a minute on two cores

Without a GPU the Triton kernels run in Triton's interpreter. What is compared with transformers is
skipped where it is not installed. The chapters of beyond/ have tests of their own.
"""
import ast
import ctypes
import functools
import json
import math
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

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
from calibrate import BINS, LINEARS, SINKS, Calibration, Table
from demo import corpus
from generate import ModelDraft, Sampling, StaticCache, Statistics, StreamDecoder
from model import (Config, InputError, KVCache, Llama, block_linears, linear_names, load_tokenizer,
                   read_header, read_safetensors, windows_of, write_safetensors)
from sparsify import SparseLinear, perplexity, realised_sparsity, reset_counts, sparse_mode

HERE = Path(__file__).parent
DEMO = HERE / "demo"
CORE = ["model", "kernel", "sparsify", "calibrate", "generate"]        # each imports earlier ones
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

needs_c = pytest.mark.skipif(not kernel.fits_c(torch.zeros(1)), reason="no C compiler")
needs_triton = pytest.mark.skipif(kernel.triton is None, reason="no Triton")
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
refused = functools.partial(pytest.raises, InputError)     # refused(match="what it says")

torch.set_num_threads(1)                                   # models here are too small for more


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def tiny_config(**changes):
    shape = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=12, vocab_size=61, max_position_embeddings=64)
    return Config(**{**shape, **changes})


def tiny_model(dtype=torch.float64, seed=0, **changes):
    """Return a Llama with weights so large that its next tokens differ and activations matter."""
    torch.manual_seed(seed)
    model = Llama(tiny_config(**changes)).requires_grad_(False)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape)
        matrix = parameter.ndim == 2
        parameter.copy_(noise * 1.5 * parameter.shape[1] ** -0.5 if matrix else 1 + 0.2 * noise)
    return model.to(dtype).eval()


def tokens_of(model, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)


def names_of(model):
    return linear_names(model.config)


def some_thresholds(model):
    """Return a threshold for each linear: numbers, tensors (), and one a channel."""
    generator = torch.Generator().manual_seed(3)
    thresholds = {}
    for i, name in enumerate(names_of(model)):
        each = torch.rand(model.get_submodule(name).in_features, generator=generator)
        thresholds[name] = [0.4, torch.tensor(0.2), each][i % 3]
    return thresholds


def sparse_model(thresholds=None, dtype=torch.float64, **changes):
    """Return a tiny model made sparse; thresholds: a dict, a number for all linears, or None."""
    model = tiny_model(dtype, **changes)
    if thresholds is None:
        thresholds = some_thresholds(model)
    elif not isinstance(thresholds, dict):
        thresholds = dict.fromkeys(names_of(model), thresholds)
    return sparsify.sparsify(model, thresholds)


def drop(x, threshold):
    """The rule, written out once more."""
    return torch.where(x.abs() > threshold, x, 0)


def by_hand(model, tokens, thresholds, prefix=0):
    """Return the logits of a dense model whose linears see what is kept of their inputs."""
    hooks = []
    for name, threshold in thresholds.items():
        def keep(module, inputs, threshold=threshold):
            x, = inputs
            return torch.cat((x[:, :prefix], drop(x[:, prefix:], threshold)), 1)
        hooks.append(model.get_submodule(name).register_forward_pre_hook(keep))
    logits = model(tokens)
    for hook in hooks:
        hook.remove()
    return logits


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
    """Return a function(file, *options) that runs a file of ours as a script, in this process.

    It returns (exit status, standard output, standard error).
    """
    def run_file(file, *options):
        monkeypatch.setattr(sys, "argv", [file, *map(str, options)])
        status = 0
        try:
            with torch.enable_grad():
                runpy.run_path(str(HERE / file), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()
    return run_file


@pytest.fixture(scope="module")
def calibrated():
    """(model, tokens, its calibration with both allocations): not to be changed."""
    model = tiny_model(torch.float32)
    tokens = tokens_of(model, 1500)
    calibration = calibrate.calibrate(model, tokens, 16, "a test")
    calibrate.add_greedy(calibration, model, tokens)
    return model, tokens, calibration


# --------------------------------------------------------------------------------------------------
# model.py: safetensors

def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in llama.DTYPE_NAMES}
    tensors["empty"] = torch.zeros(0, 4)
    tensors["scalar"] = torch.tensor(7.0)
    tensors["transposed"] = torch.randn(4, 3).t()
    write_safetensors(path, tensors, {"written by": "a test"})
    assert read_header(path)[1] == {"written by": "a test"}
    read = read_safetensors(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    before = path.read_bytes()
    read["transposed"].zero_()           # what is mapped is a private copy
    assert path.read_bytes() == before


X = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
REPEATED = b'{"x": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'


def write_raw(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def test_safetensors_unaligned_data(tmp_path):
    raw = json.dumps({"x": X}).encode()
    raw += b" " * ((3 - len(raw)) % 8)                     # data begins 3 bytes past a multiple of 8
    write_raw(tmp_path / "x", raw, struct.pack("<ff", 1.5, -2.0))
    assert read_safetensors(tmp_path / "x")["x"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize("header, data, length, message", [
    ({"x": X}, bytes(4), None, "run past the 4 bytes of data: the file is truncated"),
    ({"x": X}, bytes(8), 10**12, "its header should be 1000000000000 bytes long"),
    (b"not json", b"", None, "its header is not JSON"),
    (b"[" * 100_000, b"", None, "its header is not JSON"),
    (b"[]", b"", None, "expected an object"),
    ({"x": X | {"dtype": "F13"}}, bytes(8), None, "dtype 'F13' is not known"),
    ({"x": X | {"shape": [3]}}, bytes(8), None, "hold 8 bytes, F32 x [3] needs 12"),
    ({"x": X | {"shape": [-2]}}, bytes(8), None, "is not a list of sizes"),
    ({"x": X | {"shape": [True, 2]}}, bytes(8), None, "is not a list of sizes"),
    ({"x": X | {"shape": [2**63, 0], "data_offsets": [0, 0]}}, b"", None, "not a list of sizes"),
    ({"x": X | {"shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}}, b"", None, "any memory"),
    ({"x": X | {"data_offsets": [8, 0]}}, bytes(8), None, "hold -8 bytes"),
    ({"x": X | {"data_offsets": [0]}}, bytes(8), None, "is not [begin, end]"),
    ({"x": X | {"data_offsets": [8, 16]}}, bytes(16), None, "leave a gap"),
    ({"x": X, "y": X | {"data_offsets": [4, 12]}}, bytes(12), None, "overlap those of x"),
    ({"x": X}, bytes(12), None, "4 bytes follow the last tensor"),
    ({"x": {"dtype": "F32"}}, b"", None, "should have dtype, shape and data_offsets"),
    ({"__metadata__": {"a": 1}, "x": X}, bytes(8), None, "__metadata__ should map text to text"),
    (REPEATED, bytes(8), None, "a name stands twice"),
])
def test_safetensors_bad_header(tmp_path, header, data, length, message):
    write_raw(tmp_path / "bad.safetensors", header, data, length)
    with refused(match=f"bad.safetensors: .*{re.escape(message)}") as error:
        read_safetensors(tmp_path / "bad.safetensors")
    assert "\n" not in str(error.value)


def test_safetensors_too_short_or_absent(tmp_path):
    (tmp_path / "short").write_bytes(b"1234")
    with refused(match="truncated: 4 bytes"):
        read_safetensors(tmp_path / "short")
    with refused(match="absent: cannot be read"):
        read_safetensors(tmp_path / "absent")


def test_a_write_that_is_interrupted_or_fails_leaves_things_as_they_were(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_safetensors(path, {"x": torch.ones(3)})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", lambda _: signal_from_the_keyboard())
        write_safetensors(path, {"x": torch.zeros(3)})
    with refused(match="complex64 cannot be written"):
        write_safetensors(path, {"x": torch.zeros(2, dtype=torch.complex64)})
    with refused(match="cannot be written: No such file"):
        write_safetensors(tmp_path / "absent" / "x", {"x": torch.ones(2)})
    (tmp_path / "folder").mkdir()
    with refused(match="folder: cannot be written"):
        write_safetensors(tmp_path / "folder", {"x": torch.ones(2)})
    assert read_safetensors(path)["x"].tolist() == [1, 1, 1]
    assert sorted(os.listdir(tmp_path)) == ["folder", "x"]


def signal_from_the_keyboard():
    raise KeyboardInterrupt


def test_a_file_larger_than_memory_can_be_opened(tmp_path):
    size = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    path = tmp_path / "large"
    write_raw(path, {"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    os.truncate(path, path.stat().st_size + size)          # a hole: it takes no disk
    assert read_safetensors(path)["x"][size - 1] == 0


# --------------------------------------------------------------------------------------------------
# model.py: the model

def reference_logits(model, tokens, activation=F.silu):
    """Return Llama's logits of tokens (T,), head by head and position by position, in float64."""
    config = model.config
    state = {name: parameter.double() for name, parameter in model.named_parameters()}
    D = config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    frequencies = config.rope_theta ** (-2 / D * torch.arange(D // 2, dtype=torch.float64))

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def turn(v, position):                                 # RoPE as a product of complex numbers
        pairs = torch.complex(v[:D // 2], v[D // 2:])
        pairs = pairs * torch.polar(torch.ones_like(frequencies), position * frequencies)
        return torch.cat((pairs.real, pairs.imag))

    x = state["model.embed_tokens.weight"][tokens]
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}."
        w = {name: state[f"{block}{name}.weight"] for name in block_linears(config)}
        h = norm(x, state[f"{block}input_layernorm.weight"])
        q, k, v = (h @ w[f"self_attn.{letter}_proj"].T for letter in "qkv")
        rows = []
        for i in range(len(tokens)):
            heads = []
            for head in range(config.num_attention_heads):
                own = slice(head * D, head * D + D)
                shared = slice(head // group * D, head // group * D + D)
                query = turn(q[i, own], i)
                scores = [query @ turn(k[j, shared], j) / math.sqrt(D) for j in range(i + 1)]
                heads.append(torch.stack(scores).softmax(0) @ v[:i + 1, shared])
            rows.append(torch.cat(heads))
        x = x + torch.stack(rows) @ w["self_attn.o_proj"].T
        h = norm(x, state[f"{block}post_attention_layernorm.weight"])
        gated = activation(h @ w["mlp.gate_proj"].T) * (h @ w["mlp.up_proj"].T)
        x = x + gated @ w["mlp.down_proj"].T
    tied = config.tie_word_embeddings
    head = state["model.embed_tokens.weight" if tied else "lm_head.weight"]
    return norm(x, state["model.norm.weight"]) @ head.T


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"hidden_act": "gelu"},
    {"num_key_value_heads": 1, "rope_theta": 5e5, "head_dim": 8},
])
def test_logits_are_those_of_the_formula(monkeypatch, changes):
    monkeypatch.setitem(llama.ACTIVATIONS, "gelu", F.gelu)
    model = tiny_model(**changes)
    tokens = tokens_of(model, 9)
    expected = reference_logits(model, tokens, llama.ACTIVATIONS[model.config.hidden_act])
    assert model(tokens[None]).dtype == torch.float64
    assert distance(model(tokens[None])[0], expected) < 1e-12
    assert distance(model.float()(tokens[None])[0], expected) < 1e-5
    assert model.bfloat16()(tokens[None]).dtype == torch.float32


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_cache_gives_the_logits_of_the_whole_sequence(dtype, tolerance):
    model = tiny_model(dtype)
    tokens = tokens_of(model, 2, 20)
    whole = model(tokens)
    assert distance(model(tokens, last_only=True), whole[:, -1:]) < tolerance
    for pieces in ([20], [1] * 20, [7, 1, 1, 5, 6]):
        assert distance(stepwise(model, tokens, pieces), whole) < tolerance
    cache = model.make_cache(2, 20)
    model(tokens, cache)
    assert cache.used == 20
    cache.used = 11                                        # forget, and go on from there
    assert distance(model(tokens[:, 11:], cache), whole[:, 11:]) < tolerance


def test_a_cache_may_see_in_another_way():
    """Two continuations of one beginning, side by side in one call: each sees it and itself."""
    class Branches(KVCache):
        def look(self, T, window):
            sees = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
            mask = torch.cat((torch.ones(3, self.used, dtype=torch.bool), sees), 1)
            return torch.tensor([5, 5, 6]), mask

    model = tiny_model()
    beginning = tokens_of(model, 1, 5)
    cache = model.make_cache(1, 12)
    model(beginning, cache)
    cache.__class__ = Branches
    branches = model(torch.tensor([[7, 8, 9]]), cache)
    for row, path in enumerate(([7], [8], [7, 9])):
        alone = model(torch.cat((beginning, torch.tensor([path])), 1))
        assert distance(branches[:, row], alone[:, -1]) < 1e-12


def test_cache_and_vocabulary_have_limits():
    model = tiny_model()
    cache = model.make_cache(1, 4)
    model(tokens_of(model, 1, 2), cache)
    with refused(match="3 tokens do not fit a cache of 4 positions, 2 of them used"):
        model(tokens_of(model, 1, 3), cache)
    for wrong in (61, -1):
        with refused(match=f"token id {wrong} is outside the vocabulary of 61"):
            model(torch.tensor([[0, wrong]]))


# --------------------------------------------------------------------------------------------------
# model.py: checkpoint folders

def save_sharded(model, folder, shards=2):
    """Write a checkpoint in shards, as the hub has large ones."""
    folder.mkdir(exist_ok=True)
    tensors = dict(model.named_parameters())
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        write_safetensors(folder / shard, {name: tensors[name] for name in names[i::shards]})
        weight_map |= dict.fromkeys(names[i::shards], shard)
    llama.write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    model.config.write(folder, model.dtype)


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint_round_trip(tmp_path, tied):
    model = tiny_model(torch.float32, tie_word_embeddings=tied)
    tokens = tokens_of(model, 1, 12)
    model.save_pretrained(tmp_path / "whole")
    save_sharded(model, tmp_path / "sharded")
    sparse = sparse_model(some_thresholds(model) | {"lm_head": 0.3}, torch.float32,
                          tie_word_embeddings=tied)
    sparse.save_pretrained(tmp_path / "sparse")            # is saved as the dense one
    for folder in ("whole", "sharded", "sparse"):
        loaded = Llama.from_pretrained(tmp_path / folder)
        assert loaded.config == model.config
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert torch.equal(loaded(tokens), model(tokens))
    assert Llama.from_pretrained(tmp_path / "whole", dtype=torch.float64).dtype == torch.float64


def test_a_checkpoint_that_does_not_fit(tmp_path):
    model = tiny_model(torch.float32)
    save_sharded(model, tmp_path)
    tensors = dict(model.named_parameters())
    names = sorted(tensors)[::2]
    other = sorted(tensors)[1]
    own = {name: tensors[name] for name in names}
    shard = tmp_path / "model-00001-of-00002.safetensors"
    whole = shard.read_bytes()
    index = tmp_path / "model.safetensors.index.json"
    for spoil, message in [
        ({name: own[name] for name in names[:-1]}, f"tensor {names[-1]} is missing from the"),
        (own | {other: tensors[other]}, "a second one, another file holds it too"),
        (own | {"extra": torch.zeros(2)}, "tensor extra: not part of a Llama"),
        (own | {names[0]: torch.zeros(3, 3)}, r"shape \[3, 3\], config.json makes it"),
        (own | {names[0]: own[names[0]].long()}, "torch.int64, expected floating point"),
        (lambda: shard.write_bytes(whole[:-10]), "truncated"),
        (shard.unlink, "00001-of-00002.safetensors: missing, but named by"),
        (index.unlink, "no checkpoint: neither"),
    ]:
        spoil() if callable(spoil) else write_safetensors(shard, spoil)
        with refused(match=message):
            Llama.from_pretrained(tmp_path)


def write_config(folder, **changes):
    raw = {"model_type": "llama", **vars(tiny_config()), **changes}
    (folder / "config.json").write_text(json.dumps(raw))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "gpt2"}, 'model_type is "gpt2"'),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
    ({"hidden_act": "gelu"}, 'hidden_act is "gelu", supported is "silu"'),
    ({"hidden_size": 0}, "hidden_size is 0, expected a number, above 0"),
    ({"hidden_size": 2**62}, "hidden_size is 4611686018427387904"),
    ({"vocab_size": "many"}, 'vocab_size is "many"'),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3, supported is a divisor of the 4"),
    ({"head_dim": 7}, "head_dim is 7, RoPE needs an even one"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    ({"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false"'),
    ({"attention_bias": "yes"}, 'attention_bias is "yes", supported is true or false'),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
    ({"num_local_experts": 8}, "num_local_experts is 8, supported is 1"),
    ({"use_qk_norm": True}, "use_qk_norm is true, supported is false"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ({"rope_theta": float("nan")}, "rope_theta is NaN"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling is"),
    ({"rope_scaling": {"factor": 8.0}}, "rope_scaling is"),
    ({"rope_scaling": {"type": "linear"}}, "factor is null, expected a number, above 0"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "a low_freq_factor below the high_freq"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_parameters is"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters is"),
    ({"rope_parameters": PARTIAL}, "rope_parameters is"),
])
def test_a_config_that_is_not_supported(tmp_path, changes, message):
    write_config(tmp_path, **changes)
    with refused(match=f"config.json: .*{re.escape(message)}"):
        Config.read(tmp_path)


def test_config_defaults(tmp_path):
    rope = {"rope_theta": 777.0, "rope_type": "default"}
    write_config(tmp_path, head_dim=None, num_key_value_heads=None, rope_theta=None,
                 rope_parameters=rope)
    config = Config.read(tmp_path)
    assert (config.head_dim, config.num_key_value_heads, config.rope_theta) == (8, 4, 777.0)


REFERENCES = {  # what is special: settings of transformers' configuration
    "plain": {},
    "grouped heads, explicit head_dim": {"num_key_value_heads": 2, "head_dim": 24},
    "tied head": {"tie_word_embeddings": True},
    "attention biases": {"attention_bias": True, "num_key_value_heads": 2},
    "MLP biases": {"mlp_bias": True},
    "theta": {"rope_theta": 500000.0},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3 rope": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
    "mistral, sliding window": {"model_type": "mistral", "num_key_value_heads": 2,
                                "sliding_window": 7},
}


def reference(folder, dtype=torch.float32, shard="10GB", **settings):
    """Save a small random model of transformers, every part of which matters; return it."""
    transformers = pytest.importorskip("transformers")
    mistral = settings.pop("model_type", "llama") == "mistral"
    kind = "Mistral" if mistral else "Llama"
    scaling = settings.pop("rope_scaling", None) or {"rope_type": "default"}
    rope = scaling | {"rope_theta": settings.pop("rope_theta", 10000.0)}
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=4, vocab_size=101, max_position_embeddings=128)
    config = getattr(transformers, f"{kind}Config")(
        **{**shape, "rope_parameters": rope, **settings})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
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
    ours = Llama.from_pretrained(tmp_path)
    tokens = tokens_of(ours, 2, 40)
    expected = theirs(tokens).logits
    pieces = [9, 5, *[1] * 26]           # a prompt, a few tokens at once, then token by token
    assert distance(ours(tokens), expected) < 1e-4
    assert distance(stepwise(ours, tokens, pieces), expected) < 1e-4
    sparsify.sparsify(ours, dict.fromkeys(names_of(ours), 0.0))
    assert distance(stepwise(ours, tokens, pieces), expected) < 1e-4
    ours.save_pretrained(tmp_path / "again")               # and what we write, they read
    again = read_by_transformers(tmp_path / "again")
    assert distance(again(tokens).logits, expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sharded_checkpoints_of_transformers(tmp_path, dtype):
    theirs = reference(tmp_path, dtype, "60KB", num_key_value_heads=2)
    assert len(llama.shard_paths(tmp_path)) > 2
    ours = Llama.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = tokens_of(ours, 2, 30)
    assert distance(ours(tokens), theirs(tokens).logits) < 1e-4
    assert Llama.from_pretrained(tmp_path).lm_head.weight.dtype == dtype


def test_every_spelling_of_rope(tmp_path):
    theirs = reference(tmp_path, rope_theta=5e5, rope_scaling=LLAMA3)
    old = {("type" if name == "rope_type" else name): value for name, value in LLAMA3.items()}
    raw = llama.read_json(tmp_path / "config.json")
    raw = {key: value for key, value in raw.items() if not key.startswith("rope")}
    for spelling in ({"rope_theta": 5e5, "rope_scaling": LLAMA3},
                     {"rope_theta": 5e5, "rope_scaling": old},
                     {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}):
        llama.write_json(tmp_path / "config.json", raw | spelling)
        ours = Llama.from_pretrained(tmp_path)
        tokens = tokens_of(ours, 1, 60)
        assert distance(ours(tokens), theirs(tokens).logits) < 1e-4


def test_random_preset(monkeypatch):
    with refused(match="preset 'gpt' is not known"):
        Llama.random("gpt")
    for tied in (False, True):
        small = llama.preset(64, 96, 2, 4, 2, 50, 32, 1e4, tied)
        monkeypatch.setitem(llama.PRESETS, "small", small)
        model = Llama.random("small", dtype=torch.float32)
        tokens = tokens_of(model, 1, 5)
        assert torch.equal(model(tokens), Llama.random("small", dtype=torch.float32)(tokens))
        assert 0.5 < model.model.layers[0].mlp.down_proj.weight.std() * 96 ** 0.5 < 1.5
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert model.config is not small                   # a model's own, not the preset's
        assert Llama.random("small").dtype == torch.bfloat16


@needs_linux
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    def anonymous():                                       # memory that is not pages of files
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])

    config = replace(llama.preset_config("llama-3.2-1b"), num_hidden_layers=1, vocab_size=8000)
    model = Llama.shapes(config).bfloat16().to_empty(device="cpu").fill_random(0)
    save_sharded(model, tmp_path, 4)
    del model
    ctypes.CDLL(None).malloc_trim(0)                       # what was freed is not to be used again
    before = highest = anonymous()
    loaded = threading.Event()

    def watch():
        nonlocal highest
        while not loaded.wait(0.002):
            highest = max(highest, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = Llama.from_pretrained(tmp_path)
    loaded.set()
    watcher.join()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights > 1.5e8
    assert 0.9 < (highest - before) / weights < 1.15
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()      # no file stays open
    assert model(tokens_of(model, 1, 4)).isfinite().all()


# --------------------------------------------------------------------------------------------------
# model.py: text

TEXTS = ["def f(x):\n    return x + 1\n", "  spaces  and\ttabs\n\n\n", "\x00\x7f\r\n", "",
         "naïve café – 你好, мир! 🙂👩‍👩‍👧", "a" * 50 + "🙂" * 20, "<s> is text </s>"]


def test_text_comes_back_at_once_and_streamed():
    tokenizer = load_tokenizer(DEMO)
    assert tokenizer.pieces()[:3] == ["<unk>", "<s>", "</s>"]
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=False)
        assert tokenizer.encode(text) == [1, *ids]
        assert not {1, 2} & set(ids)                       # written out, <s> is text
        assert tokenizer.decode(ids) == text
        for prompt in ([], tokenizer.encode("x = ")):
            decoder = StreamDecoder(tokenizer, prompt)
            parts = [decoder.add(i) for i in ids]
            assert not any("\ufffd" in part for part in parts)
            assert "".join(parts) + decoder.end() == text
    decoder = StreamDecoder(tokenizer)
    half = tokenizer.encode("🙂", bos=False)[:2]            # a character that never ends
    assert [decoder.add(i) for i in half] == ["", ""]
    assert "\ufffd" in decoder.end()
    ids = tokenizer.encode("def", bos=False)
    assert tokenizer.decode([4096, *ids, 5000]) == "def"   # ids that only pad a vocabulary
    with refused(match="not Unicode"):
        tokenizer.encode("\udcff")


def test_the_tokens_that_end_a_text(tmp_path):
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    assert load_tokenizer(tmp_path).eos_ids == (2,)        # the tokenizer's own
    (tmp_path / "config.json").write_text('{"eos_token_id": 8}')
    assert load_tokenizer(tmp_path).eos_ids == (8,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load_tokenizer(tmp_path).eos_ids == (7, 9)


def test_tokenizers_that_cannot_be_read(tmp_path, monkeypatch):
    with refused(match="no tokenizer: neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\ndamaged")
    with refused(match="tokenizer.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\n")                # of Llama-3's kind
    with refused(match="needs the package transformers: pip install"):
        load_tokenizer(tmp_path)


# --------------------------------------------------------------------------------------------------
# kernel.py

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10,
            torch.float64: 2**-45}
BACKENDS = ["torch", pytest.param("c", marks=needs_c), pytest.param("triton", marks=needs_triton)]


@pytest.fixture(params=BACKENDS)
def gemv(request):
    """sparse_gemv of one backend, on its device, with three threads; the result on the CPU."""
    device = DEVICE if request.param == "triton" else torch.device("cpu")

    def product(x, weight_t, threshold):
        if isinstance(threshold, torch.Tensor):
            threshold = threshold.to(device)
        return kernel.sparse_gemv(x.to(device), weight_t.to(device), threshold, request.param).cpu()

    torch.set_num_threads(3)
    product.cases = 24 if request.param == "triton" and device.type == "cpu" else 240
    yield product
    torch.set_num_threads(1)


def gemv_case(seed):
    """Return (x, weight_t, threshold): each dtype with 1 to 8 rows in turn, the rest at random."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[torch.randint(len(choices), (), generator=generator)]

    dtype = DTYPES[seed % 3]
    rows = 1 + seed % 8
    channels = pick(1, 7, 64, 129, 300)
    outputs = pick(1, 2, 63, 128, 257, 600)
    x = torch.randn(rows, channels, generator=generator).to(dtype)
    weight_t = torch.randn(channels, outputs, generator=generator).to(dtype)
    each = torch.rand(channels, generator=generator) * 1.5
    strided = torch.stack((each, -each), 1)[:, 0]
    drop_all, keep_all = 1e9, -1.0
    return x, weight_t, pick(0.0, 0.5, torch.tensor(0.7), drop_all, keep_all, each, strided)


def test_sparse_gemv_against_float64(gemv):
    for seed in range(gemv.cases):
        x, weight_t, threshold = gemv_case(seed)
        kept = drop(x.double(), torch.as_tensor(threshold).double())
        y = gemv(x, weight_t, threshold)
        assert y.dtype == x.dtype
        error = (y.double() - kept @ weight_t.double()).abs()
        magnitude = kept.abs() @ weight_t.double().abs()   # rounding is proportional to it
        assert (error <= ROUNDING[x.dtype] * magnitude + 1e-30).all(), seed


def test_a_channel_at_the_threshold_is_dropped_and_a_dropped_row_is_not_read(gemv):
    x = torch.tensor([[0.5, -0.5, 1.0, 0.0, -2.0]])
    weight_t = torch.full((5, 33), float("nan"))           # whatever is read by mistake shows
    weight_t[2] = 3.0
    weight_t[4] = 0.25
    assert torch.equal(gemv(x, weight_t, 0.5), torch.full((1, 33), 2.5))
    x = torch.cat((x, torch.tensor([[0.1, 0.5, -0.2, -0.5, 4.0]])))        # another keeps one of two
    assert torch.equal(gemv(x, weight_t, 0.5)[:, 0], torch.tensor([2.5, 1.0]))


def test_nan_is_kept(gemv):
    x = torch.tensor([[float("nan"), 1.0]])
    assert gemv(x, torch.ones(2, 16), 0.5).isnan().all()
    assert kernel.dense(x, torch.ones(2, 16)).isnan().all()
    assert kernel.kept(x, torch.tensor(2.0)).tolist() == [[True, False]]


def test_the_same_input_gives_the_same_bits(gemv):
    torch.manual_seed(0)
    x = torch.randn(1, 515)
    weight_t = torch.randn(515, 130)
    first = gemv(x, weight_t, 0.4)
    assert all(torch.equal(gemv(x, weight_t, 0.4), first) for _ in range(3))


def test_sparse_gemv_refuses_what_does_not_fit():
    x = torch.randn(1, 8)
    weight_t = torch.randn(8, 4)
    for arguments, message in [
        ((torch.randn(9, 8), weight_t, 0.0), r"expected floating point \(1 to 8, in\)"),
        ((x[0], weight_t, 0.0), r"expected floating point \(1 to 8, in\)"),
        ((x.long(), weight_t, 0.0), r"expected floating point \(1 to 8, in\)"),
        ((x, weight_t.T.contiguous(), 0.0), r"expected torch.float32 \(8, out\)"),
        ((x, weight_t.half(), 0.0), "weight_t is torch.float16"),
        ((x, torch.randn(4, 8).T, 0.0), "not contiguous"),
        ((x, weight_t, torch.zeros(4)), r"threshold is \(4,\), expected a number or \(8,\)"),
        ((x, weight_t, 0.0, "cublas"), "backend is triton, c, torch or None, not 'cublas'"),
        ((x.double(), weight_t.double(), 0.0, "c"), 'backend "c" needs'),
        ((x.double(), weight_t.double(), 0.0, "triton"), 'backend "triton" needs'),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel.sparse_gemv(*arguments)


def test_backends_may_be_added_and_float64_stays_float64(monkeypatch):
    monkeypatch.setitem(kernel.BACKENDS, "mine", lambda x, weight_t, t: drop(x, t) @ weight_t)
    x = torch.randn(3, 50, dtype=torch.float64)
    weight_t = torch.randn(50, 20, dtype=torch.float64)
    expected = drop(x, 0.5) @ weight_t
    assert torch.equal(kernel.sparse_gemv(x, weight_t, 0.5, "mine"), expected)
    assert kernel.sparse_gemv(x, weight_t, 0.5).dtype == torch.float64
    assert distance(kernel.sparse_gemv(x, weight_t, 0.5), expected) < 1e-14


@pytest.mark.parametrize("dtype", ROUNDING)
def test_dense_of_any_length(dtype):
    torch.manual_seed(0)
    weight_t = torch.randn(96, 40).to(dtype)
    for shape in ((96,), (1, 1, 96), (3, 96), (2, 4, 96), (11, 96), (1, 40, 96), (2, 35, 96)):
        x = torch.randn(shape).to(dtype)
        y = kernel.dense(x, weight_t)
        assert y.dtype == dtype
        assert distance(y, x.double() @ weight_t.double()) < ROUNDING[dtype]


@needs_c
def test_float16_denormals():
    smallest = (torch.arange(-40, 40) * 2.0**-24).half()[None]
    one = torch.ones(1, 1).half()
    assert torch.equal(kernel.sparse_gemv(one, smallest, 0.0, "c"), smallest)
    assert kernel.sparse_gemv(smallest, torch.ones(80, 1).half(), 0.0, "c") == smallest.sum()
    # And in a process that flushes denormals, through which these numbers pass.
    torch.manual_seed(0)
    x = (1e-3 * torch.randn(1, 300)).half()
    weight_t = (0.02 * torch.randn(300, 40)).half()
    torch.set_flush_denormal(True)
    y = kernel.sparse_gemv(x, weight_t, 0.0, "c")
    torch.set_flush_denormal(False)
    assert distance(y, x.double() @ weight_t.double()) < 2**-9


@pytest.fixture
def forget_compiled():
    """A function that makes kernel.py look for its compiler anew, as it does after the test."""
    def forget():
        kernel.compiled.cache_clear()
        kernel.c_function.cache_clear()
    forget()
    yield forget
    forget()


@pytest.mark.parametrize("name, value", [
    ("MINTEAL_CACHE", "off"), ("MINTEAL_CACHE", "/dev/null/cache"), ("CC", "/nowhere/cc")])
def test_without_a_compiler_torch_takes_over(monkeypatch, forget_compiled, name, value):
    monkeypatch.setenv(name, value)
    x = torch.randn(2, 30)
    weight_t = torch.randn(30, 9)
    assert kernel.best_backend(x) == ("torch" if DEVICE.type == "cpu" or name else "triton")
    assert distance(kernel.sparse_gemv(x, weight_t, 0.5), drop(x, 0.5) @ weight_t) < 1e-5
    assert distance(kernel.dense(x, weight_t), x @ weight_t) < 1e-5
    with pytest.raises(ValueError, match='backend "c" needs a C compiler'):
        kernel.sparse_gemv(x, weight_t, 0.5, "c")


@needs_c
def test_a_library_that_does_not_load_is_built_anew(tmp_path, monkeypatch, forget_compiled):
    source = "int seven(void) { return 7; }"
    monkeypatch.setenv("MINTEAL_CACHE", str(tmp_path / "one"))
    assert kernel.compiled(source).seven() == 7
    library, = (tmp_path / "one").iterdir()
    forget_compiled()
    monkeypatch.setenv("MINTEAL_CACHE", str(tmp_path))
    damaged = tmp_path / library.name
    damaged.write_bytes(b"damaged")
    assert kernel.compiled(source).seven() == 7
    assert damaged.stat().st_size == library.stat().st_size


COMPILE = """
import re, subprocess, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernel

cuobjdump = next(Path(triton.__file__).parent.rglob("cuobjdump"))

def report(case):
    function, pointer, constants, capability = case
    signature, fixed, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        is_pointer = name.endswith("_ptr")
        float32 = name in ("threshold_ptr", "partial_ptr")
        if name in constants:
            signature[name], fixed[(i,)] = "constexpr", constants[name]
            continue
        signature[name] = ("*fp32" if float32 else pointer) if is_pointer else "i32"
        # As the launcher would: multiples of 16, which allow wide loads.
        if not name.startswith(("rows", "threshold_step", "splits")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, fixed, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        sass = subprocess.run([cuobjdump, "-sass", file.name], capture_output=True, text=True,
                              check=True).stdout
    spills = len(re.findall(r"\\b(STL|LDL)\\b", sass))
    wide = len(re.findall(r"ld\\.global[^\\n]*(v4\\.b32|v8\\.b16)", built.asm["ptx"]))
    return built.metadata.name, sass.count(";"), spills, wide, sass.count("LDG.E.128")

cases = []
for capability in (80, 90):
    for pointer in ("*fp32", "*bf16", "*fp16"):
        for rows in (1, 2, 4, 8):
            constants = {"ROWS": rows, **kernel.tile(rows)}
            cases.append((kernel.partial_sums_kernel, pointer, constants, capability))
        constants = {"SPLITS": 16, "BLOCK": 64}
        cases.append((kernel.add_splits_kernel, pointer, constants, capability))
with ThreadPoolExecutor(2) as pool:
    for row in pool.map(report, cases):
        print(*row)
"""


@needs_triton
def test_triton_kernels_compile_for_gpus_that_are_not_here():
    ended = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True,
                           cwd=HERE, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert ended.returncode == 0, ended.stderr
    rows = [line.split() for line in ended.stdout.splitlines()]
    assert len(rows) == 2 * 3 * (4 + 1)
    for name, *numbers in rows:
        instructions, spills, wide, wide_in_sass = map(int, numbers)
        assert instructions > 50
        assert spills == 0
        if name == "partial_sums_kernel":                  # weights come 16 bytes at a time
            assert min(wide, wide_in_sass) >= 4
