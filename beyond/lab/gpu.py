"""What a GPU has to say, in five minutes, and what can be said without one.

    python -m beyond.lab.gpu [--out FILE] [--teal FOLDER] [--gpt-fast FOLDER]
    python -m beyond.lab.gpu PART

Without PART all parts run in sequence, each in a process of its own, since a fault of the card
spoils all that follows in the same one. A part that fails is said, and the next one begins. The
exit status is 1 if something is not shown to be right.

    right       products against float64, the demo's text, fused too, against the CPU's
    models      tokens a second at Llama-3-8B's shapes, a CUDA graph a step: dense, core, beyond,
                and what could be faster; passes of 1 and 4 tokens
    products    us of a product in a CUDA graph, over copies larger than the cache, and of one whose
                programs list other numbers of channels
    profile     the kernels that a step spends its time in
    others      tokens a second of gpt-fast, compiled; the authors' kernel beside ours
    launches    what a step launches, counted without a GPU, and the step that follows from it
    registers   registers and spills of a step's kernels, compiled for sm_80, sm_90 and sm_100

--teal is a checkout of github.com/FasterDecoding/TEAL, --gpt-fast one of pytorch-labs/gpt-fast at
32971d3, whose model takes no mask yet: their code is loaded from there.
"""
import collections
import functools
import importlib.util
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernel
import model as llama
from beyond import fused
from beyond.codes import QuantizedLinear, codes_gemv
from beyond.folders import load_model
from beyond.lab.timing import BITS, random_codes, rate, time_product
from calibrate import load_calibration
from generate import StaticCache, fast_step, first_difference, generate
from kernel import copies_of, median_time, sparse_gemv, threshold_dropping, triton
from model import DEMO, PRESETS, Llama, Parser, command_line, find_device, linear_names, require
from sparsify import sparse_mode, sparsify

PRESET = "llama-3-8b"
SHAPES = ((4096, 1024), (4096, 4096), (4096, 6144), (4096, 14336), (14336, 4096), (4096, 28672))
SPANS = (64, 128, 256, 512)
TOTAL = 1 << 29                          # bytes of weights: more than a cache holds
TOKENS = 64                              # of a text
patch = mock.patch.object
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10}


# --------------------------------------------------------------------------------------------------
# right

def error_of(kind, rows, channels, outputs, threshold, device):
    """Return a product's error over what rounding allows: NaN if two calls give other bits."""
    bits = BITS.get(kind)
    dtype = torch.bfloat16 if bits else getattr(torch, kind)
    x = torch.randn(rows, channels, device=device).to(dtype)
    if bits:
        weight = random_codes(channels, outputs, bits, device)
        exact, product = weight.dequantized(torch.float64), codes_gemv
        # Codes are summed before they are scaled: rounding is proportional to their range.
        size = weight.scales.double().view(-1, outputs).amax(0).expand_as(exact) * 2 ** (bits - 1)
    else:
        weight = torch.randn(channels, outputs, device=device).to(dtype)
        exact, product, size = weight.double(), sparse_gemv, weight.double().abs()
    keep = x.double() * kernel.kept(x, kernel.as_threshold(threshold, x))
    y, again = (product(x, weight, threshold, "triton") for _ in range(2))
    errors = (y.double() - keep @ exact).abs() / (ROUNDING[dtype] * (keep.abs() @ size) + 1e-30)
    return errors.max().item() if y.equal(again) else math.nan


@torch.no_grad()
def right(device, arguments=None):
    """Return whether products, and the demo's text, fused too, are what they should be."""
    # Nothing here is to be deterministic that is not. But this fills memory that is asked for with
    # NaN, so that what a kernel never writes shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    fine = True
    for kind, rows in (("bfloat16", 1), ("bfloat16", 5), ("float16", 1), ("float32", 3),
                       ("int8", 1), ("int4", 1), ("int4", 3)):
        errors = []
        for channels, outputs in ((384, 257), (4096, 14336)):
            each = torch.rand(channels, device=device)
            errors += [error_of(kind, rows, channels, outputs, threshold, device)
                       for threshold in (each, each - 1, each + 9)]
        print(f"{kind:9}{rows} rows{max(errors):8.3f} of what rounding allows", flush=True)
        fine &= all(error <= 1 for error in errors)        # NaN is not
    torch.use_deterministic_algorithms(False)
    texts = []
    for where in (torch.device("cpu"), device):
        model, tokenizer = load_model(DEMO, where, torch.float32)
        prompt = tokenizer.encode("def main():\n")
        thresholds = load_calibration(model, DEMO).thresholds(0.5)
        for change in (lambda model: model, lambda model: sparsify(model, thresholds), fused.fuse):
            texts.append(list(generate(change(model), prompt, TOKENS)))
    dense, sparse = texts[:2]
    same = [first_difference(*both) for both in zip((dense, sparse, sparse), texts[3:])]
    print(f"so many of {TOKENS} tokens of the demo's text, dense, at 50 % and fused, are the "
          f"CPU's: {same}")
    return fine and min(same) == TOKENS


# --------------------------------------------------------------------------------------------------
# models, products, profile

def make_sparse(model, bits=16):
    """Make a Llama sparse, with random codes of 8 or 4 bits in its blocks if bits says so."""
    for name in linear_names(model.config) if bits < 16 else ():
        linear = model.get_submodule(name)
        inputs = linear.in_features
        weight = random_codes(inputs, linear.out_features, bits, model.device,
                              inputs ** -0.5 * 4 / 2**bits)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, QuantizedLinear(weight))
    return sparsify(model, dict.fromkeys(linear_names(model.config), 0.5) | {"lm_head": None})


@torch.no_grad()
def models(device, arguments=None):
    model = Llama.random(PRESET, device)
    calibration = load_calibration(model, f"random:{PRESET}")
    tables = {level: calibration.thresholds(level) for level in (0.4, 0.5)}
    rates = []

    def show(name, level=0):
        with sparse_mode(model, "decode" if level else "off", tables.get(level)):
            rates.append(rate(generate(model, range(1, 9), TOKENS)))
        print(f"{name:40}{level:6.0%}{rates[-1]:10.1f} tokens/s{rates[-1] / rates[0]:8.2f}x",
              flush=True)

    show("core, F.linear")
    make_sparse(model)
    show("core, x @ weight_t")
    for level in tables:
        show("core", level)
    with (patch(llama, "rotate", torch.compile(llama.rotate)),
          patch(llama.RMSNorm, "forward", torch.compile(llama.RMSNorm.forward))):
        show("core, norms and rotation compiled", 0.5)
    cache = model.make_cache(1, 64)
    step = fast_step(model, cache)
    for T in (1, 4):
        tokens = torch.ones(1, T, dtype=torch.int64, device=device)

        def verify(i):
            cache.used = 8
            step(tokens)

        with sparse_mode(model, "off"):
            print(f"a dense pass of {T} tokens: {1e3 * median_time(verify, device):.2f} ms")
    fused.fuse(model)
    for level in tables:
        show("beyond, fused", level)
    for name, value in (("JOINED", False), ("AHEAD", True)):
        with patch(fused, name, value):
            show(f"beyond, fused, {name} {value}", 0.5)
    for bits in (8, 4):
        make_sparse(model, bits)
        for level in (0, 0.5):
            show(f"beyond, fused, int{bits}", level)


def graph_time(call, device, seconds=0.5, launches=20):
    """Return the median time of call(i) inside a CUDA graph of many, i counting up."""
    call(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            call(i)
    return median_time(lambda i: graph.replay(), device, seconds / 10) / launches


@torch.no_grad()
def products(device, arguments=None):
    kernel.median_time = graph_time      # for the rest of this process
    for inputs, outputs in SHAPES:
        for kind in ("bfloat16", *BITS):
            time_product(inputs, outputs, kind, device, (0, 0.5, 0.75), TOTAL)
    x = torch.randn(1, SHAPES[0][0], device=device).bfloat16()
    threshold = threshold_dropping(x, 0.5)
    for inputs, outputs in SHAPES[:3]:
        weights = copies_of(inputs, outputs, x.dtype, device, TOTAL)
        for span in SPANS:
            with patch(kernel, "launch_product",
                       functools.partial(kernel.launch_product, per_split=span)):
                seconds = graph_time(lambda i: sparse_gemv(x, weights[i % len(weights)], threshold,
                                                           "triton"), device, 0.1)
            print(f"{inputs} x {outputs}, 50 %, a program lists {span} channels: "
                  f"{1e6 * seconds:.1f} us", flush=True)


@torch.no_grad()
def profile(device, arguments=None):
    model = Llama.random(PRESET, device)
    thresholds = load_calibration(model, f"random:{PRESET}").thresholds(0.5)
    fused.fuse(sparsify(model, thresholds | {"lm_head": None}))
    step = fast_step(model, model.make_cache(1, 64))
    token = torch.ones(1, 1, dtype=torch.int64, device=device)
    step(token)
    with torch.profiler.profile() as seen:
        for _ in range(8):
            step(token)
    print("8 steps")
    print(seen.key_averages().table("self_device_time_total", row_limit=14,
                                    max_name_column_width=60))


# --------------------------------------------------------------------------------------------------
# others

def load_file(path):
    """Return a Python file of others as a module."""
    spec = importlib.util.spec_from_file_location(f"others_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    # Only the authors' wrapper for torch.compile needs msgspec, and it is not used here.
    with mock.patch.dict(sys.modules, {"msgspec": types.SimpleNamespace(Struct=object)}):
        spec.loader.exec_module(module)
    return module


def gpt_fast_rate(folder, device):
    """Return the tokens a second of gpt-fast's model, compiled as its generate.py compiles it."""
    with torch.device(device):
        model = load_file(Path(folder) / "model.py").Transformer.from_name(PRESET)
        model = model.to(torch.bfloat16).eval()
        model.setup_caches(1, TOKENS)

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def decode(token, position):
        return model(token, position)[:, -1].argmax(-1, keepdim=True)

    def text():
        token = torch.ones(1, 1, dtype=torch.int64, device=device)
        for place in range(TOKENS):
            token = decode(token, torch.full((1,), place, device=device)).clone()
            yield token.item()           # as whoever writes a text waits for it

    return rate(text())


@torch.no_grad()
def others(device, arguments):
    if arguments.gpt_fast:
        print(f"gpt-fast, compiled, dense{gpt_fast_rate(arguments.gpt_fast, device):10.1f} "
              f"tokens/s", flush=True)
    if not arguments.teal:
        return
    # Their kernel computes in float16, adds with atomics, and tunes itself for each level.
    theirs = load_file(Path(arguments.teal) / "kernels" / "sparse_gemv.py").splitk_sparse_gemv
    for inputs, outputs in SHAPES[1:5]:
        weights = copies_of(inputs, outputs, torch.float16, device, TOTAL)
        x = torch.randn(1, inputs, device=device).half()
        for level in (0, 0.5):
            threshold = threshold_dropping(x, level).item()
            both = [median_time(lambda i: way(weights[i % len(weights)]), device, 0.1)
                    for way in (lambda w: theirs(x[None], w.t(), threshold, round(100 * level)),
                                lambda w: sparse_gemv(x, w, threshold, "triton"))]
            print(f"{inputs} x {outputs} float16 {level:.0%}: theirs {1e6 * both[0]:.1f} us, ours "
                  f"{1e6 * both[1]:.1f} us", flush=True)


# --------------------------------------------------------------------------------------------------
# launches, registers: a step of a model on the meta device, whose tensors have no numbers

# us of a launch in a step of Llama-3-8B at 50 %, bfloat16, on an H200, by the profile of a step (of
# products the mean; norms: alone), 1.0 of others, and before each launch.
COST = {"joint_product_kernel": 21.0, "mm": 235, "rms_norm": 4.1,
        "scaled_dot_product_attention": 6.2}
GAP = 0.86
NO_LAUNCH = {"_unsafe_view", "empty", "new_empty", "empty_like", "promote_types",
             "zeros"}                    # of the tickets, made once


class Launches(TorchDispatchMode):
    """Counts, inside a `with`, what a GPU would be told to do: counts, {operation: times}."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).rpartition(".")[0].removeprefix("aten.")
        self.counts[name] += not (function.is_view or name in NO_LAUNCH)
        return function(*args, **kwargs or {})


def meta_model(layers):
    """Return a sparse Llama of so many layers on the meta device."""
    config = replace(PRESETS[PRESET], num_hidden_layers=layers)
    return make_sparse(Llama.on_meta(config).to(torch.bfloat16))


@torch.no_grad()
def meta_step(model, mode, fuse=False, tokens=1, build=None):
    """Do a step of a model on the meta device as on a GPU; return a Counter of its launches.

    fuse: with fused.py. build(kernel, grid, *arguments, **constants) is called with what would be
    launched of Triton's kernels.
    """
    seen = Launches()

    def launch(function, grid, x, *arguments, **constants):
        seen.counts[function.__name__] += 1
        if build and hasattr(function, "warmup"):
            build(function, grid, x, *arguments, **constants)
        return torch.empty_like(x)

    norm, attention = (functools.partial(launch, function, None)
                       for function in (torch.rms_norm, F.scaled_dot_product_attention))
    with (patch(kernel, "launch", launch),
          patch(torch, "rms_norm", norm),
          patch(F, "scaled_dot_product_attention", attention),
          patch(kernel, "best_backend", lambda x: "triton"),
          patch(kernel, "fits_triton", lambda x: True),
          patch(llama, "can_multiply", lambda dtype: True),
          sparse_mode(model, mode)):
        if fuse:
            fused.fuse(model)
        cache = model.make_cache(1, 64)
        static = StaticCache(cache, tokens)
        x = torch.ones(1, tokens, dtype=torch.int64, device="meta")
        with seen:
            static.follow(cache, tokens, None)
            model(x, static)
    return +seen.counts


def launches(device=None, arguments=None):
    model = meta_model(PRESETS[PRESET].num_hidden_layers)
    blocks = sum(weight.nbytes for weight in model.model.layers.parameters())
    for what, mode, fuse in (("dense", "off", False), ("core, 50 %", "decode", False),
                             ("beyond, 50 %", "decode", True)):
        counts = meta_step(model, mode, fuse)
        read = model.lm_head.weight.nbytes + (blocks if mode == "off" else blocks / 2)
        print(f"{what}: {counts.total()} launches, {read / 1e9:.2f} GB a step: "
              + ", ".join(f"{times} {name}" for name, times in counts.most_common()))
    step = sum(times * (COST.get(name, 1.0) + GAP) for name, times in counts.items())
    print(f"with the costs of an H200: {step / 1e3:.2f} ms, {1e6 / step:.0f} tokens/s")


def registers(device=None, arguments=None, capabilities=(80, 90, 100), rows_of_x=(1, 8)):
    """Print what the compiler makes of a step's kernels; return whether nothing is spilled."""
    from triton.backends.compiler import GPUTarget

    tool = next(Path(triton.__file__).parent.rglob("bin/cuobjdump"))
    spills = {}
    for capability in capabilities:
        target = GPUTarget("cuda", capability, 32)
        triton.runtime.driver.set_active(types.SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: capability,
            get_current_stream=lambda device: 0))

        def build(function, grid, *arguments, **constants):
            if "AHEAD" in function.arg_names:
                constants["AHEAD"] = capability >= 90
            compiled = function.warmup(*arguments, grid=grid, **constants)
            if compiled in spills:
                return
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                Path(file.name).write_bytes(compiled.asm["cubin"])
                said = subprocess.run([tool, "-res-usage", "-sass", file.name], check=True,
                                      capture_output=True, text=True).stdout
            used = re.search("REG:([0-9]+)", said)[1]
            spills[compiled] = len(re.findall(r"\b(?:STL|LDL)\b", said))
            print(f"sm_{capability:<4}{used:>4} registers{spills[compiled]:4} spills  "
                  f"{function.__name__}", *(f"{name}={value}" for name, value in constants.items()),
                  flush=True)

        for rows in rows_of_x:
            model = meta_model(2)        # the second finds what the first has left for its norm
            meta_step(model, "all", False, rows, build)
            for bits in (16, 8, 4):
                make_sparse(model, bits)
                meta_step(model, "all", True, rows, build)
    return not any(spills.values())


# --------------------------------------------------------------------------------------------------

ON_A_GPU = ("right", "models", "products", "profile", "others")
PARTS = {part.__name__: part for part in (right, models, products, profile, others, launches,
                                          registers)}


def all_parts(arguments):
    """Do the parts that need a GPU, each in its own process; return whether all is right."""
    end = time.monotonic() + 60 * arguments.minutes
    fine = False
    with open(arguments.out or os.devnull, "w") as report:
        for part in ON_A_GPU:
            began = time.monotonic()
            command = [sys.executable, "-m", "beyond.lab.gpu", part, *sys.argv[1:]]
            try:
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                      timeout=max(1, end - began))
                text, status = done.stdout, done.returncode
            except subprocess.TimeoutExpired as stopped:
                text, status = stopped.stdout or b"", "left out from here on, the minutes are over"
            fine |= part == "right" and status == 0
            for file in (sys.stdout, report):
                print(f"--- {part}: {time.monotonic() - began:.0f} s, status {status}\n"
                      f"{text.decode(errors='replace')}", file=file, flush=True)
    return fine


def main():
    parser = Parser(description="Checks and measures all that a GPU has to say, within minutes.")
    parser.add_argument("part", nargs="?", choices=PARTS, metavar="PART",
                        help=f"one of {', '.join(PARTS)} (default: those that need a GPU)")
    parser.add_argument("--out", metavar="FILE", help="where the report of all goes, too")
    parser.add_argument("--teal", metavar="FOLDER", help="the authors' code (default: left out)")
    parser.add_argument("--gpt-fast", metavar="FOLDER", help="its code (default: left out)")
    parser.add_argument("--minutes", type=float, default=5, help="(default: 5)")
    parser.add_device()
    arguments = parser.parse_args()
    require(triton is not None, "this needs Triton: pip install triton")
    for option, folder, name in (("--teal", arguments.teal, "kernels/sparse_gemv.py"),
                                 ("--gpt-fast", arguments.gpt_fast, "model.py")):
        require(folder is None or (Path(folder) / name).is_file(),
                f"{option} {folder}: expected a folder with {name}")
    device = find_device(arguments.device)
    if arguments.part is None or arguments.part in ON_A_GPU:
        require(device.type == "cuda", "this needs a GPU; without one: launches, registers")
    if arguments.part is None:
        sys.exit(not all_parts(arguments))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton "
              f"{triton.__version__}", flush=True)
    sys.exit(PARTS[arguments.part](device, arguments) is False)


if __name__ == "__main__":
    command_line(main)
