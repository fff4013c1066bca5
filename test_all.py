"""What must stay true of minTEAL, file by file. `pytest test_all.py` runs in a few minutes on two cores.

Without a GPU the Triton kernels run in Triton's interpreter, which rounds float32 to bfloat16 on the way into some
operations: there 2^-7 is allowed.
"""
import base64
import dataclasses
import json
import math
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                   # read when triton is imported

import allocate                                                                             # noqa: E402
import calibrate                                                                            # noqa: E402
import checkpoint                                                                           # noqa: E402
import cli                                                                                  # noqa: E402
import decode                                                                               # noqa: E402
import generate as generation                                                               # noqa: E402
import judge as judging                                                                     # noqa: E402
import kernel                                                                               # noqa: E402
import model as llama                                                                       # noqa: E402
import parallel                                                                             # noqa: E402
import quantize as quantizing                                                               # noqa: E402
import rotate as rotation                                                                   # noqa: E402
import speculate as speculation                                                             # noqa: E402
import step as stepping                                                                     # noqa: E402
import timing                                                                               # noqa: E402
import tokenizer as tokenizing                                                              # noqa: E402
import sparsify as sparse                                                                   # noqa: E402
from calibrate import Calibration                                                           # noqa: E402
from calibration import share_below                                                         # noqa: E402
from demo import corpus                                                                     # noqa: E402
from generate import StreamDecoder, generate                                                # noqa: E402
from model import Config, InputError, Llama, read_safetensors, write_safetensors            # noqa: E402

HERE = Path(__file__).parent
DEMO = HERE / "demo"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tiny_config(**changes):
    return Config(**{**dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
                            num_key_value_heads=2, head_dim=12, vocab_size=61, max_position_embeddings=64), **changes})


def tiny_model(dtype=torch.float64, seed=0, **changes):
    """A Llama with weights large enough that its next tokens differ and its activations matter."""
    torch.manual_seed(seed)
    model = Llama(tiny_config(**changes))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 2:
            parameter.copy_(torch.randn(parameter.shape) * 1.5 * parameter.shape[1] ** -0.5)
        else:
            parameter.copy_(1 + 0.2 * torch.randn(parameter.shape))
    return model.to(dtype).eval()


def write_sharded(folder, config, dtype=torch.bfloat16, shard_bytes=5e9):
    """A checkpoint folder of random weights in shards, with the demo's tokenizer; never more than a shard is in memory."""
    folder.mkdir()
    model = Llama.shapes(config)
    pool, weight_map, shard, size = torch.randn((1 << 22) + 7).to(dtype), {}, {}, 0
    for place, (name, parameter) in enumerate(parameters := list(model.named_parameters())):
        if name.endswith("norm.weight"):
            shard[name] = torch.ones(parameter.shape, dtype=dtype)
        else:
            scaled = pool * parameter.shape[-1] ** -0.5
            shard[name] = scaled.repeat(-(-parameter.numel() // len(scaled)))[:parameter.numel()].view(parameter.shape)
        size += parameter.numel() * dtype.itemsize
        if size >= shard_bytes or place + 1 == len(parameters):
            file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            write_safetensors(folder / file, shard, {"format": "pt"})
            weight_map, shard, size = weight_map | dict.fromkeys(shard, file), {}, 0
    checkpoint.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    config.write(folder, dtype)
    (folder / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())


def anonymous_memory():
    """Bytes of this process's memory that are not pages of files (RssAnon)."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def load_and_measure(folder):
    """(model, seconds, bytes of anonymous memory at the highest while it was loaded, of its weights)."""
    before, highest, loaded = anonymous_memory(), 0, threading.Event()

    def watch():
        nonlocal highest
        while not loaded.wait(0.002):
            highest = max(highest, anonymous_memory())
    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    model = Llama.from_pretrained(folder)
    seconds = time.perf_counter() - began
    loaded.set()
    watcher.join()
    return model, seconds, highest - before, sum(parameter.nbytes for parameter in model.parameters())


def tokens_like(model, *shape, seed=0):
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def linear_names(model):
    return checkpoint.linear_names(model.config)


def close(found, expected, tolerance):
    """Relative error of a whole tensor, ‖found − expected‖ / ‖expected‖; NaN never passes."""
    found, expected = found.double().cpu(), expected.double().cpu()
    error = (found - expected).norm() / expected.norm().clamp(min=1e-30)
    return bool(error <= tolerance)


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(HERE), **more}


def run(*command, env=None, **options):
    """A command line of ours, as its user runs it."""
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=HERE,
                          env=environment(**env or {}), **options)


# ---------------------------------------------------------------------------------------------------------
# model.py: safetensors

def write_raw(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in checkpoint.DTYPES.values()}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(7.0), "transposed": torch.randn(4, 3).t()}
    write_safetensors(path, tensors, {"made by": "a test"})
    found = read_safetensors(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert checkpoint.read_header(path)[1] == {"made by": "a test"}


def test_safetensors_is_mapped_privately(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": torch.arange(8.0)})
    before = path.read_bytes()
    read_safetensors(path)["x"].zero_()
    assert path.read_bytes() == before


def test_safetensors_unaligned_data(tmp_path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    raw = json.dumps({"x": entry}).encode()
    raw += b" " * ((3 - len(raw)) % 8)                     # data begins 3 bytes past a multiple of 8
    path = write_raw(tmp_path / "x.safetensors", raw, struct.pack("<ff", 1.5, -2.0))
    assert read_safetensors(path)["x"].tolist() == [1.5, -2.0]


X = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("header, data, length, message", [
    ({"x": X}, bytes(4), None, "run past the 4 bytes of data: the file is truncated"),
    ({"x": X}, bytes(8), 10**12, "its header should be 1000000000000 bytes long"),
    (b"not json", b"", None, "its header is not JSON"),
    (b"[]", b"", None, "expected an object"),
    ({"x": X | {"dtype": "F13"}}, bytes(8), None, "dtype 'F13' is not known"),
    ({"x": X | {"shape": [3]}}, bytes(8), None, "hold 8 bytes, F32 x [3] needs 12"),
    ({"x": X | {"shape": [-2]}}, bytes(8), None, "is not a list of sizes"),
    ({"x": X | {"shape": [True, 2]}}, bytes(8), None, "is not a list of sizes"),
    ({"x": X | {"data_offsets": [8, 0]}}, bytes(8), None, "hold -8 bytes"),
    ({"x": X | {"data_offsets": [0]}}, bytes(8), None, "is not [begin, end]"),
    ({"x": X | {"data_offsets": [8, 16]}}, bytes(16), None, "leave a gap"),
    ({"x": X, "y": X | {"data_offsets": [4, 12]}}, bytes(12), None, "overlap those of x"),
    ({"x": X}, bytes(12), None, "4 bytes follow the last tensor"),
    ({"x": {"dtype": "F32"}}, b"", None, "should have dtype, shape and data_offsets"),
    ({"__metadata__": {"a": 1}, "x": X}, bytes(8), None, "__metadata__ should map text to text"),
    (b'{"x": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8), None, "a name stands twice"),
    ({"x": X | {"shape": [2**63, 0], "data_offsets": [0, 0]}}, b"", None, "is not a list of sizes"),
    ({"x": X | {"shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}}, b"", None, "larger than any memory"),
    (b"[" * 100_000, b"", None, "its header is not JSON"),
])
def test_safetensors_bad_header(tmp_path, header, data, length, message):
    path = write_raw(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(InputError) as error:
        read_safetensors(path)
    assert message in str(error.value) and "bad.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_safetensors_too_short_or_absent(tmp_path):
    (tmp_path / "short").write_bytes(b"1234")
    with pytest.raises(InputError, match="truncated: 4 bytes"):
        read_safetensors(tmp_path / "short")
    with pytest.raises(InputError, match="absent: cannot be read"):
        read_safetensors(tmp_path / "absent")


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": torch.ones(3)})

    class Fails:
        dtype, shape = torch.float32, (3,)
        element_size, numel = (lambda self: 4), (lambda self: 3)

        def detach(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, {"x": Fails()})
    assert read_safetensors(path)["x"].tolist() == [1, 1, 1] and os.listdir(tmp_path) == ["x.safetensors"]


def test_a_file_larger_than_memory_can_be_opened(tmp_path):
    path, size = tmp_path / "large", 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    write_raw(path, {"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    os.truncate(path, path.stat().st_size + size)          # a hole: it takes no disk
    assert read_safetensors(path)["x"][size - 1] == 0


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder: cannot be written"):
        write_safetensors(tmp_path / "folder", {"x": torch.ones(2)})
    with pytest.raises(InputError, match="cannot be written: No such file"):
        write_safetensors(tmp_path / "absent" / "x", {"x": torch.ones(2)})
    assert os.listdir(tmp_path) == ["folder"]


def test_a_type_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(InputError, match="complex64 cannot be written"):
        write_safetensors(tmp_path / "x", {"x": torch.zeros(2, dtype=torch.complex64)})
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_a_file_of_many_tensors_is_read_in_pieces(tmp_path, monkeypatch):
    tensors = {f"t{i:04}": torch.full((1 + i % 5,), i % 251, dtype=(torch.uint8, torch.int16, torch.float32)[i % 3]) for i in range(1500)}
    write_safetensors(tmp_path / "many", tensors)
    ended = run("-c", "import resource, sys, model\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
                "print(len(model.read_safetensors(sys.argv[1])))", tmp_path / "many")
    assert ended.stdout.strip() == "1500", ended.stderr
    few = dict(list(tensors.items())[:40])
    write_safetensors(tmp_path / "few", few)
    for piece, name, expected in ((1, "few", few), (7, "few", few), (1000, "many", tensors), (1 << 28, "many", tensors)):
        monkeypatch.setattr(checkpoint, "PIECE", piece)    # 1: one for each tensor
        found = read_safetensors(tmp_path / name)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------------------------------------------
# model.py: the model

def reference_logits(model, tokens):
    """Llama written out for one sequence, head by head and position by position, in float64."""
    config, state = model.config, {name: p.double() for name, p in model.named_parameters()}
    D, share = config.head_dim, config.num_attention_heads // config.num_key_value_heads

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def turn(v, position):                                 # RoPE as a product of complex numbers
        z = torch.complex(v[:D // 2], v[D // 2:])
        angle = position * torch.tensor([config.rope_theta ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
        z = z * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag))

    x = state["model.embed_tokens.weight"][tokens]
    for layer in range(config.num_hidden_layers):
        w = {name: state[f"model.layers.{layer}.{name}.weight"] for name in checkpoint.block_linears(config)}
        h = norm(x, state[f"model.layers.{layer}.input_layernorm.weight"])
        q, k, v = (h @ w[f"self_attn.{n}_proj"].T for n in "qkv")
        rows = []
        for i in range(len(tokens)):
            heads = []
            for head in range(config.num_attention_heads):
                own, shared = slice(head * D, head * D + D), slice(head // share * D, head // share * D + D)
                query = turn(q[i, own], i)
                scores = torch.stack([query @ turn(k[j, shared], j) / math.sqrt(D) for j in range(i + 1)])
                heads.append(scores.softmax(0) @ v[:i + 1, shared])
            rows.append(torch.cat(heads))
        x = x + torch.stack(rows) @ w["self_attn.o_proj"].T
        h = norm(x, state[f"model.layers.{layer}.post_attention_layernorm.weight"])
        gate = h @ w["mlp.gate_proj"].T
        x = x + (gate * gate.sigmoid() * (h @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
    head = state["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return norm(x, state["model.norm.weight"]) @ head.T


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4},
                                     {"num_key_value_heads": 1, "rope_theta": 5e5, "head_dim": 8}])
def test_logits_are_those_of_the_formula(changes):
    model = tiny_model(**changes)
    tokens = tokens_like(model, 9)
    expected = reference_logits(model, tokens)
    assert model(tokens[None]).dtype == torch.float64
    assert close(model(tokens[None])[0], expected, 1e-12)
    assert close(model.float()(tokens[None])[0], expected, 1e-5)
    assert model.bfloat16()(tokens[None]).dtype == torch.float32


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_cache_gives_the_logits_of_the_whole_sequence(dtype, tolerance):
    model = tiny_model(dtype)
    tokens = tokens_like(model, 2, 20)
    whole = model(tokens)
    for pieces in ([20], [1] * 20, [7, 1, 1, 5, 6]):
        cache = model.make_cache(2, 20)
        parts = [model(part, cache) for part in tokens.split(pieces, dim=1)]
        assert cache.used == 20 and close(torch.cat(parts, 1), whole, tolerance)
    cache.used = 11                                        # forget, and go on from there
    assert close(model(tokens[:, 11:], cache), whole[:, 11:], tolerance)
    assert close(model(tokens, last_only=True), whole[:, -1:], tolerance)


def test_positions_mask_and_slots():
    model = tiny_model()
    tokens = tokens_like(model, 1, 8)
    whole = model(tokens)
    cache = model.make_cache(1, 12)                        # longer than what is used of it, as a CUDA graph has it
    cache.keys.fill_(float("nan")), cache.values.fill_(1e9)                # the unused part must not be seen
    cache.keys.nan_to_num_(1e9)
    for i in range(8):
        position = torch.tensor([i])
        logits = model(tokens[:, i:i + 1], cache, positions=position, slots=position, mask=torch.arange(12)[None] <= i)
        assert close(logits, whole[:, i:i + 1], 1e-12) and cache.used == 0
    # Two continuations of one beginning, side by side in one call: each sees the beginning and itself.
    cache = model.make_cache(1, 12)
    model(tokens[:, :5], cache)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1, 0, 1]], dtype=torch.bool)
    branches = model(torch.tensor([[7, 8, 9]]), cache, positions=torch.tensor([5, 5, 6]), mask=mask)
    for row, path in enumerate(([7], [8], [7, 9])):
        alone = model(torch.cat((tokens[:, :5], torch.tensor([path])), 1))
        assert close(branches[:, row], alone[:, -1], 1e-12)


def test_cache_and_vocabulary_have_limits():
    model = tiny_model()
    with pytest.raises(InputError, match="3 tokens do not fit a cache of 4 positions, 2 of them used"):
        cache = model.make_cache(1, 4)
        model(tokens_like(model, 1, 2), cache)
        model(tokens_like(model, 1, 3), cache)
    with pytest.raises(InputError, match="token id 61 is outside the vocabulary of 61"):
        model(torch.tensor([[0, 61]]))
    with pytest.raises(InputError, match="token id -1 is outside"):
        model(torch.tensor([[-1, 60]]))


def save_sharded(model, folder):
    """The checkpoint in two shards, as the hub has large ones."""
    tensors = dict(model.named_parameters())
    names = sorted(tensors)
    model.config.write(folder, torch.float32)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        shard = f"model-{i + 1:05}-of-00002.safetensors"
        write_safetensors(folder / shard, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint_round_trip(tmp_path, tied):
    model = tiny_model(torch.float32, tie_word_embeddings=tied)
    tokens = tokens_like(model, 1, 12)
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "sharded").mkdir()
    save_sharded(model, tmp_path / "sharded")
    for folder in ("whole", "sharded"):
        loaded = Llama.from_pretrained(tmp_path / folder)
        assert loaded.config == model.config and not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert torch.equal(loaded(tokens), model(tokens))
    assert Llama.from_pretrained(tmp_path / "whole", dtype=torch.float64)(tokens).dtype == torch.float64


def test_checkpoint_that_does_not_fit(tmp_path):
    model = tiny_model(torch.float32)
    save_sharded(model, tmp_path)
    tensors = dict(model.named_parameters())
    shard = tmp_path / "model-00001-of-00002.safetensors"
    original = shard.read_bytes()
    names = sorted(tensors)[::2]

    def refused(message, changed):
        write_safetensors(shard, changed)
        with pytest.raises(InputError, match=message):
            Llama.from_pretrained(tmp_path)

    held = {name: tensors[name] for name in names}
    refused(f"tensor {names[-1]} is missing from the checkpoint", {name: held[name] for name in names[:-1]})
    refused("a second one, another file holds it too", held | {sorted(tensors)[1]: tensors[sorted(tensors)[1]]})
    refused("tensor extra: not part of a Llama", held | {"extra": torch.zeros(2)})
    refused(r"shape \[3, 3\], config.json makes it", held | {names[0]: torch.zeros(3, 3)})
    refused("torch.int64, expected floating point", held | {names[0]: held[names[0]].long()})
    shard.write_bytes(original[:-10])
    with pytest.raises(InputError, match="truncated"):
        Llama.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(InputError, match="00001-of-00002.safetensors: missing, but named by"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match="no checkpoint: neither"):
        Llama.from_pretrained(tmp_path)


def config_json(**changes):
    return {"model_type": "llama", **vars(tiny_config()), **changes}


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "gpt2"}, 'model_type is "gpt2"'),
    ({"hidden_act": "gelu"}, 'hidden_act is "gelu", supported is "silu"'),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling is"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_parameters is"),
    ({"hidden_size": 0}, "hidden_size is 0, expected a number above 0"),
    ({"vocab_size": "many"}, 'vocab_size is "many"'),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3, supported is a divisor of the 4"),
    ({"head_dim": 7}, "head_dim is 7, RoPE needs an even one"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    ({"rope_scaling": {"factor": 8.0}}, "rope_scaling is"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters is"),
    ({"rope_theta": float("nan")}, "rope_theta is NaN"),
    ({"hidden_size": 2**62}, "hidden_size is 4611686018427387904"),
    ({"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false"'),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
    ({"attention_bias": "yes"}, 'attention_bias is "yes", supported is true or false'),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
    ({"rope_scaling": {"type": "linear"}}, "factor is null, expected a number above 0"),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 64}}, "a low_freq_factor below the high_freq_factor"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters is"),
    ({"num_local_experts": 8}, "num_local_experts is 8, supported is 1"),
    ({"use_qk_norm": True}, "use_qk_norm is true, supported is false"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
])
def test_config_that_is_not_supported(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(config_json(**changes)))
    with pytest.raises(InputError) as error:
        Config.read(tmp_path)
    assert message in str(error.value) and "config.json" in str(error.value)


def test_config_defaults(tmp_path):
    raw = config_json(head_dim=None, num_key_value_heads=None, rope_parameters={"rope_theta": 777.0, "rope_type": "default"})
    del raw["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = Config.read(tmp_path)
    assert (config.head_dim, config.num_key_value_heads, config.rope_theta) == (8, 4, 777.0)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
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
    "mistral, sliding window": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 7},
}


def reference(folder, dtype=torch.float32, shard="10GB", **settings):
    """A small random model of transformers, saved to `folder`, with weights large enough that every part of it matters."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (requirements-dev.txt)")
    kind = "Mistral" if settings.pop("model_type", "llama") == "mistral" else "Llama"
    theta, scaling = settings.pop("rope_theta", 10000.0), settings.pop("rope_scaling", None) or {"rope_type": "default"}
    config = getattr(transformers, f"{kind}Config")(**{**dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=101, max_position_embeddings=128,
        num_key_value_heads=4, rope_parameters=scaling | {"rope_theta": theta}), **settings})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3)
                            + ("norm" in name))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
@pytest.mark.parametrize("what", REFERENCES)
def test_logits_are_those_of_transformers(tmp_path, what):
    theirs = reference(tmp_path, **REFERENCES[what])
    ours = Llama.from_pretrained(tmp_path)
    tokens = tokens_like(ours, 2, 40)
    expected = theirs(tokens).logits
    assert close(ours(tokens), expected, 1e-4)
    cache = ours.make_cache(2, 40)                         # a prompt, a few tokens at once, then token by token
    found = [ours(part, cache) for part in tokens.split([9, 5, *[1] * 26], dim=1)]
    assert close(torch.cat(found, 1), expected, 1e-4)
    sparse.sparsify(ours, dict.fromkeys(linear_names(ours), 0.0))
    cache = ours.make_cache(2, 40)
    found = [ours(part, cache) for part in tokens.split([9, 5, *[1] * 26], dim=1)]
    assert close(torch.cat(found, 1), expected, 1e-4)
    ours.save_pretrained(tmp_path / "again")               # and what we write, they read
    import transformers
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert close(again(tokens).logits, expected, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sharded_checkpoints_of_transformers(tmp_path, dtype):
    theirs = reference(tmp_path, dtype, "60KB", num_key_value_heads=2)
    assert len(checkpoint.shard_paths(tmp_path)) > 2
    ours = Llama.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = tokens_like(ours, 2, 30)
    assert close(ours(tokens), theirs(tokens).logits, 1e-4)
    assert Llama.from_pretrained(tmp_path).lm_head.weight.dtype == dtype


@torch.no_grad()
@pytest.mark.parametrize("spelling", [
    {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | {name: value for name, value in LLAMA3.items() if name != "rope_type"}},
    {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
])
def test_both_spellings_of_rope(tmp_path, spelling):
    theirs = reference(tmp_path, rope_theta=5e5, rope_scaling=LLAMA3)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw = {key: value for key, value in raw.items() if not key.startswith("rope")} | spelling
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours = Llama.from_pretrained(tmp_path)
    tokens = tokens_like(ours, 1, 60)
    assert close(ours(tokens), theirs(tokens).logits, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("what", ["plain", "grouped heads, explicit head_dim", "tied head", "attention biases", "MLP biases", "llama3 rope",
                                  "mistral, sliding window"])
def test_a_rotated_checkpoint_is_the_same_in_transformers(tmp_path, what):
    theirs = reference(tmp_path / "plain", **REFERENCES[what])
    import transformers
    ours = Llama.from_pretrained(tmp_path / "plain")
    windows = sparse.windows_of(tokens_like(ours, 32 * 12 + 1), 32)
    for source, out in (("plain", "once"), ("once", "twice")):
        Q, R = map(rotation.principal_directions, rotation.covariances(Llama.from_pretrained(tmp_path / source), windows))
        rotation.rotate(tmp_path / source, tmp_path / out, Q, R, torch.float32)
    tokens = tokens_like(ours, 2, 40)
    expected = theirs(tokens).logits
    for out in ("once", "twice"):
        assert close(Llama.from_pretrained(tmp_path / out)(tokens), expected, 1e-4)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / out, dtype=torch.float32)
        assert close(again(tokens).logits, expected, 1e-4)


def test_random_preset():
    config = llama.PRESETS["llama-3.2-1b"]
    with pytest.raises(InputError, match="preset 'gpt' is not known"):
        Llama.random("gpt")
    small = llama._preset(64, 96, 2, 4, 2, 50, 32, 1e4)
    llama.PRESETS["small"] = small
    try:
        model, again = (Llama.random("small", dtype=torch.float32) for _ in range(2))
    finally:
        del llama.PRESETS["small"]
    assert torch.equal(model(tokens_like(model, 1, 5)), again(tokens_like(model, 1, 5)))
    assert 0.5 < model.model.layers[0].mlp.down_proj.weight.std() * 96 ** 0.5 < 1.5
    llama.PRESETS["small"] = llama._preset(64, 96, 2, 4, 2, 50, 32, 1e4, tied=True)
    tied = Llama.random("small")
    del llama.PRESETS["small"]
    assert tied.lm_head.weight is tied.model.embed_tokens.weight and tied.lm_head.weight.dtype == torch.bfloat16
    # The published count of parameters, so the shapes are the real ones.
    sizes = config.num_hidden_layers * sum(a * b for a, b in checkpoint.block_linears(config).values())
    assert sizes + config.vocab_size * config.hidden_size + (2 * 16 + 1) * 2048 == 1_235_814_400


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    config = dataclasses.replace(llama.preset_config("llama-3.2-1b"), num_hidden_layers=4, vocab_size=20000)
    write_sharded(tmp_path / "large", config, shard_bytes=2e8)
    assert len(checkpoint.shard_paths(tmp_path / "large")) > 2
    ended = run("-c", "import pathlib, re, sys, test_all\nmodel, _, highest, weights = test_all.load_and_measure(sys.argv[1])\n"
                "print(weights, highest / weights, len(re.findall('safetensors', pathlib.Path('/proc/self/maps').read_text())),\n"
                "      model(test_all.tokens_like(model, 1, 4)).isfinite().all())", tmp_path / "large")
    weights, share, mapped, finite = ended.stdout.split()
    assert float(weights) > 5e8 and 0.9 < float(share) < 1.15 and finite == "tensor(True)", ended
    assert mapped == "0"                                   # of the files, nothing is held


# ---------------------------------------------------------------------------------------------------------
# kernel.py

BACKENDS = ["torch", pytest.param("c", marks=pytest.mark.skipif(kernel.c_library() is None, reason="no C compiler")),
            pytest.param("triton", marks=pytest.mark.skipif(kernel.triton is None, reason="no Triton"))]


def picker(seed):
    """(a generator, a function that picks one of its arguments with it)"""
    generator = torch.Generator().manual_seed(seed)
    return generator, lambda *choices: choices[torch.randint(len(choices), (), generator=generator)]


def gemv_case(seed):
    """A random problem: shapes odd and even, one of the dtypes, 1 to 8 rows, every kind of threshold."""
    generator, pick = picker(seed)

    dtype = pick(torch.float32, torch.bfloat16, torch.float16)
    rows, channels, outputs = pick(*range(1, 9)), pick(1, 7, 64, 129, 300), pick(1, 2, 63, 128, 257)
    x = torch.randn(rows, channels, generator=generator).to(dtype)
    weight_t = torch.randn(channels, outputs, generator=generator).to(dtype)
    threshold = pick(0.0, 0.5, 1e9, -1.0, torch.tensor(0.7), torch.rand(channels, generator=generator) * 1.5)
    return x, weight_t, threshold


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_gemv_against_float64(backend):
    device = DEVICE if backend == "triton" else torch.device("cpu")
    for seed in range(20 if backend == "triton" and device.type == "cpu" else 200):
        x, weight_t, threshold = gemv_case(seed)
        keep = x.double().abs() > (threshold.double() if isinstance(threshold, torch.Tensor) else threshold)
        if isinstance(threshold, torch.Tensor) and threshold.ndim and seed % 2:             # strided
            threshold = torch.stack((threshold, -threshold), 1)[:, 0]
        expected = (x.double() * keep) @ weight_t.double()
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        on_device = threshold.to(device) if isinstance(threshold, torch.Tensor) else threshold
        y = kernel.sparse_gemv(x.to(device), weight_t.to(device), on_device, backend, counts)
        assert y.shape == expected.shape and y.dtype == x.dtype
        # Errors are measured against the sum of magnitudes, which rounding is proportional to.
        scale = (x.double().abs() * keep) @ weight_t.double().abs()
        interpreted = backend == "triton" and device.type == "cpu"
        allowed = 2**-7 if interpreted or x.dtype == torch.bfloat16 else 2**-10 if x.dtype == torch.float16 else 2**-20
        assert ((y.cpu().double() - expected).abs() <= allowed * scale + 1e-30).all(), (seed, x.dtype)
        assert counts.tolist() == [keep.sum().item(), keep.numel()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_kept(backend):
    device = DEVICE if backend == "triton" else torch.device("cpu")
    x = torch.tensor([[float("nan"), 1.0]], device=device)
    assert kernel.sparse_gemv(x, torch.ones(2, 16, device=device), 0.5, backend).isnan().all()
    assert kernel.dense(x, torch.ones(2, 16, device=device)).isnan().all()


def test_float16_weights_survive_a_process_that_flushes_denormals():
    code = ("import torch, kernel; torch.manual_seed(0); torch.set_flush_denormal(True);"
            "x, w = (1e-3 * torch.randn(1, 300)).half(), (0.02 * torch.randn(300, 40)).half();"
            "exact = x.float() @ w.float(); print(((kernel.sparse_gemv(x, w, 0.0).float() - exact).norm() / exact.norm()).item())")
    assert float(run("-c", code).stdout) < 2**-9


def test_sparse_gemv_float64_stays_float64():
    x, weight_t = torch.randn(3, 50, dtype=torch.float64), torch.randn(50, 20, dtype=torch.float64)
    y = kernel.sparse_gemv(x, weight_t, 0.5)
    assert y.dtype == torch.float64 and close(y, torch.where(x.abs() > 0.5, x, 0) @ weight_t, 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_channel_at_the_threshold_is_dropped_and_a_dropped_row_is_not_read(backend):
    device = DEVICE if backend == "triton" else torch.device("cpu")
    x = torch.tensor([[0.5, -0.5, 1.0, 0.0, -2.0]], device=device)
    weight_t = torch.full((5, 33), float("nan"), device=device)            # whatever is read by mistake shows
    weight_t[2], weight_t[4] = 3.0, 0.25
    assert torch.equal(kernel.sparse_gemv(x, weight_t, 0.5, backend), torch.full((1, 33), 2.5, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_equal_their_members(backend):
    device = DEVICE if backend == "triton" else torch.device("cpu")
    torch.manual_seed(0)
    x = torch.randn(2, 70, device=device)
    weights = [torch.randn(70, out, device=device) for out in (64, 200, 31)]
    thresholds = [0.3, torch.rand(70, device=device), 0.9]
    counts = torch.zeros(3, 2, dtype=torch.int64, device=device)
    ys = kernel.sparse_gemv_group(x, weights, thresholds, backend, counts).split([64, 200, 31], 1)
    for y, weight, threshold, count in zip(ys, weights, thresholds, counts):
        keep = x.abs() > threshold
        assert close(y, (x * keep) @ weight, 2**-7) and count.tolist() == [keep.sum().item(), 140]
    gate, up = torch.randn(70, 48, device=device), torch.randn(70, 48, device=device)
    y = kernel.sparse_gated(x, gate, up, 0.3, 0.6, backend)
    expected = F.silu((x * (x.abs() > 0.3)) @ gate) * ((x * (x.abs() > 0.6)) @ up)
    assert close(y, expected, 2**-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_input_gives_the_same_bits(backend):
    device = DEVICE if backend == "triton" else torch.device("cpu")
    torch.manual_seed(0)
    x, weight_t = torch.randn(1, 515, device=device), torch.randn(515, 130, device=device)
    first = kernel.sparse_gemv(x, weight_t, 0.4, backend)
    assert all(torch.equal(first, kernel.sparse_gemv(x, weight_t, 0.4, backend)) for _ in range(3))


def test_sparse_gemv_refuses_what_does_not_fit():
    x, weight_t = torch.randn(1, 8), torch.randn(8, 4)
    for arguments, message in [((torch.randn(9, 8), weight_t, 0.0), r"expected floating point \(1 to 8, in\)"),
                               ((x[0], weight_t, 0.0), r"expected floating point \(1 to 8, in\)"),
                               ((x, weight_t.T.contiguous(), 0.0), r"expected torch.float32 \(8, out\)"),
                               ((x, weight_t.half(), 0.0), "weight_t is torch.float16"),
                               ((x, torch.randn(4, 8).T, 0.0), "not contiguous"),
                               ((x, weight_t, torch.zeros(4)), r"threshold is \(4,\), expected a number or \(8,\)"),
                               ((x, weight_t, 0.0, "cublas"), "backend is"),
                               ((x, weight_t, 0.0, None, torch.zeros(2)), "counts is torch.float32")]:
        with pytest.raises(ValueError, match=message):
            kernel.sparse_gemv(*arguments)
    if kernel.c_library() is not None:
        for bad in (torch.randn(4, 8).T, torch.randn(6, 4), weight_t.bfloat16()):
            with pytest.raises(ValueError, match="weight_t is"):
                kernel.dense(x, bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 8, 11, 40, 70])
def test_dense_of_any_length(dtype, rows):
    torch.manual_seed(rows)
    x, weight_t = torch.randn(1, rows, 96).to(dtype), torch.randn(96, 40).to(dtype)
    assert close(kernel.dense(x, weight_t), x.double() @ weight_t.double(), {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-6))


COMPILE = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernel

def compiled(function, pointer, constants, capability):
    # As the launcher would: pointers and sizes are multiples of 16, which is what allows wide loads.
    kinds = {"threshold": "*fp32", "partial": "*fp32", "counts": "*i64"}
    kinds |= {8: {"weight": "*i32", "scale": "*fp32"}, 4: {"weight": "*i32", "scale": "*bf16", "zero": "*u8"}}.get(constants.get("BITS"), {})
    signature, fixed, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], fixed[(i,)] = "constexpr", constants[name]
            continue
        is_pointer = name.endswith("_ptr")
        signature[name] = kinds.get(re.sub(r"[0-9]*_ptr", "", name), pointer) if is_pointer else "i32"
        if is_pointer or not name.startswith(("rows", "step", "splits")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(function, signature, fixed, attributes), target=GPUTarget("cuda", capability, 32))

cuobjdump = next(Path(triton.__file__).parent.rglob("cuobjdump"))
for capability in (80, 90):
    for pointer in ("*fp32", "*bf16", "*fp16"):
        for rows in (1, 2, 4, 8):
            found = [compiled(kernel.partial_sums_kernel, pointer, {**kernel.tile(rows), "ROWS": rows, "COUNT": True, "BITS": bits,
                                                                    "GROUP": 128 if bits == 4 else 0}, capability)
                     for bits in ((0, 8, 4) if pointer == "*bf16" else (0,))]
            if rows == 1:
                found += [compiled(kernel.put_together_kernel, pointer, {"GATED": gated, "SPLITS": 16, "BLOCK": 64}, capability)
                          for gated in (False, True)]
            for i, built in enumerate(found):
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(built.asm["cubin"])
                    file.flush()
                    sass = subprocess.run([cuobjdump, "-sass", file.name], capture_output=True, text=True, check=True).stdout
                spills = len(re.findall(r"\\b(STL|LDL)\\b", sass))
                wide = len(re.findall(r"ld\\.global[^\\n]*(v4\\.b32|v8\\.b16)", built.asm["ptx"]))
                print(capability, pointer, rows, "sums" if "partial" in built.metadata.name else "together", "instructions", sass.count(";"),
                      "spills", spills, "wide", wide, "LDG.E.128", sass.count("LDG.E.128"))
"""


@pytest.mark.skipif(kernel.triton is None, reason="no Triton")
def test_triton_kernels_compile_for_gpus_that_are_not_here():
    ended = run("-c", COMPILE, env={"TRITON_INTERPRET": "0"})
    assert ended.returncode == 0, ended.stderr
    rows = [line.split() for line in ended.stdout.splitlines()]
    assert len(rows) == 2 * (3 * (4 + 2) + 4 * 2)          # quantized weights are compiled with bfloat16 inputs
    for capability, pointer, tokens, which, _, instructions, _, spills, _, wide, _, wide_in_sass in rows:
        assert int(instructions) > 50 and int(spills) == 0, (capability, pointer, tokens, which)
        if which == "sums":                                # each thread's share of a tile of weights, 16 bytes at a time
            assert int(wide) >= 4 and int(wide_in_sass) >= 4, (capability, pointer, tokens)


@pytest.mark.skipif(kernel.c_library() is None, reason="no C compiler")
def test_a_library_that_does_not_load_is_built_anew(tmp_path):
    code = "import torch, kernel; print(kernel.best_backend(torch.zeros(1)))"
    environment = {"MINTEAL_CACHE": str(tmp_path)}
    assert run("-c", code, env=environment).stdout.strip() == "c"
    built, = tmp_path.iterdir()
    built.write_bytes(b"damaged")
    assert run("-c", code, env=environment).stdout.strip() == "c" and built.stat().st_size > 1000


def test_without_a_compiler_torch_takes_over():
    code = ("import torch, kernel; x, w = torch.randn(2, 30), torch.randn(30, 9); print(kernel.best_backend(x));"
            "assert torch.allclose(kernel.sparse_gemv(x, w, 0.5), (x * (x.abs() > 0.5)) @ w, atol=1e-5)")
    for environment in ({"MINTEAL_CACHE": "off"}, {"CC": "/nowhere/cc", "MINTEAL_CACHE": "/nowhere/cache"}):
        ended = run("-c", code, env=environment)
        assert ended.stdout.strip() == "torch", ended.stderr


# ---------------------------------------------------------------------------------------------------------
# sparsify.py

def test_thresholds_of_zero_change_nothing_and_names_stay():
    model = tiny_model()
    tokens = tokens_like(model, 1, 10)
    expected = model(tokens)
    names = {name.removesuffix(".weight") for name, _ in model.named_parameters()}
    sparse.sparsify(model, dict.fromkeys(linear_names(model), 0.0))
    assert names == {name.removesuffix(".weight").removesuffix(".weight_t") for name, _ in model.named_parameters()}
    with sparse.sparse_mode(model, "all"):
        assert close(model(tokens), expected, 1e-12)
    cache = model.make_cache(1, 10)
    steps = [model(tokens[:, i:i + 1], cache) for i in range(10)]
    assert close(torch.cat(steps, 1), expected, 1e-12)


def by_hand(model, tokens, thresholds, prefix=0):
    """Logits of a dense model whose linears see thresholded inputs, put in by hooks."""
    hooks = []
    for name, threshold in thresholds.items():
        def drop(module, inputs, threshold=threshold):
            keep = inputs[0].abs() > threshold
            keep[:, :prefix] = True
            return inputs[0] * keep
        hooks.append(model.get_submodule(name).register_forward_pre_hook(drop))
    logits = model(tokens)
    for hook in hooks:
        hook.remove()
    return logits


def some_thresholds(model):
    generator = torch.Generator().manual_seed(3)
    thresholds = {}
    for i, name in enumerate(linear_names(model)):
        inputs = model.get_submodule(name).in_features
        thresholds[name] = [0.4, torch.tensor(0.2), torch.rand(inputs, generator=generator)][i % 3]
    return thresholds


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_modes(dtype, tolerance):
    model = tiny_model(dtype)
    tokens = tokens_like(model, 1, 10)
    thresholds = some_thresholds(model)
    dense, dropped = model(tokens), by_hand(model, tokens, thresholds)
    prefixed = by_hand(model, tokens, thresholds, prefix=4)
    assert not close(dense, dropped, 0.01)
    assert sparse.sparsify(model, thresholds) is model

    def stepwise(start):
        cache = model.make_cache(1, 10)
        return torch.cat([model(tokens[:, :start], cache)] +
                         [model(tokens[:, i:i + 1], cache) for i in range(start, 10)], 1)

    assert close(model(tokens), dense, tolerance)          # more than one token: dense
    assert close(stepwise(1), dropped, tolerance)          # one token at a time: sparse
    with sparse.sparse_mode(model, "all"):
        assert close(model(tokens), dropped, tolerance)
        assert close(stepwise(5), dropped, tolerance)
    with sparse.sparse_mode(model, "all", dense_prefix=4):
        assert close(model(tokens), prefixed, tolerance)
    with sparse.sparse_mode(model, "off"):
        assert close(stepwise(1), dense, tolerance)
    with sparse.sparse_mode(model, thresholds=dict.fromkeys(thresholds, 0.0)):
        assert close(stepwise(1), dense, tolerance)
    with pytest.raises(KeyError):
        with sparse.sparse_mode(model, "off", {linear_names(model)[0]: 9.0}):
            raise KeyError
    assert close(stepwise(1), dropped, tolerance)          # everything is as it was


def test_a_linear_not_named_stays_dense():
    model = tiny_model()
    tokens = tokens_like(model, 1, 6)
    thresholds = {name: 0.5 for name in linear_names(model) if "q_proj" in name or "up_proj" in name}
    expected = by_hand(model, tokens, thresholds)
    sparse.sparsify(model, thresholds)
    with sparse.sparse_mode(model, "all"):
        assert close(model(tokens), expected, 1e-12)
    more = {name: 0.3 for name in linear_names(model) if "q_proj" not in name}              # others, and some anew
    expected = by_hand(tiny_model(), tokens, thresholds | more)
    sparse.sparsify(model, more)
    with sparse.sparse_mode(model, "all"):
        assert close(model(tokens), expected, 1e-12)


def test_realised_sparsity_counts_what_is_not_read():
    model = tiny_model()
    name = "model.layers.1.mlp.down_proj"
    kept = total = 0

    def count(module, inputs):
        nonlocal kept, total
        kept, total = kept + (inputs[0].abs() > 0.3).sum().item(), total + inputs[0].numel()

    hook = model.get_submodule(name).register_forward_pre_hook(count)
    tokens = tokens_like(model, 1, 8)
    model(tokens)
    hook.remove()
    size = sum(a * b for a, b in checkpoint.block_linears(model.config).values()) * model.config.num_hidden_layers
    expected = (1 - kept / total) * 56 * 32 / size
    sparse.sparsify(model, {name: 0.3})
    assert sparse.realised_sparsity(model) == 0
    with sparse.sparse_mode(model, "all"):
        model(tokens)
    assert sparse.realised_sparsity(model) == pytest.approx(expected)
    sparse.reset_counts(model)
    cache = model.make_cache(1, 8)
    for i in range(8):
        model(tokens[:, i:i + 1], cache)
    assert sparse.realised_sparsity(model) == pytest.approx(expected)


def test_thresholds_that_do_not_fit():
    model = tiny_model()
    for thresholds, message in [({"lm_tail": 0.1}, "lm_tail, which is not a linear"),
                                ({"model.norm": 0.1}, "not a linear of this model"),
                                ({linear_names(model)[0]: torch.zeros(5)}, r"shape \(5,\), expected \(\) or \(32,\)"),
                                ({linear_names(model)[0]: float("nan")}, "is not finite")]:
        with pytest.raises(InputError, match=message):
            sparse.sparsify(tiny_model(), thresholds)
    thresholds, tokens = some_thresholds(model), tokens_like(model, 1, 6)
    sparse.sparsify(model, thresholds)
    with sparse.sparse_mode(model, "all"):
        before = model(tokens)
        with pytest.raises(InputError, match="is not finite"):              # what is refused changes nothing
            sparse.sparsify(model, {linear_names(model)[0]: 0.9, linear_names(model)[1]: float("inf")})
        assert torch.equal(model(tokens), before)
    model = tiny_model()
    sparse.sparsify(model, {linear_names(model)[0]: 0.1})
    with pytest.raises(InputError, match="dense_prefix is -1"):
        with sparse.sparse_mode(model, "all", dense_prefix=-1):
            pass
    with pytest.raises(InputError, match='where is "decode", "all" or "off", not \'never\''):
        with sparse.sparse_mode(model, "never"):
            pass
    with pytest.raises(InputError, match="not a sparse linear"):
        with sparse.sparse_mode(model, thresholds={linear_names(model)[1]: 0.1}):
            pass


def test_a_tied_head_can_be_sparse_and_stays_one_weight():
    model = tiny_model(tie_word_embeddings=True)
    tokens = tokens_like(model, 2, 6)
    expected = by_hand(model, tokens, {"lm_head": 0.5})
    mark = calibrate.fingerprint_of(model.model.embed_tokens.weight)
    sparse.sparsify(model, {"lm_head": 0.5})
    assert model.model.embed_tokens.weight_t is model.lm_head.weight_t
    with sparse.sparse_mode(model, "all"):
        assert close(model(tokens), expected, 1e-12)
    assert torch.equal(calibrate.fingerprint_of(model.model.embed_tokens.weight), mark) and sparse.realised_sparsity(model) == 0


@pytest.mark.parametrize("tied", [False, True])
def test_a_sparse_model_is_saved_as_the_dense_one(tmp_path, tied):
    model = tiny_model(torch.float32, tie_word_embeddings=tied)
    tokens = tokens_like(model, 1, 6)
    expected = model(tokens)
    sparse.sparsify(model, some_thresholds(model) | {"lm_head": 0.3}).save_pretrained(tmp_path)
    assert torch.equal(Llama.from_pretrained(tmp_path)(tokens), expected)


def test_perplexity():
    model = tiny_model()
    tokens = tokens_like(model, 40)
    losses = []
    for start in (0, 12, 24):                              # the fourth window would need 49 tokens
        logits = model(tokens[None, start:start + 12])[0]
        losses.append(F.cross_entropy(logits, tokens[start + 1:start + 13]))
    assert sparse.perplexity(model, tokens, 12) == pytest.approx(torch.stack(losses).mean().exp().item())
    thresholds = some_thresholds(model)
    window = by_hand(model, tokens[None, :12], thresholds, prefix=3)[0]
    expected = F.cross_entropy(window, tokens[1:13]).exp().item()
    dense = sparse.perplexity(model, tokens, 12)
    sparse.sparsify(model, thresholds)
    assert sparse.perplexity(model, tokens[:13], 12, dense_prefix=3) == pytest.approx(expected)
    with sparse.sparse_mode(model, "off"):
        assert sparse.perplexity(model, tokens, 12) == pytest.approx(dense)
    with pytest.raises(InputError, match="the text has 12 tokens, a window of 12 needs 13"):
        sparse.perplexity(model, tokens[:12], 12)


def test_judge_agrees_with_perplexity():
    model = tiny_model()
    tokens = tokens_like(model, 70)
    thresholds = some_thresholds(model)
    nothing = dict.fromkeys(thresholds, 0.0)
    gate_thresholds = torch.tensor([0.1, 0.2, 0.05])

    def cats(module, inputs, output, threshold):
        return output * (F.silu(output).abs() > threshold)
    hooks = [block.mlp.gate_proj.register_forward_hook(lambda m, i, o, t=t: cats(m, i, o, t))
             for block, t in zip(model.model.layers, gate_thresholds)]
    by_cats = sparse.perplexity(model, tokens, 8)
    for hook in hooks:
        hook.remove()
    logits, dropped = (torch.cat([run(window[None, :8])[0] for window in sparse.windows_of(tokens, 8)]).log_softmax(-1)
                       for run in (model, lambda window: by_hand(model, window, thresholds)))
    sparse.sparsify(model, thresholds)
    settings = [judging.Setting("own", 0.5, thresholds), judging.Setting("none", 0.0, nothing),
                judging.Setting("cats", 0.3, None, gate_thresholds)]
    dense, row, zero, cats_row = judging.judge(model, tokens, settings, 8)
    assert row["perplexity"] == pytest.approx(sparse.perplexity(model, tokens, 8))
    assert row["sparsity"] == pytest.approx(sparse.realised_sparsity(model))
    assert dense["agreement"] == zero["agreement"] == 1 and dense["sparsity"] == 0
    assert dense["perplexity"] == pytest.approx(zero["perplexity"])
    assert row["kl"] == pytest.approx((logits.exp() * (logits - dropped)).sum(-1).mean().item()) and abs(zero["kl"]) < 1e-9
    assert row["agreement"] == pytest.approx((logits.argmax(-1) == dropped.argmax(-1)).double().mean().item())
    assert cats_row["perplexity"] == pytest.approx(by_cats) and 0 < cats_row["sparsity"] < 0.5
    # The paper's way: part of each window is context only, and its start is dense.
    late = judging.judge(model, tokens, [judging.Setting("own", 0.5, thresholds, dense_prefix=4)], 12, scored=4)[1]
    fresh = tiny_model()
    losses = [F.cross_entropy(by_hand(fresh, tokens[None, i:i + 12], thresholds, 4)[0, 8:], tokens[i + 9:i + 13])
              for i in range(0, 70 - 12, 4)]
    assert late["perplexity"] == pytest.approx(torch.stack(losses).mean().exp().item())


def test_perplexity_is_read_at_the_target():
    rows = [{"target": target, "sparsity": sparsity, "perplexity": perplexity} for target, sparsity, perplexity in
            ((0.0, 0.0, 10.0), (0.5, 0.6, 20.0), (0.7, 0.696, 30.0), (0.9, 0.8, 50.0))]
    judging.at_target(rows)
    found = [row["perplexity_at_target"] for row in rows]
    assert found[1] == pytest.approx(10 * 2 ** (5 / 6)) and found[0] == 10 and found[2] == 30 and found[3] is None


def test_functions_are_cut_and_parsed():
    head = "    def f(self):\n"
    assert judging.is_function(head, "        return 1\n\n    def g(self, x\n")            # what follows is cut off
    assert judging.is_function(head, "        if self:\n            return 1\n        unfini")
    assert not judging.is_function(head, "        return (1\n\n    def g(self):\n")
    assert not judging.is_function(head, "    x = 1\n")    # nothing in it
    tokenizer = llama.load_tokenizer(DEMO)
    found = judging.function_beginnings(tokenizer, corpus.files("held-out"), 20)
    assert len(found) == 20 and all(len(ids) == 128 for ids, _ in found)
    assert all(tokenizer.decode(ids).endswith(head) and "def " in head for ids, head in found)


# ---------------------------------------------------------------------------------------------------------
# step.py

needs_c = pytest.mark.skipif(kernel.c_library() is None, reason="no C compiler")


def steps_of(model, cache, taped):
    """Steps that are sure to be replayed, or sure to run the model."""
    steps = stepping.Steps(model, cache)
    assert steps.can_be_taped
    if not taped:
        steps.tape = lambda tokens: None
    if taped and cache.used < cache.length:
        assert steps.tape(torch.tensor([[1]])) is not None
    return steps


def taped_case(seed):
    """A random sparsified model, and how far its tape may be from it."""
    _, pick = picker(seed)
    dtype = pick(torch.float32, torch.float32, torch.bfloat16, torch.float16)
    bits = pick(None, None, 8, 4)
    model = tiny_model(dtype, seed, head_dim=pick(12, 16, 32), num_attention_heads=8, num_key_value_heads=pick(1, 2, 8),
                       hidden_size=64, intermediate_size=96, attention_bias=pick(False, True), mlp_bias=pick(False, True),
                       sliding_window=pick(None, 5, 40), tie_word_embeddings=pick(False, True), max_position_embeddings=160)
    thresholds = some_thresholds(model)
    if bits:
        quantizing.quantize(model, bits, 32)
    if dtype != torch.float32:                             # a model rounds between its products, a tape does not: inputs
        thresholds = dict.fromkeys(thresholds, -1.0)       # near a threshold would lie on different sides of it
    sparse.sparsify(model, thresholds | pick({}, {"lm_head": 0.3 if dtype == torch.float32 else -1.0}))
    return model, {torch.float32: 1e-5, torch.float16: 2**-7, torch.bfloat16: 2**-4}[dtype]


@needs_c
@torch.no_grad()
@pytest.mark.parametrize("where", ["decode", "all", "off"])
def test_a_tape_computes_what_the_model_does(where):
    for seed in range(30):
        model, tolerance = taped_case(seed)
        tokens, found, counts = tokens_like(model, 1, 120, seed=seed), {}, {}
        with sparse.sparse_mode(model, where):
            for taped in (True, False):
                cache, at, found[taped] = model.make_cache(1, 130), seed % 2 * 75, []
                if at:                                     # a prompt that spans tiles of positions
                    model(tokens[:, :at], cache)
                sparse.reset_counts(model)
                steps = steps_of(model, cache, taped)
                for size in (1, 3, 1, 8, 2, 1, 7, 5, 1, 1):
                    found[taped].append(steps(tokens[:, at:at + size]).clone())
                    at += size
                    assert cache.used == at
                counts[taped] = model.sparse_state.counts.clone()
        # Now and then rounding puts an input on the other side of its threshold.
        assert close(torch.cat(found[True], 1), torch.cat(found[False], 1), tolerance if where == "off" else max(tolerance, 0.03)), seed
        assert torch.allclose(counts[True].double(), counts[False].double(), rtol=0.01), seed


@needs_c
@torch.no_grad()
@pytest.mark.parametrize("window", [None, 6, 50])
def test_a_tape_sees_the_tree(window):
    model = sparse.sparsify(tiny_model(torch.float32, sliding_window=window, max_position_embeddings=160),
                            dict.fromkeys(linear_names(tiny_model()), 0.3))
    tree = speculation.draft_tree(7, torch.device("cpu"))
    assert max(tree.depths) > 1 and max(map(len, tree.children)) > 1
    tokens, found = tokens_like(model, 1, 90), {}
    with sparse.sparse_mode(model, "all"):
        for taped in (True, False):
            cache = model.make_cache(1, 100)
            model(tokens[:, :70], cache)
            steps = steps_of(model, cache, taped)
            trees = [steps(tokens[:, 70:78], tree.depths, tree.sees).clone()]
            cache.keep(70, [0, *tree.children[0][1:2]])    # another branch than the first
            trees.append(steps(tokens[:, 78:86], tree.depths, tree.sees).clone())
            found[taped] = torch.cat(trees)
    assert close(found[True], found[False], 1e-4)


@needs_c
@torch.no_grad()
def test_decoding_replays_a_tape_where_it_can(monkeypatch):
    """Sparsified models of one text; what a tape does not know of runs the model."""
    def passes(model):
        """How often the model itself ran, but for the prompt and the first step, with which it is compared."""
        seen, forward = [], Llama.forward
        list(generate(model, [1], 3))
        monkeypatch.setattr(Llama, "forward", lambda self, tokens, *rest, **named: (seen.append(tokens.shape[1]),
                                                                                   forward(self, tokens, *rest, **named))[1])
        list(generate(model, [1, 2, 3, 4, 5], 10))
        monkeypatch.setattr(Llama, "forward", forward)
        return sum(length == 1 for length in seen)

    made = sparse.sparsify(tiny_model(torch.float32), dict.fromkeys(linear_names(tiny_model()), 0.2))
    assert passes(made) == 0
    with sparse.sparse_mode(made, "off"):
        assert passes(made) == 0
    with sparse.sparse_mode(made, "all", dense_prefix=2):
        assert passes(made) == 9
    looking = made.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: None)
    assert passes(made) == 9
    looking.remove()
    assert passes(made) == 0
    assert passes(tiny_model(torch.float32)) == 9          # not sparsified: its weights are not transposed
    assert passes(sparse.sparsify(tiny_model(torch.float32), {"model.layers.0.mlp.down_proj": 0.2})) == 9
    assert passes(sparse.sparsify(tiny_model(), dict.fromkeys(linear_names(tiny_model()), 0.2))) == 9       # float64
    assert not stepping.can_be_taped(made, made.make_cache(2, 8))
    narrowed = sparse.sparsify(tiny_model(), dict.fromkeys(linear_names(tiny_model()), 0.2)).float()         # but not its thresholds
    assert not stepping.can_be_taped(narrowed, narrowed.make_cache(1, 8))
    mixed = tiny_model(torch.float32, hidden_size=64)
    quantizing.replace_linear(mixed, "model.layers.0.self_attn.k_proj", quantizing.quantized(mixed.model.layers[0].self_attn.k_proj.weight, 8))
    for name in set(linear_names(mixed)) - {"model.layers.0.self_attn.k_proj"}:
        linear = mixed.get_submodule(name)
        mixed.get_submodule(name.rpartition(".")[0]).__setattr__(name.rpartition(".")[2], sparse.SparseLinear(linear.weight.t().contiguous()))
    assert not stepping.can_be_taped(mixed, mixed.make_cache(1, 8)) and len(list(generate(mixed, [1, 2], 3))) == 3
    steps = steps_of(made, made.make_cache(1, 3), True)
    for bad, message in ((torch.ones(1, 4, dtype=torch.int64), "4 tokens do not fit a cache of 3 positions"),
                         (torch.tensor([[61]]), "token id 61"), (torch.tensor([[-1]]), "token id -1")):
        with pytest.raises(InputError, match=message):
            steps(bad)


def soft(self, x):
    """Another rule of what is dropped: what stays shrinks by its threshold."""
    shrunk = x.sign() * (x.abs() - self.threshold).clamp(min=0) if sparse.is_sparse(self.state, x) else x
    return kernel.dense(shrunk.to(x.dtype), self.weight_t)


@needs_c
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place, name, changed", [
    (sparse.SparseMLP, "gated", lambda self, x: F.gelu(self.gate_proj(x)) * self.up_proj(x)),
    (sparse.SparseLinear, "product", soft),
    (llama, "rotate", lambda x, cos, sin: x),
    (llama.RMSNorm, "forward", lambda self, x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))])
def test_a_model_that_was_changed_runs_itself(dtype, place, name, changed, monkeypatch):
    """Whoever changes model.py or sparsify.py and not step.py is told so, and gets what the change does."""
    thresholds = dict.fromkeys(linear_names(tiny_model()), 0.3)
    before = list(generate(sparse.sparsify(tiny_model(dtype), thresholds), [1, 2, 3], 12))
    monkeypatch.setattr(place, name, changed)
    model = sparse.sparsify(tiny_model(dtype), thresholds)
    with pytest.warns(UserWarning, match="step.py does not compute what the model does, its logits are"):
        after = list(generate(model, [1, 2, 3], 12))
    monkeypatch.setattr(stepping, "can_be_taped", lambda *_: False)
    assert list(generate(model, [1, 2, 3], 12)) == after != before


@needs_c
@torch.no_grad()
def test_a_model_changed_by_hand_in_a_late_block_runs_itself():
    model = sparse.sparsify(tiny_model(torch.float32), dict.fromkeys(linear_names(tiny_model()), 0.0))
    model.model.layers[2].mlp.forward = torch.zeros_like
    with pytest.warns(UserWarning, match="step.py does not compute"):
        text = list(generate(model, [1, 2, 3], 12))
    assert text == by_prefill(model, [1, 2, 3], 12)


@needs_c
@torch.no_grad()
def test_what_a_comparison_touches_is_put_back():
    model = sparse.sparsify(tiny_model(torch.float32), some_thresholds(tiny_model()))
    before, cache = model.sparse_state.thresholds.clone(), model.make_cache(1, 8)
    model(torch.tensor([[1, 2, 3]]), cache)
    sparse.reset_counts(model)
    assert stepping.Steps(model, cache).tape(torch.tensor([[4]])) is not None
    assert torch.equal(model.sparse_state.thresholds, before) and not model.sparse_state.counts.any() and cache.used == 3
    threads, texts = [], []
    model = sparse.sparsify(tiny_model(torch.float32), some_thresholds(tiny_model()))
    for _ in range(4):
        threads.append(threading.Thread(target=lambda: texts.append(list(generate(model, [1, 2, 3], 12)))))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert torch.equal(model.sparse_state.thresholds, before) and len(texts) == 4


@torch.no_grad()
def by_prefill(model, prompt, count):
    """Greedy tokens, each from a pass over all that is before it."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt):]


@needs_c
@torch.no_grad()
def test_a_tape_reads_the_thresholds_and_the_mode_in_force():
    model = sparse.sparsify(tiny_model(torch.float32), dict.fromkeys(linear_names(tiny_model()), 0.1))
    tokens, found = tokens_like(model, 1, 12), {}
    for taped in (True, False):
        cache, found[taped] = model.make_cache(1, 12), []
        steps = steps_of(model, cache, taped)
        for at, (where, threshold) in enumerate([("decode", 0.1), ("off", 0.1), ("decode", 0.8), ("all", 0.5), ("off", 0.5), ("decode", 0.1)]):
            with sparse.sparse_mode(model, where, dict.fromkeys(linear_names(model), threshold)):
                found[taped].append(steps(tokens[:, at:at + 1]).clone())
        sparse.sparsify(model, dict.fromkeys(linear_names(model), 0.6))                     # a state of its own
        found[taped].append(steps(tokens[:, 6:7]).clone())
        assert model.sparse_state.counts[:, 1].all()
        sparse.sparsify(model, dict.fromkeys(linear_names(model), 0.1))
    assert close(torch.cat(found[True]), torch.cat(found[False]), 1e-5)
    assert not close(found[True][2], found[True][0], 0.1)


@torch.no_grad()
def test_attention_takes_any_strides(monkeypatch):
    """On a GPU, with a mask, PyTorch's attention gives an output whose heads are not one behind the other."""
    model, attention = tiny_model(torch.float32), F.scaled_dot_product_attention
    tokens, tree = tokens_like(model, 1, 12), speculation.draft_tree(7, torch.device("cpu"))
    found = []
    for change in (lambda y: y, lambda y: y.transpose(1, 2).contiguous().transpose(1, 2)):
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *given, **named: change(attention(*given, **named)))
        cache = model.make_cache(1, 20)
        model(tokens[:, :4], cache)
        steps = stepping.Steps(model, cache)
        found.append(torch.cat((steps(tokens[:, 4:5]), steps(tokens[:, 4:12], tree.depths, tree.sees)), 1))
    assert close(found[1], found[0], 1e-6)


@needs_c
def test_step_shows_what_a_step_takes():
    ended = run("step.py", "--behind", 40, "--sparsity", 0.4)
    lines = ended.stdout.splitlines()
    assert ended.returncode == 0 and "behind 40 tokens" in lines[1] and "40% sparse" in lines[1], ended.stderr
    assert [line[:28].strip() for line in lines[2:]] == ["recorded", "not recorded", "recorded, but for products"]
    values = [[float(number) for number in line[28:].replace("%", "").split()] for line in lines[2:]]
    assert all(value > 0 for row in values for value in row) and max(values[2]) < 100
    ended = run("step.py", "--sparsity", 2)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr


@needs_c
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_shows_through_a_tape_and_its_cache(dtype):
    model = sparse.sparsify(tiny_model(dtype), dict.fromkeys(linear_names(tiny_model()), 0.0))
    model.model.embed_tokens.weight[5] = float("nan")
    steps = steps_of(model, model.make_cache(1, 8), True)
    assert steps(torch.tensor([[1]])).isfinite().all()
    assert steps(torch.tensor([[5]])).isnan().all()
    assert steps(torch.tensor([[1]])).isnan().all()        # it looks back at one that is


@needs_c
@torch.no_grad()
def test_a_cache_of_16_bits_holds_what_rounding_makes_of_a_float():
    """Keys pass through a tape to its cache; as a token at position 0 is not rotated, they are the projection itself."""
    for dtype in (torch.bfloat16, torch.float16):
        model = sparse.sparsify(tiny_model(dtype, num_hidden_layers=1), dict.fromkeys(linear_names(tiny_model(num_hidden_layers=1)), 0.0))
        values = torch.cat((torch.randn(20) * 10.0 ** torch.randint(-8, 5, (20,)), torch.tensor([0.0, -0.0, 65504.0, 2.98023259e-08])))
        attention = model.model.layers[0].self_attn
        for linear in (attention.k_proj, attention.v_proj):
            linear.weight_t.zero_()
        attention.k_proj.bias = torch.nn.Parameter(values, requires_grad=False)
        attention.q_proj.bias = torch.nn.Parameter(torch.zeros(attention.q_proj.out_features), requires_grad=False)
        attention.v_proj.bias = torch.nn.Parameter(torch.tensor([70000.0, float("inf"), float("-inf"), float("nan")] * 6), requires_grad=False)
        cache = model.make_cache(1, 4)
        tables = llama.rope_tables(torch.arange(4), model.config, torch.float32)
        stepping.Tape(model, cache, False, tables)(torch.tensor([[1]]))
        assert torch.equal(cache.keys[0, 0, :, 0].flatten(), values.to(dtype))
        assert torch.equal(cache.values[0, 0, :, 0].flatten().nan_to_num(nan=7.0), attention.v_proj.bias.to(dtype).nan_to_num(nan=7.0))


# ---------------------------------------------------------------------------------------------------------
# calibrate.py

def test_quantiles_of_a_histogram():
    torch.manual_seed(0)
    x = torch.randn(40, 5000) * 3
    x[:, ::10] = 0
    counts = calibrate.histogram(x)
    assert counts.sum() == x.numel() and len(counts) == calibrate.BINS
    ordered = x.abs().flatten().sort().values
    for share in (0.2, 0.5, 0.9, 0.999):
        value = calibrate.quantile(counts, share)
        assert value.item() == pytest.approx(ordered[int(share * x.numel())].item(), rel=0.022)
        assert share_below(counts, value).item() == pytest.approx(share, abs=1e-9)
    assert calibrate.quantile(counts, 0) == 0 and calibrate.quantile(counts, 0.05) < 1e-5


ALLOCATIONS = ["fisher-channel", "fisher", "greedy", "uniform", "wina"]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """(model, tokens, its calibration with every allocation); not to be changed."""
    model = tiny_model(torch.float32)
    tokens = tokens_like(model, 1500)
    made = calibrate.calibrate(model, tokens, 16, "a test")
    allocate.add_greedy(made, model, tokens, tmp_path_factory.mktemp("greedy") / "partial")
    allocate.add_priced(made, model, tokens)
    return model, tokens, made


def test_calibration_leaves_the_sinks_out(calibrated):
    _, _, made = calibrated
    assert made.histograms["input"][0, 0].sum() == 93 * (16 - calibrate.SINKS) * 32
    assert made.allocations == ["priced", "balanced", *ALLOCATIONS]


@pytest.mark.parametrize("allocation", ["priced", "balanced", *ALLOCATIONS])
def test_every_allocation_reaches_its_target(calibrated, allocation):
    _, tokens, made = calibrated
    _, sizes = made.sizes()
    for sparsity in (0.0, 0.25, 0.5, 0.8, 0.95):
        assert (made.sparsities(sparsity, allocation) @ sizes).mean().item() == pytest.approx(sparsity, abs=1e-4)
        model = sparse.sparsify(tiny_model(torch.float32), made.thresholds(sparsity, allocation))
        sparse.perplexity(model, tokens, 16, dense_prefix=calibrate.SINKS)
        # Not exact: with inputs dropped before them, the inputs of later layers are others.
        assert sparse.realised_sparsity(model) == pytest.approx(sparsity, abs=0.04)


def test_fisher_information_is_the_mean_square_gradient():
    model = tiny_model()
    tokens = tokens_like(model, 33)
    name = "model.layers.1.self_attn.k_proj"
    windows = sparse.windows_of(tokens, 32)
    found = allocate.fisher_information(model, windows, {name: model.get_submodule(name)}, lambda text: None)[name]

    # By hand: the same labels, and a leaf that only this linear reads.
    logits = model(windows[:, :-1])[0]
    labels = torch.multinomial(logits.float().softmax(-1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    leaf = None

    def own_leaf(module, inputs):
        nonlocal leaf
        leaf = inputs[0].detach().requires_grad_()
        return leaf

    hook = model.get_submodule(name).register_forward_pre_hook(own_leaf)
    F.cross_entropy(model(windows[:, :-1])[0], labels, reduction="sum").backward()
    hook.remove()
    expected = leaf.grad[0, calibrate.SINKS:].square().mean(0)
    assert close(found, expected, 1e-4)


def test_fisher_drops_by_one_price(calibrated):
    """Every linear gives up inputs at the same F t² / out, and a channel's threshold is the linear's over its weight."""
    _, _, made = calibrated
    outputs, _ = made.sizes()
    scalar = torch.stack(list(made.thresholds(0.5, "fisher").values())).view(3, 7).double()
    price = made.fisher.double() * scalar.square() / outputs
    assert torch.allclose(price, price.mean().expand(3, 7), rtol=1e-4)
    name = "model.layers.2.mlp.down_proj"
    vector = made.thresholds(0.5, "fisher-channel")[name]
    weighted = vector * made.weights["fisher-channel"][name]
    assert vector.shape == (56,) and torch.allclose(weighted, weighted.mean().expand(56), rtol=1e-4)
    shares = made.sparsities(0.5, "balanced")              # halfway between the model's price and the block's
    _, sizes = made.sizes()
    by_block = 2 * shares - made.sparsities(0.5, "fisher-channel")
    assert torch.allclose(by_block @ sizes, torch.full((3,), 0.5, dtype=torch.float64), atol=1e-4)
    assert made.weights["fisher-channel"][name].square().mean().sqrt().item() == pytest.approx(1, rel=1e-3)


def their_threshold(histogram, key, sparsity):
    """TEAL's: the inverse of the cumulative counts at 0.5 + s/2, linear between bin centers."""
    counts, centers = histogram[key].double(), histogram[f"{key}_centers"].double()
    below, target = counts.cumsum(0), (0.5 + sparsity / 2) * counts.double().sum()
    at = int(torch.searchsorted(below, target))
    return (centers[at - 1] + (target - below[at - 1]) / (below[at] - below[at - 1]) * (centers[at] - centers[at - 1])).item()


def test_the_authors_statistics_are_imported(tmp_path):
    config, generator = tiny_config(), torch.Generator().manual_seed(0)
    folder, published = tmp_path / "Tiny-7B", {}
    for layer in range(3):
        for part in ("self_attn", "mlp"):
            made = {}
            for key in ("h1", "h2") + ("h1.5",) * (part == "mlp"):                          # as utils.py of theirs makes them
                x = (torch.randn(200_000, generator=generator) * torch.rand((), generator=generator)).sort().values
                bins = torch.cat((x[:1], torch.linspace(x[2000], x[-2000], 9999), x[-1:]))
                made[key], made[f"{key}_centers"] = torch.histogram(x, bins=bins)[0], (bins[:-1] + bins[1:]) / 2
            path = folder / "histograms" / f"layer-{layer}" / part / "histograms.pt"
            path.parent.mkdir(parents=True)
            torch.save(made, path)
            published[layer, part] = made
        path = folder / "lookup" / f"layer-{layer}" / "results.csv"
        path.parent.mkdir(parents=True)
        shares = torch.arange(1, 19)[:, None] * 0.05 * torch.tensor([1.0, 0.9, 0.5, 1, 0.9, 0.9, 1])
        path.write_text("Effective Sparsity,Activation Error,Baseline Error,q,k,v,o,gate,up,down\n"
                        + "".join(f"0,0,0,{','.join(map(str, row))}\n" for row in shares.tolist()))
    model = tiny_model()
    mark = calibrate.fingerprint_of(model.model.embed_tokens.weight)
    calibrate.import_teal(folder, config, mark).save(tmp_path / "calibration.safetensors")
    loaded = Calibration.load(tmp_path / "calibration.safetensors")
    loaded.check(model)
    assert loaded.allocations == ["greedy", "uniform"] and loaded.source == "the statistics TEAL's authors publish for Tiny-7B"
    for sparsity in (0.1, 0.25, 0.5, 0.9):
        for name, threshold in loaded.thresholds(sparsity, "uniform").items():
            layer, part, linear = name.split(".")[2:]
            key = "h2" if linear in ("o_proj", "down_proj") else "h1"
            assert threshold.item() == pytest.approx(their_threshold(published[int(layer), part], key, sparsity), rel=0.01, abs=1e-3)
    _, sizes = loaded.sizes()
    row = shares[9].double()                               # a row of theirs: the same shares at the same sparsity
    assert torch.allclose(loaded.sparsities((row @ sizes).item(), "greedy"), row.expand(3, 7), atol=1e-4)
    for wanted in (lambda: loaded.head_threshold(0.5), lambda: loaded.gate_thresholds(0.5)):
        with pytest.raises(InputError, match="this calibration holds no distribution of the"):
            wanted()
    with pytest.raises(InputError, match="layer-3/.*cannot be read: No such file"):
        calibrate.import_teal(folder, tiny_config(num_hidden_layers=4), mark)
    with pytest.raises(InputError, match="more layers than the model's 2"):
        calibrate.import_teal(folder, tiny_config(num_hidden_layers=2), mark)
    torch.save(published[0, "mlp"] | {"h3": torch.ones(1)}, folder / "histograms" / "layer-1" / "mlp" / "histograms.pt")
    with pytest.raises(InputError, match="not a histogram of TEAL's authors: expected h1, h1.5"):
        calibrate.import_teal(folder, config, mark)
    torch.save(published[0, "mlp"], folder / "histograms" / "layer-1" / "mlp" / "histograms.pt")
    path.write_text("q,k\n1,2\n")
    with pytest.raises(InputError, match="results.csv: not a greedy path"):
        calibrate.import_teal(folder, config, mark)


@torch.no_grad()
def test_prices_are_what_weights_cost(calibrated):
    """The gradient near the thresholds foretells what the KL does when one linear's threshold is moved."""
    model, _, made = calibrated
    linears = {name: model.get_submodule(name) for name in linear_names(model)}
    thresholds, windows = made.thresholds(0.1, "balanced"), sparse.windows_of(tokens_like(model, 6000), 64)
    told, total = allocate.prices(model, windows, linears, thresholds)
    told = told.flatten()

    sparse_model = sparse.sparsify(tiny_model(torch.float32), thresholds)
    inputs, counts = windows[:, :-1], sparse_model.sparse_state.counts
    with sparse.sparse_mode(sparse_model, "off"):
        dense = sparse_model(inputs).log_softmax(-1)

    with sparse.sparse_mode(sparse_model, "all"):
        assert total == pytest.approx(F.kl_div(sparse_model(inputs).log_softmax(-1), dense, reduction="sum", log_target=True).item(), rel=1e-3)

    def kl_and_dropped(name, factor):
        with sparse.sparse_mode(sparse_model, "all", {name: factor * thresholds[name]}):
            sparse.reset_counts(sparse_model)
            kl = F.kl_div(sparse_model(inputs).log_softmax(-1), dense, reduction="sum", log_target=True).item()
        kept, seen = counts[list(linears).index(name)].tolist()
        return kl, (seen - kept) * linears[name].out_features
    measured = []
    for name in linears:
        (low, fewer), (high, more) = (kl_and_dropped(name, factor) for factor in (1 / 1.3, 1.3))
        measured.append((high - low) / (more - fewer))
    measured = torch.tensor(measured, dtype=torch.float64)
    assert torch.corrcoef(torch.stack((told, measured)))[0, 1] > 0.9
    assert 0.5 < (told / measured).median() < 1.2


def test_priced_shares_are_nearer_to_the_dense_model(calibrated):
    model, tokens, made = calibrated
    settings = [judging.Setting(name, level, made.thresholds(level, name)) for level in (0.3, 0.5, 0.75) for name in ("balanced", "priced")]
    rows = judging.judge(sparse.sparsify(tiny_model(torch.float32), made.thresholds(0.0)), tokens, settings)
    for balanced, priced in zip(rows[1::2], rows[2::2]):
        assert priced["kl"] < (0.97 if balanced["target"] < 0.6 else 1.02) * balanced["kl"] and priced["sparsity"] > balanced["sparsity"] - 0.01


def test_greedy_path_is_monotone_and_each_step_is_the_best(calibrated):
    model, tokens, made = calibrated
    _, sizes = made.sizes()
    for path in made.greedy.double():
        steps = path.diff(dim=0)
        assert (path[0] == 0).all() and (steps >= 0).all() and path.max() < 1
        moved = steps[steps.sum(1) > 0] @ sizes
        assert torch.allclose(moved, torch.full_like(moved, allocate.STEP), atol=1e-6)
    # The first step of the first block, tried by hand.
    windows = sparse.windows_of(tokens, 64)[:4, :-1]
    block, x = model.model.layers[0], model.model.embed_tokens(windows)
    cos, sin = llama.rope_tables(torch.arange(64), model.config, x.dtype)
    exact = block(x, cos, sin, None, None, None)[:, 16:]
    errors = []
    for place, linear in enumerate(calibrate.LINEARS):
        counts = made.histograms["input"][0, calibrate.SITE_OF[linear]]
        threshold = calibrate.quantile(counts, allocate.STEP / sizes[place].item()).item()
        hook = block.get_submodule(linear).register_forward_pre_hook(lambda m, i: i[0] * (i[0].abs() > threshold))
        errors.append((block(x, cos, sin, None, None, None)[:, 16:] - exact).norm().item())
        hook.remove()
    assert made.greedy[0, 1].argmax().item() == errors.index(min(errors))


def test_greedy_goes_on_where_it_was_killed(calibrated, tmp_path):
    model, tokens, made = calibrated
    again = calibrate.calibrate(model, tokens, 16, "a test", fisher=False)
    partial = tmp_path / "partial"
    seen = []

    def killed(text):
        seen.append(text)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        allocate.add_greedy(again, model, tokens, partial, killed)
    assert partial.exists()
    seen.clear()
    allocate.add_greedy(again, model, tokens, partial, seen.append)
    assert seen == ["calibrating, greedy: block 3 of 3"]
    assert torch.equal(again.greedy, made.greedy)
    seen.clear()                                           # what another model left is not taken for this one's
    other = tiny_model(torch.float32, seed=1)
    allocate.add_greedy(calibrate.calibrate(other, tokens, 16, "a test", fisher=False), other, tokens, partial, seen.append)
    assert len(seen) == 3


def test_calibration_file(calibrated, tmp_path):
    model, _, made = calibrated
    path = tmp_path / "calibration.safetensors"
    made.save(path)
    loaded = Calibration.load(path)
    assert loaded.source == "1,488 tokens of a test" and loaded.allocations == made.allocations
    for allocation in ALLOCATIONS:
        for name, threshold in made.thresholds(0.4, allocation).items():
            assert torch.equal(loaded.thresholds(0.4, allocation)[name], threshold)
    for same in (tiny_model(), tiny_model(torch.bfloat16), sparse.sparsify(tiny_model(), made.thresholds(0.5))):
        loaded.check(same)
    with pytest.raises(InputError, match="made for another model of the same shape"):
        loaded.check(tiny_model(seed=1))
    with pytest.raises(InputError, match="made for another model: intermediate_size is 56 in it, 60 in the model"):
        loaded.check(tiny_model(intermediate_size=60))
    for sparsity in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match="expected at least 0 and below 1"):
            loaded.thresholds(sparsity)
    with pytest.raises(InputError, match="allocation 'other' is not in this calibration, .*; known are priced"):
        loaded.thresholds(0.5, "other")
    loaded.greedy = None
    with pytest.raises(InputError, match="'greedy' is not in this calibration, .*; make it with: python calibrate.py --model FOLDER --greedy"):
        loaded.thresholds(0.5, "greedy")
    write_safetensors(path, {"x": torch.zeros(1)})
    with pytest.raises(InputError, match="not a calibration of this version: format is None"):
        Calibration.load(path)
    loaded.fisher = loaded.fisher.clone()
    loaded.fisher[1, 2] = float("nan")
    loaded.save(path)
    with pytest.raises(InputError, match="fisher holds NaN or infinity; make it with"):
        Calibration.load(path)
    loaded.fisher[1, 2] = 1.0

    def emptied():
        loaded.histograms["input"] = loaded.histograms["input"].clone()
        loaded.histograms["input"][1, 2] = 0
    for spoil in (emptied, lambda: loaded.shapes.pop("hidden_size"), lambda: setattr(loaded, "shapes", []),
                  lambda: setattr(loaded, "fingerprint", torch.zeros(3)), lambda: loaded.histograms.pop("gate"),
                  lambda: setattr(loaded, "greedy", torch.zeros(3, 4, 5)), lambda: setattr(loaded, "priced", torch.zeros(3, 4, 5)), lambda: setattr(loaded, "fisher", torch.ones(3, 7))):
        loaded = made = Calibration(dict(made.shapes), made.source, made.fingerprint, dict(made.histograms))
        spoil()
        loaded.save(path)
        with pytest.raises(InputError, match="a damaged calibration: a part is missing or misshapen; make it with"):
            Calibration.load(path)
        made = calibrated[2]
    with pytest.raises(InputError, match="this one was made sparse"):
        calibrate.calibrate(sparse.sparsify(tiny_model(), made.thresholds(0.5)), tokens_like(model, 100), 16)
    broken = tiny_model(torch.float32)
    broken.model.norm.weight[3] = float("nan")
    with pytest.raises(InputError, match="the activations hold NaN or infinity"):
        calibrate.calibrate(broken, tokens_like(model, 100), 16, fisher=False)


def test_figures(calibrated, tmp_path):
    pytest.importorskip("matplotlib")
    _, _, made = calibrated
    calibrate.draw_distributions(made, tmp_path / "a.png")
    calibrate.draw_allocations(made, tmp_path / "b.png")
    rows = [{"allocation": name, "sparsity": share, "perplexity": 10 + share} for name, share in
            (("dense", 0), ("uniform", 0.2), ("uniform", 0.5), ("rotated uniform", 0.2))]
    judging.draw_quality(rows, tmp_path / "c.png")
    timed = {("float32", 64, 64): (0.2, 16384, [0.2, 0.1]), ("int8", 64, 64): (0.2, 4096, [0.1, 0.05])}
    timing.draw_speed(timed, [0, 0.5], 1e5, tmp_path / "d.png")
    assert all((tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in "abcd")
    for path in ("e.pdf", "nowhere/e.png"):
        with pytest.raises(InputError, match="expected a name in a folder that exists, ending in .png"):
            cli.check_figure(tmp_path / path)


def test_what_texts_side_by_side_read():
    model = tiny_model(torch.float32)
    names, tokens = linear_names(model), tokens_like(model, 12 * 16 + 1)
    thresholds = {name: torch.tensor(1.0) for name in names}
    seen, hooks = {}, []
    for name in names:
        hooks.append(model.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.update({name: inputs[0][:, 8:].abs() > 1})))
    model(tokens[:-1].view(12, 16))
    for hook in hooks:
        hook.remove()
    sizes = torch.tensor([model.get_submodule(name).weight.numel() for name in names]).double()
    for count in (1, 3, 4):
        read = torch.stack([torch.stack([(keep[i:i + count].sum(0) > 0).double().mean() for i in range(0, 12, count)]).mean()
                            for keep in seen.values()])
        expected = (read * sizes).sum() / sizes.sum()
        assert judging.share_read(model, thresholds, tokens, count, 16) == pytest.approx(expected.item(), abs=1e-9)
    with pytest.raises(InputError, match="13 texts of 16 need more"):
        judging.share_read(model, thresholds, tokens, 13, 16)


# ---------------------------------------------------------------------------------------------------------
# rotate.py

@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_checkpoint_is_the_same_function(tmp_path, tied):
    model = tiny_model(torch.float32, tie_word_embeddings=tied, num_key_value_heads=2)
    tokens = tokens_like(model, 1, 12)
    (tmp_path / "plain").mkdir()
    save_sharded(model, tmp_path / "plain")
    windows = sparse.windows_of(tokens_like(model, 600), 20)
    stream, heads = rotation.covariances(model, windows)
    Q, R = rotation.principal_directions(stream), rotation.principal_directions(heads)
    assert close(Q.T @ Q, torch.eye(32), 1e-12)
    rotation.rotate(tmp_path / "plain", tmp_path / "turned", Q, R)
    turned = Llama.from_pretrained(tmp_path / "turned")
    assert close(turned(tokens), model(tokens), 1e-5) and not turned.config.tie_word_embeddings
    assert (turned.model.norm.weight == 1).all()
    # In the new basis the directions do not hang together, and the first carries the most.
    stream, heads = rotation.covariances(turned, windows)
    assert close(stream, stream.diag().diag(), 1e-4) and (stream.diag().diff() <= 1e-3 * stream.max()).all()
    assert close(heads, torch.diag_embed(heads.diagonal(dim1=-2, dim2=-1)), 1e-4)
    with pytest.raises(InputError, match="exists already"):
        rotation.rotate(tmp_path / "plain", tmp_path / "turned", Q, R)
    with pytest.raises(InputError, match="the text is too short"):
        rotation.principal_directions(rotation.covariances(model, windows[:1, :7])[0])


# ---------------------------------------------------------------------------------------------------------
# tokenizer.py

TEXTS = ["def walk(self, top):\n    return [i for i in range(10)]", " two  leading spaces", "Ωμέγα, naïve — 日本語 🙂🙂", "", "tabs\tand\r\nlines\n\n\n",
         "it's 12345 o'clock, <|eot_id|> <s> </s>", "\n", "x" * 300]


def tiktoken_folder(folder):
    """A Llama-3-like tokenizer.model: single bytes, a few merges, 256 special tokens behind them."""
    pytest.importorskip("tiktoken", reason="tiktoken is not installed (requirements-dev.txt)")
    tokens = [bytes([i]) for i in range(256)] + [b"he", b" w", b" wa", b"lk", b" walk", b"12", b"123", "Ω".encode(), b"  ", b"xx", b"xxxx"]
    (folder / "tokenizer.model").write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))
    return tokens


def json_folder(folder):
    """A byte-level BPE in the hub's format, with special tokens and a chat template."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (requirements-dev.txt)")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|eot_id|>"]
    made.train_from_iterator(TEXTS * 3, tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(i): {"content": text, "special": True} for i, text in enumerate(special)}}))
    return made


TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {% if message.role == 'system' and not loop.first %}
        {{ raise_exception('the system speaks first') }}
    {% endif %}
<|user|>{{ message['role'] }}
{{ message['content'] | trim }}</s>
{% endfor %}
{% if add_generation_prompt %}
<|user|>assistant
{% endif %}"""


def tokenizer_of(kind, folder):
    if kind == "sentencepiece":
        return llama.load_tokenizer(DEMO)
    {"tiktoken": tiktoken_folder, "json": json_folder}[kind](folder)
    return llama.load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken", "json"])
def test_text_comes_back_at_once_and_streamed(tmp_path, kind):
    tokenizer = tokenizer_of(kind, tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos and not set(ids[1:]) & set(tokenizer.special.values())    # written out, it is text
        assert tokenizer.encode(text, bos=False) == ids[1:]
        assert tokenizer.decode(ids) == text
        for cut in {0, 1, len(ids) // 2}:
            decoder = StreamDecoder(tokenizer, ids[:cut])
            parts = [decoder.add(i) for i in ids[cut:]] + [decoder.end()]
            assert tokenizer.decode(ids[:cut]).removesuffix("\ufffd") in text or cut
            whole = "".join(parts)
            assert "\ufffd" in whole or text.endswith(whole) and (cut > 1 or whole == text)
    assert max(max(tokenizer.encode(text)) for text in TEXTS) < tokenizer.vocab_size


def test_tiktoken_is_read_as_the_reference_reads_it(tmp_path):
    tokens = tiktoken_folder(tmp_path)
    import tiktoken
    special = {f"<|special_{i}|>": len(tokens) + i for i in range(256)}
    reference = tiktoken.Encoding("reference", pat_str=tokenizing.LLAMA3_SPLIT, mergeable_ranks={token: i for i, token in enumerate(tokens)},
                                  special_tokens=special)
    ours = llama.load_tokenizer(tmp_path)
    for text in TEXTS:
        assert ours.encode(text, bos=False) == reference.encode_ordinary(text)
    assert ours.bos == len(tokens) and ours.vocab_size == len(tokens) + 256
    assert ours.eos_ids == (len(tokens) + 1, len(tokens) + 9)
    assert ours.encode("a<|eot_id|>b", special=True) == [ours.bos, ord("a"), len(tokens) + 9, ord("b")]
    assert ours.decode([ord("a"), len(tokens) + 9, ord("b")]) == "ab"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 8}))
    assert llama.load_tokenizer(tmp_path).eos_ids == (7, 9)
    lines = (tmp_path / "tokenizer.model").read_bytes().splitlines()
    for spoiled, message in [(lines[:50] + [b"!!! x"], "line 51 is not a token"), (lines[:200], "every single byte"), (lines + lines[:1], "each once")]:
        (tmp_path / "tokenizer.model").write_bytes(b"\n".join(spoiled))
        with pytest.raises(InputError, match=message):
            llama.load_tokenizer(tmp_path)


def test_tokenizer_json_is_read_as_transformers_reads_it(tmp_path):
    json_folder(tmp_path)
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (requirements-dev.txt)")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = llama.load_tokenizer(tmp_path)
    for text in TEXTS:
        expected = reference(text, add_special_tokens=False).input_ids
        assert ours.encode(text, bos=False, special=True) == expected
    assert ours.bos == reference.bos_token_id and ours.eos_ids == (reference.eos_token_id,)
    # Chats: the same text, and the same ids.
    render = tokenizing.chat_template(tmp_path)
    for messages in ([{"role": "user", "content": " Hello Ω "}],
                     [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                      {"role": "user", "content": "c <|eot_id|>"}]):
        text = render(messages)
        assert text == reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.encode(text, bos=False, special=True) == reference(text, add_special_tokens=False).input_ids
    with pytest.raises(InputError, match="the chat template: the system speaks first"):
        render([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}])
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")       # the sandbox says no
    with pytest.raises(InputError, match="the chat template: "):
        tokenizing.chat_template(tmp_path)([])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json: not a tokenizer"):
        llama.load_tokenizer(tmp_path)


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", '{{ "a" + 1 }}', "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% nonsense %}",
                                    "{{ range(99999999) | list }}", "{{ strftime_now() }}", b"\xff"])
def test_chat_templates_that_fail_say_so(tmp_path, source):
    (tmp_path / "chat_template.jinja").write_bytes(source if isinstance(source, bytes) else source.encode())
    with pytest.raises(InputError, match="chat_template.jinja: not UTF-8 text|the chat template: "):
        tokenizing.chat_template(tmp_path)([{"role": "user", "content": "x"}])


def test_chat_templates_may_use_what_transformers_gives_them(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
                                                  "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}")
    assert tokenizing.chat_template(tmp_path)([{"role": "é<"}, {"role": "b"}]) == '{"role": "é<"}'


def test_chat_on_the_command_line(tmp_path):
    for file in ("config.json", "model.safetensors", "tokenizer.model", "calibration.safetensors"):
        (tmp_path / file).symlink_to(DEMO / file)
    ended = run("generate.py", "--model", tmp_path, "--chat", input="x\n")
    assert ended.returncode == 2 and "no chat template" in ended.stderr
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}def ")
    for options in ((), ("--sparsity", 0.5), ("--draft", "recycle")):
        ended = run("generate.py", "--model", tmp_path, "--chat", "--system", "a test", "--max-new-tokens", 6, *options, input="one\n\ntwo\n")
        assert ended.returncode == 0 and len(ended.stdout.splitlines()) >= 3, ended.stderr
    ended = run("generate.py", "--system", "a test")
    assert ended.returncode == 2 and "--system is for --chat, which is not given" in ended.stderr


# ---------------------------------------------------------------------------------------------------------
# quantize.py

def quantized_case(seed):
    """(x, QuantizedWeight, threshold): random codes of either kind, odd shapes."""
    generator, pick = picker(seed)

    bits, outputs, dtype = pick(8, 4), pick(1, 30, 64, 129, 300), pick(torch.float32, torch.bfloat16, torch.float16)
    group = pick(32, 64, 128) if bits == 4 else None
    channels = group * pick(1, 2, 3) if group else pick(1, 37, 300)
    codes = kernel.pack_codes(torch.randint(1, 1 << bits, (channels, outputs), generator=generator), bits)
    if bits == 8:
        weight = kernel.QuantizedWeight(codes, 0.1 * torch.rand(outputs, generator=generator))
    else:
        weight = kernel.QuantizedWeight(codes, 0.1 * torch.rand(channels // group, outputs, generator=generator).bfloat16(),
                                        torch.randint(16, (channels // group, outputs), generator=generator).to(torch.uint8), group)
    x = torch.randn(pick(*range(1, 9)), channels, generator=generator).to(dtype)
    return x, weight, pick(0.0, 0.5, 1e9, -1.0, torch.rand(channels, generator=generator) * 1.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_gemv_of_codes_against_float64(backend):
    device = DEVICE if backend == "triton" else torch.device("cpu")
    for seed in range(16 if backend == "triton" and device.type == "cpu" else 150):
        x, weight, threshold = quantized_case(seed)
        keep = x.double().abs() > (threshold.double() if isinstance(threshold, torch.Tensor) else threshold)
        exact, magnitude = weight.dequantized(torch.float64), x.double().abs() * keep
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        y = kernel.sparse_gemv(x.to(device), weight.to(device), threshold.to(device) if isinstance(threshold, torch.Tensor) else threshold,
                               backend, counts).cpu()
        assert y.dtype == x.dtype and counts.tolist() == [keep.sum().item(), keep.numel()]
        interpreted = backend == "triton" and device.type == "cpu"
        allowed = 2**-7 if interpreted or x.dtype == torch.bfloat16 else 2**-9 if x.dtype == torch.float16 else 2**-13
        # Codes are summed before they are scaled: rounding is proportional to the range of the codes.
        scale = magnitude.sum(1, keepdim=True) * (weight.scales.double() * (1 << weight.bits - 1)).view(-1, exact.shape[1]).amax(0)
        assert ((y.double() - (x.double() * keep) @ exact).abs() <= allowed * scale + 1e-30).all(), (seed, weight.bits, x.dtype)


def test_codes_are_packed_and_unpacked():
    for bits in (4, 8):
        codes = torch.randint(1 << bits, (5, 203), generator=torch.Generator().manual_seed(bits))
        words = kernel.pack_codes(codes, bits)
        assert words.dtype == torch.int32 and torch.equal(kernel.unpack_codes(words, bits, 203).long(), codes)
        # The layout that is written down: bits 4k.. (8k..) of word w of a block are output 16k + w.
        lanes = 32 // bits
        for output in (0, 17, 100, 202):
            block, inside = divmod(output, 16 * lanes)
            word = int(words[3, 16 * block + inside % 16]) >> bits * (inside // 16) & (1 << bits) - 1
            assert word == codes[3, output]


def test_rounding_is_to_nearest_and_clipping_helps():
    torch.manual_seed(0)
    weight = torch.randn(96, 256)                          # (out, in)
    eight = quantizing.quantized(weight, 8)
    assert ((eight.dequantized(torch.float32).t() - weight).abs() <= 0.5001 * eight.scales[:, None]).all()
    plain, clipped = (quantizing.quantized(weight, 4, 64, ratios) for ratios in ((1.0,), quantizing.CLIPPING))
    step = plain.scales.float().repeat_interleave(64, 0).t()                                # (out, in)
    assert ((plain.dequantized(torch.float32).t() - weight).abs() <= 1.01 * step).all()     # half a step, and the zero point's half

    def errors(made):
        return (made.dequantized(torch.float32).t() - weight).square().unflatten(1, (-1, 64)).sum(2)
    assert (errors(clipped) <= errors(plain) + 1e-6).all() and errors(clipped).sum() < 0.95 * errors(plain).sum()
    assert close(clipped.dequantized(torch.float32).t(), weight, 0.11) and close(eight.dequantized(torch.float32).t(), weight, 0.01)
    constant = quantizing.quantized(torch.full((3, 64), 0.37), 4, 64)                       # one-sided, and zero
    assert close(constant.dequantized(torch.float32), torch.full((64, 3), 0.37), 0.01)
    assert torch.equal(quantizing.quantized(torch.zeros(3, 64), 4, 64).dequantized(torch.float32), torch.zeros(64, 3))
    assert torch.equal(quantizing.quantized(torch.zeros(3, 64), 8).dequantized(torch.float32), torch.zeros(64, 3))


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_quantized_model_is_the_model_of_its_rounded_weights(bits, dtype):
    def made():
        return tiny_model(dtype, hidden_size=64, intermediate_size=96, head_dim=16)
    model, rounded = quantizing.quantize(made(), bits, 32), made()
    for name in linear_names(model):
        rounded.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
    # In float32 a rounding would move inputs over their thresholds; there nothing is dropped, but the kernel does the work.
    thresholds = {name: 0.3 + 0.01 * i if dtype == torch.float64 else 0.0 for i, name in enumerate(linear_names(model))}
    tokens, tolerance = tokens_like(model, 1, 12), {torch.float64: 1e-6, torch.float32: 1e-3}[dtype]
    assert close(model(tokens), rounded(tokens), tolerance)
    for each in (model, rounded):
        sparse.sparsify(each, thresholds)
    with sparse.sparse_mode(model, "all"), sparse.sparse_mode(rounded, "all"):
        assert close(model(tokens), rounded(tokens), tolerance)
        assert close(model(tokens[:, :5]), rounded(tokens[:, :5]), tolerance)               # few rows: the kernel
        caches = [each.make_cache(1, 12) for each in (model, rounded)]
        for i in range(12):
            assert close(model(tokens[:, i:i + 1], caches[0]), rounded(tokens[:, i:i + 1], caches[1]), tolerance)
        assert sparse.realised_sparsity(model) == pytest.approx(sparse.realised_sparsity(rounded), abs=1e-3)
        assert dtype == torch.float32 or 0.1 < sparse.realised_sparsity(model) < 0.9


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_folder(tmp_path, bits):
    model = tiny_model(torch.float32, hidden_size=64, intermediate_size=96, head_dim=16)
    (tmp_path / "plain").mkdir()
    save_sharded(model, tmp_path / "plain")
    errors = quantizing.quantize_folder(tmp_path / "plain", tmp_path / "small", bits, 32)
    loaded = Llama.from_pretrained(tmp_path / "small")
    in_memory = quantizing.quantize(model, bits, 32)
    tokens = tokens_like(model, 2, 9)
    assert torch.equal(loaded(tokens), in_memory(tokens))
    assert [name for name, *_ in sorted(errors)] == sorted(linear_names(model)) and max(error for _, error, _, _ in errors) < 0.15
    calibration = calibrate.calibrate(loaded, tokens_like(model, 400, seed=3), 32)          # backward, too
    sparse.sparsify(loaded, calibration.thresholds(0.5))
    assert next(generate(loaded, [1, 2, 3], 4)) in range(model.config.vocab_size)
    with pytest.raises(InputError, match="the model is quantized"):
        in_memory.save_pretrained(tmp_path / "again")
    with pytest.raises(InputError, match="exists already"):
        quantizing.quantize_folder(tmp_path / "plain", tmp_path / "small", bits)
    with pytest.raises(InputError, match="is quantized already"):
        quantizing.quantize_folder(tmp_path / "small", tmp_path / "twice", bits)
    with pytest.raises(InputError, match="is quantized already"):
        llama.quantized_now(in_memory, "this", "int8")
    with pytest.raises(InputError, match="rotate first"):
        rotation.rotate(tmp_path / "small", tmp_path / "turned", None, None)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    for changes, message in [({"version": 2}, "version is 2, known is 1"), ({"bits": 3}, "3 bits with group"),
                             ({"bits": 4, "group": 40}, "groups of 40"), ({"quant_method": "awq"}, "weights in floating point, or as quantize.py")]:
        changed = config | {"quantization_config": config["quantization_config"] | changes}
        (tmp_path / "small" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            Llama.from_pretrained(tmp_path / "small")


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_with_nan_outliers_and_in_groups(backend):
    device = DEVICE if backend == "triton" else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    for bits in (8, 4):
        weights = [quantizing.quantized(torch.randn(out, 64, generator=generator), bits, 64).to(device) for out in (40, 130, 7)]
        x = 0.1 * torch.randn(3, 64, generator=generator).to(device)
        thresholds = [0.0, 0.05, 0.1]
        alone = [kernel.sparse_gemv(x, weight, threshold, backend) for weight, threshold in zip(weights, thresholds)]
        for found, expected in zip(kernel.sparse_gemv_group(x, weights, thresholds, backend).split([y.shape[1] for y in alone], 1), alone):
            assert close(found, expected, 2**-7 if backend == "triton" else 1e-5)
        gate, up = weights[1], quantizing.quantized(torch.randn(130, 64, generator=generator), bits, 64).to(device)
        expected = F.silu(kernel.sparse_gemv(x, gate, 0.0, backend)) * kernel.sparse_gemv(x, up, 0.1, backend)
        assert close(kernel.sparse_gated(x, gate, up, 0.0, 0.1, backend), expected, 2**-6 if backend == "triton" else 1e-5)
        x[1, 5] = float("nan")                             # it shows in its row, and there alone
        found = kernel.sparse_gemv(x, weights[0], 0.05, backend)
        assert found[1].isnan().all() and not found[[0, 2]].isnan().any()
        x[1, 5] = 1500.0                                   # an outlier leaves the others' part exact
        exact = x.double() @ weights[0].dequantized(torch.float64)
        rest = exact[1] - x[1, 5].double() * weights[0].dequantized(torch.float64)[5]
        found = kernel.sparse_gemv(x, weights[0], 0.0, backend)[1].double() - x[1, 5].double() * weights[0].dequantized(torch.float64)[5]
        if not (backend == "triton" and device.type == "cpu"):                              # whose sums are bfloat16's
            assert (found - rest).abs().median() < 0.01 * rest.abs().median()


def test_a_quantized_weight_keeps_its_dtypes_and_its_kind():
    for bits in (8, 4):
        weight = quantizing.quantized(torch.randn(33, 64), bits, 64)
        x, kinds = torch.randn(1, 64), [part.dtype for part in weight.buffers()]
        before = kernel.sparse_gemv(x, weight, 0.0)
        for dtype in (torch.float16, torch.float64, torch.bfloat16):
            weight = torch.nn.ModuleList([weight]).to(dtype)[0]
            assert [part.dtype for part in weight.buffers()] == kinds and torch.equal(kernel.sparse_gemv(x, weight, 0.0), before)
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(kernel.sparse_gemv(x, weight, 0.0), before)
        finally:
            torch.set_default_dtype(torch.float32)
        for pair in ((weight, torch.randn(64, 33)), (torch.randn(64, 33), weight), (weight, quantizing.quantized(torch.randn(33, 64), 12 - bits, 64))):
            with pytest.raises(ValueError, match="expected all of one kind"):
                kernel.sparse_gemv_group(x, list(pair), [0.0, 0.0])
        with pytest.raises(ValueError, match="expected \\(32, out\\)"):
            kernel.sparse_gemv(torch.randn(1, 32), weight, 0.0)


def test_a_quantization_that_fails_changes_nothing(tmp_path):
    model = tiny_model(torch.float32, hidden_size=64, intermediate_size=80, head_dim=16)
    with pytest.raises(InputError, match="layers.0.mlp.down_proj: groups of 32"):
        quantizing.quantize(model, 4, 32)
    assert all(isinstance(model.get_submodule(name), torch.nn.Linear) for name in linear_names(model))
    quantizing.quantize(model, 8)
    for preset in ("llama-3.2-1b",):                       # a model's own configuration, not the preset's
        assert llama.preset_config(preset) is not llama.PRESETS[preset]
    # Nothing of an unfinished folder stays, and nothing else is touched.
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "mine.txt").write_text("keep me")
    spoiled = tiny_model(torch.float32, hidden_size=64, intermediate_size=96, head_dim=16)
    spoiled.model.layers[2].mlp.up_proj.weight[3, 4] = float("nan")
    spoiled.save_pretrained(tmp_path / "nan")
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(tmp_path / "nan" / "model.safetensors").items()}
    for name, change, message in [("nan", {}, "up_proj.weight: holds NaN"),
                                  ("missing", {"model.layers.1.mlp.up_proj.weight": None, "model.norm.weight": torch.ones(64)}, "is missing"),
                                  ("misshapen", {"model.norm.weight": torch.ones(7)}, "shape \\[7\\]")]:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text((tmp_path / "nan" / "config.json").read_text())
        changed = {key: value for key, value in (tensors | change).items() if value is not None}
        changed["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"].nan_to_num() if name != "nan" \
            else tensors["model.layers.2.mlp.up_proj.weight"]
        write_safetensors(tmp_path / name / "model.safetensors", changed)
        for write in (lambda: quantizing.quantize_folder(tmp_path / name, tmp_path / "out", 8),
                      *([] if name == "nan" else [lambda: rotation.rotate(tmp_path / name, tmp_path / "out", torch.eye(64).double(),
                                                                          torch.eye(16).double().expand(3, 2, 16, 16))])):
            with pytest.raises(InputError, match=message):
                write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["misshapen", "missing", "nan", "out.tmp"]
    assert (tmp_path / "out.tmp" / "mine.txt").read_text() == "keep me"


def test_every_command_takes_a_quantized_folder(tmp_path):
    assert run("quantize.py", "--bits", 4, "--out", tmp_path / "small").returncode == 0
    assert run("quantize.py", "--model", tmp_path / "small").stderr.strip().endswith("small: is quantized already")
    assert run("generate.py", "--model", tmp_path / "small", "--quantize", "int8").stderr.count("is quantized already") == 1
    assert "is quantized; rotate first" in run("rotate.py", "--model", tmp_path / "small", "--out", tmp_path / "x").stderr
    ended = run("calibrate.py", "--model", tmp_path / "small", "--tokens", 4000, "--no-fisher")
    assert ended.returncode == 0, ended.stderr
    ended = run("sparsify.py", "--model", tmp_path / "small", "--tokens", 2000, "--sparsity", 0.5, "--functions", 0, "--allocation", "uniform")
    assert ended.returncode == 0 and "uniform" in ended.stdout, ended.stderr
    for options in (("--sparsity", 0.5), ("--draft", "sparse", "--compare")):
        ended = run("generate.py", "--model", tmp_path / "small", "--max-new-tokens", 8, *options)
        assert ended.returncode == 0 and "8 tokens" in ended.stdout, ended.stderr
    ended = run("generate.py", "--quantize", "int8", "--max-new-tokens", 8, "--sparsity", 0.5)
    assert ended.returncode == 0 and "8 tokens" in ended.stdout, ended.stderr
    assert float(run("model.py", tmp_path / "small").stdout.split("read for one token: ")[1].split(" MB")[0]) < 6


def test_what_cannot_be_quantized():
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="this one: holds NaN or infinity"):
            quantizing.quantized(torch.full((2, 32), value), 8, name="this one")
    for group, inputs in [(128, 192), (48, 96), (0, 64)]:
        with pytest.raises(InputError, match=f"groups of {group}"):
            quantizing.quantized(torch.ones(2, inputs), 4, group)
    with pytest.raises(InputError, match="bits is 5"):
        quantizing.quantized(torch.ones(2, 32), 5)


# ---------------------------------------------------------------------------------------------------------
# generate.py

def test_greedy_is_the_argmax_of_the_whole_sequence():
    model = tiny_model()
    ids = tokens_like(model, 5).tolist()
    found = list(generate(model, ids, 20))
    for token in found:
        assert token == model(torch.tensor([ids]))[0, -1].argmax().item()
        ids.append(token)
    assert len(found) == 20 and len(set(found)) > 3
    eos = found[7]
    assert list(generate(model, ids[:5], 20, eos_ids=(eos,))) == found[:found.index(eos)]


def test_sparse_decoding_equals_whole_sequences_that_are_sparse_after_the_prompt():
    model = tiny_model()
    prompt, thresholds = tokens_like(model, 6).tolist(), some_thresholds(model)
    sparse.sparsify(model, thresholds)
    found = list(generate(model, prompt, 12))
    with sparse.sparse_mode(model, "all", dense_prefix=6):
        for i, token in enumerate(found):
            assert token == model(torch.tensor([prompt + found[:i]]))[0, -1].argmax().item()


def test_generation_ends_where_the_context_does():
    model = tiny_model(max_position_embeddings=10)
    assert len(list(generate(model, [1, 2, 3], 100))) == 7
    for prompt, message in [([], "the prompt is empty"), ([1] * 10, "the prompt has 10 tokens, the model's context holds 10"),
                            ([99], "token id 99 is outside the vocabulary of 61")]:
        with pytest.raises(InputError, match=message):
            generate(model, prompt, 3)                     # at once, not at the first token
    for options, message in [({"temperature": -1.0}, "temperature is -1.0"), ({"top_k": 0}, "top_k is 0"),
                             ({"top_p": 0.0}, "top_p is 0.0"), ({"temperature": float("nan")}, "temperature is nan"),
                             ({"seed": -1}, "seed is -1"), ({"seed": 10**30}, "seed is 1000")]:
        with pytest.raises(InputError, match=message):
            generate(model, [1], 3, **options)
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        generate(model, [1], 0)


def test_probabilities():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    p = decode.probabilities
    assert torch.allclose(p(logits, 1.0), torch.tensor([0.5, 0.25, 0.15, 0.1]))
    assert torch.allclose(p(logits, 0.5), torch.tensor([0.25, 0.0625, 0.0225, 0.01]) / 0.345)
    assert torch.allclose(p(logits, 1.0, top_k=2), torch.tensor([2 / 3, 1 / 3, 0, 0]))
    assert torch.allclose(p(logits, 1.0, top_p=0.7), torch.tensor([2 / 3, 1 / 3, 0, 0]))
    assert torch.allclose(p(logits, 1.0, top_p=0.01), torch.tensor([1.0, 0, 0, 0]))
    assert torch.allclose(p(logits, 1.0, top_k=9, top_p=1.0), torch.tensor([0.5, 0.25, 0.15, 0.1]))
    assert torch.allclose(p(logits, 1.0, top_k=3, top_p=0.6), torch.tensor([2 / 3, 1 / 3, 0, 0]))
    assert torch.equal(p(logits * 1e4, 1e-38), torch.tensor([1.0, 0, 0, 0])) and p(logits, 1.0, top_p=1e-46)[0] == 1
    assert sorted(p(torch.ones(4), 1.0, top_k=1).tolist()) == [0, 0, 0, 1]                  # ties do not widen it


def test_sampling_repeats_with_a_seed_and_follows_the_distribution():
    model = tiny_model()
    first = [list(generate(model, [1, 2], 8, temperature=1.0, seed=seed)) for seed in (3, 3, 4)]
    assert first[0] == first[1] != first[2]
    expected = decode.probabilities(model(torch.tensor([[1, 2]]))[0, -1], 0.7, top_k=4)
    counts = torch.zeros(61)
    for seed in range(600):
        counts[next(generate(model, [1, 2], 1, temperature=0.7, top_k=4, seed=seed))] += 1
    held = expected > 0
    assert counts[~held].sum() == 0 and held.sum() == 4
    statistic = ((counts[held] - 600 * expected[held]) ** 2 / (600 * expected[held])).sum()
    assert torch.special.gammaincc(torch.tensor(1.5), statistic / 2) > 0.001


TEXTS = ["def f(x):\n    return x + 1\n", "  spaces  and\ttabs\n\n\n", "naïve café – 你好, мир! 🙂👩‍👩‍👧", "\x00\x7f\r\n", "a" * 50 + "🙂" * 20]


# Speculative decoding

def disturbed(model, noise, seed=5):
    """A copy of a model with other weights: a draft that is often right, and sometimes not."""
    torch.manual_seed(seed)
    other = Llama(dataclasses.replace(model.config)).to(model.device, model.model.embed_tokens.weight.dtype).eval()
    for theirs, own in zip(other.parameters(), model.parameters()):
        theirs.requires_grad_(False)
        theirs.copy_(own + noise * own.std().nan_to_num() * torch.randn(own.shape))
    return other


def contrary(model):
    """A draft that is always wrong: the model's least likely token."""
    other = disturbed(model, 0.0)
    other.lm_head.weight.neg_()
    return other


def draft_of(kind, model):
    """(draft, draft_thresholds) as generate_speculative takes them; the model must not be sparsified yet."""
    if kind == "sparse":
        sparse.sparsify(model, dict.fromkeys(linear_names(model), 0.0))
        return kind, {name: 0.35 for name in linear_names(model)}
    return {"recycle": "recycle", "model": disturbed(model, 0.2), "wrong": contrary(model)}[kind], None


def run_through(run):
    return list(run), run.statistics


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sparse", "recycle", "model", "wrong"])
def test_speculative_greedy_is_plain_greedy(kind):
    model = tiny_model(max_position_embeddings=48, vocab_size=13)
    prompts = [tokens_like(model, 1 + 5 * seed, seed=seed).tolist() for seed in range(6)]
    plain = [list(generate(model, prompt, 24)) for prompt in prompts]
    draft, thresholds = draft_of(kind, model)
    shares = []
    for draft_tokens in [*range(1, 9), 31, None]:
        for prompt, expected in zip(prompts, plain):
            run = speculation.generate_speculative(model, prompt, 24, draft, thresholds, draft_tokens)
            found, did = run_through(run)
            assert found == expected
            assert did.tokens == len(found) - 1 and did.passes <= did.tokens                # the first token is the prompt's
            assert all(accepted <= reached for accepted, reached in zip(did.accepted, did.reached))
            shares += did.acceptance
    assert max(shares) == 0 if kind == "wrong" else 0.2 < sum(shares) / len(shares) < 1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sparse", "recycle", "model"])
def test_speculation_stops_inside_an_accepted_run(kind):
    model = tiny_model(vocab_size=13)
    prompt = tokens_like(model, 5).tolist()
    plain = list(generate(model, prompt, 30))
    draft, thresholds = draft_of(kind, model)
    draft = disturbed(model, 0.0) if kind == "model" else draft                             # all is accepted
    thresholds = {name: 0.0 for name in linear_names(model)} if kind == "sparse" else thresholds
    inside = 0
    for eos in set(plain):
        run = speculation.generate_speculative(model, prompt, 30, draft, thresholds, 7, eos_ids=(eos,))
        found, did = run_through(run)
        assert found == plain[:plain.index(eos)]
        inside += sum(did.accepted) + did.passes > did.tokens       # verified tokens lay behind the end
    assert inside
    for limit in range(1, 12):
        found, did = run_through(speculation.generate_speculative(model, prompt, limit, draft, thresholds, 7))
        assert found == plain[:limit]
    if kind == "model":                                    # a draft model whose context ends before the text does
        draft.config.max_position_embeddings = 12
        found, did = run_through(speculation.generate_speculative(model, prompt, 30, draft, None, 7))
        assert found == plain and max(did.times) == 7 and 0 in did.times
        draft.config.max_position_embeddings = 3           # and one that does not even hold the prompt
        assert list(speculation.generate_speculative(model, prompt, 30, draft, None, 7)) == plain


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sparse", "recycle", "model"])
def test_the_verifier_may_be_sparse(kind):
    """Then the text is that of `generate` in the mode in force: in mode "decode" the prompt is dense, in "all" it is not."""
    model = tiny_model(vocab_size=13)
    prompt, thresholds = tokens_like(model, 5).tolist(), some_thresholds(model)
    draft, draft_thresholds = draft_of(kind, model)
    sparse.sparsify(model, thresholds)
    with sparse.sparse_mode(model, "off"):
        dense = list(generate(model, prompt, 20))
    run = speculation.generate_speculative(model, prompt, 20, draft, draft_thresholds, 3)
    assert run.against == "the dense model" and list(run) == dense
    texts = [dense]
    for where in ("decode", "all"):
        with sparse.sparse_mode(model, where):
            plain = list(generate(model, prompt, 20))
            for draft_tokens in (1, 3, 7, 12):             # 13 nodes are more than the kernel takes at once
                run = speculation.generate_speculative(model, prompt, 20, draft, draft_thresholds, draft_tokens, sparse_verifier=True)
                assert run.against == "the sparse model" and list(run) == plain
            texts.append(plain)
    assert len(set(map(tuple, texts))) == 3
    model.sparse_state.where, model.sparse_state.dense_prefix = "all", 2
    with pytest.raises(InputError, match="dense prefix"):
        speculation.generate_speculative(model, prompt, 20, draft, draft_thresholds)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sparse", "recycle", "model", "wrong"])
def test_a_rejected_draft_leaves_the_cache_as_it_was(kind):
    model = tiny_model(vocab_size=13)
    prompt = tokens_like(model, 6).tolist()
    draft, thresholds = draft_of(kind, model)
    run = speculation.generate_speculative(model, prompt, 20, draft, thresholds, 5)
    written = [next(run) for _ in range(15)]
    assert sum(run.statistics.reached) > sum(run.statistics.accepted)                       # something was rejected
    for of, found in [(model, run.cache), *([(draft, run.draft.cache)] if isinstance(draft, Llama) else [])]:
        cache = of.make_cache(1, 40)
        with sparse.sparse_mode(of, "off"):
            of(torch.tensor([prompt + written]), cache)
        # A draft model's cache holds its last guesses, until the next round takes them back.
        used = min(found.used, cache.used) if of is model else len(prompt) + len(written) - 6
        assert used >= 15
        assert close(found.keys[:, :, :, :used], cache.keys[:, :, :, :used], 1e-12)
        assert close(found.values[:, :, :, :used], cache.values[:, :, :, :used], 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sparse", "recycle", "model"])
@pytest.mark.parametrize("window", [2, 5, 12])
def test_speculation_with_a_sliding_window(kind, window):
    model = tiny_model(vocab_size=13, model_type="mistral", sliding_window=window)
    prompt = tokens_like(model, 9).tolist()
    plain = list(generate(model, prompt, 24))
    draft, thresholds = draft_of(kind, model)
    for draft_tokens in (1, 4, 7):
        assert list(speculation.generate_speculative(model, prompt, 24, draft, thresholds, draft_tokens)) == plain


@torch.no_grad()
def test_an_abandoned_or_interleaved_speculation_leaves_no_trace():
    model = tiny_model(vocab_size=13)
    prompts = [tokens_like(model, 5, seed=seed).tolist() for seed in range(2)]
    plain = [list(generate(model, prompt, 20)) for prompt in prompts]
    sparse.sparsify(model, dict.fromkeys(linear_names(model), 0.2))
    before = model.sparse_state.thresholds.clone()
    runs = [speculation.generate_speculative(model, prompt, 20, "sparse", {name: 0.5 for name in linear_names(model)}, 3) for prompt in prompts]
    texts = [[], []]
    for _ in range(15):
        for run, text in zip(runs, texts):
            text.append(next(run))
            assert model.sparse_state.where == "decode" and torch.equal(model.sparse_state.thresholds, before)
    assert texts == [text[:15] for text in plain]


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", ["sparse", "recycle", "model"])
def test_speculation_replays_graphs_on_a_gpu(kind):
    model = tiny_model(torch.float32, vocab_size=13).to(DEVICE)
    prompt = tokens_like(model, 5).tolist()
    draft, thresholds = draft_of(kind, model)
    sparse.sparsify(model, dict.fromkeys(linear_names(model), 0.2))
    for where, sparse_verifier in (("off", False), ("decode", True)):
        with sparse.sparse_mode(model, where):
            plain = list(generate(model, prompt, 20))
            for draft_tokens in (3, 12, None):
                assert list(speculation.generate_speculative(model, prompt, 20, draft, thresholds, draft_tokens,
                                                            sparse_verifier=sparse_verifier)) == plain


def p_value(counts, expected):
    """Of Pearson's chi-square test: counts (cells,) against expected (cells,), the cells expected under 5 pooled."""
    assert counts[expected == 0].sum() == 0
    large = expected >= 5
    counts = torch.cat((counts[large], counts[~large].sum()[None]))
    expected = torch.cat((expected[large], expected[~large].sum()[None]))
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert len(expected) > 8
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2.0).double(), statistic.double() / 2).item()


SAMPLING = dict(temperature=0.9, top_k=4, top_p=0.97)


@torch.no_grad()
def p_value_of_drafts(kind, seeds=900):
    """How probable it is that sequences sampled with drafts are drawn from the model's distribution.

    Five tokens are sampled, three a draft; the second to the fourth, which drafts and verdicts decide, are scored.
    """
    model = tiny_model(dtype=torch.float32, vocab_size=5, num_hidden_layers=1, seed=3)
    prompt = [0, 3, 1, 4, 2, 2, 0]
    counts, expected = torch.zeros(5, 5, 5), torch.zeros(5, 5, 5, dtype=torch.float64)
    beginnings = torch.cartesian_prod(*[torch.arange(5)] * 3)                               # (125, 3)
    logits = model(torch.cat((torch.tensor(prompt).expand(125, -1), beginnings), 1))[:, -4:]
    p = decode.probabilities(logits, *SAMPLING.values()).double()                       # (125, 4, 5)
    for (a, b, c), (first, second, third, fourth) in zip(beginnings.tolist(), p):
        expected[b, c] += seeds * first[a] * second[b] * third[c] * fourth
    draft, thresholds = draft_of(kind, model)
    draft = disturbed(model, 0.6) if kind == "model" else draft
    thresholds = {name: 0.8 for name in linear_names(model)} if kind == "sparse" else thresholds
    accepted = reached = third_guesses = 0
    for seed in range(seeds):
        run = speculation.generate_speculative(model, prompt, 5, draft, thresholds, 3, seed=seed, **SAMPLING)
        _, b, c, d, _ = run
        counts[b, c, d] += 1
        accepted, reached = accepted + sum(run.statistics.accepted), reached + sum(run.statistics.reached)
        third_guesses += len(run.statistics.reached) == 3
    assert 0.1 < accepted / reached < 0.95                 # p and q differ, and meet
    assert kind == "recycle" or third_guesses > 30
    return p_value(counts.flatten().double(), expected.flatten())


@pytest.mark.parametrize("kind", ["sparse", "recycle", "model"])
def test_speculative_sampling_has_the_models_distribution(kind):
    assert p_value_of_drafts(kind) > 1e-3


@pytest.mark.parametrize("kind", ["sparse", "model"])
def test_a_wrong_acceptance_rule_is_found_out(monkeypatch, kind):
    monkeypatch.setattr(speculation, "stays", lambda p, q, uniform: bool(uniform < p))       # should be uniform < p / q
    assert p_value_of_drafts(kind) < 1e-6


def test_a_tree_taken_for_a_drawn_guess_is_found_out(monkeypatch):
    guess = speculation.RecycleDraft.guess

    def claims_to_be_drawn(self, ids, size, sampling, generator):
        tokens, _ = guess(self, ids, size, sampling, generator)
        return tokens, torch.full((len(tokens), 5), 0.2)
    monkeypatch.setattr(speculation.RecycleDraft, "guess", claims_to_be_drawn)
    assert p_value_of_drafts("recycle") < 1e-6


@torch.no_grad()
def test_drafts_are_sampled_as_the_text_is():
    """Temperature, top-k and top-p apply to both sides: a guess is never one that the settings exclude."""
    model = tiny_model(vocab_size=13)
    draft = speculation.ModelDraft(model, model.make_cache(1, 20))
    _, q = draft.guess([1, 2, 3], 4, tuple(SAMPLING.values()), torch.Generator().manual_seed(0))
    assert q.shape == (4, 13) and ((q > 0).sum(1) <= 4).all() and torch.allclose(q.sum(1), torch.ones(4, dtype=q.dtype))
    assert torch.allclose(q[0], decode.probabilities(model(torch.tensor([[1, 2, 3]]))[0, -1], *SAMPLING.values()))


@pytest.mark.parametrize("kind", ["sparse", "recycle", "model"])
def test_sampled_speculation_repeats_with_a_seed_and_a_fixed_draft(kind):
    model = tiny_model(vocab_size=13)
    plain = [list(generate(model, [1, 2], 12, 1.0, seed=seed)) for seed in range(3)]
    draft, thresholds = draft_of(kind, model)
    texts = [list(speculation.generate_speculative(model, [1, 2], 12, draft, thresholds, 3, 1.0, seed=seed)) for seed in (0, 1, 2, 0)]
    assert texts[0] == texts[3] != texts[1]
    if kind == "recycle":                                  # one draw a token, as without drafts: even the text is the same
        assert texts[:3] == plain


def test_draft_trees():
    for size in (1, 3, 7, 31, 79):
        tree = speculation.draft_tree(size, torch.device("cpu"))
        assert len(tree.parents) == size and tree.sees.shape == (size + 1, size + 1)
        assert len(set(zip(tree.parents, tree.ranks))) == size                              # no guess twice
        for node, parent in enumerate(tree.parents, start=1):
            assert parent < node and node in tree.children[parent]
            assert tree.depths[node] == tree.depths[parent] + 1 == tree.sees[node].sum() - 1
            assert torch.equal(tree.sees[node], tree.sees[parent] | (torch.arange(size + 1) == node))
        assert sorted(int(node) for nodes, _, _ in tree.levels for node in nodes) == list(range(1, size + 1))
        assert (tree.parents, tree.ranks) == tuple(x[:size] for x in (speculation.draft_tree(79, torch.device("cpu")).parents,
                                                                       speculation.draft_tree(79, torch.device("cpu")).ranks))


def test_the_draft_length_adapts():
    """The best size is found for given times and acceptances, also where no draft is the best, and after a disturbance."""
    def settle(acceptance, draft_time, verify_time, slow=(), rounds=300):
        did = speculation.Statistics(speculation.ModelDraft)
        torch.manual_seed(0)
        for i in range(rounds):
            size = did.best_size()
            right = int((torch.rand(size) < acceptance).long().cumprod(0).sum())
            did.record(speculation.chain(size, torch.device("cpu")), list(range(right + 1)), size * draft_time,
                       verify_time(size + 1) * (20 if i in slow else 1))
        return max(did.times, key=lambda size: len(did.times[size])), did

    def best(acceptance, draft_time, verify_time):
        return max(range(8), key=lambda k: sum(acceptance**i for i in range(k + 1)) / (k * draft_time + verify_time(k + 1)))

    for case in [(0.9, 0.1, lambda rows: 1.0), (0.7, 0.3, lambda rows: 1 + 0.05 * rows), (0.8, 0.05, lambda rows: 1.0 if rows < 5 else 3.0)]:
        for slow in [(), (3, 5), range(4, 12)]:
            found, did = settle(*case, slow)
            assert abs(found - best(*case)) <= 1
            assert did.acceptance[0] == pytest.approx(case[0], abs=0.1)
    found, did = settle(0.3, 0.9, lambda rows: float(rows))
    assert found == 0 == best(0.3, 0.9, lambda rows: float(rows))
    assert len(did.times[1]) > 5                           # and tries again


def test_statistics_of_a_tree():
    did, tree = speculation.Statistics(speculation.RecycleDraft), speculation.draft_tree(7, torch.device("cpu"))
    leaf = next(node for node in tree.children[0] if not tree.children[node])
    did.record(tree, [0, leaf], 1.0, 2.0)
    assert did.reached == [1] and did.accepted == [1]      # behind a leaf nothing was guessed
    did.record(tree, [0], 1.0, 2.0)
    assert did.acceptance == [0.5] and did.draft_seconds == 2 and did.verify_seconds == 4


def test_speculation_refuses_what_does_not_fit():
    model = tiny_model()
    for options, message in [({}, 'draft "sparse" needs a model made sparse'), ({"draft": "other"}, "draft is"),
                             ({"draft": tiny_model(vocab_size=12)}, "the draft model has 12 tokens, the model 61"),
                             ({"draft": "recycle", "draft_tokens": 0}, "draft_tokens is 0"),
                             ({"draft": "recycle", "draft_tokens": 99}, "draft_tokens is 99"),
                             ({"draft": "recycle", "top_p": 0.0}, "top_p is 0.0")]:
        with pytest.raises(InputError, match=message):
            speculation.generate_speculative(model, [1, 2], 4, **options)


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_decoded_text(text):
    tokenizer = llama.load_tokenizer(DEMO)
    ids = tokenizer.encode(text, bos=False)
    prompt = tokenizer.encode("x = ")
    for start in ([], prompt):
        decoder = StreamDecoder(tokenizer, start)
        parts = [decoder.add(i) for i in ids]
        assert not any("\ufffd" in part for part in parts)
        assert "".join(parts) + decoder.end() == text
    half = tokenizer.encode("🙂", bos=False)[:2]            # a character that never ends
    decoder = StreamDecoder(tokenizer)
    assert [decoder.add(i) for i in half] == ["", ""] and "\ufffd" in decoder.end()


def test_tokens_that_only_pad_the_vocabulary_have_no_text():
    tokenizer = llama.load_tokenizer(DEMO)
    ids = tokenizer.encode("def", bos=False)
    assert tokenizer.decode([4096, *ids, 5000]) == "def"
    with pytest.raises(InputError, match="not Unicode"):
        tokenizer.encode("\udcff")


def test_ctrl_c_keeps_what_was_written(capsys):
    def interrupted():
        yield from (70, 71, 72)
        raise KeyboardInterrupt

    ids, _, _, ended = generation.stream(interrupted(), None, lambda text: print(text, end=""))
    assert ended and ids == [70, 71, 72] and capsys.readouterr().out == " 70 71 72\n[interrupted]"


# ---------------------------------------------------------------------------------------------------------
# parallel.py

def what_a_model_does(model, thresholds):
    """{name: tensor} of logits and texts, dense and sparse; the same from one process and from a rank of several."""
    found, tokens = {}, tokens_like(model, 2, 20)
    thresholds = parallel.part_of_thresholds(thresholds)
    found["whole"] = model(tokens)
    cache = model.make_cache(2, 20)
    found["cached"] = torch.cat([model(part, cache) for part in (tokens[:, :9], tokens[:, 9:12], *tokens[:, 12:].split(1, 1))], 1)
    prompt = tokens[0, :6].tolist()
    texts = {"greedy": generate(model, prompt, 12)}
    sparse.sparsify(model, thresholds | {"lm_head": 0.0})
    with sparse.sparse_mode(model, "all"):
        found["sparse"] = model(tokens)
    sparse.reset_counts(model)
    texts |= {"sparse greedy": generate(model, prompt, 12), "sampled": generate(model, prompt, 12, 1.0, seed=3),
              "drafted": speculation.generate_speculative(model, prompt, 12, "sparse", draft_tokens=3),
              "recycled": speculation.generate_speculative(model, prompt, 12, "recycle", draft_tokens=7)}
    found |= {name: torch.tensor(list(text)) for name, text in texts.items()}
    with sparse.sparse_mode(model, "all"):
        sparse.reset_counts(model)
        model(tokens)
    parallel.count_together(model)
    return found | {"realised": torch.tensor(sparse.realised_sparsity(model), dtype=torch.float64)}


def one_rank(folder, thresholds, out):
    """What each process of the tests below does: its part of the model, in float64, and rank 0 writes down what it found."""
    with parallel.group("cpu"):
        model = parallel.from_pretrained(folder, dtype=torch.float64)
        held = sum(parameter.numel() for name, parameter in model.named_parameters() if "_proj" in name)
        with torch.no_grad():
            found = what_a_model_does(model, read_safetensors(thresholds))
        if parallel.dist.get_rank() == 0:
            write_safetensors(out, {name: tensor.contiguous() for name, tensor in found.items()} | {"held": torch.tensor(held)})


def torchrun(processes, *command):
    return run("-m", "torch.distributed.run", "--nproc-per-node", processes, *command, env={"OMP_NUM_THREADS": "1"}, timeout=300)


@pytest.mark.parametrize("what, processes", [("demo", 2), ("demo", 4), ("biases", 2), ("tied", 2)])
def test_ranks_do_together_what_one_process_does(tmp_path, what, processes):
    folder = DEMO
    if what != "demo":
        folder = tmp_path / "model"
        changes = dict(tie_word_embeddings=True) if what == "tied" else dict(attention_bias=True, mlp_bias=True)
        tiny_model(torch.float32, **changes).save_pretrained(folder)
    model = Llama.from_pretrained(folder, dtype=torch.float64)
    thresholds = {}
    for name in linear_names(model):                       # a number for some linears, one a channel for others
        torch.manual_seed(len(thresholds))
        size = () if len(thresholds) % 3 else (model.get_submodule(name).in_features,)
        thresholds[name] = torch.rand(size) * (0.6 if folder == DEMO else 1.5)
    write_safetensors(tmp_path / "thresholds", thresholds)
    held = sum(parameter.numel() for name, parameter in model.named_parameters() if "_proj" in name)
    with torch.no_grad():
        expected = what_a_model_does(model, thresholds)
    script = tmp_path / "rank.py"
    script.write_text("import sys, test_all\ntest_all.one_rank(*sys.argv[1:])\n")
    ended = torchrun(processes, script, folder, tmp_path / "thresholds", tmp_path / "found")
    assert ended.returncode == 0, ended.stderr
    found = read_safetensors(tmp_path / "found")
    assert 0.1 < expected["realised"] < 0.9
    assert (expected["sparse"] - expected["whole"]).norm() > 0.01 * expected["whole"].norm()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) if tensor.dtype == torch.int64 else close(found[name], tensor, 1e-10), name
    biases = sum(len(module.bias) for name, module in model.named_modules() if name.endswith(("o_proj", "down_proj"))
                 and module.bias is not None)
    assert found["held"] == (held - biases) // processes + biases


def test_torchrun_generate_writes_what_generate_writes():
    command = ["generate.py", "--prompt", "class Stack:", "--max-new-tokens", 16, "--dtype", "float32", "--temperature", 1, "--seed", 5]
    for more in (["--sparsity", 0.5], ["--draft", "demo", "--draft-tokens", 3]):
        one, two = run(*command, *more), torchrun(2, *command, *more)
        assert one.returncode == two.returncode == 0, two.stderr
        assert one.stdout.splitlines()[1:4] == two.stdout.splitlines()[1:4] and "2 processes" in two.stdout
        assert "16 tokens" in two.stdout and two.stdout.count("class Stack:") == 1          # rank 0 alone speaks
        skipped = [re.findall(r"[\d.]+% of the blocks", ended.stdout) for ended in (one, two)]
        assert skipped[0] == skipped[1] and len(skipped[0]) == ("--sparsity" in more)


@pytest.mark.parametrize("processes, more, message", [
    (3, [], "num_attention_heads is 8, which 3 processes cannot share evenly"),
    (2, ["--draft", "recycle"], "needs --draft-tokens"),
])
def test_what_ranks_cannot_share_is_refused(processes, more, message):
    ended = torchrun(processes, "generate.py", "--prompt", "x", *more)
    assert ended.returncode != 0 and message in ended.stderr


def test_quantized_folders_are_not_split(tmp_path):
    quantizing.quantize_folder(DEMO, tmp_path / "out", 8)
    ended = torchrun(2, "generate.py", "--model", tmp_path / "out", "--prompt", "x", "--sparsity", 0)
    assert ended.returncode != 0 and "quantized folders are not split" in ended.stderr


@pytest.mark.parametrize("more", [["--quantize", "int8"], ["--quantize", "int4"]])
def test_ranks_quantize_their_parts(more):
    command = ["generate.py", "--prompt", "import os", "--max-new-tokens", 8, "--dtype", "float32", "--sparsity", 0.4, *more]
    ended = torchrun(2, *command)
    assert ended.returncode == 0 and "8 tokens" in ended.stdout, ended.stderr
    assert re.search(r"3\d\.\d% of the blocks|4\d\.\d% of the blocks", ended.stdout)


def test_ranks_hold_a_conversation_and_wait_for_a_person(tmp_path):
    """Longer than they wait for one another."""
    for file in ("config.json", "model.safetensors", "tokenizer.model"):
        (tmp_path / file).symlink_to(DEMO / file)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}# {{ m.content }}\n{% endfor %}def ")
    script = tmp_path / "chat.py"
    script.write_text("import datetime, parallel, cli\nparallel.PATIENCE = datetime.timedelta(seconds=3)\nimport generate\n"
                      "cli.command_line(generate.main)\n")
    command = [script, "--model", tmp_path, "--chat", "--max-new-tokens", "5"]
    one = run(*command, input="one\ntwo\n")
    two = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *map(str, command)], cwd=HERE, text=True,
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           env=environment(OMP_NUM_THREADS="1"))
    two.stdin.write("one\n")
    two.stdin.flush()
    two.stdout.readline()                                  # what model this is
    two.stdout.readline()                                  # its first answer
    time.sleep(6)
    written, errors = two.communicate("two\n", timeout=120)
    assert two.returncode == one.returncode == 0, errors
    assert written.strip().splitlines()[-1] == one.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("when", ["while it decodes", "before it joins"])
def test_a_rank_that_dies_ends_the_others_with_a_message(tmp_path, when):
    """Without torchrun, which would end them itself."""
    script = tmp_path / "rank.py"
    script.write_text("import datetime, os, sys, parallel\nfrom cli import command_line\nfrom generate import generate\n"
                      "parallel.PATIENCE = datetime.timedelta(seconds=5)\n"
                      "dies = sys.argv[1] if os.environ['RANK'] == '1' else None\n"
                      "def main():\n"
                      "    if dies == 'before it joins': os._exit(9)\n"
                      "    with parallel.group('cpu'):\n"
                      "        model = parallel.from_pretrained('demo')\n"
                      "        for count, token in enumerate(generate(model, [1, 2, 3], 100)):\n"
                      "            if dies and count == 5: os._exit(9)\n"
                      "command_line(main)\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [subprocess.Popen([sys.executable, script, when], cwd=HERE, stderr=subprocess.PIPE, text=True,
                                env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                                                OMP_NUM_THREADS="1")) for rank in (0, 1)]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [2, 9], errors
    expected = "another process has ended" if when == "while it decodes" else "the processes cannot be joined"
    assert expected in errors[0] and "Traceback" not in errors[0], errors[0]


# ---------------------------------------------------------------------------------------------------------
# demo/ and the commands

def test_corpus_parts_do_not_meet():
    train, held_out = (dict(corpus.files(part)) for part in ("train", "held-out"))
    assert train and held_out and not train.keys() & held_out.keys()
    assert all(corpus.is_held_out(path) for path in held_out)
    assert not any(corpus.TEST_FOLDERS & set(path.split("/")) or "site-packages" in path for path in held_out)
    assert corpus.is_held_out("asyncio/locks.py") and not corpus.is_held_out("test/test_ast.py")


def test_demo_tokenizer_gives_every_source_back():
    tokenizer = llama.load_tokenizer(DEMO)
    characters = tokens = 0
    for path, text in corpus.files("held-out") + corpus.files("train")[::20]:
        if "\u2581" in text:                               # SentencePiece's own sign for a space
            continue
        ids = tokenizer.encode(text, bos=False)
        assert tokenizer.decode(ids) == text, path
        characters, tokens = characters + len(text), tokens + len(ids)
    assert characters / tokens > 2.5
    newline = tokenizer.encode("\n", bos=False)
    assert len(newline) == 1 and tokenizer.encode("a\n\nb", bos=False).count(newline[0]) == 2


def test_demo_model_is_small_and_knows_python():
    assert sum(file.stat().st_size for file in DEMO.iterdir() if file.is_file()) < 16e6
    model, tokenizer = llama.load_model(DEMO)
    assert 6e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 7.5e6
    calibration = calibrate.load_calibration(model, DEMO)
    tokens, _ = sparse.read_tokens(tokenizer, None, "held-out")
    dense = sparse.perplexity(model, tokens[:8000])
    sparse.sparsify(model, calibration.thresholds(0.5))
    dropped = sparse.perplexity(model, tokens[:8000])
    assert dense < 20 and dense < dropped < 1.2 * dense
    assert sparse.realised_sparsity(model) == pytest.approx(0.5, abs=0.04)


def test_the_demo_runs():
    ended = run("generate.py", "--max-new-tokens", 16)
    assert ended.returncode == 0, ended.stderr
    assert "--- dense: 16 tokens" in ended.stdout and "sparse over dense" in ended.stdout
    assert ended.stdout.count("class Stack:") == 2


@pytest.mark.parametrize("draft", ["sparse", "recycle", "demo"])
def test_the_demo_speculates(draft):
    ended = run("generate.py", "--draft", draft, "--compare", "--max-new-tokens", 24, "--dtype", "float32")
    assert ended.returncode == 0, ended.stderr
    assert "the same text, all 24 tokens" in ended.stdout or "the two best logits are" in ended.stdout
    assert "lossless against the dense model" in ended.stdout and "speculative over plain" in ended.stdout
    ended = run("generate.py", "--draft", draft, "--sparsity", 0.5, "--max-new-tokens", 8, "--temperature", 1, "--draft-tokens", 2)
    assert ended.returncode == 0 and "lossless against the sparse model at 50%:" in ended.stdout, ended.stderr


def test_a_draft_model_needs_the_same_tokenizer():
    class Tokenizer:
        def __init__(self, *pieces):
            self.pieces = lambda: list(pieces)

    generation.same_tokens(None, None, "x")
    generation.same_tokens(Tokenizer("a", "b"), Tokenizer("a", "b"), "x")
    for other, message in [(Tokenizer("a", "c"), "differ from token 1 on"), (Tokenizer("a", "b", "c"), "differ from token 2 on"),
                           (None, "random weights and none")]:
        with pytest.raises(InputError, match=message):
            generation.same_tokens(Tokenizer("a", "b"), other, "x")
    assert llama.load_tokenizer(DEMO).pieces()[:3] == ["<unk>", "<s>", "</s>"]


@pytest.mark.parametrize("command, message", [
    (["quantize.py", "--group", "50"], "--group is 50, expected a multiple of 32"),
    (["quantize.py", "--out", "demo"], "demo: exists already"),
    (["quantize.py", "--model", "random:llama-3.2-1b"], "random weights"),
    (["calibrate.py", "--quantize", "int4"], "--quantize needs --out"),
    (["generate.py", "--draft", "nowhere"], "nowhere: no such folder"),
    (["generate.py", "--draft", "recycle", "--draft-tokens", "80"], "draft_tokens is 80, expected 1 to 79"),
    (["generate.py", "--draft", "sparse", "--draft-sparsity", "1"], "--draft-sparsity is 1.0"),
    (["generate.py", "--draft-tokens", "3"], "--draft-tokens is for --draft with a checkpoint folder"),
    (["generate.py", "--compare"], "--compare is for --draft with a checkpoint folder"),
    (["generate.py", "--model", "random:llama-3.2-1b", "--draft", "sparse", "--compare"], "--compare is for --draft with a checkpoint"),
    (["generate.py", "--draft-sparsity", "0.5"], "--draft-sparsity is for --draft sparse"),
    (["generate.py", "--sparsity", "1"], "--sparsity is 1.0, expected at least 0 and below 1"),
    (["generate.py", "--model", "nowhere"], "nowhere: no such folder"),
    (["generate.py", "--model", "figures"], "figures: no tokenizer: neither tokenizer.model nor tokenizer.json is there"),
    (["generate.py", "--sparsity", "half"], "invalid float value: 'half'"),
    (["generate.py", "--max-new-tokens", "-3"], "-3 is not a whole number above 0"),
    (["generate.py", "--seed", "9" * 30], "seed is 999"),
    (["generate.py", "--allocation", "other"], "allocation 'other' is not in this calibration"),
    (["generate.py", "--prompt", os.fsdecode(b"\xff")], "not Unicode"),
    (["generate.py", "--device", "meta"], "device meta cannot be used"),
    (["kernel.py", "--device", "warp"], "device warp cannot be used"),
    (["sparsify.py", "--context", "4000"], "a window of 4000 tokens does not fit the model's context of 512"),
    (["sparsify.py", "--sources", "--sparsity", "0.25"], "--sparsity means nothing with --sources"),
    (["sparsify.py", "--paper", "--context", "64"], "--context means nothing with --paper"),
    (["sparsify.py", "--calibration", "nowhere"], "nowhere: no calibration"),
    (["calibrate.py", "--figures", "x", "--greedy"], "--greedy means nothing with --figures"),
    (["sparsify.py", "--batch", "0"], "0 is not a whole number above 0"),
    (["kernel.py", "--figure", "x.pdf"], "expected a name in a folder that exists, ending in .png"),
    (["sparsify.py", "--functions", "-5"], "--functions is -5"),
    (["sparsify.py", "--figure", "nowhere/x.png"], "expected a name in a folder that exists"),
    (["sparsify.py", "--allocation", "cats", "--sparsity", "0.75"], "cats"),
    (["sparsify.py", "--paper"], "a window of 2560 tokens does not fit the model's context of 512"),
    (["sparsify.py", "--model", "random:llama-3.2-1b"], "random weights"),
    (["generate.py", "--prompt", "x " * 2000], "the model's context holds 512"),
    (["generate.py", "--top-p", "2"], "top_p is 2.0"),
    (["generate.py", "--model", "random:gpt"], "preset 'gpt' is not known"),
    (["generate.py", "--device", "warp"], "device warp cannot be used"),
    (["generate.py", "--calibration", "README.md"], "README.md"),
    (["sparsify.py", "--text", "nowhere.txt"], "nowhere.txt: cannot be read"),
    (["sparsify.py", "--text", "LICENSE", "--tokens", "100"], "the text has 100 tokens, a window of 512 needs 513"),
    (["sparsify.py", "--sparsity", "1.5"], "--sparsity is 1.5"),
    (["calibrate.py", "--text", "demo/model.safetensors"], "not UTF-8 text"),
    (["calibrate.py", "--model", "random:llama-3.2-1b"], "random weights"),
    (["kernel.py", "--shapes", "gpt"], "--shapes 'gpt' is not known"),
    (["kernel.py", "--sparsity", "2"], "--sparsity 2.0 is outside [0, 1)"),
    (["model.py", "demo/training/nowhere"], "config.json: cannot be read: No such file or directory"),
    (["demo/train.py", "--tokens", "5"], "--tokens is 5, expected at least the 4096 of a step"),
])
def test_bad_input_on_the_command_line(command, message):
    ended = run(*command)
    assert ended.returncode == 2 and message in ended.stderr, ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1 and "Traceback" not in ended.stderr


def test_a_checkpoint_without_calibration_says_how_to_make_one(tmp_path):
    for file in ("config.json", "model.safetensors", "tokenizer.model"):
        (tmp_path / file).symlink_to(DEMO / file)
    ended = run("generate.py", "--model", tmp_path)
    assert ended.returncode == 2 and f"Make one with: python calibrate.py --model {tmp_path}" in ended.stderr
    text = tmp_path / "text.txt"
    text.write_text("import os\n" * 600)
    ended = run("calibrate.py", "--model", tmp_path, "--text", text)
    assert ended.returncode == 0 and "text.txt" in ended.stdout, ended.stderr
    ended = run("generate.py", "--model", tmp_path, "--sparsity", 0.4, "--max-new-tokens", 4, "--temperature", 1, "--seed", 1)
    assert ended.returncode == 0 and "40% sparse: 4 tokens" in ended.stdout, ended.stderr
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    assert "not a SentencePiece model" in run("generate.py", "--model", tmp_path).stderr


@pytest.mark.parametrize("file", ["model.py", "kernel.py", "sparsify.py", "calibrate.py", "rotate.py", "generate.py",
                                  "quantize.py", "step.py", "demo/train.py"])
def test_help(file):
    ended = run(file, "--help")
    assert ended.returncode == 0 and "usage:" in ended.stdout
    options = re.split(r"\n  (?=-)", ended.stdout.split("options:")[1])[2:]                 # behind --help
    assert all("default" in option for option in options), [option for option in options if "default" not in option]


def test_model_prints_the_shape_of_a_checkpoint():
    ended = run("model.py")
    assert ended.returncode == 0 and "6,557,440" in ended.stdout and "sparsity can skip" in ended.stdout
    ended = run("model.py", "random:llama-2-7b")
    assert "6,738,415,616" in ended.stdout                 # the published number
