"""How near to the limit: our products beside the library's, at the shapes of a Llama; and a whole step, recorded and not.

A product is bound by memory: its limit is the bytes of the weights it must read over the bandwidth. So beside each time stand
the bytes of kept weights a second, and the ratio to the fastest of the library's dense ways. Enough copies of a weight are used
in turn that no cache holds them; times are medians.

    python kernel.py                                          dense against sparse at Llama-2-7B's shapes
    python kernel.py --dtype int8 int4 --rows 1 4 8 --figure speed.png
    python step.py --model random:llama-3.2-1b                what a step takes besides its products
"""
import statistics
import time

import torch
import torch.nn.functional as F

from calibrate import load_calibration
from checkpoint import block_linears
from cli import DEMO, InputError, Parser, check_figure, find_device, natural, progress_line, pyplot
from kernel import C_NAMES, MAX_ROWS, QuantizedWeight, best_backend, dense, sparse_gemv, words_of
from model import PRESETS, load_model
from sparsify import sparse_mode, sparsify
from step import Steps


def median_time(call, device, seconds=0.5):
    """The median time of `call(i)` in seconds, i counting up, after a warm-up, over about `seconds`."""
    times = []
    if device.type == "cuda":
        def once(i):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(1_000_000)                   # half a millisecond in which the host gets ahead, so that it is not what is timed
            begin.record()
            call(i)
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3
    else:
        def once(i):
            begin = time.perf_counter()
            call(i)
            return time.perf_counter() - begin
    if once(0) < seconds:                                  # what is as slow as that is not measured to the end
        once(1)
        while sum(times) < seconds or len(times) < 11:
            times.append(once(len(times)))
    return statistics.median(times) if times else once(1)


def dense_ways(x, weights_t):
    """{name: call(i)}: the library's ways to compute x @ weights_t[i]. F.linear and mv have the usual (out, in) layout."""
    weights, n = [w.t().contiguous() for w in weights_t], len(weights_t)
    ways = {"F.linear": lambda i: F.linear(x, weights[i % n]), "x @ weight_t": lambda i: x @ weights_t[i % n]}
    if len(x) == 1:
        ways["torch.mv"] = lambda i: torch.mv(weights[i % n], x[0])
    return ways


def threshold_dropping(x, share):
    """The magnitude at or below which a share of the entries of x (B, in) lies; 0.0 for a share of 0."""
    dropped = round(share * x.numel())
    return x.float().abs().flatten().sort().values[dropped - 1] if dropped else torch.tensor(0.0, device=x.device)


def random_codes(inputs, outputs, bits, device):
    """A QuantizedWeight of random codes, in groups of 128 at 4 bits."""
    words = words_of(outputs, bits)
    codes = torch.randint(-2**31, 2**31, (inputs, words), dtype=torch.int32, device=device)
    if bits == 8:
        return QuantizedWeight(codes, torch.rand(outputs, device=device))
    return QuantizedWeight(codes, torch.rand(inputs // 128, outputs, device=device).bfloat16(),
                           torch.randint(16, (inputs // 128, outputs), dtype=torch.uint8, device=device), 128)


def time_shape(inputs, outputs, kind, device, levels, rows):
    """Prints the times of one weight (inputs, outputs): one row at each sparsity, then several rows.

    kind: the name of a dtype; or "int8", "int4", beside which the dense ways multiply bfloat16.
    Returns (seconds of the best dense way, bytes of the weight, [seconds at each of the levels]).
    """
    bits, dtype = {"int8": 8, "int4": 4}.get(kind), getattr(torch, "bfloat16" if kind.startswith("int") else kind)
    size = inputs * outputs * dtype.itemsize
    copies = max(2, -(-512_000_000 // size))               # more than any cache holds
    first = torch.randn(inputs, outputs, device=device).to(dtype)
    weights = [first] + [first.roll(i, 0) for i in range(1, copies)]
    xs = [torch.randn(1, inputs, device=device).to(dtype) for _ in range(8)]    # each keeps other rows
    x = xs[0]
    ways = {name: median_time(call, device) for name, call in dense_ways(x, weights).items()}
    best = min(ways, key=ways.get)
    dense_rate = size / ways[best]
    print(f"\n{inputs} x {outputs} {kind}, {size / 1e6:.0f} MB{' as bfloat16' if bits else ''}; dense, one row: "
          + ", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in ways.items()))
    print(f"{'sparsity':>10} {'ms':>9} {'GB/s':>8} {'share':>7} {'ratio':>8}")
    print(f"{'dense':>10} {ways[best] * 1e3:9.3f} {dense_rate / 1e9:8.1f} {1:7.0%} {1:7.2f}x   {best}")
    if bits:
        copies *= 16 // bits
        weights = [random_codes(inputs, outputs, bits, device) for _ in range(copies)]
        size = sum(part.nbytes for part in weights[0].buffers())
    found = []
    for sparsity in levels:
        thresholds = [threshold_dropping(x, sparsity) for x in xs]
        kept = (x.float().abs() > thresholds[0]).float().mean().item()
        seconds = median_time(lambda i: sparse_gemv(xs[i % 8], weights[i % copies], thresholds[i % 8]), device)
        found.append(seconds)
        print(f"{sparsity:10.0%} {seconds * 1e3:9.3f} {kept * size / seconds / 1e9:8.1f} "
              f"{kept * size / seconds / dense_rate:7.0%} {ways[best] / seconds:7.2f}x   {best_backend(x)}", flush=True)
    for count in rows:
        if count > 1:
            # Rows drop the same channels here, half of them: a weight row is read if any of the rows needs it.
            same = (x * torch.randn(count, 1, device=device).sign()).to(dtype)
            threshold = threshold_dropping(x, 0.5)
            library = {} if bits else {name: median_time(call, device) for name, call in dense_ways(same, weights).items()}
            ours = median_time(lambda i: dense(same, weights[i % copies]), device)
            half = median_time(lambda i: sparse_gemv(same, weights[i % copies], threshold), device)
            library |= {"ours": ours, "at 50 %": half}
            print(f"{count:3} rows: " + ", ".join(f"{name} {seconds * 1e3:.3f}" for name, seconds in library.items())
                  + " ms; over one dense row: " + ", ".join(f"{seconds / ways[best]:.2f}" for seconds in library.values()), flush=True)
    return ways[best], size, found


def memory_bandwidth(device):
    """Bytes a second that this device reads from its memory, measured and printed: the limit of everything here."""
    a = torch.randint(255, (1 << 30,), dtype=torch.uint8, device=device)
    if device.type == "cuda":
        b = torch.empty_like(a)
        found = 2 * a.numel() / median_time(lambda i: b.copy_(a), device)
        print(f"copying 1 GiB: {found / 1e9:.0f} GB/s, read plus written; a launch that does nothing: "
              f"{median_time(lambda i: b[:1].copy_(a[:1]), device) * 1e6:.1f} us")
    else:
        found = a.numel() / median_time(lambda i: a.view(torch.float32).amax(), device)
        print(f"reading 1 GiB (its largest value): {found / 1e9:.1f} GB/s")
    return found


def draw_speed(timed, levels, bandwidth, path):
    """Ratios to the best dense way against sparsity, a panel a dtype, with what the memory's bandwidth allows, as a PNG.

    timed: {(kind, inputs, outputs): as time_shape returns it}; bandwidth: bytes a second.
    """
    plt = pyplot()
    kinds = list(dict.fromkeys(kind for kind, *_ in timed))
    figure, axes = plt.subplots(1, len(kinds), figsize=(max(4, 2.6 * len(kinds)), 3), sharey=True, layout="constrained", squeeze=False)
    for axis, kind in zip(axes[0], kinds):
        for (of, inputs, outputs), (dense_seconds, size, seconds) in timed.items():
            if of == kind:
                line, = axis.plot([100 * s for s in levels], [dense_seconds / t for t in seconds], marker="o", ms=3, lw=1.2,
                                  label=f"{inputs} x {outputs}")
                axis.plot([100 * s for s in levels], [dense_seconds * bandwidth / size / (1 - s) for s in levels], ls=":", lw=1,
                          color=line.get_color())
        axis.axhline(1, color="grey", lw=0.8)
        axis.set(title=kind, xlabel="channels dropped (%)", yscale="log")
        axis.set_yticks([1, 2, 4, 8, 16, 32, 64], ["1x", "2x", "4x", "8x", "16x", "32x", "64x"])
        axis.minorticks_off()
    axes[0, 0].set_ylabel("speed over the best dense way")
    axes[0, 0].legend(fontsize=7, title="dotted: what reading the\nkept bytes would allow", title_fontsize=7)
    figure.savefig(path)
    plt.close(figure)


def main():
    parser = Parser(
        description="Times dense against sparse matrix-vector products, at the shapes of a Llama, on this machine.")
    parser.add_argument("--shapes", default="llama-2-7b", metavar="PRESET",
                        help=f"whose linears to time: {', '.join(PRESETS)} (default: llama-2-7b)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"],
                        choices=["float32", "bfloat16", "float16", "int8", "int4"], help="(default: float32 bfloat16)")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0, 0.25, 0.4, 0.5, 0.65, 0.9],
                        help="shares of the channels to drop (default: 0 0.25 0.4 0.5 0.65 0.9)")
    parser.add_argument("--rows", nargs="+", type=int, default=[1], help="tokens at a time, 1 to 8 (default: 1)")
    parser.add_argument("--figure", metavar="FILE", help="draw the ratios, and what the bandwidth allows, as a PNG (default: no figure)")
    parser.add_device()
    arguments = parser.parse_args()
    if arguments.shapes not in PRESETS:
        raise InputError(f"--shapes {arguments.shapes!r} is not known; known are {', '.join(PRESETS)}")
    for sparsity in arguments.sparsity:
        if not 0 <= sparsity < 1:
            raise InputError(f"--sparsity {sparsity} is outside [0, 1)")
    for rows in arguments.rows:
        if not 1 <= rows <= MAX_ROWS:
            raise InputError(f"--rows {rows} is outside 1 to {MAX_ROWS}")
    if arguments.figure:
        check_figure(arguments.figure)
    device = find_device(arguments.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}. Random inputs and weights, many copies in turn, so that no cache holds them.")
    print("GB/s are bytes of kept weights over time; share: of the bandwidth that the best dense way reaches.")
    bandwidth = memory_bandwidth(device)
    shapes = sorted({(inputs, outputs) for outputs, inputs in block_linears(PRESETS[arguments.shapes]).values()})
    timed = {(kind, *shape): time_shape(*shape, kind, device, arguments.sparsity, arguments.rows)
             for kind in arguments.dtype for shape in shapes}
    if arguments.figure:
        draw_speed(timed, arguments.sparsity, bandwidth, arguments.figure)


# ---------------------------------------------------------------------------------------------------------
# A step

ROUNDS = 23              # the first three of which set things up


@torch.no_grad()
def time_steps(model, behind, progress):
    """({(name, mode): seconds of each round}, {mode: the part of a recorded step that is not products, each round}).

    Names are "recorded" and "not recorded", modes "off" (dense) and "decode" (sparse); all take turns. behind: how many tokens a
    step looks back at. The parts are known on a CPU alone.
    """
    cache, token = model.make_cache(1, behind + 1), torch.ones(1, 1, dtype=torch.int64, device=model.device)
    cache.used, steps, times, parts, in_products = behind, Steps(model, cache), {}, {}, 0.0

    def timed(product):
        """A product that adds what it takes to in_products."""
        def call(*arguments):
            nonlocal in_products
            began = time.perf_counter()
            failed = product(*arguments)
            in_products += time.perf_counter() - began
            return failed
        return call

    for done in range(ROUNDS):
        progress(f"step {done} of {ROUNDS}")
        for mode in ("off", "decode"):
            with sparse_mode(model, mode):
                tape, in_products = steps.tape(token), 0.0
                if tape and not done:
                    tape.calls = [(timed(function) if function.__name__ in C_NAMES.values() else function, arguments)
                                  for function, arguments in tape.calls]
                for name, step in (("recorded", steps), ("not recorded", lambda token: model(token, cache))):
                    cache.used, began = behind, time.perf_counter()
                    step(token)
                    if model.device.type == "cuda":
                        torch.cuda.synchronize()
                    times.setdefault((name, mode), []).append(time.perf_counter() - began)
                    cache.used = behind
                if tape:
                    parts.setdefault(mode, []).append(1 - in_products / times["recorded", mode][-1])
    return times, parts


def show_steps():
    """The command line of step.py."""
    parser = Parser(description="Times a step of decoding, dense and sparse: recorded and replayed, and run by the model.")
    parser.add_argument("--model", default=str(DEMO), help="checkpoint folder, or random:PRESET (default: the demo model)")
    parser.add_argument("--sparsity", type=float, default=0.5, metavar="S", help="share of the blocks' weights to skip (default: 0.5)")
    parser.add_argument("--behind", type=natural, default=16, metavar="N", help="how many tokens a step looks back at (default: 16)")
    parser.add_device()
    parser.add_precision()
    arguments = parser.parse_args()
    model, _ = load_model(arguments.model, arguments.device, arguments.dtype, arguments.quantize)
    sparsify(model, load_calibration(model, arguments.model).thresholds(arguments.sparsity) | {"lm_head": 0.0})
    times, parts = time_steps(model, arguments.behind, progress_line)
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    print(f"{arguments.model}, {dtype}, {model.device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{f'ms a step, behind {arguments.behind} tokens':28} {'dense':>8} {f'{arguments.sparsity:.0%} sparse':>12}")
    for name in ("recorded", "not recorded"):
        dense_ms, sparse_ms = (1e3 * statistics.median(times[name, mode][3:]) for mode in ("off", "decode"))
        print(f"{name:28} {dense_ms:8.1f} {sparse_ms:12.1f}")
    if parts:
        dense_part, sparse_part = (statistics.median(parts[mode][3:]) for mode in ("off", "decode"))
        print(f"{'recorded, but for products':28} {dense_part:8.1%} {sparse_part:12.1%}")
