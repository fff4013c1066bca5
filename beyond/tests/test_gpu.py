"""Tests of fused.py and lab/gpu.py: kernels against float64, what steps aside, what is counted."""
import copy
import functools
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import kernel
import model as llama
from beyond import codes, fused
from beyond.codes import codes_gemv
from beyond.lab import gpu
from beyond.tests import conftest
from beyond.tests.conftest import DEVICE, ROOT, close, thresholds_of
from generate import StaticCache
from kernel import sparse_gemv
from model import linear_names
from sparsify import SparseLinear, sparse_mode, sparsify

pytestmark = pytest.mark.skipif(kernel.triton is None, reason="no Triton")


def tiny_model(**changes):
    return conftest.tiny_model(**dict(intermediate_size=48, head_dim=8) | changes).to(DEVICE)


# --------------------------------------------------------------------------------------------------
# The kernels

@pytest.mark.parametrize("kind, rows", [
    ("float32", 1), ("bfloat16", 3), ("float16", 8), ("int8", 1), ("int8", 2), ("int4", 1),
    ("int4", 5), ("int4", 8)])
@pytest.mark.filterwarnings("ignore:overflow")             # of the interpreter's numpy: exp
def test_products_are_right_alone_and_side_by_side(kind, rows):
    torch.manual_seed(0)
    bits = gpu.BITS.get(kind)
    dtype = torch.bfloat16 if bits else getattr(torch, kind)
    x = torch.randn(rows, 96, device=DEVICE).to(dtype)
    weights = [gpu.random_codes(96, outputs, bits, DEVICE) if bits
               else torch.randn(96, outputs, device=DEVICE).to(dtype) for outputs in (200, 33, 7)]
    thresholds = list(0.7 * torch.rand(3, 96, device=DEVICE))
    torch.use_deterministic_algorithms(True, warn_only=True)           # memory is filled with NaN
    assert gpu.error_of(kind, rows, 96, 200, thresholds[0], DEVICE) <= 1
    y, again = (fused.joint_gemv(x, weights, thresholds) for _ in range(2))
    gated = fused.joint_gemv(x, [weights[1]] * 2, thresholds[1:], gated=True)
    torch.use_deterministic_algorithms(False)
    assert y.dtype == dtype and torch.equal(y, again)
    product = codes_gemv if bits else sparse_gemv
    apart = [product(x, *each, "triton") for each in zip(weights, thresholds)]
    assert close(y, torch.cat(apart, 1), gpu.ROUNDING[dtype])
    up = product(x, weights[1], thresholds[2], "triton").double()
    assert close(gated, F.silu(apart[1].double()) * up, 4 * gpu.ROUNDING[dtype])


@pytest.mark.parametrize("kind, B, T, H, G, D", [
    ("float32", 1, 1, 5, 1, 64), ("bfloat16", 2, 3, 2, 2, 32), ("float16", 1, 8, 4, 2, 128),
    ("int8", 1, 1, 3, 3, 64), ("int4", 2, 2, 4, 1, 32)])
def test_what_products_do_besides_is_right(kind, B, T, H, G, D):
    """A sum with a residual, and q, k and v of its norm, rotated and stored, against float64."""
    torch.manual_seed(0)
    bits = gpu.BITS.get(kind)
    dtype = torch.bfloat16 if bits else getattr(torch, kind)

    def weight(inputs, outputs):
        if bits:
            return gpu.random_codes(inputs, outputs, bits, DEVICE, inputs ** -0.5 * 4 / 2**bits)
        return (inputs ** -0.5 * torch.randn(inputs, outputs, device=DEVICE)).to(dtype)

    def exact(x, weight):
        weight = weight.dequantized(torch.float64) if bits else weight.double()
        return (x * kernel.kept(x, threshold)).double() @ weight

    def random(*shape):
        return torch.randn(shape, device=DEVICE).to(dtype)

    near = functools.partial(torch.testing.assert_close, rtol=4 * gpu.ROUNDING[dtype],
                             atol=4 * gpu.ROUNDING[dtype])
    threshold = torch.tensor(0.05, device=DEVICE)          # rounding past it changes little
    x, residual, gain = random(B, T, 96), random(B, T, 384), random(384)
    first, *qkv = weight(96, 384), weight(384, H * D), weight(384, G * D), weight(384, G * D)
    cos, sin = random(T, D), random(T, D)
    slots = torch.randperm(T + 5, device=DEVICE)[:T]
    caches = [random(B, G, T + 5, D) for _ in range(4)]
    rope = cos, sin, slots, *caches[:2]
    torch.use_deterministic_algorithms(True, warn_only=True)           # memory is filled with NaN
    y, again = (fused.joint_gemv(x, [first], [threshold], residual=residual) for _ in range(2))
    q = fused.joint_gemv(y, qkv, [threshold] * 3, norm=(y.squares, gain, 1e-3), rope=rope)
    q_again = fused.joint_gemv(y, qkv, [threshold] * 3, norm=(y.squares, gain, 1e-3),
                               rope=(cos, sin, slots, *caches[2:]))
    torch.use_deterministic_algorithms(False)
    near(y.double(), exact(x, first) + residual.double())
    near(y.squares.sum(1), y.float().square().sum(-1).flatten(), rtol=1e-5)
    normed = F.rms_norm(y.float(), (384,), gain.float(), 1e-3).to(dtype)
    heads = [exact(normed, each).unflatten(-1, (-1, D)).transpose(1, 2) for each in qkv]
    for mine, expected in zip((q, caches[0][:, :, slots], caches[1][:, :, slots]),
                              (*(llama.rotate(head, cos.double(), sin.double())
                                 for head in heads[:2]), heads[2])):
        near(mine.double(), expected)
    assert y.equal(again) and q.equal(q_again)
    others = torch.ones(T + 5, dtype=torch.bool, device=DEVICE).scatter(0, slots, False)
    for cache, twin in zip(caches, caches[2:]):
        assert cache[:, :, slots].equal(twin[:, :, slots]) and not cache[:, :, others].isnan().any()


def test_a_wrong_product_is_noticed(monkeypatch):
    monkeypatch.setitem(kernel.BACKENDS, "triton", lambda x, weight_t, threshold: x @ weight_t)
    assert gpu.error_of("bfloat16", 2, 64, 33, -1.0, DEVICE) <= 1
    assert gpu.error_of("bfloat16", 2, 64, 33, 0.5, DEVICE) > 1


# --------------------------------------------------------------------------------------------------
# The block in the model

def sparse_llama(bits=16, **changes):
    """Return a small Llama on DEVICE whose linears drop what is below 0.3, and a twin, fused.

    bits: the twin's weights are codes, those of the first one the same numbers.
    """
    whole = gpu.make_sparse(tiny_model(**changes), bits)
    plain = copy.deepcopy(whole)
    for name in linear_names(plain.config) if bits < 16 else ():
        weight = plain.get_submodule(name).weight_t.dequantized(torch.float32)
        parent, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(parent), leaf, SparseLinear(weight))
    for model in (plain, whole):
        sparsify(model, thresholds_of(model, 0.3))
    assert is_fused(fused.fuse(whole))
    return plain, whole


def is_fused(model):
    return {type(block) for block in model.model.layers} == {fused.FusedBlock}


@pytest.fixture
def launches(monkeypatch):
    """Return a Counter of the launches of fused.py's kernels, {name: times}."""
    counts = Counter()
    launch = kernel.launch

    def counting(function, *arguments, **constants):
        counts[function.__name__] += function is not kernel.sparse_product_kernel
        launch(function, *arguments, **constants)

    monkeypatch.setattr(kernel, "launch", counting)
    return counts


def five_in(blocks):
    """Return the launches of so many blocks, five in each: attention is the fifth."""
    return {"joint_product_kernel": 4 * blocks}


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


@pytest.mark.parametrize("bits, batch, T, head_dim, hidden, joined", [
    (16, 1, 1, 8, 160, True), (16, 2, 3, 24, 32, True), (16, 2, 3, 16, 160, True),
    (16, 2, 2, 8, 32, False), (8, 1, 1, 8, 288, True), (4, 1, 2, 8, 256, True)])
def test_a_fused_model_computes_what_the_model_does(bits, batch, T, head_dim, hidden, joined,
                                                    monkeypatch, launches):
    monkeypatch.setattr(codes, "ROUND_ACTIVATIONS", False)             # in the prompt, on a CPU
    monkeypatch.setattr(fused, "JOINED", joined)
    plain, whole = sparse_llama(bits, head_dim=head_dim, hidden_size=hidden)
    expected = logits(plain, T, batch)
    norms = mock.Mock(wraps=F.rms_norm)
    monkeypatch.setattr(F, "rms_norm", norms)
    for y, other in zip(logits(whole, T, batch), expected):
        torch.testing.assert_close(y, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
    assert norms.call_count == 7 + (2 if joined else 7)                # of the prompt; of the step
    assert launches == five_in(blocks=3)


def hook(module):
    module.register_forward_hook(lambda module, inputs, y: y + y)


def subclass(module):
    """Give a module another class, as a reader may."""
    kind = type(module)
    module.__class__ = type("Other", (kind,), {
        "forward": lambda self, *inputs: -kind.forward(self, *inputs)})


@pytest.mark.parametrize("name, change", [
    ("", hook), ("self_attn", hook), ("self_attn.k_proj", hook), ("mlp.down_proj", hook),
    ("input_layernorm", lambda module: module.register_forward_pre_hook(lambda *_: None)),
    ("self_attn", subclass), ("self_attn.v_proj", subclass),
    ("", lambda block: setattr(block, "forward", lambda x, context: x.neg_())),
    ("mlp", lambda mlp: setattr(mlp, "gated", lambda x: mlp.up_proj(x))),
    ("mlp", lambda mlp: setattr(mlp, "activation", F.gelu)),
    ("mlp.up_proj", lambda linear: setattr(linear, "state", None))])
def test_a_block_that_somebody_changed_runs_as_the_model_has_it(name, change, launches):
    models = sparse_llama()
    for model in models:
        change(model.get_submodule(f"model.layers.1.{name}".rstrip(".")))
    plain, whole = (logits(model)[0] for model in models)
    torch.testing.assert_close(whole, plain, rtol=1e-4, atol=1e-4)
    assert launches == five_in(blocks=2)


@pytest.mark.parametrize("call, changes", [
    (dict(mode="off"), {}), (dict(mode="decode", T=2), {}), (dict(batch=3, T=3), {}),
    (dict(T=2, prefix=1), {}), (dict(static=False), {}), ({}, dict(attention_bias=True)),
    ({}, dict(mlp_bias=True))])
def test_a_call_that_does_not_fit_runs_as_the_model_has_it(call, changes, launches):
    plain, whole = sparse_llama(**changes)
    assert torch.equal(logits(whole, **call)[0], logits(plain, **call)[0])
    assert not launches


def test_rows_that_a_cache_does_not_have_are_refused_as_the_model_refuses_them():
    for model in sparse_llama():
        cache = StaticCache(model.make_cache(1, 8), 1)
        for shape in ((2, 1), (1, 2)):
            with pytest.raises((IndexError, RuntimeError)), sparse_mode(model, "all"):
                model(torch.ones(shape, dtype=torch.int64, device=DEVICE), cache)


def test_a_fused_model_can_be_made_sparse_later_and_nothing_is_fused_without_a_gpu(monkeypatch,
                                                                                   launches):
    model = fused.fuse(tiny_model())
    assert is_fused(model) and is_fused(fused.fuse(model))                 # twice is as once
    dense, _ = logits(model)
    sparsify(model, thresholds_of(model, 0.0))
    torch.testing.assert_close(logits(model)[0], dense, rtol=1e-4, atol=1e-4)
    assert launches == five_in(blocks=3)
    mine = tiny_model()
    subclass(mine.model.layers[1])
    assert type(fused.fuse(mine).model.layers[1]).__name__ == "Other"
    monkeypatch.setattr(kernel, "fits_triton", lambda x: False)
    assert not is_fused(fused.fuse(conftest.tiny_model()))


def qkv(self, x):
    """Return the same as ever, under another comment."""
    return (self.q_proj(x), self.k_proj(x),
            self.v_proj(x))                                # in other lines


def test_a_changed_function_is_named_and_the_model_left_alone(monkeypatch, capsys):
    monkeypatch.setattr(llama.Attention, "qkv", qkv)
    now = {name: fused.fingerprint(name) for name in fused.FINGERPRINTS}
    assert now == fused.FINGERPRINTS, "print them with: python -m beyond.fused"
    for name in fused.FINGERPRINTS:
        with monkeypatch.context() as patch:
            patch.setattr(name, F.silu)
            assert not is_fused(fused.fuse(tiny_model()))
        line, = capsys.readouterr().err.splitlines()
        assert "fused.py steps aside" in line and f"{name} is not what" in line


# --------------------------------------------------------------------------------------------------
# lab/gpu.py: compiled and counted, without a GPU

def test_kernels_compile_for_gpus_that_are_not_here_and_spill_nothing():
    code = ("from beyond.lab import gpu\n"
            "assert gpu.registers(capabilities=(90,), rows_of_x=(8,))")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                           env={**os.environ, "TRITON_INTERPRET": "0"})
    assert ended.returncode == 0, ended.stderr
    # three kinds of weight; q, k, v in the first block and in the second, o and down, gate and up
    assert ended.stdout.count("   0 spills  joint_product_kernel") == 12
    assert ended.stdout.count("   0 spills") == 13 == ended.stdout.count("\n")


def test_launches_of_a_step_and_what_they_cost(capsys):
    gpu.launches()
    dense, core, beyond, cost = capsys.readouterr().out.splitlines()
    assert "15.01 GB a step: 225 mm, " in dense
    assert "8.03 GB a step: 224 sparse_product_kernel" in core and " 65 rms_norm" in core
    assert "128 joint_product_kernel, 32 scaled_dot_product_attention, " in beyond
    assert " 2 rms_norm" in beyond and " add" not in beyond            # the first, and the head's
    assert int(beyond.split()[3]) - 5 * 32 < 30                            # beside five a block
    for line in (dense, core, beyond):
        assert " 1 where" in line and "scalar_tensor" not in line          # the mask, once a step
    assert 295 < float(cost.split()[-2]) < 315                             # tokens a second


# --------------------------------------------------------------------------------------------------
# lab/gpu.py: the parts, at toy sizes

@pytest.fixture
def toy(monkeypatch):
    """Make what lab/gpu.py measures small, and its own measuring a single call."""
    config = conftest.tiny_model().config
    monkeypatch.setitem(llama.PRESETS, gpu.PRESET, config)
    for name, value in dict(SHAPES=((128, 200),) * 2, TOTAL=1 << 16, TOKENS=4).items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "graph_time", lambda call, device, seconds=0.5: call(0) is None or 1.0)
    monkeypatch.setattr(kernel, "median_time", kernel.median_time)   # a part changes it
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function or (lambda f: f))


@pytest.mark.parametrize("error, same, fine", [(0.5, 4, True), (float("nan"), 4, False),
                                               (0.5, 3, False)])
def test_what_is_shown_to_be_right(toy, error, same, fine, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "error_of", lambda *_: error)
    if same < gpu.TOKENS:
        monkeypatch.setattr(gpu, "first_difference", lambda *_: same)
    assert gpu.right(DEVICE) == fine
    assert capsys.readouterr().out.endswith(f"are the CPU's: [{same}, {same}, {same}]\n")


def test_the_parts_that_time_run(toy, capsys):
    for part in ("models", "products", "profile"):
        gpu.PARTS[part](DEVICE)
    said = capsys.readouterr().out
    for line in ("compiled  ", "pass of 4 tokens", "JOINED False", "AHEAD True", "fused, int4",
                 "128 x 200 bfloat16", "lists 512 channels", "8 steps"):
        assert line in said


TEAL = """
import msgspec
def splitk_sparse_gemv(x, weight, threshold, sparsity_bin):
    assert isinstance(threshold, float) and isinstance(sparsity_bin, int)
    assert weight.stride(1) > 1          # column major
    return (x * (x.abs() > threshold)) @ weight.T
"""
GPT_FAST = """
from torch import nn

class Transformer(nn.Embedding):
    @staticmethod
    def from_name(name):
        assert name == "llama-3-8b"
        return Transformer(97, 97)

    def setup_caches(self, batch, length):
        self.positions = list(range(length))

    def forward(self, idx, input_pos):
        assert idx.shape == (1, 1) and input_pos.tolist() == [self.positions.pop(0)]
        return super().forward(idx)
"""


def test_others_code_is_given_what_it_takes(toy, tmp_path, capsys):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "sparse_gemv.py").write_text(TEAL)
    (tmp_path / "model.py").write_text(GPT_FAST)
    gpu.others(DEVICE, SimpleNamespace(gpt_fast=tmp_path, teal=tmp_path))
    said = capsys.readouterr().out
    assert "gpt-fast, compiled" in said and said.count("theirs") == 2


def test_a_part_that_fails_or_hangs_is_said_and_the_next_begins(tmp_path, monkeypatch, capsys):
    def run(command, timeout, **options):
        part = command[3]
        assert command[2] == "beyond.lab.gpu" and 0 < timeout <= 60
        if part == "models":
            raise subprocess.TimeoutExpired(command, timeout, b"so far")
        return SimpleNamespace(stdout=b"said", returncode=int(part == failing))

    monkeypatch.setattr(gpu.subprocess, "run", run)
    out = tmp_path / "report"
    for failing, fine in (("profile", True), ("right", False)):
        assert gpu.all_parts(SimpleNamespace(minutes=1, out=out)) == fine
        report = out.read_text()
        assert report.count("---") == 5 and "launches" not in report and "so far" in report
        assert f"{failing}: 0 s, status 1" in report
