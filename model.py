"""Llama, from the bytes on disk to the logits.

A decoder-only transformer reads a row of token ids and gives, at each position, a score (logit) for every
token that may come next. Each of its blocks adds two corrections to a running vector, the residual stream:

    tokens ─► embed_tokens ─► x ─┬────────────────────► + ─┬───────────────► + ─► ... ─► norm ─► lm_head ─► logits
                                 └► norm ─► attention ─┘   └► norm ─► MLP ─┘

    attention:  q, k, v = q_proj(x), k_proj(x), v_proj(x)     rotate q and k by position (RoPE)
                o_proj( softmax(q kᵀ / √head_dim) v )         each position looks back at those before it
    MLP:        down_proj( silu(gate_proj(x)) * up_proj(x) )  SwiGLU

Seven matrices a block; they hold nearly all the weights, and when one token is decoded at a time every one of
them is read from memory to be used once. That is the cost that activation sparsity attacks in the other files.

The keys and values of earlier positions do not change, so decoding keeps them in a `KVCache` and computes
only the new position. Module names are the checkpoint's tensor names (`model.layers.0.self_attn.q_proj.weight`),
so loading renames nothing.

Sources: Llama 2 (arXiv 2307.09288); RoPE (arXiv 2104.09864); grouped-query attention (arXiv 2305.13245);
SwiGLU (arXiv 2002.05202); RMSNorm (arXiv 1910.07467); the safetensors format (its README on GitHub).

    python model.py [FOLDER]        the shape of a checkpoint: parameters and bytes by part
"""
import argparse
import contextlib
import json
import math
import mmap
import os
import shutil
import struct
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# Weights of gigabytes in pages of 4 KB cost a page walk every other microsecond: torch asks Linux for pages of 2 MB if
# it finds this set when it first allocates. Decoding on a CPU reads memory 15 % faster.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

DEMO = Path(os.path.relpath(Path(__file__).parent / "demo"))    # as seen from where a command is run


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: what was found, what was expected."""


def progress_line(text):
    """Shows `text` in place of the last such line, where somebody watches; results go to standard output alone."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\r", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, as all others here are."""

    def error(self, message):
        raise InputError(message)


def command_line(main):
    """Runs a file's `main()`; input it cannot use ends it with one line and exit status 2, not a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")      # a terminal that lacks a character shows its number
    try:
        main()
    except BrokenPipeError:                                # the reader of our output has closed it (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------
# Safetensors: 8 bytes that give the header's length, the header as JSON, then the tensors' raw bytes.
#
#     {"__metadata__": {text: text}, name: {"dtype": "BF16", "shape": [4096, 4096], "data_offsets": [begin, end]}}

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
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

    Nothing is read before it is used, and what was read can be dropped by the system again, so a file larger
    than memory can be opened. Each tensor is a mapping of its own, whose pages are given back when it is forgotten.
    Writing to a tensor changes a private copy, never the file.
    """
    entries, _, data_start = read_header(path)
    tensors = {}
    # Private, and on Linux without memory set aside for changes that nobody will make.
    flags = mmap.MAP_PRIVATE | (0x4000 if sys.platform == "linux" else 0)
    with open(path, "rb") as file:
        for name, (dtype, shape, begin, end) in entries.items():
            if begin == end:
                tensors[name] = torch.empty(shape, dtype=dtype)
                continue
            start = (data_start + begin) % mmap.ALLOCATIONGRANULARITY          # mappings begin at whole pages
            mapped = mmap.mmap(file.fileno(), start + end - begin, flags, mmap.PROT_READ | mmap.PROT_WRITE,
                               offset=data_start + begin - start)
            flat = torch.frombuffer(mapped, dtype=torch.uint8, count=end - begin, offset=start)
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
# The model. Shapes: B sequences of T new tokens, S positions in all, H query heads, G key-value heads, D head_dim.

class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, over the last dimension, in float32 (float64 for a float64 input)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rope_tables(positions, config, dtype):
    """cos and sin, each (T, D), by which q and k at `positions` (T,) are rotated (RoPE, section 3.4.2).

    Pair i of a head, made of its channels i and i + D/2, turns by the angle position * theta^(-2i/D). Scaling is how a model
    was made to see further than it was trained for: "linear" turns all pairs slower by a factor; "llama3" those alone
    that turn less than low_freq_factor times over the original context, those of more than high_freq_factor as before, and
    what lies between by a mean of both (Llama 3.1's reference implementation).
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).to(wide) / config.head_dim
    frequencies, scaling = config.rope_theta ** -exponents, config.rope_scaling             # (D/2,)
    if scaling:
        kept = 0.0                                         # the share of each frequency that stays
        if scaling["rope_type"] == "llama3":
            turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling["factor"])
    angles = torch.outer(positions.to(wide), frequencies)                                   # (T, D/2)
    angles = torch.cat((angles, angles), dim=-1)                                            # (T, D)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """x (B, heads, T, D) turned by the angles of `rope_tables`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def in_window(keys, queries, window):
    """Which of the positions `keys` (S,) lie in the sliding window of those in `queries` (T,): (T, S) bool; window None: all."""
    return keys > queries[:, None] - (window or 2**62)


def causal_mask(positions, past, window):
    """What tokens at `positions` (T,), the first of which is `past`, see of all up to the last of them: (T, past + T) bool.

    None where attention needs no mask: nothing lies before the tokens, or there is one token, and no window cuts anything off.
    """
    length = past + len(positions)
    if not (past and len(positions) > 1 or window and length > window):
        return None
    keys = torch.arange(length, device=positions.device)
    return (keys <= positions[:, None]) & in_window(keys, positions, window)


class KVCache:
    """The keys and values of the positions seen so far, allocated once for `length` positions.

    `model(tokens, cache)` appends at `cache.used` and moves it on; setting `used` back forgets what came after.
    """

    def __init__(self, layers, batch, heads, length, head_dim, device, dtype):
        shape = (layers, batch, heads, length, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = length
        self.used = 0

    def append(self, layer, k, v, slots):
        """Stores k and v (B, G, T, D) and returns the layer's keys and values to look at, (B, G, S, D).

        slots None: behind the used positions, and S ends there. Else in the slots (T,) int64, and S is the
        whole length, so that nothing depends on how far the cache is filled, as a CUDA graph needs it.
        """
        if slots is None:
            end = self.used + k.shape[2]
            self.keys[layer, :, :, self.used:end] = k
            self.values[layer, :, :, self.used:end] = v
            return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        self.keys[layer].index_copy_(2, slots, k)
        self.values[layer].index_copy_(2, slots, v)
        return self.keys[layer], self.values[layer]

    def keep(self, start, kept):
        """Of the tokens in slots `start` and after, keeps those at start + kept (a rising list), moved together."""
        if kept != list(range(len(kept))):
            slots = start + torch.tensor(kept, device=self.keys.device)
            for states in (self.keys, self.values):
                states[:, :, :, start:start + len(kept)] = states[:, :, :, slots]
        self.used = start + len(kept)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G key and value heads, H / G each."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)

    def qkv(self, x):
        """The three projections that read x (B, T, hidden): (B, T, H·D), (B, T, G·D), (B, T, G·D)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x, cos, sin, mask, cache, slots):
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in self.qkv(x))    # (B, H or G, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v, slots)                                    # (B, G, S, D)
        H, G = q.shape[1], k.shape[1]
        if mask is None and T > 1:                         # nothing lies before these tokens: plainly causal
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)  # (B, H, T, D)
        else:
            # The H / G heads that share keys stand as more queries of one head, so that no key is copied.
            mask = None if mask is None else mask.repeat(H // G, 1)                         # (H/G * T, S)
            y = F.scaled_dot_product_attention(q.reshape(B, G, -1, self.head_dim), k, v, attn_mask=mask)
        return self.o_proj(y.view(B, H, T, -1).transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def gated(self, x):
        """silu(gate) * up, the two projections that read x (B, T, hidden): (B, T, intermediate)."""
        return F.silu(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x):
        return self.down_proj(self.gated(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, cache, slots):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, slots)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """What a checkpoint calls `model`: all but the head."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A Llama of any size. `Llama(config)` has fresh weights to train; `from_pretrained` loads a checkpoint."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens, cache=None, positions=None, mask=None, slots=None, last_only=False):
        """tokens (B, T) int64 -> logits (B, T, vocab), float32 (float64 for a float64 model).

        With a cache the tokens stand at positions cache.used and after, see all that the cache holds and each
        those up to itself, and are appended. last_only: logits of the last position alone, (B, 1, vocab).

        What stands in a row need not follow one another (a tree of drafts does not): positions (T,) int64
        says where each token stands, mask (T, S) bool which of the S positions to look at it sees. With
        slots (T,) int64 the tokens go to these places of the cache, S is its whole length, and cache.used stays.
        """
        B, T = tokens.shape
        past = 0 if cache is None else cache.used
        if cache is not None and slots is None and past + T > cache.length:
            raise InputError(f"{T} tokens do not fit a cache of {cache.length} positions, {past} of them used")
        if tokens.device.type == "cpu":                    # elsewhere a look at the values would wait for the device
            check_tokens(tokens, self.config)
        x = self.model.embed_tokens(tokens)                                                 # (B, T, hidden)
        if positions is None:
            positions = torch.arange(past, past + T, device=tokens.device)
            mask = causal_mask(positions, past, self.config.sliding_window)
        cos, sin = rope_tables(positions, self.config, x.dtype)
        for block in self.model.layers:
            x = block(x, cos, sin, mask, cache, slots)
        if cache is not None and slots is None:
            cache.used += T
        if last_only:
            x = x[:, -1:]
        logits = self.lm_head(self.model.norm(x))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def make_cache(self, batch, length):
        """An empty KVCache for `batch` sequences of up to `length` positions, in the model's dtype and on its device."""
        weight, layers, head_dim = self.model.embed_tokens.weight, self.model.layers, self.config.head_dim
        heads = layers[0].self_attn.k_proj.out_features // head_dim                         # those that are here: see parallel.py
        return KVCache(len(layers), batch, heads, length, head_dim, weight.device, weight.dtype)

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    @staticmethod
    def from_pretrained(folder, device="cpu", dtype=None):
        """The Llama in a checkpoint folder of the hub's form, in eval mode and without gradients.

        folder: config.json with model.safetensors, or model.safetensors.index.json and the shards it names.
        dtype: a floating-point torch.dtype, or None for the checkpoint's own. Each tensor is copied once, from
        the mapped file to its place. Raises InputError for a folder that does not hold such a model.
        """
        config = Config.read(folder)
        with torch.device("meta"):                         # shapes without memory
            model = Llama(config)
            if config.quantization_config:
                from quantize import shape_linears         # needed only where weights are quantized
                shape_linears(model, Path(folder) / "config.json")
        if dtype is None:
            dtype = checkpoint_dtype(folder)
        for _, tensors in checked_shards(folder, model):
            for name in list(tensors):                     # each is forgotten before the next is read
                put(model, name, tensors.pop(name), device, dtype)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.eval()

    @staticmethod
    def random(preset, device="cpu", dtype=torch.bfloat16, seed=0):
        """A Llama of a preset's real shapes with random weights: for speed work only, it writes nonsense."""
        with torch.device("meta"):
            model = Llama(preset_config(preset)).to(dtype)
        model.to_empty(device=device)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.fill_random(seed)

    def fill_random(self, seed):
        """Random weights for all linears, those that keep the size of what goes through them; returns the model."""
        # Drawing 7 billion normal numbers would take minutes: one pool of four million fills every weight, again and again.
        weight = self.model.embed_tokens.weight
        pool = torch.randn((1 << 22) + 7, generator=torch.Generator().manual_seed(seed)).to(weight.device, weight.dtype)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(False)
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            scaled = pool * parameter.shape[-1] ** -0.5    # keeps the outputs of a linear as large as its inputs
            flat = parameter.data.view(-1)
            for start in range(0, flat.numel(), scaled.numel()):
                part = flat[start:start + scaled.numel()]
                part.copy_(scaled[:part.numel()])
        return self.eval()

    def save_pretrained(self, folder):
        """Writes config.json and model.safetensors to `folder`, in the model's dtype; sparse linears as the dense they were."""
        if self.config.quantization_config:
            raise InputError(f"{folder}: the model is quantized; quantize.py writes such folders")
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {name.removesuffix("_t"): parameter.t() if name.endswith(".weight_t") else parameter
                   for name, parameter in self.named_parameters()}
        write_safetensors(Path(folder) / "model.safetensors", tensors, {"format": "pt"})
        self.config.write(folder, self.model.embed_tokens.weight.dtype)


def put(model, name, tensor, device, dtype):
    """Puts a checkpoint's tensor into a model: a parameter as a copy in `dtype`, codes and their scales as they lie in the file."""
    parent, leaf = name.rsplit(".", 1)
    module = model.get_submodule(parent)
    if isinstance(getattr(module, leaf), nn.Parameter):
        copy = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
        setattr(module, leaf, nn.Parameter(copy, requires_grad=False))
    else:
        setattr(module, leaf, tensor.to(device))


def check_tokens(tokens, config):
    """Raises InputError if one of `tokens` (any shape, int64) is not a token of the model."""
    if tokens.numel() and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
        worst = int(tokens.max() if tokens.min() >= 0 else tokens.min())
        raise InputError(f"token id {worst} is outside the vocabulary of {config.vocab_size}")


def _preset(hidden, intermediate, layers, heads, kv_heads, vocab, context, theta, tied=False):
    return Config(hidden, intermediate, layers, heads, kv_heads, hidden // heads, vocab, context, theta, 1e-5, tied)


PRESETS = {  # without rope scaling, which costs no time
    "llama-2-7b": _preset(4096, 11008, 32, 32, 32, 32000, 4096, 1e4),
    "llama-2-13b": _preset(5120, 13824, 40, 40, 40, 32000, 4096, 1e4),
    "llama-2-70b": _preset(8192, 28672, 80, 64, 8, 32000, 4096, 1e4),
    "llama-3-8b": _preset(4096, 14336, 32, 32, 8, 128256, 8192, 5e5),
    "llama-3-70b": _preset(8192, 28672, 80, 64, 8, 128256, 8192, 5e5),
    "llama-3.2-1b": _preset(2048, 8192, 16, 32, 8, 128256, 8192, 5e5, tied=True),
    "llama-3.2-3b": _preset(3072, 8192, 28, 24, 8, 128256, 8192, 5e5, tied=True),
    "mistral-7b": _preset(4096, 14336, 32, 32, 8, 32000, 8192, 1e4),
}


def preset_config(name):
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is not known; known are {', '.join(PRESETS)}")
    return replace(PRESETS[name])


# ---------------------------------------------------------------------------------------------------------
# The folder: shards and tokenizer

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


def rewrite_checkpoint(folder, out, change, config_changes):
    """Writes the checkpoint in `folder` anew to the new folder `out`, shard by shard, with its tokenizer and settings.

    change(path, tensors {name: tensor}) -> the tensors {name: tensor} that take the place of a shard's; every tensor is
    checked first. config_changes: what is set in config.json.
    """
    folder, weight_map = Path(folder), {}
    with torch.device("meta"):
        model = Llama(Config.read(folder))
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


def load_tokenizer(folder):
    """The tokenizer of a checkpoint folder: .encode(text, bos=True) -> list[int], .decode(ids) -> str, .eos_ids; see tokenizer.py."""
    from tokenizer import open_tokenizer                   # needed only where there is text
    return open_tokenizer(folder)


def find_device(name):
    """The torch.device of a name, or an InputError if it cannot be used here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name} cannot be used: supported are cpu and cuda")
    return device


def natural(text):
    """A whole number above 0, for the command line."""
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def load_model(name, device="cpu", dtype=None, quantize=None, maker=Llama):
    """(model, tokenizer) as every command takes them with --model: a checkpoint folder, or "random:PRESET".

    dtype: None, a torch.dtype, or the name of one. quantize: None, "int8" or "int4", to round the blocks' linears now.
    maker: what has `from_pretrained` and `random`: Llama, or parallel for a part of one. A random model has no tokenizer: None.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    device = find_device(device)
    if str(name).startswith("random:"):
        return quantized_now(maker.random(str(name).removeprefix("random:"), device, dtype or torch.bfloat16), name, quantize), None
    if not Path(name).is_dir():
        raise InputError(f"{name}: no such folder")
    tokenizer = load_tokenizer(name)
    model = maker.from_pretrained(name, device, dtype)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}")
    return quantized_now(model, name, quantize), tokenizer


def quantized_now(model, name, quantize):
    """The model with its blocks' linears rounded to `quantize` ("int8", "int4"), or as it is (None)."""
    if quantize is None:
        return model
    if model.config.quantization_config:
        raise InputError(f"{name}: is quantized already, --quantize is for weights in floating point")
    import quantize as quantizing
    clipping = (1.0,) if str(name).startswith("random:") else quantizing.CLIPPING           # random weights lose nothing
    return quantizing.quantize(model, int(quantize.removeprefix("int")), clipping=clipping, progress=progress_line)


# ---------------------------------------------------------------------------------------------------------

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


def main():
    parser = Parser(description="Prints the shape of a checkpoint: parameters and bytes by part.")
    parser.add_argument("folder", nargs="?", default=str(DEMO), metavar="FOLDER",
                        help="checkpoint folder, or random:PRESET (default: the demo model)")
    folder = parser.parse_args().folder
    if folder.startswith("random:"):
        config, dtype = preset_config(folder.removeprefix("random:")), torch.bfloat16
    else:
        config, dtype = Config.read(folder), checkpoint_dtype(folder)
        stored = dict.fromkeys(("embedding", "attention", "MLP", "norms", "head"), 0)       # bytes
        for path in shard_paths(folder):
            for name, (_, _, begin, end) in read_header(path)[0].items():
                part = next(part for part, sign in (("embedding", "embed_tokens"), ("attention", "self_attn"), ("MLP", ".mlp."),
                                                    ("head", "lm_head"), ("norms", "")) if sign in name)
                stored[part] += end - begin
    sizes = {name: rows * columns * config.num_hidden_layers for name, (rows, columns) in block_linears(config).items()}
    embedding = config.vocab_size * config.hidden_size
    parts = {
        "embedding": embedding,
        "attention": sum(size for name, size in sizes.items() if name.startswith("self_attn")),
        "MLP": sum(size for name, size in sizes.items() if name.startswith("mlp")),
        "norms": (2 * config.num_hidden_layers + 1) * config.hidden_size,
        "head": 0 if config.tie_word_embeddings else embedding,
    }
    total = sum(parts.values())
    if folder.startswith("random:"):
        stored = {name: size * dtype.itemsize for name, size in parts.items()}
    print(f"{folder}: {config.num_hidden_layers} blocks, hidden {config.hidden_size}, intermediate "
          f"{config.intermediate_size}, {config.num_attention_heads} heads on {config.num_key_value_heads} "
          f"key-value heads of {config.head_dim}, {str(dtype).removeprefix('torch.')}")
    print(f"{'part':>10} {'parameters':>15} {'MB':>10} {'share':>7}")
    stored["all"] = sum(stored.values())
    for name, size in (parts | {"all": total}).items():
        note = "   (the embedding once more)" if name == "head" and config.tie_word_embeddings else ""
        print(f"{name:>10} {size:15,} {stored[name] / 1e6:10,.1f} {stored[name] / stored['all']:7.1%}{note}")
    # One row of the embedding is read a token; the head is read whole, and stays dense.
    skippable = stored["attention"] + stored["MLP"]
    read = skippable + stored["norms"] + (stored["head"] or stored["embedding"])
    print(f"read for one token: {read / 1e6:,.1f} MB; sparsity can skip from attention and MLP, {skippable / read:.1%} of it")


if __name__ == "__main__":
    command_line(main)
