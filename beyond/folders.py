"""Whatever folder a person has: older spellings, quantized weights, tokenizers that want a repair.

model.py reads the plain folder, as transformers writes it today, and refuses the rest by name. Here
is the rest, behind the one call that every chapter uses:

    load_model(name) -> (model, tokenizer)

config.json is respelled as model.py has it, after a check of each number and setting. What is not
implemented anywhere is refused by name: an adapter that was not merged, another architecture, a
setting that changes the function.

Chapters that write a checkpoint anew (rotate.py, quantize.py) share the second half. A model may be
larger than memory, so this goes file by file:

    FOLDER/model-00001.safetensors  ─► change ─►  OUT.random/model-00001.safetensors ┐
    FOLDER/model-00002.safetensors  ─► change ─►  OUT.random/model-00002.safetensors ├─► OUT
    tokenizer, generation settings, config.json ─►  the same, with what has changed  ┘

The folder gets its name when all of it is there. A run that fails or is stopped leaves nothing.

The seams: `Config.read`, `fill`, `checked_shards`, `write_safetensors` of model.py.
"""
import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import model as core
from beyond import codes, fused          # noqa: F401 (fused: codes on a GPU)
from model import (Config, HubTokenizer, InputError, Llama, checked_shards, fill, find_device,
                   read_json, refusing, require, write_json, write_safetensors)

import torch

INTEGERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
            "sliding_window")
BOOLEANS = ("attention_bias", "mlp_bias", "tie_word_embeddings")


def load_model(name, device="cpu", dtype=None, maker=Llama):
    """Return (model, tokenizer) of whatever minTEAL reads, as every chapter takes it with --model.

    name: a checkpoint folder, or "random:PRESET", which has no tokenizer: None. dtype: None, a
    torch.dtype, or the name of one. maker: Llama, or what has its `random` and `from_pretrained`.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    device = find_device(device)
    if str(name).startswith("random:"):
        preset = str(name).removeprefix("random:")
        return maker.random(preset, device, dtype or torch.bfloat16), None
    gguf = str(name).endswith(".gguf")
    require(Path(name).is_dir(), f"{name}: " + (
        "python -m beyond.gguf makes a folder of a GGUF file" if gguf else "no such folder"))
    check_adapter(name)
    tokenizer = load_tokenizer(name)     # first: it fails sooner
    if maker is not Llama:
        return maker.from_pretrained(name, device, dtype), tokenizer
    return fill(shaped(name), name, device, dtype), tokenizer


def shaped(folder):
    """Return the Llama of a folder on the meta device, its linears as they are stored."""
    model = Llama.shapes(read_config(folder))
    quantized = read_json(Path(folder) / "config.json").get("quantization_config")
    if quantized:
        codes.shape(model, quantized)
    return model


# --------------------------------------------------------------------------------------------------
# config.json

def check_adapter(folder):
    """Raise InputError for a folder of an adapter, which changes a model that lies elsewhere."""
    adapter = Path(folder) / "adapter_config.json"
    require(not adapter.exists(),
            f"{adapter}: an adapter; merge it into its base model first (merge_and_unload)")


def read_config(folder):
    """Return the Config of a checkpoint folder, however it is spelled."""
    check_adapter(folder)
    path = Path(folder) / "config.json"
    return Config.read(folder, respelled(read_json(path), path))


def respelled(raw, path):
    """Return the object of a config.json as model.py spells it, every setting checked."""
    def refuse(key, expected, found=raw):
        raise InputError(f"{path}: {key} is {json.dumps(found.get(key))}, expected {expected}")

    architectures = raw.get("architectures") or ["LlamaForCausalLM"]
    if not isinstance(architectures, list) or not {"LlamaForCausalLM", "MistralForCausalLM"} & set(
            map(str, architectures)):
        refuse("architectures", "LlamaForCausalLM or MistralForCausalLM")
    for key in INTEGERS:
        if raw.get(key) is not None and not (type(raw[key]) is int and 0 < raw[key] < 2**31):
            refuse(key, "a whole number above 0, below 2^31")
    for key in BOOLEANS:
        if type(raw.get(key, False)) is not bool:
            refuse(key, "true or false")
    quantized = raw.get("quantization_config")
    if quantized and (not isinstance(quantized, dict)
                      or quantized.get("quant_method") != codes.METHOD):
        refuse("quantization_config", "floating point, or what python -m beyond.quantize writes")
    # Rotary settings stand in rope_theta and rope_scaling, or all together in the newer
    # rope_parameters. If both are there, transformers takes the older one.
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(key) or {}
    if not isinstance(rope, dict):
        refuse(key, "an object")
    rope = {name: value for name, value in rope.items() if value is not None}
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    original = raw.get("original_max_position_embeddings")           # counts before rope's own
    if rope["rope_type"] != "llama3":
        rope.pop("original_max_position_embeddings", None)
    elif original is not None:
        rope["original_max_position_embeddings"] = original
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    raw = {name: value for name, value in raw.items()
           if name not in ("rope_scaling", "rope_parameters", "quantization_config")}
    raw["rope_parameters"] = rope
    if rope["rope_type"] == "llama3" and isinstance(rope.get("low_freq_factor"), (int, float)):
        if rope["low_freq_factor"] >= rope.get("high_freq_factor", float("inf")):
            refuse("low_freq_factor", "less than the high_freq_factor", rope)
    return raw


def is_quantized(folder):
    """Return whether the config.json of a checkpoint folder says that its weights are quantized."""
    return bool(read_json(Path(folder) / "config.json").get("quantization_config"))


# --------------------------------------------------------------------------------------------------
# Tokenizers

def load_tokenizer(folder):
    """Return the tokenizer of a checkpoint folder, as model.load_tokenizer does, or repaired.

    A tokenizer.model without tokenizer.json that other files add to is read by transformers.
    """
    folder = Path(folder)
    path = folder / "tokenizer.model"
    if (folder / "tokenizer.json").exists() or not path.exists():
        return core.load_tokenizer(folder)
    settings = read_json(folder / "tokenizer_config.json", {})
    with open(path, "rb") as file:
        if file.read(1) != b"\n":                          # Llama-3's first release, by tiktoken
            require(settings, f"{path}: not SentencePiece, and neither tokenizer.json nor "
                              f"tokenizer_config.json names its special tokens")
            os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")     # else a file is what its path held
            return HubTokenizer(folder)
    tokenizer = core.SentencePieceTokenizer(folder)
    if tokenizer.is_complete(folder):
        return tokenizer
    with refusing(f"{folder}: tokenizer.model without tokenizer.json needs the packages "
                  f"transformers and protobuf: pip install transformers protobuf", ImportError):
        import google.protobuf                             # noqa: F401
        from transformers import LlamaTokenizer
    # AutoTokenizer would take another class for Mistral, which begins no text with a blank.
    return HubTokenizer(folder, kind=LlamaTokenizer,
                        add_bos_token=settings.get("add_bos_token") is not False)


# --------------------------------------------------------------------------------------------------
# Writing a checkpoint anew

def check_new_folder(out):
    """Raise InputError, before anything is computed, if `out` exists or cannot be made."""
    require(not os.path.lexists(out),
            f"{out}: exists already; this is written to a new folder; see --out")
    there = next(folder for folder in Path(out).absolute().parents if folder.exists())
    require(there.is_dir(), f"{out}: cannot be written: {there} is no folder; see --out")
    require(os.access(there, os.W_OK), f"{out}: cannot be written: {there} is read-only; see --out")


@contextlib.contextmanager
def new_folder(out):
    """Open a folder to fill: `with new_folder(out) as unfinished`. At the end it becomes `out`.

    Raises InputError if `out` exists, or cannot be written. What is not finished is removed.
    """
    check_new_folder(out)
    out = Path(out)
    with refusing(f"{out}: cannot be written", OSError):
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)          # mkdtemp makes a folder that only its owner can read
        os.rename(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def rewrite_checkpoint(folder, model, out, change, config_changes):
    """Write the checkpoint in `folder` anew to the new folder `out`, with its tokenizer.

    model: a Llama on the meta device, which every tensor is checked against
    change(path, tensors): returns the tensors {name: tensor} that take the place of those of a file
    config_changes: {key: value}, what is set in config.json
    """
    folder = Path(folder)
    weight_map = {}
    with new_folder(out) as unfinished:
        for path, tensors in checked_shards(folder, model):
            changed = change(path, tensors)
            write_safetensors(unfinished / path.name, changed, {"format": "pt"})
            weight_map |= dict.fromkeys(changed, path.name)
        if not (folder / "model.safetensors").exists():
            write_json(unfinished / "model.safetensors.index.json",
                       {"metadata": {}, "weight_map": weight_map})
        for file in folder.iterdir():
            settings = file.name in ("generation_config.json", "chat_template.jinja")
            if file.is_file() and (settings or "token" in file.name):
                shutil.copy(file, unfinished)
        tied = {"tie_word_embeddings": model.config.tie_word_embeddings}     # as it is, not as told
        write_json(unfinished / "config.json",
                   read_json(folder / "config.json") | tied | config_changes)
