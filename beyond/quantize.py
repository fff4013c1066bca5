"""Writing a checkpoint with 8 or 4 bits a weight. codes.py says what they mean and multiplies them.

    python -m beyond.quantize                              sizes and errors of the demo model
    python -m beyond.quantize --model FOLDER --bits 4 --out FOLDER     writes a quantized checkpoint

A model may be larger than memory, so a folder is read and written file by file. Other commands
quantize a model as they start, with --quantize: `add_quantize` and `load` are for them. What fewer
bits cost, and what they save beside sparsity: python -m beyond.lab.bits.
"""
from pathlib import Path

from beyond import codes
from beyond.codes import CLIPPING, bits_by_name, fitting_group, quantize, quantize_weight
from beyond.folders import (check_new_folder, is_quantized, load_model, read_config,
                            rewrite_checkpoint)
from model import (DEMO, Llama, Parser, block_linears, command_line, linear_names, map_checkpoint,
                   natural, note, progress, require)


# --------------------------------------------------------------------------------------------------
# Quantizing as a command starts

def add_quantize(parser, needs=""):
    """Add --quantize, which `load` follows; needs: what more it asks for."""
    parser.add_argument("--quantize", choices=["int8", "int4"],
                        help=f"round the weights first{needs} (default: as they are)")
    parser.add_argument("--head-bits", type=int, choices=[16, 8, 4],
                        help="with --quantize: of the head and the embedding (default: 8)")
    parser.add_argument("--float-activations", action="store_true",
                        help="multiply quantized weights by activations as they are, not rounded "
                             "to 8 bits (default: rounded, where that is faster)")


def load(arguments, name=None):
    """Return (model, tokenizer) as --device, --dtype and --quantize ask for; name None: --model."""
    name = name or arguments.model
    model, tokenizer = load_model(name, arguments.device, arguments.dtype)
    follow(arguments, model, name)
    return model, tokenizer


def follow(arguments, model, name):
    """Do what the options of add_quantize say, to a model that was loaded as `name`.

    One line says how many bits it has, and what multiplies them.
    """
    codes.ROUND_ACTIVATIONS = not arguments.float_activations
    require(arguments.quantize or arguments.head_bits is None, "--head-bits is for --quantize")
    if arguments.quantize:
        require(not hasattr(model, "quantization"),
                f"{name}: is quantized already, --quantize is for weights in floating point")
        # Random weights lose nothing where no clipping is tried.
        clipping = (1.0,) if str(name).startswith("random:") else CLIPPING
        quantize(model, int(arguments.quantize.removeprefix("int")), clipping=clipping,
                 head_bits=arguments.head_bits or 8)
    settings = getattr(model, "quantization", None)
    if settings:
        note(f"{settings['bits']} bits a weight, the head's {settings['head_bits']}; products by "
             f"{codes.instructions(model.device, settings['bits'])}")


# --------------------------------------------------------------------------------------------------
# The folder

def quantize_folder(folder, out, bits, group=None, head_bits=8):
    """Write the checkpoint in `folder`, its linears quantized, to the new folder `out`.

    It goes file by file. out None: only measure. Other arguments as of codes.quantize. Returns
    {linear, or EMBEDDING: (relative error, bytes before, bytes after)}.
    """
    model = map_checkpoint(Llama.on_meta(read_config(folder)), folder)
    group = group or fitting_group(model)
    bits_of = bits_by_name(model.config, bits, head_bits)
    measures = {}

    def change(path, tensors):
        changed = {}
        for name in progress(list(tensors), f"quantizing {path.name} to int{bits}"):
            weight = tensors.pop(name)
            linear = name.removesuffix(".weight")
            if linear not in bits_of:
                changed[name] = weight
                continue
            quantized = quantize_weight(weight, bits_of[linear], group,
                                        name=f"{path}: tensor {name}")
            wide = weight.float()
            error = (quantized.t() - wide).norm() / wide.norm().clamp(min=1e-30)
            measures[linear] = error.item(), weight.nbytes, quantized.nbytes
            if out:
                changed |= {f"{name}_t.{part}": values
                            for part, values in quantized.named_buffers()}
        return changed

    if out:
        rewrite_checkpoint(folder, model, out, change,
                           {"quantization_config": codes.settings_of(bits, group, head_bits)})
    else:
        change(Path(folder), dict(model.named_parameters()))
    return measures


# --------------------------------------------------------------------------------------------------
# The command

def make_parser(description):
    """Return a Parser with the options that the tables of lab/bits.py take, too."""
    parser = Parser(description=description)
    parser.add_argument("--model", default=str(DEMO),
                        help="checkpoint folder (default: the demo model)")
    parser.add_argument("--group", type=natural,
                        help="inputs that share a scale at 4 bits (default: 128, or as many of "
                             "96, 64 and 32 as divide the inputs of every linear)")
    parser.add_argument("--head-bits", type=int, choices=[16, 8, 4], default=8,
                        help="of the head and the embedding (default: 8)")
    return parser


def checked_group(arguments):
    """Return --group, or the group that fits --model, which must be a folder not quantized yet."""
    folder, group = arguments.model, arguments.group
    require(group is None or group % 32 == 0, f"--group is {group}, expected a multiple of 32")
    require(not folder.startswith("random:"),
            f"{folder} has random weights: commands quantize it as they start, with --quantize")
    require(not is_quantized(folder), f"{folder}: is quantized already")
    return group or fitting_group(Llama.on_meta(read_config(folder)))


def main():
    parser = make_parser("Prints size and error of a checkpoint at 8 and 4 bits a weight; with "
                         "--out, writes it so.")
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4,
                        help="of a weight in --out (default: 4)")
    parser.add_argument("--out", metavar="FOLDER",
                        help="folder to write, which must not exist (default: only measure)")
    arguments = parser.parse_args()
    folder, out = arguments.model, arguments.out
    if out:
        check_new_folder(out)
    group = checked_group(arguments)
    for bits in [arguments.bits] if out else [8, 4]:
        print_errors(folder, bits, group,
                     quantize_folder(folder, out, bits, group, arguments.head_bits))
    if out:
        print(f"{out}: written. Calibrate it with: python -m beyond.allocate --model {out}")


def print_errors(folder, bits, group, measures):
    """Print {linear: (relative error, bytes before, bytes after)}, block by block."""
    def sizes_of(names):
        before, after = (sum(measures[name][i] for name in names) / 1e6 for i in (1, 2))
        return f"{before:,.1f} MB -> {after:,.1f} MB"

    config = read_config(folder)
    rest = [name for name in (codes.EMBEDDING, "lm_head") if name in measures]
    print(f"int{bits}{f', groups of {group}' if bits == 4 else ''}: "
          f"the blocks' linears {sizes_of(linear_names(config))}")
    if rest:
        errors = ", ".join(f"{100 * measures[name][0]:.2f}" for name in rest)
        print(f"{' and '.join(rest)}: {sizes_of(rest)}, relative error {errors} percent")
    print("relative error of each weight of the blocks, in percent:")
    kinds = list(block_linears(config))
    print(f"{'block':>6}" + "".join(f"{kind.split('.')[1]:>11}" for kind in kinds))
    for layer in range(config.num_hidden_layers):
        errors = [measures[f"model.layers.{layer}.{kind}"][0] for kind in kinds]
        print(f"{layer:6}" + "".join(f"{100 * error:11.2f}" for error in errors))


if __name__ == "__main__":
    command_line(main)
