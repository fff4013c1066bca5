"""Llama, from token ids to logits.

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
SwiGLU (arXiv 2002.05202); RMSNorm (arXiv 1910.07467).

Decoding on a CPU replays the small operations between the matrices in C (step.py), once the model is sparse; what is changed
here counts all the same.

    python model.py [FOLDER]        the shape of a checkpoint: parameters and bytes by part
"""
import math
import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import Config, block_linears, checked_shards, checkpoint_dtype, read_header, shard_paths, write_safetensors
from checkpoint import read_safetensors                                                     # noqa: F401   scripts take it from here
from cli import DEMO, InputError, Parser, command_line, find_device, progress_line

# Weights of gigabytes in pages of 4 KB cost a page walk every other microsecond: torch asks Linux for pages of 2 MB if
# it finds this set when it first allocates. Decoding on a CPU reads memory 15 % faster.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

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
    """cos and ± sin, each (T, D), by which q and k at `positions` (T,) are rotated (RoPE, section 3.4.2).

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
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)        # (T, D)


def rotate(x, cos, sin):
    """x (B, heads, T, D) turned by the angles of `rope_tables`: each channel times cos, plus the other one of its pair times ± sin."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


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
        """The three projections that read x (B, T, hidden), side by side: (B, T, (H + G + G)·D)."""
        return torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)

    def forward(self, x, cos, sin, mask, cache, slots):
        B, T, _ = x.shape
        G = self.k_proj.out_features // self.head_dim
        y = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)                       # (B, H + G + G, T, D)
        turned, v = rotate(y[:, :-G], cos, sin), y[:, -G:]
        q, k, H = turned[:, :-G], turned[:, -G:], turned.shape[1] - G
        if cache is not None:
            k, v = cache.append(self.layer, k, v, slots)                                    # (B, G, S, D)
        if mask is None and T > 1:                         # nothing lies before these tokens: plainly causal
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)  # (B, H, T, D)
        else:
            # The H / G heads that share keys stand as more queries of one head, so that no key is copied.
            mask = None if mask is None else mask.repeat(H // G, 1)                         # (H/G * T, S)
            y = F.scaled_dot_product_attention(q.reshape(B, G, -1, self.head_dim), k, v, attn_mask=mask)
        return self.o_proj(y.reshape(B, H, T, -1).transpose(1, 2).reshape(B, T, -1))       # a GPU may give y other strides


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
        if cache is not None and slots is None:
            check_fit(tokens, cache)
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
    def shapes(config):
        """A Llama on the meta device: it has shapes, but no memory."""
        with torch.device("meta"):
            return Llama(config)

    @staticmethod
    def from_pretrained(folder, device="cpu", dtype=None):
        """The Llama in a checkpoint folder of the hub's form, in eval mode and without gradients.

        folder: config.json with model.safetensors, or model.safetensors.index.json and the shards it names.
        dtype: a floating-point torch.dtype, or None for the checkpoint's own. Each tensor is copied once, from
        the mapped file to its place. Raises InputError for a folder that does not hold such a model.
        """
        config = Config.read(folder)
        model = Llama.shapes(config)
        if config.quantization_config:
            from quantize import shape_linears             # needed only where weights are quantized
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
        model = Llama.shapes(preset_config(preset)).to(dtype).to_empty(device=device)
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


def check_fit(tokens, cache):
    """Raises InputError if tokens (B, T) do not fit behind what the cache holds."""
    if cache.used + tokens.shape[1] > cache.length:
        raise InputError(f"{tokens.shape[1]} tokens do not fit a cache of {cache.length} positions, {cache.used} of them used")


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


def load_tokenizer(folder):
    """The tokenizer of a checkpoint folder: .encode(text, bos=True) -> list[int], .decode(ids) -> str, .eos_ids; see tokenizer.py."""
    from tokenizer import open_tokenizer                   # needed only where there is text
    return open_tokenizer(folder)


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
