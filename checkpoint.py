"""A checkpoint on disk: a folder in the hub's form, checked in every part before anything is believed.

    config.json                             the numbers that make the model: `Config`
    model.safetensors                       its tensors, by name; or, where that would be too large a file,
    model.safetensors.index.json            which tensor lies in which shard, and
    model-00001-of-00003.safetensors ...    the shards
    tokenizer.model, tokenizer.json ...     see tokenizer.py

A safetensors file is 8 bytes that give the length of its header, the header as JSON, then the tensors' raw bytes:

    {"__metadata__": {text: text}, name: {"dtype": "BF16", "shape": [4096, 4096], "data_offsets": [begin, end]}}

So nothing is unpickled, and a tensor is a view of the mapped file: opened in no time, read when it is used. What is written
takes its name only when it is complete.

Source: the safetensors format (its README on GitHub); the meaning of config.json's keys (transformers' LlamaConfig, MistralConfig).
"""
import contextlib
import json
import math
import mmap
import os
import shutil
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cli import InputError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 1 << 28          # bytes of a file that are mapped together; a mapping costs a file descriptor
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0         # sets no memory aside for changes that nobody will make
LONGEST_HEADER = 100_000_000     # bytes, as in the reference implementation


def read_header(path):
    """The header of a safetensors file, every part of it checked, and the file offset at which the data begins.

    Returns (entries: {name: (dtype, shape, begin, end)}, metadata: {str: str}, data_start: int), the
    entries in the order of their bytes; `begin` and `end` count from `data_start`.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise InputError(f"{path}: truncated: {size} bytes, a safetensors file begins with 8 of length")
            length, = struct.unpack("<Q", prefix)
            if length > size - 8:
                raise InputError(f"{path}: truncated, or no safetensors file: its header should be {length} bytes "
                                 f"long, {size - 8} follow")
            if length > LONGEST_HEADER:
                raise InputError(f"{path}: its header is {length} bytes long, at most {LONGEST_HEADER} are expected")
            raw = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None

    def without_repeats(pairs):
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a name stands twice")
        return dict(pairs)

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: no safetensors file: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header is a JSON {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise InputError(f"{path}: __metadata__ should map text to text")

    def natural(value):                                    # bool is an int to Python, not to us
        return type(value) is int and 0 <= value < 2**63

    entries = {}
    for name, entry in header.items():
        where = f"{path}: tensor {name}"
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise InputError(f"{where}: should have dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise InputError(f"{where}: dtype {dtype!r} is not known; known are {', '.join(DTYPES)}")
        if not isinstance(shape, list) or not all(map(natural, shape)):
            raise InputError(f"{where}: shape {shape!r} is not a list of sizes")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(natural, offsets)):
            raise InputError(f"{where}: data_offsets {offsets!r} is not [begin, end]")
        begin, end = offsets
        count = math.prod(shape)
        if end - begin != count * DTYPES[dtype].itemsize:
            raise InputError(f"{where}: data_offsets {offsets} hold {end - begin} bytes, {dtype} x {shape} "
                             f"needs {count * DTYPES[dtype].itemsize}")
        if math.prod(extent or 1 for extent in shape) >= 2**63:                # an empty tensor of absurd extents
            raise InputError(f"{where}: shape {shape} is larger than any memory")
        if end > size - 8 - length:
            raise InputError(f"{where}: data_offsets {offsets} run past the {size - 8 - length} bytes of data: "
                             f"the file is truncated")
        entries[name] = (DTYPES[dtype], shape, begin, end)

    # The data must be covered without overlap and without a gap, so that a file hides nothing.
    entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    covered, previous = 0, None
    for name, (_, _, begin, end) in entries.items():
        if begin < covered:
            raise InputError(f"{path}: tensor {name}: data_offsets [{begin}, {end}] overlap those of {previous}")
        if begin > covered:
            raise InputError(f"{path}: tensor {name}: data_offsets [{begin}, {end}] leave a gap after byte {covered}")
        covered, previous = end, name
    if covered != size - 8 - length:
        raise InputError(f"{path}: {size - 8 - length - covered} bytes follow the last tensor")
    return entries, metadata, 8 + length


def read_safetensors(path):
    """All tensors of a safetensors file, as {name: tensor} views of the memory-mapped file.

    Nothing is read before it is used (but tensors that a file holds misaligned, which are copied), and what was read can be
    dropped by the system again, so a file larger than memory can be opened. The file is mapped in pieces, and the memory of
    a piece is given back when its tensors are forgotten. Writing to a tensor changes a private copy, never the file.
    """
    entries, _, data_start = read_header(path)
    tensors, piece_end = {}, 0
    with open(path, "rb") as file:
        for name, (dtype, shape, begin, end) in entries.items():                            # in the order of their bytes
            if begin == end:
                tensors[name] = torch.empty(shape, dtype=dtype)
                continue
            if end > piece_end:                            # a piece begins here, and holds all tensors that end within its reach
                piece_end = max(after for *_, after in entries.values() if after <= begin + PIECE or after == end)
                start = (data_start + begin) // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
                mapped = mmap.mmap(file.fileno(), data_start + piece_end - start, mmap.MAP_PRIVATE | MAP_NORESERVE,
                                   mmap.PROT_READ | mmap.PROT_WRITE, offset=start)
            flat = torch.frombuffer(mapped, dtype=torch.uint8, count=end - begin, offset=data_start + begin - start)
            if (data_start + begin) % dtype.itemsize:      # the format does not promise alignment
                flat = flat.clone()
            tensors[name] = flat.view(dtype).view(shape)
    return tensors


def write_safetensors(path, tensors, metadata=None):
    """Writes {name: tensor} to `path`, whole or not at all: to a temporary name first, renamed when complete.

    metadata: {str: str}, kept in the header. A tensor type the format lacks is an InputError.
    """
    path = Path(path)
    header, offset = {}, 0
    if metadata:
        header["__metadata__"] = dict(metadata)
    # The widest types first, as the reference writer has it: every tensor is then aligned to its own size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise InputError(f"{path}: tensor {name}: {tensor.dtype} cannot be written to a safetensors file")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(raw)))
        file.write(raw)
        for name in order:
            tensor = tensors[name].detach().cpu().contiguous()
            if tensor.numel():
                file.write(tensor.view(-1).view(torch.uint8).numpy())


@contextlib.contextmanager
def replacing(path):
    """`with replacing(path) as file`: a binary file that takes the place of `path` only when it is complete."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path):
    """The object in a JSON file, or an InputError that says what is wrong with it."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON {type(value).__name__}, expected an object")
    return value


# ---------------------------------------------------------------------------------------------------------
# Configuration

# Keys of config.json that other models of these names have, and with which they compute something else: what is supported.
CHANGES_THE_FUNCTION = {"num_local_experts": 1, "num_experts": 1, "use_qk_norm": False, "qk_norm": False, "final_logit_softcapping": None,
                        "attn_logit_softcapping": None, "logit_scale": 1, "residual_multiplier": 1, "embedding_multiplier": 1,
                        "attention_multiplier": None, "logits_scaling": 1, "partial_rotary_factor": 1,
                        "no_rope_layers": None, "attention_chunk_size": None, "head_bias": False}
ROPE_NUMBERS = {"default": (), "linear": ("factor",),
                "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


@dataclass
class Config:
    """The numbers that make a Llama, under the names of the hub's config.json."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    model_type: str = "llama"                        # or "mistral"
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None                # a token sees this many positions, itself included; None: all before it
    rope_scaling: dict | None = None                 # {"rope_type": "linear" or "llama3", and its numbers}
    quantization_config: dict | None = None          # what quantize.py wrote there

    @staticmethod
    def read(folder):
        """The configuration in FOLDER/config.json. What this file does not implement is refused by its name."""
        path = Path(folder) / "config.json"
        raw = read_json(path)

        def refuse(key, expected):
            raise InputError(f"{path}: {key} is {json.dumps(raw.get(key))}, supported is {expected}")

        if raw.get("model_type") not in ("llama", "mistral"):
            refuse("model_type", '"llama" or "mistral"')
        if not {"LlamaForCausalLM", "MistralForCausalLM"} & set(raw.get("architectures") or ["LlamaForCausalLM"]):
            refuse("architectures", "LlamaForCausalLM or MistralForCausalLM")
        if raw.get("hidden_act", "silu") != "silu":
            refuse("hidden_act", '"silu"')
        for key, neutral in CHANGES_THE_FUNCTION.items():
            if raw.get(key) not in (None, False, neutral):
                refuse(key, json.dumps(neutral))
        for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            if type(raw.get(key, False)) is not bool:
                refuse(key, "true or false")
        quantization = raw.get("quantization_config")
        if quantization and (not isinstance(quantization, dict) or quantization.get("quant_method") != "minteal"):
            refuse("quantization_config", "weights in floating point, or as quantize.py writes them")

        def number(key, kind=int, default=None, place=raw):
            value = place.get(key)
            value = default if value is None else value
            if type(value) not in ((int, float) if kind is float else (int,)) or not 0 < value < 2**31:
                raise InputError(f"{path}: {key} is {json.dumps(value)}, expected a number above 0 and below 2^31")
            return kind(value)

        # Rotary numbers stand in rope_theta and rope_scaling, or all together in the newer rope_parameters.
        key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
        rope, scaling = raw.get(key) or {}, None
        if not isinstance(rope, dict):
            refuse(key, "an object")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ROPE_NUMBERS:
            refuse(key, f"one of the rope types {', '.join(ROPE_NUMBERS)}")
        known = {"rope_type", "type", "rope_theta", "original_max_position_embeddings", *ROPE_NUMBERS[rope_type]}
        if rope.keys() - known and (rope.keys() - known != {"partial_rotary_factor"} or rope["partial_rotary_factor"] != 1):
            refuse(key, f"the rope type {rope_type} with {', '.join(ROPE_NUMBERS[rope_type]) or 'no numbers'}")
        if rope_type != "default":
            scaling = {"rope_type": rope_type} | {name: number(name, float, place=rope) for name in ROPE_NUMBERS[rope_type]}
            if rope_type == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
                refuse(key, "a low_freq_factor below the high_freq_factor")
        raw.setdefault("sliding_window", 4096)             # Mistral-7B-v0.1's: where the key is absent, transformers takes that
        mistral = raw["model_type"] == "mistral"           # where each key means something; the other kind ignores it
        heads = number("num_attention_heads")
        config = Config(
            hidden_size=number("hidden_size"),
            intermediate_size=number("intermediate_size"),
            num_hidden_layers=number("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=number("num_key_value_heads", default=heads),
            head_dim=number("head_dim", default=number("hidden_size") // heads),
            vocab_size=number("vocab_size"),
            max_position_embeddings=number("max_position_embeddings", default=2048),
            rope_theta=number("rope_theta", float, default=10000.0, place=raw | rope),
            rms_norm_eps=number("rms_norm_eps", float, default=1e-6),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            model_type=raw["model_type"],
            attention_bias=raw.get("attention_bias", False) and not mistral,
            mlp_bias=raw.get("mlp_bias", False) and not mistral,
            sliding_window=number("sliding_window") if mistral and raw["sliding_window"] is not None else None,
            rope_scaling=scaling,
            quantization_config=quantization or None,
        )
        if heads % config.num_key_value_heads:
            refuse("num_key_value_heads", f"a divisor of the {heads} num_attention_heads")
        if config.head_dim % 2:
            raise InputError(f"{path}: head_dim is {config.head_dim}, RoPE needs an even one")
        return config

    def write(self, folder, dtype):
        """Writes FOLDER/config.json as transformers' LlamaForCausalLM or MistralForCausalLM reads it."""
        names = {"architectures": [f"{self.model_type.capitalize()}ForCausalLM"], "hidden_act": "silu",
                 "torch_dtype": str(dtype).removeprefix("torch."), "bos_token_id": 1, "eos_token_id": 2}
        write_json(Path(folder) / "config.json", names | vars(self))


def block_linears(config):
    """The seven linears of a block: {name inside the block: (out_features, in_features)}."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    hidden, middle = config.hidden_size, config.intermediate_size
    return {"self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (middle, hidden), "mlp.up_proj": (middle, hidden), "mlp.down_proj": (hidden, middle)}


def linear_names(config):
    """The full names of all linears of all blocks, those that sparsity is for."""
    return [f"model.layers.{layer}.{name}" for layer in range(config.num_hidden_layers) for name in block_linears(config)]


# ---------------------------------------------------------------------------------------------------------
# The folder

def shard_paths(folder):
    """The safetensors files of a checkpoint folder, each checked to exist."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise InputError(f"{folder}: no checkpoint: neither model.safetensors nor model.safetensors.index.json is there")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{index}: weight_map should map tensor names to files")
    shards = [folder / shard for shard in sorted(set(weight_map.values()))]
    for shard in shards:
        if not shard.exists():
            raise InputError(f"{shard}: missing, but named by {index.name}")
    return shards


def read_shards(folder):
    """Yields (path, {name: tensor}) for each safetensors file of a checkpoint folder."""
    for path in shard_paths(folder):
        yield path, read_safetensors(path)


def checked_shards(folder, model):
    """`read_shards`, each tensor checked to be one of a Llama on the meta device, once, and at the end that none is missing.

    What config.json defines anyway is left out: a tied head, and frequencies that older checkpoints store. The dictionaries
    are the caller's: what is taken out of them is held by nobody else.
    """
    wanted = dict(model.named_parameters()) | dict(model.named_buffers())    # a tied head is listed once, as the embedding
    names = set(wanted)
    for path, tensors in read_shards(folder):
        for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")
                     or name == "lm_head.weight" and model.config.tie_word_embeddings]:
            del tensors[name]
        for name, tensor in tensors.items():
            place = wanted.pop(name, None)
            if place is None and name in names:
                raise InputError(f"{path}: tensor {name}: a second one, another file holds it too")
            if place is None:
                raise InputError(f"{path}: tensor {name}: not part of a Llama with the shape in config.json")
            if tensor.shape != place.shape:
                raise InputError(f"{path}: tensor {name}: shape {list(tensor.shape)}, config.json makes it {list(place.shape)}")
            if not isinstance(place, nn.Parameter) and tensor.dtype != place.dtype:
                raise InputError(f"{path}: tensor {name}: {tensor.dtype}, expected {place.dtype}")
            if not tensor.is_floating_point() and isinstance(place, nn.Parameter):
                raise InputError(f"{path}: tensor {name}: {tensor.dtype}, expected floating point")
            del tensor                                     # a reader's memory is that of one tensor
        yield path, tensors
    if wanted:
        raise InputError(f"{folder}: tensor {min(wanted)} is missing from the checkpoint"
                         + (f", and {len(wanted) - 1} more" if len(wanted) > 1 else ""))


@contextlib.contextmanager
def new_folder(out):
    """`with new_folder(out) as unfinished`: a folder to fill, which becomes `out`, new, when all of it is there, and else is removed."""
    out = Path(out)
    if out.exists():
        raise InputError(f"{out}: exists already; this is written to a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from None
    try:
        yield unfinished
        unfinished.chmod(0o755)                            # mkdtemp's own is for its maker alone
        os.rename(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def checkpoint_dtype(folder):
    """The dtype that most of a checkpoint's values have."""
    counts = {}
    for path in shard_paths(folder):
        for name, (dtype, _, begin, end) in read_header(path)[0].items():
            if dtype.is_floating_point and not name.endswith(".scales"):
                counts[dtype] = counts.get(dtype, 0) + end - begin
    if not counts:
        raise InputError(f"{folder}: no tensor of the checkpoint is floating point")
    return max(counts, key=counts.get)


def rewrite_checkpoint(folder, model, out, change, config_changes):
    """Writes the checkpoint in `folder` anew to the new folder `out`, shard by shard, with its tokenizer and settings.

    model: a Llama on the meta device, which every tensor is checked against first. change(path, tensors {name: tensor}) ->
    the tensors {name: tensor} that take the place of a shard's. config_changes: what is set in config.json.
    """
    folder, weight_map = Path(folder), {}
    with new_folder(out) as unfinished:
        for path, tensors in checked_shards(folder, model):
            written = change(path, tensors)
            write_safetensors(unfinished / path.name, written, {"format": "pt"})
            weight_map |= dict.fromkeys(written, path.name)
        if not (folder / "model.safetensors").exists():
            write_json(unfinished / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        for file in folder.iterdir():
            if file.is_file() and ("token" in file.name or file.name in ("generation_config.json", "chat_template.jinja")):
                shutil.copy(file, unfinished)
        write_json(unfinished / "config.json", read_json(folder / "config.json") | config_changes)
