"""Tests of fused.py and lab/gpu.py: kernels against float64, what steps aside, what is counted."""
import copy
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import generate
import kernel
import model as llama
from beyond import codes, fused
from beyond.codes import QuantizedLinear
from beyond.lab import gpu
from beyond.tests import conftest
from beyond.tests.conftest import DEVICE, ROOT, thresholds_of
from generate import StaticCache
from model import linear_names
from sparsify import SparseLinear, sparse_mode, sparsify

pytestmark = pytest.mark.skipif(kernel.triton is None, reason="no Triton")
CPU = torch.device("cpu")
no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def tiny_model(**changes):
    return conftest.tiny_model(**dict(intermediate_size=48, head_dim=8) | changes).to(DEVICE)


# --------------------------------------------------------------------------------------------------
# The kernels

def error(y, expected, size, dtype):
    """Return the largest error of y over what rounding allows for sums of magnitude `size`."""
    return ((y.double() - expected).abs() / (gpu.ROUNDING[dtype] * size + 1e-30)).max().item()


@pytest.mark.parametrize("kind, rows", [(torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 8),
                                        (8, 1), (8, 2), (4, 1), (4, 5), (4, 8)])
@pytest.mark.filterwarnings("ignore:overflow")             # of the interpreter's numpy: exp
def test_joint_products_are_right_and_repeat(kind, rows):
    torch.manual_seed(0)
    channels, outputs = 96, (200, 33, 7)
    bits = kind if isinstance(kind, int) else 0
    dtype = torch.bfloat16 if bits else kind
    x = torch.randn(rows, channels, device=DEVICE).to(dtype)
    weights = [gpu.random_codes(channels, out, bits, DEVICE) if bits
               else torch.randn(channels, out, device=DEVICE).to(dtype) for out in outputs]
    thresholds = list(0.7 * torch.rand(3, channels, device=DEVICE))
    torch.use_deterministic_algorithms(True, warn_only=True)           # memory is filled with NaN
    y, again = (fused.joint_gemv(x, weights, thresholds) for _ in range(2))
    torch.use_deterministic_algorithms(False)
    assert y.dtype == dtype and torch.equal(y, again)
    exact = [weight.dequantized(torch.float64) if bits else weight.double() for weight in weights]
    keep = [x.double() * kernel.kept(x, threshold) for threshold in thresholds]
    parts = y.split(outputs, 1)
    for part, kept, weight, stored in zip(parts, keep, exact, weights):
        size = weight.abs() if not bits else stored.scales.float().max() * 2**bits / 2 + 0 * weight
        assert error(part, kept @ weight, kept.abs() @ size.double(), dtype) <= 1
    # gate and up: the second and a linear as wide
    y = fused.joint_gemv(x, [weights[1]] * 2, [thresholds[1], thresholds[2]], gated=True)
    gate, up = keep[1] @ exact[1], keep[2] @ exact[1]
    assert torch.allclose(y.double(), F.silu(gate) * up, rtol=2e-2, atol=2e-2 * up.abs().max())


# --------------------------------------------------------------------------------------------------
# The block in the model

def sparse_llama(bits=None, **changes):
    """Return a small Llama on DEVICE whose linears drop what is below 0.3, and a twin, fused.

    bits: the twin's weights are codes, those of the first one the same numbers.
    """
    models = []
    for make in (lambda weight: SparseLinear(weight.dequantized(torch.float32)), QuantizedLinear):
        model = tiny_model(**changes)
        for i, name in enumerate(linear_names(model.config) if bits else ()):
            torch.manual_seed(i)
            linear = model.get_submodule(name)
            weight = gpu.random_codes(linear.in_features, linear.out_features, bits, DEVICE, 0.2)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(weight))
        models.append(sparsify(model, thresholds_of(model, 0.3)))
    assert is_fused(fused.fuse(models[1]))
    return models


def is_fused(model):
    return {type(block) for block in model.model.layers} == {fused.FusedBlock}


@pytest.fixture
def launches(monkeypatch):
    """Return a Counter of the launches of fused.py's kernels, {name: times}."""
    counts = Counter()
    launch = fused.launch

    def counting(function, *arguments, **constants):
        counts[function.fn.__name__] += 1
        launch(function, *arguments, **constants)

    monkeypatch.setattr(fused, "launch", counting)
    return counts


def check_launches(counts, blocks):
    """Check that so many blocks ran fused: in eight launches each, attention among them."""
    assert counts["joint_product_kernel"] == 4 * blocks and counts["rotate_kernel"] == blocks
    assert counts.total() <= 7 * blocks + 2               # a norm at either end


def logits(model, T=1, batch=1, mode="all", static=True, prefix=0):
    """Return the logits of T tokens behind three others, and the keys of the cache."""
    tokens = torch.arange(3 + T, device=DEVICE).repeat(batch, 1) + 1
    cache = model.make_cache(batch, 12)
    with sparse_mode(model, "off"):
        model(tokens[:, :3], cache)
    if static:
        cache, whole = StaticCache(cache, T), cache
        cache.follow(whole, T, None)
    with sparse_mode(model, mode, dense_prefix=prefix):
        return model(tokens[:, 3:], cache, last_only=T == 1), cache.keys


@pytest.mark.parametrize("bits, batch, T, head_dim", [
    (None, 1, 1, 8), (None, 2, 3, 24), (8, 1, 1, 8), (4, 1, 2, 8)])
def test_a_fused_model_computes_what_the_model_does(bits, batch, T, head_dim, monkeypatch,
                                                    launches):
    monkeypatch.setattr(codes, "ROUND_ACTIVATIONS", False)             # in the prompt, on a CPU
    plain, whole = sparse_llama(bits, head_dim=head_dim)
    expected = logits(plain, T, batch)
    for y, other in zip(logits(whole, T, batch), expected):
        torch.testing.assert_close(y, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
    check_launches(launches, blocks=3)


def hook_on(name, before=False):
    def change(model):
        module = model.get_submodule(name)
        if before:
            module.register_forward_pre_hook(lambda module, inputs: None)
        else:
            module.register_forward_hook(lambda module, inputs, y: None)
    return change


def subclassed(model):
    """Give a linear another way to drop, as a reader may: with the weight's sign."""
    class Other(SparseLinear):
        def product(self, x):
            return super().product(x) * 2
    model.get_submodule("model.layers.1.self_attn.v_proj").__class__ = Other


def adds_up(model):
    """Hook o and down as parallel.py does, which adds what several processes have."""
    for leaf in ("self_attn.o_proj", "mlp.down_proj"):
        model.get_submodule(f"model.layers.1.{leaf}").register_forward_hook(
            lambda module, inputs, y: y + y)


def own_attention(model):
    class Other(llama.Attention):
        def forward(self, x, context):
            return -super().forward(x, context)
    model.model.layers[1].self_attn.__class__ = Other


@pytest.mark.parametrize("change", [
    hook_on("model.layers.1"), hook_on("model.layers.1", True), subclassed, adds_up, own_attention,
    *[hook_on(f"model.layers.1.{name}") for name in (
        "input_layernorm", "self_attn", "self_attn.k_proj", "post_attention_layernorm", "mlp",
        "mlp.down_proj")],
    lambda model: sparsify(model, {"model.layers.1.mlp.up_proj": None})])
def test_a_block_that_somebody_changed_runs_as_the_model_has_it(change, launches):
    plain, whole = sparse_llama()
    change(plain)
    change(whole)
    torch.testing.assert_close(logits(whole)[0], logits(plain)[0], rtol=1e-4, atol=1e-4)
    check_launches(launches, blocks=2)


@pytest.mark.parametrize("call, changes", [
    (dict(mode="off"), {}), (dict(mode="decode", T=2), {}), (dict(batch=3, T=3), {}),
    (dict(T=2, prefix=1), {}), (dict(static=False), {}), ({}, dict(attention_bias=True)),
    ({}, dict(mlp_bias=True))])
def test_a_call_that_does_not_fit_runs_as_the_model_has_it(call, changes, launches):
    plain, whole = sparse_llama(**changes)
    assert torch.equal(logits(whole, **call)[0], logits(plain, **call)[0])
    assert not launches


def test_a_fused_model_can_be_made_sparse_later_and_nothing_is_fused_without_a_gpu(monkeypatch,
                                                                                   launches):
    model = fused.fuse(tiny_model())
    assert is_fused(model) and is_fused(fused.fuse(model))                 # twice is as once
    dense, _ = logits(model)
    sparsify(model, thresholds_of(model, 0.0))
    torch.testing.assert_close(logits(model)[0], dense, rtol=1e-4, atol=1e-4)
    check_launches(launches, blocks=3)
    for name, value in (("is_interpreted", lambda: False), ("triton", None)):
        monkeypatch.setattr(fused, name, value)
        assert not is_fused(fused.fuse(tiny_model()))


# What fused.py replaces, changed.

def qkv(self, x):
    """Return projections that have been normed."""
    return F.normalize(self.q_proj(x)), self.k_proj(x), self.v_proj(x)


def same_qkv(self, x):
    """Return the same as ever, under another comment."""
    return (self.q_proj(x), self.k_proj(x),
            self.v_proj(x))                                # in other lines


def test_the_fingerprints_are_those_of_the_code():
    assert fused.fingerprints() == fused.FINGERPRINTS, "print them with: python -m beyond.fused"
    assert fused.fingerprint(same_qkv) == fused.FINGERPRINTS["Attention.qkv"]


@pytest.mark.parametrize("owner, name", fused.REPLACED)
def test_a_changed_function_is_named_and_the_model_left_alone(owner, name, monkeypatch, capsys):
    monkeypatch.setattr(owner, name, qkv)
    assert not is_fused(fused.fuse(tiny_model()))
    line, = capsys.readouterr().err.splitlines()
    assert "fused.py steps aside" in line and f"{owner.__name__}.{name} is not" in line


@pytest.mark.parametrize("change, named", [
    (lambda model: setattr(model.model.layers[2].mlp, "activation", F.gelu),
     "model.layers.2.mlp: activation"),
    (own_attention, "layers.1.self_attn: Other"), (subclassed, "1.self_attn.v_proj: Other"),
    (lambda model: setattr(model.model.layers[2].mlp, "gated", F.silu), "2.mlp: gated"),
    (lambda model: setattr(model.model.layers[0], "forward", F.silu), "0: forward")])
def test_a_readers_module_is_named_and_the_model_left_alone(change, named, capsys):
    model = tiny_model(threshold=0.3)
    change(model)
    assert not is_fused(fused.fuse(model))
    assert f"{named} is not" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# lab/gpu.py: compiled and counted, without a GPU

@no_card
def test_kernels_compile_for_gpus_that_are_not_here_and_spill_nothing():
    code = ("from beyond.lab import gpu\n"
            "assert all(gpu.registers(None, None, (capability,), rows) for capability, rows in "
            "((80, (8,)), (90, (1, 8)), (100, (8,))))")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("registers      0 spills") == 6 + 10 + 6


def test_launches_of_a_step_and_what_they_cost(capsys):
    core, whole = (gpu.step_launches("llama-3-8b", "decode", fuse).counts
                   for fuse in (False, True))
    assert core["sparse_product_kernel"] == 7 * 32 and core["rms_norm"] == 2 * 32 + 1
    assert whole["joint_product_kernel"] == 4 * 32 and whole["rotate_kernel"] == 32
    assert not whole["add"] and whole["rms_norm"] <= 1
    assert whole.total() - 8 * 32 < 30   # beside eight a block
    assert gpu.step_launches("llama-3-8b", "off").counts["mm"] == 7 * 32 + 1
    for counts in (core, whole):
        assert counts["where"] == 1 and not counts["scalar_tensor"]        # the mask, once a step
        assert counts["argmax"] == counts["max"] == counts["stack"] == 1   # of generate itself
    gpu.launches()
    assert 270 < float(capsys.readouterr().out.split()[-2]) < 290          # tokens a second


@pytest.mark.parametrize("sampling, waits", [
    ({}, {}), (dict(temperature=0.7, top_k=5), {}),
    (dict(temperature=1.0, top_p=0.9), {"__bool__": 1})])      # are the first 1024 tokens enough?
def test_a_token_waits_for_the_host_once(sampling, waits):
    for mode, fuse in (("off", False), ("decode", False), ("decode", True)):
        launches = gpu.step_launches("llama-3.2-1b", mode, fuse, **sampling)
        assert +launches.waits == {"tolist": 1, **waits}                   # 1: the token's own


@pytest.mark.parametrize("wait", [
    lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: x.to(device=CPU), lambda x: x.tolist(),
    lambda x: x[0, 0].item(), lambda x: bool(x[0, 0] > 0), lambda x: float(x[0, 0]),
    lambda x: x.nonzero(), lambda x: x.numpy(), lambda x: x[x > 0], lambda x: torch.equal(x, x)])
def test_whatever_waits_for_the_host_is_noticed(wait):
    launches = gpu.Launches()
    with gpu.counting(launches):
        wait(torch.rand(2, 2))
    assert launches.waits.total() == 1, launches.waits


def test_a_launch_that_generate_adds_is_counted(monkeypatch):
    before = gpu.step_launches("llama-3.2-1b", "off").counts.total()
    choose = generate.Sampling.choose
    monkeypatch.setattr(generate.Sampling, "choose",
                        lambda self, logits, generator: choose(self, logits + 1, generator))
    assert gpu.step_launches("llama-3.2-1b", "off").counts.total() == before + 1


# --------------------------------------------------------------------------------------------------
# lab/gpu.py: the parts, at toy sizes

def test_right_and_wrong_products(monkeypatch, capsys):
    small = conftest.tiny_model(vocab_size=4096, num_hidden_layers=1)
    calibration = SimpleNamespace(thresholds=lambda sparsity: thresholds_of(small, 0.5))
    monkeypatch.setattr(gpu, "load_model",
                        lambda *_: (copy.deepcopy(small), llama.load_tokenizer(llama.DEMO)))
    monkeypatch.setattr(gpu, "load_calibration", lambda *_: calibration)
    assert gpu.right(DEVICE)
    assert capsys.readouterr().out.count("of what rounding allows") == 7
    monkeypatch.setitem(kernel.BACKENDS, "triton", lambda x, weight_t, threshold: x @ weight_t)
    assert gpu.error_of("bfloat16", 2, 64, 33, -1.0, DEVICE) <= 1
    assert gpu.error_of("bfloat16", 2, 64, 33, 0.5, DEVICE) > 1


@no_card
def test_the_parts_that_time_run_at_toy_size(capsys):
    for part in ("models", "products", "profile"):
        gpu.PARTS[part](CPU, None)
    said = capsys.readouterr().out
    assert "beyond, fused, int4" in said and "128 x 200 bfloat16" in said


TEAL = """
import msgspec
def splitk_sparse_gemv(x, weight, threshold, sparsity_bin):
    assert isinstance(threshold, float) and isinstance(sparsity_bin, int)
    assert weight.stride(1) > 1          # column major
    return (x * (x.abs() > threshold)) @ weight.T
"""
GPT_FAST = """
from types import SimpleNamespace as ModelArgs
import torch
from torch import nn

class Transformer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.seen = 0

    def setup_caches(self, batch, length):
        self.max_seq_length = -(-length // 8) * 8

    def forward(self, idx, input_pos):
        assert idx.shape == (1, 1) and input_pos.tolist() == [self.seen] < [self.max_seq_length]
        self.seen += 1
        return self.tok_embeddings(idx)
"""
NEWER = """    def forward(self, mask, idx, input_pos):
        assert mask.seq_lengths == (1, self.max_seq_length) and mask.shape[2] == 1
        keys = torch.arange(self.max_seq_length)
        assert mask.mask_mod(0, 0, input_pos, keys).sum() == self.seen + 1
        mask.mask_mod = None             # what it does to one row is nothing to the next
"""


@no_card
@pytest.mark.parametrize("newer", [False, True])
def test_others_code_is_given_what_it_takes(newer, tmp_path, capsys):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "sparse_gemv.py").write_text(TEAL)
    source = GPT_FAST.replace("    def forward(self, idx, input_pos):\n", NEWER) if newer else (
        GPT_FAST)
    (tmp_path / "model.py").write_text(source)
    gpu.others(CPU, SimpleNamespace(gpt_fast=tmp_path, teal=tmp_path if newer else None))
    said = capsys.readouterr().out
    assert "gpt-fast, compiled" in said and ("theirs" in said) == newer


def test_a_part_that_fails_or_hangs_is_said_and_the_next_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PARTS", dict.fromkeys(("right", "models", "launches", "profile")))

    def run(command, timeout, **options):
        assert command[2:4] == ["beyond.lab.gpu", command[3]][:2] and 0 < timeout <= 60
        if command[3] == "models":
            raise subprocess.TimeoutExpired(command, timeout, b"so far")
        return SimpleNamespace(stdout=b"said", returncode=command[3] == statuses)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    for statuses, fine in (("profile", True), ("right", False)):
        assert gpu.all_parts([], 1, tmp_path / "report") == fine
        report = (tmp_path / "report").read_text()
        assert report.count("---") == 3 and "launches" not in report and "so far" in report
        assert f"{statuses}: 0 s, status {True}" in report
