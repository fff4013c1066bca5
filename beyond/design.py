"""Designed by arithmetic: what a GPU can make of the Triton kernels, and of a step, on paper.

A product at batch 1 is a stream of bytes. A multiprocessor that asks for B bytes, and waits L for
them, gets B / L a second: to use its share of the bandwidth it must have `bandwidth x latency` on
their way at any time (Little's law). On an H100 that is 3.35 TB/s x 0.7 us / 132 = 17 KB. How many
there are is read off the compiled kernel, and off the grid:

    fit        programs that a multiprocessor holds, by registers, shared memory and warps
    run        programs that the grid has for each, by the tile and by kernel.span
    waves      run / fit: what does not fit at once comes later, and the last wave has fewer
    ahead      turns of the loop whose rows are asked for before they are needed
    on the way = programs at once x ahead x channels a turn x bytes of a row of the tile

and the loop must not take longer to compute than its bytes take to come: its instructions, four a
clock, against the multiprocessor's share of the bandwidth. A list of kept channels makes all this
independent of sparsity, but for what is left to do: at 75 % a program has half the rows of 50 %.

A step is its bytes and its launches: each costs some 2 us, in which no weight is read. They are
counted where they are made, while a small model with as many layers as the real one writes a text.

No GPU is needed: Triton compiles for one that is not here.

    python -m beyond.design                       both tables, for an H100
    python -m beyond.design --card a100           for another card
"""
import contextlib
import math
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"                   # read when triton is imported

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernel
from beyond import fused
from generate import Sampling, StaticCache, generate
from model import (PRESETS, Llama, Parser, block_linears, command_line, linear_names,
                   require)
from sparsify import sparse_mode, sparsify

LATENCY = 0.7e-6         # seconds from asking memory for a line until it is there, when it is busy
LAUNCH = 2e-6            # seconds of a launch in a CUDA graph in which the memory is idle
WAITS = 4                # latencies: x and the list before the rows, ticket and parts after
LAYER = (4096, 14336)    # inputs, outputs: the largest linears of Llama-3-8B
LEVELS = (0, 0.5, 0.75)  # sparsities of the table
WARPS = 4                # a program


@dataclass(frozen=True)
class Card:
    """What a kind of GPU has: by its data sheet, and by the CUDA programming guide."""
    capability: int              # 90 is sm_90
    bandwidth: float             # bytes a second
    multiprocessors: int
    clock: float                 # cycles a second, boosted
    shared: int                  # bytes of shared memory of a multiprocessor
    warps: int                   # that a multiprocessor holds
    programs: int                # that a multiprocessor holds
    registers: int = 65_536      # of a multiprocessor

    @property
    def need(self):
        """The bytes that must be on their way to each multiprocessor."""
        return self.bandwidth * LATENCY / self.multiprocessors


CARDS = {"h100": Card(90, 3.35e12, 132, 1.98e9, 228 << 10, 64, 32),
         "h200": Card(90, 4.8e12, 132, 1.98e9, 228 << 10, 64, 32),
         "a100": Card(80, 2.04e12, 108, 1.41e9, 164 << 10, 64, 32),
         "rtx-4090": Card(89, 1.01e12, 128, 2.52e9, 100 << 10, 48, 24),
         "rtx-3090": Card(86, 0.936e12, 82, 1.7e9, 100 << 10, 48, 16)}


# --------------------------------------------------------------------------------------------------
# Kernels

@dataclass
class Built:
    """What the compiler made of a kernel."""
    registers: int               # a thread
    shared: int                  # bytes a program
    spills: int                  # registers that went to memory
    wide: int                    # loads of 16 bytes a thread, to registers or to shared memory
    barriers: int
    instructions: int
    loop: int                    # instructions of a turn of the loop over the list


def compiled(function, pointer, capability, bits=0, **constants):
    """Return the Built of a Triton kernel for a GPU that need not be here.

    pointer: Triton's name of x's type, as "*bf16"; bits: of the weights' codes, 0 for none;
    constants: the kernel's constexpr arguments. As the launcher would, it takes addresses and sizes
    for multiples of 16, which allows wide loads.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {"threshold": "*fp32", "partial": "*fp32", "channel": "*i32", "ticket": "*i32",
             "slot": "*i64"}
    if bits:
        kinds |= {"weight": "*i32", "scale": "*fp32" if bits == 8 else "*bf16"}
        kinds |= {"zero": "*u8"} if bits == 4 else {}
    signature, fixed, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            fixed[(i,)] = constants[name]
            continue
        kind = kinds.get(re.sub("[0-9]*_ptr", "", name), pointer)
        signature[name] = kind if name.endswith("_ptr") else "i32"
        if name != "rows":
            attributes[(i,)] = [["tt.divisibility", 16]]
    built = triton.compile(ASTSource(function, signature, fixed, attributes),
                           target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        tool = next(Path(triton.__file__).parent.rglob("bin/cuobjdump"))
        usage, sass = (subprocess.run([tool, option, file.name], capture_output=True, text=True,
                                      check=True).stdout for option in ("-res-usage", "-sass"))
    code = re.findall(r"/\*([0-9a-f]{4,5})\*/ +(.*?) ;", sass)
    return Built(int(re.search("REG:([0-9]+)", usage)[1]), built.metadata.shared,
                 len(re.findall(r"\b(?:STL|LDL)\b", sass)),
                 len(re.findall(r"(?:LDG|LDGSTS)\.[.\w]*128", sass)), sass.count("BAR.SYNC"),
                 len(code), loop_size(code))


def loop_size(code):
    """Return the instructions of the loop in which products are made; code: [(address, text)]."""
    places = {int(address, 16): i for i, (address, _) in enumerate(code)}
    sizes = []
    for i, (_, text) in enumerate(code):
        jump = re.search(r"BRA(?:\.U)? .*?0x([0-9a-f]+)", text)
        start = places.get(int(jump[1], 16), i) if jump else i
        if start < i and any(re.search("HMMA|FFMA", line) for _, line in code[start:i]):
            sizes.append(i + 1 - start)
    return min(sizes, default=0)


def tile_of(pointer, bits=0):
    """Return the tile that is used for x of a type and codes of so many bits."""
    return fused.TILE[bits] if bits else kernel.TILE[4 if pointer == "*fp32" else 2]


# Ways to cut the work, for the table here and for a GPU's last word in gpu.py.
CONFIGURATIONS = [{"BLOCK_IN": 32, "BLOCK_OUT": 128, "STAGES": 1},
                  {"BLOCK_IN": 16, "BLOCK_OUT": 128, "STAGES": 5},
                  {"BLOCK_IN": 32, "BLOCK_OUT": 128, "STAGES": 3},
                  {"BLOCK_IN": 32, "BLOCK_OUT": 128, "STAGES": 5},
                  {"BLOCK_IN": 32, "BLOCK_OUT": 128, "STAGES": 7},
                  {"BLOCK_IN": 64, "BLOCK_OUT": 128, "STAGES": 5},
                  {"BLOCK_IN": 32, "BLOCK_OUT": 256, "STAGES": 5}]


def text_of(sizes):
    """Return a configuration as text."""
    return f"{sizes['BLOCK_IN']} x {sizes['BLOCK_OUT']}, {sizes['STAGES']} stages"


@dataclass
class Plan:
    """How a product lies on a card."""
    name: str
    card: Card
    fit: int                     # programs that a multiprocessor holds
    grid: int                    # programs in all
    ahead: dict                  # {sparsity: bytes that a program has on their way}
    compute: float = math.inf    # how often a turn could be computed while its bytes come
    launches: int = 1
    row: float = 2.0             # bytes of a weight
    built: Built | None = None

    @property
    def run(self):
        """The programs that the grid has for a multiprocessor, on average."""
        return self.grid / self.card.multiprocessors

    def over_need(self, sparsity):
        """Return the bytes on their way to a multiprocessor, over those that must be."""
        return min(self.fit, self.run) * self.ahead[sparsity] / self.card.need

    def share(self, sparsity):
        """Return the share of the bandwidth in use, from the first wave to the last, at most 1."""
        most = self.fit * self.card.multiprocessors
        time = 0.0                       # over that of all bytes at the full bandwidth
        for first in range(0, self.grid, most):
            programs = min(most, self.grid - first)
            each = programs / self.card.multiprocessors
            rate = min(1.0, each * self.ahead[sparsity] / self.card.need,
                       min(1.0, each) * self.compute)      # with less than one, some are idle
            time += programs / self.grid / rate
        return 1 / time

    def whole(self, sparsity):
        """Return the share of the bandwidth with the launch, the beginning and the end."""
        stream = LAYER[0] * LAYER[1] * self.row * (1 - sparsity) / self.card.bandwidth
        return stream / (stream / self.share(sparsity) + WAITS * LATENCY + self.launches * LAUNCH)

    def limit(self, sparsity):
        """Return what keeps the share below 1, or ""."""
        if self.compute < min(1, self.over_need(sparsity)):
            return "computing"
        if self.over_need(sparsity) < 1:
            return "latency"
        return "the last wave" * (self.share(sparsity) < 0.995)

    def line(self):
        """Return the Plan's line of the table."""
        facts = [""] * 5
        if self.built:
            facts = [self.built.registers, f"{self.built.shared / 1024:.1f}", self.built.barriers,
                     self.built.wide, self.built.loop]
        programs = min(self.fit, self.run)
        return COLUMNS.format(
            self.name, *facts, self.fit, f"{self.run:.1f}", f"{self.run / self.fit:.1f}",
            *[f"{programs * self.ahead[level] / 1024:.0f}" for level in LEVELS],
            *[f"{self.over_need(level):.1f}x" for level in LEVELS[1:]],
            f"{self.compute:.1f}x" if self.compute < math.inf else "",
            *[f"{self.share(level):.0%}" for level in LEVELS[1:]], f"{self.whole(0.5):.0%}",
            self.limit(0.5)).rstrip()


COLUMNS = ("{:35}{:>7}{:>7}{:>6}{:>6}{:>5}{:>6}{:>5}{:>6}{:>7}{:>5}{:>5}{:>7}{:>6}{:>6}"
           "{:>6}{:>5}{:>6}  {}")
HEADING = "\n".join(COLUMNS.format(*words).rstrip() for words in (
    ("", "regis-", "shared", "bar-", "wide", "turn", "pro-", "", "waves", "KB on", "the", "way",
     "over", "the", "com-", "share", "at", "whole", ""),
    ("weights, rows, tile", "ters", "KB", "riers", "loads", "", "fit", "run", "", "0", "50", "75 %",
     "50", "75 %", "pute", "50", "75 %", "50 %", "")))


def plan_before(card):
    """Return the Plan of the kernel as it was before it listed the kept channels.

    167 registers a thread let three programs fit, of four that a multiprocessor was given. Each had
    a tile of 8 KB on its way, without the rows whose loads were masked; a second launch added the
    parts. That each turn waited for x and thresholds first is not counted.
    """
    fit = card.registers // (168 * 32 * WARPS)             # registers are given out in eights
    return Plan("-bfloat16, 167 registers, as it was", card, fit, 4 * card.multiprocessors,
                {level: 8192 * (1 - level) for level in LEVELS}, launches=2)


def plan_of(name, card, pointer, rows, sizes, bits=0):
    """Return the Plan of the kernel for x of a type, for weights of its type or of `bits`."""
    channels, outputs = LAYER
    tiles = -(-outputs // sizes["BLOCK_OUT"])
    span = 128 if bits == 4 else kernel.span(tiles, channels, card.multiprocessors)
    constants = {"STEP": 1, "ROWS": rows, "SPAN": span, **sizes}
    function = kernel.sparse_product_kernel
    if bits:
        function = fused.joint_product_kernel
        constants |= {"BITS": bits, "GATED": False}
    built = compiled(function, pointer, card.capability, bits, **constants)
    fit = min(card.registers // (-(-built.registers // 8) * 8 * 32 * WARPS),
              card.shared // (built.shared + 1024),        # which a program takes beside its own
              card.warps // WARPS, card.programs)
    weight = (bits or (32 if pointer == "*fp32" else 16)) / 8
    row = sizes["BLOCK_OUT"] * weight
    # Weights wait for the list: half of the stages are the list's.
    ahead = max(1, (sizes["STAGES"] - 1) // 2) * sizes["BLOCK_IN"]
    bytes_ahead = {level: row * min(ahead, span * (1 - level)) for level in LEVELS}
    memory = sizes["BLOCK_IN"] * row / (card.bandwidth / card.multiprocessors / card.clock)
    compute = built.loop * WARPS / 4                       # cycles of a turn, as those of its bytes
    return Plan(name, card, fit, tiles * -(-channels // span), bytes_ahead, memory / compute,
                row=weight, built=built)


def show_kernels(card):
    """Print the table of configurations."""
    import triton
    print(f"sm_{card.capability}, {card.bandwidth / 1e12:g} TB/s, {card.multiprocessors} "
          f"multiprocessors at {card.clock / 1e9:g} GHz with {card.shared >> 10} KB; triton "
          f"{triton.__version__}, torch {torch.__version__}\n"
          f"{card.need / 1024:.1f} KB must be on their way to each multiprocessor\n{HEADING}")
    print(plan_before(card).line())
    cases = [("bfloat16", "*bf16", 0, 1, sizes) for sizes in CONFIGURATIONS]
    cases += [("bfloat16", "*bf16", 0, 8, tile_of("*bf16")), ("float32", "*fp32", 0, 1,
                                                              tile_of("*fp32"))]
    cases += [(f"int{bits}", "*bf16", bits, 1, tile_of("", bits)) for bits in (8, 4)]
    for kind, pointer, bits, rows, sizes in cases:
        used = "*" if sizes == tile_of(pointer, bits) else " "
        name = f"{used}{kind}, {rows} row{'s' * (rows > 1)}, {text_of(sizes)}"
        print(plan_of(name, card, pointer, rows, sizes, bits).line(), flush=True)
    print(f"*: in use, -: before; at {LAYER[0]} x {LAYER[1]}. turn: instructions of a turn of the "
          f"loop. programs: that fit a\nmultiprocessor, and that run on it in all. over the need, "
          f"compute: what there is over what it takes, enough\nfrom 1x on. share: of the bandwidth "
          f"while the product is under way, 100 % at most; whole: with its launch,\nbeginning and "
          f"end. After it, what holds the share at 50 % back.")


# --------------------------------------------------------------------------------------------------
# Steps

NO_LAUNCH = {"aten.detach", "aten._unsafe_view", "aten.empty", "aten.new_empty", "aten.empty_like",
             "aten.promote_types", "aten._local_scalar_dense", "aten.lift_fresh"}
# What waits for the host: the calls that hand a number to Python or memory to the CPU, and what
# PyTorch does so inside. On a CPU the former are no operations.
CALLS_TO_HOST = {"cpu", "item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__",
                 "__index__", "__contains__"}
HOST = {"aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal",
        "aten.masked_select"}


class Launches(TorchDispatchMode):
    """Counts, inside a `with`, what a GPU would be told to do: {operation: times}.

    A view is nothing, an RMSNorm one kernel (on a CPU PyTorch takes it apart), attention one.
    `waits` counts what makes the host wait for the GPU, in the same way.
    """

    def __init__(self):
        super().__init__()
        self.counts = {}
        self.waits = {}
        self.paused = False

    def note(self, name, counts=None):
        counts = self.counts if counts is None else counts
        if not self.paused:
            counts[name] = counts.get(name, 0) + 1

    @contextlib.contextmanager
    def pause(self):
        """Count nothing inside a `with`."""
        before, self.paused = self.paused, True
        yield
        self.paused = before

    def clear(self):
        self.counts.clear()
        self.waits.clear()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).rpartition(".")[0]
        if not function.is_view and name not in NO_LAUNCH:
            self.note(name.removeprefix("aten."))
        by_mask = name in ("aten.index", "aten.index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1])
        if name in HOST or by_mask:
            self.note(name.removeprefix("aten."), self.waits)
        return function(*args, **kwargs or {})

    @property
    def total(self):
        return sum(self.counts.values())


class WholeCalls(TorchFunctionMode):
    """Shows `Launches` an RMSNorm as one operation, and calls that wait for the host."""

    def __init__(self, launches):
        super().__init__()
        self.launches = launches

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        to_cpu = name == "to" and any(is_cpu(x) for x in (*args[1:], *kwargs.values()))
        if name == "rms_norm":
            self.launches.note(name)
        elif name in CALLS_TO_HOST or to_cpu:
            self.launches.note(name, self.launches.waits)
        else:
            return function(*args, **kwargs)
        with self.launches.pause():
            return function(*args, **kwargs)


def is_cpu(value):
    """Return whether an argument of Tensor.to names the CPU."""
    return value == "cpu" if isinstance(value, str) else value == torch.device("cpu")


class NotedKernel:
    """Stands for a Triton kernel: notes a launch, and computes zeros."""

    def __init__(self, name, launches, kernel):
        self.name, self.launches, self.kernel = name, launches, kernel

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.launches.note(self.name)
            with self.launches.pause():
                for name, argument in zip(self.kernel.arg_names, arguments):
                    if name in ("y_ptr", "query_ptr"):
                        argument.zero_()
        return launch


@contextlib.contextmanager
def counting(launches):
    """Inside a `with`, count as on a GPU: products are Triton's, or the library's where dense."""
    replaced = {(module, name): NotedKernel(name, launches, value)
                for module in (kernel, fused) for name, value in vars(module).items()
                if name.endswith("_kernel")}
    replaced |= {(kernel, "best_backend"): lambda x: "triton",
                 (kernel, "fits_c"): lambda x: False,
                 (kernel, "check_triton"): lambda x: None,
                 (fused, "is_interpreted"): lambda: True}
    before = {(module, name): getattr(module, name) for module, name in replaced}
    for (module, name), value in replaced.items():
        setattr(module, name, value)
    try:
        with WholeCalls(launches), launches:
            yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def step_as_in_a_graph(model, cache, tokens=1):
    """Return a step that does what generate.GraphStep does, without a graph."""
    place = torch.zeros(1, 1, dtype=torch.int64)
    static = StaticCache(cache, 1)

    def step(tokens):
        place.copy_(tokens)
        static.follow(cache, 1, model.config.sliding_window)
        cache.advance(1)
        return model(place, static)

    return step


@torch.no_grad()
def step_launches(preset, mode, fuse=False, sampling=Sampling()):
    """Return the Launches of a token that `generate` writes: the graph's, and generate's own.

    mode: "off" (dense) or "decode" (sparse). fuse: with fused.py.
    """
    real = PRESETS[preset]
    small = replace(real, hidden_size=2 * real.num_attention_heads, intermediate_size=96,
                    head_dim=2, vocab_size=64)
    model = Llama(small).to(torch.bfloat16).eval()
    sparsify(model, dict.fromkeys(linear_names(small), 0.5) | {"lm_head": None})
    model.sparse_state.counting = False          # 15 of 16 steps
    launches = Launches()
    with sparse_mode(model, mode), counting(launches):
        if fuse:
            fused.fuse(model)
        text = generate(model, [1, 2, 3], 4, **vars(sampling), make_step=step_as_in_a_graph)
        for _ in range(3):               # the prompt's, one in which tickets are made, and one more
            launches.clear()
            next(text)
    return launches


def step_bytes(preset):
    """Return the bytes of the blocks' linears, and of the head, in 16 bits."""
    config = PRESETS[preset]
    block = sum(outputs * inputs for outputs, inputs in block_linears(config).values())
    return (2 * config.num_hidden_layers * block, 2 * config.vocab_size * config.hidden_size)


def show_steps(preset, bandwidth):
    """Print the table of launches, and what they leave of the speed-up."""
    blocks, head = step_bytes(preset)
    ideal = {level: ((1 - level) * blocks + head) / bandwidth for level in (0, 0.4, 0.5)}
    print(f"\na step of {preset}, bfloat16, head dense: "
          + ", ".join(f"{1e3 * seconds:.2f} ms at {level:.0%}"
                      for level, seconds in ideal.items())
          + f" for the bytes alone: {ideal[0] / ideal[0.4]:.2f}x and "
            f"{ideal[0] / ideal[0.5]:.2f}x")
    print(f"{'':12}{'':9}{f'ms, {1e6 * LAUNCH:.0f} us':>11}{'share of':>10}"
          f"   over dense, PyTorch's launches   over dense, fewest launches")
    print(f"{'':12}{'launches':>9}{'each':>11}{'the step':>10}"
          f"{'at 40 %':>18}{'at 50 %':>9}{'at 40 %':>18}{'at 50 %':>9}")
    rows = {}
    for name, mode, fuse in [("dense", "off", False), ("core", "decode", False),
                             ("beyond", "decode", True)]:
        rows[name] = step_launches(preset, mode, fuse)
    least = min(launches.total for launches in rows.values())
    for name, launches in rows.items():
        cost = LAUNCH * launches.total
        line = f"{name:12}{launches.total:9}{1e3 * cost:11.2f}"
        line += f"{cost / (cost + ideal[0 if name == 'dense' else 0.5]):10.0%}"
        for other in (rows["dense"].total, least):
            dense = ideal[0] + LAUNCH * other
            ratios = [f"{dense / (ideal[level] + cost):.2f}x" for level in (0.4, 0.5)]
            line += f"{ratios[0]:>18}{ratios[1]:>9}" * (name != "dense")
        print(line)
    print("launches of each block:")
    for name, launches in rows.items():
        layers = PRESETS[preset].num_hidden_layers
        counts = {"attention" if "scaled_dot" in operation else operation: count // layers
                  for operation, count in launches.counts.items() if count >= layers}
        text = ", ".join(f"{count} {operation}" for operation, count in counts.items())
        print(f"  {name}, {sum(counts.values())}: {text}")


def main():
    parser = Parser(description="Prints what a GPU can make of the Triton kernels and of a step.")
    parser.add_argument("--card", default="h100", choices=CARDS,
                        help=f"{', '.join(CARDS)} (default: h100)")
    parser.add_argument("--preset", default="llama-3-8b", choices=PRESETS,
                        help="whose step (default: llama-3-8b)")
    arguments = parser.parse_args()
    require(kernel.triton is not None, "this needs Triton, which compiles: pip install triton")
    show_kernels(CARDS[arguments.card])
    show_steps(arguments.preset, CARDS[arguments.card].bandwidth)


if __name__ == "__main__":
    command_line(main)
