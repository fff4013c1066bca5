"""What must stay true of the core, file by file: a specification to read.

    pytest test_all.py        a minute on two cores

Without a GPU the Triton kernels run in Triton's interpreter. What is compared with transformers is
skipped where it is not installed. The chapters of beyond/ have tests of their own.
"""
import ast
import contextlib
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
from generate import ModelDraft, Sampling, StaticCache, StreamDecoder
from model import (Config, InputError, Llama, block_linears, linear_names, load_tokenizer,
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
    raw += b" " * ((3 - len(raw)) % 8)                     # data begin 3 bytes past a multiple of 8
    write_raw(tmp_path / "x", raw, struct.pack("<ff", 1.5, -2.0))
    assert read_safetensors(tmp_path / "x")["x"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, [], 0, "", {"a": None}])
def test_safetensors_metadata_as_the_package_reads_it(tmp_path, metadata):
    safetensors = pytest.importorskip("safetensors.torch")
    write_raw(tmp_path / "x", {"__metadata__": metadata, "x": X}, struct.pack("<ff", 1.5, -2.0))
    try:
        expected = safetensors.load_file(tmp_path / "x")["x"]
    except Exception:
        with refused(match="__metadata__ should map text to text"):
            read_header(tmp_path / "x")
        return
    assert torch.equal(read_safetensors(tmp_path / "x")["x"], expected)
    assert read_header(tmp_path / "x")[1] == (metadata or {})


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
    def interrupt(file):
        raise KeyboardInterrupt

    path = tmp_path / "x"
    write_safetensors(path, {"x": torch.ones(3)})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", interrupt)
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
    (tmp_path / "adapter_config.json").write_text("{}")
    with refused(match="adapter_config.json: an adapter; merge it into its base model first"):
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
    ({"is_causal": False}, "is_causal is false, supported is true"),
    ({"model_type": "mistral", "sliding_window": 8,
      "layer_types": ["sliding_attention", "full_attention"]}, "layer_types is"),
    ({"model_type": "mistral", "sliding_window": 8, "layer_types": 5}, "layer_types is 5"),
    ({"rope_theta": 10**400}, "expected a number, above 0, at most"),
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
    "mistral, a window that no layer has": {"model_type": "mistral", "sliding_window": 7,
                                            "layer_types": ["full_attention"] * 3},
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


@pytest.mark.parametrize("stored", ["both the same", "another head", "the head alone"])
def test_a_tied_head_that_is_stored(tmp_path, stored):
    """Merged adapters may leave a head that is not the embedding: then it counts."""
    reference(tmp_path, tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(path).items()}
    embedding = tensors["model.embed_tokens.weight"]
    if stored == "the head alone":
        del tensors["model.embed_tokens.weight"]
    head = embedding.flip(1) if stored == "another head" else embedding
    write_safetensors(path, tensors | {"lm_head.weight": head}, {"format": "pt"})
    ours = Llama.from_pretrained(tmp_path)
    tokens = tokens_of(ours, 1, 12)
    theirs = read_by_transformers(tmp_path)
    assert distance(ours(tokens), theirs(tokens).logits) < 1e-4
    tied = stored != "another head"
    assert ours.config.tie_word_embeddings == tied
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert torch.equal(calibrate.embedding_of(tmp_path), embedding)


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
    linear = {"rope_type": "linear", "factor": 2.0}
    for both in ({"rope_scaling": LLAMA3, "rope_parameters": linear | {"rope_theta": 5e5}},
                 {"rope_scaling": linear, "rope_parameters": LLAMA3, "rope_theta": 777.0},
                 {"rope_scaling": linear | {"rope_theta": 5e5}, "rope_parameters": LLAMA3},
                 {"rope_scaling": {}, "rope_parameters": LLAMA3, "rope_theta": 5e5},
                 {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
                 {"rope_scaling": None, "rope_theta": 45.2e9},       # for a context of 4 million
                 {"rope_scaling": None, "rope_parameters": linear | {"rope_theta": 9.0}}):
        llama.write_json(tmp_path / "config.json", raw | both)
        theirs = read_by_transformers(tmp_path)
        assert distance(Llama.from_pretrained(tmp_path)(tokens), theirs(tokens).logits) < 1e-4


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
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\n")                # of Llama-3's kind
    with refused(match="not SentencePiece, and neither tokenizer.json nor tokenizer_config.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
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
    x = torch.cat((x, torch.tensor([[0.1, 0.5, -0.2, -0.5, 4.0]])))        # another keeps one
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


def test_a_product_without_inputs_is_zero(gemv):
    assert gemv(torch.zeros(2, 0), torch.zeros(0, 5), 0.1).tolist() == [[0.0] * 5] * 2


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
        ((x, weight_t, 0.0, "cublas"), "backend is triton, c, torch.* or None, not 'cublas'"),
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


@needs_triton
def test_triton_with_many_programs_a_tile():
    torch.manual_seed(0)
    for channels, outputs, size in ((5000, 130, 512), (1100, 300, 256)):
        x = torch.randn(2, channels, device=DEVICE)
        weight_t = torch.randn(channels, outputs, device=DEVICE)
        if DEVICE.type == "cpu":
            assert kernel.span(-(-outputs // 128), channels, 2) == size
        y = kernel.sparse_gemv(x, weight_t, 0.7, "triton")
        assert distance(y, drop(x, 0.7).double() @ weight_t.double()) < 1e-5
        assert not kernel.tickets(kernel.TICKETS, DEVICE).any()      # left for the next launch


@needs_triton
def test_launches_that_may_run_at_once_share_no_tickets(monkeypatch):
    def address(stream=0):
        monkeypatch.setattr(kernel, "stream_of", lambda device: stream)
        return kernel.tickets(9, DEVICE).data_ptr()

    assert address(1) == address(1) != address(2)
    own = kernel.new_tickets(DEVICE)
    with kernel.using_tickets(own):      # as GraphStep does
        assert address(1) == address(None) == own.data_ptr()
        y = kernel.sparse_gemv(torch.ones(1, 300, device=DEVICE), torch.ones(300, 9, device=DEVICE),
                               0.0, "triton")
        assert (y == 300).all() and not own.any()
    assert address(1) != own.data_ptr()
    monkeypatch.setattr(kernel, "stream_of", lambda device: None)      # captured by someone else
    first, second = kernel.tickets(9, DEVICE), kernel.tickets(9, DEVICE)
    assert first.data_ptr() != second.data_ptr() and not first.any()
    with pytest.raises(ValueError, match=f"at most {kernel.TICKETS}"):
        kernel.tickets(kernel.TICKETS + 1, DEVICE)


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value")        # of the interpreter's numpy
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_no_number_can_multiply_is_not_multiplied_where_it_is_dropped(value):
    torch.manual_seed(0)
    for rows in (1, 3):
        x = torch.randn(rows, 70)
        weight_t = torch.randn(70, 130)
        x[:, 5] = 0.1                    # dropped by all rows
        weight_t[5] = value
        x[0, 9] = 0.1                    # dropped by the first row
        weight_t[9, ::3] = value
        keep = x.abs() > 0.4
        terms = torch.where(keep[:, :, None], x[:, :, None] * weight_t, 0.0)
        y = kernel.sparse_gemv(x.to(DEVICE), weight_t.to(DEVICE), 0.4, "triton").cpu()
        torch.testing.assert_close(y, terms.sum(1), equal_nan=True)
        assert y[0].isfinite().all() and (rows == 1 or not y[1].isfinite().all())


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
    assert kernel.best_backend(x) == "torch"
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


COMPILE = r"""
import re, subprocess, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernel

cuobjdump = next(Path(triton.__file__).parent.rglob("cuobjdump"))

KINDS = {"threshold_ptr": "*fp32", "partial_ptr": "*fp32", "channel_ptr": "*i32",
         "ticket_ptr": "*i32"}

def report(case):
    pointer, rows, size, capability = case
    function = kernel.sparse_product_kernel
    constants = {"STEP": 1, "ROWS": rows, "SPAN": size, **kernel.TILE[4 if "32" in pointer else 2]}
    signature, fixed, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], fixed[(i,)] = "constexpr", constants[name]
            continue
        signature[name] = KINDS.get(name, pointer) if name.endswith("_ptr") else "i32"
        if name != "rows":               # as the launcher would: multiples of 16 allow wide loads
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, fixed, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        def ask(option):
            command = [cuobjdump, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
        stack = re.search("STACK:([0-9]+)", ask("-res-usage"))[1]          # spilled registers
        sass = ask("-sass") if rows == 1 else ""                           # which takes a while
    copies = len(re.findall(r"cp\.async\.cg[^\n]*, 0x10,", built.asm["ptx"]))
    wide = len(re.findall(r"LDGSTS[.\w]*\.128", sass))
    return built.asm["ptx"].count(";"), stack, copies, wide, len(sass)

cases = [(pointer, rows, size, capability) for pointer in ("*fp32", "*bf16", "*fp16")
         for rows, size, capability in ((1, 256, 80), (1, 512, 90), (2, 256, 90), (8, 512, 90))]
with ThreadPoolExecutor(2) as pool:
    for row in pool.map(report, cases):
        print(*row)
"""


@needs_triton
def test_the_triton_kernel_compiles_for_gpus_that_are_not_here():
    ended = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True,
                           cwd=HERE, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert ended.returncode == 0, ended.stderr
    rows = [line.split() for line in ended.stdout.splitlines()]
    assert len(rows) == 3 * 4
    for numbers in rows:
        instructions, stack, copies, wide, sass = map(int, numbers)
        assert instructions > 50
        assert stack == 0
        assert copies >= 4               # weights come 16 bytes at a time
        assert wide >= 4 or not sass


# --------------------------------------------------------------------------------------------------
# sparsify.py

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_modes(dtype, tolerance):
    model = tiny_model(dtype)
    tokens = tokens_of(model, 2, 10)
    thresholds = some_thresholds(model)
    nothing = dict.fromkeys(thresholds, 0.0)
    one_by_one = [1] * 10
    dense = model(tokens)
    dropped = by_hand(model, tokens, thresholds)
    prefixed = by_hand(model, tokens, thresholds, prefix=4)
    names = [name for name, _ in model.named_parameters()]
    assert distance(dropped, dense) > 0.01
    assert sparsify.sparsify(model, thresholds) is model
    assert [name.removesuffix("_t") for name, _ in model.named_parameters()] == names

    for pieces in ([10], [2] * 5):       # calls of several tokens are dense, of one sparse
        assert distance(stepwise(model, tokens, pieces), dense) < tolerance
    assert distance(stepwise(model, tokens, one_by_one), dropped) < tolerance
    with sparse_mode(model, "all"):
        assert distance(model(tokens), dropped) < tolerance
        assert distance(stepwise(model, tokens, [5, 3, 1, 1]), dropped) < tolerance
    with sparse_mode(model, "all", dense_prefix=4):
        assert distance(model(tokens), prefixed) < tolerance
    with sparse_mode(model, "off"):
        assert distance(stepwise(model, tokens, one_by_one), dense) < tolerance
    for zeros in (nothing, torch.zeros_like(model.sparse_state.thresholds)):
        with sparse_mode(model, thresholds=zeros):
            assert distance(stepwise(model, tokens, one_by_one), dense) < tolerance
    with pytest.raises(KeyError), sparse_mode(model, "off", {names_of(model)[0]: 9.0}):
        raise KeyError
    assert distance(stepwise(model, tokens, one_by_one), dropped) < tolerance      # as it was


def test_linears_that_are_not_named_or_have_no_threshold():
    dense = tiny_model()
    tokens = tokens_of(dense, 1, 6)
    some = {name: 0.5 for name in names_of(dense) if "q_proj" in name or "up_proj" in name}
    others = {name: 0.3 for name in names_of(dense) if "q_proj" not in name}
    none = {**dict.fromkeys(names_of(dense)), "lm_head": None}
    model = tiny_model()
    with sparse_mode(model, "all"):      # before it is sparse: no mode
        assert torch.equal(model(tokens), dense(tokens))
    for thresholds, expected in [
        (some, by_hand(dense, tokens, some)),              # a linear not named is dense,
        (others, by_hand(dense, tokens, some | others)),   # or as it was
        (none, dense(tokens)),                             # None: dense, but transposed
        (others, by_hand(dense, tokens, others)),
    ]:
        sparsify.sparsify(model, thresholds)
        with sparse_mode(model, "all"):
            assert distance(model(tokens), expected) < 1e-12
        assert (realised_sparsity(model) == 0) == (thresholds is none)
        assert all(isinstance(model.get_submodule(name), SparseLinear) for name in thresholds)
    assert not hasattr(sparsify.sparsify(tiny_model(), none), "sparse_state")


def test_the_tokens_of_a_call_decide_for_every_linear():
    """Even for a head that reads one of them: a prompt's logits are dense, a step's are sparse."""
    dense = tiny_model()
    tokens = tokens_of(dense, 1, 6)
    model = sparse_model({"lm_head": 0.8})
    cache = model.make_cache(1, 6)
    prompt = tokens[:, :5]
    assert distance(model(prompt, cache, last_only=True), dense(prompt)[:, -1:]) < 1e-12
    assert greedy(model, prompt[0], 1) == [dense(prompt)[0, -1].argmax()]
    assert model.lm_head.seen == 0
    expected = by_hand(dense, tokens, {"lm_head": 0.8})[:, -1:]
    assert distance(expected, dense(tokens)[:, -1:]) > 0.01
    assert distance(model(tokens[:, 5:], cache), expected) < 1e-12


def test_realised_sparsity_counts_what_is_not_read():
    model = tiny_model()
    name = "model.layers.1.mlp.down_proj"
    inputs = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    tokens = tokens_of(model, 1, 8)
    model(tokens)
    hook.remove()
    block = sum(outputs * inputs for outputs, inputs in block_linears(model.config).values())
    expected = (inputs[0].abs() <= 0.3).double().mean().item() * 56 * 32 / (3 * block)
    sparsify.sparsify(model, {name: 0.3})
    assert realised_sparsity(model) == 0
    for where, batch, pieces in [("all", 1, [8]), ("decode", 1, [1] * 8), ("all", 2, [8])]:
        reset_counts(model)              # 8 rows are the kernel's work, 16 are not
        with sparse_mode(model, where):
            stepwise(model, tokens.repeat(batch, 1), pieces)
        assert realised_sparsity(model) == pytest.approx(expected)


def test_thresholds_that_do_not_fit_change_nothing():
    names = names_of(tiny_model())
    model = tiny_model()
    for thresholds, message in [
        ({"lm_tail": 0.1}, "lm_tail, which is not a linear"),
        ({"model.norm": 0.1}, "not a linear of this model"),
        ({names[0]: torch.zeros(5)}, r"shape \(5,\), expected \(\) or \(32,\)"),
        ({names[0]: 0.5, names[1]: float("nan")}, "is not finite"),
    ]:
        with refused(match=message):
            sparsify.sparsify(model, thresholds)
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    model = sparse_model({names[0]: 0.1, names[1]: None})
    for arguments, message in [
        (dict(where="never"), 'where is "decode", "all" or "off", not \'never\''),
        (dict(dense_prefix=-1), "dense_prefix is -1"),
        (dict(thresholds={names[2]: 0.1}), "not a sparse linear"),
        (dict(thresholds={names[1]: 0.1}), "is dense, or would become so"),
    ]:
        with refused(match=message), sparse_mode(model, **arguments):
            pass
    with refused(match="is not finite"):
        sparsify.sparsify(model, {names[0]: 0.9, names[1]: float("inf")})
    assert (model.sparse_state.thresholds == 0.1).all()


def test_a_tied_head_can_be_sparse_and_stays_one_weight():
    dense = tiny_model(tie_word_embeddings=True)
    tokens = tokens_of(dense, 2, 6)
    model = sparse_model({"lm_head": 0.5}, tie_word_embeddings=True)
    embedding = model.model.embed_tokens
    assert embedding.weight_t is model.lm_head.weight_t
    assert torch.equal(embedding.weight, dense.lm_head.weight)
    with sparse_mode(model, "all"):
        assert distance(model(tokens), by_hand(dense, tokens, {"lm_head": 0.5})) < 1e-12
    assert realised_sparsity(model) == 0                   # which is of the blocks


def test_perplexity():
    dense = tiny_model()
    tokens = tokens_of(dense, 40)
    losses = []
    for start in (0, 12, 24):                              # a fourth window would need 49 tokens
        logits = dense(tokens[None, start:start + 12])[0]
        losses.append(F.cross_entropy(logits, tokens[start + 1:start + 13]))
    expected = torch.stack(losses).mean().exp().item()
    assert perplexity(dense, tokens, 12) == pytest.approx(expected)
    model = sparse_model()
    with sparse_mode(model, "off"):
        assert perplexity(model, tokens, 12) == pytest.approx(expected)
    logits = by_hand(dense, tokens[None, :12], some_thresholds(dense), prefix=3)[0]
    expected = F.cross_entropy(logits, tokens[1:13]).exp().item()
    assert perplexity(model, tokens[:13], 12, dense_prefix=3) == pytest.approx(expected)
    with refused(match="the text has 12 tokens, a window of 12 needs 13"):
        perplexity(model, tokens[:12], 12)
    with refused(match="token id 99 is outside the vocabulary"):
        perplexity(model, torch.tensor([99] * 13), 12)


def test_quality():
    dense = tiny_model()
    tokens = tokens_of(dense, 70)
    windows = windows_of(tokens, 8)
    thresholds = some_thresholds(dense)
    log_p = dense(windows[:, :-1]).log_softmax(-1)
    log_q = by_hand(dense, windows[:, :-1], thresholds).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    model = tiny_model()
    settings = [thresholds, dict.fromkeys(thresholds, 0.0)]
    rows = sparsify.quality(model, windows, settings).tolist()
    assert rows[0] == pytest.approx([perplexity(dense, tokens, 8), 0, 1, 0], rel=1e-6, abs=1e-9)
    assert rows[2][:3] == pytest.approx(rows[0][:3], rel=1e-6, abs=1e-9)
    sparsify.sparsify(model, thresholds)
    expected = [perplexity(model, tokens, 8), kl, agreement, realised_sparsity(model)]
    assert rows[1] == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------
# calibrate.py

def test_quantiles_of_a_histogram():
    torch.manual_seed(0)
    x = torch.randn(40, 5000) * 3
    x[:, ::10] = 0
    counts = calibrate.histogram(x)
    assert counts.shape == (BINS,)
    assert counts.sum() == x.numel()
    shares = torch.tensor([0.2, 0.5, 0.9, 0.999])
    expected = x.abs().flatten().sort().values[(shares * x.numel()).long()].tolist()
    values = calibrate.quantile(counts.expand(4, BINS), shares).tolist()
    assert values == pytest.approx(expected, rel=0.022)
    assert calibrate.quantile(counts, 0.5).item() == pytest.approx(values[1])
    assert calibrate.quantile(counts, 0) == 0
    assert calibrate.quantile(counts, 0.05) < 1e-5


def test_the_first_tokens_of_a_window_are_left_out(calibrated):
    model, tokens, calibration = calibrated
    windows = windows_of(tokens, 16)
    inputs = []
    linear = model.model.layers[1].mlp.down_proj
    hook = linear.register_forward_pre_hook(lambda _, x: inputs.append(x[0][:, SINKS:]))
    for part in windows.split(calibrate.BATCH):
        model(part[:, :-1])
    hook.remove()
    counts = calibration.distributions["input"]
    assert counts.shape == (3, 4, BINS)
    assert torch.equal(counts[1, 3], calibrate.histogram(torch.cat(inputs)))
    assert calibration.distributions["head"].sum() == len(windows) * (16 - SINKS) * 32


def test_every_allocation_reaches_its_target(calibrated):
    _, tokens, calibration = calibrated
    assert calibration.allocations == ["greedy", "uniform"]
    _, sizes = calibration.sizes()
    for allocation in calibration.allocations:
        for sparsity in (0.0, 0.25, 0.5, 0.8, 0.95):
            shares = calibration.sparsities(sparsity, allocation)
            assert (shares @ sizes).mean().item() == pytest.approx(sparsity, abs=1e-6)
            thresholds = calibration.thresholds(sparsity, allocation)
            model = sparse_model(thresholds | {"lm_head": calibration.head_threshold(0.5)},
                                 torch.float32)
            perplexity(model, tokens, 16, dense_prefix=SINKS)
            # Not exact: with inputs dropped before them, the inputs of later layers are others.
            assert realised_sparsity(model) == pytest.approx(sparsity, abs=0.04)
            assert 1 - model.lm_head.kept / model.lm_head.seen == pytest.approx(0.5, abs=0.03)


def test_shares_between_the_levels_of_a_table():
    uniform = Table(torch.zeros(0), torch.zeros(0, 2, 7))
    assert torch.equal(uniform.at(0.3), torch.full((2, 7), 0.3, dtype=torch.float64))
    first, second = torch.rand(2, 2, 7) * 0.5
    table = Table(torch.tensor([0.25, 0.5]), torch.stack((first, second)))
    for sparsity, expected in [
        (0.0, torch.zeros(2, 7)), (0.125, first / 2), (0.25, first), (0.375, (first + second) / 2),
        (0.5, second), (0.75, (second + 1) / 2), (1 - 1e-12, torch.ones(2, 7)),
    ]:
        assert torch.allclose(table.at(sparsity), expected.double(), atol=1e-7)


def test_the_greedy_path_is_monotone_and_each_step_is_the_best(calibrated):
    model, tokens, calibration = calibrated
    _, sizes = calibration.sizes()
    windows = calibrate.some_windows(model, tokens, calibrate.GREEDY[0], 64)
    x = model.embed(windows)
    context = model.context(windows)
    block = model.model.layers[0]
    counts = calibration.distributions["input"][0]
    path = calibrate.greedy_path(block, x, context, counts, sizes)
    steps = path.diff(dim=0)
    assert (path[0] == 0).all()
    assert (path < 1).all()
    assert ((steps > 0).sum(1) == 1).all()
    assert (steps @ sizes).tolist() == pytest.approx([0.01] * 90)
    table = calibration.tables["greedy"]
    assert table.levels.tolist() == pytest.approx([i / 100 for i in range(1, 91)])
    assert torch.allclose(table.shares[:, 0].double(), path[1:], atol=1e-6)
    exact = block(x, context)[:, 16:]

    def error_of(shares):
        hooks = []
        for linear, share in zip(LINEARS, shares):
            threshold = calibrate.quantile(counts[calibrate.SITE_OF[linear]], share).item()
            hooks.append(block.get_submodule(linear).register_forward_pre_hook(
                lambda _, inputs, threshold=threshold: drop(inputs[0], threshold)))
        error = (block(x, context)[:, 16:] - exact).norm().item()
        for hook in hooks:
            hook.remove()
        return error

    for step in range(0, 60, 6):         # tried by hand, all seven
        errors = [error_of(shares) for shares in path[step] + torch.diag(0.01 / sizes)]
        taken = errors[steps[step].argmax()]
        assert taken < 1.02 * min(errors)
        assert taken <= sorted(errors)[3]


def test_a_calibration_goes_on_where_it_was_killed(monkeypatch, tmp_path):
    model = tiny_model(torch.float32)
    tokens = tokens_of(model, 400)
    whole = calibrate.calibrate(model, tokens, 16)
    calibrate.add_greedy(whole, model, tokens)
    begun = []

    def killed_at(number, function):
        def counted(*arguments):
            begun.append(function.__name__)
            if len(begun) == number:
                raise KeyboardInterrupt
            return function(*arguments)
        return counted

    def run(origin="these"):
        partial = calibrate.Partial(tmp_path / "partial", origin)
        calibration = calibrate.calibrate(model, tokens, 16, partial=partial)
        calibrate.add_greedy(calibration, model, tokens, partial)
        return calibration

    sites = 1 + 4 * len(model.model.layers)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(calibrate, "histogram", killed_at(2 * sites + 3, calibrate.histogram))
        run()
    begun.clear()                        # two of six batches are done
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(calibrate, "histogram", killed_at(1000, calibrate.histogram))
        patch.setattr(calibrate, "greedy_path", killed_at(4 * sites + 2, calibrate.greedy_path))
        run()
    assert begun.count("histogram") == 4 * sites
    begun.clear()                        # the first block's path is done
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "histogram", killed_at(1000, calibrate.histogram))
        patch.setattr(calibrate, "greedy_path", killed_at(1000, calibrate.greedy_path))
        again = run()
        assert begun == ["greedy_path"] * (len(model.model.layers) - 1)
        begun.clear()
        run("others")                    # what was made from something else does not count
        assert begun.count("histogram") == 6 * sites
        begun.clear()
        (tmp_path / "partial").write_bytes(b"damaged")     # nor does what was not written whole
        run()
        assert begun.count("histogram") == 6 * sites
    for name, counts in whole.distributions.items():
        assert torch.equal(again.distributions[name], counts)
    assert torch.equal(again.tables["greedy"].shares, whole.tables["greedy"].shares)


def test_calibration_file(calibrated, tmp_path):
    model, _, calibration = calibrated
    calibration.save(tmp_path / "x")
    loaded = Calibration.load(tmp_path / "x")
    assert loaded.source == calibration.source == "1,488 tokens of a test"
    assert loaded.allocations == calibration.allocations
    for allocation in (None, "uniform"):
        expected = calibration.thresholds(0.4, allocation)
        assert list(expected) == names_of(model)
        assert loaded.thresholds(0.4, allocation) == expected
    for same in (tiny_model(), tiny_model(torch.bfloat16), sparse_model()):
        loaded.check(same)
    with refused(match="made for another model of the same shape"):
        loaded.check(tiny_model(seed=1))
    with refused(match="made for another model: intermediate_size is 56 in it, 60 in the model"):
        loaded.check(tiny_model(intermediate_size=60))
    for sparsity in (-0.1, 1.0, float("nan")):
        with refused(match="expected at least 0 and below 1"):
            loaded.thresholds(sparsity)
    del loaded.tables["greedy"]
    with refused(match="'greedy' is not in .* greedy is made by python calibrate.py --greedy"):
        loaded.thresholds(0.5, "greedy")
    write_safetensors(tmp_path / "x", {"x": torch.zeros(1)})
    with refused(match="not a calibration of this version: format is None"):
        Calibration.load(tmp_path / "x")


def test_chapters_may_add_tables_and_weights(calibrated, tmp_path):
    model, _, calibration = calibrated
    calibration.save(tmp_path / "x")
    more = Calibration.load(tmp_path / "x")
    torch.manual_seed(0)
    weights = {name: 0.5 + torch.rand(model.get_submodule(name).in_features)
               for name in names_of(model)}
    shares = torch.rand(1, 3, 7)
    more.weights["mine"] = weights
    more.distributions["mine"] = more.distributions["input"][:, [0, 0, 0, 1, 2, 2, 3]]
    more.tables["half"] = Table(torch.tensor([0.5]), shares, "mine")
    more.save(tmp_path / "x")
    loaded = Calibration.load(tmp_path / "x")
    assert loaded.allocations == ["half", "greedy", "uniform"]
    values = calibrate.quantile(more.distributions["mine"], 0.6 * shares[0].double()).flatten()
    for value, (name, threshold) in zip(values, loaded.thresholds(0.3).items()):
        assert torch.allclose(threshold, value.float() / weights[name])


def spoil_table(calibration, **changes):
    calibration.tables["greedy"] = calibration.tables["greedy"]._replace(**changes)


def spoil_weights(calibration, change):
    calibration.distributions["mine"] = torch.ones(3, 7, BINS, dtype=torch.int64)
    sizes = [size for _, size in block_linears(tiny_config()).values()] * 3
    weights = {name: torch.ones(size) for name, size in zip(names_of(tiny_model()), sizes)}
    change(weights)
    calibration.weights["mine"] = weights


@pytest.mark.parametrize("spoil", [
    lambda c: c.distributions["input"][1, 2].zero_(),
    lambda c: c.distributions["input"][1, 2, 3].sub_(10**6),
    lambda c: c.distributions.pop("input"),
    lambda c: c.shapes.pop("hidden_size"),
    lambda c: setattr(c, "shapes", []),
    lambda c: setattr(c, "fingerprint", torch.zeros(3)),
    lambda c: c.tables.clear(),
    lambda c: spoil_table(c, shares=torch.zeros(3, 4, 5)),
    lambda c: spoil_table(c, shares=torch.full((90, 3, 7), float("nan"))),
    lambda c: spoil_table(c, shares=torch.ones(90, 3, 7)),
    lambda c: spoil_table(c, levels=torch.ones(90)),
    lambda c: spoil_table(c, weights="unheard of"),
    lambda c: spoil_weights(c, lambda weights: weights.popitem()),
    lambda c: spoil_weights(c, lambda weights: weights["model.layers.0.mlp.up_proj"].neg_()),
])
def test_a_damaged_calibration_is_refused(calibrated, tmp_path, spoil):
    calibrated[2].save(tmp_path / "x")
    damaged = Calibration.load(tmp_path / "x")
    spoil_weights(damaged, lambda weights: None)
    damaged.save(tmp_path / "x")
    Calibration.load(tmp_path / "x")
    spoil(damaged)
    damaged.save(tmp_path / "x")
    with refused(match="a damaged calibration .*; make it with: python calibrate.py"):
        Calibration.load(tmp_path / "x")


def test_what_cannot_be_calibrated():
    broken = tiny_model(torch.float32)
    broken.model.norm.weight[3] = float("nan")
    tokens = tokens_of(broken, 100)
    for model, tokens, context, message in [
        (sparse_model(), tokens, 16, "this one was made sparse"),
        (broken, tokens, 16, "the activations hold NaN or infinity"),
        (tiny_model(), tokens, 4, "a window of 4 tokens leaves none after the first 4"),
        (tiny_model(), torch.tensor([99] * 20), 16, "token id 99 is outside"),
    ]:
        with refused(match=message):
            calibrate.calibrate(model, tokens, context)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder, histograms, greedy shares (18, 7)) of a model, as TEAL's authors publish them."""
    folder = tmp_path_factory.mktemp("authors") / "Tiny-7B"
    generator = torch.Generator().manual_seed(0)
    shares = torch.arange(1, 19)[:, None] * 0.05 * torch.tensor([1.0, 0.9, 0.5, 1, 0.9, 0.9, 1])
    rows = "".join(f"0,0,0,{','.join(map(str, row))}\n" for row in shares.tolist())
    histograms = {}
    for layer in range(3):
        for part in ("self_attn", "mlp"):
            tensors = {}
            for key in ("h1", "h2") + ("h1.5",) * (part == "mlp"):         # as their utils.py does
                scale = torch.rand((), generator=generator)
                x = (torch.randn(20_000, generator=generator) * scale).sort().values
                bins = torch.cat((x[:1], torch.linspace(x[200], x[-200], 9999), x[-1:]))
                tensors[key] = torch.histogram(x, bins=bins)[0]
                tensors[f"{key}_centers"] = (bins[:-1] + bins[1:]) / 2
            path = folder / "histograms" / f"layer-{layer}" / part
            path.mkdir(parents=True)
            torch.save(tensors, path / "histograms.pt")
            histograms[layer, part] = tensors
        path = folder / "lookup" / f"layer-{layer}"
        path.mkdir(parents=True)
        header = "Effective Sparsity,Activation Error,Baseline Error,q,k,v,o,gate,up,down\n"
        (path / "results.csv").write_text(header + rows)
    return folder, histograms, shares


def their_threshold(histogram, key, sparsity):
    """TEAL's: the inverse of the cumulative counts at 0.5 + s/2, linear between bin centers."""
    counts = histogram[key].double()
    centers = histogram[f"{key}_centers"].double()
    below = counts.cumsum(0)
    target = (0.5 + sparsity / 2) * counts.sum()
    at = int(torch.searchsorted(below, target))
    fraction = (target - below[at - 1]) / (below[at] - below[at - 1])
    return (centers[at - 1] + fraction * (centers[at] - centers[at - 1])).item()


def test_the_authors_statistics_are_imported(published, run, tmp_path):
    folder, histograms, shares = published
    tiny_model().save_pretrained(tmp_path)
    status, out, err = run("calibrate.py", "--model", tmp_path, "--import-teal", folder)
    assert status == 0, err
    assert "the statistics TEAL's authors publish for Tiny-7B; allocations: greedy, uniform" in out
    loaded = calibrate.load_calibration(tiny_model(), tmp_path)
    for sparsity in (0.1, 0.25, 0.5, 0.9):
        for name, threshold in loaded.thresholds(sparsity, "uniform").items():
            layer, part, linear = name.split(".")[2:]
            key = "h2" if linear in ("o_proj", "down_proj") else "h1"
            expected = their_threshold(histograms[int(layer), part], key, sparsity)
            assert threshold.item() == pytest.approx(expected, rel=0.01, abs=1e-3)
    _, sizes = loaded.sizes()
    row = shares[9].double()             # a row of theirs: the same shares at the same sparsity
    at = (row @ sizes).item()
    assert torch.allclose(loaded.sparsities(at, "greedy"), row.expand(3, 7), atol=1e-4)
    with refused(match="this calibration holds no distribution of the head's"):
        loaded.head_threshold(0.5)
    with refused(match="made for another model of the same shape.*; make one with"):
        calibrate.load_calibration(tiny_model(seed=1), tmp_path)


def test_what_the_authors_files_may_hold_and_what_not(published, tmp_path):
    folder, histograms, _ = published
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    numbers = torch.zeros(256)
    before = calibrate.import_teal(tmp_path, tiny_config(), numbers)
    histogram = histograms[1, "mlp"]
    histogram_path = tmp_path / "histograms" / "layer-1" / "mlp" / "histograms.pt"
    table_path = tmp_path / "lookup" / "layer-2" / "results.csv"
    torch.save({key: x for key, x in histogram.items() if "h1.5" not in key}, histogram_path)
    for path in tmp_path.glob("lookup/*/*.csv"):           # where shares reach 1 a path is cut
        path.write_text(path.read_text() + "0,0,0,1,.95,.7,1,.95,.95,1\n"
                                           "0,0,0,1.2,.95,.7,1.1,.95,.95,1\n")
    after = calibrate.import_teal(tmp_path, tiny_config(), numbers)
    assert torch.equal(after.tables["greedy"].shares, before.tables["greedy"].shares)
    for layers, message in [(4, "layer-3/.*cannot be read: No such file"),
                            (2, "more layers than the model's 2")]:
        with refused(match=message):
            calibrate.import_teal(tmp_path, tiny_config(num_hidden_layers=layers), numbers)
    falling = ".5,.5,.5,.5,.5,.5,.5\n.4,.5,.5,.5,.5,.5,.5\n"
    for text in ("", "q,k\n1,2\n", f"q,k,v,o,gate,up,down\n{falling}"):
        table_path.write_text(text)
        with refused(match="results.csv: not a greedy path"):
            calibrate.import_teal(tmp_path, tiny_config(), numbers)
    for bad in ({}, histogram | {"h2": histogram["h2"][1:]}, histogram | {"h1": -histogram["h1"]}):
        torch.save(bad, histogram_path)
        with refused(match="not a histogram of TEAL's authors: expected h[12] and h[12]_centers"):
            calibrate.import_teal(tmp_path, tiny_config(), numbers)


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
    assert greedy(model, prompt, 20, eos_ids=text[7:8]) == text[:text.index(text[7])]
    short = tiny_model(max_position_embeddings=10)
    assert greedy(short, prompt, 100) == text[:5]          # to the end of the context


def test_sparse_decoding_equals_whole_sequences_that_are_sparse_after_the_prompt():
    model = sparse_model()
    prompt = tokens_of(model, 6).tolist()
    text = greedy(model, prompt, 12)
    with sparse_mode(model, "all", dense_prefix=6):
        assert text == by_prefill(model, prompt, 12)
    assert text != by_prefill(model, prompt, 12)


def soft(self, x):
    """Another rule: what stays shrinks by its threshold."""
    return (x.sign() * (x.abs() - self.threshold).clamp(min=0)) @ self.weight_t


@pytest.mark.parametrize("owner, name, change", [
    (llama.MLP, "gated", lambda self, x: F.gelu(self.gate_proj(x)) * self.up_proj(x)),
    (llama, "rotate", lambda x, cos, sin: x),
    (torch.nn.RMSNorm, "forward", lambda self, x: x * self.weight),
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
    ([1], {"temperature": float("nan")}, "temperature is nan"),
    ([1], {"top_k": 0}, "top_k is 0"),
    ([1], {"top_p": 0.0}, "top_p is 0.0"),
    ([1], {"seed": -1}, "seed is -1"),
    ([1], {"seed": 10**30}, "seed is 1000"),
])
def test_what_cannot_be_generated_is_refused_at_once(prompt, options, message):
    for function in (generate.generate, generate.generate_speculative):
        with refused(match=message):
            function(tiny_model(), prompt, **{"max_new_tokens": 3, **options})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_end_a_text(value, temperature):
    def spoiled(model, cache, tokens=1):
        """Return a step whose logits at position 6 are no numbers."""
        def step(tokens):
            start = cache.used
            logits = model(tokens, cache)
            logits[:, torch.arange(start, cache.used) == 6] = value
            return logits
        return step

    model = tiny_model()
    settings = {"temperature": temperature, "seed": 3}
    for function in (generate.generate,
                     functools.partial(generate.generate_speculative, draft=tiny_model())):
        tokens = function(model, [1, 2, 3], 9, make_step=spoiled, **settings)
        text = []
        with refused(match="position 6 of the text are NaN or .*bfloat16 or float32"):
            text.extend(tokens)
        assert len(text) == 4 or function is not generate.generate       # positions 3 to 6
        poisoned = tiny_model()
        poisoned.model.embed_tokens.weight[2] = value
        with refused(match="position 2 of the text are NaN or infinite"):
            next(function(poisoned, [1, 3, 2], 9, **settings))


@pytest.mark.parametrize("temperature, top_k, top_p, expected", [
    (1.0, None, None, [0.5, 0.25, 0.15, 0.1]),
    (0.5, None, None, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
    (1.0, 2, None, [2 / 3, 1 / 3, 0.0, 0.0]),
    (1.0, None, 0.7, [2 / 3, 1 / 3, 0.0, 0.0]),
    (1.0, None, 0.01, [1.0, 0.0, 0.0, 0.0]),
    (1.0, None, 1e-46, [1.0, 0.0, 0.0, 0.0]),
    (1.0, 9, 1.0, [0.5, 0.25, 0.15, 0.1]),
    (1.0, 3, 0.6, [2 / 3, 1 / 3, 0.0, 0.0]),
    (2**-126, None, None, [1.0, 0.0, 0.0, 0.0]),
])
def test_probabilities(temperature, top_k, top_p, expected):
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    p = Sampling(temperature, top_k, top_p).probabilities(logits)
    assert torch.allclose(p, torch.tensor(expected))


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-50, 1e-39])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature):
    model = tiny_model(torch.float32)
    expected = greedy(model, [1, 2], 9)
    assert greedy(model, [1, 2], 9, temperature=temperature, seed=0) == expected
    draft = tiny_model(torch.float32, seed=1)
    assert [*generate.generate_speculative(model, [1, 2], 9, draft, temperature=temperature,
                                           seed=0)] == expected


def test_probabilities_of_ties_and_of_many_tokens():
    assert (Sampling(1.0, top_k=1).probabilities(torch.ones(4)) > 0).sum() == 1    # not widened
    p = Sampling(1.0, top_p=0.9).probabilities(torch.zeros(2, 3000))       # more than are looked at
    assert ((p > 0).sum(1) == 2700).all()


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


def test_a_seed_that_is_drawn_can_be_given():
    model = tiny_model()
    seeds = {generate.random_source(model, None).initial_seed() for _ in range(64)}
    assert len(seeds) == 64
    assert all(generate.random_source(model, seed).initial_seed() == seed for seed in seeds)


def test_sampling_repeats_with_a_seed_and_follows_the_distribution():
    model = tiny_model()
    texts = [greedy(model, [1, 2], 8, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    logits = model(torch.tensor([[1, 2]]))[0, -1:]
    sampling = Sampling(0.7, top_k=12)
    source = generate.random_source(model, 5)
    token, = greedy(model, [1, 2], 1, temperature=0.7, top_k=12, seed=5)
    assert token == sampling.choose(logits, source)[0]
    tokens, p = sampling.choose(logits.expand(20_000, -1), source)
    counts = tokens.flatten().bincount(minlength=61)
    assert p_value(counts, 20_000 * p[0]) > 0.001
    assert p_value(counts, 20_000 * Sampling(0.8, top_k=12).probabilities(logits)[0]) < 1e-6


# --------------------------------------------------------------------------------------------------
# generate.py: steps

@pytest.mark.parametrize("backend", ["c", "triton"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("T", [1, 4])
def test_a_static_cache_gives_the_same_steps(T, window, backend, monkeypatch):
    monkeypatch.setattr(kernel, "best_backend", lambda x: backend)
    model = tiny_model(sliding_window=window)
    tokens = tokens_of(model, 1, 14)
    expected = stepwise(model, tokens, [2, *[T] * (12 // T)])[:, 2:]
    cache = model.make_cache(1, 20)
    model(tokens[:, :2], cache)
    cache.keys[:, :, :, 2:] = 1e9        # what is not used yet must not be seen
    cache.values[:, :, :, 2:] = 1e9
    static = StaticCache(cache, T)
    mask = static.look(T, window)[1]
    assert mask.dtype == (model.dtype if backend == "triton" else torch.bool)
    assert mask.shape == (T, 24)         # a multiple of 8, which kernels of a GPU take as it is
    memory = [tensor.data_ptr() for tensor in (static.positions, static.slots, static.mask)]
    logits = []
    for part in tokens[:, 2:].split(T, dim=1):
        static.follow(cache, T, window)
        logits.append(model(part, static))
        cache.advance(T)
    assert distance(torch.cat(logits, 1), expected) < 1e-12
    assert memory == [tensor.data_ptr() for tensor in (static.positions, static.slots, static.mask)]
    cache.used = 20
    with refused(match=f"{T} tokens do not fit a cache of 20 positions"):
        static.follow(cache, T, window)


def test_every_step_is_one_of_make_step():
    passes = []                          # (model, tokens): all there are,
    steps = []                           # and those that are steps

    def make_step(model, cache, tokens=1):
        def step(tokens):
            steps.append((model, tokens.shape[1]))
            return model(tokens, cache)
        return step

    model = tiny_model(vocab_size=13)
    draft = tiny_model(vocab_size=13, seed=1)
    for each in (model, draft):
        each.register_forward_pre_hook(lambda of, inputs: passes.append((of, inputs[0].shape[1])))
    prompt = [1, 2, 3, 4, 5]
    text = greedy(model, prompt, 8, make_step=make_step)
    assert steps == [(model, 1)] * 7
    assert passes == [(model, 5), *steps]
    passes.clear()
    steps.clear()
    assert text == list(generate.generate_speculative(model, prompt, 8, draft, None, 2,
                                                      make_step=make_step))
    assert passes[:2] == [(model, 5), (draft, 6)]
    assert passes[2:] == steps


def test_the_graphs_of_a_step_have_tickets_of_their_own(monkeypatch):
    class Step(generate.GraphStep):
        def capture(self, tokens):
            return kernel.own_tickets.get()

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    model = tiny_model()
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    steps = [Step(model, model.make_cache(1, 8)) for _ in range(2)]
    first, second = (step.graph(tokens, sample=False) for step in steps)
    assert first is steps[0].tickets and second is steps[1].tickets
    assert first.data_ptr() != second.data_ptr() and kernel.own_tickets.get() is None


@needs_gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("where", ["off", "decode", "all"])
def test_graphs_on_a_gpu_do_what_the_model_does(where, window):
    shape = dict(vocab_size=13, sliding_window=window)
    draft = tiny_model(torch.float32, seed=1, **shape).to(DEVICE)
    model = tiny_model(torch.float32, **shape).to(DEVICE)
    sparsify.sparsify(model, dict.fromkeys(names_of(model), 0.2))
    with sparse_mode(model, where):
        plain = greedy(model, [1, 2, 3], 40, make_step=generate.plain_step)
        reset_counts(model)
        assert greedy(model, [1, 2, 3], 40) == plain
        assert (realised_sparsity(model) > 0) == (where != "off")
        for guesser in ("sparse", draft):
            for n in (1, 3, 12):
                assert plain == list(generate.generate_speculative(
                    model, [1, 2, 3], 40, guesser, None, n, sparse_verifier=where != "off"))


# --------------------------------------------------------------------------------------------------
# generate.py: speculation

def disturbed(model, noise):
    """Return a copy of a model with other weights: a draft that is often right, but not always."""
    torch.manual_seed(5)
    other = Llama(replace(model.config)).to(model.dtype).requires_grad_(False).eval()
    for theirs, own in zip(other.parameters(), model.parameters()):
        theirs.copy_(own + noise * own.std() * torch.randn(own.shape))
    return other


class Guesser:
    """A draft object: it knows what the dense model writes, and is wrong at every third place."""

    def __init__(self, model):
        self.model = model

    def guess(self, ids, n):
        guesses = []
        for place in range(len(ids), len(ids) + n):
            seen = (ids + guesses)[-(self.model.config.sliding_window or place):]
            with sparse_mode(self.model, "off"):
                best = self.model(torch.tensor([seen]), last_only=True).argmax().item()
            guesses.append((best + (place % 3 == 0)) % self.model.config.vocab_size)
        return guesses, None


class Drawer:
    """A draft object that draws its guesses from one distribution, whatever was written."""

    def __init__(self, vocabulary):
        self.q = (torch.arange(vocabulary) / 2).softmax(0)
        self.generator = torch.Generator().manual_seed(0)

    def guess(self, ids, n):
        q = self.q.expand(n, -1)
        return generate.draw(q, self.generator).flatten().tolist(), q


KINDS = ["sparse", "model", "object"]


def draft_of(kind, model, threshold=0.35, noise=0.1):
    """Return (draft, draft_thresholds) for generate_speculative; sparse: make the model sparse."""
    if kind == "sparse":
        sparsify.sparsify(model, dict.fromkeys(names_of(model), 0.0))
        return "sparse", dict.fromkeys(names_of(model), threshold)
    if kind == "object":
        return Guesser(model), None
    if kind == "drawn":
        return Drawer(model.config.vocab_size), None
    draft = disturbed(model, 0.0 if kind == "wrong" else noise)
    if kind == "wrong":
        draft.lm_head.weight.neg_()      # the model's least likely token
    return draft, None


def case(kind, length=5, count=24, threshold=0.35, noise=0.1, **changes):
    """Return (model, prompt, its greedy text, a function(n=3, **options) that speculates)."""
    model = tiny_model(**{"vocab_size": 13, **changes})
    prompt = tokens_of(model, length, seed=length).tolist()
    plain = greedy(model, prompt, count)
    draft, thresholds = draft_of(kind, model, threshold, noise)

    def speculate(n=3, max_new_tokens=count, **options):
        return generate.generate_speculative(model, prompt, max_new_tokens, draft, thresholds, n,
                                             **options)
    return model, prompt, plain, speculate


@pytest.mark.parametrize("kind", [*KINDS, "drawn", "wrong"])
def test_speculative_greedy_is_plain_greedy(kind):
    shares = []
    for length in (1, 9, 30):            # the context ends before the text that follows the last
        _, _, plain, speculate = case(kind, length, max_position_embeddings=48)
        for n in (1, 3, 7, 12, None):
            run = speculate(n)
            assert list(run) == plain
            assert run.against == "the dense model"
            did = run.statistics
            assert did.passes <= did.tokens == len(plain) - 1              # one is the prompt's
            shares += did.acceptance
    if kind == "wrong":
        assert max(shares) == 0
    elif kind != "drawn":
        assert 0.2 < sum(shares) / len(shares) < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [2, 5, 12])
def test_speculation_with_a_sliding_window(kind, window):
    _, _, plain, speculate = case(kind, 9, model_type="mistral", sliding_window=window)
    for n in (1, 4, 7):
        assert list(speculate(n)) == plain


@pytest.mark.parametrize("kind", KINDS)
def test_speculation_stops_inside_an_accepted_run(kind):
    _, _, plain, speculate = case(kind, threshold=0.0, noise=0.0)          # all is accepted
    inside = 0
    for eos in set(plain):
        run = speculate(7, eos_ids=(eos,))
        assert list(run) == plain[:plain.index(eos)]
        did = run.statistics
        inside += sum(did.accepted or []) + did.passes > did.tokens        # verified, after the end
    assert inside
    for limit in range(1, 12):
        assert list(speculate(7, limit)) == plain[:limit]


def test_a_draft_model_may_have_a_shorter_context():
    model, prompt, plain, _ = case("model")
    draft = disturbed(model, 0.0)
    for context in (12, 3):              # one that ends in the text, one in the prompt
        draft.config.max_position_embeddings = context
        run = generate.generate_speculative(model, prompt, 24, draft, None, 7)
        assert list(run) == plain
        assert run.statistics.passes > 10


@pytest.mark.parametrize("kind", KINDS)
def test_the_verifier_may_be_sparse(kind):
    """The text is then that of the mode in force: of "decode" with a dense prompt, or of "all"."""
    model, prompt, dense, speculate = case(kind)
    sparsify.sparsify(model, some_thresholds(model))
    assert list(speculate()) == dense
    texts = [dense]
    for where in ("decode", "all"):
        with sparse_mode(model, where):
            texts.append(greedy(model, prompt, 24))
            for n in (1, 3, 12):         # 13 tokens are more than the kernel takes
                run = speculate(n, sparse_verifier=True)
                assert list(run) == texts[-1]
                assert run.against == "the sparse model"
    assert texts[0] != texts[1] != texts[2] != texts[0]
    with sparse_mode(model, "all", dense_prefix=2), refused(match="dense prefix"):
        speculate()


@pytest.mark.parametrize("kind", [*KINDS, "wrong"])
def test_a_rejected_draft_leaves_the_cache_as_it_was(kind):
    model, prompt, plain, speculate = case(kind, 6)
    run = speculate(5)
    text = [next(run) for _ in range(15)]
    assert sum(run.statistics.reached) > sum(run.statistics.accepted)
    caches = [(model, run.cache, run.cache.used)]
    if kind in ("model", "wrong"):       # whose last guesses stay until the next round
        caches.append((run.draft.model, run.draft.cache, len(prompt) + len(text) - 6))
    for of, cache, used in caches:
        fresh = of.make_cache(1, 40)
        with sparse_mode(of, "off"):
            of(torch.tensor([prompt + text]), fresh)
        used = min(used, fresh.used)
        assert used >= 15
        assert distance(cache.keys[:, :, :, :used], fresh.keys[:, :, :, :used]) < 1e-12
        assert distance(cache.values[:, :, :, :used], fresh.values[:, :, :, :used]) < 1e-12


def test_an_abandoned_or_interleaved_speculation_leaves_no_trace():
    model = sparse_model(0.2, vocab_size=13)
    state = model.sparse_state
    before = state.thresholds.clone()
    sparser = dict.fromkeys(names_of(model), 0.5)
    prompts = [tokens_of(model, 5, seed=seed).tolist() for seed in range(2)]
    with sparse_mode(model, "off"):
        plain = [greedy(model, prompt, 20) for prompt in prompts]
    runs = [generate.generate_speculative(model, prompt, 20, "sparse", sparser, 3)
            for prompt in prompts]
    texts = [[], []]
    for _ in range(15):
        for run, text in zip(runs, texts):
            text.append(next(run))
            assert state.mode == "decode"
            assert torch.equal(state.thresholds, before)
    assert texts == [text[:15] for text in plain]


SAMPLING = dict(temperature=0.9, top_k=4, top_p=0.97)


def p_value_of_drafts(kind, length=800):
    """Return how probable it is that a text sampled with drafts follows the model's distribution.

    The model sees one token at a time. So each token is drawn given the one before it, and one long
    text holds many draws from each of a few distributions.
    """
    shape = dict(vocab_size=5, num_hidden_layers=1, sliding_window=1, max_position_embeddings=1000)
    model = tiny_model(torch.float32, seed=3, **shape)
    p = Sampling(**SAMPLING).probabilities(model(torch.arange(5)[:, None])[:, 0])          # (5, 5)
    draft, thresholds = draft_of(kind, model, threshold=0.8, noise=0.6)
    run = generate.generate_speculative(model, [0], length, draft, thresholds, 3, seed=1,
                                        **SAMPLING)
    text = torch.tensor(list(run))
    did = run.statistics
    assert 0.1 < sum(did.accepted) / sum(did.reached) < 0.95     # p and q differ, and meet
    assert did.reached[2] > 30
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


def test_drafts_are_sampled_as_the_text_is():
    """A guess is never one that temperature, top-k and top-p exclude."""
    model = tiny_model(vocab_size=13)
    sampling = Sampling(**SAMPLING)
    source = generate.random_source(model, 0)
    draft = ModelDraft(model, model.make_cache(1, 20), sampling, source, generate.plain_step)
    guesses, q = draft.guess([1, 2, 3], 4)
    for i in range(4):
        logits = model(torch.tensor([[1, 2, 3, *guesses[:i]]]))[0, -1]
        assert torch.allclose(q[i], sampling.probabilities(logits))
        assert q[i, guesses[i]] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_speculation_repeats_with_a_seed(kind):
    model, prompt, _, speculate = case(kind)
    texts = [list(speculate(temperature=1.0, seed=seed)) for seed in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]
    if kind == "object":                 # one draw a token, as without it: the text is even plain's
        assert texts[1] == greedy(model, prompt, 24, temperature=1.0, seed=1)


def test_speculation_refuses_what_does_not_fit():
    for options, message in [
        ({}, 'draft "sparse" needs a model made sparse'),
        ({"draft": "other"}, "draft is"),
        ({"draft": tiny_model(vocab_size=12)}, "the draft model has 12 tokens, the model 61"),
        ({"draft_tokens": 0}, "draft_tokens is 0"),
    ]:
        with refused(match=message):
            generate.generate_speculative(tiny_model(), [1, 2], 4, **options)


# --------------------------------------------------------------------------------------------------
# demo/

def test_corpus_parts_do_not_meet():
    train = dict(corpus.files("train"))
    held_out = dict(corpus.files("held-out"))
    foreign = corpus.TEST_FOLDERS | {"site-packages"}
    assert train and held_out
    assert not train.keys() & held_out.keys()
    assert all(corpus.is_held_out(path) for path in held_out)
    assert not any(foreign & set(path.split("/")) for path in held_out)
    assert corpus.is_held_out("asyncio/locks.py")
    assert not corpus.is_held_out("test/test_ast.py")


def test_the_demo_tokenizer_gives_every_source_back():
    tokenizer = load_tokenizer(DEMO)
    characters = tokens = 0
    for path, text in corpus.files("held-out") + corpus.files("train")[::60]:
        if "\u2581" in text:                               # SentencePiece's own sign for a space
            continue
        ids = tokenizer.encode(text, bos=False)
        assert tokenizer.decode(ids) == text, path
        characters += len(text)
        tokens += len(ids)
    assert characters / tokens > 2.5
    newline, = tokenizer.encode("\n", bos=False)
    assert tokenizer.encode("a\n\nb", bos=False).count(newline) == 2


def test_the_demo_model_is_small_and_knows_python():
    assert sum(file.stat().st_size for file in DEMO.iterdir() if file.is_file()) < 16e6
    model, tokenizer = llama.load_model(DEMO, DEVICE)
    assert 6e6 < sum(parameter.numel() for parameter in model.parameters()) < 7.5e6
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

def test_the_demo_runs(run):
    status, out, err = run("generate.py", "--max-new-tokens", 16)
    assert status == 0, err
    assert "--- dense: 16 tokens" in out
    assert "--- 50% sparse: 16 tokens" in out
    assert re.search(r"sparse over dense: [\d.]+x; the first \d+ of 16 tokens are the same", out)
    assert out.count("class Stack:") == 2
    last = out.strip().splitlines()[-1]
    assert "python -m beyond" in last
    assert "random:llama-3.2-1b" in last


@pytest.mark.parametrize("draft", ["sparse", "demo"])
def test_the_demo_speculates(run, draft):
    status, out, err = run("generate.py", "--draft", draft, "--compare", "--dtype", "float32",
                           "--max-new-tokens", 24)
    assert status == 0, err
    assert "the same text, all 24 tokens" in out or "the two best logits are" in out
    assert "lossless against the dense model: " in out
    assert "speculative over plain: " in out
    status, out, err = run("generate.py", "--draft", draft, "--sparsity", 0.5, "--temperature", 1,
                           "--draft-tokens", 2, "--max-new-tokens", 8)
    assert status == 0, err
    assert "lossless against the sparse model at 50%: " in out


def test_a_checkpoint_from_calibration_to_text(run, tmp_path):
    tiny_model(torch.float32, vocab_size=4096).save_pretrained(tmp_path)
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("import os\nfor i in range(10):\n    print(i, os)\n" * 40)
    status, _, err = run("generate.py", "--model", tmp_path)
    assert status == 2
    assert f"make one with: python calibrate.py --model {tmp_path}" in err
    status, out, err = run("calibrate.py", "--model", tmp_path, "--text", text, "--greedy")
    assert status == 0, err
    assert "text.txt; allocations: greedy, uniform" in out
    assert not list(tmp_path.glob("*.greedy"))             # nothing unfinished is left
    status, out, err = run("sparsify.py", "--model", tmp_path, "--text", text, "--tokens", 400,
                           "--sparsity", 0.25, 0.5)
    assert status == 0, err
    rows = [" ".join(line.split()[:2]) for line in out.splitlines()[2:]]
    assert rows == ["dense 0%", "uniform 25%", "uniform 50%", "greedy 25%", "greedy 50%"]
    status, out, err = run("generate.py", "--model", tmp_path, "--sparsity", 0.4, "--seed", 1,
                           "--allocation", "uniform", "--temperature", 1, "--max-new-tokens", 4)
    assert status == 0, err
    assert "40% sparse: 4 tokens" in out
    assert 30 < float(re.search(r"([\d.]+)% of the blocks' weights skipped", out)[1]) < 50
    arguments = ["--model", str(tmp_path), "--sparsity", "0", "--head-sparsity", "0.5"]
    model, tokenizer = llama.load_model(tmp_path)
    arguments = generate.settle(generate.make_parser().parse_args(arguments))
    generate.Writer(arguments, model, tokenizer).write(tokenizer.encode("import"))
    assert 1 - model.lm_head.kept / model.lm_head.seen == pytest.approx(0.5, abs=0.1)
    assert realised_sparsity(model) == 0


def test_random_weights_are_calibrated_as_they_are(run, monkeypatch):
    monkeypatch.setitem(llama.PRESETS, "small", llama.preset(64, 96, 2, 4, 2, 50, 256, 1e4))
    status, out, err = run("generate.py", "--model", "random:small", "--max-new-tokens", 8)
    assert status == 0, err
    assert "random weights, for speed alone" in out
    assert "50% sparse: 8 tokens" in out
    status, _, err = run("generate.py", "--model", "random:small", "--prompt", "x")
    assert status == 2
    assert "random weights and no tokenizer" in err


def test_model_prints_the_shape_of_a_checkpoint(run):
    for folder, parameters in [(DEMO, "6,557,440"),        # and the published numbers
                               ("random:llama-2-7b", "6,738,415,616"),
                               ("random:llama-3.2-1b", "1,235,814,400")]:
        status, out, err = run("model.py", folder)
        assert status == 0, err
        assert parameters in out
        assert "sparsity can skip from attention and MLP" in out


def test_kernel_prints_times(monkeypatch, capsys):
    """By a clock on which everything takes a millisecond."""
    monkeypatch.setattr(kernel, "memory_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(kernel, "median_time", lambda call, device: call(0) is None or 1e-3)
    monkeypatch.setattr(kernel, "copies_of", lambda inputs, outputs, dtype, device: [
        torch.randn(inputs, outputs, device=device).to(dtype)] * 2)
    monkeypatch.setitem(llama.PRESETS, "small", llama.preset(64, 96, 2, 4, 2, 50, 32, 1e4))
    monkeypatch.setattr(sys, "argv", ["kernel.py", "--shapes", "small", "--rows", "1", "3",
                                      "--sparsity", "0", "0.5"])
    kernel.command_line(kernel.main)
    out = capsys.readouterr().out
    assert "memory bandwidth: 10.0 GB/s" in out
    assert "64 x 96 float32, 0 MB, 3 rows" in out
    half = [line.split() for line in out.splitlines() if line.strip().startswith("50%")]
    assert [row[4] for row in half] == ["1.00x"] * 2 * 4 * 2               # dtypes, shapes, rows


@pytest.mark.parametrize("file", [*(f"{name}.py" for name in CORE), "demo/train.py"])
def test_help(run, file):
    status, out, _ = run(file, "--help")
    assert status == 0
    assert "usage:" in out
    options = re.split(r"\n  (?=-)", out.split("options:")[1])[2:]         # after --help
    assert [option for option in options if "default" not in option] == []


RANDOM = "random:llama-3.2-1b"


@pytest.mark.parametrize("command, message", [
    (["model.py", "nowhere"], "config.json: cannot be read: No such file or directory"),
    (["kernel.py", "--device", "warp"], "device warp cannot be used"),
    (["kernel.py", "--shapes", "gpt"], "--shapes: invalid choice: 'gpt'"),
    (["kernel.py", "--sparsity", "2"], "--sparsity: 2, expected at least 0 and below 1"),
    (["kernel.py", "--rows", "9"], "--rows 9 is outside 1 to 8"),
    (["sparsify.py", "--calibration", "nowhere"], "nowhere: no calibration"),
    (["sparsify.py", "--model", RANDOM], "random weights"),
    (["sparsify.py", "--text", "nowhere.txt"], "nowhere.txt: cannot be read"),
    (["sparsify.py", "--tokens", "100"], "the text has 100 tokens, a window of 512 needs 513"),
    (["sparsify.py", "--tokens", "0"], "0 is not a whole number above 0"),
    (["sparsify.py", "--sparsity", "1.5"], "--sparsity: 1.5, expected at least 0 and below 1"),
    (["sparsify.py", "--context", "4000"], "does not fit the model's context of 512"),
    (["calibrate.py", "--model", RANDOM], "random weights"),
    (["calibrate.py", "--text", DEMO / "model.safetensors"], "not UTF-8 text"),
    (["calibrate.py", "--import-teal", "x", "--greedy"], "--greedy mean nothing with --import"),
    (["calibrate.py", "--import-teal", "nowhere"], "cannot be read: No such file"),
    (["calibrate.py", "--out", "nowhere/x"], "nowhere/x: cannot be written: nowhere is no folder"),
    (["generate.py", "--model", "nowhere"], "nowhere: no such folder"),
    (["generate.py", "--model", HERE], "no tokenizer: neither tokenizer.model nor tokenizer.json"),
    (["generate.py", "--model", "random:gpt"], "preset 'gpt' is not known"),
    (["generate.py", "--model", RANDOM, "--draft", "sparse"], "python -m beyond shows its cost"),
    (["generate.py", "--device", "warp"], "device warp cannot be used"),
    (["generate.py", "--device", "meta"], "device meta cannot be used"),
    (["generate.py", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    (["generate.py", "--prompt", "\udcff"], "not Unicode"),
    (["generate.py", "--prompt", "x " * 2000], "the model's context holds 512"),
    (["generate.py", "--max-new-tokens", "-3"], "-3 is not a whole number above 0"),
    (["generate.py", "--seed", "9" * 30], "seed is 999"),
    (["generate.py", "--sparsity", "1"], "--sparsity: 1, expected at least 0 and below 1"),
    (["generate.py", "--sparsity", "half"], "--sparsity: half, expected at least 0 and below 1"),
    (["generate.py", "--head-sparsity", "1"], "--head-sparsity: 1, expected at least 0"),
    (["generate.py", "--allocation", "other"], "allocation 'other' is not in this calibration"),
    (["generate.py", "--calibration", DEMO / "config.json"], "config.json: "),
    (["generate.py", "--top-p", "2"], "top_p is 2.0"),
    (["generate.py", "--top-p", "0"], "top_p is 0.0"),
    (["generate.py", "--temperature", "0", "--top-p", "0"], "top_p is 0.0"),
    (["generate.py", "--temperature", "1", "--top-p", "0"], "top_p is 0.0"),
    (["generate.py", "--top-k", "0"], "top_k is 0"),
    (["generate.py", "--temperature", "-1"], "temperature is -1.0"),
    (["generate.py", "--draft", "nowhere"], "nowhere: no such folder"),
    (["generate.py", "--draft", "sparse", "--draft-sparsity", "1"], "--draft-sparsity: 1, exp"),
    (["generate.py", "--draft", "demo", "--draft-sparsity", "0.5"], "is for --draft sparse"),
    (["generate.py", "--draft", "sparse", "--draft-tokens", "0"], "0 is not a whole number above"),
    (["generate.py", "--draft-tokens", "3"], "--compare and --draft-tokens are for --draft"),
    (["generate.py", "--compare"], "--compare and --draft-tokens are for --draft"),
    (["generate.py", "--unheard-of"], "unrecognized arguments: --unheard-of"),
    (["demo/train.py", "--tokens", "5"], "expected at least the 4096 of a step"),
])
def test_bad_input_on_the_command_line(run, command, message):
    status, _, err = run(*command)
    assert status == 2
    assert message in err
    assert err.startswith(f"{Path(command[0]).name}: error: ")
    assert len(err.splitlines()) == 1


def test_a_command_works_from_another_folder(tmp_path):
    command = [sys.executable, HERE / "sparsify.py", "--text", "absent"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == "sparsify.py: error: absent: cannot be read: No such file or directory\n"


@pytest.mark.parametrize("redirection, status, said", [
    (">&-", 2, "model.py: error: standard output is closed\n"),
    (">/dev/full", 2, "model.py: error: [Errno 28] No space left on device\n"),
    ("2>&-", 0, ""),
    ("<&-", 0, ""),
])
def test_closed_streams(redirection, status, said):
    ended = subprocess.run(f"{sys.executable} {HERE / 'model.py'} {redirection}", shell=True,
                           capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (status, said)
    assert bool(ended.stdout) == (status == 0)


def test_what_nobody_can_read_stops_no_work(monkeypatch):
    full = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stderr", full)
    monkeypatch.setattr(llama.time, "perf_counter", iter(range(0, 900, 100)).__next__)
    assert list(llama.progress([1, 2, 3], "a line after each")) == [1, 2, 3]
    assert sys.stderr is not full
    with contextlib.suppress(OSError):
        full.close()


def test_a_draft_model_needs_the_same_tokenizer(monkeypatch):
    class Tokenizer:
        eos_ids = ()

        def __init__(self, *pieces):
            self.pieces = lambda: list(pieces)
            self.vocab_size = len(pieces)

    arguments = generate.settle(generate.make_parser().parse_args([]))
    writer = generate.Writer(arguments, tiny_model(), Tokenizer("a", "b"))
    for other, message in [(Tokenizer("a", "b"), None),
                           (Tokenizer("a", "c"), "they differ from token 1 on"),
                           (Tokenizer("a", "b", "c"), "they differ from token 2 on"),
                           (None, "random weights and none")]:
        monkeypatch.setattr(generate, "load_model", lambda *_: (tiny_model(), other))
        with refused(match=message) if message else contextlib.nullcontext():
            writer.load_draft("x")


def test_ctrl_c_keeps_what_was_written(capsys):
    def interrupted():
        yield from (70, 71, 72)
        raise KeyboardInterrupt

    ids, _, _, early = generate.stream(interrupted(), None, lambda text: print(text, end=""))
    assert early
    assert ids == [70, 71, 72]
    assert capsys.readouterr().out == " 70 71 72\n[interrupted]"
    with pytest.raises(SystemExit) as ended:
        llama.command_line(lambda: list(interrupted()))
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith(": interrupted\n")


# --------------------------------------------------------------------------------------------------
# The rules of the house

def imports_of(path):
    """Return the modules that a file imports, except under `if __name__ == "__main__"`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guards = [node for node in tree.body if isinstance(node, ast.If)
              and ast.unparse(node.test) == "__name__ == '__main__'"]
    guarded = {node for guard in guards for node in ast.walk(guard)}
    names = set()
    for node in set(ast.walk(tree)) - guarded:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_imports_run_one_way():
    for place, name in enumerate(CORE):
        assert not imports_of(HERE / f"{name}.py") & {"beyond", *CORE[place:]}
    for path in (HERE / "test_all.py", DEMO / "corpus.py", DEMO / "train.py"):
        assert "beyond" not in imports_of(path)


def test_lines_are_short_and_the_activation_is_named_once():
    sources = {name: (HERE / f"{name}.py").read_text(encoding="utf-8") for name in CORE}
    assert sum(source.count("F.silu") for source in sources.values()) == 1
    sources["test_all"] = Path(__file__).read_text(encoding="utf-8")
    for name, source in sources.items():
        lines = source.splitlines()
        assert [f"{name}.py:{i}" for i, line in enumerate(lines, 1) if len(line) > 100] == []
