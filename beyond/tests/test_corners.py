"""The core in odd surroundings: machines, compilers, streams, and folders that few people have."""
import ctypes
import json
import math
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import calibrate
import kernel
import model as llama
import test_all
from beyond.tests.conftest import NO_COMPILER, ROOT
from calibrate import Calibration, Table
from generate import StaticCache, generate_speculative, plain_step
from model import (DEMO, Config, Llama, linear_names, load_tokenizer, read_header, read_safetensors,
                   write_safetensors)
from sparsify import sparse_mode, sparsify
from test_all import (DEVICE, distance, greedy, read_by_transformers, read_config, reference,
                      refused, stepwise, tiny_model, tokens_of)

COMPILER = next(filter(shutil.which, ("cc", "gcc", "clang")), None)


# --------------------------------------------------------------------------------------------------
# Damaged files, and large ones

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
        write_raw(path, raw + b" " * ((3 - len(raw)) % 8), struct.pack("<ff", 1.5, -2.0))
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
    *((damaged, b"", None, "its header is damaged") for damaged in (
        b"not json", b"[" * 100_000, b"[]", {"x": {"dtype": "F32"}})),
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


def test_a_checkpoint_that_does_not_fit(tmp_path):
    reference(tmp_path, shard="60KB")
    shard, other = sorted(tmp_path.glob("*.safetensors"))[:2]
    whole = shard.read_bytes()
    own, others = ({name: tensor.clone() for name, tensor in read_safetensors(path).items()}
                   for path in (shard, other))
    first, last = [*own][0], [*own][-1]

    def change(**tensors):
        return lambda: write_safetensors(shard, own | tensors)

    for spoil, message in [
        (lambda: write_safetensors(shard, {name: own[name] for name in own if name != last}),
         f"tensors are missing from the checkpoint: {last}"),
        (change(**others), "a second one of its name"),
        (change(extra=torch.zeros(2)), "tensor extra: not part of"),
        (change(**{first: torch.zeros(3, 3)}), r"float32 \[3, 3\], config.json makes it"),
        (change(**{first: own[first].long()}), "torch.int64 .* makes it torch.float32"),
        (change(**{first: own[first] + math.inf}), f"{first} holds NaN or numbers beyond torch.fl"),
        (change(**{last: own[last] * math.nan}), f"tensor {last} holds NaN"),
        (lambda: shard.write_bytes(whole[:-10]), "truncated"),
        (shard.unlink, f"{shard.name}: cannot be read: No such file"),
        ((tmp_path / "model.safetensors.index.json").unlink, "no checkpoint: neither"),
    ]:
        spoil()
        with refused(match=message):
            Llama.from_pretrained(tmp_path)


def test_a_file_larger_than_memory_can_be_opened(tmp_path):
    size = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    path = tmp_path / "large"
    write_raw(path, {"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    os.truncate(path, path.stat().st_size + size)          # a hole: it takes no disk
    assert read_safetensors(path)["x"][size - 1] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path, monkeypatch):
    def anonymous():                                       # memory that is not pages of files
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])

    def watch():
        while not loaded.wait(0.002):
            measured.append(anonymous())

    monkeypatch.setitem(llama.PRESETS, "one block", Config(2048, 8192, 1, 32, 8, 64, 8000, 64))
    Llama.random("one block").save_pretrained(tmp_path)
    ctypes.CDLL(None).malloc_trim(0)                       # what was freed is not to be used again
    measured = [anonymous()]
    loaded = threading.Event()
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
# Processors, and GPUs

WITHOUT_INSTRUCTIONS = """
import torch, model as llama
from torch.utils._python_dispatch import TorchDispatchMode
multiplied = []
class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if "mm" in name or "dot" in name or "attention" in name or "linear" in name:
            multiplied.append((name, args[1 + (name == "addmm")].dtype))
        return function(*args, **(kwargs or {}))
llama.PRESETS["small"] = llama.Config(1280, 1200, 1, 4, 2, 320, 600, 256)
tokens = torch.arange(128)[None]
for dtype in (torch.bfloat16, torch.float16):
    model = llama.Llama.random("small", dtype=dtype)
    multiplied.clear()
    with torch.no_grad(), Watch():
        logits = model(tokens, model.make_cache(1, 128))
    assert len(multiplied) > 9
    assert {dtype for _, dtype in multiplied} == {torch.float32}, multiplied
    exact = model.float()(tokens)
    assert (logits - exact).norm() < 0.01 * exact.norm()
"""


def test_no_16_bit_product_runs_where_the_processor_has_no_instructions_for_it():
    old = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run([sys.executable, "-c", WITHOUT_INSTRUCTIONS], env=old, cwd=ROOT, check=True)


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


@NO_COMPILER
@pytest.mark.parametrize("dtype", test_all.DTYPES)
def test_c_writes_every_output_and_no_other(dtype, monkeypatch):
    """On one thread and on several, whose ranges do not divide the outputs."""
    torch.manual_seed(0)
    threshold = torch.tensor(0.5)
    for rows, channels, outputs in [(1, 2100, 1217), (3, 2100, 1217), (8, 20, 8300), (2, 3, 33)]:
        weight_t = torch.randn(channels, outputs).to(dtype)
        x = torch.randn(rows, channels)
        room = torch.full((2, rows + 2, outputs), math.nan)
        for y, threads in zip(room, (1, 3)):
            monkeypatch.setattr(kernel, "THREADS", threads)
            function, arguments = kernel.c_call(x, weight_t, threshold, y[1:-1])
            assert function(*arguments) == 0
        assert room[:, [0, -1]].isnan().all()
        test_all.assert_right(room[0, 1:-1], x, weight_t, 0.5)
        assert torch.equal(room[0, 1:-1], room[1, 1:-1])


@NO_COMPILER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_widened_exactly(dtype):
    every = torch.arange(-2**15, 2**15).to(torch.int16).view(dtype)[None]
    for shift in (0, 1):                 # beside whole registers, and in the last few
        weight_t = every[:, shift:].contiguous()
        y = kernel.sparse_gemv(torch.ones(1, 1), weight_t, 0.0, "c")
        assert torch.equal(y.nan_to_num(7.0), weight_t.float().nan_to_num(7.0))


@NO_COMPILER
def test_small_float16_where_a_process_flushes_denormals():
    torch.manual_seed(0)
    small = (0.02 * torch.randn(300, 40)).half()
    torch.set_flush_denormal(True)
    y = kernel.sparse_gemv(1e-3 * torch.ones(1, 300), small, 0.0, "c")
    torch.set_flush_denormal(False)
    assert distance(y, 1e-3 * small.double().sum(0)[None]) < 2**-9


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
    memory = static.positions, static.slots, static.mask
    logits = []
    for part in tokens[:, 2:].split(T, dim=1):
        static.follow(cache, T, window)
        logits.append(model(part, static))
        cache.advance(T)
    assert distance(torch.cat(logits, 1), expected) < 1e-12
    after = static.positions, static.slots, static.mask
    assert all(own is other for own, other in zip(memory, after))
    mask = static.look(T, window)[1]
    assert mask.dtype == (model.dtype if backend == "triton" else torch.bool)
    assert mask.shape == (T, 24)         # a multiple of 8, which kernels of a GPU take as it is
    cache.used = 20
    with refused(match=f"{T} tokens do not fit a cache of 20 positions"):
        static.follow(cache, T, window)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("where", ["off", "decode", "all"])
def test_graphs_on_a_gpu_do_what_the_model_does(where, window):
    model, draft = (tiny_model(torch.float32, seed, vocab_size=13, sliding_window=window).to(DEVICE)
                    for seed in (0, 1))
    sparsify(model, dict.fromkeys(linear_names(model.config), 0.2))
    with sparse_mode(model, where):
        plain = greedy(model, [1, 2, 3], 40, make_step=plain_step)
        assert greedy(model, [1, 2, 3], 40) == plain
    for guesser in ("sparse", draft) if where == "off" else ():
        for n in (1, 3, 12):
            assert plain == list(generate_speculative(model, [1, 2, 3], 40, guesser, None, n))


# --------------------------------------------------------------------------------------------------
# Compilers, and the cache of what they make

@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """kernel.py as in a new process, with an empty cache folder, which is returned."""
    monkeypatch.setenv("MINTEAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    forget()
    yield tmp_path / "cache"
    forget()


def forget():
    for cached in vars(kernel).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


def seven():
    return kernel.compiled("int seven(void) { return 7; }").seven()


def test_c_can_be_done_without(monkeypatch, fresh, capfd):
    monkeypatch.setenv("MINTEAL_CACHE", "off")
    x = torch.randn(2, 30)
    assert kernel.best_backend(x) == "torch"
    with pytest.raises(ValueError, match='backend "c" needs a C compiler'):
        kernel.sparse_gemv(x, torch.randn(30, 9), 0.5, "c")
    assert capfd.readouterr().err == ""


@NO_COMPILER
@pytest.mark.skipif(platform.machine() != "x86_64", reason="options of x86")
@pytest.mark.parametrize("options", ["-mno-avx512f", "-mno-avx"])
def test_c_without_the_newest_instructions(options, monkeypatch, fresh):
    monkeypatch.setenv("CC", f"{COMPILER} {options}")
    for seed in range(24):
        case = test_all.gemv_case(seed)
        test_all.assert_right(kernel.sparse_gemv(*case, "c"), *case)
    for dtype in (torch.bfloat16, torch.float16):
        test_every_number_of_16_bits_is_widened_exactly(dtype)


@NO_COMPILER
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


@NO_COMPILER
def test_each_cc_and_each_processor_has_a_library_of_its_own(monkeypatch, fresh, capfd):
    """A CC may have arguments, and blanks in its path."""
    blank = fresh.parent / "my tools" / "cc"
    blank.parent.mkdir()
    blank.write_text(f'#!/bin/sh\nexec {COMPILER} -DANSWER=3 "$@"\n')
    blank.chmod(0o755)
    source = "#ifndef ANSWER\n#define ANSWER 1\n#endif\nint answer(void) { return ANSWER; }"
    for number, (asked, processor, answer) in enumerate([
            ("", "ours", 1), (f"{COMPILER} -DANSWER=2", "ours", 2), (str(blank), "ours", 3),
            (f"'{blank}' -DOTHER", "ours", 3), (str(blank), "another", 3)], start=1):
        forget()
        monkeypatch.setenv("CC", asked)
        monkeypatch.setattr(kernel, "processor", lambda: processor)
        assert kernel.compiled(source).answer() == answer
        assert len(list(fresh.iterdir())) == number
    assert capfd.readouterr().err == ""


@NO_COMPILER
def test_a_library_that_does_not_load_is_built_anew(fresh, monkeypatch):
    assert seven() == 7
    library, = fresh.iterdir()
    other = fresh.parent / "other"       # what is loaded must not be written to
    other.mkdir()
    (other / library.name).write_bytes(b"damaged")
    monkeypatch.setenv("MINTEAL_CACHE", str(other))
    forget()
    assert seven() == 7
    assert (other / library.name).stat().st_size > 1000


# --------------------------------------------------------------------------------------------------
# Streams and signals

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
                           env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ended.stderr == said and (ended.returncode == status or status == 130)
    assert bool(ended.stdout) == (status == 0)


def test_what_nobody_can_read_stops_no_work(monkeypatch):
    monkeypatch.setattr(sys, "stderr", open("/dev/full", "w"))
    monkeypatch.setattr(llama.time, "perf_counter", iter(range(0, 900, 100)).__next__)
    assert list(llama.progress([1, 2, 3], "a line after each")) == [1, 2, 3]


@pytest.mark.parametrize("seconds", [0.3, 0.8])
def test_ctrl_c_in_the_first_seconds_leaves_no_traceback(seconds):
    command = subprocess.Popen([sys.executable, ROOT / "generate.py"], stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True,
                               # in the background a shell's commands ignore Ctrl-C
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    time.sleep(seconds)
    command.send_signal(signal.SIGINT)
    assert "Traceback" not in command.communicate()[1]
    assert command.returncode != 0


# --------------------------------------------------------------------------------------------------
# Folders

def test_config_defaults(tmp_path):
    config = read_config(tmp_path, head_dim=None, num_key_value_heads=None,
                         rope_parameters={"rope_theta": 777.0, "rope_type": "default"})
    assert (config.head_dim, config.num_key_value_heads, config.rope_theta) == (8, 4, 777.0)


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
    assert distance(ours(tokens), read_by_transformers(tmp_path)(tokens).logits) < 1e-4
    assert ours.config.tie_word_embeddings == (stored == "the head alone")
    assert torch.equal(ours.lm_head.weight, head)


def test_tokenizers_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for file, content, message in [
        ("unread", b"", "no tokenizer: neither tokenizer.model nor tokenizer.json"),
        ("tokenizer.model", b"\ndamaged", "tokenizer.model: not a SentencePiece model"),
        ("tokenizer.model", b"IQ== 0\n",                   # of Llama-3's kind
         "or it is not SentencePiece, and tokenizer.json is missing"),
        ("tokenizer.json", b"{}", "needs the package transformers: pip install"),
    ]:
        (tmp_path / file).write_bytes(content)
        with refused(match=message):
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
])
def test_sentencepiece_reads_alone_what_no_other_file_changes(tmp_path, monkeypatch, files, alone):
    monkeypatch.setattr(llama, "HubTokenizer", lambda folder: "transformers'")
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    if alone:
        assert load_tokenizer(tmp_path).encode("x") == load_tokenizer(DEMO).encode("x")
    elif "tokenizer" in files:
        assert load_tokenizer(tmp_path) == "transformers'"
    else:                                # nothing is cut to pieces in silence
        with refused(match="other files change this tokenizer.*python -m beyond reads more"):
            load_tokenizer(tmp_path)


def test_a_calibration_of_an_earlier_version_is_read_without_its_channel_weights(tmp_path):
    path = DEMO / "calibration.safetensors"
    old = {"fingerprint": torch.zeros(256), "distributions mine": torch.ones(3, 7, calibrate.BINS),
           "levels mine": torch.zeros(0), "shares mine": torch.zeros(0, 3, 7),
           "weights mine model.layers.0.mlp.up_proj": torch.ones(32)}
    metadata = read_header(path)[1]
    tables = json.loads(metadata["tables"]) | {"mine": "mine"}
    write_safetensors(tmp_path / "x", read_safetensors(path) | old,
                      metadata | {"tables": json.dumps(tables)})
    ours, loaded = Calibration.load(path), Calibration.load(tmp_path / "x")
    assert loaded.allocations == ours.allocations
    assert loaded.thresholds(0.4) == ours.thresholds(0.4)


@pytest.mark.parametrize("spoil", [
    lambda c, greedy: c.counts[1, 2].zero_(),
    lambda c, greedy: setattr(c, "counts", torch.ones(3, 4, 5).long()),
    lambda c, greedy: c.shapes.pop("num_hidden_layers"),
    lambda c, greedy: setattr(c, "shapes", []),
    lambda c, greedy: c.tables.clear(),
    lambda c, greedy: c.tables.update(greedy=Table(greedy.levels, torch.zeros(3, 4, 5))),
    lambda c, greedy: greedy.shares.fill_(math.nan),
    lambda c, greedy: greedy.shares.fill_(1.0),
    lambda c, greedy: greedy.levels.fill_(1.0),
])
def test_a_damaged_calibration_is_refused(tmp_path, spoil):
    damaged = Calibration.load(DEMO / "calibration.safetensors")
    spoil(damaged, damaged.tables["greedy"])
    damaged.save(tmp_path / "x")
    with refused(match="damaged.*with: python calibrate.py"):
        Calibration.load(tmp_path / "x")
