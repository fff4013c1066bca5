"""Fewer bits a weight, together with fewer weights.

A weight of 16 bits can be rounded to 8 or 4 and the model hardly notices. Decoding is bound by the bytes it reads, and
skipping a column saves as large a share of 4 bits as of 16: the gains multiply.

    bytes a weight       dense    50 % sparse
    bfloat16             2        1
    int8                 1        0.5
    int4                 0.52     0.26            a group of 128 weights has a scale and a zero point, 3 bytes

int8, one scale for each output (a row of W, a column of the transposed weight):

    scale = max|w| / 127          code = round(w / scale)                     w ≈ scale * code

int4 has sixteen values, too few for a whole row: each group of 128 inputs of an output has a range of its own.

    scale = (high - low) / 15     code = round((w - low) / scale)             w ≈ scale * (code - zero)

    weights of a group     low ─────┬───┬───┬───┬── 0 ──┬───┬───┬───┬───── high        sixteen steps
    clipped                    low ──┬──┬──┬──┬ 0 ┬──┬──┬──┬── high                    finer steps, two weights cut off

Where a few weights are large, cutting them off makes the steps of all others finer: of a small grid of clipping ratios,
each group takes the one with the least squared error. Rounding is to nearest, and nothing but the weights is looked at.
Only the linears of the blocks are quantized; activations keep their 16 or 32 bits, and sums are taken in float32.

Decoding unpacks in registers, in the pass that skips (kernel.py); a weight is written out in floating point only for
products of many rows, a prompt's, where that costs little. A quantized folder is a checkpoint like others, but it is not rotated, or
split over processes, any more. Its activations differ a little, so it is calibrated anew.

    python quantize.py                                          size and error of the demo model at int8 and int4
    python quantize.py --model FOLDER --bits 4 --out FOLDER     writes the quantized checkpoint
    python quantize.py --table                                  bits against sparsity: perplexity, bytes a token, speed
"""
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from kernel import QuantizedWeight, pack_codes, words_of
from checkpoint import Config, block_linears, linear_names, rewrite_checkpoint
from cli import DEMO, InputError, Parser, command_line, natural, progress_line
from model import Llama, load_model, load_tokenizer
from sparsify import SparseLinear

CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8)     # of a group's range: those tried
METHOD, VERSION = "minteal", 1             # what config.json says of a quantized checkpoint


def quantized(weight, bits, group=128, clipping=CLIPPING, name="the weight"):
    """The QuantizedWeight of `weight` (out, in), as a linear or a checkpoint has it, rounded to nearest.

    bits: 8, or 4 with groups of `group` inputs. clipping: the ratios of a group's range of which the best is taken (int4).
    Raises InputError, with `name`, for weights that are not finite and a group that does not divide the inputs.
    """
    check_weight(weight, bits, group, name)
    weight_t = weight.t().float()                                                           # (in, out)
    if bits == 8:
        scales = (weight_t.abs().amax(0) / 127).clamp(min=torch.finfo(torch.float32).tiny)  # (out,)
        return QuantizedWeight(pack_codes((weight_t / scales).round().int() + 128, 8), scales)
    parts = weight_t.unflatten(0, (-1, group))                                              # (groups, group, out)
    low, high = parts.amin(1).clamp(max=0), parts.amax(1).clamp(min=0)                      # zero is always among the values
    best, scales, zeros, codes = torch.full_like(low, float("inf")), low, low, torch.zeros_like(parts)
    for ratio in clipping:
        scale = ((high - low) * ratio / 15).clamp(min=1e-30).bfloat16().float()             # as it will be stored
        zero = (-low * ratio / scale).round().clamp(0, 15)
        code = (parts / scale[:, None] + zero[:, None]).round().clamp(0, 15)
        error = ((code - zero[:, None]) * scale[:, None] - parts).square().sum(1)
        better = error < best
        best, scales, zeros = torch.where(better, error, best), torch.where(better, scale, scales), torch.where(better, zero, zeros)
        codes = torch.where(better[:, None], code, codes)
    return QuantizedWeight(pack_codes(codes.flatten(0, 1).int(), 4), scales.bfloat16(), zeros.to(torch.uint8), group)


def check_weight(weight, bits, group, name):
    """Raises InputError for a weight (out, in) that cannot be quantized so."""
    if bits not in (4, 8):
        raise InputError(f"bits is {bits}, expected 4 or 8")
    if not torch.isfinite(weight).all():
        raise InputError(f"{name}: holds NaN or infinity, which has no code")
    if bits == 4 and (group < 1 or group % 32 or weight.shape[1] % group):
        raise InputError(f"{name}: groups of {group}, expected a multiple of 32 that divides its {weight.shape[1]} inputs")


def relative_error(weight, weight_q):
    """‖w - w'‖ / ‖w‖ of a weight (out, in) and its QuantizedWeight."""
    return ((weight_q.dequantized(torch.float32).t() - weight.float()).norm() / weight.float().norm().clamp(min=1e-30)).item()


def empty_weight(inputs, outputs, bits, group=None):
    """A QuantizedWeight without values, on the meta device: what a checkpoint's tensors are checked against."""
    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")
    words = words_of(outputs, bits)
    if bits == 8:
        return QuantizedWeight(empty(inputs, words, dtype=torch.int32), empty(outputs, dtype=torch.float32))
    return QuantizedWeight(empty(inputs, words, dtype=torch.int32), empty(inputs // group, outputs, dtype=torch.bfloat16),
                           empty(inputs // group, outputs, dtype=torch.uint8), group)


def replace_linear(model, name, weight):
    """Puts the QuantizedWeight in the place of the weight of the linear `name`; a bias stays."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, SparseLinear(weight, model.get_submodule(name).bias))


def settings_of(config, path):
    """(bits, group) that config.json gives a quantized checkpoint; InputError for what this file did not write."""
    raw = config.quantization_config
    if raw.get("version") != VERSION:
        raise InputError(f"{path}: quantization_config: version is {raw.get('version')!r}, known is {VERSION}")
    bits, group = raw.get("bits"), raw.get("group")
    if type(bits) is not int or (bits, type(group)) not in ((8, type(None)), (4, int)):
        raise InputError(f"{path}: quantization_config: {bits!r} bits with group {group!r}, expected 8 with null or 4 with a number")
    for name, (_, inputs) in block_linears(config).items():
        if bits == 4 and (group < 1 or group % 32 or inputs % group):
            raise InputError(f"{path}: quantization_config: groups of {group}, expected a multiple of 32 that divides the {inputs} inputs of {name}")
    return bits, group


def shape_linears(model, path):
    """Puts empty quantized linears into a Llama on the meta device, as its config says; for Llama.from_pretrained."""
    bits, group = settings_of(model.config, path)
    for name in linear_names(model.config):
        linear = model.get_submodule(name)
        replace_linear(model, name, empty_weight(linear.in_features, linear.out_features, bits, group))


@torch.no_grad()
def quantize(model, bits, group=128, clipping=CLIPPING, progress=lambda text: None):
    """Quantizes the linears of a Llama's blocks in place, one by one, and returns the model. It is dense, like before."""
    names = linear_names(model.config)
    if any(isinstance(model.get_submodule(name), SparseLinear) for name in names):
        raise InputError("the model is quantized or sparse already; quantize it first, then make it sparse")
    for name in names:                                     # all checks first: what is refused changes nothing
        check_weight(model.get_submodule(name).weight, bits, group, name)
    for done, name in enumerate(names):
        progress(f"quantizing: linear {done + 1} of {len(names)}")
        replace_linear(model, name, quantized(model.get_submodule(name).weight, bits, group, clipping, name))
    model.config = replace(model.config, quantization_config=settings_for(bits, group))
    return model


def settings_for(bits, group):
    """What config.json says of a quantized checkpoint; `settings_of` reads it."""
    return {"quant_method": METHOD, "version": VERSION, "bits": bits, "group": group if bits == 4 else None}


def quantize_folder(folder, out, bits, group=128, progress=lambda text: None):
    """Writes the checkpoint in `folder`, its blocks' linears quantized, to the new folder `out`, shard by shard.

    Returns [(name, relative error ‖w - w'‖ / ‖w‖, bytes before, bytes after)] of the linears.
    """
    config = Config.read(folder)
    if config.quantization_config:
        raise InputError(f"{folder}: is quantized already")
    linears, errors = {f"{name}.weight" for name in linear_names(config)}, []

    def change(path, tensors):
        written = {}
        for done, (name, tensor) in enumerate(tensors.items()):
            progress(f"quantizing: {path.name}, tensor {done + 1} of {len(tensors)}")
            if name not in linears:
                written[name] = tensor
                continue
            weight = quantized(tensor, bits, group, name=f"{path}: tensor {name}")
            parts = {f"{name}_t.{part}": values for part, values in weight.named_buffers()}
            written |= parts
            errors.append((name.removesuffix(".weight"), relative_error(tensor, weight), tensor.nbytes,
                           sum(values.nbytes for values in parts.values())))
        return written

    rewrite_checkpoint(folder, Llama.shapes(config), out, change, {"quantization_config": settings_for(bits, group)})
    return errors


def bytes_a_token(model):
    """The bytes of weights that one dense decoding step reads: all linears and norms, one row of the embedding."""
    embedding = model.model.embed_tokens.weight
    seen = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    tied = model.config.tie_word_embeddings
    return sum(seen.values()) - (0 if tied else embedding.nbytes) + embedding[0].nbytes


def main():
    parser = Parser(description="Size and error of a checkpoint at 8 and 4 bits a weight; with --out, writes it so.")
    parser.add_argument("--model", default=str(DEMO), help="checkpoint folder (default: the demo model)")
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4, help="of a weight in --out (default: 4)")
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale at 4 bits (default: 128)")
    parser.add_argument("--out", metavar="FOLDER", help="folder to write, which must not exist (default: only measure)")
    parser.add_argument("--table", action="store_true", help="measure perplexity and speed, bits against sparsity (default: no)")
    parser.add_argument("--tokens", type=natural, default=50_000, help="of the held-out text for --table (default: 50000)")
    arguments = parser.parse_args()
    if arguments.group < 1 or arguments.group % 32:
        raise InputError(f"--group is {arguments.group}, expected a multiple of 32")
    if arguments.model.startswith("random:"):
        raise InputError(f"{arguments.model} has random weights: commands quantize it as they start, with --quantize")
    if Path(arguments.model).is_dir() and Config.read(arguments.model).quantization_config:
        raise InputError(f"{arguments.model}: is quantized already")
    if arguments.table:
        table(arguments.model, arguments.group, arguments.tokens)
        return
    if arguments.out:
        errors = {arguments.bits: quantize_folder(arguments.model, arguments.out, arguments.bits, arguments.group, progress_line)}
    else:
        model, _ = load_model(arguments.model)
        errors = {}
        for bits in (8, 4):
            rows = errors[bits] = []
            for name in linear_names(model.config):
                progress_line(f"int{bits}: {name}")
                weight = model.get_submodule(name).weight
                weight_q = quantized(weight, bits, arguments.group, name=name)
                rows.append((name, relative_error(weight, weight_q), weight.nbytes, sum(part.nbytes for part in weight_q.buffers())))
    for bits, rows in errors.items():
        before, after = (sum(row[i] for row in rows) for i in (2, 3))
        print(f"int{bits}{f', groups of {arguments.group}' if bits == 4 else ''}: the blocks' linears {before / 1e6:,.1f} MB -> "
              f"{after / 1e6:,.1f} MB; relative error of each weight, in percent:")
        kinds = list(block_linears(Config.read(arguments.model)))
        print(f"{'block':>6}" + "".join(f"{kind.split('.')[1]:>11}" for kind in kinds))
        found = {name: error for name, error, _, _ in rows}
        for layer in sorted({int(name.split(".")[2]) for name in found}):
            print(f"{layer:6}" + "".join(f"{100 * found[f'model.layers.{layer}.{kind}']:11.2f}" for kind in kinds))
    if arguments.out:
        print(f"{arguments.out}: written. Calibrate it with: python calibrate.py --model {arguments.out}")


def table(folder, group, count, levels=(0.0, 0.25, 0.4, 0.5, 0.65)):
    """Prints perplexity, bytes a token and tokens a second, 16, 8 and 4 bits against sparsity.

    Each is calibrated on its own, on 20,000 tokens and without the priced allocation, which would take minutes more.
    Tokens a second are of decoding alone.
    """
    from calibrate import calibrate
    from decode import generate
    from judge import Setting, at_target, judge
    from sparsify import read_tokens, realised_sparsity, reset_counts, sparse_mode, sparsify

    print(f"{folder}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'bits':>5} {'sparsity':>9} {'realised':>9} {'perplexity':>11} {'at target':>10} {'MB a token':>11} {'tokens/s':>9}")
    train, held_out = (read_tokens(load_tokenizer(folder), None, part)[0] for part in ("train", "held-out"))
    for bits in (16, 8, 4):
        model, _ = load_model(folder, dtype="bfloat16")
        if bits < 16:
            quantize(model, bits, group, progress=progress_line)
        calibration = calibrate(model, train[:20_000], progress=progress_line)
        size, linears = bytes_a_token(model), sum(part.nbytes for name in linear_names(model.config)
                                                  for part in [*model.get_submodule(name).parameters(), *model.get_submodule(name).buffers()])
        sparsify(model, calibration.thresholds(0.0) | {"lm_head": 0.0})
        settings = [Setting("balanced", level, calibration.thresholds(level)) for level in levels if level]
        rows = judge(model, held_out[:count], settings, progress=progress_line)
        at_target(rows)
        for row, level in zip(rows, levels):
            with sparse_mode(model, "decode" if level else "off", calibration.thresholds(level)):
                reset_counts(model)
                times = []
                for _ in generate(model, held_out[:64].tolist(), 200):
                    times.append(time.perf_counter())
                seconds = statistics.median(end - begin for begin, end in zip(times, times[1:]))
                skipped = realised_sparsity(model)
            at = f"{row['perplexity_at_target']:10.3f}" if row.get("perplexity_at_target") else f"{'-':>10}"
            print(f"{bits:5} {level:9.0%} {row['sparsity']:9.1%} {row['perplexity']:11.3f} {at} "
                  f"{(size - skipped * linears) / 1e6:11.3f} {1 / seconds:9.1f}", flush=True)


if __name__ == "__main__":
    command_line(main)
