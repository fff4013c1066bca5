"""The core in odd surroundings: machines, compilers, streams, and folders that few people have."""
import ctypes
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import kernel
import model as llama
import test_all
from beyond.tests.conftest import NO_COMPILER, ROOT
from calibrate import Calibration
from generate import generate_speculative, plain_step
from model import (DEMO, Config, Llama, linear_names, load_tokenizer, read_safetensors,
                   write_safetensors)
from sparsify import sparse_mode, sparsify
from test_all import (DEVICE, distance, greedy, read_by_transformers, read_config, reference,
                      refused, tiny_model, tokens_of)

COMPILER = next(filter(shutil.which, ("cc", "gcc", "clang")), None)


# --------------------------------------------------------------------------------------------------
# Damaged files, and large ones

def raw(header, data=b"", length=None):
    """Return the bytes of a safetensors file; length: what it says that its header has."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (length or len(header)).to_bytes(8, "little") + header + data


X = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = [
    b"1234", raw({"x": X}, bytes(4)), raw({"x": X}, bytes(12)), raw({"x": X}, bytes(8), 10**12),
    raw(b"not json"), raw(b"[" * 100_000), raw(b"[]"), raw({"x": {"dtype": "F32"}}),
    *(raw({"x": X | change}, bytes(16)) for change in (
        {"dtype": "F13"}, {"shape": [3]}, {"shape": [-2]}, {"data_offsets": [0]},
        {"data_offsets": [8, 16]}, {"shape": [2**40, 2**40, 0], "data_offsets": [0, 0]})),
    raw({"x": X, "y": X | {"data_offsets": [4, 12]}}, bytes(12)),
    raw({"__metadata__": {"a": 1}, "x": X}, bytes(8)),
    raw(b'{"x": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
]


def test_safetensors_are_read_or_refused_as_by_the_package(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "x"
    header = json.dumps({"x": X}).encode()                 # data 3 bytes past a multiple of 8
    path.write_bytes(raw(header + b" " * ((3 - len(header)) % 8), b"numbers!"))
    assert torch.equal(read_safetensors(path)["x"], safetensors.load_file(path)["x"])
    for damaged in DAMAGED:
        path.write_bytes(damaged)
        with pytest.raises(Exception):
            safetensors.load_file(path)
        with refused(match=f"^{path}: ") as error:
            read_safetensors(path)
        assert "\n" not in str(error.value)


def test_a_checkpoint_that_does_not_fit(tmp_path):
    reference(tmp_path, shard="60KB")
    shard = min(tmp_path.glob("*.safetensors"))
    whole = shard.read_bytes()
    own = {name: tensor.clone() for name, tensor in read_safetensors(shard).items()}
    first, last = [*own][0], [*own][-1]

    def change(**tensors):
        return lambda: write_safetensors(shard, own | tensors)

    for spoil, message in [
        (lambda: write_safetensors(shard, {name: own[name] for name in own if name != last}),
         f"tensors are missing, or not of this Llama: {last}"),
        (change(extra=torch.zeros(2)), "not of this Llama: extra"),
        (change(**{first: torch.zeros(3, 3)}), r"float32 \[3, 3\], config.json makes it"),
        (change(**{first: own[first].long()}), "torch.int64 .* makes it torch.float32"),
        (change(**{first: own[first] + math.inf}), f"{first} holds NaN or numbers beyond torch.fl"),
        (change(**{last: own[last] * math.nan}), f"tensor {last} holds NaN"),
        (lambda: shard.write_bytes(whole[:-10]), shard.name),
        (shard.unlink, f"{shard.name}: cannot be read.*: No such file"),
        ((tmp_path / "model.safetensors.index.json").unlink, "no checkpoint: neither"),
    ]:
        spoil()
        with refused(match=message):
            Llama.from_pretrained(tmp_path)


def test_a_file_larger_than_memory_can_be_opened(tmp_path):
    size = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    path = tmp_path / "large"
    path.write_bytes(raw({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}))
    os.truncate(path, path.stat().st_size + size)          # a hole: it takes no disk
    assert read_safetensors(path)["x"][size - 1] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path, monkeypatch):
    measured = []                                          # without the pages of files

    def measure():
        status = Path("/proc/self/status").read_text()
        measured.append(1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1]))

    def watch():
        while not loaded.wait(0.002):
            measure()

    monkeypatch.setitem(llama.PRESETS, "one block", Config(2048, 8192, 1, 32, 8, 64, 8000, 64))
    Llama.random("one block").save_pretrained(tmp_path)
    ctypes.CDLL(None).malloc_trim(0)                       # what was freed is not to be used again
    measure()
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
def run(model):
    x = model.embed(tokens).requires_grad_()
    model.model.layers[0](x, model.context(tokens)).square().sum().backward()
    with torch.no_grad():
        return model(tokens, model.make_cache(1, 128)), x.grad
for dtype in (torch.bfloat16, torch.float16):
    model = llama.Llama.random("small", dtype=dtype)
    multiplied.clear()
    with Watch():
        ours = run(model)
    assert len(multiplied) > 30
    assert {dtype for _, dtype in multiplied} == {torch.float32}, multiplied
    for result, exact in zip(ours, run(model.float())):
        assert (result - exact).norm() < 0.01 * exact.norm()
"""


def test_no_16_bit_product_runs_where_the_processor_has_no_instructions_for_it():
    old = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run([sys.executable, "-c", WITHOUT_INSTRUCTIONS], env=old, cwd=ROOT, check=True)


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
@pytest.mark.parametrize("variable, value", [
    ("CC", "/nowhere/cc"), ("CC", "cc -no-such-option"), ("MINTEAL_CACHE", "/dev/null/cache")])
def test_a_setting_that_fails_is_named_once_and_got_round(variable, value, monkeypatch, fresh,
                                                          capfd):
    monkeypatch.setenv(variable, value)
    for answer in (7, 8):
        assert kernel.compiled(f"int answer(void) {{ return {answer}; }}").answer() == answer
    line, = capfd.readouterr().err.splitlines()
    assert value in line and variable in line


@NO_COMPILER
def test_each_cc_has_a_library_of_its_own_and_a_damaged_one_is_built_anew(monkeypatch, fresh):
    """A CC may have arguments, and blanks in its path."""
    blank = fresh.parent / "my tools" / "cc"
    blank.parent.mkdir()
    blank.write_text(f'#!/bin/sh\nexec {COMPILER} -DANSWER=3 "$@"\n')
    blank.chmod(0o755)
    source = "#ifndef ANSWER\n#define ANSWER 1\n#endif\nint answer(void) { return ANSWER; }"
    libraries = set()
    for answer, asked in enumerate(("", f"{COMPILER} -DANSWER=2", str(blank)), start=1):
        forget()
        monkeypatch.setenv("CC", asked)
        assert kernel.compiled(source).answer() == answer
        library, = set(fresh.iterdir()) - libraries
        libraries.add(library)
    other = fresh.parent / "other"       # what is loaded must not be written to
    other.mkdir()
    (other / library.name).write_bytes(b"damaged")
    monkeypatch.setenv("MINTEAL_CACHE", str(other))
    forget()
    assert kernel.compiled(source).answer() == 3
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
    ("sys.argv.append('absent'); model.command_line(model.main)", "2>/dev/full", 2, ""),
    ("model.command_line(model.main)", "<&-", 0, ""),
])
def test_commands_elsewhere_and_with_closed_streams(tmp_path, code, redirection, status, said):
    command = f'{sys.executable} -c "import sys, model; {code}" {redirection}'
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path,
                           env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (ended.stderr, ended.returncode) == (said, status)
    assert bool(ended.stdout) == (status == 0)


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


def test_a_tied_head_may_be_stored_alone(tmp_path):
    reference(tmp_path, tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(path).items()}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    write_safetensors(path, tensors, {"format": "pt"})
    ours = Llama.from_pretrained(tmp_path)
    tokens = tokens_of(ours, 1, 12)
    assert distance(ours(tokens), read_by_transformers(tmp_path)(tokens).logits) < 1e-4


def test_tokenizers_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for file, content, message in [
        ("unread", b"", "no tokenizer: neither tokenizer.json nor a tokenizer.model"),
        ("tokenizer.model", b"\ndamaged", "tokenizer.model: not a SentencePiece model"),
        ("tokenizer.model", b"IQ== 0\n",                   # of Llama-3's kind
         "neither tokenizer.json nor a tokenizer.model that is SentencePiece"),
        ("tokenizer.json", b"{}", "needs the package transformers: pip install"),
    ]:
        (tmp_path / file).write_bytes(content)
        with refused(match=message):
            load_tokenizer(tmp_path)
    monkeypatch.undo()
    pytest.importorskip("transformers")
    with refused(match="no tokenizer that can be read"):
        load_tokenizer(tmp_path)


WHOLE = {"model": {}, "added_tokens": [{"id": 1, "content": "<s>"}], "post_processor": {
    "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}}


@pytest.mark.parametrize("files, alone", [
    ({"tokenizer_config": {"add_bos_token": True}, "tokenizer": WHOLE}, True),
    ({"tokenizer_config": {"added_tokens_decoder": {"0": {}, "1": {}, "2": {}}}}, True),
    ({"added_tokens": {"<pad>": 4096}}, False),
    ({"tokenizer_config": {"added_tokens_decoder": {"5": {"content": "x"}}}}, False),
    ({"tokenizer_config": {"add_bos_token": False}}, False),
    ({"tokenizer_config": {"add_eos_token": True}}, False),
    ({"tokenizer": WHOLE | {"added_tokens": [{"id": 4096, "content": "<pad>"}]}}, False),
    ({"tokenizer": WHOLE | {"model": {"vocab": {"other": 0}}}}, False),
    ({"tokenizer": WHOLE | {"post_processor": {"single": [{"Sequence": {"id": "A"}}]}}}, False),
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
        with refused(match="that no other file changes; python -m beyond reads more"):
            load_tokenizer(tmp_path)


def test_a_damaged_calibration_is_refused(tmp_path):
    """One without its tensors, or with another in the place of any of them."""
    path = DEMO / "calibration.safetensors"
    metadata = {}
    tensors = read_safetensors(path, metadata)
    for damaged in ({}, *(tensors | {name: torch.zeros(3, 4, 5)} for name in tensors)):
        write_safetensors(tmp_path / "x", damaged, metadata)
        with refused(match="damaged.*with: python calibrate.py"):
            Calibration.load(tmp_path / "x")
