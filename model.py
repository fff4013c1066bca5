"""Llama, from token ids to logits, and the folder on disk that it is read from.

A decoder-only transformer reads a row of token ids and gives, at each position, a score (logit) for
every token that may come next. Each of its blocks adds two corrections to a running vector, the
residual stream:

    tokens ─► embed_tokens ─► x ─┬───────────────────► + ─┬──────────────► + ─► ... ─► norm ─► head
                                 └► norm ► attention ─┘   └► norm ► MLP ─┘                      │
                                                                                                ▼
    attention:  q, k, v = q_proj(x), k_proj(x), v_proj(x)      rotate q and k (RoPE)         logits
                o_proj( softmax(q kᵀ / √head_dim) v )          each position looks back
    MLP:        down_proj( act(gate_proj(x)) * up_proj(x) )    SwiGLU, where act is SiLU

A block has seven matrices, and they hold nearly all the weights. When one token is decoded at a
time, each of them is read from memory to be used once. That cost is what sparsity attacks.

The keys and values of earlier positions do not change, so decoding keeps them in a `KVCache` and
computes only the new position. Modules carry the names of the checkpoint's tensors
(`model.layers.0.self_attn.q_proj.weight`), so loading renames nothing.

The file has four parts: the model; its folder (config.json, safetensors); text (the tokenizer); and
what the commands of all files share.

Sources: Llama 2 (arXiv 2307.09288); RoPE (arXiv 2104.09864); grouped-query attention (arXiv
2305.13245); SwiGLU (arXiv 2002.05202); RMSNorm (arXiv 1910.07467); the safetensors format (its
README on GitHub); the meaning of config.json's keys (transformers' LlamaConfig, MistralConfig).

    python model.py [FOLDER]        the shape of a checkpoint: parameters and bytes by part
"""
import argparse
import contextlib
import json
import math
import mmap
import os
import struct
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# With pages of 4 KB a processor that streams weights spends time looking up addresses. torch asks
# Linux for pages of 2 MB if this is set before it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

DEMO = Path(os.path.relpath(Path(__file__).parent / "demo"))     # as seen from where a command runs


class InputError(ValueError):
    """What the user gave cannot be used; one line says what was found and what was expected."""


def require(condition, message):
    """Raise InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


# --------------------------------------------------------------------------------------------------
# The model. Shapes: B sequences of T new tokens, S positions in all, H query heads, G key-value
# heads, D channels a head.

ACTIVATIONS = {"silu": F.silu}           # by config.json's hidden_act


class Context(NamedTuple):
    """What every block is given besides its input; `Llama.context` makes it."""
    cos: torch.Tensor                    # (T, D)
    sin: torch.Tensor                    # (T, D)
    mask: torch.Tensor | None            # (T, S): what each token sees, as for `attend`
    cache: "KVCache | None"


def rope_tables(positions, config, dtype):
    """Return cos and ± sin, each (T, D), by which q and k at `positions` (T,) are rotated.

    Pair i of a head, its channels i and i + D/2, turns by the angle position * theta^(-2i/D) (RoPE,
    section 3.4.2). Scaling lets a model see further than it was trained for. "linear" turns all
    pairs slower by a factor. "llama3" does so only to pairs that turn less than low_freq_factor
    times within the original context, leaves those above high_freq_factor turns alone, and blends
    in between (Llama 3.1's reference implementation).
    """
    wide = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=wide)
    frequencies = config.rope_theta ** -(pairs / config.head_dim)                     # (D/2,)
    scaling = config.rope_scaling
    if scaling:
        unscaled = 0.0                   # the share of each frequency that stays as it is
        if scaling["rope_type"] == "llama3":
            turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            unscaled = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (unscaled + (1 - unscaled) / scaling["factor"])
    angles = torch.outer(positions.to(wide), frequencies)                             # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x, cos, sin):
    """Return x (B, heads, T, D) turned: times cos, plus the other half of each pair times ± sin."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def visible(past, T, window, device):
    """Return the positions (T,) of T tokens after `past` others, and what they see, (T, past + T).

    A token sees those before it and itself; with a sliding window only the last `window` of these.
    The mask is None where it would hide nothing that plain causal attention shows.
    """
    positions = torch.arange(past, past + T, device=device)
    if (T == 1 or past == 0) and not (window and past + T > window):
        return positions, None
    keys = torch.arange(past + T, device=device)
    return positions, (keys <= positions[:, None]) & (keys > positions[:, None] - (window or 2**62))


def attend(q, k, v, mask):
    """Return softmax(q kᵀ / √D) v.

    q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D). mask (T, S): bool, or numbers that are
    added to q kᵀ / √D, 0 or -inf; None: each token sees all before it.
    """
    B, H, T, D = q.shape
    G = k.shape[1]
    if mask is None and T > 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
    # The H / G heads that share keys stand as more queries of one head, so that no key is copied.
    mask = None if mask is None else mask.expand(H // G, -1, -1).flatten(0, 1)        # (H/G * T, S)
    y = F.scaled_dot_product_attention(q.reshape(B, G, -1, D), k, v, attn_mask=mask)
    return y.reshape(B, H, T, D)


class KVCache:
    """The keys and values of the positions seen so far, allocated once for `length` positions.

    `model(tokens, cache)` appends at `cache.used`. Setting `used` back forgets what came after. A
    cache that sees or stores in another way (a tree of drafts, a CUDA graph) is a subclass.
    """

    def __init__(self, layers, batch, heads, length, head_dim, device, dtype):
        room = -(-length // 8) * 8       # attention on a GPU wants masks of so many columns
        shape = (layers, batch, heads, room, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = length
        self.used = 0

    def look(self, T, window):
        """Return the positions (T,) of T new tokens and what they see, as `visible` does."""
        require(self.used + T <= self.length, f"{T} tokens do not fit a cache of {self.length} "
                                              f"positions, {self.used} of them used")
        return visible(self.used, T, window, self.keys.device)

    def append(self, layer, k, v):
        """Store k and v (B, G, T, D); return all of the layer's keys and values, (B, G, S, D)."""
        end = self.used + k.shape[2]
        self.keys[layer, :, :, self.used:end] = k
        self.values[layer, :, :, self.used:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, T):
        """Count T tokens as stored, in all layers."""
        self.used += T


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G key and value heads, H / G each."""

    def __init__(self, config, layer):
        super().__init__()
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.layer = layer
        self.head_dim = config.head_dim
        self.attend = attend
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)

    def qkv(self, x):
        """Return the three projections that read x (B, T, hidden), each (B, T, heads * D)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x, context):
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in self.qkv(x))
        q = rotate(q, context.cos, context.sin)                                       # (B, H, T, D)
        k = rotate(k, context.cos, context.sin)                                       # (B, G, T, D)
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)                             # (B, G, S, D)
        y = self.attend(q, k, v, context.mask)                                        # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU, if the activation is SiLU: down_proj(act(gate_proj(x)) * up_proj(x))."""

    def __init__(self, config):
        super().__init__()
        hidden, middle = config.hidden_size, config.intermediate_size
        self.activation = ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(hidden, middle, bias=config.mlp_bias)
        self.up_proj = nn.Linear(hidden, middle, bias=config.mlp_bias)
        self.down_proj = nn.Linear(middle, hidden, bias=config.mlp_bias)

    def gated(self, x):
        """Return act(gate) * up (B, T, middle), two projections of x (B, T, hidden)."""
        return self.activation(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x):
        return self.down_proj(self.gated(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        # RMSNorm: x / sqrt(mean(x²) + eps) * weight, computed in at least float32
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, context):
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """What a checkpoint calls `model`: everything but the head."""

    def __init__(self, config):
        super().__init__()
        # What nn.Embedding itself would do first, on the meta device, imports 400 modules.
        weight = torch.randn(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A Llama of any size: `Llama(config)` has fresh weights, `from_pretrained` loads them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens, cache=None, last_only=False):
        """Return the logits (B, T, vocab) of tokens (B, T) int64, in at least float32.

        With a cache the tokens follow those that it holds, and are appended to it. last_only:
        return the logits of the last position alone, (B, 1, vocab). Raises InputError for tokens
        that do not fit the cache, or (on a CPU, where looking costs nothing) the vocabulary.
        """
        context = self.context(tokens, cache)
        x = self.embed(tokens)                                                  # (B, T, hidden)
        for block in self.model.layers:
            x = block(x, context)
        if cache is not None:
            cache.advance(tokens.shape[1])
        if last_only:
            x = x[:, -1:]
        logits = self.lm_head(self.model.norm(x))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def context(self, tokens, cache=None):
        """Return the Context of tokens (B, T) that follow what the cache holds."""
        T, window = tokens.shape[1], self.config.sliding_window
        if cache is None:
            positions, mask = visible(0, T, window, tokens.device)
        else:
            positions, mask = cache.look(T, window)
        cos, sin = rope_tables(positions, self.config, self.dtype)
        return Context(cos, sin, mask, cache)

    def embed(self, tokens):
        """Return the embeddings (B, T, hidden) of tokens (B, T)."""
        try:
            # Quantized ones come as float32.
            return self.model.embed_tokens(tokens).to(self.dtype)
        except IndexError:
            check_tokens(tokens, self.config)
            raise

    def make_cache(self, batch, length):
        """Return an empty KVCache for `batch` sequences of up to `length` positions."""
        layers = self.model.layers
        heads = layers[0].self_attn.k_proj.out_features // self.config.head_dim
        return KVCache(len(layers), batch, heads, length, self.config.head_dim, self.device,
                       self.dtype)

    @property
    def device(self):
        return self.model.norm.weight.device

    @property
    def dtype(self):
        return self.model.norm.weight.dtype

    @staticmethod
    def shapes(config):
        """Return a Llama on the meta device, which has shapes but no memory."""
        with torch.device("meta"):
            return Llama(config)

    @staticmethod
    def from_pretrained(folder, device="cpu", dtype=None):
        """Return the Llama in a checkpoint folder, in eval mode and without gradients.

        folder: config.json with model.safetensors, or with model.safetensors.index.json and the
        shards that it names. dtype: a floating-point torch.dtype, or None for the checkpoint's own.
        Each tensor is copied once, from the mapped file to its place. Raises InputError for a
        folder that does not hold such a model.
        """
        config = Config.read(folder)
        model = Llama.shapes(config)
        if config.quantization_config:
            QUANTIZED[config.quantization_config["quant_method"]](model, folder)
        if dtype is None:
            dtype = checkpoint_dtype(folder)
        for _, tensors in checked_shards(folder, model):
            for name in list(tensors):   # each is forgotten before the next is read
                put(model, name, tensors.pop(name), device, dtype)
        if config.tie_word_embeddings and isinstance(model.lm_head, nn.Linear):
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.eval()

    @staticmethod
    def random(preset, device="cpu", dtype=torch.bfloat16, seed=0):
        """Return a Llama of a preset's real shapes with random weights: for speed alone."""
        model = Llama.shapes(preset_config(preset)).to(dtype).to_empty(device=device)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.fill_random(seed)

    def fill_random(self, seed):
        """Fill all linears with random weights that keep the size of what goes through them."""
        # Drawing 7 billion normal numbers takes minutes: a pool of four million fills every weight.
        generator = torch.Generator().manual_seed(seed)
        pool = torch.randn((1 << 22) + 7, generator=generator).to(self.device, self.dtype)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(False)
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            scaled = pool * parameter.shape[-1] ** -0.5
            for part in parameter.data.view(-1).split(len(scaled)):
                part.copy_(scaled[:len(part)])
        return self.eval()

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors to `folder`, a sparse linear as a dense one."""
        require(not self.config.quantization_config,
                f"{folder}: the model is quantized; beyond/quantize.py writes such folders")
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, parameter in self.named_parameters():
            if name.endswith(".weight_t"):
                tensors[name.removesuffix("_t")] = parameter.t()
            else:
                tensors[name] = parameter
        write_safetensors(Path(folder) / "model.safetensors", tensors, {"format": "pt"})
        self.config.write(folder, self.dtype)


def put(model, name, tensor, device, dtype):
    """Put a checkpoint's tensor in its place, a parameter copied in `dtype`, a buffer as it is."""
    parent, leaf = name.rsplit(".", 1)
    module = model.get_submodule(parent)
    if isinstance(getattr(module, leaf), nn.Parameter):
        copy = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
        setattr(module, leaf, nn.Parameter(copy, requires_grad=False))
    else:
        setattr(module, leaf, tensor.to(device))


def check_tokens(tokens, config):
    """Raise InputError if one of `tokens` (any shape, int64) is not in the model's vocabulary."""
    wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if len(wrong):
        raise InputError(f"token id {wrong[0]} is outside the vocabulary of {config.vocab_size}")


# --------------------------------------------------------------------------------------------------
# The folder: config.json, the numbers that make the model

# Keys that change the function of a Llama, with the only value that is supported here.
CHANGES_THE_FUNCTION = {
    "num_local_experts": 1, "num_experts": 1, "use_qk_norm": False, "qk_norm": False,
    "final_logit_softcapping": None, "attn_logit_softcapping": None, "logit_scale": 1,
    "residual_multiplier": 1, "embedding_multiplier": 1, "attention_multiplier": None,
    "logits_scaling": 1, "partial_rotary_factor": 1, "no_rope_layers": None,
    "attention_chunk_size": None, "head_bias": False, "is_causal": True,
}
ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
QUANTIZED = {}           # {quant_method: function(meta model, folder)}, which shapes its linears


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
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None                # a token sees this many positions; None: all
    rope_scaling: dict | None = None                 # {"rope_type": "linear" or "llama3", numbers}
    quantization_config: dict | None = None

    @staticmethod
    def read(folder):
        """Return the Config in FOLDER/config.json; refuse by name what is not implemented."""
        adapter = Path(folder) / "adapter_config.json"
        require(not adapter.exists(),
                f"{adapter}: an adapter; merge it into its base model first (merge_and_unload)")
        path = Path(folder) / "config.json"
        raw = read_json(path)

        def refuse(key, expected):
            found = json.dumps(raw.get(key))
            raise InputError(f"{path}: {key} is {found}, supported is {expected}")

        def number(key, kind=int, default=None, source=raw):
            value = source.get(key)
            value = default if value is None else value
            allowed = (int, float) if kind is float else (int,)      # True is an int, too
            most = 2**31 - 1 if kind is int else sys.float_info.max
            require(type(value) in allowed and 0 < value <= most,
                    f"{path}: {key} is {json.dumps(value)}, expected a number, above 0, at most "
                    f"{most}")
            return kind(value)

        if raw.get("model_type") not in ("llama", "mistral"):
            refuse("model_type", '"llama" or "mistral"')
        architectures = raw.get("architectures") or ["LlamaForCausalLM"]
        if not isinstance(architectures, list) or not any(
                known in architectures for known in ("LlamaForCausalLM", "MistralForCausalLM")):
            refuse("architectures", "LlamaForCausalLM or MistralForCausalLM")
        if raw.get("hidden_act", "silu") not in list(ACTIVATIONS):
            refuse("hidden_act", " or ".join(f'"{name}"' for name in ACTIVATIONS))
        for key, neutral in CHANGES_THE_FUNCTION.items():
            if raw.get(key) not in (None, neutral, neutral is True):   # false: not there
                refuse(key, json.dumps(neutral))
        for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            if type(raw.get(key, False)) is not bool:
                refuse(key, "true or false")
        quantized = raw.get("quantization_config")
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        if quantized and method not in list(QUANTIZED):
            refuse("quantization_config", "floating point; with `python -m beyond` also what "
                                          "beyond/quantize.py writes")
        mistral = raw["model_type"] == "mistral"     # some keys mean something for one kind alone
        window = None
        if mistral and raw.get("sliding_window", 4096) is not None:
            window = number("sliding_window", default=4096)          # absent: as in transformers
            kinds = raw.get("layer_types")
            layers = number("num_hidden_layers")
            if kinds == ["full_attention"] * layers:
                window = None
            elif kinds not in (None, ["sliding_attention"] * layers):
                refuse("layer_types", "one type for all layers: sliding or full attention")
        heads = number("num_attention_heads")
        rope, rope_scaling = Config._read_rope(path, raw, number, refuse)
        config = Config(
            hidden_size=number("hidden_size"),
            intermediate_size=number("intermediate_size"),
            num_hidden_layers=number("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=number("num_key_value_heads", default=heads),
            head_dim=number("head_dim", default=number("hidden_size") // heads),
            vocab_size=number("vocab_size"),
            max_position_embeddings=number("max_position_embeddings", default=2048),
            rope_theta=number("rope_theta", float, default=10000.0, source=raw | rope),
            rms_norm_eps=number("rms_norm_eps", float, default=1e-6),
            tie_word_embeddings=raw.get("tie_word_embeddings", False) and not has_own_head(folder),
            model_type=raw["model_type"],
            hidden_act=raw.get("hidden_act", "silu"),
            attention_bias=raw.get("attention_bias", False) and not mistral,
            mlp_bias=raw.get("mlp_bias", False) and not mistral,
            sliding_window=window,
            rope_scaling=rope_scaling,
            quantization_config=quantized or None,
        )
        if heads % config.num_key_value_heads:
            refuse("num_key_value_heads", f"a divisor of the {heads} num_attention_heads")
        require(config.head_dim % 2 == 0,
                f"{path}: head_dim is {config.head_dim}, RoPE needs an even one")
        return config

    @staticmethod
    def _read_rope(path, raw, number, refuse):
        """Return config.json's rotary settings, and of them what is the Config's rope_scaling."""
        # They stand in rope_theta and rope_scaling, or all together in the newer rope_parameters.
        # If both are there, transformers takes the older one.
        key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
        rope = raw.get(key) or {}
        if not isinstance(rope, dict):
            refuse(key, "an object")
        rope = {name: value for name, value in rope.items() if value is not None}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in list(ROPE_NUMBERS):
            refuse(key, f"one of the rope types {', '.join(ROPE_NUMBERS)}")
        numbers = ROPE_NUMBERS[rope_type]
        original = raw.get("original_max_position_embeddings")       # counts before rope's own
        rope = rope if original is None else rope | {"original_max_position_embeddings": original}
        known = {"rope_type", "type", "rope_theta", "original_max_position_embeddings", *numbers}
        if rope.get("partial_rotary_factor") == 1:
            known.add("partial_rotary_factor")
        if rope.keys() - known:
            refuse(key, f"the rope type {rope_type} with {', '.join(numbers) or 'no numbers'}")
        if rope_type == "default":
            return rope, None
        scaling = {"rope_type": rope_type}
        scaling |= {name: number(name, float, source=rope) for name in numbers}
        if rope_type == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            refuse(key, "a low_freq_factor below the high_freq_factor")
        return rope, scaling

    def write(self, folder, dtype):
        """Write FOLDER/config.json as transformers reads it."""
        names = {"architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
                 "torch_dtype": str(dtype).removeprefix("torch."),
                 "bos_token_id": 1, "eos_token_id": 2}
        write_json(Path(folder) / "config.json", names | vars(self))


def block_linears(config):
    """Return the seven linears of a block: {name inside the block: (out_features, in_features)}."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    hidden, middle = config.hidden_size, config.intermediate_size
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }


def linear_names(config):
    """Return the full names of all linears of all blocks, those that sparsity is for."""
    return [f"model.layers.{layer}.{name}" for layer in range(config.num_hidden_layers)
            for name in block_linears(config)]


def preset(hidden, intermediate, layers, heads, kv_heads, vocab, context, theta, tied=False):
    return Config(hidden, intermediate, layers, heads, kv_heads, hidden // heads, vocab, context,
                  theta, tie_word_embeddings=tied)


PRESETS = {      # without rope scaling, which costs no time
    "llama-2-7b": preset(4096, 11008, 32, 32, 32, 32000, 4096, 1e4),
    "llama-2-13b": preset(5120, 13824, 40, 40, 40, 32000, 4096, 1e4),
    "llama-2-70b": preset(8192, 28672, 80, 64, 8, 32000, 4096, 1e4),
    "llama-3-8b": preset(4096, 14336, 32, 32, 8, 128256, 8192, 5e5),
    "llama-3-70b": preset(8192, 28672, 80, 64, 8, 128256, 8192, 5e5),
    "llama-3.2-1b": preset(2048, 8192, 16, 32, 8, 128256, 8192, 5e5, tied=True),
    "llama-3.2-3b": preset(3072, 8192, 28, 24, 8, 128256, 8192, 5e5, tied=True),
    "mistral-7b": preset(4096, 14336, 32, 32, 8, 32000, 8192, 1e4),
}


def preset_config(name):
    """Return the Config of a preset; raise InputError for an unknown name."""
    require(name in PRESETS, f"preset {name!r} is not known; known are {', '.join(PRESETS)}")
    return replace(PRESETS[name])


# --------------------------------------------------------------------------------------------------
# The folder: safetensors. 8 bytes give the length of the header, which is JSON; raw data follows:
#     {"__metadata__": {text: text},
#      name: {"dtype": "BF16", "shape": [4096, 4096], "data_offsets": [begin, end]}, ...}
# Nothing is unpickled. A tensor is a view of the mapped file, read when it is used.

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0     # no memory set aside for changes
LONGEST_HEADER = 100_000_000         # bytes, as in the reference implementation


def read_header(path):
    """Return the header of a safetensors file, every part of it checked, and where the data begins.

    Returns (entries: {name: (dtype, shape, begin, end)}, metadata: {str: str}, data_start: int),
    the entries in the order of their bytes; begin and end count from data_start. Raises InputError
    for a file that is cut short, damaged, or hides bytes between or after its tensors.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            require(size >= 8, f"{path}: truncated: {size} bytes, a safetensors file begins with 8 "
                               f"that give the length of its header")
            length, = struct.unpack("<Q", file.read(8))
            data_size = size - 8 - length
            require(data_size >= 0, f"{path}: truncated, or no safetensors file: its header should "
                                    f"be {length} bytes long, {size - 8} follow")
            require(length <= LONGEST_HEADER, f"{path}: its header is {length} bytes long, at most "
                                              f"{LONGEST_HEADER} are expected")
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
    require(isinstance(header, dict),
            f"{path}: the header is a JSON {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata                  # null is none, too
    require(isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values()),
            f"{path}: __metadata__ should map text to text")

    entries = {name: _read_entry(f"{path}: tensor {name}", entry, data_size)
               for name, entry in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    covered = 0
    previous = None
    for name, (_, _, begin, end) in entries.items():
        offsets = f"{path}: tensor {name}: data_offsets [{begin}, {end}]"
        require(begin >= covered, f"{offsets} overlap those of {previous}")
        require(begin <= covered, f"{offsets} leave a gap after byte {covered}")
        covered = end
        previous = name
    require(covered == data_size, f"{path}: {data_size - covered} bytes follow the last tensor")
    return entries, metadata, 8 + length


def _read_entry(what, entry, data_size):
    """Return (dtype, shape, begin, end) of a tensor's entry in the header; what: for messages."""
    def natural(value):
        return type(value) is int and 0 <= value < 2**63

    require(isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} <= entry.keys(),
            f"{what}: should have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    require(isinstance(dtype, str) and dtype in DTYPES,
            f"{what}: dtype {dtype!r} is not known; known are {', '.join(DTYPES)}")
    require(isinstance(shape, list) and all(map(natural, shape)),
            f"{what}: shape {shape!r} is not a list of sizes")
    require(isinstance(offsets, list) and len(offsets) == 2 and all(map(natural, offsets)),
            f"{what}: data_offsets {offsets!r} is not [begin, end]")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    require(end - begin == needed, f"{what}: data_offsets {offsets} hold {end - begin} bytes, "
                                   f"{dtype} x {shape} needs {needed}")
    require(math.prod(extent or 1 for extent in shape) < 2**63,      # empty, of absurd extents
            f"{what}: shape {shape} is larger than any memory")
    require(end <= data_size, f"{what}: data_offsets {offsets} run past the {data_size} bytes of "
                              f"data: the file is truncated")
    return DTYPES[dtype], shape, begin, end


def read_safetensors(path):
    """Return all tensors of a safetensors file: {name: tensor}, views of the memory-mapped file.

    Nothing is read before it is used (except tensors that a file holds misaligned, which are
    copied), so a file larger than memory can be opened. Writing to a tensor changes a private copy,
    never the file.
    """
    entries, _, data_start = read_header(path)
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | MAP_NORESERVE,
                           mmap.PROT_READ | mmap.PROT_WRITE)
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if begin == end:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        flat = torch.frombuffer(mapped, dtype=torch.uint8, count=end - begin,
                                offset=data_start + begin)
        if (data_start + begin) % dtype.itemsize:          # the format promises no alignment
            flat = flat.clone()
        tensors[name] = flat.view(dtype).view(shape)
    return tensors


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} to `path`, whole or not at all.

    metadata: {str: str}, kept in the header. Raises InputError for a dtype that the format lacks.
    """
    header = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    # The widest types first, as in the reference writer: each tensor is aligned to its own size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        tensor = tensors[name]
        require(tensor.dtype in DTYPE_NAMES, f"{path}: tensor {name}: {tensor.dtype} cannot be "
                                             f"written to a safetensors file")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, end]}
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
    """Open a binary file that takes the place of `path` when it is complete: `with ... as file`."""
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
    """Write `value` to a JSON file, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path):
    """Return the object in a JSON file; InputError says what is wrong with it."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    require(isinstance(value, dict), f"{path}: a JSON {type(value).__name__}, expected an object")
    return value


def read_settings(path):
    """Return the dictionary in a JSON file, empty if the file is not there."""
    return read_json(path) if path.exists() else {}


# --------------------------------------------------------------------------------------------------
# The folder: one file of tensors, or several

CHECKPOINTS = ("model.safetensors", "model.safetensors.index.json")


def shard_paths(folder):
    """Return the safetensors files of a checkpoint folder, each checked to exist."""
    folder = Path(folder)
    single, index = (folder / name for name in CHECKPOINTS)
    if single.exists():
        return [single]
    require(index.exists(),
            f"{folder}: no checkpoint: neither {single.name} nor {index.name} is there")
    weight_map = read_json(index).get("weight_map")
    require(isinstance(weight_map, dict) and weight_map
            and all(isinstance(shard, str) for shard in weight_map.values()),
            f"{index}: weight_map should map tensor names to files")
    shards = [folder / shard for shard in sorted(set(weight_map.values()))]
    for shard in shards:
        require(shard.exists(), f"{shard}: missing, but named by {index.name}")
    return shards


EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def tensor_paths(folder):
    """Return {name: path of its file} of all tensors of a checkpoint folder."""
    return {name: path for path in shard_paths(folder) for name in read_header(path)[0]}


def has_own_head(folder):
    """Return whether a checkpoint holds a head that differs from its embedding.

    Merged adapters may change one of the two, and config.json still says that they are tied. Then
    what is stored counts, as in transformers.
    """
    if not any((Path(folder) / name).exists() for name in CHECKPOINTS):
        return False                     # config.json is all there is
    paths = tensor_paths(folder)
    if not {EMBEDDING, HEAD} <= paths.keys():
        return False
    embedding, head = (read_safetensors(paths[name])[name] for name in (EMBEDDING, HEAD))
    return embedding.dtype != head.dtype or not torch.equal(embedding, head)


def checked_shards(folder, model):
    """Yield (path, {name: tensor}) of each file of a checkpoint, checked against a meta Llama.

    Every tensor is one of the model's, has its shape, stands once; at the end none is missing. What
    config.json defines anyway is left out: a tied head, and frequencies that older checkpoints
    store. (A tied head that is stored alone is the embedding.) The dictionaries are the caller's:
    what is taken out of them is held by nobody else.
    """
    missing = dict(model.named_parameters()) | dict(model.named_buffers())   # a tied head: once
    names = set(missing)
    tied = model.config.tie_word_embeddings
    head_alone = tied and EMBEDDING not in tensor_paths(folder)
    for path in shard_paths(folder):
        tensors = read_safetensors(path)
        if head_alone and HEAD in tensors:
            tensors[EMBEDDING] = tensors[HEAD]
        for name in list(tensors):
            if name.endswith("rotary_emb.inv_freq") or name == HEAD and tied:
                del tensors[name]
        for name in tensors:
            what = f"{path}: tensor {name}"
            shape, dtype = tensors[name].shape, tensors[name].dtype
            own = missing.pop(name, None)
            require(own is not None or name not in names,
                    f"{what}: a second one, another file holds it too")
            require(own is not None, f"{what}: not part of a Llama with the shape in config.json")
            require(shape == own.shape,
                    f"{what}: shape {list(shape)}, config.json makes it {list(own.shape)}")
            if isinstance(own, nn.Parameter):
                require(dtype.is_floating_point, f"{what}: {dtype}, expected floating point")
            else:
                require(dtype == own.dtype, f"{what}: {dtype}, expected {own.dtype}")
        yield path, tensors
    more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
    require(not missing,
            f"{folder}: tensor {min(missing, default='')} is missing from the checkpoint{more}")


def checkpoint_dtype(folder):
    """Return the floating-point dtype that most of a checkpoint's bytes have."""
    counts = {}
    for path in shard_paths(folder):
        for name, (dtype, _, begin, end) in read_header(path)[0].items():
            if dtype.is_floating_point and not name.endswith(".scales"):
                counts[dtype] = counts.get(dtype, 0) + end - begin
    require(counts, f"{folder}: no tensor of the checkpoint is floating point")
    return max(counts, key=counts.get)


# --------------------------------------------------------------------------------------------------
# Text: a tokenizer cuts it into pieces that were frequent where it was made (arXiv 1508.07909) and
# gives each a number. What it never saw falls into bytes, so that any text can be written:
#     "def walk"  ─►  ▁def  ▁walk        "Ω"  ─►  <0xCE>  <0xA9>          ▁ stands for a space

class SentencePieceTokenizer:
    """The tokenizer in a folder's tokenizer.model (Llama-2, Mistral), where `fits` says so."""

    def __init__(self, folder):
        import sentencepiece                               # needed only where there is text
        self.processor = sentencepiece.SentencePieceProcessor(str(Path(folder) / "tokenizer.model"))
        self.vocab_size = self.processor.vocab_size()
        self.bos_id = self.processor.bos_id()              # -1 where there is none
        self.eos_ids = end_ids(folder)
        if not self.eos_ids and self.processor.eos_id() >= 0:
            self.eos_ids = (self.processor.eos_id(),)

    def encode(self, text, bos=True):
        """Return the token ids of `text`, the begin-of-sequence token first if there is one."""
        check_text(text)
        return [self.bos_id] * (bos and self.bos_id >= 0) + self.processor.encode(text)

    def decode(self, ids):
        """Return the text of token ids; control tokens and ids that pad a vocabulary have none."""
        return self.processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def pieces(self):
        """Return what each token stands for, a list by id."""
        return [self.processor.id_to_piece(i) for i in range(self.vocab_size)]

    def fits(self, folder):
        """Return whether the folder's other files add no token, and begin a text as this does."""
        def content(token):
            return token["content"] if isinstance(token, dict) else token

        folder = Path(folder)
        settings = (read_settings(folder / "special_tokens_map.json")
                    | read_settings(folder / "tokenizer_config.json"))
        whole = read_settings(folder / "tokenizer.json")
        bos = self.processor.id_to_piece(self.bos_id) if self.bos_id >= 0 else None
        usual = {"bos_token": bos, "add_bos_token": bos is not None, "add_eos_token": False,
                 "add_prefix_space": True}
        try:
            same = all(content(settings.get(key)) in (None, value) for key, value in usual.items())
            if whole:
                parts = [list(part.values())[0]["id"] for part in whole["post_processor"]["single"]]
                same &= parts == [bos] * (bos is not None) + ["A"]
                own = {piece: i for i, piece in enumerate(self.pieces())}
                same &= whole["model"]["vocab"] == own
            added = [(token["content"], token["id"]) for token in whole.get("added_tokens", [])]
            added += [(content(token), int(i))
                      for i, token in settings.get("added_tokens_decoder", {}).items()]
            added += read_settings(folder / "added_tokens.json").items()
            return same and all(self.is_own(text, i) for text, i in added)
        except (AttributeError, LookupError, TypeError, ValueError):
            return False                                   # transformers says what is wrong

    def is_own(self, text, i):
        """Return whether `text` is the token i, to tokenizer.model too."""
        processor = self.processor
        return 0 <= i < self.vocab_size and processor.id_to_piece(i) == text and (
            processor.is_control(i) or processor.is_unknown(i) or i in processor.encode(text))


class HubTokenizer:
    """Every other kind of tokenizer, through transformers."""

    def __init__(self, folder):
        try:
            from transformers import AutoTokenizer, LlamaTokenizer, logging
        except ImportError:
            raise InputError(f"{folder}: this kind of tokenizer needs the package transformers: "
                             f"pip install transformers") from None
        logging.set_verbosity_error()    # it warns of every kind of file that it tries in vain
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")    # else a file is what its path once held
        kind, options = AutoTokenizer, {}
        if not (Path(folder) / "tokenizer.json").exists() and is_sentencepiece(folder):
            try:
                import google.protobuf                     # noqa: F401
            except ImportError:
                raise InputError(f"{folder}: tokenizer.model without tokenizer.json needs the "
                                 f"package protobuf: pip install protobuf") from None
            # AutoTokenizer would take another class for Mistral, which begins no text with a blank.
            kind = LlamaTokenizer
            settings = read_settings(Path(folder) / "tokenizer_config.json")
            options = {"add_bos_token": settings.get("add_bos_token") is not False}
        try:
            self.tokenizer = kind.from_pretrained(str(folder), local_files_only=True,
                                                  trust_remote_code=False, **options)
        except Exception as error:                         # of many kinds
            raise InputError(f"{folder}: no tokenizer that can be read: "
                             f"{(str(error) or type(error).__name__).splitlines()[0]}") from None
        self.vocab_size = len(self.tokenizer)
        eos = self.tokenizer.eos_token_id
        self.eos_ids = end_ids(folder) or (() if eos is None else (eos,))

    def encode(self, text, bos=True):
        """Return the token ids of `text`; bos: with those that the tokenizer itself adds."""
        check_text(text)
        return self.tokenizer.encode(text, add_special_tokens=bos, split_special_tokens=True)

    def decode(self, ids):
        """Return the text of token ids; special tokens and ids that pad a vocabulary have none."""
        ids = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self.tokenizer.decode(ids, skip_special_tokens=True,
                                     clean_up_tokenization_spaces=False)

    def pieces(self):
        """Return what each token stands for, a list by id."""
        return self.tokenizer.convert_ids_to_tokens(range(self.vocab_size))


def load_tokenizer(folder):
    """Return a tokenizer: .encode(text, bos=True) -> list[int], .decode(ids) -> str, .eos_ids.

    It is SentencePiece's own where tokenizer.model says all there is to say of a text, else what
    transformers makes of the folder.
    """
    path = Path(folder) / "tokenizer.model"
    settings = [Path(folder) / name for name in ("tokenizer.json", "tokenizer_config.json")]
    if is_sentencepiece(folder):
        try:
            tokenizer = SentencePieceTokenizer(folder)
        except (RuntimeError, OSError):
            raise InputError(f"{path}: not a SentencePiece model: it is damaged") from None
        return tokenizer if tokenizer.fits(folder) else HubTokenizer(folder)
    require(path.exists() or settings[0].exists(),
            f"{folder}: no tokenizer: neither tokenizer.model nor tokenizer.json is there")
    require(any(each.exists() for each in settings),
            f"{path}: not SentencePiece, and neither tokenizer.json nor tokenizer_config.json "
            f"names its special tokens")
    return HubTokenizer(folder)


def is_sentencepiece(folder):
    """Return whether the folder has a tokenizer.model of SentencePiece: Llama-3's is another."""
    path = Path(folder) / "tokenizer.model"
    if not path.exists():
        return False
    with open(path, "rb") as file:
        return file.read(1) == b"\n"


def end_ids(folder):
    """Return the ids that end a text, from generation_config.json or config.json: a tuple."""
    for name in ("generation_config.json", "config.json"):
        ids = read_settings(Path(folder) / name).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        ids = tuple(i for i in ids if type(i) is int and i >= 0)
        if ids:
            return ids
    return ()


def check_text(text):
    """Raise InputError if `text` cannot be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("the text is not Unicode: it holds bytes that are no UTF-8") from None


def read_tokens(tokenizer, path, part):
    """Return (tokens (N,) int64, what they are) of the text file at `path`, or of the demo's text.

    path None: `part` of the Python standard library, "train" or "held-out", its files in an order
    that was drawn once.
    """
    if path is not None:
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            what = f"{error.reason} at byte {error.start}"
            raise InputError(f"{path}: not UTF-8 text: {what}") from None
        return torch.tensor(tokenizer.encode(text), dtype=torch.int64), str(path)
    from demo import corpus
    texts = [text for _, text in corpus.files(part)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1))
    ids = []
    for index in order:
        ids += tokenizer.encode(texts[index])
        ids += tokenizer.eos_ids[:1]
    return torch.tensor(ids, dtype=torch.int64), f"{part} part of {corpus.NAME}"


def windows_of(tokens, context, stride=None):
    """Return tokens (N,) as windows (W, context + 1), each of which predicts `context` tokens.

    They begin `stride` tokens apart; None: `context`, so that every token but the first is
    predicted once. The rest after the last whole window is dropped. InputError if there is none.
    """
    stride = context if stride is None else stride
    require(context >= 1 and stride >= 1,
            f"windows of {context} tokens, {stride} apart: expected at least 1")
    require(tokens.numel() > context, f"the text has {tokens.numel()} tokens, a window of "
                                      f"{context} needs {context + 1}: give more text")
    return tokens.unfold(0, context + 1, stride)


def default_context(model):
    """Return the length of a window where none is asked for: the model's context, at most 2048."""
    return min(model.config.max_position_embeddings, 2048)


def asked_context(model, context):
    """Return the length of a window that --context asks for; None: the default."""
    context = context or default_context(model)
    longest = model.config.max_position_embeddings
    require(context <= longest,
            f"--context {context} does not fit the model's context of {longest}")
    return context


# --------------------------------------------------------------------------------------------------
# What the commands share

class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, as all others here are."""

    def error(self, message):
        raise InputError(message)

    def add_model(self):
        """Add the options that `load_model` takes."""
        self.add_argument("--model", default=str(DEMO),
                          help="checkpoint folder, or random:PRESET (default: the demo model)")
        self.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                          help="(default: the checkpoint's own)")
        self.add_device()

    def add_device(self):
        self.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                          help="(default: cuda where there is one, else cpu)")


def natural(text):
    """Return a whole number above 0, for the command line."""
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def share(text):
    """Return a number from 0 to below 1, for the command line."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text}, expected at least 0 and below 1")
    return value


def load_model(name, device="cpu", dtype=None, maker=Llama):
    """Return (model, tokenizer) as every command takes them with --model.

    name: a checkpoint folder, or "random:PRESET", which has no tokenizer: None. dtype: None, a
    torch.dtype, or the name of one. maker: what has `from_pretrained` and `random`, as Llama.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    device = find_device(device)
    if str(name).startswith("random:"):
        preset_name = str(name).removeprefix("random:")
        return maker.random(preset_name, device, dtype or torch.bfloat16), None
    require(Path(name).is_dir(), f"{name}: no such folder")
    tokenizer = load_tokenizer(name)
    return maker.from_pretrained(name, device, dtype), tokenizer


def check_output(path, option):
    """Raise InputError, before anything is computed, if no file can be written at `path`."""
    folder = Path(path).parent
    require(str(path) and (Path(path).is_file() or not Path(path).exists()),
            f"{path}: is no file to write; see {option}")
    require(folder.is_dir(), f"{path}: cannot be written: {folder} is no folder; see {option}")
    require(os.access(folder, os.W_OK), f"{path}: cannot be written: {folder} is read-only; see "
                                        f"{option}")


def find_device(name):
    """Return the torch.device of a name; InputError if it cannot be used here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from None
    require(device.type in ("cpu", "cuda"),
            f"device {name} cannot be used: supported are cpu and cuda")
    return device


def progress(items, label):
    """Yield the items of a list, and say on standard error how far the work is and what is left.

    On a terminal one line is written anew after each item. Elsewhere, if the work takes longer than
    ten seconds, there is a line after the first item, and then one a minute.
    """
    began = said = time.perf_counter()
    watched = sys.stderr.isatty()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.perf_counter()
        left = (now - began) / done * (len(items) - done)
        text = f"{label}: {done} of {len(items)}, {left / 60:.1f} minutes left"
        if watched:
            note(f"\r\033[K{text}" if left else "\r\033[K", end="")
        elif done == 1 and left > 10 or now - said > 60:
            note(text)
            said = now


def note(text, end="\n"):
    """Write text to standard error. Where it cannot be written, the work goes on without."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")


def command_line(main):
    """Run a file's `main`. Input that it cannot use ends it with one line and exit status 2."""
    path = Path(sys.argv[0])
    name = path.parent.name if path.name == "__main__.py" else path.name     # python -m FOLDER
    if sys.stderr is None:               # closed; its number is not to become that of a file
        sys.stderr = open(os.devnull, "w")
    try:
        require(sys.stdout is not None, "standard output is closed")
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack a character
        main()
    except BrokenPipeError:                                # our reader is gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as error:
        note(f"{name}: error: {' '.join(str(error).splitlines())}")
        sys.exit(2)
    except KeyboardInterrupt:
        note(f"{name}: interrupted")
        sys.exit(130)


def main():
    parser = Parser(description="Prints the shape of a checkpoint: parameters and bytes by part.")
    parser.add_argument("folder", nargs="?", default=str(DEMO), metavar="FOLDER",
                        help="checkpoint folder, or random:PRESET (default: the demo model)")
    folder = parser.parse_args().folder
    parts = {"embedding": "embed_tokens", "attention": "self_attn", "MLP": ".mlp.",
             "head": "lm_head", "norms": "norm"}
    if folder.startswith("random:"):
        config = preset_config(folder.removeprefix("random:"))
        dtype = torch.bfloat16
        tensors = {name: (tensor.numel(), tensor.numel() * dtype.itemsize)
                   for name, tensor in Llama.shapes(config).named_parameters()}
    else:
        config = Config.read(folder)
        dtype = checkpoint_dtype(folder)
        tensors = {name: (math.prod(shape), end - begin) for path in shard_paths(folder)
                   for name, (_, shape, begin, end) in read_header(path)[0].items()}
    print(f"{folder}: {config.num_hidden_layers} blocks, hidden {config.hidden_size}, intermediate "
          f"{config.intermediate_size}, {config.num_attention_heads} heads on "
          f"{config.num_key_value_heads} key-value heads of {config.head_dim}, "
          f"{str(dtype).removeprefix('torch.')}")
    print(f"{'part':>10} {'parameters':>15} {'MB':>10} {'share':>7}")
    numbers = dict.fromkeys(parts, 0)
    stored = dict.fromkeys(parts, 0)                       # bytes
    for name, (count, size) in tensors.items():
        part = next((part for part, sign in parts.items() if sign in name), None)
        if part is not None:
            numbers[part] += count
            stored[part] += size
    whole = sum(stored.values())
    for part in parts:
        tied = part == "head" and config.tie_word_embeddings
        print(f"{part:>10} {numbers[part]:15,} {stored[part] / 1e6:10,.1f} "
              f"{stored[part] / whole:7.1%}" + "   (the embedding once more)" * tied)
    print(f"{'all':>10} {sum(numbers.values()):15,} {whole / 1e6:10,.1f} {1:7.1%}")
    # One row of the embedding is read a token. The head is read whole, and stays dense.
    skippable = stored["attention"] + stored["MLP"]
    read = skippable + stored["norms"] + (stored["head"] or stored["embedding"])
    print(f"read for one token: {read / 1e6:,.1f} MB; sparsity can skip from attention and MLP, "
          f"{skippable / read:.1%} of it")


if __name__ == "__main__":
    command_line(main)
