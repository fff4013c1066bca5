"""Bits against sparsity: what each costs, what each saves.

    python -m beyond.lab.bits                 perplexity, MB a token and speed, 16, 8 and 4 bits
    python -m beyond.lab.bits --rounding      what rounding the activations to 8 bits adds
"""
import functools
import itertools

import torch
import torch.nn.functional as F

from beyond import codes, record
from beyond.folders import load_model
from beyond.lab.timing import rate
from beyond.quantize import checked_group, make_parser
from calibrate import SINKS, calibrate, load_calibration
from generate import generate
from model import command_line, default_context, natural, progress, read_tokens, windows_of
from sparsify import bytes_a_token, quality, sparse_mode, sparsify

LEVELS = (0.25, 0.4, 0.5, 0.65)            # of sparsity, in the table
TRAINING = 20_000                          # tokens that each model is calibrated on


def table(arguments, group):
    """Print perplexity, bytes a token and tokens a second, 16, 8 and 4 bits against sparsity.

    Each model is calibrated on its own; shares are uniform. Tokens a second are of decoding alone.
    """
    print(f"{arguments.model}, torch {torch.__version__}, {torch.get_num_threads()} threads; "
          f"products by {codes.instructions('cpu', 8)}")
    print(f"{'bits':>5} {'sparsity':>9} {'realised':>9} {'perplexity':>11} {'KL':>8} "
          f"{'MB a token':>11} {'tokens/s':>9}")
    for bits in (16, 8, 4):
        model, tokenizer = load_model(arguments.model, dtype="bfloat16")
        if bits < 16:
            codes.quantize(model, bits, group, head_bits=arguments.head_bits)
        calibration = calibrate(model, read_tokens(tokenizer, None, "train")[0][:TRAINING])
        held_out = read_tokens(tokenizer, arguments.held_out, "held-out")[0][:arguments.tokens]
        settings = [calibration.thresholds(level, "uniform") for level in LEVELS]
        sparsify(model, settings[0] | {"lm_head": None})
        ways = [functools.partial(sparse_mode, model, "all" if each else "off", each)
                for each in (None, *settings)]
        rows = quality(model, windows_of(held_out, default_context(model)), ways).tolist()
        for level, thresholds, row in zip((0, *LEVELS), (None, *settings), rows):
            perplexity, kl, _, realised = row
            with sparse_mode(model, "decode" if level else "off", thresholds):
                speed = rate(generate(model, held_out[:64].tolist(), 200,
                                      make_step=record.make_step))
            print(f"{bits:5} {level:9.0%} {realised:9.1%} {perplexity:11.3f} {kl:8.4f} "
                  f"{bytes_a_token(model, realised) / 1e6:11.3f} {speed:9.1f}", flush=True)


@torch.no_grad()
def rounding_table(arguments, group):
    """Print what rounding the activations to 8 bits adds to what rounding the weights does.

    KL is the divergence from the model as the folder has it, dense, in nats a token. Thresholds are
    those of the folder's calibration, the first tokens of a window dense, as in decoding.
    """
    original, tokenizer = load_model(arguments.model)
    calibration = load_calibration(original, arguments.model)
    models = {bits: codes.quantize(load_model(arguments.model)[0], bits, group,
                                   head_bits=arguments.head_bits) for bits in (8, 4)}
    for model in models.values():
        sparsify(model, calibration.thresholds(0.5, "uniform") | {"lm_head": None})
    tokens = read_tokens(tokenizer, arguments.held_out, "held-out")[0][:arguments.tokens]
    windows = windows_of(tokens, min(512, default_context(original)))
    # (bits, dropped, rounded), rounded as is the default in the end
    sums = dict.fromkeys(itertools.product(models, (0.0, 0.5, 0.65), (False, True)), 0)
    for window in progress(windows, "rounding activations"):
        inputs, targets = window[None, :-1], window[1:]
        exact = original(inputs)[0].log_softmax(-1)
        for bits, level, rounded in sums:
            codes.ROUND_ACTIVATIONS = rounded
            thresholds = calibration.thresholds(level, "uniform") if level else None
            with sparse_mode(models[bits], "all" if level else "off", thresholds, SINKS):
                log_p = models[bits](inputs)[0].log_softmax(-1)
            sums[bits, level, rounded] += torch.stack((
                F.nll_loss(log_p, targets, reduction="sum"),
                F.kl_div(log_p, exact, reduction="sum", log_target=True))).double()
    print(f"{arguments.model}: {len(windows)} windows of {len(windows[0]) - 1} tokens; products by "
          f"{codes.instructions('cpu', 8)}")
    print(f"{'':>14} {'activations as they are':>25} {'rounded to 8 bits':>25}")
    print(f"{'bits':>5} {'dropped':>8} {'perplexity':>14} {'KL':>10} {'perplexity':>14} {'KL':>10}"
          f" {'added':>8}")
    means = [each / windows[:, 1:].numel() for each in sums.values()]
    for (bits, level, _), (loss, kl), (loss_rounded, kl_rounded) in zip(
            list(sums)[::2], means[::2], means[1::2]):
        print(f"{bits:5} {level:8.0%} {loss.exp():14.3f} {kl:10.5f} {loss_rounded.exp():14.3f} "
              f"{kl_rounded:10.5f} {kl_rounded / kl - 1:+8.1%}")


def main():
    parser = make_parser("Prints perplexity, bytes a token and speed, bits against sparsity.")
    parser.add_argument("--rounding", action="store_true",
                        help="instead: what rounding the activations adds (default: no)")
    parser.add_argument("--held-out", metavar="FILE", help="text to measure on (default: the "
                                                           "demo's)")
    parser.add_argument("--tokens", type=natural, default=50_000,
                        help="of the held-out text (default: 50000)")
    arguments = parser.parse_args()
    (rounding_table if arguments.rounding else table)(arguments, checked_group(arguments))


if __name__ == "__main__":
    command_line(main)
