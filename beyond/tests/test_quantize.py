"""Tests of codes.py, quantize.py and lab/bits.py: weights of 8 and 4 bits, and their products."""
import functools
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import generate
import kernel
from beyond import __main__ as fast
from beyond import allocate, codes, folders, quantize, record, rotate
from beyond.lab import bits as lab_bits
from beyond.tests import conftest
from beyond.tests.conftest import (DEVICE, NO_COMPILER, ROOT, close, refused, thresholds_of,
                                   tokens_like)
from calibrate import calibrate
from model import DEMO, linear_names, read_json, read_safetensors, write_json, write_safetensors
from sparsify import SparseLinear, counted, realised_sparsity, sparse_mode, sparsify

INTERPRETED = DEVICE.type == "cpu"
BOTH = pytest.mark.parametrize("bits", [8, 4])
# The C: activations as they are, rounded, and rounded with AVX2 alone.
VARIANTS = {"c": (False, False), "c-bytes": (True, False), "c-narrow": (True, True)}
PRODUCTS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(kernel.triton is None,
                                                                     reason="no Triton")),
            *(pytest.param(name, marks=NO_COMPILER) for name in VARIANTS)]
SHAPE = dict(hidden_size=64, intermediate_size=96, head_dim=16)
tiny_model = functools.partial(conftest.tiny_model, **SHAPE)


@pytest.fixture
def backend(request, monkeypatch):
    """Make codes-c what `backend` names, one of VARIANTS; return a backend's name, a device."""
    if request.param in VARIANTS:
        library = functools.partial(codes.c_library)
        monkeypatch.setattr(codes, "c_library",
                            lambda bits, _: library(bits, *VARIANTS[request.param]))
    name = request.param.split("-")[0]
    return name, DEVICE if name == "triton" else torch.device("cpu")


def error_of(quantized, weight):
    """Return the error (out, in) of a QuantizedWeight of a weight (out, in)."""
    return quantized.dequantized(torch.float32).t() - weight


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


def test_rounding_is_to_nearest_and_clipping_helps():
    torch.manual_seed(0)
    weight = torch.randn(96, 256)                                               # (out, in)
    eight = codes.quantize_weight(weight, 8)
    assert (error_of(eight, weight).abs() <= 0.5001 * eight.scales[:, None]).all()
    plain = codes.quantize_weight(weight, 4, 64, clipping=(1.0,))
    clipped = codes.quantize_weight(weight, 4, 64)
    step = plain.scales.float().repeat_interleave(64, 0).t()                    # (out, in)
    assert (error_of(plain, weight).abs() <= 1.01 * step).all()        # half, and the zero's half
    errors = [error_of(each, weight).square().unflatten(1, (-1, 64)).sum(2)
              for each in (clipped, plain)]
    assert (errors[0] <= errors[1] + 1e-6).all() and errors[0].sum() < 0.95 * errors[1].sum()
    assert error_of(clipped, weight).norm() < 0.11 * weight.norm()
    assert error_of(eight, weight).norm() < 0.01 * weight.norm()


@BOTH
def test_a_head_is_rounded_in_parts_and_constant_weights_have_codes(bits, monkeypatch):
    weight = torch.randn(700, 64)
    whole = codes.quantize_weight(weight, bits, 32)
    monkeypatch.setattr(codes, "AT_ONCE", 256)
    parts = codes.quantize_weight(weight, bits, 32)
    assert parts.shape == whole.shape and parts.group == whole.group
    assert all(torch.equal(a, b) for a, b in zip(parts.buffers(), whole.buffers(), strict=True))
    for value in (0.0, 0.37):                              # all on one side
        constant = codes.quantize_weight(torch.full((3, 64), value), bits, 64)
        assert close(constant.dequantized(torch.float32), torch.full((64, 3), value), 0.01)


def test_what_cannot_be_quantized():
    for value in (float("nan"), float("inf")):
        with refused(match="this one: holds NaN or infinity"):
            codes.quantize_weight(torch.full((2, 32), value), 8, name="this one")
    for group, inputs in [(128, 192), (48, 96), (0, 64)]:
        with refused(match=f"groups of {group}"):
            codes.quantize_weight(torch.ones(2, inputs), 4, group)
    with refused(match="bits is 5"):
        codes.quantize_weight(torch.ones(2, 32), 5)
    model = tiny_model(intermediate_size=80)               # and nothing is changed
    with refused(match="layers.0.mlp.down_proj: groups of 32"):
        codes.quantize(model, 4, 32)
    assert not any(isinstance(module, SparseLinear) for module in model.modules())


# --------------------------------------------------------------------------------------------------
# Products

def quantized_case(seed):
    """Return (x, QuantizedWeight, threshold): random codes of either kind, odd shapes."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[torch.randint(len(choices), (), generator=generator)]
    bits = pick(8, 4)
    outputs = pick(1, 30, 64, 129, 200)
    group = pick(32, 64, 96, 128) if bits == 4 else None
    channels = group * pick(1, 2, 3) if group else pick(1, 37, 300, 600)
    words = codes.pack_codes(torch.randint(1, 1 << bits, (channels, outputs), generator=generator),
                             bits)
    if bits == 8:
        weight = codes.QuantizedWeight(words, 0.1 * torch.rand(outputs, generator=generator))
    else:
        scales = 0.1 * torch.rand(channels // group, outputs, generator=generator)
        zeros = torch.randint(16, scales.shape, generator=generator).to(torch.uint8)
        weight = codes.QuantizedWeight(words, scales.bfloat16(), zeros, group)
    x = torch.randn(pick(*range(1, 9)), channels, generator=generator)
    x = x.to(pick(torch.float32, torch.bfloat16, torch.float16))
    return x, weight, pick(0.0, 0.5, 1e9, -1.0, torch.rand(channels, generator=generator) * 1.5)


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
    backend, device = backend
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


@pytest.mark.parametrize("backend", PRODUCTS[2:], indirect=True)
@BOTH
def test_threads_share_many_outputs(bits, backend, monkeypatch):
    """More outputs than a thread has room for, spans without a channel, products worth threads."""
    torch.manual_seed(0)
    weight = codes.quantize_weight(torch.randn(9000, 640), bits, 32, clipping=(1.0,))
    exact = weight.dequantized(torch.float64)
    for rows, threads in [(1, 1), (1, 3), (7, 2)]:
        monkeypatch.setattr(kernel, "THREADS", threads)
        x = torch.randn(rows, 640)
        x[:, 100:500] = 0
        y = codes.codes_gemv(x, weight, 0.5, "c")
        expected = (x * kernel.kept(x, torch.tensor(0.5))).double() @ exact
        assert close(y, expected, 2**-7 if codes.rounds(weight) else 1e-5)
        assert torch.equal(y, codes.codes_gemv(x, weight, 0.5, "c"))


@NO_COMPILER
@BOTH
def test_activations_are_rounded_where_instructions_multiply_bytes(bits, monkeypatch):
    words = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    known = {"avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX-VNNI", "avx2": "AVX2",
             "asimddp": "NEON dot product"}
    named = [name for flag, name in known.items() if flag in words]
    if not named:
        pytest.skip("none that is known, or a system that does not say")
    # CC may have arguments that leave some of them out.
    assert any(codes.instructions("cpu", bits).startswith(f"C, {name}") for name in named)
    torch.manual_seed(0)
    weight = codes.quantize_weight(torch.randn(256, 1024), bits, 128)
    x = torch.randn(1, 1024) * torch.randn(1024).exp()     # as activations are, of many sizes
    exact = x.double() @ weight.dequantized(torch.float64)
    error = (codes.codes_gemv(x, weight, -1.0, "c") - exact).norm() / exact.norm()
    assert codes.rounds(weight) and 1e-4 < error < 0.008
    monkeypatch.setattr(codes, "ROUND_ACTIVATIONS", False)
    assert close(codes.codes_gemv(x, weight, -1.0, "c"), exact, 1e-6)


@pytest.mark.parametrize("backend", PRODUCTS, indirect=True)
@BOTH
def test_nan_and_outliers_stay_in_their_row(bits, backend):
    backend, device = backend
    generator = torch.Generator().manual_seed(0)
    weight = codes.quantize_weight(torch.randn(40, 64, generator=generator), bits, 64).to(device)
    x = 0.1 * torch.randn(3, 64, generator=generator).to(device)
    for value in (float("nan"), float("inf")):
        x[1, 5] = value
        y = codes.codes_gemv(x, weight, 0.05, backend)
        assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()
    x[1, 5] = 1500.0                     # leaves what the others add exact
    exact = weight.dequantized(torch.float64)
    outlier = x[1, 5].double() * exact[5]
    rest = x[1].double() @ exact - outlier
    y = codes.codes_gemv(x, weight, 0.0, backend)[1].double() - outlier
    bytes_of_x = backend == "c" and codes.rounds(weight)             # the outlier's eight is coarse
    if not (backend == "triton" and INTERPRETED or bytes_of_x):      # whose sums are bfloat16's
        assert (y - rest).abs().median() < 0.01 * rest.abs().median()


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
    for x, backend, message in [(torch.randn(1, 32), None, r"expected .*\("),
                                (torch.randn(9, 64), None, r"expected floating point \(1 to 8, "),
                                (torch.randn(1, 64), "cublas", "backend is .* not 'cublas'")]:
        with pytest.raises(ValueError, match=message):
            codes.codes_gemv(x, weight, 0.0, backend)


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
    skipped = []
    for each in (model, rounded):
        sparsify(each, {name: 0.3 + 0.01 * i if exact else 0.0 for i, name in enumerate(names)})
        with counted(each), sparse_mode(each, "all"):
            each(tokens)
        skipped.append(realised_sparsity(each))
    with sparse_mode(model, "all"), sparse_mode(rounded, "all"):
        for count in (12, 5):                              # few: the kernel
            assert close(model(tokens[:, :count]), rounded(tokens[:, :count]), tolerance)
        assert close(model(tokens), dense, 0.01) != exact
        caches = [each.make_cache(1, 12) for each in (model, rounded)]
        for token in tokens.split(1, dim=1):
            assert close(model(token, caches[0]), rounded(token, caches[1]), tolerance)
    assert skipped[0] == pytest.approx(skipped[1], abs=1e-3)
    assert not exact or 0.1 < skipped[0] < 0.9
    with sparse_mode(model, "off"):
        assert torch.equal(model(tokens), dense)
    sparsify(model, dict.fromkeys(names))                  # thresholds are taken away
    with sparse_mode(model, "all"):
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
    return folders.fill(folders.shaped(folder), folder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits, head_bits", [(8, 16), (4, 16), (8, 8), (4, 8), (8, 4)])
def test_quantized_folder(tmp_path, bits, head_bits, tied):
    model = tiny_model(tie_word_embeddings=tied)
    plain, small = tmp_path / "plain", tmp_path / "small"
    model.save_pretrained(plain)
    measures = quantize.quantize_folder(plain, small, bits, 32, head_bits)
    loaded = load(small)
    codes.quantize(model, bits, 32, head_bits=head_bits)
    tokens = tokens_like(model, 2, 9)
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.quantization == model.quantization
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
    assert config["quantization_config"] == settings
    if head_bits == 16:                  # as version 1 wrote it
        before = {"quant_method": "minteal", "version": 1, "bits": bits, "group": settings["group"]}
        write_json(small / "config.json", config | {"quantization_config": before})
        assert torch.equal(load(small)(tokens), model(tokens))
    calibration = calibrate(loaded, tokens_like(model, 400, seed=3), 32)
    sparsify(loaded, calibration.thresholds(0.5))
    assert next(generate.generate(loaded, [1, 2, 3], 4)) in range(model.config.vocab_size)


@pytest.mark.parametrize("hidden, middle, group", [
    (128, 384, 128), (96, 288, 96), (96, 160, 32), (64, 192, 64), (64, 96, 32), (288, 768, 96),
])
def test_groups_fit_the_inputs(tmp_path, hidden, middle, group):
    model = tiny_model(hidden_size=hidden, intermediate_size=middle, head_dim=hidden // 4,
                       num_hidden_layers=1)
    model.save_pretrained(tmp_path / "plain")
    quantize.quantize_folder(tmp_path / "plain", tmp_path / "small", 4)
    codes.quantize(model, 4)
    loaded = load(tmp_path / "small")
    assert loaded.quantization["group"] == model.quantization["group"] == group
    tokens = tokens_like(model, 1, 9)
    assert torch.equal(loaded(tokens), model(tokens))


def test_what_quantized_folders_are_not_for(tmp_path):
    model = tiny_model()
    plain, small = tmp_path / "plain", tmp_path / "small"
    model.save_pretrained(plain)
    quantize.quantize_folder(plain, small, 8)
    codes.quantize(model, 8)
    for message, act in [
            ("exists already", lambda: quantize.quantize_folder(plain, small, 8)),
            ("is quantized already", lambda: quantize.quantize_folder(small, tmp_path / "x", 8)),
            ("quantized or sparse already", lambda: codes.quantize(model, 8)),
            ("rotate first", lambda: rotate.rotate(small, tmp_path / "x", None, None))]:
        with refused(match=message):
            act()
    config = read_json(small / "config.json")
    for changes, message in [({"version": 3}, "version"), ({"bits": 3}, "bits"),
                             ({"head_bits": 2}, "head_bits"), ({"group": 32}, "group"),
                             ({"bits": 4, "group": 40}, "groups of 40"),
                             ({"quant_method": "awq"}, "expected floating point")]:
        settings = config["quantization_config"] | changes
        write_json(small / "config.json", config | {"quantization_config": settings})
        with refused(match=message):
            load(small)


def test_a_rewriting_that_fails_leaves_nothing(tmp_path):
    """Nothing of an unfinished folder stays, and nothing else is touched."""
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "mine.txt").write_text("keep me")
    tiny_model().save_pretrained(tmp_path / "plain")
    good = {name: tensor.clone() for name, tensor
            in read_safetensors(tmp_path / "plain" / "model.safetensors").items()}
    up = "model.layers.2.mlp.up_proj.weight"
    spoiled = good[up].clone()
    spoiled[3, 4] = float("nan")
    for changes, message in [({up: spoiled}, "up_proj.weight: holds NaN"),
                             ({up: None}, "missing from the checkpoint"),
                             ({"model.norm.weight": torch.ones(7)}, r"float32 \[7\]")]:
        tensors = {key: value for key, value in (good | changes).items() if value is not None}
        write_safetensors(tmp_path / "plain" / "model.safetensors", tensors)
        with refused(match=message):
            quantize.quantize_folder(tmp_path / "plain", tmp_path / "out", 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.tmp", "plain"]
    assert (tmp_path / "out.tmp" / "mine.txt").read_text() == "keep me"


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
    texts = []

    def read_tokens(tokenizer, path, part):
        texts.append(path)
        return tokens_like(model, 1000), "random tokens"
    monkeypatch.setattr(lab_bits, "read_tokens", read_tokens)
    monkeypatch.setattr(lab_bits, "LEVELS", (0.5,))
    out = run(lab_bits, *options, "--head-bits", 16, "--held-out", "a text", "--tokens", 520)
    rows = [row.split() for row in out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[bits, level] for bits in ("16", "8", "4")
                                         for level in ("0%", "50%")]
    assert float(rows[0][5]) > float(rows[2][5]) > float(rows[4][5])            # MB a token
    codes.quantize(model.bfloat16(), 8, 32, head_bits=16)
    assert rows[2][5] == f"{lab_bits.bytes_a_token(model) / 1e6:.3f}"
    assert texts == [None, "a text"] * 3


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
