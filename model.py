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

Sources: Llama 2 (arXiv 2307.09288); RoPE (arXiv 2104.09864); grouped-query attention (arXiv
2305.13245); SwiGLU (arXiv 2002.05202); RMSNorm (arXiv 1910.07467); the safetensors format (its
README on GitHub); the meaning of config.json's keys (transformers' LlamaConfig, MistralConfig).

    python model.py [FOLDER]        the shape of a checkpoint: parameters and bytes by part
"""
import argparse
import contextlib
import functools
import json
import math
import mmap
import os
import signal
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

# Torch loads for a second or two: Ctrl-C waits so long, and then ends without a traceback.
hook = sys.excepthook
sys.excepthook = lambda kind, *more: kind is KeyboardInterrupt or hook(kind, *more)
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
# Torch reads these settings as it loads. Weights stream faster through memory pages of 2 MB than of
# 4 KB. A waiting thread spins for 5 ms before it sleeps; 0.2 ms leave the cores to other work.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch                                                                # noqa: E402
import torch.nn.functional as F                                             # noqa: E402
from torch import nn                                                        # noqa: E402

signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
DEMO = Path(os.path.relpath(Path(__file__).parent / "demo"))     # as seen from where a command runs


class InputError(ValueError):
    """What the user gave cannot be used; one line says what was found and what was expected."""


def require(condition, message):
    """Raise InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


@contextlib.contextmanager
def refusing(message, *kinds):
    """Make errors of these kinds, inside a `with`, an InputError: `message`, and what was wrong."""
    try:
        yield
    except kinds as error:
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{message}: {said.splitlines()[0]}") from None


# --------------------------------------------------------------------------------------------------
# The model. Shapes: B sequences of T new tokens, S positions in all, H query heads, G key-value
# heads, D channels a head.

ACTIVATIONS = {"silu": F.silu}           # by config.json's hidden_act


class Linear(nn.Linear):
    """y = W x + b; `matmul`, below Llama, multiplies by what the processor is fast at."""

    def forward(self, x):
        y = matmul(x, self.weight.t())
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) * weight, computed in at least float32."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Context(NamedTuple):
    """What every block is told of where its tokens stand; `Llama.context` makes it."""
    cos: torch.Tensor                    # (T, D)
    sin: torch.Tensor                    # (T, D)
    mask: torch.Tensor | None            # (T, S): what each token sees, as for `attend`
    cache: "KVCache | None"


def rope_tables(positions, config, dtype):
    """Return cos and ± sin, each (T, D), by which q and k at `positions` (T,) are rotated.

    Pair i of a head, its channels i and i + D/2, turns by the angle position * theta^(-2i/D) (RoPE,
    section 3.4.2). Scaling lets a model see further than it was trained for. "linear" slows all
    pairs by a factor. "llama3" slows those of less than low_freq_factor turns within the original
    context, leaves those of more than high_freq_factor, and goes from one to the other in between.
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
    """Return x (B, heads, T, D) turned: a pair (a, b) is now (a cos - b sin, b cos + a sin)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def visible(past, T, window, device):
    """Return the positions (T,) of T tokens after `past` others, and their mask (T, past + T) bool.

    A token sees itself and the tokens before it; with a sliding window, only the last `window` of
    these. The mask is None where it is plainly causal.
    """
    window = window or 2**62             # none: wider than any text
    positions = torch.arange(past, past + T, device=device)
    if (T == 1 or past == 0) and past + T <= window:
        return positions, None
    keys = torch.arange(past + T, device=device)
    return positions, (keys <= positions[:, None]) & (keys > positions[:, None] - window)


def attend(q, k, v, mask):
    """Return softmax(q kᵀ / √D) v: q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D).

    k and v may have fewer bits than q. mask (T, S): bool, or (generate.StaticCache) 0 and -inf to
    add to q kᵀ / √D; None: each token sees itself and all before it.
    """
    B, H, T, D = q.shape
    G = k.shape[1]
    k, v = k.to(q.dtype), v.to(q.dtype)
    if mask is None and T > 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
    # The H / G heads that share keys stand as more queries of one head, so that no key is copied.
    mask = None if mask is None else mask.expand(H // G, -1, -1).flatten(0, 1)        # (H/G * T, S)
    y = F.scaled_dot_product_attention(q.reshape(B, G, -1, D), k, v, attn_mask=mask)
    return y.reshape(B, H, T, D)


class KVCache:
    """The keys and values of the positions seen so far, allocated once for `length` positions.

    `model(tokens, cache)` appends at `cache.used`. Setting `used` back forgets later positions.
    """

    def __init__(self, layers, batch, heads, length, head_dim, device, dtype):
        room = -(-length // 8) * 8       # for masks of generate.StaticCache, on a GPU
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
        self.attend = attend             # its own, for beyond/attend.py
        self.q_proj = Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=config.attention_bias)

    def qkv(self, x):                    # a method of its own, for beyond/fused.py
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
        self.gate_proj = Linear(hidden, middle, bias=config.mlp_bias)
        self.up_proj = Linear(hidden, middle, bias=config.mlp_bias)
        self.down_proj = Linear(middle, hidden, bias=config.mlp_bias)

    def gated(self, x):                  # a method of its own, for beyond/fused.py
        """Return act(gate) * up (B, T, middle), two projections of x (B, T, hidden)."""
        return self.activation(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x):
        return self.down_proj(self.gated(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, context):
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """What a checkpoint calls `model`: everything but the head."""

    def __init__(self, config):
        super().__init__()
        # nn.Embedding(...) on the meta device would import 400 modules of torch first.
        weight = torch.randn(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A Llama of any size: `Llama(config)` has fresh weights, `from_pretrained` loads them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens, cache=None, last_only=False):
        """Return the logits (B, T, vocab) of tokens (B, T) int64, in at least float32.

        With a cache the tokens follow its own, and are appended. last_only: only the logits of the
        last position, (B, 1, vocab). Raises InputError for tokens that do not fit the cache.
        """
        context = self.context(tokens, cache)
        x = self.embed(tokens)                                                  # (B, T, hidden)
        for block in self.model.layers:
            x = block(x, context)
        if cache is not None:
            cache.advance(tokens.shape[1])
        if last_only:
            x = x[:, -1:]
        x = self.model.norm(x)
        return self.lm_head(x.to(torch.promote_types(x.dtype, torch.float32)))  # logits as float32

    def context(self, tokens, cache=None):
        """Return the Context of tokens (B, T) that follow what the cache holds."""
        T, window = tokens.shape[1], self.config.sliding_window
        if cache is None:
            positions, mask = visible(0, T, window, tokens.device)
        else:
            positions, mask = cache.look(T, window)
        cos, sin = rope_tables(positions, self.config, self.activation_dtype)
        return Context(cos, sin, mask, cache)

    def embed(self, tokens):
        """Return the embeddings (B, T, hidden) of tokens (B, T)."""
        return self.model.embed_tokens(tokens).to(self.activation_dtype)

    def make_cache(self, batch, length):
        """Return an empty KVCache for `batch` sequences of up to `length` positions."""
        layers = self.model.layers
        D = self.config.head_dim
        heads = layers[0].self_attn.k_proj.out_features // D        # fewer in beyond/parallel.py
        return KVCache(len(layers), batch, heads, length, D, self.device, self.dtype)

    @property
    def device(self):
        return self.model.norm.weight.device

    @property
    def dtype(self):
        """The dtype of the weights, and of the keys and values in a cache."""
        return self.model.norm.weight.dtype

    @property
    def activation_dtype(self):
        """The dtype between products: on a CPU at least float32, as fewer bits gain nothing."""
        wide = torch.promote_types(self.dtype, torch.float32)
        return wide if self.device.type == "cpu" else self.dtype

    @staticmethod
    def on_meta(config):
        """Return a Llama on the meta device, which has shapes but no memory."""
        with torch.device("meta"):
            return Llama(config)

    @staticmethod
    def from_pretrained(folder, device="cpu", dtype=None):
        """Return the Llama in a checkpoint folder, without gradients; dtype None: its own."""
        return in_memory(map_checkpoint(Llama.on_meta(Config.read(folder)), folder), device, dtype)

    @staticmethod
    def random(preset, device="cpu", dtype=torch.bfloat16):
        """Return a Llama of a preset's real shapes with random weights: for speed alone."""
        return Llama.on_meta(preset_config(preset)).fill_random(device, dtype)

    def fill_random(self, device, dtype):        # a method of its own, for beyond/parallel.py
        """Give a meta Llama random weights that keep the size of what goes through them."""
        self.requires_grad_(False).to(dtype).to_empty(device=device)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        # Drawing 7 billion normal numbers takes minutes: a pool of four million fills every weight
        # (+ 7: or the rows of a weight would repeat).
        generator = torch.Generator().manual_seed(0)
        pool = torch.randn((1 << 22) + 7, generator=generator).to(device, dtype)
        for parameter in self.parameters():
            if parameter.ndim == 1:      # of a norm: presets have no biases
                parameter.fill_(1)
                continue
            for part in parameter.view(-1).split(len(pool)):
                torch.mul(pool[:len(part)], parameter.shape[1] ** -0.5, out=part)
        return self.eval()

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors to `folder`, a sparse linear as a dense one."""
        require(not list(self.buffers()), f"{folder}: a quantized model cannot be written there")
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {name.removesuffix("_t"): parameter.t() if name.endswith("_t") else parameter
                   for name, parameter in self.named_parameters()}
        write_safetensors(Path(folder) / "model.safetensors", tensors, {"format": "pt"})
        self.config.write(folder, self.dtype)


def check_tokens(tokens, config):
    """Raise InputError if one of `tokens` (any shape, int64) is not in the model's vocabulary."""
    wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if len(wrong):
        raise InputError(f"token id {wrong[0]} is outside the vocabulary of {config.vocab_size}")


# --------------------------------------------------------------------------------------------------
# Matrix products. Most CPUs have no instructions for those of 16 bits: PyTorch multiplies number by
# number then, a hundred times slower than it multiplies the same matrices in float32.

@functools.cache
def can_multiply(dtype):
    """Return whether this CPU has instructions for matrix products of a floating-point dtype."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype != torch.float16 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def matmul(x, weight_t):
    """Return x (..., in) @ weight_t (in, out) in x's dtype, computed in the weight's or float32."""
    if weight_t.is_cuda or can_multiply(weight_t.dtype) or weight_t.requires_grad:
        return (x.to(weight_t.dtype) @ weight_t).to(x.dtype)
    return InFloat32.apply(x, weight_t)


class InFloat32(torch.autograd.Function):
    """x @ weight_t in x's dtype, computed in float32 part by part; only x gets a gradient."""
    BLOCK = 1 << 20                      # weights of a part: widened, they fit the cache

    @staticmethod
    def forward(ctx, x, weight_t):
        ctx.parts = weight_t.split(max(64, InFloat32.BLOCK // len(weight_t)), 1)
        room = x.new_empty(ctx.parts[0].shape, dtype=torch.float32)
        return torch.cat([x.float() @ room[:, :part.shape[1]].copy_(part) for part in ctx.parts],
                         -1).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        gradients = gradient.float().split(ctx.parts[0].shape[1], -1)
        wide = sum(each @ part.float().t() for each, part in zip(gradients, ctx.parts))
        return wide.to(gradient.dtype), None


class Head(Linear):
    """The linear that gives the logits; on a CPU in float32 for few tokens, lest ranks change."""

    def forward(self, x):
        few = x.shape[-2] <= 8 and self.weight.itemsize <= 2            # 8: kernel.MAX_ROWS
        if x.is_cuda or not few or self.weight.requires_grad:
            return super().forward(x)
        return InFloat32.apply(x, self.weight.t())


# --------------------------------------------------------------------------------------------------
# The folder: config.json, the numbers that make the model

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# What is implemented of config.json's keys; the first value stands for a key that is absent. The
# last four have no place in a Config, but change the function of a Llama in transformers.
CHOICES = {
    "model_type": ("llama", "mistral"),
    "hidden_act": tuple(ACTIVATIONS),
    "attention_bias": (False, True),
    "mlp_bias": (False, True),
    "tie_word_embeddings": (False, True),
    "rope_type": tuple(ROPE_NUMBERS),
    "is_causal": (True,),
    "layer_types": (None,),
    "partial_rotary_factor": (1,),
    "quantization_config": (None,),
}


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

    @staticmethod
    def read(folder, raw=None):
        """Return the Config of a checkpoint folder; raw: its config.json, respelled by beyond/."""
        path = Path(folder) / "config.json"
        config = Config.parse(read_json(path) if raw is None else raw, path)
        if config.tie_word_embeddings and {EMBEDDING, HEAD} <= read_checkpoint(folder).keys():
            config.tie_word_embeddings = False       # a head that is stored counts
        return config

    @staticmethod
    def parse(raw, path):
        """Return the Config in a config.json's object; refuse by name what is not implemented."""
        with refusing(f"{path}: not the config.json of a Llama", AttributeError, TypeError):
            rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
            numbers = ROPE_NUMBERS.get(rope.get("rope_type"), ())
            given = raw | dict.fromkeys(numbers) | rope    # rope's numbers: its own or none
        values = {"num_key_value_heads": given.get("num_attention_heads"),
                  "max_position_embeddings": 2048, "rope_theta": 10000.0, "rms_norm_eps": 1e-6}
        values |= {key: value for key, value in given.items() if value is not None}
        unknown = sorted(rope.keys() - {*CHOICES, *numbers, "rope_theta"})
        for key, allowed in (CHOICES | dict.fromkeys(unknown, (None,))).items():
            value = values.setdefault(key, allowed[0])
            require(value in allowed, f"{path}: {key} is {json.dumps(value)}, expected "
                    f"{' or '.join(map(json.dumps, allowed))}; python -m beyond reads more")
        own = [field.name for field in fields(Config) if field.type in (int, float)]
        for key in (*own, *numbers):
            if key == "head_dim":        # the numbers that it follows from are checked by now
                values.setdefault(key, values["hidden_size"] // values["num_attention_heads"])
            value = values.get(key)
            require(type(value) in (int, float) and 0 < value < 2**63,
                    f"{path}: {key} is {json.dumps(value)}, expected a number above 0")
        mistral = values["model_type"] == "mistral"
        values["sliding_window"] = raw.get("sliding_window", 4096) if mistral else None
        scaling = {key: values[key] for key in ("rope_type", *numbers)}
        values["rope_scaling"] = scaling if numbers else None
        return Config(**{field.name: values[field.name] for field in fields(Config)})

    def write(self, folder, dtype):
        """Write FOLDER/config.json as transformers reads it."""
        names = {"architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
                 "torch_dtype": str(dtype).removeprefix("torch.")}
        write_json(Path(folder) / "config.json", names | vars(self))


def block_linears(config):
    """Return the seven linears of a block: {name inside the block: (out_features, in_features)}."""
    with torch.device("meta"):
        block = Block(config, 0)
    return {name: (linear.out_features, linear.in_features)
            for name, linear in block.named_modules() if isinstance(linear, Linear)}


def linear_names(config):
    """Return the full names of all linears of all blocks, those that sparsity is for."""
    names = block_linears(config)
    return [f"model.layers.{layer}.{name}" for layer in range(config.num_hidden_layers)
            for name in names]


PRESETS = {      # without rope scaling, which costs no time
    "llama-2-7b": Config(4096, 11008, 32, 32, 32, 128, 32000, 4096, 1e4),
    "llama-2-13b": Config(5120, 13824, 40, 40, 40, 128, 32000, 4096, 1e4),
    "llama-2-70b": Config(8192, 28672, 80, 64, 8, 128, 32000, 4096, 1e4),
    "llama-3-8b": Config(4096, 14336, 32, 32, 8, 128, 128256, 8192, 5e5),
    "llama-3-70b": Config(8192, 28672, 80, 64, 8, 128, 128256, 8192, 5e5),
    "llama-3.2-1b": Config(2048, 8192, 16, 32, 8, 64, 128256, 8192, 5e5, tie_word_embeddings=True),
    "llama-3.2-3b": Config(3072, 8192, 28, 24, 8, 128, 128256, 8192, 5e5, tie_word_embeddings=True),
    "mistral-7b": Config(4096, 14336, 32, 32, 8, 128, 32000, 8192, 1e4),
}


def preset_config(name):
    """Return the Config of PRESET or random:PRESET; raise InputError for an unknown name."""
    name = name.removeprefix("random:")
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


def read_safetensors(path, metadata=None):
    """Return all tensors of a safetensors file: {name: tensor}, views of the memory-mapped file.

    They are read when used (misaligned ones now), so a file may be larger than memory. Writing to a
    tensor changes a private copy, never the file. metadata: a dict {str: str}, to put the header's
    into. Raises InputError for what the package safetensors refuses: a file that is cut short,
    damaged, or hides bytes.
    """
    def unique(pairs):
        require(len(dict(pairs)) == len(pairs), "a name stands twice in the header")
        return dict(pairs)

    tensors = {}
    end = 0                              # of the tensors so far, in bytes
    with (refusing(f"{path}: cannot be read as a safetensors file", OSError, AttributeError,
                   LookupError, TypeError, ValueError, RecursionError), open(path, "rb") as file):
        mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | MAP_NORESERVE,
                           mmap.PROT_READ | mmap.PROT_WRITE)
        length = int.from_bytes(mapped[:8], "little")
        start = 8 + length
        require(start <= len(mapped) and length <= 10**8,
                f"truncated: its header would have {length} bytes")
        data = torch.frombuffer(mapped, dtype=torch.uint8)[start:]
        header = json.loads(mapped[8:start].decode(), object_pairs_hook=unique)
        texts = header.pop("__metadata__", {})
        require(all(isinstance(text, str) for text in texts.values()), "__metadata__ is no text")
        if metadata is not None:
            metadata |= texts
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
            require(dtype in DTYPES, f"tensor {name}: dtype {dtype!r} is not known")
            size = DTYPES[dtype].itemsize
            begin, end = end, end + math.prod(shape) * size
            require(all(type(n) is int and n >= 0 for n in shape + offsets)
                    and math.prod(n or 1 for n in shape) < 2**63
                    and offsets == [begin, end] and end <= len(data),
                    f"tensor {name}: data_offsets {offsets} in {len(data)} bytes of data, expected "
                    f"{[begin, end]} for {dtype} {shape}")
            part = data[begin:end]
            if (start + begin) % size:   # the format promises no alignment
                part = part.clone()
            tensors[name] = part.view(DTYPES[dtype]).view(shape)
        require(end == len(data), f"tensors of {end} bytes in {len(data)} bytes of data")
    return tensors


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} to `path`, whole or not at all; metadata {str: str} to its header."""
    header = {"__metadata__": metadata} if metadata else {}
    end = 0
    # The widest types first, as in the reference writer: each tensor is aligned to its own size.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with replacing(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().view(-1)
            file.write(flat.view(torch.uint8).numpy())


@contextlib.contextmanager
def replacing(path):
    """Open a binary file that takes the place of `path` when it is complete: `with ... as file`."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    with refusing(f"{path}: cannot be written", OSError):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write `value` to a JSON file, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path, missing=None):
    """Return the object in a JSON file; where there is none, `missing`, if that is given."""
    if missing is not None and not Path(path).exists():
        return missing
    with refusing(f"{path}: cannot be read", OSError, ValueError):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def read_checkpoint(folder):
    """Return {name: (path of its file, tensor)} of a checkpoint folder, memory-mapped.

    RoPE frequencies, which older checkpoints store, are left out. A head that is stored without the
    embedding is the embedding.
    """
    single, index = (Path(folder) / f"model.safetensors{end}" for end in ("", ".index.json"))
    require(single.exists() or index.exists(),
            f"{folder}: no checkpoint: neither {single.name} nor {index.name} is there")
    files = [single.name] if single.exists() else read_json(index).get("weight_map", {}).values()
    stored = {}
    for path in sorted({Path(folder) / file for file in files}):
        stored |= {name: (path, tensor) for name, tensor in read_safetensors(path).items()
                   if not name.endswith("rotary_emb.inv_freq")}
    if HEAD in stored and EMBEDDING not in stored:
        stored[EMBEDDING] = stored.pop(HEAD)
    return stored


def map_checkpoint(model, folder):
    """Make the tensors of a meta Llama those of a checkpoint, memory-mapped; return it.

    Raises InputError for a tensor that is missing, or that does not fit.
    """
    stored = read_checkpoint(folder)
    # A tied head counts once. Only models of beyond/quantize.py have buffers.
    expected = dict(model.named_parameters()) | dict(model.named_buffers())
    odd = sorted(stored.keys() ^ expected.keys())
    require(not odd, f"{folder}: tensors are missing, or not of this Llama: {', '.join(odd[:3])}")
    for name, (path, tensor) in stored.items():
        own = expected[name]
        require(tensor.shape == own.shape
                and tensor.is_floating_point() == own.is_floating_point(),
                f"{path}: tensor {name}: {tensor.dtype} {list(tensor.shape)}, config.json makes it "
                f"{own.dtype} {list(own.shape)}")
    tensors = {name: tensor for name, (_, tensor) in stored.items()}
    model.requires_grad_(False).load_state_dict(tensors, strict=False, assign=True)
    if model.config.tie_word_embeddings and isinstance(model.lm_head, nn.Linear):  # unquantized
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def in_memory(model, device="cpu", dtype=None):
    """Copy the mapped weights of a Llama into memory, and return it.

    dtype: of the parameters, which must be finite; None: as the largest is stored, as norms may
    have more bits. Buffers (of beyond/, quantized) stay as they are stored.
    """
    dtype = dtype or max(model.parameters(), key=torch.numel).dtype
    for name, parameter in model.named_parameters():
        parameter.data = parameter.to(device, dtype, copy=True)
        require(bool(torch.stack(parameter.aminmax()).isfinite().all()),
                f"tensor {name} holds NaN or numbers beyond {dtype}")
    return model.to(device).eval()


# --------------------------------------------------------------------------------------------------
# Text: a tokenizer cuts it into pieces that were frequent where it was made (arXiv 1508.07909) and
# gives each a number. What it never saw falls into bytes, so that any text can be written:
#     "def walk"  ─►  ▁def  ▁walk        "Ω"  ─►  <0xCE>  <0xA9>          ▁ stands for a space

class SentencePieceTokenizer:
    """The tokenizer in a folder's tokenizer.model (Llama-2, Mistral)."""

    def __init__(self, folder):
        import sentencepiece                               # needed only where there is text
        path = Path(folder) / "tokenizer.model"
        with refusing(f"{path}: not a SentencePiece model", RuntimeError, OSError):
            self.processor = sentencepiece.SentencePieceProcessor(str(path))
        self.vocab_size = self.processor.vocab_size()
        self.bos_ids = [i for i in [self.processor.bos_id()] if i >= 0]    # -1: there is none
        self.eos_ids = end_ids(folder, self.processor.eos_id())

    def encode(self, text, bos=True):
        """Return the token ids of `text`, the begin-of-sequence token first if there is one."""
        return self.bos_ids * bos + self.processor.encode(text.encode())

    def decode(self, ids):
        """Return the text of token ids; control tokens and ids that pad a vocabulary have none."""
        return self.processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def pieces(self):
        """Return what each token stands for, a list by id."""
        return self.processor.id_to_piece(list(range(self.vocab_size)))

    def is_complete(self, folder):
        """Return whether the folder's JSON files add no token and begin a text as this does."""
        settings, full, added = (read_json(Path(folder) / f"{name}.json", {}) for name in (
            "tokenizer_config", "tokenizer", "added_tokens"))
        ids = {*added.values(), *map(int, settings.get("added_tokens_decoder", ())),
               *(token["id"] for token in full.get("added_tokens", ()))}
        known = {i for i in range(self.vocab_size) if self.processor.is_control(i)}
        known.add(self.processor.unk_id())
        vocabulary = {piece: i for i, piece in enumerate(self.pieces())}
        parts = (full.get("post_processor") or {}).get("single", ())
        sequence = [name["id"] for part in parts for name in part.values()]    # "A" is the text
        bos = self.processor.id_to_piece(self.bos_ids)
        return (ids <= known
                and full.get("model", {}).get("vocab", vocabulary) == vocabulary
                and (not full or sequence == [*bos, "A"])
                and settings.get("add_bos_token") in (None, bool(self.bos_ids))
                and not settings.get("add_eos_token"))


class HubTokenizer:
    """Every other kind of tokenizer, through transformers."""

    def __init__(self, folder, **options):
        """options (beyond/folders.py): AutoTokenizer's, or `kind`, a class in its place."""
        with refusing(f"{folder}: no tokenizer that can be read; this kind needs the package "
                      f"transformers: pip install transformers", Exception):         # of many kinds
            from transformers import AutoTokenizer, logging
            logging.set_verbosity_error()    # it warns of every kind that it tries in vain
            self.tokenizer = options.pop("kind", AutoTokenizer).from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, **options)
        self.vocab_size = len(self.tokenizer)
        self.eos_ids = end_ids(folder, self.tokenizer.eos_token_id)

    def encode(self, text, bos=True):
        """Return the token ids of `text`; bos: with the special tokens that a text begins with."""
        # split_special_tokens: "<s>" that stands in a text is text
        return self.tokenizer.encode(text, add_special_tokens=bos, split_special_tokens=True)

    def decode(self, ids):
        """Return the text of token ids; special tokens and ids that pad a vocabulary have none."""
        return self.tokenizer.decode([int(i) for i in ids if 0 <= i < self.vocab_size],
                                     skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def pieces(self):
        """Return what each token stands for, a list by id."""
        return self.tokenizer.convert_ids_to_tokens(range(self.vocab_size))


def load_tokenizer(folder):
    """Return SentencePiece's tokenizer where tokenizer.model is complete, else transformers'."""
    path = Path(folder) / "tokenizer.model"
    if path.exists() and path.open("rb").read(1) == b"\n":     # protobuf; Llama-3's is text
        tokenizer = SentencePieceTokenizer(folder)
        if tokenizer.is_complete(folder):
            return tokenizer
    require((Path(folder) / "tokenizer.json").exists(),
            f"{folder}: no tokenizer: neither tokenizer.json nor a tokenizer.model that is "
            f"SentencePiece and that no other file changes; python -m beyond reads more")
    return HubTokenizer(folder)


def end_ids(folder, own):
    """Return the ids that end a text: of generation_config.json, config.json, or the tokenizer."""
    for name in ("generation_config.json", "config.json"):
        ids = read_json(Path(folder) / name, {}).get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return () if own in (None, -1) else (own,)


def read_tokens(tokenizer, path, part):
    """Return (tokens (N,) int64, what they are) of the text file at `path`, or of the demo's text.

    path None: the "train" or "held-out" part of the Python standard library, in a fixed order.
    """
    if path is not None:
        with refusing(f"{path}: not UTF-8 text", UnicodeDecodeError):
            text = Path(path).read_bytes().decode("utf-8")
        return torch.tensor(tokenizer.encode(text), dtype=torch.int64), str(path)
    from demo import corpus
    texts = [text for _, text in corpus.files(part)]
    ids = []
    for index in torch.randperm(len(texts), generator=torch.Generator().manual_seed(1)):
        ids += [*tokenizer.encode(texts[index]), *tokenizer.eos_ids[:1]]
    return torch.tensor(ids, dtype=torch.int64), f"{part} part of {corpus.NAME}"


def windows_of(tokens, context, stride=None):
    """Return tokens (N,) as windows (W, context + 1), one each `stride` (None: context) tokens."""
    require(tokens.numel() > context, f"the text has {tokens.numel()} tokens, a window of "
                                      f"{context} needs {context + 1}: give more text")
    return tokens.unfold(0, context + 1, stride or context)


def default_context(model, asked=None):
    """Return how many tokens a window has: `asked`, or the model's context, at most 2048."""
    most = model.config.max_position_embeddings
    require((asked or 0) <= most, f"--context {asked} does not fit the model's context of {most}")
    return asked or min(most, 2048)


# --------------------------------------------------------------------------------------------------
# What the commands share

class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, as all others here are."""

    def error(self, message):
        raise InputError(message)

    def add_model(self):
        self.add_argument("--model", default=str(DEMO), metavar="FOLDER",
                          help="or random:PRESET (default: the demo model)")
        self.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                          help="(default: the checkpoint's own)")
        self.add_device()

    def add_device(self):
        self.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                          help="(default: cuda where there is one, else cpu)")

    def add_calibration(self):
        self.add_argument("--calibration", metavar="FILE",
                          help="(default: calibration.safetensors in the checkpoint folder)")

    def add_text(self, part, tokens):
        self.add_argument("--text", metavar="FILE",
                          help=f"UTF-8 text (default: the standard library's {part} part)")
        self.add_argument("--tokens", type=natural, default=tokens,
                          help=f"of it at most (default: {tokens})")
        self.add_argument("--context", type=natural,
                          help="tokens a window (default: the model's own, at most 2048)")


def natural(text):
    """Return a whole number above 0, for the command line."""
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def share(text):
    """Return a number from 0 to below 1, for the command line."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}, expected at least 0 and below 1")
    return float(text)


def load_model(name, device="cpu", dtype=None):
    """Return (model, tokenizer) of a checkpoint folder; (model, None) of "random:PRESET".

    dtype: None, a torch.dtype, or the name of one. Folders of other kinds: beyond/folders.py.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    device = find_device(device)
    if str(name).startswith("random:"):
        return Llama.random(name, device, dtype or torch.bfloat16), None
    require(Path(name).is_dir(), f"{name}: no such folder")
    tokenizer = load_tokenizer(name)     # first: it fails sooner
    return Llama.from_pretrained(name, device, dtype), tokenizer


def find_device(name):
    """Return the torch.device of a name, with its index; InputError if it cannot be used here."""
    with refusing(f"device {name} cannot be used", RuntimeError, AssertionError, InputError):
        device = torch.empty(0, device=name).device
        require(device.type in ("cpu", "cuda"), "supported are cpu and cuda")
        return device


def check_output(path, option):
    """Raise InputError, before anything is computed, if no file can be written at `path`."""
    folder = Path(path).parent
    require(not Path(path).is_dir() and folder.is_dir() and os.access(folder, os.W_OK),
            f"{path}: cannot be written there; see {option}")


def progress(items, label):
    """Yield the items of a list; say every ten seconds how many minutes are left."""
    began = said = time.perf_counter()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.perf_counter()
        if now - said > 10 and done < len(items):
            said = now
            left = (now - began) * (len(items) / done - 1) / 60
            note(f"{label}: {done} of {len(items)}, {left:.1f} minutes left")


def note(text):
    """Write a line to standard error, where there is one."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def command_line(main):
    """Run a file's `main`. Input that it cannot use ends it with one line and exit status 2."""
    name = Path(sys.argv[0].removesuffix("__main__.py")).name                # python -m FOLDER
    try:
        require(sys.stdout is not None, "standard output is closed")
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack a character
        main()
    except BrokenPipeError:                                # our reader is gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, UnicodeError, OSError) as error:
        note(f"{name}: error: {' '.join(str(error).splitlines())}")
        sys.exit(2)
    except KeyboardInterrupt:
        note(f"{name}: interrupted")
        sys.exit(130)


def main():
    parser = Parser(description="Prints the shape of a checkpoint: parameters and bytes by part.")
    parser.add_argument("folder", nargs="?", default=str(DEMO), metavar="FOLDER",
                        help="or random:PRESET (default: the demo model)")
    folder = parser.parse_args().folder
    if folder.startswith("random:"):
        model = Llama.on_meta(preset_config(folder)).to(torch.bfloat16)
    else:
        model = map_checkpoint(Llama.on_meta(Config.read(folder)), folder)
    dtype = max(model.parameters(), key=torch.numel).dtype
    print(f"{folder}: {dtype}, {model.config}")
    signs = {"embedding": "embed_tokens", "attention": "self_attn", "MLP": ".mlp.",
             "head": "lm_head", "norms": "norm", "all": ""}
    parameters = dict(model.named_parameters())
    numbers = {part: sum(each.numel() for name, each in parameters.items() if sign in name)
               for part, sign in signs.items()}
    for part, number in numbers.items():
        print(f"{part:>10} {number:15,} {number * dtype.itemsize / 1e6:10,.1f} MB "
              f"{number / numbers['all']:7.1%}")
    # A token reads one row of the embedding, unless that is the head, too.
    read = numbers["all"] - (numbers["embedding"] if numbers["head"] else 0)
    skippable = numbers["attention"] + numbers["MLP"]
    print(f"read for one token: {read * dtype.itemsize / 1e6:,.1f} MB; sparsity can skip from "
          f"attention and MLP, {skippable / read:.1%} of it")


if __name__ == "__main__":
    command_line(main)
