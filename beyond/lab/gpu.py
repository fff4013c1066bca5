"""What a GPU has to say, in five minutes, and what can be said without one.

    python -m beyond.lab.gpu [--out FILE] [--teal FOLDER] [--gpt-fast FOLDER]
    python -m beyond.lab.gpu PART

Without PART all parts run in sequence, each in a process of its own, since a fault of the card
spoils all that follows in the same one. A part that fails is said, and the next one begins. The
exit status is 1 if something is not shown to be right.

    right       products against float64, a fused block against model.py's, the demo's text against
                the CPU's: half a minute
    models      tokens a second at Llama-3-8B's shapes, a CUDA graph a step: dense, core, beyond
    products    us of a product in a CUDA graph, over copies larger than the cache
    profile     the kernels that a step spends its time in
    others      tokens a second of gpt-fast, compiled; the authors' kernel beside ours
    launches    what a step launches, counted without a GPU, and the step that follows from it
    registers   registers and spills of each kernel, compiled for sm_80, sm_90 and sm_100

--teal is a checkout of github.com/FasterDecoding/TEAL, --gpt-fast one of pytorch-labs/gpt-fast:
their code is loaded from there. With --device cpu the parts run at toy sizes, the kernels in
Triton's interpreter: that shows that this file works, and its times mean nothing.
"""
import collections
import contextlib
import importlib.util
import inspect
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

if __name__ == "__main__":               # read when triton is imported
    os.environ["TRITON_INTERPRET"] = str(int("cpu" in sys.argv and "registers" not in sys.argv))

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernel
import model as llama
from beyond import fused
from beyond.codes import QuantizedLinear, codes_gemv
from beyond.folders import load_model
from beyond.lab import timing
from beyond.lab.timing import BITS, random_codes, rate, time_product
from calibrate import load_calibration
from generate import StaticCache, fast_step, first_difference, generate
from kernel import copies_of, median_time, sparse_gemv, threshold_dropping
from model import (DEMO, PRESETS, Llama, Parser, block_linears, command_line, find_device,
                   linear_names, require)
from sparsify import sparse_mode, sparsify

TOY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
           num_key_value_heads=2, head_dim=16, vocab_size=97, max_position_embeddings=128)
SHAPES = ((4096, 1024), (4096, 4096), (4096, 6144), (4096, 14336), (14336, 4096), (4096, 28672))
PRESET = "llama-3-8b"
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def is_toy(device):
    return device.type != "cuda"


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
    """Return whether products, a fused block and the demo's text are what they should be."""
    toy = is_toy(device)
    # Nothing here is to be deterministic that is not. But this fills memory that is asked for with
    # NaN, so that what a kernel never writes shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    fine = True
    for kind, rows in (("bfloat16", 1), ("bfloat16", 5), ("float16", 1), ("float32", 3),
                       ("int8", 1), ("int4", 1), ("int4", 3)):
        errors = []
        for channels, outputs in ((128, 35),) if toy else ((384, 257), (4096, 14336)):
            each = torch.rand(channels, device=device)
            errors += [error_of(kind, rows, channels, outputs, threshold, device)
                       for threshold in (each, each - 1, each + 9)[:1 if toy else 3]]
        print(f"{kind:9}{rows} rows{max(errors):8.3f} of what rounding allows", flush=True)
        fine &= all(error <= 1 for error in errors)        # NaN is not
    torch.use_deterministic_algorithms(False)
    count, step = (4, static_step) if toy else (64, fast_step)
    texts = []
    for where in (torch.device("cpu"), device):
        model, tokenizer = load_model(DEMO, where, torch.float32)
        prompt = tokenizer.encode("def main():\n")
        thresholds = load_calibration(model, DEMO).thresholds(0.5)
        for change in (lambda model: model, lambda model: sparsify(model, thresholds), fused.fuse):
            texts.append(list(generate(change(model), prompt, count, make_step=step)))
    dense, sparse = texts[:2]
    same = [first_difference(*both) for both in zip((dense, sparse, sparse), texts[3:])]
    print(f"so many of {count} tokens of the demo's text, dense, at 50 % and fused, are the CPU's: "
          f"{same}")
    return fine and min(same) == count


# --------------------------------------------------------------------------------------------------
# models, products, profile

def make_model(device):
    """Return (a Llama with random weights, thresholds(sparsity)); on a CPU a small one."""
    if is_toy(device):
        model = Llama(replace(PRESETS[PRESET], **TOY)).fill_random(0)
    else:
        model = Llama.random(PRESET, device)
    return model, load_calibration(model, f"random:{PRESET}").thresholds


@torch.no_grad()
def models(device, arguments=None):
    count, step = (4, static_step) if is_toy(device) else (100, fast_step)
    rates = []

    def show(name, level, mode, table=None):
        with sparse_mode(model, mode, table):
            rates.append(rate(generate(model, range(1, 9), count, make_step=step)))
        print(f"{name:40}{level:6.0%}{rates[-1]:10.1f} tokens/s{rates[-1] / rates[0]:8.2f}x",
              flush=True)

    model, thresholds = make_model(device)
    tables = {level: thresholds(level) for level in (0.4, 0.5)}
    show("core, F.linear", 0, "off")
    sparsify(model, tables[0.5] | {"lm_head": None})
    show("core, x @ weight_t", 0, "off")
    for level, table in tables.items():
        show("core", level, "decode", table)
    fused.fuse(model)
    for level, table in tables.items():
        show("beyond, fused", level, "decode", table)
    with mock.patch.object(fused, "AHEAD", not is_toy(device)):
        show("beyond, fused, dependent launches", 0.5, "decode", tables[0.5])
    for bits in (8, 4):
        for name in linear_names(model.config):
            parent, _, leaf = name.rpartition(".")
            inputs, outputs = model.get_submodule(name).weight_t.shape
            weight = random_codes(inputs, outputs, bits, device, inputs ** -0.5 * 4 / 2**bits)
            setattr(model.get_submodule(parent), leaf, QuantizedLinear(weight))
        sparsify(model, tables[0.5])
        show(f"beyond, fused, int{bits}", 0, "off")
        show(f"beyond, fused, int{bits}", 0.5, "decode")


def graph_time(call, device, seconds=0.5, launches=20):
    """Return the median time of call(i) inside a CUDA graph of many, i counting up."""
    call(0)
    if is_toy(device):
        return math.nan
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            call(i)
    return median_time(lambda i: graph.replay(), device, seconds / 10) / launches


@torch.no_grad()
def products(device, arguments=None):
    shapes, levels, total = SHAPES, (0, 0.5, 0.75), 1 << 29
    if is_toy(device):
        shapes, levels, total = ((128, 200),), (0.5,), 1 << 16
    with (mock.patch.object(kernel, "median_time", graph_time),
          mock.patch.object(timing, "median_time", graph_time)):
        for inputs, outputs in shapes:
            for kind in ("bfloat16", *BITS):
                time_product(inputs, outputs, kind, device, levels, total)


@torch.no_grad()
def profile(device, arguments=None, steps=8):
    model, thresholds = make_model(device)
    fused.fuse(sparsify(model, thresholds(0.5) | {"lm_head": None}))
    step = fast_step(model, model.make_cache(1, 64))
    token = torch.ones(1, 1, dtype=torch.int64, device=device)
    step(token)
    with torch.profiler.profile() as seen:
        for _ in range(steps):
            step(token)
        if not is_toy(device):
            torch.cuda.synchronize()
    key = f"self_{'cpu' if is_toy(device) else 'device'}_time_total"
    print(f"{steps} steps")
    print(seen.key_averages().table(sort_by=key, row_limit=14, max_name_column_width=60))


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


@torch.no_grad()
def gpt_fast_rate(folder, device):
    """Return the tokens a second of gpt-fast's model, compiled as its generate.py compiles it."""
    toy = is_toy(device)
    tokens = 4 if toy else 100
    module = load_file(Path(folder) / "model.py")
    config = replace(PRESETS[PRESET], **TOY if toy else {})
    with torch.device(device):
        model = module.Transformer(module.ModelArgs(
            block_size=config.max_position_embeddings, vocab_size=config.vocab_size,
            n_layer=config.num_hidden_layers, n_head=config.num_attention_heads,
            dim=config.hidden_size, intermediate_size=config.intermediate_size,
            n_local_heads=config.num_key_value_heads, rope_base=config.rope_theta))
        model = model.to(torch.bfloat16).eval()
        model.setup_caches(1, 8 + tokens)
    masks = ()
    length = model.max_seq_length
    if "mask" in inspect.signature(model.forward).parameters:  # newer: a row of a mask comes first
        from torch.nn.attention.flex_attention import create_block_mask
        masks = create_block_mask(lambda b, h, query, key: query >= key, 1, 1, length, length,
                                  device=device),

    def decode(token, position, *masks):
        rows = [mask[:, :, position // mask.BLOCK_SIZE[0]] for mask in masks]
        for row, mask in zip(rows, masks):
            row.mask_mod = mask.mask_mod
            row.seq_lengths = (1, length)
        return model(*rows, token, position)[:, -1].argmax(-1, keepdim=True)

    if not toy:
        decode = torch.compile(decode, mode="reduce-overhead", fullgraph=True)

    def text():
        token = torch.ones(1, 1, dtype=torch.int64, device=device)
        for place in range(tokens):
            position = torch.full((1,), place, device=device)
            token = decode(token, position, *masks).clone()
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
    for inputs, outputs in ((128, 200),) if is_toy(device) else SHAPES[1:5]:
        weights = copies_of(inputs, outputs, torch.float16, device, 1 << 29)
        x = torch.randn(1, inputs, device=device).half()
        for level in (0, 0.5):
            threshold = threshold_dropping(x, level).item()
            both = [median_time(lambda i: way(weights[i % len(weights)]), device, 0.1)
                    for way in (lambda w: theirs(x[None], w.t(), threshold, round(100 * level)),
                                lambda w: sparse_gemv(x, w, threshold, "triton"))]
            print(f"{inputs} x {outputs} float16 {level:.0%}: theirs {1e6 * both[0]:.1f} us, ours "
                  f"{1e6 * both[1]:.1f} us", flush=True)


# --------------------------------------------------------------------------------------------------
# launches: counted where they are made, while a small model with as many layers writes a text

NO_LAUNCH = {"detach", "_unsafe_view", "empty", "new_empty", "empty_like", "lift_fresh",
             "promote_types", "_local_scalar_dense"}
WAITS = {"cpu", "item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__",
         "__index__", "__contains__", "nonzero", "is_nonzero", "equal", "masked_select"}
# us of a launch in a step of Llama-3-8B at 50 %, bfloat16, on an H200, by the profile of a step (of
# products the mean; norms: alone), and before each launch.
COST = {"joint_product_kernel": 21.0, "mm": 235, "rotate_kernel": 1.7, "norm_kernel": 1.7,
        "rms_norm": 4.1, "_scaled_dot_product_flash_attention_for_cpu": 6.2}
GAP = 0.86


class Launches(TorchDispatchMode):
    """Counts, inside a `with`, what a GPU would be told to do, {operation: times}.

    A view is nothing. waits: what makes the host wait for the GPU, counted in the same way.
    """

    def __init__(self):
        super().__init__()
        self.counts, self.waits = collections.Counter(), collections.Counter()
        self.paused = False

    def as_one(self, name, call):
        """Return a function that does what `call` does, counted as one operation."""
        def counted(*arguments, **named):
            self.counts[name] += 1
            self.paused = True
            result = call(*arguments, **named)
            self.paused = False
            return result
        return counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).rpartition(".")[0].removeprefix("aten.")
        self.counts[name] += not (self.paused or function.is_view or name in NO_LAUNCH)
        return function(*args, **kwargs or {})


class Waits(TorchFunctionMode):
    """Counts, inside a `with`, what makes the host wait for a GPU, {function: times}."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        to_cpu = name == "to" and "cpu" in map(str, (*args[1:], *kwargs.values()))
        by_mask = name in ("__getitem__", "__setitem__") and torch.bool in {
            getattr(index, "dtype", None) for index in tree_leaves(args[1])}
        self.counts[name] += name in WAITS or to_cpu or by_mask
        return function(*args, **kwargs)


@contextlib.contextmanager
def counting(launches):
    """Inside a `with`, count as on a GPU: activations of 16 bits, products by Triton's kernels."""
    def kernel_of(name, names):
        """Return what stands for a Triton kernel, called as kernel[grid](arguments): zeros."""
        def launch(*arguments, **constants):
            for pointer, argument in zip(names, arguments):
                if pointer in ("y_ptr", "query_ptr"):
                    argument.zero_()
        return collections.defaultdict(lambda: launches.as_one(name, launch))

    patch = mock.patch.object
    patches = [patch(module, name, kernel_of(name, value.arg_names))
               for module in (kernel, fused) for name, value in list(vars(module).items())
               if name.endswith("_kernel")]
    patches += [patch(torch, "rms_norm", launches.as_one("rms_norm", torch.rms_norm)),
                patch(kernel, "best_backend", lambda x: "triton"),
                patch(kernel, "fits_c", lambda x: False),
                patch(kernel, "check_triton", lambda x: None),
                patch(fused, "is_interpreted", lambda: True),
                patch(llama, "can_multiply", lambda dtype: True),
                patch(Llama, "activation_dtype", property(lambda self: self.dtype))]
    with contextlib.ExitStack() as stack:
        for each in (*patches, Waits(launches.waits), launches):
            stack.enter_context(each)
        yield


def static_step(model, cache, tokens=1):
    """Return a step that does what generate.GraphStep does, without a graph."""
    static = StaticCache(cache, 1)

    def step(tokens):
        static.follow(cache, 1, model.config.sliding_window)
        cache.advance(1)
        return model(tokens, static)

    return step


@torch.no_grad()
def step_launches(preset, mode, fuse=False, **sampling):
    """Return the Launches of a token that `generate` writes: a step's, and generate's own.

    mode: "off" (dense) or "decode" (sparse). fuse: with fused.py.
    """
    real = PRESETS[preset]
    small = replace(real, hidden_size=2 * real.num_attention_heads, intermediate_size=96,
                    head_dim=2, vocab_size=64)
    model = Llama(small).to(torch.bfloat16).eval()
    sparsify(model, dict.fromkeys(linear_names(small), 0.5) | {"lm_head": None})
    launches = Launches()
    with sparse_mode(model, mode), counting(launches):
        if fuse:
            fused.fuse(model)
        text = generate(model, [1, 2, 3], 4, **sampling, make_step=static_step)
        for _ in range(3):               # the prompt's, one in which tickets are made, and one more
            launches.counts.clear()
            launches.waits.clear()
            next(text)
    return launches


def launches(device=None, arguments=None):
    config = PRESETS[PRESET]
    blocks = config.num_hidden_layers * sum(2 * outputs * inputs for outputs, inputs
                                            in block_linears(config).values())
    head = 2 * config.vocab_size * config.hidden_size
    for what, mode, fuse in (("dense", "off", False), ("core, 50 %", "decode", False),
                             ("beyond, 50 %", "decode", True)):
        counts = +step_launches(PRESET, mode, fuse).counts
        gigabytes = ((blocks if mode == "off" else blocks / 2) + head) / 1e9
        print(f"{what}: {counts.total()} launches, {gigabytes:.2f} GB a step: "
              + ", ".join(f"{times} {name}" for name, times in counts.most_common()))
    step = sum(times * (COST.get(name, 1.0) + GAP) for name, times in counts.items())
    print(f"with the costs of an H200: {step / 1e3:.2f} ms, {1e6 / step:.0f} tokens/s")


# --------------------------------------------------------------------------------------------------
# registers

# Triton's types of pointers, by their names; others are of x's, bfloat16. By the bits of a code.
TYPES = {"threshold": "*fp32", "partial": "*fp32", "channel": "*i32", "ticket": "*i32",
         "slot": "*i64"}
CODES = {0: {}, 8: {"weight": "*i32", "scale": "*fp32", "zero": "*i32", "input": "*fp32"},
         4: {"weight": "*i32", "scale": "*bf16", "zero": "*u8", "input": "*fp32"}}


def built(function, capability, bits, warps, constants):
    """Return the numbers of registers and of spills of a Triton kernel for a GPU not here.

    constants: the constexpr arguments. As the launcher would, it takes addresses and sizes for
    multiples of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, fixed, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        signature[name] = "fp32" if name == "eps" else "i32"
        if name in constants:
            signature[name] = "constexpr"
            fixed[(i,)] = constants[name]
        elif name.endswith("_ptr"):
            signature[name] = (TYPES | CODES[bits]).get(re.sub("[0-9]*_ptr", "", name), "*bf16")
        if signature[name][0] in "*i" and name != "rows":
            attributes[(i,)] = [["tt.divisibility", 16]]
    made = triton.compile(ASTSource(function, signature, fixed, attributes),
                          target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        tool = next(Path(triton.__file__).parent.rglob("bin/cuobjdump"))
        usage, sass = (subprocess.run([tool, option, file.name], capture_output=True, text=True,
                                      check=True).stdout for option in ("-res-usage", "-sass"))
    return int(re.search("REG:([0-9]+)", usage)[1]), len(re.findall(r"\b(?:STL|LDL)\b", sass))


def registers(device=None, arguments=None, capabilities=(80, 90, 100), rows_of_x=(1, 8)):
    """Print what the compiler makes of all kernels; return whether nothing is spilled."""
    fine = True
    for capability in capabilities:
        cases = [("rotate", fused.rotate_kernel, 0, 1, dict(D=128, BLOCK=128)),
                 ("norm", fused.norm_kernel, 0, 8, dict(BLOCK=4096))]
        for rows in rows_of_x:
            sizes = dict(STEP=1, ROWS=rows, SPAN=256)
            cases += [(f"sparse, {rows} rows", kernel.sparse_product_kernel, 0, 4,
                       sizes | kernel.TILE[2])]
            cases += [(f"joint, {bits or 16} bits, {rows} rows", fused.joint_product_kernel, bits,
                       4, sizes | fused.tile_of(bits, rows, 2)
                       | dict(BITS=bits, GATED=rows == 1, RESIDUAL=rows > 1))
                      for bits in (0, 8, 4)]
        for name, function, bits, warps, constants in cases:
            if "AHEAD" in function.arg_names:
                constants["AHEAD"] = capability >= 90
            used, spilled = built(function, capability, bits, warps, constants)
            print(f"sm_{capability:<4}{name:24}{used:7} registers{spilled:7} spills", flush=True)
            fine &= not spilled
    return fine


# --------------------------------------------------------------------------------------------------

PARTS = {part.__name__: part for part in (right, models, products, profile, others, launches,
                                          registers)}
NO_CARD = ("launches", "registers")      # parts that need none


def all_parts(options, minutes, out):
    """Do the parts that need a card, each in its own process; return whether all is right."""
    end = time.monotonic() + 60 * minutes
    fine = False
    with open(out or os.devnull, "w") as report:
        for part in [part for part in PARTS if part not in NO_CARD]:
            began = time.monotonic()
            try:
                done = subprocess.run([sys.executable, "-m", "beyond.lab.gpu", part, *options],
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
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
    require(kernel.triton is not None, "this needs Triton: pip install triton")
    options = ["--device", arguments.device]
    for option, folder, name in (("--teal", arguments.teal, "kernels/sparse_gemv.py"),
                                 ("--gpt-fast", arguments.gpt_fast, "model.py")):
        require(folder is None or (Path(folder) / name).is_file(),
                f"{option} {folder}: expected a folder with {name}")
        options += [option, folder] if folder else []
    if arguments.part is None:
        sys.exit(not all_parts(options, arguments.minutes, arguments.out))
    device = torch.device("cpu") if arguments.part in NO_CARD else find_device(arguments.device)
    if not is_toy(device):
        torch.cuda.set_device(device)
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton "
              f"{kernel.triton.__version__}", flush=True)
    sys.exit(PARTS[arguments.part](device, arguments) is False)


if __name__ == "__main__":
    command_line(main)
