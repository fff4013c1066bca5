"""A basis in which most inputs are small, at no cost when running.

Sparsity drops the inputs that are small in the basis the model happens to have. But a Llama can be written in any
other basis of its residual stream. RMSNorm without its weight only divides by the length of a vector, and a rotation
keeps lengths. So fold each norm's weight g into the linears that read it, choose an orthogonal Q, and turn
everything that writes to the stream or reads from it:

    embed_tokens   E  ->  E Q                     x' = Qᵀ x            the stream, rotated
    q k v gate up  W  ->  W diag(g) Q             W diag(g) Q x' = W diag(g) x
    o down         W  ->  Qᵀ W                    writes Qᵀ of what it wrote
    lm_head        W  ->  W diag(g) Q             norm weights become ones

The function is the same and so is the shape: the result is an ordinary checkpoint. Take for Q the principal directions of
the activations (the eigenvectors of their covariance) and a few coordinates carry most of the energy, while most
are small: just what a threshold on magnitude wants.

    x in the model's basis    ▃ ▅ ▂ ▄ ▃ ▄ ▂ ▅        x in its principal directions    ▇ ▅ ▂ ▁ ▁ ▁ ▁ ▁

The same holds between v_proj and o_proj, head by head: attention mixes the values of one head by weights, so that a rotation of
the values, v' = Rᵀ v, comes out of it as it went in, and is undone by o_proj. Each key-value head has its own R; the
query heads that share it turn with it. (Rotations: SliceGPT, arXiv 2401.15024; QuaRot, arXiv 2404.00456. For
activation sparsity: LaRoSA, arXiv 2507.01299, with a rotation a layer, paid for when running. One for all is free.)

    python rotate.py --model FOLDER --out FOLDER [--text FILE]
"""
import contextlib
from pathlib import Path

import torch

from checkpoint import Config, checked_shards, checkpoint_dtype, rewrite_checkpoint
from cli import DEMO, InputError, Parser, command_line, natural, progress_line
from model import Llama, load_model

STREAM_READERS = {"q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm",
                  "gate_proj": "post_attention_layernorm", "up_proj": "post_attention_layernorm"}


@torch.no_grad()
def covariances(model, windows, progress=lambda text: None):
    """Second moments of the activations over windows (W, context + 1), float64, sequence starts left out.

    Returns (stream (hidden, hidden): of the normalised stream before the norm weights, over the inputs of all attentions and
    MLPs; heads (layers, G, D, D): of the attention output of the query heads that share a key-value head).
    """
    from allocate import SINKS                             # the sinks would decide the first directions alone
    config = model.config
    stream = torch.zeros(config.hidden_size, config.hidden_size, dtype=torch.float64, device=model.device)
    heads = torch.zeros(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, config.head_dim,
                        dtype=torch.float64, device=model.device)

    def add_stream(norm, inputs, output):
        x = inputs[0][:, SINKS:].double().flatten(0, 1)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
        stream.addmm_(x.T, x)

    hooks = contextlib.ExitStack()                         # a handle is a context manager, which takes its hook away
    for layer, block in enumerate(model.model.layers):
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            hooks.enter_context(norm.register_forward_hook(add_stream))

        def add_heads(module, inputs, layer=layer):
            x = inputs[0][:, SINKS:].double().flatten(0, 1)                                 # (N, H * D)
            x = x.view(len(x), config.num_key_value_heads, -1, config.head_dim)             # (N, G, H/G, D)
            heads[layer] += torch.einsum("nghd,nghe->gde", x, x)
        hooks.enter_context(block.self_attn.o_proj.register_forward_pre_hook(add_heads))
    with hooks:
        for done, part in enumerate(windows.split(4)):
            progress(f"rotating, covariance: window {4 * done} of {len(windows)}")
            model(part[:, :-1].to(model.device), last_only=True)
    return stream.cpu(), heads.cpu()


def principal_directions(moments):
    """Eigenvectors (..., n, n) of second moments (..., n, n), in columns, the largest first; InputError if not full rank."""
    values, vectors = torch.linalg.eigh(moments)
    if not (values[..., 0] > 1e-12 * values[..., -1]).all():
        raise InputError("the text is too short: the activations do not span all directions; give more with --tokens or --text "
                         "(if more does not help, a channel of the model is always zero)")
    return vectors.flip(-1)


def rotated(name, tensor, norms, Q, R, config):
    """The tensor `name` of a checkpoint in the new basis, float64. norms: {name of a norm: its weight, float64}."""
    W = tensor.double()
    parts = name.split(".")
    if name.endswith("norm.weight"):
        return torch.ones_like(W)
    if name.endswith(".bias"):                             # what is added to an output turns as the output does
        if parts[-2] in ("o_proj", "down_proj"):
            return Q.T @ W
        return torch.einsum("gde,gd->ge", R[int(parts[2])], W.view(R.shape[1:3])).flatten() if parts[-2] == "v_proj" else W
    if name == "model.embed_tokens.weight":
        return W @ Q
    if name == "lm_head.weight":
        return W * norms["model.norm.weight"] @ Q
    linear, layer = parts[-2], int(parts[2])
    if linear in STREAM_READERS:
        W = W * norms[f"model.layers.{layer}.{STREAM_READERS[linear]}.weight"] @ Q
        if linear == "v_proj":                             # (G, D, hidden), each head's outputs turned by its R
            W = torch.einsum("gde,gdi->gei", R[layer], W.view(config.num_key_value_heads, config.head_dim, -1)).flatten(0, 1)
        return W
    if linear == "o_proj":                                 # (hidden, G, H/G, D), inputs turned by the R of their key-value head
        W = W.view(config.hidden_size, config.num_key_value_heads, -1, config.head_dim)
        W = torch.einsum("oghd,gde->oghe", W, R[layer]).flatten(1)
    return Q.T @ W                                         # o_proj and down_proj write to the stream


def rotate(folder, out, Q, R, dtype=None, progress=lambda text: None):
    """Writes the checkpoint in `folder`, in the basis Q (hidden, hidden) with head rotations R (layers, G, D, D), to `out`.

    Tensor by tensor in float64, shard by shard, in `dtype` (None: the checkpoint's). A tied head is untied: it takes in the
    last norm's weight, the embedding does not. That costs vocab * hidden weights more on disk and in memory, none to read.
    """
    config, dtype = Config.read(folder), dtype or checkpoint_dtype(folder)
    if config.quantization_config:
        raise InputError(f"{folder}: is quantized; rotate first, then quantize")
    shapes = Llama.shapes(config)
    norms = {name: tensor.double() for _, tensors in checked_shards(folder, shapes) for name, tensor in tensors.items()
             if name.endswith("norm.weight")}

    def change(path, tensors):
        progress(f"rotating: {path.name}")
        turned = {name: rotated(name, tensor, norms, Q, R, config).to(dtype) for name, tensor in tensors.items()}
        if config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
            turned["lm_head.weight"] = rotated("lm_head.weight", tensors["model.embed_tokens.weight"], norms, Q, R, config).to(dtype)
        return turned

    name = str(dtype).removeprefix("torch.")
    rewrite_checkpoint(folder, shapes, out, change, {"tie_word_embeddings": False, "torch_dtype": name, "dtype": name})


def main():
    from sparsify import default_context, read_tokens, windows_of

    parser = Parser(description="Writes a checkpoint anew in the principal directions of its activations.")
    parser.add_argument("--model", default=str(DEMO), help="checkpoint folder (default: the demo model)")
    parser.add_argument("--out", required=True, help="folder to write, which must not exist (no default: it is needed)")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to run (default: the standard library's held-in part)")
    parser.add_argument("--tokens", type=natural, default=50_000, help="how many tokens of it at most (default: 50000)")
    parser.add_device()
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="to write (default: the checkpoint's own)")
    arguments = parser.parse_args()
    if Path(arguments.out).exists():
        raise InputError(f"{arguments.out}: exists already; this is written to a new folder")
    if Path(arguments.model).is_dir() and Config.read(arguments.model).quantization_config:
        raise InputError(f"{arguments.model}: is quantized; rotate first, then quantize")
    model, tokenizer = load_model(arguments.model, arguments.device)
    if tokenizer is None:
        raise InputError(f"{arguments.model} has random weights, whose activations have no directions")
    tokens, source = read_tokens(tokenizer, arguments.text, "train")
    windows = windows_of(tokens[:arguments.tokens], default_context(model))
    check = windows[:1, :-1]
    before = model(check.to(model.device)).cpu()
    stream, heads = covariances(model, windows, progress_line)
    del model
    Q, R = principal_directions(stream), principal_directions(heads)
    energy = torch.linalg.eigvalsh(stream).flip(0).cumsum(0)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    rotate(arguments.model, arguments.out, Q, R, dtype, progress_line)
    after = Llama.from_pretrained(arguments.out, arguments.device)(check.to(arguments.device)).cpu()
    print(f"{arguments.out}: {arguments.model} in the principal directions of {windows[:, 1:].numel():,} tokens of {source}")
    print("coordinates that carry half, 90 % and 99 % of the stream's energy: "
          + ", ".join(str(int((energy < share * energy[-1]).sum()) + 1) for share in (0.5, 0.9, 0.99)) + f" of {len(energy)}")
    print(f"logits on {check.numel()} tokens differ from the original's by {(after - before).norm() / before.norm():.1e} relative")


if __name__ == "__main__":
    command_line(main)
