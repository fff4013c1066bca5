"""How fast it is: products at the shapes of a Llama, whole steps, and what guesses cost.

A product is bound by memory: its limit is the bytes of the weights that it must read over the
bandwidth. `python kernel.py` times products in floating point. Here those of 8 and 4 bits
(quantize.py) are timed too, beside the library's in bfloat16, and all of them are drawn.

A step of decoding is more than its products: between them lie hundreds of small operations, which
sparsity does not make faster. `--steps` times a step as the model runs it and as record.py replays
it, and says what part of it is not products.

Speculation is worth what its guesses cost. `draft_costs` times drafts and verify passes on a model
of a real size. Its weights are random and so is what they accept, so the acceptance comes from the
demo model. `python -m beyond --model random:PRESET --draft KIND` prints that.

The seams: a product is a function of x, weight and threshold; a step is make_step(model, cache).

    python -m beyond.timing --dtype bfloat16 int8 int4 --figure speed.png       products
    python -m beyond.timing --steps --model random:llama-3.2-1b                 a step
    python -m beyond.timing --gguf FILE --bits 4                random weights for llama.cpp
"""
import contextlib
import statistics
import sys
import time

import numpy
import torch

import kernel
from beyond import drafts, quantize, record
from beyond.allocate import add_quantize, check_figure, load, pyplot, save_figure
from beyond.gguf import gguf_name, package, writing
from calibrate import load_calibration
from generate import Sampling, plain_step, random_source
from kernel import (begin, copies_of, dense_ways, inputs_like, listed, make_parser, median_time,
                    preset_shapes, time_levels, time_shape)
from model import (DEMO, PRESETS, Llama, Parser, check_output, command_line, linear_names,
                   load_model, natural, progress, read_tokens, share)
from sparsify import sparse_mode, sparsify

BITS = {"int8": 8, "int4": 4}
GROUP = 128              # channels that share a scale at 4 bits


# --------------------------------------------------------------------------------------------------
# Products

def random_codes(inputs, outputs, bits, device):
    """Return a QuantizedWeight (inputs, outputs) of random codes."""
    words = quantize.words_of(outputs, bits)
    codes = torch.randint(-2**31, 2**31, (inputs, words), dtype=torch.int32, device=device)
    if bits == 8:
        return quantize.QuantizedWeight(codes, torch.rand(outputs, device=device))
    groups = -(-inputs // GROUP)
    scales = torch.rand(groups, outputs, device=device).bfloat16()
    zeros = torch.randint(16, (groups, outputs), dtype=torch.uint8, device=device)
    return quantize.QuantizedWeight(codes, scales, zeros, GROUP)


def time_codes(inputs, outputs, kind, device, levels, rows):
    """Print, and return, the times of one shape in "int8" or "int4", as kernel.time_shape does.

    The dense ways beside them multiply bfloat16. Returns the bytes of the weight, too.
    """
    floats = copies_of(inputs, outputs, torch.bfloat16, device)
    whole = floats[0].nbytes
    xs = inputs_like(floats, rows)
    ways = {name: median_time(call, device) for name, call in dense_ways(xs[0], floats).items()}
    n = len(floats) * 16 // BITS[kind]                     # more than any cache holds of codes, too
    del floats
    weights = [random_codes(inputs, outputs, BITS[kind], device) for _ in range(n)]
    size = weights[0].nbytes
    print(f"\n{inputs} x {outputs} {kind}, {size / 1e6:.0f} MB, {rows} row{'s' * (rows > 1)}; "
          f"dense in bfloat16, {whole / 1e6:.0f} MB: {listed(ways)}")
    return time_levels(xs, weights, ways, whole, levels, quantize.codes_gemv), size


def draw_speed(timed, levels, bandwidth, path):
    """Draw speed over the best dense way against sparsity, a panel for each dtype, as a PNG.

    timed: {(dtype, inputs, outputs): ({"dense" and each of levels: seconds}, bytes of the weight)};
    bandwidth: bytes a second, from which dotted lines say what would be possible.
    """
    plt = pyplot()
    kinds = list(dict.fromkeys(kind for kind, *_ in timed))
    figure, axes = plt.subplots(1, len(kinds), figsize=(max(4, 2.6 * len(kinds)), 3), sharey=True,
                                layout="constrained", squeeze=False)
    dropped = [100 * level for level in levels]
    for axis, kind in zip(axes[0], kinds):
        for (of, inputs, outputs), (seconds, size) in timed.items():
            if of != kind:
                continue
            dense = seconds["dense"]
            line, = axis.plot(dropped, [dense / seconds[level] for level in levels], marker="o",
                              ms=3, lw=1.2, label=f"{inputs} x {outputs}")
            limit = [dense * bandwidth / size / (1 - level) for level in levels]
            axis.plot(dropped, limit, ls=":", lw=1, color=line.get_color())
        axis.axhline(1, color="grey", lw=0.8)
        axis.set(title=kind, xlabel="channels dropped (%)", yscale="log")
        ratios = [1, 2, 4, 8, 16, 32, 64]
        axis.set_yticks(ratios, [f"{ratio}x" for ratio in ratios])
        axis.minorticks_off()
    axes[0, 0].set_ylabel("speed over the best dense way")
    axes[0, 0].legend(fontsize=7, title="dotted: what reading the\nkept bytes would allow",
                      title_fontsize=7)
    save_figure(figure, path)


def launch_time(device):
    """Return the seconds of a launch that does next to nothing."""
    nothing = torch.zeros(2, device=device)
    return median_time(lambda i: nothing[:1].copy_(nothing[1:]), device)


def time_products():
    """The command line without --steps."""
    parser = make_parser(BITS)
    parser.add_argument("--steps", action="store_true",
                        help="instead: time a step of decoding; its own options are in "
                             "--steps --help (default: no)")
    parser.add_argument("--gguf", metavar="FILE",
                        help="instead: write random weights for llama.cpp, to time it beside ours; "
                             "its own options are in --gguf FILE --help (default: no)")
    parser.add_argument("--figure", metavar="FILE",
                        help="draw the ratios, and what the bandwidth allows, as a PNG; of several "
                             "--rows the first (default: no figure)")
    arguments = parser.parse_args()
    levels = arguments.sparsity
    if arguments.figure:
        check_figure(arguments.figure)
    device, bandwidth = begin(arguments)
    if device.type == "cuda":
        print(f"a launch that does nothing: {launch_time(device) * 1e6:.1f} us")
    timed = {}
    for kind in arguments.dtype:
        for inputs, outputs in preset_shapes(arguments.shapes):
            for rows in arguments.rows:
                if kind in BITS:
                    result = time_codes(inputs, outputs, kind, device, levels, rows)
                else:
                    dtype = getattr(torch, kind)
                    seconds = time_shape(inputs, outputs, dtype, device, levels, rows)
                    result = seconds, inputs * outputs * dtype.itemsize
                timed.setdefault((kind, inputs, outputs), result)
    if arguments.figure:
        draw_speed(timed, levels, bandwidth, arguments.figure)


# --------------------------------------------------------------------------------------------------
# Steps

ROUNDS = 23
WARM_UP = 3              # of them, which set things up


@contextlib.contextmanager
def noting_products(calls):
    """Inside a `with`, note in the list `calls` the C functions of all products, with arguments."""
    before = dict(kernel.C_CALLS)
    for name, c_call in before.items():
        def note(*arguments, c_call=c_call):
            call = c_call(*arguments)
            calls.append(call)
            return call
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


def show_steps():
    """The command line with --steps."""
    parser = Parser(description="Times a step of decoding, dense and sparse: recorded and "
                                "replayed, and run by the model.")
    parser.add_argument("--steps", action="store_true", required=True, help="(default: products)")
    parser.add_model()
    add_quantize(parser)
    parser.add_argument("--sparsity", type=share, default=0.5, metavar="S",
                        help="share of the blocks' weights to skip (default: 0.5)")
    parser.add_argument("--behind", type=natural, default=16, metavar="N",
                        help="how many tokens a step looks back at (default: 16)")
    arguments = parser.parse_args()
    model, _ = load(arguments)
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


# --------------------------------------------------------------------------------------------------
# Guesses

def demo_tokens_a_pass(draft, sparsity, sizes, prompts=8, new_tokens=96):
    """Return {size: tokens a pass} of drafts on the demo model and held-out text.

    draft: "sparse", at a sparsity, or "recycle". It samples at temperature 1, top-p 0.9.
    """
    model, tokenizer = load_model(DEMO)
    thresholds = load_calibration(model, DEMO).thresholds(sparsity)
    sparsify(model, thresholds | {"lm_head": None})
    tokens, _ = read_tokens(tokenizer, None, "held-out")
    texts = tokens[:prompts * 1000].view(prompts, 1000)[:, :64].tolist()
    rates = {}
    for size in progress(sizes, "tokens a pass on the demo model, sizes of draft"):
        written = passes = 0
        for seed, prompt in enumerate(texts):
            run = drafts.speculate(model, prompt, new_tokens, draft, draft_tokens=size,
                                   temperature=1.0, top_p=0.9, seed=seed,
                                   make_step=record.make_step)
            for _ in run:
                pass
            written += run.statistics.tokens
            passes += run.statistics.passes
        rates[size] = written / passes
    return rates


@torch.no_grad()
def draft_costs(model, draft, sparsity):
    """Print what drafts cost on a random model, and what they bring with the demo's acceptance.

    draft: "sparse" or "recycle". model: one that was made sparse, with the draft's thresholds, at
    `sparsity`. What follows a prompt of 64 tokens is timed, with verify passes dense.
    """
    # Random logits are flat; at 0.2 they are as sharp as those of a text.
    sampling = Sampling(temperature=0.2, top_p=0.9)
    generator = random_source(model, 0)
    shapes = drafts.CHAINS if draft == "sparse" else drafts.TREES
    sizes = [size for size in shapes.sizes if size]
    tokens_a_pass = demo_tokens_a_pass(draft, sparsity, sizes)
    prompt = torch.arange(1, 65, device=model.device)[None]
    cache = drafts.TreeCache(model.make_cache(1, 256))
    recycle = drafts.RecycleDraft(model)

    def milliseconds(call, repeats=9):
        """Return the median; each call begins after the prompt."""
        times = []
        for _ in range(WARM_UP + repeats):
            cache.used = prompt.shape[1]
            began = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(times[WARM_UP:])

    def one_token(mode):
        """Return the milliseconds of a step with one token, and of choosing the next."""
        with sparse_mode(model, mode):
            step = record.make_step(model, cache)
            return milliseconds(
                lambda: sampling.choose(step(prompt[:, :1])[:, -1], generator)[0].item())

    with sparse_mode(model, "off"):
        model(prompt, cache, last_only=True)
        plain = one_token("off")
        print(f"a plain step {plain:.1f} ms, {1e3 / plain:.1f} tokens/s")
        if draft == "sparse":
            guess = one_token("all")
            print(f"a draft step at {sparsity:.0%} {guess:.1f} ms")
        print(f"{'guesses':>8} {'draft ms':>9} {'verify ms':>10} {'tokens a pass':>14} "
              f"{'tokens/s':>9} {'ratio':>7}")
        verify = record.make_step(model, cache)
        for size in sizes:
            tree = shapes.tree(size, model.device)
            tokens = prompt[:, :1].expand(1, size + 1).contiguous()

            def verified():
                cache.grow(tree)
                logits = verify(tokens)[0]                                      # (nodes, vocab)
                drafts.walk(logits, tree, tokens[0].tolist(), None, sampling, generator)
                if draft == "recycle":
                    recycle.learn(tokens[0], logits)

            drafting = size * guess if draft == "sparse" else milliseconds(
                lambda: recycle.guess([1], size))
            verifying = milliseconds(verified)
            rate = tokens_a_pass[size] / (drafting + verifying)      # tokens a millisecond
            print(f"{size:8} {drafting:9.1f} {verifying:10.1f} {tokens_a_pass[size]:14.2f} "
                  f"{1e3 * rate:9.1f} {rate * plain:6.2f}x", flush=True)
    print("times: this model's, with random weights, sampled at temperature 0.2; tokens a pass: "
          "the demo model's, at 1; both top-p 0.9")


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


def make_gguf():
    """The command line with --gguf."""
    parser = Parser(description="Writes a GGUF file of random weights, to time llama.cpp with.")
    parser.add_argument("--gguf", required=True, metavar="FILE", help="(default: products)")
    parser.add_argument("--shapes", default="llama-3.2-1b", metavar="PRESET", choices=PRESETS,
                        help=f"{', '.join(PRESETS)} (default: llama-3.2-1b)")
    parser.add_argument("--bits", type=int, choices=[8, 4], default=4,
                        help="of the blocks' linears; the head has 8 (default: 4)")
    arguments = parser.parse_args()
    check_output(arguments.gguf, "--gguf")
    write_gguf(arguments.gguf, PRESETS[arguments.shapes], arguments.bits)


def main():
    if "--steps" in sys.argv[1:]:
        show_steps()
    elif "--gguf" in sys.argv[1:]:
        make_gguf()
    else:
        time_products()


if __name__ == "__main__":
    command_line(main)
