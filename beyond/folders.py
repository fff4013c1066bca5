"""Whatever folder a person has: older spellings, quantized weights, tokenizers that want a repair.

model.py reads the plain folder, as transformers writes it today, and refuses the rest by name. Here
is the rest, behind one call: load_model(name) -> (model, tokenizer). config.json is respelled as
model.py has it, after a check of each number and setting. What is not implemented anywhere is
refused by name.

Chapters that write a checkpoint anew (rotate.py, quantize.py) share the second half. A model may be
larger than memory, so this goes file by file:

    FOLDER/model-00001.safetensors  ─► change ─►  OUT.random/model-00001.safetensors ┐
    FOLDER/model-00002.safetensors  ─► change ─►  OUT.random/model-00002.safetensors ├─► OUT
    tokenizer, generation settings, config.json ─►  the same, with what has changed  ┘

The folder gets its name when all of it is there. A run that fails or is stopped leaves nothing.

The seams: `Config.read`, `map_checkpoint`, `read_checkpoint`, `write_safetensors` of model.py.
"""
import contextlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path

import model as core
from beyond import codes, fused          # noqa: F401 (fused: codes on a GPU)
from model import (Config, HubTokenizer, Llama, find_device, in_memory, map_checkpoint,
                   read_checkpoint, read_json, refusing, require, write_json, write_safetensors)

import torch


def load_model(name, device="cpu", dtype=None, maker=Llama):
    """Return (model, tokenizer) of whatever minTEAL reads, as every chapter takes it with --model.

    name: a checkpoint folder, or "random:PRESET", which has no tokenizer: None. dtype: None, a
    torch.dtype, or the name of one. maker: Llama, or what has its `random` and `from_pretrained`.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    device = find_device(device)
    if str(name).startswith("random:"):
        return maker.random(name, device, dtype or torch.bfloat16), None
    gguf = str(name).endswith(".gguf")
    require(Path(name).is_dir(), f"{name}: " + (
        "python -m beyond.gguf makes a folder of a GGUF file" if gguf else "no such folder"))
    read_config(name)                    # first: an adapter, or another model, is refused as such
    tokenizer = load_tokenizer(name)
    if maker is not Llama:
        return maker.from_pretrained(name, device, dtype), tokenizer
    return in_memory(mapped(name), device, dtype), tokenizer


def mapped(folder):
    """Return the Llama of a folder, memory-mapped, its linears as they are stored."""
    model = Llama.on_meta(read_config(folder))
    if is_quantized(folder):
        codes.shape(model, read_json(Path(folder) / "config.json")["quantization_config"])
    return map_checkpoint(model, folder)


# --------------------------------------------------------------------------------------------------
# config.json

def read_config(folder):
    """Return the Config of a checkpoint folder, however it is spelled."""
    adapter = Path(folder) / "adapter_config.json"
    require(not adapter.exists(),
            f"{adapter}: an adapter; merge it into its base model first (merge_and_unload)")
    path = Path(folder) / "config.json"
    with refusing(f"{path}: not the config.json of a Llama", AttributeError, TypeError):
        return Config.read(folder, respelled(read_json(path), path))


def respelled(raw, path):
    """Return the object of a config.json as model.py spells it, every setting checked."""
    def check(holds, key, expected, source=raw):
        require(holds, f"{path}: {key} is {json.dumps(source.get(key))}, expected {expected}")

    architectures = json.dumps(raw.get("architectures") or "LlamaForCausalLM")
    check(re.search('"(Llama|Mistral)ForCausalLM"', architectures), "architectures",
          "LlamaForCausalLM or MistralForCausalLM")
    for field in fields(Config):
        value = raw.get(field.name)
        if field.type in (int, int | None) and value is not None:
            check(type(value) is int and 0 < value < 2**31, field.name,
                  "a whole number above 0, below 2^31")
    quantized = raw.get("quantization_config")
    check(not quantized or quantized.get("quant_method") == codes.METHOD, "quantization_config",
          "floating point, or what python -m beyond.quantize writes")
    # Rotary settings stand in rope_theta and rope_scaling, or all together in the newer
    # rope_parameters. If both are there, transformers takes the older one.
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    rope = {name: value for name, value in rope.items() if value is not None}
    kind = rope.pop("type", "default")
    kind = rope.setdefault("rope_type", kind)
    original = raw.get("original_max_position_embeddings")           # counts before rope's own
    if kind == "llama3":
        rope |= {} if original is None else {"original_max_position_embeddings": original}
        check(rope.get("low_freq_factor", 0) < rope.get("high_freq_factor", float("inf")),
              "low_freq_factor", "less than the high_freq_factor", rope)
    else:
        rope.pop("original_max_position_embeddings", None)
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    return raw | {"rope_scaling": None, "rope_parameters": rope, "quantization_config": None}


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
    if path.open("rb").read(1) != b"\n":                   # Llama-3's first release, by tiktoken
        require(settings, f"{path}: not SentencePiece, and neither tokenizer.json nor "
                          f"tokenizer_config.json names its special tokens")
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")    # else a file is what its path held
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
        temporary = tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent)
    with temporary as unfinished:
        yield Path(unfinished)
        os.chmod(unfinished, 0o755)      # it was made for its owner alone
        os.rename(unfinished, out)


def rewrite_checkpoint(folder, model, out, change, config_changes):
    """Write the checkpoint in `folder` anew to the new folder `out`, with its tokenizer.

    model: the Llama of that folder, memory-mapped
    change(path, tensors): returns the tensors {name: tensor} that take the place of those of a file
    config_changes: {key: value}, what is set in config.json
    """
    folder = Path(folder)
    weight_map = {}
    with new_folder(out) as unfinished:
        stored = read_checkpoint(folder)
        for path in sorted({path for path, _ in stored.values()}):
            tensors = {name: tensor for name, (file, tensor) in stored.items() if file == path}
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
