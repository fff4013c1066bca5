"""How fast it is: products at the shapes of a Llama, and whole steps.

A product is bound by memory: its limit is the bytes of the weights that it must read over the
bandwidth. `python kernel.py` times one dtype. Here several are timed, those of 8 and 4 bits
(codes.py) beside the library's products in bfloat16, for one token and for several, and all of them
are drawn.

A step of decoding is more than its products: between them lie hundreds of small operations, which
sparsity does not make faster. `--steps` times a step as the model runs it and as record.py replays
it, and says what part of it is not products.

The seams: a product is a function of x, weight and threshold; a step is make_step(model, cache).

    python -m beyond.lab.timing --dtype bfloat16 int8 int4 --figure speed.png       products
    python -m beyond.lab.timing --steps --model random:llama-3.2-1b                 a step
    python -m beyond.lab.timing --gguf FILE --bits 4                random weights for llama.cpp
"""
import contextlib
import statistics
import sys
import time

import numpy
import torch
import torch.nn.functional as F

import kernel
from beyond import codes, quantize, record
from beyond.gguf import gguf_name, package, writing
from beyond.lab.figures import check_figure, pyplot, save_figure
from calibrate import load_calibration
from generate import plain_step
from kernel import MAX_ROWS, copies_of, kept, median_time, sparse_gemv, threshold_dropping
from model import (PRESETS, Llama, Parser, block_linears, check_output, command_line, find_device,
                   linear_names, natural, progress, require, share)
from sparsify import sparse_mode, sparsify

BITS = {"int8": 8, "int4": 4}
GROUP = 128              # channels that share a scale at 4 bits


# --------------------------------------------------------------------------------------------------
# Products

def memory_bandwidth(device, size=1 << 30):
    """Return the bytes a second that are read from memory (on a GPU: read and written)."""
    a = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    if device.type == "cuda":
        b = torch.empty_like(a)
        return 2 * a.numel() / median_time(lambda i: b.copy_(a), device)
    return a.numel() / median_time(lambda i: a.view(torch.float32).amax(), device)


def dense_ways(x, weights_t):
    """Return {name: call(i)}: the library's ways to compute x (B, in) @ weights_t[i] (in, out)."""
    n = len(weights_t)
    weights = [w.t().contiguous() for w in weights_t]      # (out, in), as usual
    ways = {"F.linear": lambda i: F.linear(x, weights[i % n]),
            "x @ weight_t": lambda i: x @ weights_t[i % n]}
    if len(x) == 1:
        ways["torch.mv"] = lambda i: torch.mv(weights[i % n], x[0])
    return ways


def random_codes(inputs, outputs, bits, device):
    """Return a QuantizedWeight (inputs, outputs) of random codes."""
    words = codes.words_of(outputs, bits)
    random = torch.randint(-2**31, 2**31, (inputs, words), dtype=torch.int32, device=device)
    if bits == 8:
        return codes.QuantizedWeight(random, torch.rand(outputs, device=device))
    groups = -(-inputs // GROUP)
    scales = torch.rand(groups, outputs, device=device).bfloat16()
    zeros = torch.randint(16, (groups, outputs), dtype=torch.uint8, device=device)
    return codes.QuantizedWeight(random, scales, zeros, GROUP)


def time_product(inputs, outputs, kind, device, levels, rows):
    """Print, and return, the times of one shape: {"dense" and each of levels: seconds}, and bytes.

    kind: a dtype of the weight by its name, "int8" or "int4"; the latter stand beside the library's
    products in bfloat16. rows: of x, which keep the same channels. bytes: of the weight.
    """
    dtype = getattr(torch, "bfloat16" if kind in BITS else kind)
    weights = copies_of(inputs, outputs, dtype, device)
    whole = weights[0].nbytes
    xs = [torch.randn(1, inputs, device=device) * torch.randn(rows, 1, device=device).sign()
          for _ in range(8)]                               # each keeps other channels
    ways = dense_ways(xs[0].to(dtype), weights)
    ways = {name: median_time(call, device) for name, call in ways.items()}
    product = sparse_gemv
    if kind in BITS:
        product = codes.codes_gemv
        n = len(weights) * 16 // BITS[kind]                # more than any cache holds
        del weights
        weights = [random_codes(inputs, outputs, BITS[kind], device) for _ in range(n)]
    if device.type == "cuda":
        xs = [x.to(dtype) for x in xs]                     # a model on a CPU gives float32
    n, size = len(weights), weights[0].nbytes
    best = min(ways, key=ways.get)
    seconds = {"dense": ways[best]}
    listed = ", ".join(f"{name} {taken * 1e3:.3f} ms" for name, taken in ways.items())
    print(f"\n{inputs} x {outputs} {kind}, {size / 1e6:.0f} MB, {rows} row{'s' * (rows > 1)}; "
          f"dense in {str(dtype).removeprefix('torch.')}, {whole / 1e6:.0f} MB: {listed}")
    print(f"{'sparsity':>10} {'ms':>9} {'GB/s':>8} {'share':>7} {'ratio':>8}")
    rate = whole / ways[best]
    print(f"{'dense':>10} {ways[best] * 1e3:9.3f} {rate / 1e9:8.1f} {1:7.0%} {1:7.2f}x   {best}")
    for level in levels:
        thresholds = [threshold_dropping(x, level) for x in xs]
        read = kept(xs[0], thresholds[0]).any(0).float().mean().item() * size
        taken = median_time(lambda i: product(xs[i % 8], weights[i % n], thresholds[i % 8]), device)
        seconds[level] = taken
        print(f"{level:10.0%} {taken * 1e3:9.3f} {read / taken / 1e9:8.1f} "
              f"{read / taken / rate:7.0%} {ways[best] / taken:7.2f}x", flush=True)
    return seconds, size


def draw_speed(timed, levels, bandwidth, path):
    """Draw speed over the best dense way against sparsity, a panel for each dtype, as a PNG.

    timed: {(kind, inputs, outputs): what time_product returns}; bandwidth: bytes a second, from
    which dotted lines say what would be possible.
    """
    plt = pyplot()
    kinds = list(dict.fromkeys(kind for kind, *_ in timed))
    figure, axes = plt.subplots(1, len(kinds), figsize=(max(4, 2.6 * len(kinds)), 3), sharey=True,
                                layout="constrained", squeeze=False)
    dropped = [100 * level for level in levels]
    for (kind, inputs, outputs), (seconds, size) in timed.items():
        axis = axes[0, kinds.index(kind)]
        dense = seconds["dense"]
        line, = axis.plot(dropped, [dense / seconds[level] for level in levels], marker="o", ms=3,
                          lw=1.2, label=f"{inputs} x {outputs}")
        limit = [dense * bandwidth / size / (1 - level) for level in levels]
        axis.plot(dropped, limit, ls=":", lw=1, color=line.get_color())
    for kind, axis in zip(kinds, axes[0]):
        axis.axhline(1, color="grey", lw=0.8)
        axis.set(title=kind, xlabel="channels dropped (%)", yscale="log")
        ratios = [1, 2, 4, 8, 16, 32, 64]
        axis.set_yticks(ratios, [f"{ratio}x" for ratio in ratios])
        axis.minorticks_off()
    axes[0, 0].set_ylabel("speed over the best dense way")
    axes[0, 0].legend(fontsize=7, title="dotted: what reading the\nkept bytes would allow",
                      title_fontsize=7)
    save_figure(figure, path)


# --------------------------------------------------------------------------------------------------
# Steps

ROUNDS = 23
WARM_UP = 3              # of them, which set things up


@contextlib.contextmanager
def noting_products(calls):
    """Note in the list `calls`, inside a `with`, the C functions of all products and arguments."""
    before = dict(kernel.C_CALLS)
    for name, c_call in before.items():
        def note(*arguments, c_call=c_call):
            calls.append(c_call(*arguments))
            return calls[-1]
        kernel.C_CALLS[name] = note
    try:
        yield
    finally:
        kernel.C_CALLS.update(before)


@torch.no_grad()
def time_steps(model, behind):
    """Return the seconds of a step that looks back at `behind` tokens, {(what, mode): median}.

    what: "recorded", "not recorded", and where a step is recorded on a CPU "products": those of the
    recorded step alone. mode: "off" (dense) and "decode" (sparse). All take turns. Before them
    "prompt": a pass over `behind` tokens, dense.
    """
    cache = model.make_cache(1, behind + 1)
    prompt = torch.ones(1, behind, dtype=torch.int64, device=model.device)
    token = prompt[:, :1]
    steps = {}
    products = {"off": [], "decode": []}
    times = {}

    def timed(name, mode, call, used=behind):
        cache.used = used
        began = time.perf_counter()
        call()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.setdefault((name, mode), []).append(time.perf_counter() - began)

    def replay(calls):
        for function, arguments in calls:
            function(*arguments)

    with sparse_mode(model, "off"):
        for _ in progress(range(WARM_UP + 3), "timing prompts"):
            timed("prompt", "off", lambda: model(prompt, cache, last_only=True), used=0)
    for _ in progress(range(ROUNDS), "timing steps"):
        for mode, calls in products.items():
            with sparse_mode(model, mode):
                if mode not in steps:
                    cache.used = behind
                    with noting_products(calls):
                        steps[mode] = record.make_step(model, cache)
                timed("recorded", mode, lambda: steps[mode](token))
                timed("not recorded", mode, lambda: plain_step(model, cache)(token))
                if calls:
                    timed("products", mode, lambda: replay(calls))
    return {key: statistics.median(seconds[WARM_UP:]) for key, seconds in times.items()}


# --------------------------------------------------------------------------------------------------
# Beside llama.cpp

def write_gguf(path, config, bits):
    """Write a GGUF file, which llama.cpp reads, of a Config's shapes: random weights, for speed.

    bits: of the blocks' linears, 8 (Q8_0) or 4 (Q4_0); the embedding and the head have 8, as here.
    """
    gguf = package()
    with writing(path, config) as writer:
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list([f"t{token}" for token in range(config.vocab_size)])
        writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
        writer.add_token_merges(["t 1"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        blocks = {f"{name}.weight" for name in linear_names(config)}
        for name, parameter in Llama.shapes(config).named_parameters():
            if parameter.ndim == 1:
                writer.add_tensor(gguf_name(name), torch.ones(parameter.shape).numpy())
                continue
            kind = gguf.GGMLQuantizationType["Q4_0" if name in blocks and bits == 4 else "Q8_0"]
            rows, columns = parameter.shape
            values = gguf.quants.quantize(0.02 * torch.randn(64, columns).numpy(), kind)
            writer.add_tensor(gguf_name(name), numpy.resize(values, (rows, values.shape[1])),
                              raw_dtype=kind)


# --------------------------------------------------------------------------------------------------
# The command line

def time_products():
    """Do what the command line asks for without --steps."""
    parser = Parser(description="Times dense against sparse matrix-vector products, here. --steps "
                                "times a step of decoding instead, and has its own --help.")
    parser.add_argument("--shapes", metavar="PRESET", choices=PRESETS,
                        help=f"whose linears: {', '.join(PRESETS)} (default: llama-2-7b, with "
                             f"--gguf llama-3.2-1b)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"],
                        choices=["float32", "bfloat16", "float16", *BITS],
                        help="of the weights (default: float32 bfloat16)")
    parser.add_argument("--sparsity", nargs="+", type=share, default=[0, 0.25, 0.4, 0.5, 0.65, 0.9],
                        help="shares of the channels to drop (default: 0 0.25 0.4 0.5 0.65 0.9)")
    parser.add_argument("--rows", nargs="+", type=int, choices=range(1, MAX_ROWS + 1), default=[1],
                        help="tokens at a time, which drop the same channels (default: 1)")
    parser.add_device()
    parser.add_argument("--figure", metavar="FILE",
                        help="draw the ratios, and what the bandwidth allows, as a PNG; of several "
                             "--rows the first (default: no figure)")
    parser.add_argument("--gguf", metavar="FILE",
                        help="instead: write random weights of the --shapes for llama.cpp, to time "
                             "it beside ours (default: no)")
    parser.add_argument("--bits", type=int, choices=[8, 4], default=4,
                        help="with --gguf: of the blocks' linears; the head has 8 (default: 4)")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.shapes or ("llama-3.2-1b" if arguments.gguf else "llama-2-7b")]
    if arguments.gguf:
        check_output(arguments.gguf, "--gguf")
        write_gguf(arguments.gguf, preset, arguments.bits)
        return
    if arguments.figure:
        check_figure(arguments.figure)
    device = find_device(arguments.device)
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    bandwidth = memory_bandwidth(device)
    print(f"{name}, torch {torch.__version__}. Random weights, more than a cache holds.\n"
          f"GB/s: bytes of kept weights over time; share: of the best dense way's GB/s.\n"
          f"memory bandwidth: {bandwidth / 1e9:.1f} GB/s")
    timed = {}
    for kind in arguments.dtype:
        for inputs, outputs in sorted({shape[::-1] for shape in block_linears(preset).values()}):
            for rows in arguments.rows:
                result = time_product(inputs, outputs, kind, device, arguments.sparsity, rows)
                timed.setdefault((kind, inputs, outputs), result)
    if arguments.figure:
        draw_speed(timed, arguments.sparsity, bandwidth, arguments.figure)


def show_steps():
    """Do what the command line asks for with --steps."""
    parser = Parser(description="Times a step of decoding, dense and sparse: recorded and "
                                "replayed, and run by the model.")
    parser.add_argument("--steps", action="store_true", required=True, help="(default: products)")
    parser.add_model()
    quantize.add_quantize(parser)
    parser.add_argument("--sparsity", type=share, default=0.5, metavar="S",
                        help="share of the blocks' weights to skip (default: 0.5)")
    parser.add_argument("--behind", type=natural, default=16, metavar="N",
                        help="how many tokens a step looks back at (default: 16)")
    arguments = parser.parse_args()
    model, _ = quantize.load(arguments)
    thresholds = load_calibration(model, arguments.model).thresholds(arguments.sparsity)
    sparsify(model, thresholds | {"lm_head": None})
    times = time_steps(model, arguments.behind)
    print(f"{arguments.model}, {str(model.dtype).removeprefix('torch.')}, {model.device.type}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{f'ms a step, behind {arguments.behind} tokens':28} {'dense':>8} "
          f"{f'{arguments.sparsity:.0%} sparse':>12}")
    for name in ("recorded", "not recorded"):
        print(f"{name:28} {1e3 * times[name, 'off']:8.1f} {1e3 * times[name, 'decode']:12.1f}")
    if ("products", "off") in times:
        dense, sparse = (max(0, 1 - times["products", mode] / times["recorded", mode])
                         for mode in ("off", "decode"))
        print(f"{'recorded, but for products':28} {dense:8.1%} {sparse:12.1%}")
    print(f"{f'a prompt of {arguments.behind} tokens':28} {1e3 * times['prompt', 'off']:8.1f}")


def main():
    if "--steps" in sys.argv[1:]:
        show_steps()
    else:
        time_products()


if __name__ == "__main__":
    command_line(main)
