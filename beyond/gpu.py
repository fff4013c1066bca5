"""Everything that a GPU has to say, in one call of ten minutes.

    python -m beyond.gpu --out FOLDER [--teal FOLDER] [--gpt-fast FOLDER] [--minutes 9]

It checks, measures and tells, the most valuable first, and writes report.txt, report.json and
report.png as it goes. Each part runs in a process of its own, since a fault of the card spoils all
that follows in the same one. A part that fails is noted, and the next one begins; what does not fit
the minutes is left out, and said to be. The exit status is 1 if a product is not shown to be right.

    right       products against float64
    tests       those that need a card
    products    microseconds, and kept bytes as a share of the read bandwidth: dense and ours
    models      tokens a second, dense and sparse under the same graph, the core and beyond
    texts       the demo and SmolLM2 write what they write on a CPU; speculation; calibration
    profile     the kernels that a step spends its time in
    tiles       other ways to cut the work (design.py), for kernel.TILE
    gpt-fast, transformers      tokens a second of theirs, compiled
    products: TEAL              the authors' kernel, beside ours

--teal is a checkout of github.com/FasterDecoding/TEAL, --gpt-fast one of pytorch-labs/gpt-fast:
their code is loaded from there. On a CPU (--device cpu) all of it runs at toy sizes, the kernels in
Triton's interpreter. That shows that this file works; its times mean nothing.
"""
import contextlib
import functools
import importlib.util
import inspect
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
import types
import warnings
from dataclasses import replace
from pathlib import Path

import torch

import kernel
from beyond import design, fused, quantize
from beyond.allocate import pyplot, save_figure
from beyond.timing import BITS, launch_time, random_codes
from calibrate import calibrate, load_calibration
from generate import PROMPT, fast_step, first_difference, generate, generate_speculative
from kernel import copies_of, dense_ways, inputs_like, median_time, preset_shapes, sparse_gemv
from model import (DEMO, PRESETS, Llama, Parser, command_line, find_device, load_model, read_tokens,
                   require)
from sparsify import realised_sparsity, reset_counts, sparse_mode, sparsify

STEPS = 8                # that are profiled
LEVELS = (0, 0.25, 0.4, 0.5, 0.65, 0.9)
TOY = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
           num_key_value_heads=2, head_dim=16, vocab_size=97, max_position_embeddings=128)


# --------------------------------------------------------------------------------------------------
# The report, and its parts

class TimeUp(Exception):
    """The time of a part is over."""


class Part:
    """What a part is given: its device, and ways to say and add something to the report."""

    def __init__(self, pipe, device, end):
        """end: when its time is over, by time.monotonic()."""
        self.pipe, self.device, self.end = pipe, device, end
        self.toy = device.type != "cuda"
        self.rows = []

    def say(self, text=""):
        self.pipe.send(("say", text))

    def add(self, row):
        """Add a measurement, a dictionary."""
        self.rows.append(row)
        self.pipe.send(("add", row))

    def check(self):
        """Return the seconds that are left; raise TimeUp if there are none."""
        seconds = self.end - time.monotonic()
        if seconds <= 0:
            raise TimeUp
        return seconds


def do_part(pipe, device, end, function, arguments):
    """Do function(part, *arguments) in this process, and send how it ended."""
    os.setpgrp()                         # what it starts can be ended with it
    part = Part(pipe, device, end)
    ended = "done", None
    try:
        if not part.toy:
            torch.cuda.set_device(device)
        function(part, *arguments)
    except TimeUp:
        ended = "time", None
    except Exception as error:
        part.say("".join(traceback.format_exception(error)[-4:]).rstrip())
        ended = "failed", f"{type(error).__name__}: {error}"
    pipe.send(ended)


# A part is forked from a server that has imported all this, and has never talked to a GPU.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["beyond.gpu"])
# It runs this file once more, as its main module.
warnings.filterwarnings("ignore", "'beyond.gpu' found in sys.modules", RuntimeWarning)


@contextlib.contextmanager
def environment(device):
    """Start processes for a device inside a `with`: for a CPU without GPUs, Triton interpreted.

    It is the first one that starts the server, with whose environment all parts begin.
    """
    wanted = {"TRITON_INTERPRET": "0"}
    if device.type == "cpu":
        wanted = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


class Report:
    """What is printed, and the numbers: both are written after each part."""

    GRACE = 5            # seconds after which a part that does not look at the clock is ended

    def __init__(self, folder, minutes, device):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + 60 * minutes
        self.kept = 0                    # seconds of these for parts that are yet to come
        self.device = device
        self.toy = device.type != "cuda"
        self.lines, self.data = [], {}

    def say(self, text=""):
        print(text, flush=True)
        self.lines.append(text)

    def part(self, name, seconds, function, *arguments):
        """Do a part in a process of its own, in so many seconds at most: function(part, ...)."""
        rows = self.data[name] = []
        self.say(f"\n--- {name}")
        began = time.monotonic()
        ended, what = "time", None
        if began < self.end - self.kept:
            ended, what = self.do(rows, began + seconds, function, arguments)
        if ended == "time":
            over = ("the minutes are over" if time.monotonic() >= self.end - self.kept
                    else f"its {seconds} s are over")
            self.say(f"left out from here on: {over} ({name})")
            rows.append({"left out": over})
        if ended == "failed":
            self.say(f"failed: {name}: {what}")
            rows.append({"failed": what})
        self.say(f"({time.monotonic() - began:.0f} s)")
        self.save()

    def do(self, rows, end, function, arguments):
        """Do a part, until `end` or that of the report; return how it ended, and why."""
        def clock():
            return min(end, self.end - self.kept)

        inbox, pipe = processes.Pipe(duplex=False)
        process = processes.Process(target=do_part,
                                    args=(pipe, self.device, clock(), function, arguments))
        with environment(self.device):
            process.start()
        pipe.close()
        ended, over = ("time", None), False
        try:
            while inbox.poll(max(0, clock() + self.GRACE - time.monotonic())):
                kind, value = inbox.recv()
                if kind == "say":
                    self.say(value)
                elif kind == "add":
                    rows.append(value)
                else:
                    ended, over = (kind, value), True
                    process.join(10)
                    break
        except EOFError:                 # it sent no end
            process.join(10)
            ended = "failed", f"its process died: {name_of(process.exitcode)}"
        finally:
            if not over or process.is_alive():
                process.kill()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)     # what it has started
                process.join(10)
        return ended

    def save(self):
        (self.folder / "report.txt").write_text("\n".join(self.lines) + "\n")
        (self.folder / "report.json").write_text(json.dumps(self.data, indent=1))

    def is_right(self):
        """Return whether all products were computed and none was wrong, and no test failed."""
        rows = self.data["right"]
        return (bool(rows) and all(row.get("worst", 2) <= 1 and row["same bits"] for row in rows)
                and all(row.get("status", 0) == 0 for row in self.data["tests"]))


def name_of(exitcode):
    """Return the exit status of a process, or the signal that ended it, as text."""
    return signal.Signals(-exitcode).name if exitcode and exitcode < 0 else f"status {exitcode}"


# --------------------------------------------------------------------------------------------------
# right

ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def worst_error(kind, rows, channels, outputs, threshold, device):
    """Return (error over what rounding allows, whether a second call gave the same bits)."""
    dtype = torch.bfloat16 if kind in BITS else getattr(torch, kind)
    x = torch.randn(rows, channels, device=device).to(dtype)
    if kind in BITS:
        weight = random_codes(channels, outputs, BITS[kind], device)
        exact, product = weight.dequantized(torch.float64), quantize.codes_gemv
        # Codes are summed before they are scaled: rounding is proportional to their range.
        scale = weight.scales.double().view(-1, outputs).amax(0) * (1 << BITS[kind] - 1)
        size = scale.expand(channels, outputs)
    else:
        weight = torch.randn(channels, outputs, device=device).to(dtype)
        exact, product = weight.double(), sparse_gemv
        size = exact.abs()
    keep = x.double() * kernel.kept(x, kernel.as_threshold(threshold, x))
    with poisoned():
        y = product(x, weight, threshold, "triton")
        again = product(x, weight, threshold, "triton")
    allowed = ROUNDING[dtype] * (keep.abs() @ size) + 1e-30
    return ((y.double() - keep @ exact).abs() / allowed).max().item(), torch.equal(y, again)


@contextlib.contextmanager
def poisoned():
    """Fill memory that is asked for inside a `with` with NaN, or the largest integer.

    So what a kernel never writes shows, however little it is: PyTorch takes small blocks from other
    memory than large ones, and what lies there from before may look right.
    """
    before = torch.are_deterministic_algorithms_enabled()
    # Nothing here is to be deterministic that is not; but this setting fills what is not set.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def right(part):
    device, toy = part.device, part.toy
    part.say(f"{'':10}{'products':>9}{'worst error':>13}  of what rounding allows")
    for kind in ("bfloat16", "float16", "float32", "int8", "int4"):
        errors, same = [], True
        for rows in (1, 3) if toy else range(1, 9):
            shapes = [(128, 33)]
            if not toy:
                shapes += [(384, 257)] + [(4096, 14336)] * (rows in (1, 8))
            for channels, outputs in shapes:
                each = torch.rand(channels, device=device)
                for threshold in (-1.0, 0.0, 0.7, 1e9, each):
                    part.check()
                    error, equal = worst_error(kind, rows, channels, outputs, threshold, device)
                    errors.append(error)
                    same &= equal
        worst = max(errors, key=lambda error: (error != error, error))          # NaN is the worst
        part.say(f"{kind:10}{len(errors):9}{worst:13.3f}  {'right' if worst <= 1 else 'WRONG'}"
                   f"{', the same bits twice' if same else ', OTHER BITS the second time'}")
        part.add({"kind": kind, "products": len(errors), "worst": worst, "same bits": same})


def tests(part):
    """Run the tests of kernels and graphs."""
    if part.toy or importlib.util.find_spec("pytest") is None:
        part.say("not run: at toy size, or without pytest")
        return
    command = [sys.executable, "-m", "pytest", "-q", "test_all.py", "beyond/test_weights.py",
               "beyond/test_drafts.py",
               "beyond/test_gpu.py::test_joint_products_do_not_multiply_what_is_dropped",
               "-k", "triton or gpu or cuda or joint or launch or codes or ticket or multiplied"]
    done = subprocess.run(command, capture_output=True, text=True,
                          cwd=Path(kernel.__file__).parent)
    part.say("\n".join((done.stdout + done.stderr).splitlines()[-12:]))
    part.add({"tests": done.stdout.splitlines()[-1:], "status": done.returncode})


# --------------------------------------------------------------------------------------------------
# products

def load_file(name, path):
    """Return the Python file at `path` as a module of another name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def teal_product(folder):
    """Return the authors' product, a function(x (1, in), weight_t, threshold, level) -> (1, out).

    Its kernel computes in float16, adds with atomics, and tunes itself for each level.
    """
    absent = importlib.util.find_spec("msgspec") is None
    if absent:           # only their wrapper for torch.compile needs it, which is not used here
        sys.modules["msgspec"] = types.SimpleNamespace(Struct=object)
    try:
        module = load_file("teal_sparse_gemv", Path(folder) / "kernels" / "sparse_gemv.py")
    finally:
        if absent:
            del sys.modules["msgspec"]
    return lambda x, weight_t, threshold, level: module.splitk_sparse_gemv(
        x[None], weight_t.t(), threshold, round(100 * level))[0]


def read_bandwidth(device, size, seconds):
    """Return the bytes a second of a sum over `size` bytes."""
    numbers = torch.ones(size // 4, device=device)
    return size / median_time(lambda i: numbers.sum(), device, seconds)


def products(part, teal=None):
    """Time products, dense and ours, or the authors' of the folder `teal`."""
    device, toy = part.device, part.toy
    total = 1 << 16 if toy else 512_000_000
    seconds = 1e-3 if toy else 0.1
    copy = kernel.memory_bandwidth(device, total)
    read = read_bandwidth(device, total, seconds)
    launch = launch_time(device)
    part.say(f"copy {copy / 1e9:.0f} GB/s, read {read / 1e9:.0f} GB/s, an almost empty launch "
             f"{1e6 * launch:.1f} us")
    part.add({"copy": copy, "read": read, "launch": launch})
    shapes = sorted({*preset_shapes("llama-2-7b"), *preset_shapes("llama-3-8b")},
                    key=lambda shape: -shape[0] * shape[1])
    levels = LEVELS
    if toy:
        shapes, levels = [(128, 200)], (0.5,)
    part.say(f"microseconds, and the share of the read bandwidth on kept bytes\n"
             f"{'':24}{'dense':>9}" + "".join(f"{level:>13.0%}" for level in levels))
    if teal:
        ways = {"TEAL float16": teal_product(teal)}
    else:
        ways = {"bfloat16": lambda x, weight, threshold, level: sparse_gemv(x, weight, threshold,
                                                                            "triton")}
        ways |= dict.fromkeys(BITS, lambda x, weight, threshold, level: quantize.codes_gemv(
            x, weight, threshold, "triton"))
    for inputs, outputs in shapes:
        dense = None                     # the codes stand beside bfloat16
        for kind, product in ways.items():
            part.check()
            dtype = torch.float16 if teal else torch.bfloat16
            weights = copies_of(inputs, outputs, dtype, device, total)
            xs = inputs_like(weights, 1)
            dense = dense or min(median_time(way, device, seconds)
                                 for way in dense_ways(xs[0], weights).values())
            if kind in BITS:
                weights = [random_codes(inputs, outputs, BITS[kind], device)
                           for _ in range(len(weights) * 16 // BITS[kind])]
            line = f"{inputs} x {outputs} {kind}".ljust(24) + f"{1e6 * dense:9.1f}"
            for level in levels:
                part.check()
                thresholds = [kernel.threshold_dropping(x, level) for x in xs]
                if teal:                 # their kernel takes numbers
                    thresholds = [threshold.item() for threshold in thresholds]
                time_taken = median_time(
                    lambda i: product(xs[i % 8], weights[i % len(weights)], thresholds[i % 8],
                                      level), device, seconds)
                used = (1 - level) * weights[0].nbytes / time_taken / read
                line += f" {1e6 * time_taken:7.1f}{used:5.0%}"
                part.add({"inputs": inputs, "outputs": outputs, "kind": kind, "level": level,
                          "seconds": time_taken, "dense": dense, "share": used})
            part.say(line)


def draw(report):
    """Draw the shares of the read bandwidth against sparsity as report.png."""
    rows = [row for name in ("products", "products: TEAL") for row in report.data.get(name, [])
            if "level" in row]
    if not rows:
        report.say("no figure: no products were measured")
        return
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    plt = pyplot()
    figure, axes = plt.subplots(1, len(kinds), figsize=(3.2 * len(kinds) + 1, 3.2), sharey=True,
                                squeeze=False, layout="constrained")
    for axis, kind in zip(axes[0], kinds):
        for shape in dict.fromkeys((row["inputs"], row["outputs"]) for row in rows):
            points = [(100 * row["level"], 100 * row["share"]) for row in rows
                      if (row["inputs"], row["outputs"], row["kind"]) == (*shape, kind)]
            axis.plot(*zip(*points), marker="o", ms=3, label=f"{shape[0]} x {shape[1]}")
        axis.set(title=kind, xlabel="channels dropped (%)", ylim=(0, None))
    axes[0, 0].set_ylabel("% of the read bandwidth, on kept bytes")
    axes[0, 0].legend(fontsize=7)
    save_figure(figure, report.folder / "report.png")


# --------------------------------------------------------------------------------------------------
# models

def make_model(part, preset):
    """Return (a Llama of a preset with random weights, thresholds(sparsity)); toy: a small one."""
    if part.toy:
        model = Llama(replace(PRESETS[preset], **TOY)).to(torch.bfloat16).fill_random(0)
    else:
        model = Llama.random(preset, part.device)
    return model, load_calibration(model, f"random:{preset}").thresholds


@torch.no_grad()
def models(part, preset):
    """Time decoding as `python generate.py` does it, a CUDA graph a step, dense and sparse."""
    prompt, tokens = list(range(1, 9)), 4 if part.toy else 100

    def note(name, level):
        part.check()
        reset_counts(model)
        rate = quantize.tokens_a_second(model, prompt, tokens, fast_step)
        skipped = realised_sparsity(model)
        part.add({"preset": preset, "what": name, "level": level, "rate": rate,
                        "skipped": skipped})
        base = part.rows[0]["rate"]
        part.say(f"{preset} {name:38}{level:6.0%}{rate:10.1f} tokens/s{rate / base:8.2f}x   "
                   f"{skipped:.1%} skipped")

    model, thresholds = make_model(part, preset)
    tables = {level: thresholds(level) for level in (0.4, 0.5)}
    note("dense, F.linear", 0)
    sparsify(model, tables[0.5] | {"lm_head": None})
    with sparse_mode(model, "off"):
        note("dense, x @ weight_t", 0)
    for name in ("core", "beyond: fused"):
        if name != "core":
            fused.fuse(model)
        for level, table in tables.items():
            with sparse_mode(model, "decode", table):
                note(name, level)


@torch.no_grad()
def quantized_model(part, preset, bits):
    model, thresholds = make_model(part, preset)
    quantize.quantize(model, bits, 32 if part.toy else 128, clipping=(1.0,))
    sparsify(model, thresholds(0.5) | {"lm_head": None})
    fused.fuse(model)
    for mode, level in (("off", 0), ("decode", 0.5)):
        part.check()
        with sparse_mode(model, mode):
            rate = quantize.tokens_a_second(model, [1, 2, 3], 3 if part.toy else 100, fast_step)
        part.say(f"{preset} {f'beyond: int{bits}, fused':38}{level:6.0%}{rate:10.1f} tokens/s")
        part.add({"preset": preset, "what": f"int{bits}", "level": level, "rate": rate})


def others(part, preset, name, rate_of):
    """Time the decoding of others: rate_of(part, preset, tokens)."""
    rate = rate_of(part, preset, 4 if part.toy else 100)
    part.say(f"{preset} {f'{name}, compiled, static cache, dense':44}{rate:10.1f} tokens/s")
    part.add({"preset": preset, "what": name, "rate": rate})


def gpt_fast_rate(folder, part, preset, tokens):
    """Return the tokens a second of gpt-fast's model, compiled as its generate.py compiles it."""
    module = load_file("gpt_fast_model", Path(folder) / "model.py")
    config = replace(PRESETS[preset], **TOY if part.toy else {})
    with torch.device(part.device):
        model = module.Transformer(module.ModelArgs(
            block_size=config.max_position_embeddings, vocab_size=config.vocab_size,
            n_layer=config.num_hidden_layers, n_head=config.num_attention_heads,
            dim=config.hidden_size, intermediate_size=config.intermediate_size,
            n_local_heads=config.num_key_value_heads, rope_base=config.rope_theta))
        model = model.to(torch.bfloat16).eval()
        model.setup_caches(1, 8 + tokens)

    if "mask" not in inspect.signature(model.forward).parameters:
        mask = ()

        def decode(token, position):
            return model(token, position)[:, -1].argmax(-1, keepdim=True)
    else:                                # newer: a row of blocks of a mask comes first
        from torch.nn.attention.flex_attention import create_block_mask
        length = model.max_seq_length
        mask = create_block_mask(lambda b, h, query, key: query >= key, 1, 1, length, length,
                                 device=part.device),

        def decode(token, position, mask):
            row = mask[:, :, position // mask.BLOCK_SIZE[0]]
            row.mask_mod = mask.mask_mod
            row.seq_lengths = (1, length)
            return model(row, token, position)[:, -1].argmax(-1, keepdim=True)

    if not part.toy:
        decode = torch.compile(decode, mode="reduce-overhead", fullgraph=True)
    return steady_rate(part, lambda token, position: decode(token, position, *mask), tokens)


def transformers_rate(part, preset, tokens):
    """Return the tokens a second of transformers' model, compiled, with a static cache."""
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
    config = replace(PRESETS[preset], **TOY if part.toy else {})
    theirs = LlamaConfig(
        hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, vocab_size=config.vocab_size)
    with torch.device(part.device):
        model = LlamaForCausalLM(theirs).to(torch.bfloat16).eval()
    cache = StaticCache(config=theirs, max_cache_len=8 + tokens)

    def decode(token, position):
        logits = model(token, past_key_values=cache, cache_position=position,
                       position_ids=position[None]).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    if not part.toy:
        # The cache is made in the first call; made while compiling, no CUDA graph could hold it.
        first = torch.zeros(1, dtype=torch.int64, device=part.device)
        with torch.no_grad():
            decode(first[None], first)
        decode = torch.compile(decode, mode="reduce-overhead", fullgraph=True)
    return steady_rate(part, decode, tokens)


@torch.no_grad()
def steady_rate(part, decode, tokens):
    """Return the tokens a second of decode(token (1, 1), position (1,)) -> next token (1, 1)."""
    token = torch.ones(1, 1, dtype=torch.int64, device=part.device)
    position = torch.zeros(1, dtype=torch.int64, device=part.device)
    times = []
    for _ in range(tokens):
        part.check()
        token = decode(token, position).clone()
        position += 1
        token.item()                     # as whoever writes a text waits for it
        times.append(time.perf_counter())
    steps = sorted(end - begin for begin, end in zip(times, times[1:]))
    return 1 / steps[len(steps) // 2]


# --------------------------------------------------------------------------------------------------
# texts, profile, tiles

def texts(part, folder):
    if not Path(folder).is_dir():
        part.say(f"{folder}: no such folder")
        return
    count = 8 if part.toy else 64
    written = {}
    for device in dict.fromkeys(("cpu", part.device.type)):
        part.check()
        model, tokenizer = load_model(folder, device, torch.float32)
        tokens, source = torch.tensor(tokenizer.encode(9 * PROMPT)), "the prompt"
        if not part.toy:
            tokens, source = read_tokens(tokenizer, None, "train")
        began = time.perf_counter()
        calibration = calibrate(model, tokens[:200 if part.toy else 20_000],
                                64 if part.toy else None, source)
        seconds = time.perf_counter() - began
        prompt = tokens[-40:].tolist()
        written[device, "dense"] = list(generate(model, prompt, count))
        table = calibration.thresholds(0.5, "uniform") | {"lm_head": None}
        sparsify(model, table)
        written[device, "50 % sparse"] = list(generate(model, prompt, count))
        with sparse_mode(model, "off"):
            guesses = generate_speculative(model, prompt, count, "sparse",
                                           {name: value for name, value in table.items()
                                            if value is not None})
            written[device, "speculative"] = list(guesses)
        part.say(f"{folder} on {device}: calibrated in {seconds:.1f} s, "
                   f"{guesses.statistics.tokens_a_pass:.2f} tokens a pass")
        part.add({"folder": str(folder), "device": device, "calibration": seconds,
                        "tokens a pass": guesses.statistics.tokens_a_pass})

    def compare(name, text, others, whose):
        same = first_difference(written[text], written[others])
        part.say(f"  {name}: the first {same} of {count} tokens are those of {whose}")
        part.add({"folder": str(folder), "text": name, "as": whose, "same": same,
                        "of": count})

    device = part.device.type
    compare("speculative", (device, "speculative"), (device, "dense"), "plain decoding")
    for name in ("dense", "50 % sparse", "speculative"):
        if device != "cpu":
            compare(name, (device, name), ("cpu", name), "the CPU")


@torch.no_grad()
def profile(part, preset):
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler
    model, thresholds = make_model(part, preset)
    fused.fuse(sparsify(model, thresholds(0.5) | {"lm_head": None}))
    cache = model.make_cache(1, 64)
    step = fast_step(model, cache)
    token = torch.ones(1, 1, dtype=torch.int64, device=part.device)
    for _ in range(3):               # the first ones set things up
        step(token)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not part.toy)
    with profiler(activities=activities) as seen:
        for _ in range(STEPS):
            step(token)
        if not part.toy:
            torch.cuda.synchronize()
    events = [(event.self_cpu_time_total if part.toy else event.self_device_time_total,
               event.count, event.key) for event in seen.key_averages()
              if part.toy or event.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(spent for spent, *_ in events) or 1
    for spent, times, name in sorted(events, reverse=True)[:14]:
        part.say(f"{spent / STEPS:10.1f} us a step{spent / total:6.0%}"
                   f"{times / STEPS:8.1f} times  {name[:70]}")
        part.add({"name": name, "us": spent / STEPS, "times": times / STEPS})


def tiles(part):
    """Time other tiles than those of kernel.TILE, which says what it takes to change it."""
    device = part.device
    inputs, outputs = (128, 200) if part.toy else (4096, 14336)
    weights = copies_of(inputs, outputs, torch.bfloat16, device, 1 << (16 if part.toy else 29))
    xs = inputs_like(weights, 1)
    before = kernel.TILE[2]
    try:
        for sizes in design.CONFIGURATIONS[:1 if part.toy else None]:
            part.check()
            kernel.TILE[2] = sizes
            line = f"{inputs} x {outputs} bfloat16, {design.text_of(sizes):24}"
            for level in (0.5,) if part.toy else (0, 0.5):
                thresholds = [kernel.threshold_dropping(x, level) for x in xs]
                seconds = median_time(
                    lambda i: sparse_gemv(xs[i % 8], weights[i % len(weights)], thresholds[i % 8],
                                          "triton"), device, 1e-3 if part.toy else 0.1)
                line += f"{level:8.0%}{1e6 * seconds:9.1f} us"
                part.add({**sizes, "level": level, "seconds": seconds})
            part.say(line + "   in use" * (sizes == before))
    finally:
        kernel.TILE[2] = before


def machine(part):
    name = "a CPU, with Triton's interpreter: the times mean nothing"
    if not part.toy:
        name = torch.cuda.get_device_name(part.device)
    version = kernel.triton.__version__ if kernel.triton else "none"
    part.say(f"{name}; torch {torch.__version__}, triton {version}")
    part.add({"name": name, "torch": torch.__version__, "triton": version})


def figure(report):
    """Draw what there is."""
    try:
        draw(report)
    except Exception as error:
        report.say(f"no figure: {type(error).__name__}: {error}")


def measure(folder, device, minutes=9, teal=None, gpt_fast=None, smollm2="smollm2"):
    """Do all parts on a device and write the report to a folder; return the Report."""
    report = Report(folder, minutes, device)
    report.kept = 12 * minutes if teal else 0
    presets = ("llama-3-8b", "llama-2-7b")[:1 if report.toy else 2]
    report.part("machine", 30, machine)
    report.part("right", 100, right)
    report.part("tests", 120, tests)
    report.part("products", 120, products)
    figure(report)
    for preset in presets:
        report.part(f"models: {preset}", 90, models, preset)
    report.part("models: int4", 60, quantized_model, "llama-3-8b", 4)
    report.part("texts: demo", 60, texts, DEMO)
    report.part("texts: SmolLM2", 90, texts, smollm2)
    report.part("profile", 40, profile, "llama-3-8b")
    report.part("tiles", 40, tiles)
    for preset in presets:
        if gpt_fast:
            report.part(f"gpt-fast: {preset}", 90, others, preset, "gpt-fast",
                        functools.partial(gpt_fast_rate, gpt_fast))
        if importlib.util.find_spec("transformers"):
            report.part(f"transformers: {preset}", 90, others, preset, "transformers",
                        transformers_rate)
    report.kept = 0
    if teal:                             # the last, since nobody here knows what it may break
        report.part("products: TEAL", 200, products, teal)
    figure(report)
    right_or_not = "right" if report.is_right() else "NOT shown to be right"
    report.say(f"\nproducts and tests are {right_or_not}")
    report.save()
    return report


def main():
    parser = Parser(description="Checks and measures all that a GPU has to say, within minutes.")
    parser.add_argument("--out", required=True, metavar="FOLDER",
                        help="where report.txt, report.json and report.png go")
    parser.add_argument("--teal", metavar="FOLDER", help="the authors' code (default: left out)")
    parser.add_argument("--gpt-fast", metavar="FOLDER", help="its code (default: left out)")
    parser.add_argument("--smollm2", metavar="FOLDER",
                        default=os.environ.get("MINTEAL_SMOLLM2", "smollm2"),
                        help="the folder of that model, if there (default: smollm2)")
    parser.add_argument("--minutes", type=float, default=9, help="(default: 9)")
    parser.add_device()
    arguments = parser.parse_args()
    require(kernel.triton is not None, "this needs Triton: pip install triton")
    for option, name in (("--teal", "kernels/sparse_gemv.py"), ("--gpt-fast", "model.py")):
        folder = vars(arguments)[option[2:].replace("-", "_")]
        require(folder is None or (Path(folder) / name).is_file(),
                f"{option} {folder}: expected a folder with {name}")
    report = measure(arguments.out, find_device(arguments.device), arguments.minutes,
                     arguments.teal, arguments.gpt_fast, arguments.smollm2)
    if not report.is_right():
        sys.exit(1)


if __name__ == "__main__":
    command_line(main)
