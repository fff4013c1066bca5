"""Tests of fused.py, rotate.py and quantize.py: other weights, other ways to multiply with them.

Without a GPU the Triton kernels run in Triton's interpreter, which rounds float32 to bfloat16 on
the way into some operations: there 2^-7 is allowed.
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import generate
import kernel
import model as llama
from beyond import __main__ as fast
from beyond import allocate, folders, fused, judge, quantize, record, rotate
from beyond.conftest import random_llama
from calibrate import calibrate
from generate import StaticCache
from model import (DEMO, Config, InputError, Llama, linear_names, load_model,
                   read_json, read_safetensors, windows_of, write_json, write_safetensors)
from sparsify import (SparseLinear, realised_sparsity, reset_counts, sparse_mode,
                      sparsify)

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"
NO_COMPILER = pytest.mark.skipif(kernel.c_function(torch.float32) is None, reason="no C compiler")
NO_TRITON = pytest.mark.skipif(kernel.triton is None, reason="no Triton")
BACKENDS = ["torch", pytest.param("c", marks=NO_COMPILER), pytest.param("triton", marks=NO_TRITON)]


def tiny_model(dtype=torch.float32, **changes):
    """Return a small Llama, see conftest.py."""
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, vocab_size=61, max_position_embeddings=64)
    return random_llama(dtype, **shape | changes)


def tokens_like(model, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, shape, generator=generator)


def close(y, expected, tolerance):
    """Return whether the relative error of a whole tensor is small; NaN never passes."""
    y, expected = y.double().cpu(), expected.double().cpu()
    return bool((y - expected).norm() <= tolerance * expected.norm().clamp(min=1e-30))


def device_of(backend):
    return DEVICE if backend == "triton" else torch.device("cpu")


def picker(seed):
    """Return a generator, and a function that picks one of its arguments with it."""
    generator = torch.Generator().manual_seed(seed)
    return generator, lambda *choices: choices[torch.randint(len(choices), (), generator=generator)]


def command(monkeypatch, main, *arguments):
    """Run a command's main in this process."""
    monkeypatch.setattr(sys, "argv", ["a command", *map(str, arguments)])
    main()


def save_sharded(model, folder):
    """Write a checkpoint in two files, as the hub has large ones."""
    folder.mkdir()
    model.config.write(folder, torch.float32)
    tensors = dict(model.named_parameters())
    weight_map = {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


# --------------------------------------------------------------------------------------------------
# quantize.py: codes

def test_codes_are_packed_and_unpacked():
    for bits in (4, 8):
        generator = torch.Generator().manual_seed(bits)
        codes = torch.randint(1 << bits, (5, 203), generator=generator)
        words = quantize.pack_codes(codes, bits)
        assert words.dtype == torch.int32
        assert words.shape == (5, quantize.words_of(203, bits))
        assert torch.equal(quantize.unpack_codes(words, bits, 203).long(), codes)
        # The layout that is written down: bits 4k.. (8k..) of word w of a block are output 16k + w.
        lanes = 32 // bits
        for output in (0, 17, 100, 202):
            block, inside = divmod(output, 16 * lanes)
            word = int(words[3, 16 * block + inside % 16])
            assert word >> bits * (inside // 16) & (1 << bits) - 1 == codes[3, output]


def test_rounding_is_to_nearest_and_clipping_helps():
    torch.manual_seed(0)
    weight = torch.randn(96, 256)                                               # (out, in)
    eight = quantize.quantize_weight(weight, 8)
    difference = eight.dequantized(torch.float32).t() - weight
    assert (difference.abs() <= 0.5001 * eight.scales[:, None]).all()
    plain = quantize.quantize_weight(weight, 4, 64, clipping=(1.0,))
    clipped = quantize.quantize_weight(weight, 4, 64)
    step = plain.scales.float().repeat_interleave(64, 0).t()                    # (out, in)
    difference = plain.dequantized(torch.float32).t() - weight
    assert (difference.abs() <= 1.01 * step).all()         # half a step, and the zero point's half

    def errors(quantized):
        difference = quantized.dequantized(torch.float32).t() - weight
        return difference.square().unflatten(1, (-1, 64)).sum(2)
    assert (errors(clipped) <= errors(plain) + 1e-6).all()
    assert errors(clipped).sum() < 0.95 * errors(plain).sum()
    assert quantize.relative_error(weight, clipped) < 0.11
    assert quantize.relative_error(weight, eight) < 0.01


@pytest.mark.parametrize("bits", [8, 4])
def test_a_head_is_rounded_in_parts(bits, monkeypatch):
    weight = torch.randn(700, 64)
    whole = quantize.quantize_weight(weight, bits, 32)
    monkeypatch.setattr(quantize, "AT_ONCE", 256)
    parts = quantize.quantize_weight(weight, bits, 32)
    assert parts.shape == whole.shape and parts.group == whole.group
    assert all(torch.equal(a, b) for a, b in zip(parts.buffers(), whole.buffers(), strict=True))


def test_constant_weights_have_codes():
    constant = quantize.quantize_weight(torch.full((3, 64), 0.37), 4, 64)       # all on one side
    assert close(constant.dequantized(torch.float32), torch.full((64, 3), 0.37), 0.01)
    for bits in (4, 8):
        zeros = quantize.quantize_weight(torch.zeros(3, 64), bits, 64)
        assert torch.equal(zeros.dequantized(torch.float32), torch.zeros(64, 3))


def test_what_cannot_be_quantized():
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="this one: holds NaN or infinity"):
            quantize.quantize_weight(torch.full((2, 32), value), 8, name="this one")
    for group, inputs in [(128, 192), (48, 96), (0, 64)]:
        with pytest.raises(InputError, match=f"groups of {group}"):
            quantize.quantize_weight(torch.ones(2, inputs), 4, group)
    with pytest.raises(InputError, match="bits is 5"):
        quantize.quantize_weight(torch.ones(2, 32), 5)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_weight_keeps_its_dtypes(bits):
    weight = quantize.quantize_weight(torch.randn(33, 64), bits, 64)
    x = torch.randn(1, 64)
    dtypes = [part.dtype for part in weight.buffers()]
    before = quantize.codes_gemv(x, weight, 0.0)
    for dtype in (torch.float16, torch.float64, torch.bfloat16):
        torch.nn.ModuleList([weight]).to(dtype)
        assert [part.dtype for part in weight.buffers()] == dtypes
        assert torch.equal(quantize.codes_gemv(x, weight, 0.0), before)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(quantize.codes_gemv(x, weight, 0.0), before)
    finally:
        torch.set_default_dtype(torch.float32)


# --------------------------------------------------------------------------------------------------
# quantize.py: products

def quantized_case(seed):
    """Return (x, QuantizedWeight, threshold): random codes of either kind, odd shapes."""
    generator, pick = picker(seed)
    bits = pick(8, 4)
    outputs = pick(1, 30, 64, 129, 200)
    dtype = pick(torch.float32, torch.bfloat16, torch.float16)
    group = pick(32, 64, 96, 128) if bits == 4 else None
    channels = group * pick(1, 2, 3) if group else pick(1, 37, 300, 600)
    codes = torch.randint(1, 1 << bits, (channels, outputs), generator=generator)
    codes = quantize.pack_codes(codes, bits)
    if bits == 8:
        scales = 0.1 * torch.rand(outputs, generator=generator)
        weight = quantize.QuantizedWeight(codes, scales)
    else:
        scales = 0.1 * torch.rand(channels // group, outputs, generator=generator)
        zeros = torch.randint(16, scales.shape, generator=generator).to(torch.uint8)
        weight = quantize.QuantizedWeight(codes, scales.bfloat16(), zeros, group)
    x = torch.randn(pick(*range(1, 9)), channels, generator=generator).to(dtype)
    thresholds = torch.rand(channels, generator=generator) * 1.5
    return x, weight, pick(0.0, 0.5, 1e9, -1.0, thresholds)


def as_bytes(x, size):
    """Return x (rows, in) in bytes, with a scale for each row and eight channels.

    They are eight of those that any row keeps of a span of `size`.
    """
    spans = F.pad(x, (0, -x.shape[1] % size)).view(len(x), -1, size)
    dropped = (spans == 0).all(0).to(torch.int8).expand(spans.shape)
    order = dropped.sort(dim=-1, stable=True).indices      # the kept ones first
    eights = spans.gather(-1, order).unflatten(-1, (-1, 8)).float()
    largest = eights.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    values = (127 / largest * eights).round().double() * (largest / 127)
    return spans.scatter(-1, order, values.flatten(-2)).flatten(1)[:, :x.shape[1]]


VARIANTS = {"c": (False, False), "c-bytes": (True, False), "c-narrow": (True, True)}


def choose_variant(monkeypatch, backend):
    """Make codes-c what `backend` names, one of VARIANTS; return a backend's name."""
    if backend in VARIANTS:
        rounded, narrow = VARIANTS[backend]
        library = quantize.c_library
        monkeypatch.setattr(quantize, "c_library",
                            lambda bits, dtype, _: library(bits, dtype, rounded, narrow))
    return backend.split("-")[0]


PRODUCTS = [*BACKENDS, *(pytest.param(name, marks=NO_COMPILER) for name in VARIANTS if name != "c")]


@pytest.mark.parametrize("backend", PRODUCTS)
def test_products_of_codes_against_float64(backend, monkeypatch):
    backend = choose_variant(monkeypatch, backend)
    device = device_of(backend)
    interpreted = backend == "triton" and INTERPRETED
    for seed in range(12 if interpreted else 150):
        x, weight, threshold = quantized_case(seed)
        kept = x.double() * kernel.kept(x.double(), torch.as_tensor(threshold).double())
        exact = weight.dequantized(torch.float64)
        rounded = backend == "c" and quantize.rounds(x, weight)
        if rounded:
            kept = as_bytes(kept, weight.group or quantize.SPAN)
        threshold = threshold.to(device) if isinstance(threshold, torch.Tensor) else threshold
        y = quantize.codes_gemv(x.to(device), weight.to(device), threshold, backend).cpu()
        assert y.dtype == x.dtype
        # Codes are summed before they are scaled: rounding is proportional to the codes' range.
        scales = weight.scales.cpu().double().view(-1, y.shape[1]).amax(0)
        scale = kept.abs().sum(1, keepdim=True) * scales * (1 << weight.bits - 1)
        allowed = {torch.float32: 2**-13, torch.float16: 2**-9, torch.bfloat16: 2**-7}[x.dtype]
        allowed = max(allowed, 2**-7 * interpreted)
        assert ((y.double() - kept @ exact).abs() <= allowed * scale + 1e-30).all(), seed


def exact_product(x, weight, threshold):
    """Return in float64 what codes_gemv of x float32 is to come to."""
    kept = x * kernel.kept(x, torch.tensor(threshold))
    return kept.double() @ weight.dequantized(torch.float64)


@NO_COMPILER
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [8, 4])
def test_more_outputs_than_a_thread_has_room_for(bits, variant, monkeypatch):
    choose_variant(monkeypatch, variant)
    torch.manual_seed(0)
    weight = quantize.quantize_weight(torch.randn(2500, 64), bits, 32)
    x = torch.randn(7, 64)
    tolerance = 2**-7 if quantize.rounds(x, weight) else 1e-6
    expected = exact_product(x, weight, 0.5)
    assert close(quantize.codes_gemv(x, weight, 0.5, "c"), expected, tolerance)


@NO_COMPILER
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [8, 4])
def test_threads_share_spans_where_outputs_are_few(bits, variant, monkeypatch):
    choose_variant(monkeypatch, variant)
    torch.manual_seed(0)
    weight = quantize.quantize_weight(torch.randn(130, 2500 // 32 * 32), bits, 32)
    for rows, threads in [(1, 1), (1, 2), (1, 3), (5, 3), (8, 2)]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        x = torch.randn(rows, weight.shape[0])
        x[:, 400:1100] = 0                                 # spans without a channel
        tolerance = 2**-7 if quantize.rounds(x, weight) else 1e-5
        y = quantize.codes_gemv(x, weight, 0.5, "c")
        assert close(y, exact_product(x, weight, 0.5), tolerance)
        assert torch.equal(y, quantize.codes_gemv(x, weight, 0.5, "c"))


@NO_COMPILER
def test_instructions_that_multiply_bytes_are_used_where_there_are_any():
    words = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    known = [("avx512_vnni", "AVX-512 VNNI"), ("avx2", "AVX2"), ("asimddp", "NEON dot product")]
    expected = next((name for flag, name in known if flag in words), None)
    if expected is None:
        pytest.skip("none that is known, or a system that does not say")
    for bits in (8, 4):
        assert quantize.instructions(torch.zeros(1), bits).startswith(f"C, {expected}")
        assert quantize.rounds(torch.zeros(1), quantize.QuantizedWeight.empty(32, 64, bits, 32))


@NO_COMPILER
@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_activations_are_a_small_error(bits, monkeypatch):
    torch.manual_seed(0)
    weight = quantize.quantize_weight(torch.randn(256, 1024), bits, 128)
    x = torch.randn(1, 1024) * torch.randn(1024).exp()     # as activations are, of many sizes
    exact = x.double() @ weight.dequantized(torch.float64)
    if not quantize.rounds(x, weight):
        pytest.skip("no instructions that multiply bytes")
    rounded = quantize.codes_gemv(x, weight, -1.0, "c")
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.008
    monkeypatch.setattr(quantize, "ROUND_ACTIVATIONS", False)
    assert close(quantize.codes_gemv(x, weight, -1.0, "c"), exact, 1e-6)


@pytest.mark.parametrize("backend", PRODUCTS)
@pytest.mark.parametrize("bits", [8, 4])
def test_nan_and_outliers_stay_in_their_row(bits, backend, monkeypatch):
    backend = choose_variant(monkeypatch, backend)
    device = device_of(backend)
    generator = torch.Generator().manual_seed(0)
    weight = quantize.quantize_weight(torch.randn(40, 64, generator=generator), bits, 64).to(device)
    x = 0.1 * torch.randn(3, 64, generator=generator).to(device)
    x[1, 5] = float("nan")
    y = quantize.codes_gemv(x, weight, 0.05, backend)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()
    x[1, 5] = 1500.0                     # leaves what the others add exact
    exact = weight.dequantized(torch.float64)
    outlier = x[1, 5].double() * exact[5]
    rest = x[1].double() @ exact - outlier
    y = quantize.codes_gemv(x, weight, 0.0, backend)[1].double() - outlier
    bytes_of_x = backend == "c" and quantize.rounds(x, weight)       # the outlier's eight is coarse
    if not (backend == "triton" and INTERPRETED or bytes_of_x):      # whose sums are bfloat16's
        assert (y - rest).abs().median() < 0.01 * rest.abs().median()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dense_products_of_any_length(dtype):
    weight = quantize.quantize_weight(torch.randn(40, 96), 4, 32)
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-5)
    if kernel.best_backend(torch.zeros(1, dtype=dtype)) == "c":
        tolerance = 2**-6                                  # activations may be rounded
    for rows in (1, 3, 8, 11, 64, 70):
        x = torch.randn(1, rows, 96).to(dtype)
        expected = x.double() @ weight.dequantized(torch.float64)
        y = quantize.codes_dense(x, weight)
        assert y.dtype == dtype and close(y, expected, tolerance)


def test_products_refuse_what_does_not_fit():
    weight = quantize.quantize_weight(torch.randn(33, 64), 8)
    for x, message in [(torch.randn(1, 32), r"expected \(32, out\)"),
                       (torch.randn(9, 64), r"expected floating point \(1 to 8, in\)")]:
        with pytest.raises(ValueError, match=message):
            quantize.codes_gemv(x, weight, 0.0)
    with pytest.raises(ValueError, match="backend is .* not 'cublas'"):
        quantize.codes_gemv(torch.randn(1, 64), weight, 0.0, "cublas")


# --------------------------------------------------------------------------------------------------
# quantize.py: models and folders

@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-3)])
@pytest.mark.parametrize("tied, head_bits", [(False, 16), (True, 8), (False, 8), (True, 4)])
def test_a_quantized_model_is_the_model_of_its_rounded_weights(bits, dtype, tolerance, tied,
                                                               head_bits, monkeypatch):
    monkeypatch.setattr(quantize, "ROUND_ACTIVATIONS", False)
    shape = {"tie_word_embeddings": tied}
    model = quantize.quantize(tiny_model(dtype, **shape), bits, 32, head_bits=head_bits)
    rounded = tiny_model(dtype, **shape)
    names = linear_names(model.config)
    for name in [*names, "lm_head"]:
        rounded.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
    every = torch.arange(model.config.vocab_size)[None]
    rounded.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
    assert torch.equal(model.embed(every)[0], rounded.model.embed_tokens.weight)
    assert isinstance(model.lm_head, SparseLinear) == (head_bits < 16)
    assert torch.equal(model.embed(every)[0].float(), model.lm_head.weight.float()) == tied
    tokens = tokens_like(model, 1, 12)
    assert close(model(tokens), rounded(tokens), tolerance)
    # In float32 rounding would move inputs over their thresholds. There nothing is dropped, but the
    # kernel does the work.
    thresholds = {name: 0.3 + 0.01 * i if dtype == torch.float64 else 0.0
                  for i, name in enumerate(names)}
    for each in (model, rounded):
        sparsify(each, thresholds)
    with sparse_mode(model, "all"), sparse_mode(rounded, "all"):
        assert close(model(tokens), rounded(tokens), tolerance)
        assert close(model(tokens[:, :5]), rounded(tokens[:, :5]), tolerance)   # few: the kernel
        caches = [each.make_cache(1, 12) for each in (model, rounded)]
        for token in tokens.split(1, dim=1):
            assert close(model(token, caches[0]), rounded(token, caches[1]), tolerance)
    skipped = realised_sparsity(model)
    assert skipped == pytest.approx(realised_sparsity(rounded), abs=1e-3)
    assert dtype == torch.float32 or 0.1 < skipped < 0.9


@torch.no_grad()
def test_thresholds_of_a_quantized_model_are_set_and_taken_away():
    model = quantize.quantize(tiny_model(), 8)
    token = tokens_like(model, 1, 1)
    dense = model(token)
    names = linear_names(model.config)
    sparsify(model, dict.fromkeys(names, 0.4))
    assert not close(model(token), dense, 0.01) and realised_sparsity(model) > 0.1
    with sparse_mode(model, "off"):
        assert torch.equal(model(token), dense)
    sparsify(model, dict.fromkeys(names))
    assert torch.equal(model(token), dense) and realised_sparsity(model) == 0
    sparsify(model, {names[-1]: 0.4})
    assert not torch.equal(model(token), dense)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits, head_bits", [(8, 16), (4, 16), (8, 8), (4, 8), (8, 4)])
def test_quantized_folder(tmp_path, bits, head_bits, tied):
    model = tiny_model(tie_word_embeddings=tied)
    plain, small = tmp_path / "plain", tmp_path / "small"
    save_sharded(model, plain)
    measures = quantize.quantize_folder(plain, small, bits, 32, head_bits)
    loaded = Llama.from_pretrained(small)
    quantize.quantize(model, bits, 32, head_bits=head_bits)
    tokens = tokens_like(model, 2, 9)
    assert torch.equal(loaded(tokens), model(tokens))
    head = {"model.embed_tokens"} if tied else {"model.embed_tokens", "lm_head"}
    assert set(measures) == {*linear_names(model.config), *(head if head_bits < 16 else ())}
    assert max(error for error, _, _ in measures.values()) < 0.15
    # What other versions of this program read, and wrote.
    parts = ["codes", "scales"] if bits == 8 else ["codes", "scales", "zeros"]
    names = {name for path in small.glob("*.safetensors") for name in read_safetensors(path)}
    assert {f"model.layers.1.mlp.up_proj.weight_t.{part}" for part in parts} <= names
    settings = {"quant_method": "minteal", "version": 2, "bits": bits, "head_bits": head_bits,
                "group": 32 if 4 in (bits, head_bits) else None}
    config = read_json(small / "config.json")
    assert config["quantization_config"] == settings
    if head_bits == 16:                  # as version 1 wrote it
        before = {"quant_method": "minteal", "version": 1, "bits": bits, "group": settings["group"]}
        write_json(small / "config.json", config | {"quantization_config": before})
        loaded = Llama.from_pretrained(small)
        assert torch.equal(loaded(tokens), model(tokens))
    calibration = calibrate(loaded, tokens_like(model, 400, seed=3), 32)
    allocate.add_allocations(calibration, loaded, tokens_like(model, 400, seed=3), 32)  # backward
    sparsify(loaded, calibration.thresholds(0.5))
    assert next(generate.generate(loaded, [1, 2, 3], 4)) in range(model.config.vocab_size)


@pytest.mark.parametrize("hidden, middle, group", [
    (128, 384, 128), (96, 288, 96), (96, 160, 32), (64, 192, 64), (64, 96, 32), (288, 768, 96),
])
def test_groups_fit_the_inputs(tmp_path, hidden, middle, group):
    model = tiny_model(hidden_size=hidden, intermediate_size=middle, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=hidden // 4, num_hidden_layers=1)
    assert quantize.fitting_group(model) == group
    model.save_pretrained(tmp_path / "plain")
    quantize.quantize_folder(tmp_path / "plain", tmp_path / "small", 4)
    assert Config.read(tmp_path / "small").quantization_config["group"] == group
    quantize.quantize_now(model, "plain", "int4")
    assert model.config.quantization_config["group"] == group
    tokens = tokens_like(model, 1, 9)
    assert torch.equal(Llama.from_pretrained(tmp_path / "small")(tokens), model(tokens))


def test_what_quantized_folders_are_not_for(tmp_path):
    model = tiny_model()
    small = tmp_path / "small"
    model.save_pretrained(tmp_path / "plain")
    quantize.quantize_folder(tmp_path / "plain", small, 8)
    quantize.quantize(model, 8)
    for message, refused in [
            ("the model is quantized", lambda: model.save_pretrained(tmp_path / "again")),
            ("exists already", lambda: quantize.quantize_folder(tmp_path / "plain", small, 8)),
            ("is quantized already", lambda: quantize.quantize_folder(small, tmp_path / "x", 8)),
            ("this: is quantized already", lambda: quantize.quantize_now(model, "this", "int8")),
            ("quantized or sparse already", lambda: quantize.quantize(model, 8)),
            ("rotate first", lambda: rotate.rotate(small, tmp_path / "x", None, None))]:
        with pytest.raises(InputError, match=message):
            refused()
    config = read_json(small / "config.json")
    for changes, message in [({"version": 3}, "version is 3, known is 2"),
                             ({"bits": 3}, "bits is 3, expected 4 or 8"),
                             ({"head_bits": 2}, "head_bits is 2, expected 16, 8 or 4"),
                             ({"group": 32}, "with group 32, expected null"),
                             ({"bits": 4, "group": 40}, "groups of 40"),
                             ({"quant_method": "awq"}, "supported is floating point")]:
        settings = config["quantization_config"] | changes
        write_json(small / "config.json", config | {"quantization_config": settings})
        with pytest.raises(InputError, match=message):
            Llama.from_pretrained(small)


def test_a_quantization_that_fails_changes_nothing():
    model = tiny_model(intermediate_size=80)
    with pytest.raises(InputError, match="layers.0.mlp.down_proj: groups of 32"):
        quantize.quantize(model, 4, 32)
    assert all(type(model.get_submodule(name)) is torch.nn.Linear
               for name in linear_names(model.config))
    assert model.config.quantization_config is None
    quantize.quantize(model, 8)
    preset = llama.PRESETS["llama-3.2-1b"]                 # a model's own configuration is another
    assert llama.preset_config("llama-3.2-1b") is not preset


def test_a_rewriting_that_fails_leaves_nothing(tmp_path):
    """Nothing of an unfinished folder stays, and nothing else is touched."""
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "mine.txt").write_text("keep me")
    model = tiny_model()
    model.save_pretrained(tmp_path / "nan")
    good = {name: tensor.clone() for name, tensor
            in read_safetensors(tmp_path / "nan" / "model.safetensors").items()}
    up = "model.layers.2.mlp.up_proj.weight"
    spoiled = good[up].clone()
    spoiled[3, 4] = float("nan")
    Q = torch.eye(64).double()
    R = torch.eye(16).double().expand(3, 2, 16, 16)
    for name, changes, message in [
            ("nan", {up: spoiled}, "up_proj.weight: holds NaN"),
            ("missing", {"model.layers.1.mlp.up_proj.weight": None}, "is missing"),
            ("misshapen", {"model.norm.weight": torch.ones(7)}, r"shape \[7\]")]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        model.config.write(folder, torch.float32)
        tensors = {key: value for key, value in (good | changes).items() if value is not None}
        write_safetensors(folder / "model.safetensors", tensors)
        with pytest.raises(InputError, match=message):
            quantize.quantize_folder(folder, tmp_path / "out", 8)
        if name != "nan":
            with pytest.raises(InputError, match=message):
                rotate.rotate(folder, tmp_path / "out", Q, R)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["misshapen", "missing", "nan",
                                                                "out.tmp"]
    assert (tmp_path / "out.tmp" / "mine.txt").read_text() == "keep me"


def test_the_commands_take_a_quantized_folder(tmp_path, monkeypatch, capsys):
    small = tmp_path / "small"
    command(monkeypatch, quantize.main, "--bits", 4, "--out", small)
    out = capsys.readouterr().out
    assert "int4, groups of 128: the blocks' linears" in out and f"{small}: written" in out
    with pytest.raises(InputError, match="small: is quantized already"):
        command(monkeypatch, quantize.main, "--model", small)
    with pytest.raises(InputError, match="is quantized; rotate first"):
        command(monkeypatch, rotate.main, "--model", small, "--out", tmp_path / "x")
    text = ["--text", ROOT / "generate.py", "--tokens", 1200]
    command(monkeypatch, allocate.main, "--model", small, "--no-fisher", *text)
    command(monkeypatch, judge.main, "--model", small, "--sparsity", 0.5, "--functions", 0,
            "--allocation", "uniform", *text)
    assert "uniform" in capsys.readouterr().out
    eight = ["--max-new-tokens", 8]
    for main, options in [(generate.main, ["--model", small, "--sparsity", 0.5]),
                          (fast.main, ["--model", small, "--draft", "sparse", "--compare"]),
                          (fast.main, ["--quantize", "int8", "--head-bits", 4, "--sparsity", 0.5])]:
        command(monkeypatch, main, *eight, *options)
        assert "8 tokens" in capsys.readouterr().out
    with pytest.raises(InputError, match="small: is quantized already"):
        command(monkeypatch, fast.main, "--model", small, "--quantize", "int8")
    command(monkeypatch, llama.main, small)
    out = capsys.readouterr().out
    assert float(out.split("read for one token: ")[1].split(" MB")[0]) < 6


def test_quantize_measures_and_makes_a_table(monkeypatch, capsys):
    monkeypatch.setattr(quantize, "load_model", lambda *_, **__: (tiny_model(), None))
    monkeypatch.setattr(quantize.Config, "read", lambda folder: tiny_model().config)
    command(monkeypatch, quantize.main, "--group", 32)
    rows = capsys.readouterr().out.splitlines()
    assert [row for row in rows if row.startswith("int")] == [
        "int8: the blocks' linears 0.4 MB -> 0.1 MB",
        "int4, groups of 32: the blocks' linears 0.4 MB -> 0.1 MB"]
    assert rows[1].startswith("model.embed_tokens and lm_head: 0.0 MB -> 0.0 MB, relative error 0.")
    assert len(rows) == 2 * (4 + 3)
    # The table, of a model this small on random text.
    tokens = tokens_like(tiny_model(), 1000)
    texts = []

    def read_tokens(tokenizer, path, part):
        texts.append(path)
        return tokens, "random tokens"
    monkeypatch.setattr(quantize, "load_tokenizer", lambda folder: None)
    monkeypatch.setattr(quantize, "read_tokens", read_tokens)
    monkeypatch.setattr(quantize, "tokens_a_second", lambda model, prompt: 1.0)
    monkeypatch.setattr(quantize, "LEVELS", (0.0, 0.5))
    command(monkeypatch, lambda: quantize.main(allocate, judge), "--table", "--group", 32,
            "--head-bits", 16, "--held-out", "a text", "--tokens", 500)
    rows = [row.split() for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[bits, level] for bits in ("16", "8", "4")
                                         for level in ("0%", "50%")]
    assert float(rows[0][5]) > float(rows[2][5]) > float(rows[4][5])            # MB a token
    model = quantize.quantize(tiny_model(), 8, 32, head_bits=16)
    assert rows[2][5] == f"{quantize.bytes_a_token(model) / 1e6:.3f}"
    assert texts == [None, "a text"]


def test_what_rounding_the_activations_adds(monkeypatch, capsys, tmp_path):
    text = tmp_path / "text"
    text.write_text("Once there was a small dog who had a red ball. " * 60)
    command(monkeypatch, quantize.main, "--rounding", "--tokens", 600, "--held-out", text)
    rows = [row.split() for row in capsys.readouterr().out.splitlines()[3:]]
    assert [row[:2] for row in rows] == [[bits, level] for bits in "84"
                                         for level in ("0%", "50%", "65%")]
    kl = [float(row[3]) for row in rows]
    assert 0 < kl[0] < kl[1] < kl[2] and kl[0] < kl[3]     # fewer bits and weights cost more
    rounds = quantize.rounds(torch.zeros(1), quantize.QuantizedWeight.empty(32, 64, 8, None))
    assert all((row[3] != row[5]) == rounds for row in rows)
    assert quantize.ROUND_ACTIVATIONS


@pytest.mark.parametrize("main, arguments, message", [
    (quantize.main, ["--group", "50"], "--group is 50, expected a multiple of 32"),
    (quantize.main, ["--out", DEMO], "demo: exists already"),
    (quantize.main, ["--model", "random:llama-3.2-1b"], "random weights"),
    (quantize.main, ["--bits", "5"], "--bits: invalid choice"),
    (quantize.main, ["--table", "--out", "x"], "--out: not allowed with argument --table"),
    (rotate.main, ["--out", DEMO], "demo: exists already"),
    (rotate.main, [], "required: --out"),
    (rotate.main, ["--model", "random:llama-3.2-1b", "--out", "x"], "random weights"),
    (rotate.main, ["--model", "nowhere", "--out", "x"], "nowhere: no such folder"),
])
def test_bad_input_on_the_command_line(main, arguments, message, monkeypatch):
    with pytest.raises(InputError, match=message):
        command(monkeypatch, main, *arguments)


@pytest.mark.parametrize("main", [quantize.main, rotate.main])
def test_help_gives_every_default(main, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, main, "--help")
    options = capsys.readouterr().out.split("options:")[1]
    options = re.split(r"\n  (?=-)", options)[2:]          # after --help
    assert options and all("default" in option for option in options)


def test_bad_input_ends_a_command_with_one_line():
    ended = subprocess.run([sys.executable, "-m", "beyond.quantize", "--group", "50"], cwd=ROOT,
                           capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "quantize.py: error: --group is 50, expected a multiple of 32\n"


@NO_COMPILER
@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_steps_of_a_quantized_model_are_recorded(bits):
    model = quantize.quantize(tiny_model(torch.bfloat16), bits, 32)
    sparsify(model, dict.fromkeys(linear_names(model.config), 0.3) | {"lm_head": None})
    model.sparse_state.thresholds.fill_(-1)                # rounding moves inputs
    token = tokens_like(model, 1, 1)
    for mode in ("off", "decode"):
        with sparse_mode(model, mode):
            cache = model.make_cache(1, 9)
            step = record.make_step(model, cache)
            reset_counts(model)
            recorded = step(token).clone()
            counts = model.sparse_state.counts.clone()
            cache.used = 0
            reset_counts(model)
            assert close(recorded, model(token, cache), 0.03)
            assert torch.equal(counts, model.sparse_state.counts)
            tape, = step.tapes.values()
            assert sum(callable(note) for note in tape.notes) < 24    # the products are in C


# --------------------------------------------------------------------------------------------------
# fused.py

@NO_TRITON
def test_joint_products_equal_their_members():
    torch.manual_seed(0)
    x = torch.randn(2, 70, device=DEVICE)
    weights = [torch.randn(70, out, device=DEVICE) for out in (64, 200, 31)]
    thresholds = [torch.tensor(0.3, device=DEVICE), torch.rand(70, device=DEVICE),
                  torch.tensor(0.9, device=DEVICE)]
    parts = fused.joint_gemv(x, weights, thresholds).split([64, 200, 31], dim=1)
    expected = [(x * kernel.kept(x, threshold)) @ weight
                for weight, threshold in zip(weights, thresholds)]
    for part, product in zip(parts, expected):
        assert close(part, product, 2**-7)
    up = torch.randn(70, 64, device=DEVICE)
    y = fused.joint_gemv(x, [weights[0], up], thresholds[:2], gated=True)
    assert close(y, F.silu(expected[0]) * ((x * kernel.kept(x, thresholds[1])) @ up), 2**-6)


@NO_TRITON
@pytest.mark.parametrize("bits", [8, 4])
def test_joint_products_of_codes_equal_their_members(bits):
    torch.manual_seed(0)
    x = 0.1 * torch.randn(3, 64, device=DEVICE)
    weights = [quantize.quantize_weight(torch.randn(out, 64), bits, 64).to(DEVICE)
               for out in (40, 130, 7, 130)]
    thresholds = [torch.tensor(value, device=DEVICE) for value in (0.0, 0.05, 0.1, 0.1)]
    alone = [quantize.codes_gemv(x, weight, threshold, "triton")
             for weight, threshold in zip(weights, thresholds)]
    parts = fused.joint_gemv(x, weights[:3], thresholds[:3]).split([40, 130, 7], dim=1)
    for part, product in zip(parts, alone):
        assert close(part, product, 2**-7)
    y = fused.joint_gemv(x, weights[1::2], thresholds[1::2], gated=True)
    assert close(y, F.silu(alone[1]) * alone[3], 2**-6)


@NO_TRITON
def test_joint_products_refuse_what_does_not_go_together():
    x = torch.randn(1, 64, device=DEVICE)
    thresholds = [torch.tensor(0.0, device=DEVICE)] * 2
    eight, four = (quantize.quantize_weight(torch.randn(33, 64), bits, 64).to(DEVICE)
                   for bits in (8, 4))
    for weights in ([eight, four], [eight, torch.randn(64, 33, device=DEVICE)]):
        with pytest.raises(ValueError, match="expected all of one kind"):
            fused.joint_gemv(x, weights, thresholds)
    weights = [torch.randn(64, 33, device=DEVICE), torch.randn(64, 32, device=DEVICE)]
    with pytest.raises(ValueError, match="gate has 33 outputs, up has 32"):
        fused.joint_gemv(x, weights, thresholds, gated=True)


def sparse_model(bits=None, **changes):
    """Return a small Llama on DEVICE whose linears drop what is below 0.3."""
    model = tiny_model(**changes)
    if bits:
        quantize.quantize(model, bits, 32)
    return sparsify(model.to(DEVICE), dict.fromkeys(linear_names(model.config), 0.3))


def is_fused(model):
    block = model.model.layers[1]
    types = type(block.self_attn), type(block.mlp)
    assert types in ((fused.FusedAttention, fused.FusedMLP), (llama.Attention, llama.MLP))
    return types[0] is fused.FusedAttention


class Launches:
    """Counts calls of joint_gemv."""

    def __init__(self, monkeypatch):
        self.count = 0
        monkeypatch.setattr(fused, "joint_gemv", self.joint_gemv)

    def joint_gemv(self, *arguments, original=fused.joint_gemv):
        self.count += 1
        return original(*arguments)

    def of(self, block, x):
        """Return how many there are for qkv and gated of a block."""
        self.count = 0
        block.self_attn.qkv(x)
        block.mlp.gated(x)
        return self.count


def decode_input(model, rows=2, T=1):
    """Return an input (rows, T, hidden) of a block, in a call of T tokens."""
    generator = torch.Generator().manual_seed(1)
    model.sparse_state.tokens = T
    return torch.randn(rows, T, 64, generator=generator).to(DEVICE)


@NO_TRITON
@torch.no_grad()
@pytest.mark.parametrize("bits, biased", [(None, False), (None, True), (8, False), (4, False)])
def test_a_fused_model_computes_and_counts_what_the_model_does(bits, biased, monkeypatch):
    model = sparse_model(bits, attention_bias=biased)
    block = model.model.layers[1]
    x = decode_input(model)
    expected = [*block.self_attn.qkv(x), block.mlp.gated(x)]
    counts = model.sparse_state.counts.clone()
    assert is_fused(fused.fuse(model))
    reset_counts(model)
    launches = Launches(monkeypatch)
    ys = [*block.self_attn.qkv(x), block.mlp.gated(x)]
    assert launches.count == 2
    for y, product in zip(ys, expected):
        assert y.shape == product.shape and close(y, product, 2**-6)
    assert counts.sum() > 0 and torch.equal(model.sparse_state.counts, counts)
    model.sparse_state.counting = False
    block.self_attn.qkv(x)
    assert torch.equal(model.sparse_state.counts, counts)


@NO_TRITON
@torch.no_grad()
@pytest.mark.parametrize("T, head_dim", [(1, 16), (3, 16), (1, 24)])
def test_a_fused_step_rotates_and_appends_as_the_model_does(T, head_dim, monkeypatch):
    model = sparse_model(head_dim=head_dim)
    tokens = tokens_like(model, 1, 5 + T).to(DEVICE)
    results = []
    for _ in range(2):
        cache = model.make_cache(1, 12)
        with sparse_mode(model, "off"):
            model(tokens[:, :5], cache)
        static = StaticCache(cache, T)
        static.follow(cache, T, None)
        launches = Launches(monkeypatch)
        with sparse_mode(model, "all"):
            results.append([model(tokens[:, 5:], static), cache.keys, cache.values])
        fused.fuse(model)
    assert launches.count == 2 * 3                         # of the second, for each block
    for y, expected in zip(*reversed(results)):
        assert close(y, expected, 2**-6)


@NO_TRITON
@torch.no_grad()
def test_a_fused_model_decodes_and_can_be_made_sparse_later():
    model = fused.fuse(tiny_model().to(DEVICE))
    assert is_fused(model)
    tokens = tokens_like(model, 1, 3).to(DEVICE)
    cache = model.make_cache(1, 4)
    model(tokens[:, :2], cache)
    dense = model(tokens[:, 2:], cache)
    sparsify(model, dict.fromkeys(linear_names(model.config), 0.0))
    cache.used = 2
    assert close(model(tokens[:, 2:], cache), dense, 0.05)
    assert is_fused(fused.fuse(model))                     # twice is as once


@NO_TRITON
@torch.no_grad()
def test_what_does_not_fit_a_launch_is_not_fused(monkeypatch):
    launches = Launches(monkeypatch)
    model = fused.fuse(sparse_model())
    block = model.model.layers[0]
    assert launches.of(block, decode_input(model)) == 2
    assert launches.of(block, decode_input(model, T=2)) == 0           # a prompt is dense
    assert launches.of(block, decode_input(model, rows=9)) == 0
    with sparse_mode(model, "off"):
        assert launches.of(block, decode_input(model)) == 0
    with sparse_mode(model, "all"):
        assert launches.of(block, decode_input(model, T=2)) == 2
    with sparse_mode(model, "all", dense_prefix=1):
        assert launches.of(block, decode_input(model, T=2)) == 0
    seen = []
    block.mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    assert launches.of(block, decode_input(model)) == 1 and seen       # who looks on sees it
    sparsify(model, {"model.layers.0.self_attn.k_proj": None})         # not all three are sparse
    assert launches.of(block, decode_input(model)) == 0
    codes = quantize.quantize_weight(block.self_attn.v_proj.weight, 8)
    other = model.model.layers[1]
    mixed = quantize.QuantizedLinear(codes.to(DEVICE))
    mixed.state, mixed.threshold = other.self_attn.v_proj.state, other.self_attn.v_proj.threshold
    mixed.kept, mixed.seen = other.self_attn.v_proj.kept, other.self_attn.v_proj.seen
    other.self_attn.v_proj = mixed
    assert launches.of(other, decode_input(model)) == 1                # gate and up
    biased = fused.fuse(sparse_model(mlp_bias=True))
    assert launches.of(biased.model.layers[0], decode_input(biased)) == 1


def test_without_a_gpu_nothing_is_fused(monkeypatch):
    monkeypatch.setattr(fused, "is_interpreted", lambda: False)
    assert not is_fused(fused.fuse(tiny_model()))
    monkeypatch.setattr(fused, "triton", None)
    assert not is_fused(fused.fuse(tiny_model()))


def qkv(self, x):
    """Return projections that have been normed."""
    return F.normalize(self.q_proj(x)), self.k_proj(x), self.v_proj(x)


def same_qkv(self, x):
    """Return the same as ever, under another comment."""
    return (self.q_proj(x), self.k_proj(x),
            self.v_proj(x))                                # in other lines


def gated(self, x):
    return self.activation(self.gate_proj(x)) * self.up_proj(x) * 2


@NO_TRITON
@pytest.mark.parametrize("owner, name, changed", [
    (llama.Attention, "qkv", qkv), (llama.MLP, "gated", gated),
    (llama, "rotate", lambda x, cos, sin: x), (StaticCache, "append", lambda *inputs: inputs[2:]),
    (SparseLinear, "product", lambda self, x: self.dense(x)),
    (SparseLinear, "sparse", eval("lambda self, x: self.dense(x)"))])
def test_a_changed_model_is_left_alone_and_named(owner, name, changed, monkeypatch, capsys):
    monkeypatch.setattr(owner, name, changed)
    assert not is_fused(fused.fuse(tiny_model().to(DEVICE)))
    line, = capsys.readouterr().err.splitlines()
    assert "fused.py steps aside" in line and f"{owner.__name__}.{name}" in line


@NO_TRITON
def test_another_activation_or_module_is_left_alone_and_named(monkeypatch, capsys):
    model = tiny_model().to(DEVICE)
    model.model.layers[2].mlp.activation = F.gelu
    assert not is_fused(fused.fuse(model))
    assert "the activation of model.layers.2.mlp is not" in capsys.readouterr().err
    model = tiny_model().to(DEVICE)
    model.model.layers[0].self_attn.__class__ = type("Other", (llama.Attention,), {})
    assert not is_fused(fused.fuse(model))
    assert "model.layers.0.self_attn is not" in capsys.readouterr().err
    model = tiny_model().to(DEVICE)
    model.model.layers[2].mlp.gated = lambda x: x
    assert not is_fused(fused.fuse(model))
    assert "model.layers.2.mlp is not" in capsys.readouterr().err


@NO_TRITON
def test_comments_and_layout_are_no_change(monkeypatch, capsys):
    monkeypatch.setattr(llama.Attention, "qkv", same_qkv)
    assert is_fused(fused.fuse(tiny_model().to(DEVICE)))
    assert not capsys.readouterr().err


COMPILE = r"""
from beyond import design, fused

for pointer, bits, rows, capability in [
        ("*fp32", 0, 8, 80), ("*fp16", 0, 1, 80), ("*bf16", 8, 1, 80), ("*bf16", 4, 8, 80),
        ("*bf16", 0, 1, 90), ("*bf16", 8, 8, 90), ("*bf16", 4, 1, 90)]:
    for gated in (False, True):
        built = design.compiled(fused.joint_product_kernel, pointer, capability, bits, ROWS=rows,
                             BITS=bits, GATED=gated, STEP=1, SPAN=128 if bits == 4 else 512,
                             **design.tile_of(pointer, bits))
        print(built.instructions, built.spills, built.wide, sep="\t")
for pointer, D in (("*bf16", 128), ("*fp32", 96)):
    built = design.compiled(fused.rotate_kernel, pointer, 90, D=D, HALF=64)
    print(built.instructions, built.spills, sep="\t")
"""


@NO_TRITON
def test_triton_kernels_compile_for_gpus_that_are_not_here():
    ended = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True,
                           text=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert ended.returncode == 0, ended.stderr
    rows = [[int(number) for number in line.split("\t")] for line in ended.stdout.splitlines()]
    assert len(rows) == 14 + 2
    for instructions, spills, *wide in rows:
        assert instructions > 50 and spills == 0
        assert not wide or wide[0] >= 4  # a thread's share of a tile of weights, 16 bytes a load


# --------------------------------------------------------------------------------------------------
# rotate.py

@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_checkpoint_is_the_same_function(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    tokens = tokens_like(model, 1, 12)
    save_sharded(model, tmp_path / "plain")
    windows = windows_of(tokens_like(model, 600), 20)
    Q, R = map(rotate.principal_directions, rotate.covariances(model, windows))
    assert close(Q.T @ Q, torch.eye(64), 1e-12)
    rotate.rotate(tmp_path / "plain", tmp_path / "turned", Q, R)
    turned = Llama.from_pretrained(tmp_path / "turned")
    assert close(turned(tokens), model(tokens), 1e-5) and not turned.config.tie_word_embeddings
    assert (turned.model.norm.weight == 1).all()
    # In the new basis the directions are uncorrelated, and the first carries the most.
    stream, heads = rotate.covariances(turned, windows)
    assert close(stream, stream.diag().diag(), 1e-4)
    assert (stream.diag().diff() <= 1e-3 * stream.max()).all()
    assert close(heads, torch.diag_embed(heads.diagonal(dim1=-2, dim2=-1)), 1e-4)
    with pytest.raises(InputError, match="exists already"):
        rotate.rotate(tmp_path / "plain", tmp_path / "turned", Q, R)
    with pytest.raises(InputError, match="the text is too short"):
        rotate.principal_directions(rotate.covariances(model, windows[:1, :7])[0])


REFERENCES = {               # what is special: settings of transformers' configuration
    "plain": {},
    "grouped heads, explicit head_dim": {"num_key_value_heads": 2, "head_dim": 24},
    "tied head": {"tie_word_embeddings": True},
    "attention biases": {"attention_bias": True, "num_key_value_heads": 2},
    "MLP biases": {"mlp_bias": True},
    "llama3 rope": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    "mistral, sliding window": {"num_key_value_heads": 2, "sliding_window": 7},
}


def reference(folder, transformers, kind, settings):
    """Save a small random model of transformers to `folder`, and return it in eval mode."""
    numbers = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
               "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 101,
               "max_position_embeddings": 128,
               "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = getattr(transformers, f"{kind}Config")(**numbers | settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        scale = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
        parameter.copy_(torch.randn(parameter.shape) * scale + ("norm" in name))
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("what", REFERENCES)
def test_a_rotated_checkpoint_is_the_same_in_transformers(tmp_path, what):
    transformers = pytest.importorskip("transformers", reason="see requirements-dev.txt")
    kind = "Mistral" if "mistral" in what else "Llama"
    theirs = reference(tmp_path / "plain", transformers, kind, REFERENCES[what])
    ours = Llama.from_pretrained(tmp_path / "plain")
    windows = windows_of(tokens_like(ours, 32 * 12 + 1), 32)
    for source, out in (("plain", "once"), ("once", "twice")):
        model = Llama.from_pretrained(tmp_path / source)
        Q, R = map(rotate.principal_directions, rotate.covariances(model, windows))
        rotate.rotate(tmp_path / source, tmp_path / out, Q, R, torch.float32)
    tokens = tokens_like(ours, 2, 40)
    expected = theirs(tokens).logits
    for out in ("once", "twice"):
        assert close(Llama.from_pretrained(tmp_path / out)(tokens), expected, 1e-4)
        again = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(
            tmp_path / out, dtype=torch.float32)
        assert close(again(tokens).logits, expected, 1e-4)


@torch.no_grad()
def test_a_head_that_is_tied_in_name_only_stays_what_it_is(tmp_path):
    model = tiny_model()
    plain = tmp_path / "plain"
    model.save_pretrained(plain)
    write_json(plain / "config.json",
               read_json(plain / "config.json") | {"tie_word_embeddings": True})
    windows = windows_of(tokens_like(model, 200), 20)
    Q, R = map(rotate.principal_directions, rotate.covariances(model, windows))
    rotate.rotate(plain, tmp_path / "turned", Q, R)
    quantize.quantize_folder(plain, tmp_path / "small", 8)
    tokens = tokens_like(model, 1, 12)
    for folder, tolerance in [("turned", 1e-5), ("small", 0.1)]:
        assert close(Llama.from_pretrained(tmp_path / folder)(tokens), model(tokens), tolerance)
        assert read_json(tmp_path / folder / "config.json")["tie_word_embeddings"] is False


def test_rotate_writes_a_folder_like_any_other(tmp_path, monkeypatch, capsys):
    out = tmp_path / "turned"
    command(monkeypatch, rotate.main, "--out", out, "--text", ROOT / "generate.py",
            "--tokens", 1600, "--dtype", "bfloat16")
    said = capsys.readouterr().out
    assert float(re.search(r"by (\S+) relative", said)[1]) < 0.05
    assert (out / "tokenizer.model").read_bytes() == (DEMO / "tokenizer.model").read_bytes()
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    model, _ = load_model(out)
    assert model.dtype == torch.bfloat16 and not folders.is_quantized(out)
