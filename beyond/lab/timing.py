"""How fast it is: products at the shapes of a Llama, and whole steps.

A product is bound by memory: its limit is the bytes of the weights that it must read over the
bandwidth. `python kernel.py` times one dtype; here several are timed, those of 8 and 4 bits
(codes.py) beside the library's products in bfloat16.

A step of decoding is more than its products: between them lie hundreds of small operations, which
sparsity does not make faster. `--steps` times a step as the model runs it and as record.py replays
it.

    python -m beyond.lab.timing --dtype bfloat16 int8 int4                    products
    python -m beyond.lab.timing --steps --model random:llama-3.2-1b           a step
    python -m beyond.lab.timing --gguf FILE --bits 4          random weights for llama.cpp
"""
import collections
import functools
import itertools
import statistics
import sys
import time

import numpy
import torch

from beyond import quantize, record
from beyond.codes import QuantizedWeight, codes_gemv
from beyond.gguf import gguf_name, package, writing
from calibrate import load_calibration
from generate import circumstances, plain_step
from kernel import time_levels, time_shape
from model import (PRESETS, Llama, Parser, block_linears, check_output, command_line, find_device,
                   linear_names, natural, progress, share)
from sparsify import sparse_mode, sparsify

BITS = {"int8": 8, "int4": 4}


# --------------------------------------------------------------------------------------------------
# What other measures use, too

def random_codes(inputs, outputs, bits, device, scale=1.0):
    """Return a QuantizedWeight (inputs, outputs) of random codes, 4 bits in groups of 128."""
    words = -(-outputs * bits // 512) * 16                 # see codes.pack_codes
    group = min(128, inputs)
    codes = torch.randint(-2**31, 2**31, (inputs, words), dtype=torch.int32, device=device)
    scales = scale * torch.rand(1 if bits == 8 else inputs // group, outputs, device=device)
    if bits == 8:
        return QuantizedWeight(codes, scales[0])
    zeros = torch.randint(16, scales.shape, dtype=torch.uint8, device=device)
    return QuantizedWeight(codes, scales.bfloat16(), zeros, group)


def rate(items):
    """Return how many items a second come out of an iterator, by the median time between two."""
    times = [time.perf_counter() for _ in items]
    return 1 / statistics.median(end - begin for begin, end in itertools.pairwise(times))


def seconds_of(call, device):
    """Return the seconds that a call takes, on a GPU to the end of what it launches."""
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def load_sparse(arguments, sparsity):
    """Return the model that options name, made sparse, and print what its times depend on."""
    model, _ = quantize.load(arguments)
    thresholds = load_calibration(model, arguments.model).thresholds(sparsity)
    print(circumstances(arguments.model, model))
    return sparsify(model, thresholds | {"lm_head": None})


# --------------------------------------------------------------------------------------------------
# Products

def time_product(inputs, outputs, kind, device, levels, total=512_000_000):
    """Print the times of one shape, as kernel.time_shape does.

    kind: a dtype of the weight by its name, "int8" or "int4"; the latter stand beside the library's
    products in bfloat16. total: bytes of weights, more than any cache holds.
    """
    dtype = getattr(torch, "bfloat16" if kind in BITS else kind)
    times = time_shape(inputs, outputs, dtype, device, () if kind in BITS else levels, total=total)
    if kind not in BITS:
        return
    weights = [random_codes(inputs, outputs, BITS[kind], device)]
    size = weights[0].nbytes
    while len(weights) * size < total:
        weights.append(random_codes(inputs, outputs, BITS[kind], device))
    xs = torch.randn(8, 1, inputs, device=device)
    if device.type == "cuda":
        xs = xs.to(dtype)                                  # a model on a CPU gives float32
    print(f"{kind}, {size / 1e6:.0f} MB")
    time_levels(codes_gemv, weights, xs, levels, min(times.values()))


# --------------------------------------------------------------------------------------------------
# Steps

ROUNDS = 23
WARM_UP = 3              # of them, which set things up


@torch.no_grad()
def time_steps(model, behind):
    """Return the seconds of a step that looks back at `behind` tokens, {(what, mode): median}.

    what: "recorded", "not recorded"; mode: "off" (dense) and "decode" (sparse). All take turns.
    Before them "prompt": a pass over `behind` tokens, dense.
    """
    cache = model.make_cache(1, behind + 1)
    prompt = torch.ones(1, behind, dtype=torch.int64, device=model.device)
    times = collections.defaultdict(list)
    with sparse_mode(model, "off"):
        for _ in progress(range(WARM_UP + 3), "timing prompts"):
            cache.used = 0
            times["prompt", "off"].append(
                seconds_of(lambda: model(prompt, cache, last_only=True), model.device))
    calls = {}
    for mode in ("off", "decode"):
        with sparse_mode(model, mode):
            step = record.make_step(model, cache)
        calls["recorded", mode] = functools.partial(step, prompt[:, :1])
        calls["not recorded", mode] = functools.partial(plain_step(model, cache), prompt[:, :1])
    for _ in progress(range(ROUNDS), "timing steps"):
        for (name, mode), call in calls.items():
            cache.used = behind
            with sparse_mode(model, mode):
                times[name, mode].append(seconds_of(call, model.device))
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
        for name, parameter in Llama.on_meta(config).named_parameters():
            if parameter.ndim == 1:
                writer.add_tensor(gguf_name(name), numpy.ones(parameter.shape, numpy.float32))
                continue
            of_block = name.removesuffix(".weight") in linear_names(config)
            kind = gguf.GGMLQuantizationType["Q4_0" if of_block and bits == 4 else "Q8_0"]
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
    add = parser.add_argument
    add("--shapes", metavar="PRESET", choices=PRESETS,
        help=f"whose linears: {', '.join(PRESETS)} (default: llama-2-7b, with --gguf "
             f"llama-3.2-1b)")
    add("--dtype", nargs="+", default=["float32", "bfloat16"],
        choices=["float32", "bfloat16", "float16", *BITS],
        help="of the weights (default: float32 bfloat16)")
    add("--sparsity", nargs="+", type=share, default=[0, 0.25, 0.4, 0.5, 0.65, 0.9],
        help="shares of the channels to drop (default: 0 0.25 0.4 0.5 0.65 0.9)")
    parser.add_device()
    add("--gguf", metavar="FILE",
        help="instead: write random weights of the --shapes for llama.cpp, to time it beside ours "
             "(default: no)")
    add("--bits", type=int, choices=[8, 4], default=4,
        help="with --gguf: of the blocks' linears; the head has 8 (default: 4)")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.shapes or ("llama-3.2-1b" if arguments.gguf else "llama-2-7b")]
    if arguments.gguf:
        check_output(arguments.gguf, "--gguf")
        return write_gguf(arguments.gguf, preset, arguments.bits)
    device = find_device(arguments.device)
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}. Random weights, more than a cache holds.\n"
          f"GB/s: bytes of kept weights over time. ratio: to the fastest of PyTorch's ways")
    shapes = sorted({shape[::-1] for shape in block_linears(preset).values()})
    for kind, shape in itertools.product(arguments.dtype, shapes):
        time_product(*shape, kind, device, arguments.sparsity)


def show_steps():
    """Do what the command line asks for with --steps."""
    parser = Parser(description="Times a step of decoding, dense and sparse: recorded and "
                                "replayed, and run by the model.")
    add = parser.add_argument
    add("--steps", action="store_true", required=True, help="(default: products)")
    parser.add_model()
    quantize.add_quantize(parser)
    add("--sparsity", type=share, default=0.5, metavar="S",
        help="share of the blocks' weights to skip (default: 0.5)")
    add("--behind", type=natural, default=16, metavar="N",
        help="how many tokens a step looks back at (default: 16)")
    arguments = parser.parse_args()
    times = time_steps(load_sparse(arguments, arguments.sparsity), arguments.behind)
    print(f"{f'ms a step, behind {arguments.behind} tokens':28} {'dense':>8} "
          f"{f'{arguments.sparsity:.0%} sparse':>12}")
    for name in ("recorded", "not recorded"):
        print(f"{name:28} {1e3 * times[name, 'off']:8.1f} {1e3 * times[name, 'decode']:12.1f}")
    print(f"{f'a prompt of {arguments.behind} tokens':28} {1e3 * times['prompt', 'off']:8.1f}")


def main():
    show_steps() if "--steps" in sys.argv[1:] else time_products()


if __name__ == "__main__":
    command_line(main)
