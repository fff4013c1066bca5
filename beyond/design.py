"""Designed by arithmetic: what a GPU can make of the Triton kernels, and of a step, on paper.

A product at batch 1 is a stream of bytes. A multiprocessor that asks for B bytes, and waits L for
them, gets B / L a second: to use its share of the bandwidth it must have `bandwidth x latency` on
their way at any time (Little's law). On an H100 that is 3.35 TB/s x 0.7 us / 132 = 17 KB. How many
there are is read off the compiled kernel:

    programs   a multiprocessor holds as many as its registers, shared memory and threads allow
    ahead      turns of the loop whose rows are asked for before they are needed
    on the way = programs x ahead x channels a turn x bytes of a row of the tile

and the loop must not take longer to compute than its bytes take to come: its instructions, four a
clock, against the multiprocessor's share of the bandwidth. A list of kept channels makes all this
independent of sparsity, but for what is left to do: at 75 % a program has half the rows of 50 %.

A step is its bytes and its launches: each costs some 2 us, in which no weight is read. They are
counted where they are made, on a small model with as many layers as the real one.

No GPU is needed: Triton compiles for one that is not here.

    python -m beyond.design                       both tables, for an H100
    python -m beyond.design --capability 80 --bandwidth 2.04e12 --multiprocessors 108    an A100,
                            but for its clock and its shared memory, which are an H100's here
"""
import contextlib
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
from generate import Sampling, StaticCache
from model import (PRESETS, Llama, Parser, block_linears, command_line, linear_names,
                   natural, require)
from sparsify import sparse_mode, sparsify

LATENCY = 0.7e-6         # seconds from asking memory for a line until it is there, when it is busy
LAUNCH = 2e-6            # seconds of a launch in a CUDA graph in which the memory is idle
WAITS = 4                # latencies: x and the list before the rows, ticket and parts after
LAYER = (4096, 14336)    # inputs, outputs: the largest linears of Llama-3-8B
CLOCK = 1.755e9          # of an H100
WARPS = 4                # a program


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


def on_the_way(built, sizes, row_bytes, span, sparsity):
    """Return (programs a multiprocessor, bytes on their way to it at a sparsity)."""
    programs = min(65536 // (-(-built.registers // 8) * 8 * 32 * WARPS),
                   232_448 // (built.shared + 1024), 64 // WARPS)
    # Weights wait for the list: half of the stages are the list's.
    ahead = max(1, (sizes["STAGES"] - 1) // 2)
    channels = min(ahead * sizes["BLOCK_IN"], span * (1 - sparsity))
    return programs, programs * channels * row_bytes


def show_kernels(arguments):
    """Print the table of configurations."""
    need = arguments.bandwidth * LATENCY / arguments.multiprocessors
    cycle_bytes = arguments.bandwidth / arguments.multiprocessors / CLOCK
    print(f"sm_{arguments.capability}, {arguments.bandwidth / 1e12} TB/s, "
          f"{arguments.multiprocessors} multiprocessors: {need / 1024:.1f} KB must be on their way "
          f"to each")
    print(f"{'':36}{'regis-':>7}{'shared':>7}{'pro-':>6}{'bar-':>6}{'wide':>6}{'turn':>6}"
          f"  KB on the way at      share at   whole")
    print(f"{'weights, rows, tile':36}{'ters':>7}{'KB':>7}{'grams':>6}{'riers':>6}{'loads':>6}"
          f"{'':6}{'0':>6}{'50':>6}{'75 %':>6}{'50':>8}{'75 %':>6}{'50 %':>8}")
    cases = [("bfloat16", "*bf16", 0, 1, sizes) for sizes in CONFIGURATIONS]
    cases += [("bfloat16", "*bf16", 0, 8, tile_of("*bf16")), ("float32", "*fp32", 0, 1,
                                                              tile_of("*fp32"))]
    cases += [(f"int{bits}", "*bf16", bits, 1, tile_of("", bits)) for bits in (8, 4)]
    for kind, pointer, bits, rows, sizes in cases:
        span = 128 if bits == 4 else 256
        constants = {"STEP": 1, "ROWS": rows, "SPAN": span, **sizes}
        function = kernel.sparse_product_kernel
        if bits:
            function = fused.joint_product_kernel
            constants |= {"BITS": bits, "GATED": False}
        built = compiled(function, pointer, arguments.capability, bits, **constants)
        row = sizes["BLOCK_OUT"] * (bits or (32 if pointer == "*fp32" else 16)) // 8
        flights = [on_the_way(built, sizes, row, span, level) for level in (0, 0.5, 0.75)]
        memory = sizes["BLOCK_IN"] * row / cycle_bytes                   # cycles of a turn
        compute = built.loop * WARPS / 4
        shares = [min(1, flight / need, memory / compute) for _, flight in flights[1:]]
        stream = LAYER[0] * LAYER[1] * row / sizes["BLOCK_OUT"] / 2 / arguments.bandwidth
        whole = stream / (stream / shares[0] + WAITS * LATENCY + LAUNCH)
        limit = "" if min(shares) == 1 else "  computing" if memory < compute else "  latency"
        used = "*" if sizes == tile_of(pointer, bits) else " "
        name = f"{used}{kind}, {rows} row{'s' * (rows > 1)}, {text_of(sizes)}"
        print(f"{name:36}{built.registers:7}{built.shared / 1024:7.1f}{flights[0][0]:6}"
              f"{built.barriers:6}{built.wide:6}{built.loop:6}"
              + "".join(f"{flight / 1024:6.0f}" for _, flight in flights)
              + f"{shares[0]:8.0%}{shares[1]:6.0%}{whole:8.0%}{limit}", flush=True)
    print(f"*: in use. programs: that a multiprocessor holds. turn: instructions of a turn of the "
          f"loop.\nshare: of the bandwidth, once a product is under way; whole: with its launch, "
          f"beginning and end,\nat {LAYER[0]} x {LAYER[1]}; after it what holds a share back")


# --------------------------------------------------------------------------------------------------
# Steps

NO_LAUNCH = {"aten.detach", "aten._unsafe_view", "aten.empty", "aten.new_empty", "aten.empty_like",
             "aten.scalar_tensor", "aten.promote_types", "aten._local_scalar_dense",
             "aten.lift_fresh"}
HOST = {"aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal"}


class Launches(TorchDispatchMode):
    """Counts, inside a `with`, what a GPU would be told to do: {operation: times}.

    A view is nothing, an RMSNorm one kernel (on a CPU PyTorch takes it apart), attention one.
    """

    def __init__(self):
        super().__init__()
        self.counts = {}
        self.paused = False

    def note(self, name):
        if not self.paused:
            self.counts[name] = self.counts.get(name, 0) + 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).rpartition(".")[0]
        if not function.is_view and name not in NO_LAUNCH:
            self.note(name.removeprefix("aten."))
        if name in HOST:
            self.note(f"wait for the host: {name}")
        return function(*args, **kwargs or {})

    @property
    def total(self):
        return sum(self.counts.values())


class WholeNorms(TorchFunctionMode):
    """Shows `Launches` an RMSNorm as one operation."""

    def __init__(self, launches):
        super().__init__()
        self.launches = launches

    def __torch_function__(self, function, types, args=(), kwargs=None):
        whole = getattr(function, "__name__", "") == "rms_norm"
        if whole:
            self.launches.note("rms_norm")
            self.launches.paused = True
        y = function(*args, **kwargs or {})
        if whole:
            self.launches.paused = False
        return y


class NotedKernel:
    """Stands for a Triton kernel: notes a launch, and computes nothing."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.launches.note(self.name)


@contextlib.contextmanager
def counting(launches):
    """Inside a `with`, count as on a GPU: products are Triton's, or the library's where dense."""
    triton_kernels = [(module, name) for module in (kernel, fused) for name in vars(module)
                      if name.endswith("_kernel")]
    replaced = {(module, name): NotedKernel(name, launches) for module, name in triton_kernels}
    replaced |= {(kernel, "best_backend"): lambda x: "triton",
                 (kernel, "fits_c"): lambda x: False,
                 (kernel, "check_triton"): lambda x: None,
                 (fused, "is_interpreted"): lambda: True}
    before = {(module, name): getattr(module, name) for module, name in replaced}
    for (module, name), value in replaced.items():
        setattr(module, name, value)
    try:
        with WholeNorms(launches), launches:
            yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


@torch.no_grad()
def step_launches(preset, mode, fuse=False, sampling=Sampling()):
    """Return the Launches of a greedy step of decoding: the graph of generate.GraphStep, and more.

    mode: "off" (dense) or "decode" (sparse). fuse: with fused.py.
    """
    real = PRESETS[preset]
    small = replace(real, hidden_size=2 * real.num_attention_heads, intermediate_size=96,
                    head_dim=2, vocab_size=64)
    model = Llama(small).to(torch.bfloat16).eval()
    sparsify(model, dict.fromkeys(linear_names(small), 0.5) | {"lm_head": None})
    model.sparse_state.counting = False          # 15 of 16 steps
    cache = model.make_cache(1, 32)
    cache.used = 16
    static = StaticCache(cache, 1)
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    kernel.tickets(1, model.device)      # as a warm-up does
    launches = Launches()
    with sparse_mode(model, mode), counting(launches):
        if fuse:
            fused.fuse(model)
        launches.counts.clear()
        tokens.copy_(tokens)             # the token that was chosen
        static.follow(cache, 1, small.sliding_window)
        sampling.choose(model(tokens, static)[:, -1], torch.Generator())
    return launches


def step_bytes(preset):
    """Return the bytes of the blocks' linears, and of the head, in 16 bits."""
    config = PRESETS[preset]
    block = sum(outputs * inputs for outputs, inputs in block_linears(config).values())
    return (2 * config.num_hidden_layers * block, 2 * config.vocab_size * config.hidden_size)


def show_steps(arguments):
    """Print the table of launches, and what they leave of the speed-up."""
    blocks, head = step_bytes(arguments.preset)
    ideal = {level: ((1 - level) * blocks + head) / arguments.bandwidth for level in (0, 0.4, 0.5)}
    print(f"\na step of {arguments.preset}, bfloat16, head dense: "
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
        rows[name] = step_launches(arguments.preset, mode, fuse)
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
        layers = PRESETS[arguments.preset].num_hidden_layers
        counts = {"attention" if "scaled_dot" in operation else operation: count // layers
                  for operation, count in launches.counts.items() if count >= layers}
        text = ", ".join(f"{count} {operation}" for operation, count in counts.items())
        print(f"  {name}, {sum(counts.values())}: {text}")


def main():
    parser = Parser(description="Prints what a GPU can make of the Triton kernels and of a step.")
    parser.add_argument("--capability", type=natural, default=90,
                        help="of the GPU, 80 or above (default: 90, an H100)")
    parser.add_argument("--bandwidth", type=float, default=3.35e12,
                        help="bytes a second (default: 3.35e12)")
    parser.add_argument("--multiprocessors", type=natural, default=132, help="(default: 132)")
    parser.add_argument("--preset", default="llama-3-8b", choices=PRESETS,
                        help="whose step (default: llama-3-8b)")
    arguments = parser.parse_args()
    require(kernel.triton is not None, "this needs Triton, which compiles: pip install triton")
    show_kernels(arguments)
    show_steps(arguments)


if __name__ == "__main__":
    command_line(main)
