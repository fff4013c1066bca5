"""Tests of codes.py, quantize.py and lab/bits.py: weights of 8 and 4 bits, and their products."""
import functools
import random
import shutil

import pytest
import torch
import torch.nn.functional as F

import kernel
from beyond import __main__ as fast
from beyond import allocate, codes, folders, quantize, record, rotate
from beyond.lab import bits as lab_bits
from beyond.lab.timing import random_codes
from beyond.tests import conftest
from beyond.tests.conftest import (DEVICE, NO_COMPILER, ROOT, close, refused, thresholds_of,
                                   tokens_like)
from model import DEMO, linear_names, read_json, read_safetensors, write_json, write_safetensors
from sparsify import SparseLinear, sparse_mode, sparsify

INTERPRETED = DEVICE.type == "cpu"
BOTH = pytest.mark.parametrize("bits", [8, 4])
# C with activations as they are, rounded, and rounded with AVX2 alone
IN_C = [pytest.param(name, marks=NO_COMPILER) for name in ("c", "c-bytes", "c-avx2")]
PRODUCTS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(kernel.triton is None,
                                                                     reason="no Triton")), *IN_C]
tiny_model = functools.partial(conftest.tiny_model, hidden_size=64, intermediate_size=96,
                               head_dim=16)


@pytest.fixture
def backend(request, monkeypatch):
    """Return a backend's name, a device and the rest of the name, of which kind codes-c is."""
    name, _, kind = request.param.partition("-")
    monkeypatch.setattr(codes, "ROUND_ACTIVATIONS", bool(kind))
    if kind == "avx2":
        monkeypatch.setattr(codes, "C_SOURCE", "#undef __AVX512VNNI__\n#undef __AVXVNNI__\n"
                                               + codes.C_SOURCE)
        monkeypatch.setattr(codes, "c_library", codes.c_library.__wrapped__)
    return name, DEVICE if name == "triton" else torch.device("cpu"), kind


# --------------------------------------------------------------------------------------------------
# Codes, and rounding

@BOTH
def test_codes_are_packed_and_unpacked(bits):
    values = torch.randint(1 << bits, (5, 203), generator=torch.Generator().manual_seed(bits))
    words = codes.pack_codes(values, bits)
    assert words.dtype == torch.int32
    assert torch.equal(codes.unpack_codes(words, bits, 203).long(), values)
    # The layout that is written down: bits 4k.. (8k..) of word w of a block are output 16k + w.
    for output in (0, 17, 100, 202):
        block, inside = divmod(output, 16 * 32 // bits)
        word = int(words[3, 16 * block + inside % 16])
        assert word >> bits * (inside // 16) & (1 << bits) - 1 == values[3, output]


def test_rounding_is_to_nearest_and_clipping_helps(monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(700, 256)                                              # (out, in)
    eight = codes.quantize_weight(weight, 8)
    assert ((eight.t() - weight).abs() <= 0.5001 * eight.scales[:, None]).all()
    plain = codes.quantize_weight(weight, 4, 64, clipping=(1.0,))
    clipped = codes.quantize_weight(weight, 4, 64)
    step = plain.scales.float().repeat_interleave(64, 0).t()                    # (out, in)
    assert ((plain.t() - weight).abs() <= 1.01 * step).all()        # half, and the zero's half
    errors = [(each.t() - weight).square().unflatten(1, (-1, 64)).sum(2)
              for each in (clipped, plain)]
    assert (errors[0] <= errors[1] + 1e-6).all() and errors[0].sum() < 0.95 * errors[1].sum()
    monkeypatch.setattr(codes, "AT_ONCE", 256)             # a head is rounded in parts
    for whole, bits in ((eight, 8), (clipped, 4)):
        parts = codes.quantize_weight(weight, bits, 64)
        assert all(torch.equal(a, b) for a, b in zip(parts.buffers(), whole.buffers(), strict=True))
        for value in (0.0, 0.37):                          # all on one side
            constant = torch.full((3, 64), value)
            assert close(codes.quantize_weight(constant, bits, 64).t(), constant, 0.01)


# --------------------------------------------------------------------------------------------------
# Products

def quantized_case(seed):
    """Return (x, QuantizedWeight, threshold): random codes of either kind, odd shapes."""
    pick = random.Random(seed).choice
    torch.manual_seed(seed)
    bits = pick([8, 4])
    channels = pick([1, 37, 300, 600] if bits == 8 else [32, 64, 96, 128, 384])
    weight = random_codes(channels, pick([1, 30, 64, 129, 200]), bits, "cpu", 0.1)
    x = torch.randn(pick(range(1, 9)), channels)
    x = x.to(pick([torch.float32, torch.bfloat16, torch.float16]))
    return x, weight, pick([0.0, 0.5, 1e9, -1.0, 1.5 * torch.rand(channels)])


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


@pytest.mark.parametrize("backend", PRODUCTS, indirect=True)
def test_products_of_codes_against_float64(backend):
    backend, device, _ = backend
    interpreted = backend == "triton" and INTERPRETED
    for seed in range(12 if interpreted else 100):
        x, weight, threshold = quantized_case(seed)
        kept = x.double() * kernel.kept(x.double(), torch.as_tensor(threshold).double())
        exact = weight.dequantized(torch.float64)
        if backend == "c" and codes.rounds(weight):
            kept = as_bytes(kept, weight.group or codes.SPAN)
        threshold = threshold.to(device) if isinstance(threshold, torch.Tensor) else threshold
        y = codes.codes_gemv(x.to(device), weight.to(device), threshold, backend).cpu()
        assert y.dtype == x.dtype
        # Codes are summed before they are scaled: rounding is proportional to the codes' range.
        scales = weight.scales.cpu().double().view(-1, y.shape[1]).amax(0)
        scale = kept.abs().sum(1, keepdim=True) * scales * (1 << weight.bits - 1)
        allowed = {torch.float32: 2**-13, torch.float16: 2**-9, torch.bfloat16: 2**-7}[x.dtype]
        allowed = max(allowed, 2**-7 * interpreted)
        assert ((y.double() - kept @ exact).abs() <= allowed * scale + 1e-30).all(), seed
        for value in (float("nan"), float("inf")):         # show in their row alone
            x[0, 0] = value
            y = codes.codes_gemv(x.to(device), weight.to(device), threshold, backend)
            assert not y[0].isfinite().any() and y[1:].isfinite().all()


@pytest.mark.parametrize("backend", IN_C, indirect=True)
@BOTH
def test_threads_share_outputs_or_channels(bits, backend, monkeypatch):
    """More outputs than a thread has room for, or few; spans without a channel."""
    torch.manual_seed(0)
    wide, narrow = (codes.quantize_weight(torch.randn(shape), bits, 32, clipping=(1.0,))
                    for shape in ((9000, 640), (700, 8960)))
    for weight, rows, threads in [(wide, 1, 1), (wide, 1, 3), (wide, 7, 2), (narrow, 1, 2),
                                  (narrow, 1, 3), (narrow, 8, 2)]:
        exact = weight.dequantized(torch.float64)
        monkeypatch.setattr(kernel, "THREADS", threads)
        x = torch.randn(rows, len(exact))
        x[:, 100:500] = 0
        y = codes.codes_gemv(x, weight, 0.5, "c")
        expected = (x * kernel.kept(x, torch.tensor(0.5))).double() @ exact
        assert close(y, expected, 2**-7 if codes.rounds(weight) else 1e-5)
        assert torch.equal(y, codes.codes_gemv(x, weight, 0.5, "c"))


@pytest.mark.parametrize("backend", IN_C, indirect=True)
@BOTH
def test_activations_are_rounded_where_it_is_said(bits, backend):
    torch.manual_seed(0)
    weight = codes.quantize_weight(torch.randn(256, 1024), bits, 128)
    x = torch.randn(1, 1024) * torch.randn(1024).exp()     # as activations are, of many sizes
    exact = x.double() @ weight.dequantized(torch.float64)
    error = (codes.codes_gemv(x, weight, -1.0, "c") - exact).norm() / exact.norm()
    said = codes.instructions("cpu", bits)
    assert 1e-4 < error < 0.008 if "rounded to 8 bits" in said else error < 1e-6
    assert backend[2] or "plain C" in said
    assert backend[2] != "avx2" or "AVX-" not in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@torch.enable_grad()
def test_dense_products_of_any_length(dtype):
    weight = codes.quantize_weight(torch.randn(40, 96), 4, 32)
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-5)
    if dtype != torch.float64 and codes.rounds(weight):
        tolerance = 2**-6
    exact = weight.dequantized(torch.float64)
    for rows in (1, 3, 8, 11, 64, 70):
        x = torch.randn(1, rows, 96).to(dtype)
        y = codes.codes_dense(x, weight)
        assert y.dtype == dtype and close(y, x.double() @ exact, tolerance)
        x.requires_grad_(True)
        codes.codes_dense(x, weight).sum().backward()
        assert close(x.grad, exact.sum(1).expand(x.shape), 0.01)


def test_products_refuse_what_does_not_fit():
    weight = codes.quantize_weight(torch.randn(33, 64), 8)
    for x in (torch.randn(1, 32), torch.randn(9, 64), torch.ones(1, 64, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"expected floating point \(\.\.\., 64\) of 1 to 8"):
            codes.codes_gemv(x, weight, 0.0)


# --------------------------------------------------------------------------------------------------
# Models

@BOTH
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-3)])
@pytest.mark.parametrize("tied, head_bits", [(False, 16), (True, 8), (False, 8), (True, 4)])
def test_a_quantized_model_is_the_model_of_its_rounded_weights(bits, dtype, tolerance, tied,
                                                               head_bits, monkeypatch):
    monkeypatch.setattr(codes, "ROUND_ACTIVATIONS", False)
    model = tiny_model(tie_word_embeddings=tied)
    codes.quantize(model, bits, 32, head_bits=head_bits).to(dtype)     # no code is changed
    rounded = tiny_model(dtype, tie_word_embeddings=tied)
    names = linear_names(model.config)
    for name in [*names, "lm_head", "model.embed_tokens"]:
        rounded.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
    every = torch.arange(model.config.vocab_size)[None]
    assert torch.equal(model.embed(every)[0], rounded.model.embed_tokens.weight)
    assert isinstance(model.lm_head, SparseLinear) == (head_bits < 16)
    assert torch.equal(model.embed(every)[0].float(), model.lm_head.weight.float()) == tied
    tokens = tokens_like(model, 1, 12)
    dense = model(tokens)
    assert close(dense, rounded(tokens), tolerance)
    # In float32 rounding would move inputs over their thresholds. There nothing is dropped, but the
    # kernel does the work.
    exact = dtype == torch.float64
    for each in (model, rounded):
        sparsify(each, {name: 0.3 + 0.01 * i if exact else 0.0 for i, name in enumerate(names)})
    with sparse_mode(model, "all"), sparse_mode(rounded, "all"):
        for count in (12, 5):                              # few: the kernel
            assert close(model(tokens[:, :count]), rounded(tokens[:, :count]), tolerance)
        caches = [each.make_cache(1, 12) for each in (model, rounded)]
        for token in tokens.split(1, dim=1):
            assert close(model(token, caches[0]), rounded(token, caches[1]), tolerance)
        assert close(model(tokens), dense, 0.01) != exact
    with sparse_mode(model, "off"):
        assert torch.equal(model(tokens), dense)


@NO_COMPILER
@BOTH
def test_steps_of_a_quantized_model_are_recorded(bits):
    model = codes.quantize(tiny_model(torch.bfloat16), bits, 32)
    sparsify(model, thresholds_of(model, 0.3, lm_head=None))
    model.sparse_state.thresholds.fill_(-1)                # rounding moves inputs
    token = tokens_like(model, 1, 1)
    for mode in ("off", "decode"):
        with sparse_mode(model, mode):
            cache = model.make_cache(1, 9)
            step = record.make_step(model, cache)
            recorded = step(token).clone()
            cache.used = 0
            assert close(recorded, model(token, cache), 0.03)
            tape, = step.tapes.values()
            assert sum(callable(note) for note in tape.notes) < 24    # the products are in C


# --------------------------------------------------------------------------------------------------
# Folders and commands

def load(folder):
    """Return the model of a folder without a tokenizer."""
    return folders.in_memory(folders.mapped(folder))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits, head_bits", [(8, 16), (4, 16), (8, 8), (4, 8), (8, 4)])
def test_quantized_folder(tmp_path, bits, head_bits, tied):
    model = tiny_model(tie_word_embeddings=tied)
    plain, small = tmp_path / "plain", tmp_path / "small"
    model.save_pretrained(plain)
    measures = quantize.quantize_folder(plain, small, bits, head_bits=head_bits)
    loaded = load(small)
    codes.quantize(model, bits, head_bits=head_bits)
    tokens = tokens_like(model, 2, 9)
    assert torch.equal(loaded(tokens), model(tokens))
    head = {"model.embed_tokens"} if tied else {"model.embed_tokens", "lm_head"}
    assert set(measures) == {*linear_names(model.config), *(head if head_bits < 16 else ())}
    assert max(error for error, _, _ in measures.values()) < 0.15
    # What other versions of this program read, and wrote.
    parts = ["codes", "scales"] if bits == 8 else ["codes", "scales", "zeros"]
    names = read_safetensors(small / "model.safetensors").keys()
    assert {f"model.layers.1.mlp.up_proj.weight_t.{part}" for part in parts} <= names
    settings = {"quant_method": "minteal", "version": 2, "bits": bits, "head_bits": head_bits,
                "group": 32 if 4 in (bits, head_bits) else None}
    config = read_json(small / "config.json")
    assert config["quantization_config"] == loaded.quantization == settings
    if head_bits == 16:                  # as version 1 wrote it
        before = {"quant_method": "minteal", "version": 1, "bits": bits, "group": settings["group"]}
        write_json(small / "config.json", config | {"quantization_config": before})
        assert torch.equal(load(small)(tokens), model(tokens))


@pytest.mark.parametrize("hidden, middle, group", [
    (128, 384, 128), (96, 288, 96), (96, 160, 32), (64, 192, 64), (64, 96, 32), (288, 768, 96)])
def test_groups_fit_the_inputs(hidden, middle, group):
    model = tiny_model(hidden_size=hidden, intermediate_size=middle, head_dim=hidden // 4)
    assert codes.fitting_group(model) == group


def test_what_cannot_be_quantized(tmp_path):
    model = tiny_model()
    plain, small = tmp_path / "plain", tmp_path / "small"
    model.save_pretrained(plain)
    quantize.quantize_folder(plain, small, 8)
    codes.quantize(model, 8)
    for message, act in [
            ("exists already", lambda: quantize.quantize_folder(plain, small, 8)),
            ("quantized or sparse already", lambda: codes.quantize(model, 8)),
            ("rotate first", lambda: rotate.rotate(small, tmp_path / "x", None, None)),
            ("bits is 5", lambda: codes.quantize(tiny_model(), 5)),
            ("q_proj: groups of 48", lambda: codes.quantize(tiny_model(), 4, 48)),
            ("down_proj: groups of 64", lambda: codes.quantize(tiny_model(), 4, 64))]:
        with refused(match=message):
            act()
    config = read_json(small / "config.json")
    for changes in ({"version": 3}, {"bits": 3}, {"head_bits": 2}, {"bits": 4, "group": 40},
                    {"bits": 4, "group": "40"}, {"quant_method": "awq"}):
        settings = config["quantization_config"] | changes
        write_json(small / "config.json", config | {"quantization_config": settings})
        with refused(match="quantization_config is .*, expected|quantization_config is .*: "):
            load(small)


def test_a_rewriting_that_fails_leaves_nothing(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    good = {name: tensor.clone() for name, tensor in read_safetensors(path).items()}
    up = "model.layers.2.mlp.up_proj.weight"
    for tensor, message in [(torch.full_like(good[up], float("nan")), "up_proj.weight: holds NaN"),
                            (None, "tensors are missing"),
                            (torch.ones(7), r"float32 \[7\]")]:
        tensors = {name: tensor if name == up else values for name, values in good.items()}
        write_safetensors(path, {key: value for key, value in tensors.items() if value is not None})
        with refused(match=message):
            quantize.quantize_folder(tmp_path, tmp_path / "out", 8)
        assert {each.name for each in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_the_commands_take_a_quantized_folder(tmp_path, run):
    small = tmp_path / "small"
    out = run(quantize, "--bits", 4, "--out", small)
    assert "int4, groups of 128: the blocks' linears" in out and f"{small}: written" in out
    already = "small: is quantized already"
    assert already in run.refused(quantize, "--model", small)
    run(allocate, "--model", small, "--text", ROOT / "generate.py", "--tokens", 300, "--context",
        64, "--no-gradients")
    options = ["--max-new-tokens", 8, "--prompt", "class Stack:"]
    for more in (["--model", small, "--sparsity", 0.5, "--draft", "sparse", "--compare"],
                 ["--quantize", "int8", "--head-bits", 4, "--sparsity", 0.5]):
        assert "8 tokens" in run(fast, *options, *more)
    assert already in run.refused(fast, "--model", small, "--quantize", "int8")


def test_the_tables(tmp_path, monkeypatch, run):
    """Of a model this small on random text: sizes and errors, and bits against sparsity."""
    model = tiny_model(vocab_size=4096, max_position_embeddings=512)
    model.save_pretrained(tmp_path)
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    options = ["--model", tmp_path, "--group", 32]
    rows = run(quantize, *options).splitlines()
    assert [row for row in rows if row.startswith("int")] == [
        "int8: the blocks' linears 0.4 MB -> 0.1 MB",
        "int4, groups of 32: the blocks' linears 0.4 MB -> 0.1 MB"]
    assert rows[1].startswith("model.embed_tokens and lm_head: 2.1 MB -> 0.6 MB, relative error 0.")
    assert len(rows) == 2 * (4 + 3)
    monkeypatch.setattr(lab_bits, "read_tokens", lambda *_: (tokens_like(model, 1000), "random"))
    monkeypatch.setattr(lab_bits, "LEVELS", (0.5,))
    out = run(lab_bits, *options, "--head-bits", 16, "--tokens", 520)
    rows = [row.split() for row in out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[bits, level] for bits in ("16", "8", "4")
                                         for level in ("0%", "50%")]
    whole = 2 * sum(model.get_submodule(name).weight.numel() for name in linear_names(model.config))
    assert 2 * model.lm_head.weight.numel() + whole < 1e6 * float(rows[0][5])           # MB a token
    assert float(rows[0][5]) > float(rows[2][5]) > float(rows[4][5])


def test_what_rounding_the_activations_adds(run):
    out = run(lab_bits, "--rounding", "--tokens", 600, "--held-out", ROOT / "kernel.py")
    rows = [row.split() for row in out.splitlines()[3:]]
    assert [row[:2] for row in rows] == [[bits, level] for bits in "84"
                                         for level in ("0%", "50%", "65%")]
    kl = [float(row[3]) for row in rows]
    assert 0 < kl[0] < kl[1] < kl[2] and kl[0] < kl[3]     # fewer bits and weights cost more
    rounds = codes.rounds(codes.quantize_weight(torch.randn(64, 32), 8))
    assert all((row[3] != row[5]) == rounds for row in rows)
    assert codes.ROUND_ACTIVATIONS
