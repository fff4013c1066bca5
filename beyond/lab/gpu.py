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
import statistics
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

import kernel
import model as llama
from beyond import fused
from beyond.codes import QuantizedLinear, QuantizedWeight, codes_gemv, words_of
from beyond.folders import load_model
from calibrate import load_calibration
from generate import StaticCache, fast_step, first_difference, generate
from kernel import copies_of, sparse_gemv, threshold_dropping
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

def random_codes(inputs, outputs, bits, device, scale=1.0):
    """Return a QuantizedWeight (inputs, outputs) of random codes, 4 bits in groups of 128."""
    words = words_of(outputs, bits)
    group = min(128, inputs)
    codes = torch.randint(-2**31, 2**31, (inputs, words), dtype=torch.int32, device=device)
    scales = scale * torch.rand(1 if bits == 8 else inputs // group, outputs, device=device)
    if bits == 8:
        return QuantizedWeight(codes, scales[0])
    zeros = torch.randint(16, scales.shape, dtype=torch.uint8, device=device)
    return QuantizedWeight(codes, scales.bfloat16(), zeros, group)


def error_of(kind, rows, channels, outputs, threshold, device):
    """Return a product's error over what rounding allows: NaN if two calls give other bits."""
    bits = {"int8": 8, "int4": 4}.get(kind)
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
    allowed = ROUNDING[dtype] * (keep.abs() @ size) + 1e-30
    errors = (y.double() - keep @ exact).abs() / allowed
    return errors.max().item() if y.equal(again) else math.nan


@torch.no_grad()
def right(device, arguments=None):
    """Return whether products, a fused block and the demo's text are what they should be."""
    toy = is_toy(device)
    # Nothing here is to be deterministic that is not. But this fills memory that is asked for with
    # NaN, so that what a kernel never writes shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    worst = 0.0
    for kind, rows in (("bfloat16", 1), ("bfloat16", 5), ("float16", 1), ("float32", 3),
                       ("int8", 1), ("int4", 1), ("int4", 3)):
        errors = []
        for channels, outputs in ((128, 35),) if toy else ((384, 257), (4096, 14336)):
            each = torch.rand(channels, device=device)
            errors += [error_of(kind, rows, channels, outputs, threshold, device)
                       for threshold in (each, each - 1, each + 9)[:1 if toy else 3]]
        print(f"{kind:9}{rows} rows{max(errors):8.3f} of what rounding allows", flush=True)
        worst = max(worst, *errors, key=lambda error: (error != error, error))
    torch.use_deterministic_algorithms(False)
    texts = {}
    count = 4 if toy else 64
    for where in dict.fromkeys((torch.device("cpu"), device)):
        model, tokenizer = load_model(DEMO, where, torch.float32)
        prompt = tokenizer.encode("def main():\n")
        texts[where, "dense"] = list(generate(model, prompt, count))
        sparsify(model, load_calibration(model, DEMO).thresholds(0.5))
        texts[where, "50 %"] = list(generate(model, prompt, count))
    step = static_step if toy else fast_step
    texts[device, "50 %, fused"] = list(generate(fused.fuse(model), prompt, count, make_step=step))
    same = {name: first_difference(texts[torch.device("cpu"), name.split(",")[0]], text)
            for (_, name), text in texts.items()}
    print(f"so many of {count} tokens of the demo's text are the CPU's: {same}")
    return worst <= 1 and min(same.values()) == count


# --------------------------------------------------------------------------------------------------
# models, products, profile

def make_model(device):
    """Return (a Llama with random weights, thresholds(sparsity)); on a CPU a small one."""
    if is_toy(device):
        model = Llama(replace(PRESETS[PRESET], **TOY)).fill_random(0)
    else:
        model = Llama.random(PRESET, device)
    return model, load_calibration(model, f"random:{PRESET}").thresholds


def rate(model, device):
    """Return the median tokens a second with which a text follows a prompt."""
    times = []
    count, step = (4, static_step) if is_toy(device) else (100, fast_step)
    for _ in generate(model, list(range(1, 9)), count, make_step=step):
        times.append(time.perf_counter())
    return 1 / statistics.median(end - begin for begin, end in zip(times, times[1:]))


@torch.no_grad()
def models(device, arguments=None):
    def show(name, level, mode, table=None):
        with sparse_mode(model, mode, table):
            speed = rate(model, device)
        rates.append(speed)
        print(f"{name:40}{level:6.0%}{speed:10.1f} tokens/s{speed / rates[0]:8.2f}x", flush=True)

    rates = []
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
            linear = model.get_submodule(name)
            inputs, outputs = linear.in_features, linear.out_features
            weight = random_codes(inputs, outputs, bits, device, inputs ** -0.5 * 4 / 2**bits)
            setattr(model.get_submodule(parent), leaf, QuantizedLinear(weight))
        sparsify(model, tables[0.5])
        show(f"beyond, fused, int{bits}", 0, "off")
        show(f"beyond, fused, int{bits}", 0.5, "decode")


def graph_time(call, device, launches=20):
    """Return the seconds of call(i) inside a CUDA graph of many, i counting up."""
    if is_toy(device):
        began = time.perf_counter()
        call(0)
        return time.perf_counter() - began
    call(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            call(i)
    return kernel.median_time(lambda i: graph.replay(), device, 0.05) / launches


@torch.no_grad()
def products(device, arguments=None):
    toy = is_toy(device)
    levels = (0.5,) if toy else (0, 0.5, 0.75)
    print(f"us in a CUDA graph at {', '.join(f'{level:.0%}' for level in levels)}; a row of x; "
          f"in brackets kept bytes, GB/s")
    for inputs, outputs in ((128, 200),) if toy else SHAPES:
        floats = copies_of(inputs, outputs, torch.bfloat16, device, 1 << (16 if toy else 29))
        x = torch.randn(1, inputs, device=device).bfloat16()
        rows = [weight.t().contiguous() for weight in floats]              # (out, in), as usual
        dense = graph_time(lambda i: torch.nn.functional.linear(x, rows[i % len(rows)]), device)
        print(f"{inputs} x {outputs}: F.linear {1e6 * dense:.1f}", end="")
        del rows
        for bits in (16, 8, 4):
            weights, product = floats, sparse_gemv
            if bits < 16:
                product = codes_gemv
                weights = [random_codes(inputs, outputs, bits, device)
                           for _ in range(min(20, len(floats) * 16 // bits))]
            print(f"; {bits} bits", end="")
            for level in levels:
                threshold = threshold_dropping(x, level)
                seconds = graph_time(lambda i: product(x, weights[i % len(weights)], threshold,
                                                       "triton"), device)
                used = (1 - level) * inputs * outputs * bits / 8 / seconds / 1e9
                print(f" {1e6 * seconds:.1f} ({used:.0f})", end="", flush=True)
        print()


@torch.no_grad()
def profile(device, arguments=None, steps=8):
    toy = is_toy(device)
    model, thresholds = make_model(device)
    fused.fuse(sparsify(model, thresholds(0.5) | {"lm_head": None}))
    step = fast_step(model, model.make_cache(1, 64))
    token = torch.ones(1, 1, dtype=torch.int64, device=device)
    step(token)
    with torch.profiler.profile() as seen:
        for _ in range(steps):
            step(token)
        if not toy:
            torch.cuda.synchronize()
    events = [(event.self_cpu_time_total if toy else event.self_device_time_total, event.count,
               event.key) for event in seen.key_averages()
              if toy or event.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(spent for spent, *_ in events) or 1
    for spent, times, name in sorted(events, reverse=True)[:14]:
        print(f"{spent / steps:10.1f} us a step{spent / total:6.0%}{times / steps:8.1f} times  "
              f"{name[:60]}")


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
    mask = ()
    if "mask" in inspect.signature(model.forward).parameters:  # newer: a row of a mask comes first
        from torch.nn.attention.flex_attention import create_block_mask
        length = model.max_seq_length
        mask = create_block_mask(lambda b, h, query, key: query >= key, 1, 1, length, length,
                                 device=device),

    def decode(token, position, *masks):
        rows = [mask[:, :, position // mask.BLOCK_SIZE[0]] for mask in masks]
        for row, mask in zip(rows, masks):
            row.mask_mod = mask.mask_mod
            row.seq_lengths = (1, length)
        return model(*rows, token, position)[:, -1].argmax(-1, keepdim=True)

    if not toy:
        decode = torch.compile(decode, mode="reduce-overhead", fullgraph=True)
    token = torch.ones(1, 1, dtype=torch.int64, device=device)
    position = torch.zeros(1, dtype=torch.int64, device=device)
    times = []
    for _ in range(tokens):
        token = decode(token, position, *mask).clone()
        position += 1
        token.item()                     # as whoever writes a text waits for it
        times.append(time.perf_counter())
    return 1 / statistics.median(end - begin for begin, end in zip(times, times[1:]))


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
            both = [kernel.median_time(lambda i: way(weights[i % len(weights)]), device, 0.1)
                    for way in (lambda w: theirs(x[None], w.t(), threshold, round(100 * level)),
                                lambda w: sparse_gemv(x, w, threshold, "triton"))]
            print(f"{inputs} x {outputs} float16 {level:.0%}: theirs {1e6 * both[0]:.1f} us, ours "
                  f"{1e6 * both[1]:.1f} us", flush=True)


# --------------------------------------------------------------------------------------------------
# launches: counted where they are made, while a small model with as many layers writes a text

NO_LAUNCH = {"detach", "_unsafe_view", "empty", "new_empty", "empty_like", "lift_fresh",
             "promote_types"}
HOST = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"}
CALLS_TO_HOST = {"cpu", "item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__",
                 "__index__", "__contains__"}
# us of a launch in a step of Llama-3-8B at 50 %, bfloat16, on an H200, by the profile of a step (of
# products the mean; add_norm_kernel: a norm of one Triton program alone), and before each launch.
COST = {"joint_product_kernel": 21.0, "mm": 235, "rotate_kernel": 1.7, "add_norm_kernel": 1.7,
        "_scaled_dot_product_flash_attention_for_cpu": 6.2}
GAP = 0.86


class Launches(TorchDispatchMode):
    """Counts, inside a `with`, what a GPU would be told to do, {operation: times}.

    A view is nothing. waits: what makes the host wait for the GPU, counted in the same way.
    """

    def __init__(self):
        super().__init__()
        self.counts, self.waits = collections.Counter(), collections.Counter()
        self.paused = False

    @contextlib.contextmanager
    def one(self, name, counts):
        """Count what is inside a `with` as one operation."""
        counts[name] += not self.paused
        before, self.paused = self.paused, True
        yield
        self.paused = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).rpartition(".")[0].removeprefix("aten.")
        by_mask = name in ("index", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1])
        if not self.paused:
            self.counts[name] += not function.is_view and name not in NO_LAUNCH
            self.waits[name] += name in HOST or by_mask
        return function(*args, **kwargs or {})


class WholeCalls(TorchFunctionMode):
    """Shows `Launches` an RMSNorm as one operation, and calls that wait for the host."""

    def __init__(self, launches):
        super().__init__()
        self.launches = launches

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        to_cpu = name == "to" and "cpu" in map(str, (*args[1:], *kwargs.values()))
        whole = contextlib.nullcontext()
        if name == "rms_norm":
            whole = self.launches.one(name, self.launches.counts)
        elif name in CALLS_TO_HOST or to_cpu:
            whole = self.launches.one(name, self.launches.waits)
        with whole:
            return function(*args, **kwargs)


def noted(name, arg_names, launches):
    """Return what stands for a Triton kernel: it notes a launch, and computes zeros."""
    def launch(*arguments, **constants):
        with launches.one(name, launches.counts):
            for pointer, argument in zip(arg_names, arguments):
                if pointer in ("y_ptr", "query_ptr", "sum_ptr", "normed_ptr"):
                    argument.zero_()

    return collections.defaultdict(lambda: launch)         # kernel[grid](arguments)


@contextlib.contextmanager
def counting(launches):
    """Inside a `with`, count as on a GPU: activations of 16 bits, products by Triton's kernels."""
    patch = mock.patch.object
    patches = [patch(module, name, noted(name, value.arg_names, launches))
               for module in (kernel, fused) for name, value in list(vars(module).items())
               if name.endswith("_kernel")]
    patches += [patch(kernel, "best_backend", lambda x: "triton"),
                patch(kernel, "fits_c", lambda x: False),
                patch(kernel, "check_triton", lambda x: None),
                patch(fused, "is_interpreted", lambda: True),
                patch(llama, "can_multiply", lambda dtype: True),
                patch(Llama, "activation_dtype", property(lambda self: self.dtype))]
    with contextlib.ExitStack() as stack:
        for each in (*patches, WholeCalls(launches), launches):
            stack.enter_context(each)
        yield


def static_step(model, cache, tokens=1):
    """Return a step that does what generate.GraphStep does, without a graph."""
    static = StaticCache(cache, 1)

    def step(tokens):
        if tokens.shape[1] > 1:
            return model(tokens, cache)
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

# Triton's types of pointers, by their names; others are of x's. By the bits of a code.
TYPES = {"threshold": "*fp32", "partial": "*fp32", "channel": "*i32", "ticket": "*i32",
         "slot": "*i64"}
CODES = {0: {}, 8: {"weight": "*i32", "scale": "*fp32", "zero": "*i32", "input": "*fp32"},
         4: {"weight": "*i32", "scale": "*bf16", "zero": "*u8", "input": "*fp32"}}


def built(function, capability, bits, warps, constants):
    """Return {registers, spills, barriers, shared} of a Triton kernel for a GPU that is not here.

    constants: the constexpr arguments. As the launcher would, it takes addresses and sizes for
    multiples of 16; x is bfloat16.
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
    return {"registers": int(re.search("REG:([0-9]+)", usage)[1]),
            "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
            "barriers": sass.count("BAR.SYNC"), "shared": made.metadata.shared}


def registers(device=None, arguments=None, capabilities=(80, 90, 100), rows_of_x=(1, 8)):
    """Print what the compiler makes of all kernels; return whether nothing is spilled."""
    spills = 0
    for capability in capabilities:
        cases = [("rotate", fused.rotate_kernel, 0, 1, dict(D=128, BLOCK=128)),
                 ("add, norm", fused.add_norm_kernel, 0, 8, dict(ADD=True, BLOCK=4096))]
        for rows in rows_of_x:
            sizes = dict(STEP=1, ROWS=rows, SPAN=256)
            cases += [(f"sparse, {rows} rows", kernel.sparse_product_kernel, 0, 4,
                       sizes | kernel.TILE[2])]
            cases += [(f"joint, {bits or 16} bits, {rows} rows", fused.joint_product_kernel, bits,
                       4, sizes | fused.tile_of(bits, rows, 2) | dict(BITS=bits, GATED=rows == 1))
                      for bits in (0, 8, 4)]
        for name, function, bits, warps, constants in cases:
            if "AHEAD" in function.arg_names:
                constants["AHEAD"] = capability >= 90
            facts = built(function, capability, bits, warps, constants)
            spills += facts["spills"]
            print(f"sm_{capability:<4}{name:24}" + "".join(f"{value:7} {key}" for key, value
                                                            in facts.items()), flush=True)
    return not spills


# --------------------------------------------------------------------------------------------------

PARTS = {"right": right, "models": models, "products": products, "profile": profile,
         "others": others, "launches": launches, "registers": registers}
NO_CARD = ("launches", "registers")      # parts that need none


def all_parts(options, minutes, out):
    """Do the parts that need a card, each in its own process; return whether all is right."""
    end = time.monotonic() + 60 * minutes
    report, fine = "", False
    for part in PARTS:
        if part in NO_CARD:
            continue
        began = time.monotonic()
        try:
            done = subprocess.run([sys.executable, "-m", "beyond.lab.gpu", part, *options],
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  timeout=max(1, end - began))
            text, status = done.stdout, done.returncode
        except subprocess.TimeoutExpired as stopped:
            text, status = stopped.stdout or b"", "left out from here on, the minutes are over"
        fine |= part == "right" and status == 0
        text = (f"--- {part}: {time.monotonic() - began:.0f} s, status {status}\n"
                f"{text.decode(errors='replace')}\n")
        print(text, flush=True)
        report += text
        if out:
            Path(out).write_text(report)
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
