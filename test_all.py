"""What must stay true of the core, file by file: a specification to read.

    pytest test_all.py        a minute on two old cores

Without a GPU the Triton kernels run in Triton's interpreter. What is compared with transformers is
skipped where it is not installed. The chapters of beyond/ have tests of their own.
"""
import ast
import contextlib
import ctypes
import doctest
import functools
import json
import math
import os
import platform
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
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
from calibrate import BINS, LINEARS, SINKS, Calibration, Table
from demo import corpus
from generate import ModelDraft, Sampling, StaticCache, StreamDecoder
from model import (Config, InputError, Llama, block_linears, linear_names, load_tokenizer,
                   read_header, read_safetensors, windows_of, write_safetensors)
from sparsify import SparseLinear, counted, perplexity, realised_sparsity, sparse_mode

HERE = Path(__file__).parent
DEMO = HERE / "demo"
RANDOM = "random:llama-3.2-1b"
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
    with contextlib.ExitStack() as hooks:
        for name, threshold in thresholds.items():
            def keep(module, inputs, threshold=threshold):
                x, = inputs
                return torch.cat((x[:, :prefix], drop(x[:, prefix:], threshold)), 1)
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(keep))
        return model(tokens)


def inputs_of(model, name, run):
    """Return all that a linear reads while `run()` runs, (..., in)."""
    inputs = []
    with model.get_submodule(name).register_forward_pre_hook(lambda _, x: inputs.append(x[0])):
        run()
    return torch.cat(inputs)


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

    It returns standard output; run.fails(file, *options) standard error, after exit status 2.
    """
    def run_file(file, *options, expected=0):
        monkeypatch.setattr(sys, "argv", [file, *map(str, options)])
        status = 0
        try:
            with torch.enable_grad():
                runpy.run_path(str(HERE / file), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
        out, err = capsys.readouterr()
        assert status == expected, err
        return err if expected else out
    run_file.fails = functools.partial(run_file, expected=2)
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


def test_safetensors_are_read_as_the_package_reads_them(tmp_path):
    """Metadata of every kind, and data that begin 3 bytes past a multiple of 8."""
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "x"
    for metadata in (None, {}, {"format": "pt"}, [], 0, "", {"a": None}):
        raw = json.dumps({"__metadata__": metadata, "x": X}).encode()
        raw += b" " * ((3 - len(raw)) % 8)
        write_raw(path, raw, struct.pack("<ff", 1.5, -2.0))
        try:
            expected = safetensors.load_file(path)["x"]
        except Exception:
            with refused(match="__metadata__ is no text|its header is damaged"):
                read_header(path)
        else:
            assert torch.equal(read_safetensors(path)["x"], expected)
            assert read_header(path)[1] == (metadata or {})


@pytest.mark.parametrize("header, data, length, message", [
    (None, b"1234", None, "truncated, or no safetensors file: 4 bytes"),
    ({"x": X}, bytes(4), None, "truncated, or no safetensors file"),
    ({"x": X}, bytes(8), 10**12, "of which the header should be 1000000000000"),
    ({"x": X}, bytes(12), None, "tensors of 8 bytes in 12 bytes of data"),
    (b"not json", b"", None, "its header is damaged"),
    (b"[" * 100_000, b"", None, "its header is damaged"),
    (b"[]", b"", None, "its header is damaged"),
    ({"x": {"dtype": "F32"}}, b"", None, "its header is damaged"),
    ({"x": X | {"dtype": "F13"}}, bytes(8), None, "dtype 'F13' is not known"),
    *(({"x": X | change}, bytes(16), None, "does not fill data_offsets") for change in (
        {"shape": [3]}, {"shape": [-2]}, {"shape": [True, 2]}, {"data_offsets": [8, 0]},
        {"data_offsets": [0]}, {"shape": [2**63, 0], "data_offsets": [0, 0]},
        {"shape": [2**40, 2**40, 0], "data_offsets": [0, 0]})),
    ({"x": X | {"data_offsets": [8, 16]}}, bytes(16), None, "begins at byte 8, the one before"),
    ({"x": X, "y": X | {"data_offsets": [4, 12]}}, bytes(12), None, "begins at byte 4, the one"),
    ({"__metadata__": {"a": 1}, "x": X}, bytes(8), None, "__metadata__ is no text"),
    (REPEATED, bytes(8), None, "a name stands twice"),
])
def test_safetensors_the_package_refuses_are_refused(tmp_path, header, data, length, message):
    path = tmp_path / "bad.safetensors"
    write_raw(path, header, data, length) if header is not None else path.write_bytes(data)
    with refused(match=f"bad.safetensors: .*{re.escape(message)}") as error:
        read_safetensors(path)
    assert "\n" not in str(error.value)
    safetensors = pytest.importorskip("safetensors.torch")
    with pytest.raises(Exception):
        safetensors.load_file(path)


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
    assert whole.dtype == torch.promote_types(dtype, torch.float32)
    assert distance(model(tokens, last_only=True), whole[:, -1:]) < tolerance
    for pieces in ([20], [1] * 20, [7, 1, 1, 5, 6]):
        assert distance(stepwise(model, tokens, pieces), whole) < tolerance
    cache = model.make_cache(2, 20)
    model(tokens, cache)
    with refused(match="3 tokens do not fit a cache of 20 positions, 20 of them used"):
        model(tokens[:, :3], cache)
    cache.used = 11                      # forget, and go on from there
    assert distance(model(tokens[:, 11:], cache), whole[:, 11:]) < tolerance
    for wrong in (61, -1):
        with refused(match=f"token id {wrong} is outside the vocabulary of 61"):
            model(torch.tensor([[0, wrong]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_on_a_cpu_are_float32(dtype):
    """So a model of 16 bits is the model of its rounded weights, nearly."""
    model = tiny_model(torch.float32).to(dtype).cpu()
    exact = tiny_model(torch.float32).to(dtype).float().cpu()
    tokens = tokens_of(exact, 1, 6)
    assert model.embed(tokens).dtype == model(tokens).dtype == torch.float32
    assert model.make_cache(1, 4).keys.dtype == dtype
    assert distance(model(tokens), exact(tokens)) < 0.02
    sparsify.sparsify(model, dict.fromkeys([*names_of(model), "lm_head"]))
    assert distance(model(tokens), exact(tokens)) < 1e-5   # few rows: sums are not rounded either


WITHOUT_INSTRUCTIONS = """
import sys, torch, model as llama
from torch.utils._python_dispatch import TorchDispatchMode
dtype = getattr(torch, sys.argv[1])
multiplied = []
class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if "mm" in name or "dot" in name or "attention" in name or "linear" in name:
            multiplied.append((name, args[1 + (name == "addmm")].dtype))
        return function(*args, **(kwargs or {}))
llama.PRESETS["small"] = llama.preset(1280, 1200, 1, 4, 2, 600, 256, 1e4)
model = llama.Llama.random("small", dtype=dtype)
tokens = torch.arange(128)[None]
with torch.no_grad(), Watch():
    logits = model(tokens, model.make_cache(1, 128))
assert not llama.can_multiply(dtype)
assert len(multiplied) > 9 and {dtype for _, dtype in multiplied} == {torch.float32}, multiplied
exact = model.float()(tokens)
assert (logits - exact).norm() < 0.01 * exact.norm()
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_16_bit_product_runs_where_the_processor_has_no_instructions_for_it(dtype):
    old = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run([sys.executable, "-c", WITHOUT_INSTRUCTIONS, dtype], env=old, cwd=HERE,
                   check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("product", [llama.InFloat32.apply, kernel.dense])
def test_products_have_a_backward_pass(monkeypatch, product, dtype):
    monkeypatch.setattr(llama.InFloat32, "BLOCK", 1)
    monkeypatch.setattr(llama, "can_multiply", lambda dtype: dtype == torch.float32)
    x, weight = torch.randn(2, 5, 12), torch.randn(12, 150).to(dtype)
    gradient = torch.randn(2, 5, 150)
    with torch.enable_grad():
        x.requires_grad_()
        y = product(x, weight)
        y.backward(gradient)
    assert distance(y.detach(), x.detach() @ weight.float()) < 1e-6
    assert distance(x.grad, gradient @ weight.float().t()) < 1e-6


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
    shard = tmp_path / "model-00001-of-00002.safetensors"
    whole = shard.read_bytes()
    own = dict(read_safetensors(shard))
    first, second, *_, last = own
    other = next(name for name, _ in model.named_parameters() if name not in own)

    def change(name, to):
        return lambda: write_safetensors(shard, own | {name: to(own.get(name))})

    for spoil, message in [
        (lambda: write_safetensors(shard, {name: own[name] for name in own if name != last}),
         f"tensors are missing from the checkpoint: {last}"),
        (change(other, lambda _: model.get_parameter(other)), "a second one of its name"),
        (change("extra", lambda _: torch.zeros(2)), "tensor extra: not part of a Llama"),
        (change(first, lambda _: torch.zeros(3, 3)), r"float32 \[3, 3\], config.json makes it"),
        (change(first, torch.Tensor.long), "torch.int64 .* makes it torch.float32"),
        (change(first, lambda old: old + math.inf),
         f"tensor {first} holds NaN or numbers beyond torch.float32"),
        (change(second, lambda old: old * math.nan), f"tensor {second} holds NaN"),
        (lambda: shard.write_bytes(whole[:-10]), "truncated"),
        (shard.unlink, "00001-of-00002.safetensors: cannot be read: No such file"),
        ((tmp_path / "model.safetensors.index.json").unlink, "no checkpoint: neither"),
    ]:
        spoil()
        with refused(match=message):
            Llama.from_pretrained(tmp_path)


def write_config(folder, **changes):
    raw = {"model_type": "llama", **vars(tiny_config()), **changes}
    (folder / "config.json").write_text(json.dumps(raw))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
@pytest.mark.parametrize("changes, message", [
    ({"model_type": "gpt2"}, 'model_type is "gpt2", expected "llama" or "mistral"'),
    ({"hidden_act": "gelu"}, 'hidden_act is "gelu", expected "silu"'),
    ({"hidden_size": 0}, "hidden_size is 0, expected a number above 0"),
    ({"hidden_size": 2**63}, "hidden_size is 9223372036854775808"),
    ({"vocab_size": "many"}, 'vocab_size is "many"'),
    ({"num_attention_heads": None}, "num_attention_heads is null"),
    ({"num_key_value_heads": 3}, "num_attention_heads % num_key_value_heads is 1, expected 0"),
    ({"head_dim": 7}, "head_dim % 2 is 1, expected 0"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    ({"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false"'),
    ({"num_local_experts": 8}, "num_local_experts is 8, expected 1"),
    ({"use_qk_norm": True}, "use_qk_norm is true, expected false"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ({"rope_theta": float("nan")}, "rope_theta is NaN"),
    ({"is_causal": False}, "is_causal is false, expected true"),
    ({"model_type": "mistral", "sliding_window": 8,
      "layer_types": ["sliding_attention", "full_attention"]}, "layer_types is"),
    ({"model_type": "mistral", "sliding_window": 8, "layer_types": 5}, "not the config.json of"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 'rope_type is "yarn"'),
    ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "factor is 8.0, expected null"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor is null, expected a number above 0"),
    ({"rope_parameters": {"full_attention": {}}}, "full_attention is {}, expected null"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"rope_scaling": "linear"}, "not the config.json of a Llama"),
])
def test_a_config_that_is_not_supported(tmp_path, changes, message):
    write_config(tmp_path, **changes)
    with refused(match=f"config.json: .*{re.escape(message)}") as error:
        Config.read(tmp_path)
    assert re.search("beyond reads more|expected a num|not the config", str(error.value))


def test_config_defaults(tmp_path):
    rope = {"rope_theta": 777.0, "rope_type": "default"}
    write_config(tmp_path, head_dim=None, num_key_value_heads=None, rope_theta=None,
                 rope_parameters=rope)
    config = Config.read(tmp_path)
    assert (config.head_dim, config.num_key_value_heads, config.rope_theta) == (8, 4, 777.0)


REFERENCES = {  # what is special: settings of transformers' configuration, or of `reference`
    "plain": {},
    "grouped heads, explicit head_dim": {"num_key_value_heads": 2, "head_dim": 24},
    "float16, in shards": {"num_key_value_heads": 2, "dtype": torch.float16, "shard": "60KB"},
    "bfloat16, in shards": {"dtype": torch.bfloat16, "shard": "60KB"},
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
    assert (len(llama.shard_paths(tmp_path)) > 2) == ("shard" in settings)
    assert Llama.from_pretrained(tmp_path).dtype == settings.get("dtype", torch.float32)
    ours = Llama.from_pretrained(tmp_path, dtype=torch.float32)
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
    assert ours.config.tie_word_embeddings == (stored == "the head alone")
    assert torch.equal(ours.lm_head.weight, head)


def test_random_preset(monkeypatch):
    with refused(match="preset 'gpt' is not known"):
        Llama.random("gpt")
    for tied in (False, True):
        small = llama.preset(64, 96, 2, 4, 2, 50, 32, 1e4, tied)
        monkeypatch.setitem(llama.PRESETS, "small", small)
        model, again = (Llama.random("small", dtype=torch.float32) for _ in range(2))
        tokens = tokens_of(model, 1, 5)
        assert torch.equal(model(tokens), again(tokens))
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
    save_sharded(Llama.shapes(config).bfloat16().to_empty(device="cpu").fill_random(0), tmp_path, 4)
    ctypes.CDLL(None).malloc_trim(0)                       # what was freed is not to be used again
    measured = [anonymous()]
    loaded = threading.Event()

    def watch():
        while not loaded.wait(0.002):
            measured.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = Llama.from_pretrained(tmp_path)
    loaded.set()
    watcher.join()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights > 1.5e8
    assert 0.9 < (max(measured) - measured[0]) / weights < 1.15
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
    with pytest.raises(UnicodeError):    # one line, where a command meets it
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
    with refused(match="or it is not SentencePiece, and tokenizer.json is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refused(match="needs the package transformers: pip install"):
        load_tokenizer(tmp_path)


WHOLE = {"model": {}, "added_tokens": [{"id": 1, "content": "<s>"}], "post_processor": {
    "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}}


@pytest.mark.parametrize("files, alone", [
    ({}, True),
    ({"tokenizer_config": {"add_bos_token": True}, "tokenizer": WHOLE}, True),
    ({"tokenizer_config": {"added_tokens_decoder": {"0": {}, "1": {}, "2": {}}}}, True),
    ({"added_tokens": {"<pad>": 4096}}, False),
    ({"tokenizer_config": {"added_tokens_decoder": {"5": {"content": "x"}}}}, False),
    ({"tokenizer_config": {"add_bos_token": False}}, False),
    ({"tokenizer_config": {"add_eos_token": True}}, False),
    ({"tokenizer": WHOLE | {"added_tokens": [{"id": 4096, "content": "<pad>"}]}}, False),
    ({"tokenizer": WHOLE | {"model": {"vocab": {"other": 0}}}}, False),
    ({"tokenizer": WHOLE | {"post_processor": {"single": [{"Sequence": {"id": "A"}}]}}}, False),
    ({"tokenizer": {}}, True),
    ({"tokenizer": {"added_tokens": 5}}, False),
])
def test_sentencepiece_reads_alone_what_no_other_file_changes(tmp_path, files, alone):
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert llama.SentencePieceTokenizer(tmp_path).says_all(tmp_path) == alone
    if not alone and "tokenizer" not in files:             # nothing is cut to pieces in silence
        with refused(match="other files change this tokenizer.*python -m beyond reads more"):
            load_tokenizer(tmp_path)


# --------------------------------------------------------------------------------------------------
# kernel.py

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 2**-45, torch.float32: 2**-20, torch.bfloat16: 2**-7,
            torch.float16: 2**-10}
BACKENDS = ["torch", pytest.param("c", marks=needs_c), pytest.param("triton", marks=needs_triton)]
ONES = torch.ones(8, 4)
COMPILER = next(filter(shutil.which, ("cc", "gcc", "clang")), None)


@pytest.fixture(params=BACKENDS)
def gemv(request, monkeypatch):
    """sparse_gemv of one backend, on its device, of C on three threads; the result on the CPU."""
    monkeypatch.setattr(kernel, "THREADS", 3)

    def product(*inputs):
        device = DEVICE if request.param == "triton" else torch.device("cpu")
        return kernel.sparse_gemv(*(torch.as_tensor(each).to(device) for each in inputs),
                                  request.param).cpu()

    product.interpreted = request.param == "triton" and DEVICE.type == "cpu"
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
    weight_t = torch.randn(channels, outputs, generator=generator).to(dtype)
    each = torch.rand(channels, generator=generator) * 1.5
    strided = torch.stack((each, -each), 1)[:, 0]
    drop_all, keep_all = 1e9, -1.0
    threshold = pick(0.0, 0.5, torch.tensor(0.75), drop_all, keep_all, each, strided)
    x[:, ::3] = x[:, ::3].sign() * abs(pick(0.0, 0.5, 0.75))
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
    for seed in range(15 if gemv.interpreted else 240):
        case = gemv_case(seed)
        y = gemv(*case)
        assert_right(y, *case, gemv.rounds_inputs)
        assert gemv.interpreted or torch.equal(y, gemv(*case))


@needs_c
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, outputs, rows", [
    (2100, 1217, 1), (2100, 1217, 3), (20, 8300, 8), (3, 33, 2)])
def test_c_writes_every_output_and_no_other(channels, outputs, rows, dtype, monkeypatch):
    """On one thread and on several, whose ranges do not divide the outputs."""
    torch.manual_seed(0)
    weight_t = torch.randn(channels, outputs).to(dtype)
    x = torch.randn(rows, channels)
    threshold = torch.tensor(0.5)
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(kernel, "THREADS", threads)
        room = torch.full((rows + 2, outputs), math.nan)
        function, arguments = kernel.c_call(x, weight_t, threshold, room[1:-1])
        assert function(*arguments) == 0
        assert room[0].isnan().all() and room[-1].isnan().all()
        results.append(room[1:-1].clone())
    assert_right(results[0], x, weight_t, 0.5)
    assert torch.equal(*results)


def test_nan_is_kept_and_a_product_without_inputs_is_zero(gemv):
    x = torch.tensor([[math.nan, 1.0]])
    assert gemv(x, torch.ones(2, 16), 0.5).isnan().all()
    assert kernel.dense(x, torch.ones(2, 16)).isnan().all()
    assert kernel.kept(x, torch.tensor(2.0)).tolist() == [[True, False]]
    assert gemv(torch.zeros(2, 0), torch.zeros(0, 5), 0.1).tolist() == [[0.0] * 5] * 2
    assert gemv(torch.zeros(2, 5), torch.zeros(5, 0), 0.1).shape == (2, 0)


@pytest.mark.parametrize("x, weight_t, threshold, backend, message", [
    (torch.ones(9, 8), ONES, 0.0, None, r"expected floating point \(1 to 8, in\)"),
    (torch.ones(8), ONES, 0.0, None, r"expected floating point \(1 to 8, in\)"),
    (torch.ones(1, 8).long(), ONES, 0.0, None, r"expected floating point \(1 to 8, in\)"),
    (torch.ones(1, 8), torch.ones(4, 8), 0.0, None, r"expected torch.float32 \(8, out\)"),
    (torch.ones(1, 8), ONES.double(), 0.0, None, "weight_t is torch.float64"),
    (torch.ones(1, 8).half(), ONES, 0.0, None, "weight_t is torch.float32"),
    (torch.ones(1, 8).half(), ONES.bfloat16(), 0.0, None, "weight_t is torch.bfloat16"),
    (torch.ones(1, 8), torch.ones(4, 8).T, 0.0, None, "not contiguous"),
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
    y = kernel.sparse_gemv(x, weight_t, 0.5)
    assert y.dtype == torch.float64
    assert distance(y, drop(x, 0.5) @ weight_t) < 1e-14
    assert distance(kernel.sparse_gemv(x, weight_t, 0.5, "mine"), y) < 1e-14


@pytest.mark.parametrize("dtype", ROUNDING)
def test_dense_of_any_length(dtype):
    torch.manual_seed(0)
    weight_t = torch.randn(96, 40).to(dtype)
    for shape in ((96,), (1, 1, 96), (3, 96), (2, 4, 96), (11, 96), (2, 35, 96)):
        for dtype_of_x in {dtype, torch.promote_types(dtype, torch.float32)}:
            x = torch.randn(shape).to(dtype_of_x)
            y = kernel.dense(x, weight_t)
            assert y.dtype == x.dtype
            assert distance(y, x.double() @ weight_t.double()) < ROUNDING[dtype]


@needs_c
def test_every_float16_and_bfloat16_is_widened_exactly():
    """Small ones nearly, too, where a process flushes denormals."""
    one = torch.ones(1, 1)
    for dtype in DTYPES[1:]:
        every = torch.arange(-2**15, 2**15).to(torch.int16).view(dtype)[None]
        for shift in (0, 1):             # beside whole registers, and in the last few
            weight_t = every[:, shift:].contiguous()
            y = kernel.sparse_gemv(one, weight_t, 0.0, "c")
            assert torch.equal(y.nan_to_num(7.0), weight_t.float().nan_to_num(7.0))
    torch.manual_seed(0)
    small = (0.02 * torch.randn(300, 40)).half()
    torch.set_flush_denormal(True)
    y = kernel.sparse_gemv(1e-3 * torch.ones(1, 300), small, 0.0, "c")
    torch.set_flush_denormal(False)
    assert distance(y, 1e-3 * small.double().sum(0)[None]) < 2**-9


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """kernel.py as in a new process, with an empty cache folder, which is returned."""
    monkeypatch.setenv("MINTEAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    forget()
    yield tmp_path / "cache"
    forget()


def forget():
    for cached in (kernel.compiled, kernel.c_function, kernel.say_once):
        cached.cache_clear()


def seven():
    return kernel.compiled("int seven(void) { return 7; }").seven()


def test_without_a_compiler_torch_takes_over(monkeypatch, fresh, capfd):
    monkeypatch.setenv("MINTEAL_CACHE", "off")
    x = torch.randn(2, 30)
    weight_t = torch.randn(30, 9)
    assert kernel.best_backend(x) == "torch"
    assert distance(kernel.sparse_gemv(x, weight_t, 0.5), drop(x, 0.5) @ weight_t) < 1e-5
    assert distance(kernel.dense(x, weight_t), x @ weight_t) < 1e-5
    with pytest.raises(ValueError, match='backend "c" needs a C compiler'):
        kernel.sparse_gemv(x, weight_t, 0.5, "c")
    assert capfd.readouterr().err == ""


@needs_c
@pytest.mark.parametrize("variable, value, said", [
    ("CC", "/nowhere/cc", "set CC"), ("CC", "false", "set CC"), ("CC", "a b/cc", "set CC"),
    ("CC", "cc -no-such-option", "set CC"),
    ("MINTEAL_CACHE", "/dev/null/cache", "Set MINTEAL_CACHE"),
    ("MINTEAL_CACHE", "/proc/cache", "Set MINTEAL_CACHE"),
])
def test_a_setting_that_fails_is_named_once_and_got_round(variable, value, said, monkeypatch, fresh,
                                                          capfd):
    monkeypatch.setenv(variable, value)
    assert seven() == 7
    assert kernel.compiled("int eight(void) { return 8; }").eight() == 8
    line, = capfd.readouterr().err.splitlines()
    assert value in line and said in line


@needs_c
def test_each_cc_and_each_processor_has_a_library_of_its_own(monkeypatch, fresh, capfd):
    """A CC may have arguments, and blanks in its path."""
    blank = fresh.parent / "my tools" / "cc"
    blank.parent.mkdir()
    blank.write_text(f'#!/bin/sh\nexec {COMPILER} -DANSWER=3 "$@"\n')
    blank.chmod(0o755)
    source = "#ifndef ANSWER\n#define ANSWER 1\n#endif\nint answer(void) { return ANSWER; }"
    for asked, answer in [("", 1), (f"{COMPILER} -DANSWER=2", 2), (str(blank), 3),
                          (f"'{blank}' -DOTHER", 3)]:
        forget()
        monkeypatch.setenv("CC", asked)
        assert kernel.compiled(source).answer() == answer
    assert len(list(fresh.iterdir())) == 4 and capfd.readouterr().err == ""
    monkeypatch.setattr(kernel, "processor", lambda: "another")
    forget()
    assert kernel.compiled(source).answer() == 3
    assert len(list(fresh.iterdir())) == 5


@needs_c
def test_a_library_that_does_not_load_is_built_anew(fresh):
    assert seven() == 7
    library, = fresh.iterdir()
    library.unlink()                     # what is loaded must not be written to
    library.write_bytes(b"damaged")
    forget()
    assert seven() == 7
    assert library.stat().st_size > 1000


@needs_c
@pytest.mark.skipif(platform.machine() != "x86_64", reason="options of x86")
@pytest.mark.parametrize("options", ["-mno-avx512f", "-mno-avx"])
def test_c_without_the_newest_instructions(options, monkeypatch, fresh):
    monkeypatch.setenv("CC", f"{COMPILER} {options}")
    for seed in range(24):
        case = gemv_case(seed)
        assert_right(kernel.sparse_gemv(*case, "c"), *case)
    test_every_float16_and_bfloat16_is_widened_exactly()


def test_time_shape_and_what_it_measures(monkeypatch, capsys):
    cpu = torch.device("cpu")
    times = iter([1, 5, 2, 4, 3, 9, 9])
    assert kernel.median_time(lambda i: next(times), cpu, 0) > 0
    first, second = kernel.copies_of(300, 8, torch.float16, cpu, 0)
    assert first.shape == (300, 8) and first.dtype == torch.float16 and not first.equal(second)
    x = torch.tensor([[-3.0, 1.0, 2.0, -4.0]])
    for sparsity, count in ((0, 4), (0.5, 2), (1, 0)):
        assert kernel.kept(x, kernel.threshold_dropping(x, sparsity)).sum() == count
    monkeypatch.setattr(kernel, "median_time", lambda call, *_: call(0) is None or 1e-3)
    ways = list(kernel.time_shape(512, 96, torch.bfloat16, cpu, [0, 0.5], total=0))
    assert ways == ["F.linear", "torch.mv", "x @ weight_t", "ours, 0%", "ours, 50%"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "512 x 96 bfloat16, 0 MB" and len(lines) == 8 and "1.00x" in lines[-1]
    assert kernel.instructions()


# --------------------------------------------------------------------------------------------------
# sparsify.py

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_modes(dtype, tolerance):
    model = tiny_model(dtype)
    tokens = tokens_of(model, 2, 10)
    thresholds = some_thresholds(model)
    one_by_one = [1] * 10
    dense = model(tokens)
    dropped = by_hand(model, tokens, thresholds)
    prefixed = by_hand(model, tokens, thresholds, prefix=4)
    assert distance(dropped, dense) > 0.01
    names = [name for name, _ in model.named_parameters()]
    assert sparsify.sparsify(model, thresholds) is model
    assert [name.removesuffix("_t") for name, _ in model.named_parameters()] == names
    zeros = torch.zeros_like(model.sparse_state.thresholds)
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
    assert not hasattr(sparsify.sparsify(tiny_model(), none), "sparse_state")


def test_the_tokens_of_a_call_decide_for_every_linear():
    """Even for a head that reads one of them: a prompt's logits are dense, a step's are sparse."""
    dense = tiny_model()
    tokens = tokens_of(dense, 1, 6)
    prompt = tokens[:, :5]
    model = sparse_model({"lm_head": 0.8})
    cache = model.make_cache(1, 6)
    assert distance(model(prompt, cache, last_only=True), dense(prompt)[:, -1:]) < 1e-12
    expected = by_hand(dense, tokens, {"lm_head": 0.8})[:, -1:]
    assert distance(expected, dense(tokens)[:, -1:]) > 0.01
    assert distance(model(tokens[:, 5:], cache), expected) < 1e-12


def test_realised_sparsity_counts_what_is_not_read():
    model = tiny_model()
    name = "model.layers.1.mlp.down_proj"
    tokens = tokens_of(model, 1, 8)
    inputs = inputs_of(model, name, lambda: model(tokens))
    block = sum(outputs * inputs for outputs, inputs in block_linears(model.config).values())
    expected = (inputs.abs() <= 0.3).double().mean().item() * 56 * 32 / (3 * block)
    sparsify.sparsify(model, {name: 0.3})
    assert realised_sparsity(model) == 0
    # 8 rows are the kernel's work, 16 are not. A call of 8 tokens is dense in mode "decode".
    for where, batch, pieces, share in [("all", 1, [8], expected), ("decode", 1, [1] * 8, expected),
                                        ("all", 2, [8], expected), ("decode", 1, [8], 0)]:
        with counted(model), sparse_mode(model, where):
            stepwise(model, tokens.repeat(batch, 1), pieces)
        assert realised_sparsity(model) == pytest.approx(share)
    text = tokens[0].tolist()
    with counted(model):
        stepwise(model, tokens[:, :-1], [3, 1, 1, 1, 1])
    expected = realised_sparsity(model)
    assert sparsify.skipped_share(model, text, 3) == pytest.approx(expected)


def test_thresholds_that_do_not_fit_change_nothing():
    names = names_of(tiny_model())
    model = tiny_model()
    for thresholds, message in [
        ({"lm_tail": 0.1}, "lm_tail, which is not a linear"),
        ({"model.norm": 0.1}, "not a linear of this model"),
        ({names[0]: torch.zeros(5)}, r"shape \(5,\), expected finite numbers, \(\) or \(32,\)"),
        ({names[0]: 0.5, names[1]: float("nan")}, "expected finite numbers"),
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
    with refused(match="expected finite numbers"):
        sparsify.sparsify(model, {names[0]: 0.9, names[1]: float("inf")})
    assert (model.sparse_state.thresholds == 0.1).all()


def test_a_tied_head_can_be_sparse_and_stays_one_weight():
    dense = tiny_model(tie_word_embeddings=True)
    tokens = tokens_of(dense, 2, 6)
    model = sparse_model({"lm_head": 0.5}, tie_word_embeddings=True)
    embedding = model.model.embed_tokens
    assert embedding.weight_t is model.lm_head.weight_t
    assert torch.equal(embedding.weight, dense.lm_head.weight)
    with counted(model), sparse_mode(model, "all"):
        assert distance(model(tokens), by_hand(dense, tokens, {"lm_head": 0.5})) < 1e-12
    assert realised_sparsity(model) == 0                   # which is of the blocks


def test_perplexity():
    dense = tiny_model()
    tokens = tokens_of(dense, 40)
    windows = windows_of(tokens, 12)                       # 3: a fourth would need 49 tokens

    def expected(logits, windows):
        return pytest.approx(F.cross_entropy(logits.mT, windows[:, 1:]).exp().item())

    assert windows.shape == (3, 13)
    whole = expected(dense(windows[:, :-1]), windows)
    assert perplexity(dense, tokens, 12) == whole
    model = sparse_model()
    with sparse_mode(model, "off"):
        assert perplexity(model, tokens, 12) == whole
    logits = by_hand(dense, tokens[None, :12], some_thresholds(dense), prefix=3)
    assert perplexity(model, tokens[:13], 12, dense_prefix=3) == expected(logits, windows[:1])
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
    tiny = torch.randn(1000) * 1e-8      # below the scale: nothing but zeros is dropped
    assert calibrate.quantile(calibrate.histogram(tiny), 0.5) <= tiny.abs().median()


def test_the_first_tokens_of_a_window_are_left_out(calibrated):
    model, tokens, calibration = calibrated
    windows = windows_of(tokens, 16)[:, :-1]
    inputs = inputs_of(model, "model.layers.1.mlp.down_proj",
                       lambda: [model(part) for part in windows.split(calibrate.BATCH)])
    assert calibration.counts.shape == (3, 4, BINS)
    assert torch.equal(calibration.counts[1, 3], calibrate.histogram(inputs[:, SINKS:]))


def test_every_allocation_reaches_its_target(calibrated):
    _, tokens, calibration = calibrated
    assert calibration.allocations == ["greedy", "uniform"]
    _, sizes = calibration.sizes()
    for allocation in calibration.allocations:
        for sparsity in (0.0, 0.25, 0.5, 0.8, 0.95):
            shares = calibration.sparsities(sparsity, allocation)
            assert (shares @ sizes).mean().item() == pytest.approx(sparsity, abs=1e-6)
            model = sparse_model(calibration.thresholds(sparsity, allocation), torch.float32)
            perplexity(model, tokens, 16, dense_prefix=SINKS)
            # Not exact: with inputs dropped before them, the inputs of later layers are others.
            assert realised_sparsity(model) == pytest.approx(sparsity, abs=0.04)


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
    counts = calibration.counts[0]
    path = calibrate.greedy_path(block, x, context, counts, sizes)
    steps = path.diff(dim=0)
    assert (path[0] == 0).all() and (path < 1).all()
    assert ((steps > 0).sum(1) == 1).all()
    assert (steps @ sizes).tolist() == pytest.approx([0.01] * 90)
    table = calibration.tables["greedy"]
    assert table.levels.tolist() == pytest.approx([i / 100 for i in range(1, 91)])
    assert torch.allclose(table.shares[:, 0].double(), path[1:], atol=1e-6)
    exact = block(x, context)[:, 16:]

    def error_of(shares):
        with contextlib.ExitStack() as hooks:
            for linear, share in zip(LINEARS, shares):
                threshold = calibrate.quantile(counts[calibrate.SITE_OF[linear]], share).item()
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
    with refused(match="made for another model: intermediate_size is 56 in it, 60 in the model"):
        loaded.check(tiny_model(intermediate_size=60))
    for sparsity in (-0.1, 1.0, float("nan")):
        with refused(match="expected at least 0 and below 1"):
            loaded.thresholds(sparsity)
    half = torch.rand(1, 3, 7)
    loaded.tables["half"] = Table(torch.tensor([0.5]), half)         # as a chapter adds one
    loaded.save(tmp_path / "x")
    loaded = Calibration.load(tmp_path / "x")
    assert loaded.allocations == ["half", "greedy", "uniform"]
    assert torch.allclose(loaded.sparsities(0.3), 0.6 * half[0].double())
    assert loaded.thresholds(0.3) == loaded.thresholds_at(0.6 * half[0].double())
    del loaded.tables["greedy"]
    with refused(match="'greedy' is not in .* greedy is made by python calibrate.py --greedy"):
        loaded.thresholds(0.5, "greedy")
    write_safetensors(tmp_path / "x", {"x": torch.zeros(1)})
    with refused(match="not a calibration of this version: format is None"):
        Calibration.load(tmp_path / "x")


def test_a_file_of_an_earlier_version_is_read_without_its_channel_weights(calibrated, tmp_path):
    calibrated[2].save(tmp_path / "x")
    metadata = read_header(tmp_path / "x")[1]
    old = {"fingerprint": torch.zeros(256), "distributions mine": torch.ones(3, 7, BINS),
           "levels mine": torch.zeros(0), "shares mine": torch.zeros(0, 3, 7),
           "weights mine model.layers.0.mlp.up_proj": torch.ones(32)}
    tables = json.loads(metadata["tables"]) | {"mine": "mine"}
    write_safetensors(tmp_path / "x", read_safetensors(tmp_path / "x") | old,
                      metadata | {"tables": json.dumps(tables)})
    loaded = Calibration.load(tmp_path / "x")
    assert loaded.allocations == ["greedy", "uniform"]
    assert loaded.thresholds(0.4) == calibrated[2].thresholds(0.4)


def spoil_table(calibration, **changes):
    calibration.tables["greedy"] = calibration.tables["greedy"]._replace(**changes)


@pytest.mark.parametrize("spoil", [
    lambda c: c.counts[1, 2].zero_(),
    lambda c: setattr(c, "counts", torch.ones(3, 4, 5).long()),
    lambda c: c.shapes.pop("num_hidden_layers"),
    lambda c: setattr(c, "shapes", []),
    lambda c: c.tables.clear(),
    lambda c: spoil_table(c, shares=torch.zeros(3, 4, 5)),
    lambda c: spoil_table(c, shares=torch.full((90, 3, 7), math.nan)),
    lambda c: spoil_table(c, shares=torch.ones(90, 3, 7)),
    lambda c: spoil_table(c, levels=torch.ones(90)),
])
def test_a_damaged_calibration_is_refused(calibrated, tmp_path, spoil):
    calibrated[2].save(tmp_path / "x")
    damaged = Calibration.load(tmp_path / "x")
    spoil(damaged)
    damaged.save(tmp_path / "x")
    with refused(match="a damaged calibration .*; make it with: python calibrate.py"):
        Calibration.load(tmp_path / "x")


def test_what_cannot_be_calibrated():
    broken = tiny_model(torch.float32)
    broken.model.layers[1].input_layernorm.weight[3] = float("nan")
    tokens = tokens_of(broken, 100)
    for model, tokens, context, message in [
        (sparse_model(), tokens, 16, "this one was made sparse"),
        (broken, tokens, 16, "the activations hold NaN or infinity"),
        (tiny_model(), tokens, 4, "a window of 4 tokens leaves none after the first 4"),
        (tiny_model(), torch.tensor([99] * 20), 16, "token id 99 is outside"),
    ]:
        with refused(match=message):
            calibrate.calibrate(model, tokens, context)


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
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_end_a_text(value, temperature):
    def spoiled(model, cache, tokens=1):
        """Return a step whose logits at position 6 are no numbers."""
        def step(tokens):
            start = cache.used
            logits = model(tokens, cache)
            logits[:, torch.arange(start, cache.used) == 6] = value
            return logits
        return step

    settings = {"temperature": temperature, "seed": 3}
    poisoned = tiny_model()
    poisoned.model.embed_tokens.weight[2] = value
    for function in (generate.generate,
                     functools.partial(generate.generate_speculative, draft=tiny_model())):
        text = []
        with refused(match="position 6 of the text are NaN or .*bfloat16 or float32"):
            text.extend(function(tiny_model(), [1, 2, 3], 9, make_step=spoiled, **settings))
        assert len(text) == 4 or function is not generate.generate       # positions 3 to 6
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
    (1.0, None, 0.75, [2 / 3, 1 / 3, 0.0, 0.0]),
    (1.0, 3, 0.6, [2 / 3, 1 / 3, 0.0, 0.0]),
    (2**-126, None, None, [1.0, 0.0, 0.0, 0.0]),
])
def test_probabilities(temperature, top_k, top_p, expected):
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    p = Sampling(temperature, top_k, top_p).probabilities(logits)
    assert torch.allclose(p, torch.tensor(expected))


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-50, 1e-39])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature):
    model, draft = (tiny_model(torch.float32, seed) for seed in (0, 1))
    settings = dict(temperature=temperature, seed=0)
    expected = greedy(model, [1, 2], 9)
    assert greedy(model, [1, 2], 9, **settings) == expected
    assert [*generate.generate_speculative(model, [1, 2], 9, draft, **settings)] == expected


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


def test_sampling_repeats_with_a_seed_and_follows_the_distribution():
    model = tiny_model()
    seeds = {generate.random_source(model, None).initial_seed() for _ in range(64)}
    assert len(seeds) == 64              # and what is drawn can be given:
    assert all(generate.random_source(model, seed).initial_seed() == seed for seed in seeds)
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
    memory = static.positions, static.slots, static.mask
    logits = []
    for part in tokens[:, 2:].split(T, dim=1):
        static.follow(cache, T, window)
        logits.append(model(part, static))
        cache.advance(T)
    assert distance(torch.cat(logits, 1), expected) < 1e-12
    after = static.positions, static.slots, static.mask
    assert all(own is other for own, other in zip(memory, after))
    cache.used = 20
    with refused(match=f"{T} tokens do not fit a cache of 20 positions"):
        static.follow(cache, T, window)


def test_every_step_is_one_of_make_step():
    passes, steps = [], []               # (model, tokens) of all passes, and of those by a step

    def make_step(model, cache, tokens=1):
        def step(tokens):
            steps.append((model, tokens.shape[1]))
            return model(tokens, cache)
        return step

    model, draft = (tiny_model(vocab_size=13, seed=seed) for seed in (0, 1))
    for each in (model, draft):
        each.register_forward_pre_hook(lambda of, inputs: passes.append((of, inputs[0].shape[1])))
    prompt = [1, 2, 3, 4, 5]
    text = greedy(model, prompt, 8, make_step=make_step)
    assert steps == [(model, 1)] * 7
    assert passes == [(model, 5), *steps]
    passes.clear()
    steps.clear()
    run = generate.generate_speculative(model, prompt, 8, draft, None, 2, make_step=make_step)
    assert list(run) == text
    assert passes == [(model, 5), (draft, 6), *steps]


@needs_gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("where", ["off", "decode", "all"])
def test_graphs_on_a_gpu_do_what_the_model_does(where, window):
    model, draft = (tiny_model(torch.float32, seed, vocab_size=13, sliding_window=window).to(DEVICE)
                    for seed in (0, 1))
    sparsify.sparsify(model, dict.fromkeys(names_of(model), 0.2))
    with sparse_mode(model, where):
        plain = greedy(model, [1, 2, 3], 40, make_step=generate.plain_step)
        assert greedy(model, [1, 2, 3], 40) == plain
    for guesser in ("sparse", draft) if where == "off" else ():
        for n in (1, 3, 12):
            assert plain == list(generate.generate_speculative(
                model, [1, 2, 3], 40, guesser, None, n))


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

    def speculate(n=3, max_new_tokens=count, draft=draft, **options):
        return generate.generate_speculative(model, prompt, max_new_tokens, draft, thresholds, n,
                                             **options)
    return model, prompt, plain, speculate


@pytest.mark.parametrize("kind", [*KINDS, "drawn", "wrong"])
def test_speculative_greedy_is_plain_greedy(kind):
    shares = []                          # of tokens that were guessed right
    for length in (1, 9, 30):            # the context ends before the text that follows the last
        _, _, plain, speculate = case(kind, length, max_position_embeddings=48)
        for n in (1, 3, 7, 12, None):
            run = speculate(n)
            assert list(run) == plain
            assert run.against == "the dense model"
            did = run.statistics
            assert did.passes <= did.tokens == len(plain) - 1              # one is the prompt's
            shares.append(1 - did.passes / did.tokens)
    if kind == "wrong":
        assert max(shares) == 0
    elif kind != "drawn":
        assert 0.2 < sum(shares) / len(shares) < 1
    for window in (2, 5, 12):
        _, _, plain, speculate = case(kind, 9, model_type="mistral", sliding_window=window)
        assert list(speculate(1)) == list(speculate(4)) == list(speculate(7)) == plain


@pytest.mark.parametrize("kind", KINDS)
def test_speculation_stops_inside_an_accepted_run(kind):
    _, _, plain, speculate = case(kind, threshold=0.0, noise=0.0)          # all is accepted
    for eos in set(plain):
        assert list(speculate(7, eos_ids=(eos,))) == plain[:plain.index(eos)]
    for limit in range(1, 12):
        assert list(speculate(7, limit)) == plain[:limit]


def test_a_draft_model_may_have_a_shorter_context():
    model, _, plain, speculate = case("model")
    draft = disturbed(model, 0.0)
    for context in (12, 3):              # one that ends in the text, one in the prompt
        draft.config.max_position_embeddings = context
        run = speculate(7, draft=draft)
        assert list(run) == plain
        assert run.statistics.passes > 10


@pytest.mark.parametrize("kind", [*KINDS, "wrong"])
def test_a_rejected_draft_leaves_the_cache_as_it_was(kind):
    model, prompt, plain, speculate = case(kind, 6)
    run = speculate(5)
    text = [next(run) for _ in range(15)]
    assert run.statistics.tokens < 6 * run.statistics.passes
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
        plain = [greedy(model, prompt, 15) for prompt in prompts]
    runs = [generate.generate_speculative(model, prompt, 20, "sparse", sparser, 3)
            for prompt in prompts]
    texts = [], []
    for _ in range(15):
        for run, text in zip(runs, texts):
            text.append(next(run))
            assert state.mode == "decode"
            assert torch.equal(state.thresholds, before)
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
    draft, thresholds = draft_of(kind, model, threshold=0.8, noise=0.6)
    run = generate.generate_speculative(model, [0], length, draft, thresholds, 3, seed=1,
                                        **SAMPLING)
    text = torch.tensor(list(run))
    assert 1.1 < run.statistics.tokens_a_pass < 3.9        # p and q differ, and meet
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
    logits = model(torch.tensor([[1, 2, 3, *guesses[:3]]]))[0, 2:]
    assert torch.allclose(q, sampling.probabilities(logits))
    assert (q[range(4), guesses] > 0).all()


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
    train, held_out = (dict(corpus.files(part)) for part in ("train", "held-out"))
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
        if "\u2581" not in text:         # SentencePiece's own sign for a space
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

def test_the_demo_runs(run, monkeypatch):
    monkeypatch.setattr(kernel, "median_time", lambda call, *_, **more: call(0) is None or 1e-3)
    out = run("generate.py", "--max-new-tokens", 16)
    for line in ("--- dense: 16 tokens", "--- 50% sparse: 16 tokens", r"sparse over dense: \d.*x",
                 r"(4\d|5\d)\.\d% of the blocks' weights skipped: 7.\d MB read a token, of 13.1",
                 "4096 x 11008 bfloat16"):
        assert re.search(line, out)
    assert out.count("class Stack:") == 2
    last = out.strip().splitlines()[-1]
    assert "random:llama-3.2-1b" in last and "beyond" not in last


@pytest.mark.parametrize("draft", ["sparse", "demo"])
def test_the_demo_speculates(run, draft):
    out = run("generate.py", "--draft", draft, "--compare", "--dtype", "float32",
              "--max-new-tokens", 24)
    assert "the same text, all 24 tokens" in out or "the two best logits are" in out
    assert "lossless against the dense model: " in out
    assert "speculative over plain: " in out
    err = run.fails("generate.py", "--draft", draft, "--sparsity", 0.5)
    assert "a sparse verifier, is for python -m beyond" in err


def test_a_checkpoint_from_calibration_to_text(run, tmp_path):
    tiny_model(torch.float32, vocab_size=4096).save_pretrained(tmp_path)
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("import os\nfor i in range(10):\n    print(i, os)\n" * 40)
    err = run.fails("generate.py", "--model", tmp_path)
    assert f"make one with: python calibrate.py --model {tmp_path}" in err
    out = run("calibrate.py", "--model", tmp_path, "--text", text, "--greedy")
    assert "text.txt; allocations: greedy, uniform" in out
    assert not list(tmp_path.glob("*.greedy"))             # nothing unfinished is left
    out = run("sparsify.py", "--model", tmp_path, "--text", text, "--tokens", 400,
              "--sparsity", 0.25, 0.5)
    rows = [" ".join(line.split()[:2]) for line in out.splitlines()[2:]]
    assert rows == ["dense 0%", "uniform 25%", "uniform 50%", "greedy 25%", "greedy 50%"]
    out = run("generate.py", "--model", tmp_path, "--sparsity", 0.4, "--seed", 1,
              "--allocation", "uniform", "--temperature", 1, "--max-new-tokens", 4)
    assert "40% sparse: 4 tokens" in out
    assert 30 < float(re.search(r"([\d.]+)% of the blocks' weights skipped", out)[1]) < 50


def test_random_weights_are_calibrated_as_they_are(run, monkeypatch):
    monkeypatch.setitem(llama.PRESETS, "small", llama.preset(64, 96, 2, 4, 2, 50, 256, 1e4))
    out = run("generate.py", "--model", "random:small", "--max-new-tokens", 8)
    assert "random weights, for speed alone" in out
    assert "50% sparse: 8 tokens" in out
    err = run.fails("generate.py", "--model", "random:small", "--prompt", "x")
    assert "random weights and no tokenizer" in err


@pytest.mark.parametrize("folder, parameters", [           # and the published numbers
    (DEMO, "6,557,440"), ("random:llama-2-7b", "6,738,415,616"),
    ("random:llama-3.2-1b", "1,235,814,400")])
def test_model_prints_the_shape_of_a_checkpoint(run, folder, parameters):
    out = run("model.py", folder)
    assert parameters in out
    assert "sparsity can skip from attention and MLP" in out


@pytest.mark.parametrize("file", [*(f"{name}.py" for name in CORE), "demo/train.py"])
def test_help(run, file):
    usage, options = run(file, "--help").split("options:")
    assert "usage:" in usage
    options = re.split(r"\n  (?=-)", options)[2:]          # after --help
    assert [option for option in options if "default" not in option] == []


@pytest.mark.parametrize("command, message", [
    (["model.py", "nowhere"], "config.json: cannot be read: No such file or directory"),
    (["kernel.py", "--device", "warp"], "device warp cannot be used"),
    (["kernel.py", "--shapes", "gpt"], "--shapes: invalid choice: 'gpt'"),
    (["sparsify.py", "--calibration", "nowhere"], "nowhere: no calibration"),
    (["sparsify.py", "--model", RANDOM], "random weights"),
    (["sparsify.py", "--text", "nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
    (["sparsify.py", "--tokens", "100"], "the text has 100 tokens, a window of 512 needs 513"),
    (["sparsify.py", "--tokens", "0"], "0 is not a whole number above 0"),
    (["sparsify.py", "--sparsity", "1.5"], "--sparsity: 1.5, expected at least 0 and below 1"),
    (["sparsify.py", "--context", "4000"], "does not fit the model's context of 512"),
    (["calibrate.py", "--model", RANDOM], "random weights"),
    (["calibrate.py", "--text", DEMO / "model.safetensors"], "not UTF-8 text"),
    (["calibrate.py", "--import-teal", "x"], "python -m beyond.teal --model demo x"),
    (["calibrate.py", "--out", "nowhere/x"], "nowhere/x: cannot be written there; see --out"),
    (["--model", "nowhere"], "nowhere: no such folder"),
    (["--model", HERE], "no tokenizer: neither tokenizer.model nor tokenizer.json"),
    (["--model", "random:gpt"], "preset 'gpt' is not known"),
    (["--model", RANDOM, "--draft", "sparse"], "python -m beyond.lab.costs shows"),
    (["--device", "meta"], "device meta cannot be used"),
    (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    (["--prompt", "\udcff"], "surrogates not allowed"),
    (["--prompt", "x " * 2000], "the model's context holds 512"),
    (["--max-new-tokens", "-3"], "-3 is not a whole number above 0"),
    (["--seed", "9" * 30], "seed is 999"),
    (["--sparsity", "1"], "--sparsity: 1, expected at least 0 and below 1"),
    (["--sparsity", "half"], "--sparsity: invalid share value: 'half'"),
    (["--allocation", "other"], "allocation 'other' is not in this calibration"),
    (["--calibration", DEMO / "config.json"], "config.json: "),
    (["--top-p", "2"], "top_p is 2.0"),
    (["--temperature", "0", "--top-p", "0"], "top_p is 0.0"),
    (["--draft", "nowhere"], "nowhere: no such folder"),
    (["--draft", "sparse", "--draft-sparsity", "1"], "--draft-sparsity: 1, exp"),
    (["--draft", "demo", "--draft-sparsity", "0.5"], "is for --draft sparse"),
    (["--draft", "sparse", "--draft-tokens", "0"], "0 is not a whole number above"),
    (["--draft-tokens", "3"], "--compare and --draft-tokens are for --draft"),
    (["--compare"], "--compare and --draft-tokens are for --draft"),
    (["--unheard-of"], "unrecognized arguments: --unheard-of"),
    (["demo/train.py", "--tokens", "5"], "expected at least the 4096 of a step"),
])
def test_bad_input_on_the_command_line(run, command, message):
    if command[0].startswith("--"):
        command = ["generate.py", *command]
    err = run.fails(*command)
    assert message in err
    assert err.startswith(f"{Path(command[0]).name}: error: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("code, redirection, status, said", [
    ("sys.argv.append('absent'); model.command_line(model.main)", "", 2,
     "-c: error: absent/config.json: cannot be read: No such file or directory\n"),
    ("model.command_line(model.main)", ">&-", 2, "-c: error: standard output is closed\n"),
    ("model.command_line(model.main)", ">/dev/full", 2,
     "-c: error: [Errno 28] No space left on device\n"),
    ("model.command_line(model.main)", "2>&-", 0, ""),
    ("model.command_line(model.main)", "<&-", 0, ""),
    ("raise KeyboardInterrupt", "", 130, ""),              # while torch is loaded: no traceback
])
def test_commands_elsewhere_and_with_closed_streams(tmp_path, code, redirection, status, said):
    command = f'{sys.executable} -c "import sys, model; {code}" {redirection}'
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path,
                           env=os.environ | {"PYTHONPATH": str(HERE)})
    assert ended.stderr == said and (ended.returncode == status or status == 130)
    assert bool(ended.stdout) == (status == 0)


def test_what_nobody_can_read_stops_no_work(monkeypatch):
    full = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stderr", full)
    monkeypatch.setattr(llama.time, "perf_counter", iter(range(0, 900, 100)).__next__)
    assert list(llama.progress([1, 2, 3], "a line after each")) == [1, 2, 3]


def test_a_draft_model_needs_the_same_tokenizer():
    def tokenizer(*pieces):
        return SimpleNamespace(eos_ids=(), pieces=lambda: list(pieces))

    arguments = generate.settle(generate.make_parser().parse_args([]))
    writer = generate.Writer(arguments, tiny_model(), tokenizer("a", "b"))
    for other in (tokenizer("a", "c"), tokenizer("a", "b", "c"), None):
        writer.load_model = lambda *_: (tiny_model(), other)
        with refused(match="--draft x: its tokenizer is not the model's"):
            writer.load_draft("x")
    writer.load_model = lambda *_: (tiny_model(), tokenizer("a", "b"))
    assert isinstance(writer.load_draft("x"), Llama)


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


@pytest.mark.parametrize("seconds", [0.3, 0.8])
def test_ctrl_c_in_the_first_seconds_leaves_no_traceback(seconds):
    command = subprocess.Popen([sys.executable, HERE / "generate.py"], stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True)
    time.sleep(seconds)
    command.send_signal(signal.SIGINT)
    assert "Traceback" not in command.communicate()[1]
    assert command.returncode != 0


def test_the_lines_of_the_readme_print_what_stands_below_them(monkeypatch):
    monkeypatch.chdir(HERE)
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    runner = doctest.DocTestRunner()
    runner.run(doctest.DocTestParser().get_doctest(lines, {}, "README.md", None, None))
    assert runner.failures == 0 and runner.tries > 15


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
