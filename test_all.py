"""What must stay true of the core, file by file: a specification to read.

    pytest test_all.py        about a minute on two cores

Without a GPU the Triton kernels run in Triton's interpreter. What is compared with transformers is
skipped where it is not installed. The chapters of beyond/ have tests of their own.
"""
import ast
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
from generate import (ModelDraft, Sampling, StaticCache, Statistics, StreamDecoder,
                      generate_speculative)
from model import (Config, InputError, KVCache, Llama, block_linears, linear_names, load_tokenizer,
                   read_header, read_safetensors, windows_of, write_safetensors)
from sparsify import SparseLinear, perplexity, quality, realised_sparsity, reset_counts, sparse_mode

HERE = Path(__file__).parent
DEMO = HERE / "demo"
CORE = ["model", "kernel", "sparsify", "calibrate", "generate"]        # each imports earlier ones
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

needs_c = pytest.mark.skipif(not kernel.fits_c(torch.zeros(1)), reason="no C compiler")
needs_triton = pytest.mark.skipif(kernel.triton is None, reason="no Triton")
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


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
        if parameter.ndim == 2:
            parameter.copy_(noise * 1.5 * parameter.shape[1] ** -0.5)
        else:
            parameter.copy_(1 + 0.2 * noise)
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
        inputs = model.get_submodule(name).in_features
        each = torch.rand(inputs, generator=generator)
        thresholds[name] = [0.4, torch.tensor(0.2), each][i % 3]
    return thresholds


def sparse_model(thresholds=None, dtype=torch.float64, **changes):
    """Return a tiny model made sparse; thresholds: a number for all linears, a dict, or None."""
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
        def pre_hook(module, inputs, threshold=threshold):
            x = inputs[0]
            return torch.cat((x[:, :prefix], drop(x[:, prefix:], threshold)), 1)
        hooks.append(model.get_submodule(name).register_forward_pre_hook(pre_hook))
    logits = model(tokens)
    for hook in hooks:
        hook.remove()
    return logits


def stepwise(model, tokens, pieces):
    """Return the logits of tokens (B, T), so many at a time, through a cache."""
    cache = model.make_cache(*tokens.shape)
    return torch.cat([model(part, cache) for part in tokens.split(pieces, dim=1)], 1)


def close(actual, expected, tolerance):
    """Return whether ‖actual - expected‖ / ‖expected‖ is within tolerance; NaN never is."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-30)
    return actual.shape == expected.shape and bool(error <= tolerance)


class Ended:
    """How a command ended: its exit status, and what it wrote."""

    def __init__(self, status, captured):
        self.status = status
        self.out, self.err = captured


@pytest.fixture
def run(capsys, monkeypatch):
    """Return a function(file, *options) that runs a file of ours as a script, in this process."""
    def run_file(file, *options):
        monkeypatch.setattr(sys, "argv", [file, *map(str, options)])
        status = 0
        capsys.readouterr()
        try:
            with torch.enable_grad():
                runpy.run_path(str(HERE / file), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
        return Ended(status, capsys.readouterr())
    return run_file


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """(model, tokens, its calibration with both allocations): not to be changed."""
    model = tiny_model(torch.float32)
    tokens = tokens_of(model, 1500)
    calibration = calibrate.calibrate(model, tokens, 16, "a test")
    calibrate.add_greedy(calibration, model, tokens)
    return model, tokens, calibration


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A checkpoint of a tiny model with the demo's tokenizer, and no calibration."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(torch.float32, vocab_size=4096).save_pretrained(folder)
    shutil.copy(DEMO / "tokenizer.model", folder)
    (folder / "text.txt").write_text("import os\nfor i in range(10):\n    print(i, os)\n" * 40)
    return folder


# --------------------------------------------------------------------------------------------------
# model.py: safetensors

def write_raw(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in llama.DTYPE_NAMES}
    tensors["empty"] = torch.zeros(0, 4)
    tensors["scalar"] = torch.tensor(7.0)
    tensors["transposed"] = torch.randn(4, 3).t()
    write_safetensors(path, tensors, {"written by": "a test"})
    read = read_safetensors(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert read_header(path)[1] == {"written by": "a test"}


def test_safetensors_is_mapped_privately(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": torch.arange(8.0)})
    before = path.read_bytes()
    read_safetensors(path)["x"].zero_()
    assert path.read_bytes() == before


@needs_linux
def test_a_file_of_many_tensors_is_mapped_once(tmp_path):
    dtypes = (torch.uint8, torch.int16, torch.float32)
    tensors = {f"t{i}": torch.full((1 + i % 5,), i % 251, dtype=dtypes[i % 3]) for i in range(1500)}
    write_safetensors(tmp_path / "many", tensors)
    read = read_safetensors(tmp_path / "many")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert Path("/proc/self/maps").read_text().count(str(tmp_path / "many")) == 1


def test_safetensors_unaligned_data(tmp_path):
    raw = json.dumps({"x": X}).encode()
    raw += b" " * ((3 - len(raw)) % 8)                     # data begins 3 bytes past a multiple of 8
    path = write_raw(tmp_path / "x.safetensors", raw, struct.pack("<ff", 1.5, -2.0))
    assert read_safetensors(path)["x"].tolist() == [1.5, -2.0]


X = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
REPEATED = b'{"x": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'


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
    ({"x": X | {"shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}}, b"", None,
     "larger than any memory"),
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
    path = write_raw(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(InputError) as error:
        read_safetensors(path)
    assert message in str(error.value)
    assert "bad.safetensors" in str(error.value)
    assert "\n" not in str(error.value)


def test_safetensors_too_short_or_absent(tmp_path):
    (tmp_path / "short").write_bytes(b"1234")
    with pytest.raises(InputError, match="truncated: 4 bytes"):
        read_safetensors(tmp_path / "short")
    with pytest.raises(InputError, match="absent: cannot be read"):
        read_safetensors(tmp_path / "absent")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": torch.ones(3)})

    def interrupt(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch.Tensor, "detach", interrupt)
        write_safetensors(path, {"x": torch.zeros(3)})
    assert read_safetensors(path)["x"].tolist() == [1, 1, 1]
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_file_larger_than_memory_can_be_opened(tmp_path):
    path = tmp_path / "large"
    size = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    write_raw(path, {"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    os.truncate(path, path.stat().st_size + size)          # a hole: it takes no disk
    assert read_safetensors(path)["x"][size - 1] == 0


def test_a_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder: cannot be written"):
        write_safetensors(tmp_path / "folder", {"x": torch.ones(2)})
    with pytest.raises(InputError, match="cannot be written: No such file"):
        write_safetensors(tmp_path / "absent" / "x", {"x": torch.ones(2)})
    with pytest.raises(InputError, match="complex64 cannot be written"):
        write_safetensors(tmp_path / "x", {"x": torch.zeros(2, dtype=torch.complex64)})
    assert os.listdir(tmp_path) == ["folder"]


# --------------------------------------------------------------------------------------------------
# model.py: the model

def reference_logits(model, tokens, activation=F.silu):
    """Return Llama's logits of tokens (T,), head by head and position by position, in float64."""
    config = model.config
    state = {name: parameter.double() for name, parameter in model.named_parameters()}
    D = config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def turn(v, position):                                 # RoPE as a product of complex numbers
        pairs = torch.complex(v[:D // 2], v[D // 2:])
        exponents = torch.arange(D // 2, dtype=torch.float64) * -2 / D
        angles = position * config.rope_theta ** exponents
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((pairs.real, pairs.imag))

    x = state["model.embed_tokens.weight"][tokens]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        w = {name: state[f"{prefix}{name}.weight"] for name in block_linears(config)}
        h = norm(x, state[f"{prefix}input_layernorm.weight"])
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
        h = norm(x, state[f"{prefix}post_attention_layernorm.weight"])
        gated = activation(h @ w["mlp.gate_proj"].T) * (h @ w["mlp.up_proj"].T)
        x = x + gated @ w["mlp.down_proj"].T
    tied = config.tie_word_embeddings
    head = state["model.embed_tokens.weight" if tied else "lm_head.weight"]
    return norm(x, state["model.norm.weight"]) @ head.T


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4},
    {"num_key_value_heads": 1, "rope_theta": 5e5, "head_dim": 8},
])
def test_logits_are_those_of_the_formula(changes):
    model = tiny_model(**changes)
    tokens = tokens_of(model, 9)
    expected = reference_logits(model, tokens)
    assert model(tokens[None]).dtype == torch.float64
    assert close(model(tokens[None])[0], expected, 1e-12)
    assert close(model.float()(tokens[None])[0], expected, 1e-5)
    assert model.bfloat16()(tokens[None]).dtype == torch.float32


def test_an_activation_is_named_in_one_place(monkeypatch):
    monkeypatch.setitem(llama.ACTIVATIONS, "gelu", F.gelu)
    model = tiny_model(hidden_act="gelu")
    tokens = tokens_of(model, 9)
    assert close(model(tokens[None])[0], reference_logits(model, tokens, F.gelu), 1e-12)
    assert not close(model(tokens[None])[0], reference_logits(model, tokens), 0.01)


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_cache_gives_the_logits_of_the_whole_sequence(dtype, tolerance):
    model = tiny_model(dtype)
    tokens = tokens_of(model, 2, 20)
    whole = model(tokens)
    for pieces in ([20], [1] * 20, [7, 1, 1, 5, 6]):
        assert close(stepwise(model, tokens, pieces), whole, tolerance)
    cache = model.make_cache(2, 20)
    model(tokens, cache)
    assert cache.used == 20
    cache.used = 11                                        # forget, and go on from there
    assert close(model(tokens[:, 11:], cache), whole[:, 11:], tolerance)
    assert close(model(tokens, last_only=True), whole[:, -1:], tolerance)


def test_a_cache_may_see_in_another_way():
    """Two continuations of one beginning, side by side in one call: each sees it and itself."""
    class Branches(KVCache):
        def look(self, T, window):
            sees = [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
            mask = torch.cat((torch.ones(3, self.used), torch.tensor(sees)), 1).bool()
            return torch.tensor([5, 5, 6]), mask

    model = tiny_model()
    beginning = tokens_of(model, 1, 5)
    cache = model.make_cache(1, 12)
    model(beginning, cache)
    cache.__class__ = Branches
    branches = model(torch.tensor([[7, 8, 9]]), cache)
    for row, path in enumerate(([7], [8], [7, 9])):
        alone = model(torch.cat((beginning, torch.tensor([path])), 1))
        assert close(branches[:, row], alone[:, -1], 1e-12)


def test_cache_and_vocabulary_have_limits():
    model = tiny_model()
    cache = model.make_cache(1, 4)
    model(tokens_of(model, 1, 2), cache)
    with pytest.raises(InputError, match="3 tokens do not fit a cache of 4 positions, 2 of them"):
        model(tokens_of(model, 1, 3), cache)
    with pytest.raises(InputError, match="token id 61 is outside the vocabulary of 61"):
        model(torch.tensor([[0, 61]]))
    with pytest.raises(InputError, match="token id -1 is outside"):
        model(torch.tensor([[-1, 60]]))


# --------------------------------------------------------------------------------------------------
# model.py: checkpoint folders

def save_sharded(model, folder, shards=2):
    """Write a checkpoint in shards, as the hub has large ones; return their weight_map."""
    folder.mkdir(exist_ok=True)
    tensors = dict(model.named_parameters())
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        write_safetensors(folder / shard, {name: tensors[name] for name in names[i::shards]})
        weight_map |= dict.fromkeys(names[i::shards], shard)
    index = {"metadata": {}, "weight_map": weight_map}
    llama.write_json(folder / "model.safetensors.index.json", index)
    model.config.write(folder, model.dtype)


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint_round_trip(tmp_path, tied):
    model = tiny_model(torch.float32, tie_word_embeddings=tied)
    tokens = tokens_of(model, 1, 12)
    model.save_pretrained(tmp_path / "whole")
    save_sharded(model, tmp_path / "sharded")
    for folder in ("whole", "sharded"):
        loaded = Llama.from_pretrained(tmp_path / folder)
        assert loaded.config == model.config
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert torch.equal(loaded(tokens), model(tokens))
    double = Llama.from_pretrained(tmp_path / "whole", dtype=torch.float64)
    assert double(tokens).dtype == torch.float64


def test_a_checkpoint_that_does_not_fit(tmp_path):
    model = tiny_model(torch.float32)
    save_sharded(model, tmp_path)
    tensors = dict(model.named_parameters())
    shard = tmp_path / "model-00001-of-00002.safetensors"
    whole = shard.read_bytes()
    names = sorted(tensors)[::2]
    other = sorted(tensors)[1]
    own = {name: tensors[name] for name in names}

    def refused(message):
        with pytest.raises(InputError, match=message):
            Llama.from_pretrained(tmp_path)

    for changed, message in [
        ({name: own[name] for name in names[:-1]}, f"tensor {names[-1]} is missing from the"),
        (own | {other: tensors[other]}, "a second one, another file holds it too"),
        (own | {"extra": torch.zeros(2)}, "tensor extra: not part of a Llama"),
        (own | {names[0]: torch.zeros(3, 3)}, r"shape \[3, 3\], config.json makes it"),
        (own | {names[0]: own[names[0]].long()}, "torch.int64, expected floating point"),
    ]:
        write_safetensors(shard, changed)
        refused(message)
    shard.write_bytes(whole[:-10])
    refused("truncated")
    shard.unlink()
    refused("00001-of-00002.safetensors: missing, but named by")
    (tmp_path / "model.safetensors.index.json").unlink()
    refused("no checkpoint: neither")


def write_config(folder, **changes):
    raw = {"model_type": "llama", **vars(tiny_config()), **changes}
    (folder / "config.json").write_text(json.dumps(raw))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}


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
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "rope_parameters is"),
])
def test_a_config_that_is_not_supported(tmp_path, changes, message):
    write_config(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        Config.read(tmp_path)
    assert message in str(error.value)
    assert "config.json" in str(error.value)


def test_config_defaults(tmp_path):
    rope = {"rope_theta": 777.0, "rope_type": "default"}
    write_config(tmp_path, head_dim=None, num_key_value_heads=None, rope_theta=None,
                 rope_parameters=rope)
    config = Config.read(tmp_path)
    assert (config.head_dim, config.num_key_value_heads, config.rope_theta) == (8, 4, 777.0)


def test_a_reader_of_quantized_folders_may_be_added(tmp_path, monkeypatch):
    model = tiny_model(torch.float32)
    model.save_pretrained(tmp_path)
    write_config(tmp_path, quantization_config={"quant_method": "mine"})
    asked = []
    monkeypatch.setitem(llama.QUANTIZED, "mine", lambda *arguments: asked.append(arguments))
    loaded = Llama.from_pretrained(tmp_path)
    assert asked == [(loaded, tmp_path)]
    with pytest.raises(InputError, match="the model is quantized"):
        loaded.save_pretrained(tmp_path / "again")


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
    assert close(ours(tokens), expected, 1e-4)
    assert close(stepwise(ours, tokens, pieces), expected, 1e-4)
    sparsify.sparsify(ours, dict.fromkeys(names_of(ours), 0.0))
    assert close(stepwise(ours, tokens, pieces), expected, 1e-4)
    ours.save_pretrained(tmp_path / "again")               # and what we write, they read
    assert close(read_by_transformers(tmp_path / "again")(tokens).logits, expected, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sharded_checkpoints_of_transformers(tmp_path, dtype):
    theirs = reference(tmp_path, dtype, "60KB", num_key_value_heads=2)
    assert len(llama.shard_paths(tmp_path)) > 2
    ours = Llama.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = tokens_of(ours, 2, 30)
    assert close(ours(tokens), theirs(tokens).logits, 1e-4)
    assert Llama.from_pretrained(tmp_path).lm_head.weight.dtype == dtype


NUMBERS = {name: value for name, value in LLAMA3.items() if name != "rope_type"}


@pytest.mark.parametrize("spelling", [
    {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | NUMBERS},
    {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
])
def test_every_spelling_of_rope(tmp_path, spelling):
    theirs = reference(tmp_path, rope_theta=5e5, rope_scaling=LLAMA3)
    raw = llama.read_json(tmp_path / "config.json")
    raw = {key: value for key, value in raw.items() if not key.startswith("rope")} | spelling
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours = Llama.from_pretrained(tmp_path)
    tokens = tokens_of(ours, 1, 60)
    assert close(ours(tokens), theirs(tokens).logits, 1e-4)


def test_random_preset(monkeypatch):
    with pytest.raises(InputError, match="preset 'gpt' is not known"):
        Llama.random("gpt")
    for tied in (False, True):
        small = llama.preset(64, 96, 2, 4, 2, 50, 32, 1e4, tied)
        monkeypatch.setitem(llama.PRESETS, "small", small)
        model = Llama.random("small", dtype=torch.float32)
        again = Llama.random("small", dtype=torch.float32)
        tokens = tokens_of(model, 1, 5)
        assert torch.equal(model(tokens), again(tokens))
        assert 0.5 < model.model.layers[0].mlp.down_proj.weight.std() * 96 ** 0.5 < 1.5
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert Llama.random("small").dtype == torch.bfloat16
        assert model.config is not small                   # a model's own, not the preset's


@needs_linux
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    def anonymous():                                       # memory that is not pages of files
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])

    config = replace(llama.preset_config("llama-3.2-1b"), num_hidden_layers=1, vocab_size=8000)
    model = Llama.shapes(config).bfloat16().to_empty(device="cpu").fill_random(0)
    save_sharded(model, tmp_path, 4)
    del model
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


def test_text_comes_back():
    tokenizer = load_tokenizer(DEMO)
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.pieces()[:3] == ["<unk>", "<s>", "</s>"]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == [1, *tokenizer.encode(text, bos=False)]
        assert not {1, 2} & set(ids[1:])                   # written out, they are text
        assert tokenizer.decode(ids) == text
    ids = tokenizer.encode("def", bos=False)
    assert tokenizer.decode([4096, *ids, 5000]) == "def"   # ids that only pad a vocabulary
    with pytest.raises(InputError, match="not Unicode"):
        tokenizer.encode("\udcff")


def test_tokenizers_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no tokenizer: neither tokenizer.model nor"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\ndamaged")
    with pytest.raises(InputError, match="tokenizer.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\n")                # of Llama-3's kind
    with pytest.raises(InputError, match="needs the package transformers: pip install"):
        load_tokenizer(tmp_path)


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
BACKENDS = ["torch", pytest.param("c", marks=needs_c), pytest.param("triton", marks=needs_triton)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def device(backend):
    return DEVICE if backend == "triton" else torch.device("cpu")


def gemv_case(seed):
    """Return (x, weight_t, threshold): each dtype with 1 to 8 rows in turn, the rest at random."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[torch.randint(len(choices), (), generator=generator)]

    dtype = DTYPES[seed % 3]
    rows = 1 + seed % 8
    channels = pick(1, 7, 64, 129, 300)
    outputs = pick(1, 2, 63, 128, 257)
    x = torch.randn(rows, channels, generator=generator).to(dtype)
    weight_t = torch.randn(channels, outputs, generator=generator).to(dtype)
    each = torch.rand(channels, generator=generator) * 1.5
    strided = torch.stack((each, -each), 1)[:, 0]
    drop_all, keep_all = 1e9, -1.0
    return x, weight_t, pick(0.0, 0.5, torch.tensor(0.7), drop_all, keep_all, each, strided)


def test_sparse_gemv_against_float64(backend, device):
    interpreted = backend == "triton" and device.type == "cpu"
    for seed in range(24 if interpreted else 240):
        x, weight_t, threshold = gemv_case(seed)
        kept = drop(x.double(), torch.as_tensor(threshold).double())
        expected = kept @ weight_t.double()
        if isinstance(threshold, torch.Tensor):
            threshold = threshold.to(device)
        y = kernel.sparse_gemv(x.to(device), weight_t.to(device), threshold, backend)
        assert y.shape == expected.shape
        assert y.dtype == x.dtype
        # Rounding is proportional to the sum of magnitudes.
        scale = kept.abs() @ weight_t.double().abs()
        allowed = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-7}[x.dtype]
        assert ((y.cpu().double() - expected).abs() <= allowed * scale + 1e-30).all(), seed


def test_a_channel_at_the_threshold_is_dropped_and_a_dropped_row_is_not_read(backend, device):
    x = torch.tensor([[0.5, -0.5, 1.0, 0.0, -2.0]], device=device)
    weight_t = torch.full((5, 33), float("nan"), device=device)      # what is read by mistake shows
    weight_t[2] = 3.0
    weight_t[4] = 0.25
    y = kernel.sparse_gemv(x, weight_t, 0.5, backend)
    assert torch.equal(y, torch.full((1, 33), 2.5, device=device))
    x = torch.cat((x, x.flip(0) * torch.tensor([1, 1, 0.1, 1, 1], device=device)))
    y = kernel.sparse_gemv(x, weight_t, 0.5, backend)      # a row that another token keeps
    assert torch.equal(y[:, 0].cpu(), torch.tensor([2.5, -0.5]))


def test_nan_is_kept(backend, device):
    x = torch.tensor([[float("nan"), 1.0]], device=device)
    weight_t = torch.ones(2, 16, device=device)
    assert kernel.sparse_gemv(x, weight_t, 0.5, backend).isnan().all()
    assert kernel.dense(x, weight_t).isnan().all()
    assert kernel.kept(x, torch.tensor(2.0)).tolist() == [[True, False]]


def test_the_same_input_gives_the_same_bits(backend, device):
    torch.manual_seed(0)
    x = torch.randn(1, 515, device=device)
    weight_t = torch.randn(515, 130, device=device)
    ys = [kernel.sparse_gemv(x, weight_t, 0.4, backend) for _ in range(4)]
    assert all(torch.equal(y, ys[0]) for y in ys)


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


def test_sparse_gemv_of_float64_stays_float64():
    x = torch.randn(3, 50, dtype=torch.float64)
    weight_t = torch.randn(50, 20, dtype=torch.float64)
    y = kernel.sparse_gemv(x, weight_t, 0.5)
    assert y.dtype == torch.float64
    assert close(y, drop(x, 0.5) @ weight_t, 1e-14)


def test_backends_may_be_added(monkeypatch):
    monkeypatch.setitem(kernel.BACKENDS, "mine", lambda x, weight_t, t: drop(x, t) @ weight_t)
    x = torch.randn(2, 8)
    weight_t = torch.randn(8, 4)
    assert torch.equal(kernel.sparse_gemv(x, weight_t, 0.5, "mine"), drop(x, 0.5) @ weight_t)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dense_of_any_length(dtype):
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-6)
    torch.manual_seed(0)
    weight_t = torch.randn(96, 40).to(dtype)
    for shape in ((96,), (1, 1, 96), (3, 96), (2, 4, 96), (11, 96), (1, 40, 96), (2, 35, 96)):
        x = torch.randn(shape).to(dtype)
        y = kernel.dense(x, weight_t)
        assert y.dtype == dtype
        assert close(y, x.double() @ weight_t.double(), tolerance)


@needs_c
def test_float16_denormals():
    steps = torch.arange(-40, 40)
    denormal = (steps * 2.0**-24).half()[None]             # the smallest float16 numbers
    y = kernel.sparse_gemv(torch.ones(1, 1).half(), denormal, 0.0, "c")
    assert torch.equal(y, denormal)
    # A process that flushes denormals loses no other weights, though they pass through denormals.
    torch.manual_seed(0)
    x = (1e-3 * torch.randn(1, 300)).half()
    weight_t = (0.02 * torch.randn(300, 40)).half()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)             # the setting is a thread's own
    torch.set_flush_denormal(True)
    try:
        y = kernel.sparse_gemv(x, weight_t, 0.0, "c")
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    assert close(y, x.double() @ weight_t.double(), 2**-9)


@pytest.fixture
def fresh_compiler():
    """Make kernel.py look for its compiler anew, in the test and after it."""
    def forget():
        kernel.compiled.cache_clear()
        kernel.c_function.cache_clear()
    forget()
    yield forget
    forget()


@pytest.mark.parametrize("settings", [
    {"MINTEAL_CACHE": "off"}, {"CC": "/nowhere/cc"}, {"MINTEAL_CACHE": "/dev/null/cache"},
])
def test_without_a_compiler_torch_takes_over(monkeypatch, fresh_compiler, settings):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    x = torch.randn(2, 30)
    weight_t = torch.randn(30, 9)
    assert kernel.best_backend(x) == "torch"
    assert close(kernel.sparse_gemv(x, weight_t, 0.5), drop(x, 0.5) @ weight_t, 1e-5)
    assert close(kernel.dense(x, weight_t), x @ weight_t, 1e-5)
    with pytest.raises(ValueError, match='backend "c" needs a C compiler'):
        kernel.sparse_gemv(x, weight_t, 0.5, "c")


@needs_c
def test_a_library_that_does_not_load_is_built_anew(tmp_path, monkeypatch, fresh_compiler):
    monkeypatch.setenv("MINTEAL_CACHE", str(tmp_path))
    source = "int seven(void) { return 7; }"
    assert kernel.compiled(source).seven() == 7
    library, = tmp_path.iterdir()
    library.unlink()                     # another file of that name: the first is still loaded
    library.write_bytes(b"damaged")
    fresh_compiler()
    assert kernel.compiled(source).seven() == 7
    assert library.stat().st_size > 1000


COMPILE = """
import re, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernel

cuobjdump = next(Path(triton.__file__).parent.rglob("cuobjdump"))

def compiled(function, pointer, constants, capability):
    # As the launcher would: pointers and sizes are multiples of 16, which allows wide loads.
    signature, fixed, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            fixed[(i,)] = constants[name]
            continue
        is_pointer = name.endswith("_ptr")
        always_float32 = name in ("threshold_ptr", "partial_ptr")
        signature[name] = ("*fp32" if always_float32 else pointer) if is_pointer else "i32"
        if is_pointer or not name.startswith(("rows", "threshold_step", "splits")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, fixed, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))

def report(case):
    built = compiled(*case)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [cuobjdump, "-sass", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spills = len(re.findall(r"\\b(STL|LDL)\\b", sass))
    wide = len(re.findall(r"ld\\.global[^\\n]*(v4\\.b32|v8\\.b16)", built.asm["ptx"]))
    return [built.metadata.name, sass.count(";"), spills, wide, sass.count("LDG.E.128")]

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
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ended = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True,
                           cwd=HERE, env=environment)
    assert ended.returncode == 0, ended.stderr
    rows = [line.split() for line in ended.stdout.splitlines()]
    assert len(rows) == 2 * 3 * (4 + 1)
    for name, *numbers in rows:
        instructions, spills, wide, wide_in_sass = map(int, numbers)
        assert instructions > 50
        assert spills == 0
        if name == "partial_sums_kernel":                  # weights come 16 bytes at a time
            assert wide >= 4
            assert wide_in_sass >= 4


# --------------------------------------------------------------------------------------------------
# sparsify.py

def test_thresholds_of_zero_change_nothing_and_names_stay():
    model = tiny_model()
    tokens = tokens_of(model, 1, 10)
    expected = model(tokens)
    names = [name for name, _ in model.named_parameters()]
    sparsify.sparsify(model, dict.fromkeys(names_of(model), 0.0))
    assert [name.removesuffix("_t") for name, _ in model.named_parameters()] == names
    with sparse_mode(model, "all"):
        assert close(model(tokens), expected, 1e-12)
    assert close(stepwise(model, tokens, [1] * 10), expected, 1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_modes(dtype, tolerance):
    model = tiny_model(dtype)
    tokens = tokens_of(model, 2, 10)
    thresholds = some_thresholds(model)
    dense = model(tokens)
    dropped = by_hand(model, tokens, thresholds)
    prefixed = by_hand(model, tokens, thresholds, prefix=4)
    one_by_one = [1] * 10
    assert not close(dense, dropped, 0.01)
    assert sparsify.sparsify(model, thresholds) is model

    assert close(model(tokens), dense, tolerance)                          # several tokens: dense
    assert close(stepwise(model, tokens, one_by_one), dropped, tolerance)  # one at a time: sparse
    with sparse_mode(model, "all"):
        assert close(model(tokens), dropped, tolerance)
        assert close(stepwise(model, tokens, [5, 3, 1, 1]), dropped, tolerance)
    with sparse_mode(model, "all", dense_prefix=4):
        assert close(model(tokens), prefixed, tolerance)
    with sparse_mode(model, "off"):
        assert close(stepwise(model, tokens, one_by_one), dense, tolerance)
    with sparse_mode(model, thresholds=dict.fromkeys(thresholds, 0.0)):
        assert close(stepwise(model, tokens, one_by_one), dense, tolerance)
    with sparse_mode(model, thresholds=torch.zeros_like(model.sparse_state.thresholds)):
        assert close(stepwise(model, tokens, one_by_one), dense, tolerance)
    with pytest.raises(KeyError):
        with sparse_mode(model, "off", {names_of(model)[0]: 9.0}):
            raise KeyError
    assert close(stepwise(model, tokens, one_by_one), dropped, tolerance)  # all is as it was


def test_a_linear_not_named_stays_as_it_is():
    dense = tiny_model()
    tokens = tokens_of(dense, 1, 6)
    some = {name: 0.5 for name in names_of(dense) if "q_proj" in name or "up_proj" in name}
    others = {name: 0.3 for name in names_of(dense) if "q_proj" not in name}
    model = sparse_model(some)
    with sparse_mode(model, "all"):
        assert close(model(tokens), by_hand(dense, tokens, some), 1e-12)
    sparsify.sparsify(model, others)                       # some of them anew
    with sparse_mode(model, "all"):
        assert close(model(tokens), by_hand(dense, tokens, some | others), 1e-12)


def test_no_threshold_means_dense_and_transposed():
    dense = tiny_model()
    tokens = tokens_of(dense, 1, 6)
    model = sparse_model({**dict.fromkeys(names_of(dense)), "lm_head": None})
    assert all(isinstance(model.get_submodule(name), SparseLinear) for name in names_of(dense))
    assert not hasattr(model, "sparse_state")
    with sparse_mode(model, "all"):
        assert close(model(tokens), dense(tokens), 1e-12)
    thresholds = some_thresholds(dense)
    sparsify.sparsify(model, thresholds)
    with sparse_mode(model, "all"):
        assert close(model(tokens), by_hand(dense, tokens, thresholds), 1e-12)
        assert realised_sparsity(model) > 0
        sparsify.sparsify(model, dict.fromkeys(names_of(dense)))           # and back
        assert close(model(tokens), dense(tokens), 1e-12)
        assert realised_sparsity(model) == 0


def test_a_sparse_linear_may_be_of_another_make():
    class Soft(SparseLinear):            # what stays shrinks by its threshold
        def product(self, x):
            return (x.sign() * (x.abs() - self.threshold).clamp(min=0)) @ self.weight_t

    name = "model.layers.1.mlp.down_proj"
    model = sparsify.sparsify(tiny_model(), {name: 0.3}, make=Soft)
    x = torch.randn(1, 1, 56, dtype=torch.float64)
    linear = model.get_submodule(name)
    assert type(linear) is Soft
    with sparse_mode(model, "all"):
        expected = x.sign() * (x.abs() - 0.3).clamp(min=0) @ linear.weight.T
        assert close(linear(x), expected, 1e-12)


def test_the_tokens_of_a_call_decide_for_every_linear():
    """Even for a head that reads one of them: a prompt's logits are dense, a step's are sparse."""
    dense = tiny_model()
    tokens = tokens_of(dense, 1, 5)
    step = torch.tensor([[7]])
    whole = torch.cat((tokens, step), 1)
    model = sparse_model({"lm_head": 0.8})
    cache = model.make_cache(1, 6)
    assert close(model(tokens, cache, last_only=True), dense(tokens)[:, -1:], 1e-12)
    assert next(generate.generate(model, tokens[0], 1)) == dense(tokens)[0, -1].argmax()
    assert model.lm_head.seen == 0
    expected = by_hand(dense, whole, {"lm_head": 0.8})[:, -1:]
    assert not close(expected, dense(whole)[:, -1:], 0.01)
    assert close(model(step, cache), expected, 1e-12)


def test_realised_sparsity_counts_what_is_not_read():
    model = tiny_model()
    name = "model.layers.1.mlp.down_proj"
    inputs = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    tokens = tokens_of(model, 1, 8)
    model(tokens)
    hook.remove()
    block = sum(outputs * inputs for outputs, inputs in block_linears(model.config).values())
    dropped = (inputs[0].abs() <= 0.3).double().mean().item()
    expected = dropped * 56 * 32 / (3 * block)
    sparsify.sparsify(model, {name: 0.3})
    assert realised_sparsity(model) == 0
    with sparse_mode(model, "all"):
        model(tokens)                    # 8 tokens, which the kernel takes at once
    assert realised_sparsity(model) == pytest.approx(expected)
    reset_counts(model)
    stepwise(model, tokens, [1] * 8)
    assert realised_sparsity(model) == pytest.approx(expected)
    reset_counts(model)
    with sparse_mode(model, "all"):
        model(tokens.repeat(2, 1))       # 16, which it does not
    assert realised_sparsity(model) == pytest.approx(expected)


def test_thresholds_that_do_not_fit_change_nothing():
    names = names_of(tiny_model())
    for thresholds, message in [
        ({"lm_tail": 0.1}, "lm_tail, which is not a linear"),
        ({"model.norm": 0.1}, "not a linear of this model"),
        ({names[0]: torch.zeros(5)}, r"shape \(5,\), expected \(\) or \(32,\)"),
        ({names[0]: 0.5, names[1]: float("nan")}, "is not finite"),
    ]:
        model = tiny_model()
        with pytest.raises(InputError, match=message):
            sparsify.sparsify(model, thresholds)
        assert not any(isinstance(module, SparseLinear) for module in model.modules())
    model = sparse_model()
    tokens = tokens_of(model, 1, 6)
    with sparse_mode(model, "all"):
        before = model(tokens)
        with pytest.raises(InputError, match="is not finite"):
            sparsify.sparsify(model, {names[0]: 0.9, names[1]: float("inf")})
        assert torch.equal(model(tokens), before)
    model = sparse_model({names[0]: 0.1, names[1]: None})
    for arguments, message in [
        (dict(where="never"), 'where is "decode", "all" or "off", not \'never\''),
        (dict(dense_prefix=-1), "dense_prefix is -1"),
        (dict(thresholds={names[2]: 0.1}), "not a sparse linear"),
        (dict(thresholds={names[1]: 0.1}), "is dense, or would become so"),
    ]:
        with pytest.raises(InputError, match=message):
            with sparse_mode(model, **arguments):
                pass


def test_a_tied_head_can_be_sparse_and_stays_one_weight():
    model = tiny_model(tie_word_embeddings=True)
    tokens = tokens_of(model, 2, 6)
    expected = by_hand(model, tokens, {"lm_head": 0.5})
    fingerprint = calibrate.fingerprint_of(model.model.embed_tokens.weight)
    sparsify.sparsify(model, {"lm_head": 0.5})
    embedding = model.model.embed_tokens
    assert embedding.weight_t is model.lm_head.weight_t
    with sparse_mode(model, "all"):
        assert close(model(tokens), expected, 1e-12)
    assert torch.equal(calibrate.fingerprint_of(embedding.weight), fingerprint)
    assert realised_sparsity(model) == 0                   # which is of the blocks


@pytest.mark.parametrize("tied", [False, True])
def test_a_sparse_model_is_saved_as_the_dense_one(tmp_path, tied):
    model = tiny_model(torch.float32, tie_word_embeddings=tied)
    tokens = tokens_of(model, 1, 6)
    expected = model(tokens)
    sparsify.sparsify(model, some_thresholds(model) | {"lm_head": 0.3}).save_pretrained(tmp_path)
    assert torch.equal(Llama.from_pretrained(tmp_path)(tokens), expected)


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
    with pytest.raises(InputError, match="the text has 12 tokens, a window of 12 needs 13"):
        perplexity(model, tokens[:12], 12)
    with pytest.raises(InputError, match="token id 99 is outside the vocabulary"):
        perplexity(model, torch.tensor([99] * 13), 12)


def test_quality():
    dense = tiny_model()
    tokens = tokens_of(dense, 70)
    windows = windows_of(tokens, 8)
    thresholds = some_thresholds(dense)
    nothing = dict.fromkeys(thresholds, 0.0)
    inputs = windows[:, :-1]
    log_p = dense(inputs).log_softmax(-1)
    log_q = by_hand(dense, inputs, thresholds).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    model = tiny_model()
    first, sparse, zero = quality(model, windows, [thresholds, nothing]).tolist()
    assert first == pytest.approx([perplexity(dense, tokens, 8), 0, 1, 0], abs=1e-9)
    assert zero[:3] == pytest.approx(first[:3], abs=1e-9)
    sparsify.sparsify(model, thresholds)
    expected = [perplexity(model, tokens, 8), kl, agreement, realised_sparsity(model)]
    assert sparse == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------
# calibrate.py

def test_quantiles_of_a_histogram():
    torch.manual_seed(0)
    x = torch.randn(40, 5000) * 3
    x[:, ::10] = 0
    counts = calibrate.histogram(x)
    assert counts.shape == (BINS,)
    assert counts.sum() == x.numel()
    ordered = x.abs().flatten().sort().values
    for share in (0.2, 0.5, 0.9, 0.999):
        value = calibrate.quantile(counts, share)
        assert value.item() == pytest.approx(ordered[int(share * x.numel())].item(), rel=0.022)
    assert calibrate.quantile(counts, 0) == 0
    assert calibrate.quantile(counts, 0.05) < 1e-5
    many = calibrate.quantile(counts.expand(2, 3, BINS), torch.tensor([0.2, 0.5, 0.9]))
    assert torch.equal(many[1], torch.stack([calibrate.quantile(counts, s) for s in (.2, .5, .9)]))


def test_the_first_tokens_of_a_window_are_left_out(calibrated):
    model, tokens, calibration = calibrated
    windows = windows_of(tokens, 16)
    inputs = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _, x: inputs.append(x[0]))
    for part in windows.split(calibrate.BATCH):
        model(part[:, :-1])
    hook.remove()
    late = torch.cat(inputs)[:, SINKS:]
    counts = calibration.distributions["input"]
    assert counts.shape == (3, 4, BINS)
    assert torch.equal(counts[1, 3], calibrate.histogram(late))
    assert calibration.distributions["head"].sum() == len(windows) * (16 - SINKS) * 32
    assert calibration.source == "1,488 tokens of a test"


@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
def test_every_allocation_reaches_its_target(calibrated, allocation):
    _, tokens, calibration = calibrated
    assert calibration.allocations == ["greedy", "uniform"]
    _, sizes = calibration.sizes()
    for sparsity in (0.0, 0.25, 0.5, 0.8, 0.95):
        shares = calibration.sparsities(sparsity, allocation)
        assert (shares @ sizes).mean().item() == pytest.approx(sparsity, abs=1e-6)
        model = sparse_model(calibration.thresholds(sparsity, allocation), torch.float32)
        perplexity(model, tokens, 16, dense_prefix=SINKS)
        # Not exact: with inputs dropped before them, the inputs of later layers are others.
        assert realised_sparsity(model) == pytest.approx(sparsity, abs=0.04)
    sparse = sparse_model({"lm_head": calibration.head_threshold(0.5)}, torch.float32)
    perplexity(sparse, tokens, 16, dense_prefix=SINKS)
    assert 1 - sparse.lm_head.kept / sparse.lm_head.seen == pytest.approx(0.5, abs=0.01)


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
    block = model.model.layers[0]
    windows = windows_of(tokens, 64)[:calibrate.BATCH, :-1]
    x = model.embed(windows)
    context = model.context(windows)
    counts = calibration.distributions["input"][0]
    path = calibrate.greedy_path(block, x, context, counts, sizes)
    steps = path.diff(dim=0)
    assert (path[0] == 0).all()
    assert (path < 1).all()
    assert ((steps > 0).sum(1) == 1).all()
    assert torch.allclose(steps @ sizes, torch.full((len(steps),), 0.01, dtype=torch.float64))
    assert path[-1] @ sizes == pytest.approx(0.9)
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

    for step in (0, 1, 30):              # tried by hand
        raised = path[step] + torch.diag(0.01 / sizes)
        errors = [error_of(shares) for shares in raised]
        assert errors.index(min(errors)) == steps[step].argmax()
    table = calibration.tables["greedy"]
    assert table.levels.tolist() == pytest.approx([i / 100 for i in range(1, 91)])
    assert torch.allclose(table.shares[:, 0].double(), path[1:], atol=1e-6)


def test_greedy_goes_on_where_it_was_killed(calibrated, tmp_path, monkeypatch):
    model, tokens, calibration = calibrated
    again = calibrate.calibrate(model, tokens, 16, "a test")
    partial = tmp_path / "partial"
    greedy_path = calibrate.greedy_path
    blocks = []

    def killed_in_the_third(*arguments):
        blocks.append(arguments[0])
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return greedy_path(*arguments)

    monkeypatch.setattr(calibrate, "greedy_path", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        calibrate.add_greedy(again, model, tokens, partial)
    calibrate.add_greedy(again, model, tokens, partial)
    assert blocks == [*model.model.layers, model.model.layers[2]]
    assert torch.equal(again.tables["greedy"].shares, calibration.tables["greedy"].shares)
    # What another model left is not taken for this one's.
    blocks.clear()
    other = tiny_model(torch.float32, seed=1)
    of_other = calibrate.calibrate(other, tokens, 16)
    with pytest.raises(KeyboardInterrupt):
        calibrate.add_greedy(of_other, other, tokens, partial)
    assert len(blocks) == 3


def test_calibration_file(calibrated, tmp_path):
    model, tokens, calibration = calibrated
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    loaded = Calibration.load(path)
    assert loaded.source == calibration.source
    assert loaded.allocations == calibration.allocations
    for allocation in (None, "uniform"):
        expected = calibration.thresholds(0.4, allocation)
        thresholds = loaded.thresholds(0.4, allocation)
        assert list(thresholds) == names_of(model)
        assert all(thresholds[name] == expected[name] for name in expected)
    for same in (tiny_model(), tiny_model(torch.bfloat16), sparse_model()):
        loaded.check(same)
    with pytest.raises(InputError, match="made for another model of the same shape"):
        loaded.check(tiny_model(seed=1))
    with pytest.raises(InputError, match="another model: intermediate_size is 56 in it, 60 in the"):
        loaded.check(tiny_model(intermediate_size=60))
    for sparsity in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match="expected at least 0 and below 1"):
            loaded.thresholds(sparsity)
    with pytest.raises(InputError, match="allocation 'other' is not in this calibration, which"):
        loaded.thresholds(0.5, "other")
    del loaded.tables["greedy"]
    with pytest.raises(InputError, match="greedy is made by python calibrate.py --greedy"):
        loaded.thresholds(0.5, "greedy")
    write_safetensors(path, {"x": torch.zeros(1)})
    with pytest.raises(InputError, match="not a calibration of this version: format is None"):
        Calibration.load(path)


def spoil_table(calibration, **changes):
    calibration.tables["greedy"] = calibration.tables["greedy"]._replace(**changes)


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
])
def test_a_damaged_calibration_is_refused(calibrated, tmp_path, spoil):
    _, _, whole = calibrated
    path = tmp_path / "calibration.safetensors"
    whole.save(path)
    damaged = Calibration.load(path)
    spoil(damaged)
    damaged.save(path)
    with pytest.raises(InputError, match="a damaged calibration .*; make it with: python cali"):
        Calibration.load(path)


def test_chapters_may_add_tables_and_weights(calibrated, tmp_path):
    model, _, calibration = calibrated
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    more = Calibration.load(path)
    torch.manual_seed(0)
    weights = {name: 0.5 + torch.rand(model.get_submodule(name).in_features)
               for name in names_of(model)}
    sites = list(calibrate.SITE_OF.values())
    more.weights["mine"] = weights
    more.distributions["mine"] = more.distributions["input"][:, sites]
    more.tables["half"] = Table(torch.tensor([0.5]), torch.rand(1, 3, 7), "mine")
    more.save(path)
    loaded = Calibration.load(path)
    assert loaded.allocations == ["half", "greedy", "uniform"]
    thresholds = loaded.thresholds(0.3)
    shares = loaded.sparsities(0.3).flatten()
    assert torch.allclose(shares.float(), 0.6 * more.tables["half"].shares.flatten())
    for i, name in enumerate(names_of(model)):
        value = calibrate.quantile(loaded.distributions["mine"][i // 7, i % 7], shares[i])
        assert torch.allclose(thresholds[name], value.float() / weights[name])
    sparse_model(thresholds, torch.float32)
    for name in (names_of(model)[0], names_of(model)[-1]):
        before = weights[name].clone()
        for bad in (weights[name][1:], -weights[name], weights[name] * float("nan")):
            more.weights["mine"][name] = bad
            more.save(path)
            with pytest.raises(InputError, match="a damaged calibration"):
                Calibration.load(path)
        more.weights["mine"][name] = before


def test_what_cannot_be_calibrated():
    tokens = tokens_of(tiny_model(), 100)
    with pytest.raises(InputError, match="this one was made sparse"):
        calibrate.calibrate(sparse_model(), tokens, 16)
    broken = tiny_model(torch.float32)
    broken.model.norm.weight[3] = float("nan")
    with pytest.raises(InputError, match="the activations hold NaN or infinity"):
        calibrate.calibrate(broken, tokens, 16)
    with pytest.raises(InputError, match="a window of 4 tokens leaves none after the first 4"):
        calibrate.calibrate(tiny_model(), tokens, 4)
    with pytest.raises(InputError, match="token id 99 is outside"):
        calibrate.calibrate(tiny_model(), torch.tensor([99] * 20), 16)


def their_threshold(histogram, key, sparsity):
    """TEAL's: the inverse of the cumulative counts at 0.5 + s/2, linear between bin centers."""
    counts = histogram[key].double()
    centers = histogram[f"{key}_centers"].double()
    below = counts.cumsum(0)
    target = (0.5 + sparsity / 2) * counts.sum()
    at = int(torch.searchsorted(below, target))
    fraction = (target - below[at - 1]) / (below[at] - below[at - 1])
    return (centers[at - 1] + fraction * (centers[at] - centers[at - 1])).item()


@pytest.fixture
def authors(tmp_path):
    """(folder, histograms, greedy shares (18, 7)) of a model, as TEAL's authors publish them."""
    folder = tmp_path / "Tiny-7B"
    generator = torch.Generator().manual_seed(0)
    published = {}
    shares = torch.arange(1, 19)[:, None] * 0.05 * torch.tensor([1.0, 0.9, 0.5, 1, 0.9, 0.9, 1])
    header = "Effective Sparsity,Activation Error,Baseline Error,q,k,v,o,gate,up,down\n"
    for layer in range(3):
        for part in ("self_attn", "mlp"):
            histograms = {}
            for key in ("h1", "h2") + ("h1.5",) * (part == "mlp"):         # as their utils.py does
                scale = torch.rand((), generator=generator)
                x = (torch.randn(50_000, generator=generator) * scale).sort().values
                bins = torch.cat((x[:1], torch.linspace(x[500], x[-500], 9999), x[-1:]))
                histograms[key] = torch.histogram(x, bins=bins)[0]
                histograms[f"{key}_centers"] = (bins[:-1] + bins[1:]) / 2
            path = folder / "histograms" / f"layer-{layer}" / part / "histograms.pt"
            path.parent.mkdir(parents=True)
            torch.save(histograms, path)
            published[layer, part] = histograms
        path = folder / "lookup" / f"layer-{layer}" / "results.csv"
        path.parent.mkdir(parents=True)
        rows = "".join(f"0,0,0,{','.join(map(str, row))}\n" for row in shares.tolist())
        path.write_text(header + rows)
    return folder, published, shares


def test_the_authors_statistics_are_imported(authors, tmp_path):
    folder, published, shares = authors
    model = tiny_model()
    fingerprint = calibrate.fingerprint_of(model.model.embed_tokens.weight)
    calibrate.import_teal(folder, model.config, fingerprint).save(tmp_path / "calibration")
    loaded = Calibration.load(tmp_path / "calibration")
    loaded.check(model)
    assert loaded.allocations == ["greedy", "uniform"]
    assert loaded.source == "the statistics TEAL's authors publish for Tiny-7B"
    for sparsity in (0.1, 0.25, 0.5, 0.9):
        for name, threshold in loaded.thresholds(sparsity, "uniform").items():
            layer, part, linear = name.split(".")[2:]
            key = "h2" if linear in ("o_proj", "down_proj") else "h1"
            expected = their_threshold(published[int(layer), part], key, sparsity)
            assert threshold.item() == pytest.approx(expected, rel=0.01, abs=1e-3)
    _, sizes = loaded.sizes()
    row = shares[9].double()             # a row of theirs: the same shares at the same sparsity
    at = (row @ sizes).item()
    assert torch.allclose(loaded.sparsities(at, "greedy"), row.expand(3, 7), atol=1e-4)
    with pytest.raises(InputError, match="this calibration holds no distribution of the head's"):
        loaded.head_threshold(0.5)


def test_what_is_not_needed_of_the_authors_files_may_be_otherwise(authors):
    folder, published, shares = authors
    path = folder / "histograms" / "layer-1" / "mlp" / "histograms.pt"
    needed = {key: value for key, value in published[1, "mlp"].items() if "h1.5" not in key}
    torch.save(needed, path)
    before = calibrate.import_teal(folder, tiny_config(), torch.zeros(256))
    for layer in range(3):               # shares reach 1 and more at the far end: cut there
        path = folder / "lookup" / f"layer-{layer}" / "results.csv"
        path.write_text(path.read_text() + "0,0,0,1,0.95,0.7,1,0.95,0.95,1\n"
                                           "0,0,0,1.2,0.95,0.7,1.1,0.95,0.95,1\n")
    after = calibrate.import_teal(folder, tiny_config(), torch.zeros(256))
    assert torch.equal(after.tables["greedy"].shares, before.tables["greedy"].shares)
    assert (after.sparsities(0.99) < 1).all()


def test_what_is_not_of_the_authors_is_refused(authors):
    folder, published, _ = authors
    config = tiny_config()

    def refused(message, config=config):
        with pytest.raises(InputError, match=message):
            calibrate.import_teal(folder, config, torch.zeros(256))

    refused("layer-3/.*cannot be read: No such file", tiny_config(num_hidden_layers=4))
    refused("more layers than the model's 2", tiny_config(num_hidden_layers=2))
    path = folder / "histograms" / "layer-1" / "mlp" / "histograms.pt"
    whole = path.read_bytes()
    histogram = published[1, "mlp"]
    for bad in ({}, histogram | {"h2": histogram["h2"][1:]}, histogram | {"h1": -histogram["h1"]}):
        torch.save(bad, path)
        refused("not a histogram of TEAL's authors: expected h[12] and h[12]_centers")
    path.write_bytes(whole)
    path = folder / "lookup" / "layer-2" / "results.csv"
    for text in ("q,k\n1,2\n", "", "q,k,v,o,gate,up,down\n" + ".5,.5,.5,.5,.5,.5,.5\n" * 2
                 + ".4,.5,.5,.5,.5,.5,.5\n"):
        path.write_text(text)
        refused("results.csv: not a greedy path")


# --------------------------------------------------------------------------------------------------
# generate.py

def by_prefill(model, prompt, count):
    """Return greedy tokens, each from a pass over all that is before it."""
    ids = list(prompt)
    for _ in range(count):
        tokens = torch.tensor([ids], device=model.device)
        ids.append(model(tokens)[0, -1].argmax().item())
    return ids[len(prompt):]


def test_greedy_is_the_argmax_of_the_whole_sequence():
    model = tiny_model()
    prompt = tokens_of(model, 5).tolist()
    text = list(generate.generate(model, prompt, 20))
    assert text == by_prefill(model, prompt, 20)
    assert len(set(text)) > 3
    eos = text[7]
    before = list(generate.generate(model, prompt, 20, eos_ids=(eos,)))
    assert before == text[:text.index(eos)]


def test_sparse_decoding_equals_whole_sequences_that_are_sparse_after_the_prompt():
    model = sparse_model()
    prompt = tokens_of(model, 6).tolist()
    text = list(generate.generate(model, prompt, 12))
    with sparse_mode(model, "all", dense_prefix=6):
        assert text == by_prefill(model, prompt, 12)
    assert text != by_prefill(model, prompt, 12)


def soft(self, x):
    """Another rule: what stays shrinks by its threshold."""
    return (x.sign() * (x.abs() - self.threshold).clamp(min=0)) @ self.weight_t


@pytest.mark.parametrize("place, name, change", [
    (llama.MLP, "gated", lambda self, x: F.gelu(self.gate_proj(x)) * self.up_proj(x)),
    (llama, "rotate", lambda x, cos, sin: x),
    (torch.nn.RMSNorm, "forward", lambda self, x: x * self.weight),
    (SparseLinear, "product", soft),
])
def test_what_you_read_is_what_runs(monkeypatch, place, name, change):
    """A change to the model shows in its text."""
    before = list(generate.generate(sparse_model(0.3), [1], 12))
    monkeypatch.setattr(place, name, change)
    model = sparse_model(0.3)
    text = list(generate.generate(model, [1], 12))
    assert text != before
    with sparse_mode(model, "all"):
        expected = [model(torch.tensor([[1]]))[0, -1].argmax().item()]
        cache = model.make_cache(1, 13)
        for token in [1, *text[:-1]]:
            expected.append(model(torch.tensor([[token]]), cache)[0, -1].argmax().item())
    assert text == expected[1:]


def test_generation_ends_where_the_context_does():
    model = tiny_model(max_position_embeddings=10)
    assert len(list(generate.generate(model, [1, 2, 3], 100))) == 7
    for prompt, options, message in [
        ([], {}, "the prompt is empty"),
        ([1] * 10, {}, "the prompt has 10 tokens, the model's context holds 10"),
        ([99], {}, "token id 99 is outside the vocabulary of 61"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([1], {"temperature": -1.0}, "temperature is -1.0"),
        ([1], {"temperature": float("nan")}, "temperature is nan"),
        ([1], {"top_k": 0}, "top_k is 0"),
        ([1], {"top_p": 0.0}, "top_p is 0.0"),
        ([1], {"seed": -1}, "seed is -1"),
        ([1], {"seed": 10**30}, "seed is 1000"),
    ]:
        for function in (generate.generate, generate_speculative):         # at once, not later
            with pytest.raises(InputError, match=message):
                function(model, prompt, **{"max_new_tokens": 3, **options})


@pytest.mark.parametrize("temperature, top_k, top_p, expected", [
    (1.0, None, None, [0.5, 0.25, 0.15, 0.1]),
    (0.5, None, None, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
    (1.0, 2, None, [2 / 3, 1 / 3, 0, 0]),
    (1.0, None, 0.7, [2 / 3, 1 / 3, 0, 0]),
    (1.0, None, 0.01, [1, 0, 0, 0]),
    (1.0, None, 1e-46, [1, 0, 0, 0]),
    (1.0, 9, 1.0, [0.5, 0.25, 0.15, 0.1]),
    (1.0, 3, 0.6, [2 / 3, 1 / 3, 0, 0]),
    (1e-38, None, None, [1, 0, 0, 0]),
])
def test_probabilities(temperature, top_k, top_p, expected):
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    p = Sampling(temperature, top_k, top_p).probabilities(logits)
    assert torch.allclose(p, torch.tensor(expected))


def test_probabilities_of_ties_and_of_many_tokens():
    one = Sampling(1.0, top_k=1).probabilities(torch.ones(4))
    assert sorted(one.tolist()) == [0, 0, 0, 1]            # ties do not widen it
    p = Sampling(1.0, top_p=0.9).probabilities(torch.zeros(2, 3000))       # more than are looked at
    assert ((p > 0).sum(1) == 2700).all()


def p_value(counts, expected):
    """Return Pearson's chi-square p-value of counts, cells that are expected under 5 pooled."""
    assert counts[expected == 0].sum() == 0
    large = expected >= 5
    counts = torch.cat((counts[large], counts[~large].sum()[None])).double()
    expected = torch.cat((expected[large], expected[~large].sum()[None])).double()
    statistic = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    freedom = (expected > 0).sum() - 1
    assert freedom > 2
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


def test_sampling_repeats_with_a_seed_and_follows_the_distribution():
    model = tiny_model()
    texts = [list(generate.generate(model, [1, 2], 8, temperature=1.0, seed=s)) for s in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    logits = model(torch.tensor([[1, 2]]))[0, -1:]
    sampling = Sampling(0.7, top_k=12)
    source = generate.random_source(model, 5)
    token = next(generate.generate(model, [1, 2], 1, temperature=0.7, top_k=12, seed=5))
    assert token == sampling.choose(logits, source)[0]
    tokens, p = sampling.choose(logits.expand(20_000, -1), source)
    assert p_value(tokens.flatten().bincount(minlength=61), 20_000 * p[0]) > 0.001
    wrong = Sampling(0.8, top_k=12).probabilities(logits)[0]
    assert p_value(tokens.flatten().bincount(minlength=61), 20_000 * wrong) < 1e-6


# Steps

@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("T", [1, 4])
def test_a_static_cache_gives_the_same_steps(T, window):
    model = tiny_model(sliding_window=window)
    tokens = tokens_of(model, 1, 14)
    expected = stepwise(model, tokens, [2, *[T] * (12 // T)])[:, 2:]
    cache = model.make_cache(1, 20)
    model(tokens[:, :2], cache)
    cache.keys[:, :, :, 2:] = 1e9        # what is not used yet must not be seen
    cache.values[:, :, :, 2:] = 1e9
    static = StaticCache(cache, T)
    memory = [tensor.data_ptr() for tensor in (static.positions, static.slots, static.mask)]
    logits = []
    for part in tokens[:, 2:].split(T, dim=1):
        static.follow(cache, T, window)
        logits.append(model(part, static))
        cache.advance(T)
    assert close(torch.cat(logits, 1), expected, 1e-12)
    assert memory == [t.data_ptr() for t in (static.positions, static.slots, static.mask)]
    cache.used = 20
    with pytest.raises(InputError, match="do not fit a cache of 20 positions"):
        static.follow(cache, T, window)


def recording(log):
    """Return a make_step that notes each step: whose it is, and its number of tokens."""
    def make_step(model, cache, tokens=1):
        log.append((model, "made", tokens))

        def step(tokens):
            log.append((model, "step", tokens.shape[1]))
            return model(tokens, cache)
        return step
    return make_step


def test_every_step_is_one_of_make_step():
    model = tiny_model(vocab_size=13)
    passes = []
    model.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape[1]))
    log = []
    text = list(generate.generate(model, [1, 2, 3], 8, make_step=recording(log)))
    assert log == [(model, "made", 1)] + [(model, "step", 1)] * 7
    assert passes == [3] + [1] * 7
    log.clear()
    passes.clear()
    draft = tiny_model(vocab_size=13, seed=1)
    run = generate_speculative(model, [1, 2, 3], 8, draft, draft_tokens=2, make_step=recording(log))
    assert list(run) == text
    verified = [step for step in log if step[0] is model]
    drafted = [step for step in log if step[0] is draft]
    assert verified[0] == (model, "made", 3)
    assert passes == [3] + [T for _, what, T in verified if what == "step"]
    assert drafted[0] == (draft, "made", 1)
    assert {T for _, _, T in drafted} <= {1, 2}


@needs_gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("where", ["off", "decode", "all"])
def test_graphs_on_a_gpu_do_what_the_model_does(where, window):
    model = sparse_model(0.2, torch.float32, vocab_size=13, sliding_window=window).to(DEVICE)
    sparsify.sparsify(model, dict.fromkeys(names_of(model), 0.2))          # a state on the GPU
    draft = tiny_model(torch.float32, vocab_size=13, seed=1).to(DEVICE)
    with sparse_mode(model, where):
        plain = list(generate.generate(model, [1, 2, 3], 40, make_step=generate.plain_step))
        reset_counts(model)
        assert list(generate.generate(model, [1, 2, 3], 40)) == plain
        assert (realised_sparsity(model) > 0) == (where != "off")
        for guesser in ("sparse", draft):
            for n in (1, 3, 12):
                run = generate_speculative(model, [1, 2, 3], 40, guesser, None, n,
                                           sparse_verifier=where != "off")
                assert list(run) == plain


# Speculation

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
            with sparse_mode(self.model, "off"):
                best = self.model(torch.tensor([ids + guesses]))[0, -1].argmax().item()
            guesses.append((best + (place % 3 == 0)) % self.model.config.vocab_size)
        return guesses, None


class Drawer:
    """A draft object that draws its guesses from one distribution, whatever was written."""

    def __init__(self, vocabulary):
        self.q = (torch.arange(vocabulary) + 1.0).softmax(0)
        self.generator = torch.Generator().manual_seed(0)

    def guess(self, ids, n):
        q = self.q.expand(n, -1)
        return generate.draw(q, self.generator).flatten().tolist(), q


def draft_of(kind, model, threshold=0.35, noise=0.2):
    """Return (draft, draft_thresholds) for generate_speculative; sparse: make the model sparse."""
    if kind == "sparse":
        sparsify.sparsify(model, dict.fromkeys(names_of(model), 0.0))
        return kind, dict.fromkeys(names_of(model), threshold)
    if kind == "object":
        return Guesser(model), None
    if kind == "drawn":
        return Drawer(model.config.vocab_size), None
    draft = disturbed(model, 0.0 if kind == "wrong" else noise)
    if kind == "wrong":
        draft.lm_head.weight.neg_()      # the model's least likely token
    return draft, None


KINDS = ["sparse", "model", "object"]


@pytest.mark.parametrize("kind", [*KINDS, "drawn", "wrong"])
def test_speculative_greedy_is_plain_greedy(kind):
    model = tiny_model(max_position_embeddings=48, vocab_size=13)
    prompts = [tokens_of(model, n, seed=n).tolist() for n in (1, 9, 26)]
    plain = [list(generate.generate(model, prompt, 24)) for prompt in prompts]
    draft, thresholds = draft_of(kind, model)
    shares = []
    for draft_tokens in (1, 2, 3, 5, 8, 12, None):
        for prompt, expected in zip(prompts, plain):
            run = generate_speculative(model, prompt, 24, draft, thresholds, draft_tokens)
            assert list(run) == expected
            did = run.statistics
            assert did.tokens == len(expected) - 1         # the first token is the prompt's
            assert did.passes <= did.tokens
            assert run.against == "the dense model"
            shares += did.acceptance
    if kind == "wrong":
        assert max(shares) == 0
    elif kind != "drawn":
        assert 0.2 < sum(shares) / len(shares) < 1


@pytest.mark.parametrize("kind", KINDS)
def test_speculation_stops_inside_an_accepted_run(kind):
    model = tiny_model(vocab_size=13)
    prompt = tokens_of(model, 5).tolist()
    plain = list(generate.generate(model, prompt, 30))
    draft, thresholds = draft_of(kind, model, threshold=0.0, noise=0.0)    # all is accepted
    inside = 0
    for eos in set(plain):
        run = generate_speculative(model, prompt, 30, draft, thresholds, 7, eos_ids=(eos,))
        assert list(run) == plain[:plain.index(eos)]
        did = run.statistics
        inside += sum(did.accepted or []) + did.passes > did.tokens        # verified, after the end
    assert inside
    for limit in range(1, 12):
        run = generate_speculative(model, prompt, limit, draft, thresholds, 7)
        assert list(run) == plain[:limit]


def test_a_draft_model_may_have_a_shorter_context():
    model = tiny_model(vocab_size=13)
    prompt = tokens_of(model, 5).tolist()
    plain = list(generate.generate(model, prompt, 30))
    draft = disturbed(model, 0.0)
    for context in (12, 3):              # one that ends in the text, one in the prompt
        draft.config.max_position_embeddings = context
        run = generate_speculative(model, prompt, 30, draft, None, 7)
        assert list(run) == plain
        assert run.statistics.passes > 15


@pytest.mark.parametrize("kind", KINDS)
def test_the_verifier_may_be_sparse(kind):
    """The text is then that of the mode in force: of "decode" with a dense prompt, or of "all"."""
    model = tiny_model(vocab_size=13)
    thresholds = some_thresholds(model)
    prompt = tokens_of(model, 5).tolist()
    draft, draft_thresholds = draft_of(kind, model)
    sparsify.sparsify(model, thresholds)
    with sparse_mode(model, "off"):
        dense = list(generate.generate(model, prompt, 20))
    assert list(generate_speculative(model, prompt, 20, draft, draft_thresholds, 3)) == dense
    texts = [dense]
    for where in ("decode", "all"):
        with sparse_mode(model, where):
            plain = list(generate.generate(model, prompt, 20))
            for draft_tokens in (1, 3, 7, 12):             # 13 are more than the kernel takes
                run = generate_speculative(model, prompt, 20, draft, draft_thresholds, draft_tokens,
                                           sparse_verifier=True)
                assert run.against == "the sparse model"
                assert list(run) == plain
            texts.append(plain)
    assert len(set(map(tuple, texts))) == 3
    with sparse_mode(model, "all", dense_prefix=2):
        with pytest.raises(InputError, match="dense prefix"):
            generate_speculative(model, prompt, 20, draft, draft_thresholds)


@pytest.mark.parametrize("kind", [*KINDS, "wrong"])
def test_a_rejected_draft_leaves_the_cache_as_it_was(kind):
    model = tiny_model(vocab_size=13)
    prompt = tokens_of(model, 6).tolist()
    draft, thresholds = draft_of(kind, model)
    run = generate_speculative(model, prompt, 20, draft, thresholds, 5)
    text = [next(run) for _ in range(15)]
    assert sum(run.statistics.reached) > sum(run.statistics.accepted)
    caches = [(model, run.cache, run.cache.used)]
    if isinstance(draft, Llama):         # its last guesses stay until the next round
        caches.append((draft, run.draft.cache, len(prompt) + len(text) - 6))
    for of, cache, used in caches:
        fresh = of.make_cache(1, 40)
        with sparse_mode(of, "off"):
            of(torch.tensor([prompt + text]), fresh)
        used = min(used, fresh.used)
        assert used >= 15
        assert close(cache.keys[:, :, :, :used], fresh.keys[:, :, :, :used], 1e-12)
        assert close(cache.values[:, :, :, :used], fresh.values[:, :, :, :used], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [2, 5, 12])
def test_speculation_with_a_sliding_window(kind, window):
    model = tiny_model(vocab_size=13, model_type="mistral", sliding_window=window)
    prompt = tokens_of(model, 9).tolist()
    plain = list(generate.generate(model, prompt, 24))
    draft, thresholds = draft_of(kind, model)
    for draft_tokens in (1, 4, 7):
        assert list(generate_speculative(model, prompt, 24, draft, thresholds, draft_tokens)) == plain


def test_an_abandoned_or_interleaved_speculation_leaves_no_trace():
    dense = tiny_model(vocab_size=13)
    prompts = [tokens_of(dense, 5, seed=seed).tolist() for seed in range(2)]
    plain = [list(generate.generate(dense, prompt, 20)) for prompt in prompts]
    model = sparse_model(0.2, vocab_size=13)
    state = model.sparse_state
    before = state.thresholds.clone()
    sparser = dict.fromkeys(names_of(model), 0.5)
    runs = [generate_speculative(model, prompt, 20, "sparse", sparser, 3) for prompt in prompts]
    texts = [[], []]
    for _ in range(15):
        for run, text in zip(runs, texts):
            text.append(next(run))
            assert state.mode == "decode"
            assert torch.equal(state.thresholds, before)
    assert texts == [text[:15] for text in plain]


SAMPLING = dict(temperature=0.9, top_k=4, top_p=0.97)


def p_value_of_drafts(kind, length=1500):
    """Return how probable it is that a text sampled with drafts follows the model's distribution.

    The model sees one token at a time, so that each token is drawn given the one before it, and
    one long run holds many draws from each of its few distributions.
    """
    shape = dict(vocab_size=5, num_hidden_layers=1, sliding_window=1, max_position_embeddings=2000)
    model = tiny_model(torch.float32, seed=3, **shape)
    p = Sampling(**SAMPLING).probabilities(model(torch.arange(5)[:, None])[:, 0])           # (5, 5)
    draft, thresholds = draft_of(kind, model, threshold=0.8, noise=0.6)
    run = generate_speculative(model, [0], length, draft, thresholds, 3, seed=0, **SAMPLING)
    text = torch.tensor(list(run))
    did = run.statistics
    assert 0.1 < sum(did.accepted) / sum(did.reached) < 0.95               # p and q differ, and meet
    assert did.reached[2] > 100
    counts = torch.zeros(5, 5).index_put_((text[:-1], text[1:]), torch.ones(()), accumulate=True)
    expected = counts.sum(1, keepdim=True) * p
    return p_value(counts.flatten(), expected.flatten())


@pytest.mark.parametrize("kind", [*KINDS, "drawn"])
def test_speculative_sampling_has_the_models_distribution(kind):
    assert p_value_of_drafts(kind) > 1e-3


@pytest.mark.parametrize("kind", ["sparse", "model"])
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
    assert ((q > 0).sum(1) <= 4).all()


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_speculation_repeats_with_a_seed(kind):
    model = tiny_model(vocab_size=13)
    plain = [list(generate.generate(model, [1, 2], 12, 1.0, seed=seed)) for seed in range(3)]
    draft, thresholds = draft_of(kind, model)
    texts = [list(generate_speculative(model, [1, 2], 12, draft, thresholds, 3, 1.0, seed=seed))
             for seed in (0, 1, 2, 0)]
    assert texts[0] == texts[3] != texts[1]
    if kind == "object":                 # not drawn: one draw a token, and even the text is plain's
        assert texts[:3] == plain


def test_statistics_of_a_speculation():
    did = Statistics()
    did.record(3, 1)                     # the third guess was not judged
    did.record(2, 2)
    did.record(0, 0)
    assert did.passes == 3
    assert did.reached == [2, 2]
    assert did.acceptance == [1.0, 0.5]


def test_speculation_refuses_what_does_not_fit():
    for options, message in [
        ({}, 'draft "sparse" needs a model made sparse'),
        ({"draft": "other"}, "draft is"),
        ({"draft": tiny_model(vocab_size=12)}, "the draft model has 12 tokens, the model 61"),
        ({"draft_tokens": 0}, "draft_tokens is 0"),
    ]:
        with pytest.raises(InputError, match=message):
            generate_speculative(tiny_model(), [1, 2], 4, **options)


# Text as it comes

@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_decoded_text(text):
    tokenizer = load_tokenizer(DEMO)
    ids = tokenizer.encode(text, bos=False)
    for prompt in ([], tokenizer.encode("x = ")):
        decoder = StreamDecoder(tokenizer, prompt)
        parts = [decoder.add(i) for i in ids]
        assert not any("\ufffd" in part for part in parts)
        assert "".join(parts) + decoder.end() == text


def test_a_character_that_never_ends():
    tokenizer = load_tokenizer(DEMO)
    decoder = StreamDecoder(tokenizer)
    half = tokenizer.encode("🙂", bos=False)[:2]
    assert [decoder.add(i) for i in half] == ["", ""]
    assert "\ufffd" in decoder.end()


def test_ctrl_c_keeps_what_was_written(capsys):
    def interrupted():
        yield from (70, 71, 72)
        raise KeyboardInterrupt

    show = lambda text: print(text, end="")
    ids, _, _, early = generate.stream(interrupted(), None, show)
    assert early
    assert ids == [70, 71, 72]
    assert capsys.readouterr().out == " 70 71 72\n[interrupted]"
    with pytest.raises(SystemExit) as ended:
        llama.command_line(lambda: list(interrupted()))
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith(": interrupted\n")


# --------------------------------------------------------------------------------------------------
# demo/

def test_corpus_parts_do_not_meet():
    train = dict(corpus.files("train"))
    held_out = dict(corpus.files("held-out"))
    assert train and held_out
    assert not train.keys() & held_out.keys()
    assert all(corpus.is_held_out(path) for path in held_out)
    foreign = corpus.TEST_FOLDERS | {"site-packages"}
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
    newline = tokenizer.encode("\n", bos=False)
    assert len(newline) == 1
    assert tokenizer.encode("a\n\nb", bos=False).count(newline[0]) == 2


def test_the_demo_model_is_small_and_knows_python():
    assert sum(file.stat().st_size for file in DEMO.iterdir() if file.is_file()) < 16e6
    model, tokenizer = llama.load_model(DEMO, DEVICE)
    assert 6e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 7.5e6
    calibration = calibrate.load_calibration(model, DEMO)
    assert calibration.allocations == ["greedy", "uniform"]
    tokens, source = llama.read_tokens(tokenizer, None, "held-out")
    assert source.startswith("held-out part of the standard library of Python")
    dense = perplexity(model, tokens[:4000])
    sparsify.sparsify(model, calibration.thresholds(0.5))
    dropped = perplexity(model, tokens[:4000])
    assert dense < 20
    assert dense < dropped < 1.2 * dense
    assert realised_sparsity(model) == pytest.approx(0.5, abs=0.04)


# --------------------------------------------------------------------------------------------------
# The commands

def test_the_demo_runs(run):
    ended = run("generate.py", "--max-new-tokens", 16)
    assert ended.status == 0, ended.err
    assert "--- dense: 16 tokens" in ended.out
    assert "--- 50% sparse: 16 tokens" in ended.out
    assert re.search(r"sparse over dense: [\d.]+x; the first \d+ of 16 tokens are the", ended.out)
    assert ended.out.count("class Stack:") == 2
    last = ended.out.strip().splitlines()[-1]
    assert "python -m beyond" in last
    assert "random:llama-3.2-1b" in last


@pytest.mark.parametrize("draft", ["sparse", "demo"])
def test_the_demo_speculates(run, draft):
    ended = run("generate.py", "--draft", draft, "--compare", "--max-new-tokens", 24,
                "--dtype", "float32")
    assert ended.status == 0, ended.err
    assert "the same text, all 24 tokens" in ended.out or "the two best logits are" in ended.out
    assert "lossless against the dense model" in ended.out
    assert "speculative over plain" in ended.out
    ended = run("generate.py", "--draft", draft, "--sparsity", 0.5, "--max-new-tokens", 8,
                "--temperature", 1, "--draft-tokens", 2)
    assert ended.status == 0, ended.err
    assert "lossless against the sparse model at 50%:" in ended.out


def test_a_checkpoint_from_calibration_to_text(run, tiny_folder):
    ended = run("generate.py", "--model", tiny_folder)
    assert ended.status == 2
    assert f"make one with: python calibrate.py --model {tiny_folder}" in ended.err
    ended = run("calibrate.py", "--model", tiny_folder, "--text", tiny_folder / "text.txt",
                "--greedy")
    assert ended.status == 0, ended.err
    assert "text.txt; allocations: greedy, uniform" in ended.out
    assert sorted(path.name for path in tiny_folder.iterdir()) == [
        "calibration.safetensors", "config.json", "model.safetensors", "text.txt",
        "tokenizer.model"]
    ended = run("sparsify.py", "--model", tiny_folder, "--text", tiny_folder / "text.txt",
                "--tokens", 400, "--sparsity", 0.25, 0.5)
    assert ended.status == 0, ended.err
    rows = [line.split()[:2] for line in ended.out.splitlines()[2:]]
    assert rows == [["dense", "0%"], ["uniform", "25%"], ["uniform", "50%"], ["greedy", "25%"],
                    ["greedy", "50%"]]
    ended = run("generate.py", "--model", tiny_folder, "--sparsity", 0.4, "--allocation", "uniform",
                "--max-new-tokens", 4, "--temperature", 1, "--seed", 1)
    assert ended.status == 0, ended.err
    assert "40% sparse: 4 tokens" in ended.out
    skipped = re.search(r"([\d.]+)% of the blocks' weights skipped", ended.out)
    assert 30 < float(skipped[1]) < 50
    ended = run("generate.py", "--model", tiny_folder, "--sparsity", 0, "--head-sparsity", 0.5,
                "--max-new-tokens", 8)
    assert ended.status == 0, ended.err
    assert " 0.0% of the blocks' weights skipped" in ended.out


def test_the_head_is_sparse_where_it_is_asked_for(tiny_folder):
    model, tokenizer = llama.load_model(tiny_folder)
    arguments = generate.settle(generate.make_parser().parse_args(
        ["--model", str(tiny_folder), "--sparsity", "0", "--head-sparsity", "0.5"]))
    writer = generate.Writer(arguments, model, tokenizer)
    tokens = tokens_of(model, 700)
    writer.calibration = calibrate.calibrate(model, tokens)
    writer.prepare()
    assert writer.mode == "decode"
    perplexity(model, tokens)
    head = model.lm_head
    assert 1 - head.kept / head.seen == pytest.approx(0.5, abs=0.03)
    assert realised_sparsity(model) == 0


def test_import_teal_on_the_command_line(run, authors, tmp_path):
    folder, _, _ = authors
    tiny_model().save_pretrained(tmp_path / "model")
    ended = run("calibrate.py", "--model", tmp_path / "model", "--import-teal", folder)
    assert ended.status == 0, ended.err
    assert "publish for Tiny-7B; allocations: greedy, uniform" in ended.out
    calibration = calibrate.load_calibration(tiny_model(), tmp_path / "model")
    assert calibration.allocations == ["greedy", "uniform"]
    with pytest.raises(InputError, match="made for another model of the same shape.*make one with"):
        calibrate.load_calibration(tiny_model(seed=1), tmp_path / "model")


def test_random_weights_are_calibrated_as_they_are(run, monkeypatch):
    monkeypatch.setitem(llama.PRESETS, "small", llama.preset(64, 96, 2, 4, 2, 50, 256, 1e4))
    ended = run("generate.py", "--model", "random:small", "--max-new-tokens", 8)
    assert ended.status == 0, ended.err
    assert "random weights, for speed alone" in ended.out
    assert "50% sparse: 8 tokens" in ended.out
    ended = run("generate.py", "--model", "random:small", "--prompt", "x")
    assert ended.status == 2
    assert "random weights and no tokenizer" in ended.err


def test_model_prints_the_shape_of_a_checkpoint(run):
    ended = run("model.py")
    assert ended.status == 0, ended.err
    assert "6,557,440" in ended.out
    assert "sparsity can skip" in ended.out
    for preset, parameters in [("llama-2-7b", "6,738,415,616"),            # the published numbers
                               ("llama-3.2-1b", "1,235,814,400")]:
        assert parameters in run("model.py", f"random:{preset}").out


def test_kernel_prints_times(run, monkeypatch, capsys):
    """With a clock by which everything takes a millisecond."""
    monkeypatch.setattr(kernel, "memory_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(kernel, "median_time", lambda call, device: call(0) is None or 1e-3)
    monkeypatch.setattr(kernel, "copies_of", lambda inputs, outputs, dtype, device: [
        torch.randn(inputs, outputs, device=device).to(dtype)] * 2)
    monkeypatch.setitem(llama.PRESETS, "small", llama.preset(64, 96, 2, 4, 2, 50, 32, 1e4))
    monkeypatch.setattr(sys, "argv", ["kernel.py", "--shapes", "small", "--rows", "1", "3",
                                      "--sparsity", "0", "0.5"])
    kernel.command_line(kernel.main)
    out = capsys.readouterr().out
    assert out.count("memory bandwidth: 10.0 GB/s") == 1
    assert out.count("64 x 96 float32, 0 MB, 3 rows") == 1
    half = [line.split() for line in out.splitlines() if line.strip().startswith("50%")]
    assert len(half) == 2 * 4 * 2        # dtypes, shapes, rows
    assert all(row[3:5] == ["50%", "1.00x"] for row in half)


def test_times_are_medians_of_calls():
    calls = []
    assert kernel.median_time(calls.append, torch.device("cpu"), seconds=0) >= 0
    assert calls == [0, 1, *range(11)]


@pytest.mark.parametrize("file", [*(f"{name}.py" for name in CORE), "demo/train.py"])
def test_help(run, file):
    ended = run(file, "--help")
    assert ended.status == 0
    assert "usage:" in ended.out
    options = re.split(r"\n  (?=-)", ended.out.split("options:")[1])[2:]   # after --help
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
    (["calibrate.py", "--import-teal", "x", "--greedy"], "--greedy mean nothing with --import-teal"),
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
    (["generate.py", "--draft", "sparse", "--draft-sparsity", "1"], "--draft-sparsity: 1, expected"),
    (["generate.py", "--draft", "demo", "--draft-sparsity", "0.5"], "is for --draft sparse"),
    (["generate.py", "--draft", "sparse", "--draft-tokens", "0"], "0 is not a whole number above"),
    (["generate.py", "--draft-tokens", "3"], "--compare and --draft-tokens are for --draft"),
    (["generate.py", "--compare"], "--compare and --draft-tokens are for --draft"),
    (["generate.py", "--unheard-of"], "unrecognized arguments: --unheard-of"),
])
def test_bad_input_on_the_command_line(run, command, message):
    ended = run(*command)
    assert ended.status == 2, ended.out
    assert message in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert ended.err.startswith(f"{command[0]}: error: ")


def test_a_draft_model_needs_the_same_tokenizer(monkeypatch):
    class Tokenizer:
        eos_ids = ()

        def __init__(self, *pieces):
            self.pieces = lambda: list(pieces)
            self.vocab_size = len(pieces)

    arguments = generate.settle(generate.make_parser().parse_args([]))
    writer = generate.Writer(arguments, tiny_model(), Tokenizer("a", "b"))
    for other, message in [(Tokenizer("a", "c"), "they differ from token 1 on"),
                           (Tokenizer("a", "b", "c"), "they differ from token 2 on"),
                           (None, "random weights and none")]:
        monkeypatch.setattr(generate, "load_model", lambda *_: (tiny_model(), other))
        with pytest.raises(InputError, match=message):
            writer.load_draft("x")
    monkeypatch.setattr(generate, "load_model", lambda *_: (tiny_model(), Tokenizer("a", "b")))
    assert isinstance(writer.load_draft("x"), Llama)


def test_a_command_works_from_another_folder(tmp_path):
    command = [sys.executable, HERE / "sparsify.py", "--text", "absent"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == "sparsify.py: error: absent: cannot be read: No such file or directory\n"


def test_progress_is_said_on_a_terminal(capsys, monkeypatch):
    assert list(llama.progress([1, 2], "work")) == [1, 2]
    assert capsys.readouterr().err == ""                   # short work says nothing elsewhere
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(llama.progress([1, 2], "work")) == [1, 2]
    assert "work: 1 of 2, 0.0 minutes left" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# The rules of the house

def imports_of(path):
    """Return the modules that a file imports, except under `if __name__ == "__main__"`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = [node for node in tree.body if isinstance(node, ast.If)
               and ast.unparse(node.test) == "__name__ == '__main__'"]
    hidden = {child for node in guarded for child in ast.walk(node)}
    names = set()
    for node in ast.walk(tree):
        if node not in hidden and isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if node not in hidden and isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("place", range(len(CORE)))
def test_imports_run_one_way(place):
    imported = imports_of(HERE / f"{CORE[place]}.py")
    assert not imported & set(CORE[place:])
    assert CORE[0] in imported or place == 0


def test_the_core_stands_alone():
    files = [HERE / f"{name}.py" for name in [*CORE, "test_all"]]
    files += [DEMO / "corpus.py", DEMO / "train.py"]
    for path in files:
        assert "beyond" not in imports_of(path)


def test_lines_are_short():
    for name in [*CORE, "test_all"]:
        lines = (HERE / f"{name}.py").read_text(encoding="utf-8").splitlines()
        assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []


def test_the_activation_is_named_once():
    sources = [(HERE / f"{name}.py").read_text(encoding="utf-8") for name in CORE]
    assert sum(source.count("F.silu") for source in sources) == 1
