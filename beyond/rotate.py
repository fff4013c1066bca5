"""A basis in which most inputs are small, at no cost when running.

Sparsity drops the inputs that are small in the basis the model happens to have. But a Llama can be
written in any other basis of its residual stream. RMSNorm without its weight only divides by the
length of a vector, and a rotation keeps lengths. So fold each norm's weight g into the linears that
read it, choose an orthogonal Q, and turn everything that writes to the stream or reads from it:

    embed_tokens   E  ->  E Q                     x' = Qᵀ x            the stream, rotated
    q k v gate up  W  ->  W diag(g) Q             W diag(g) Q x' = W diag(g) x
    o down         W  ->  Qᵀ W                    writes Qᵀ of what it wrote
    lm_head        W  ->  W diag(g) Q             norm weights become ones

The function is the same and so is the shape: the result is an ordinary checkpoint. Take for Q the
principal directions of the activations (the eigenvectors of their covariance), and a few
coordinates carry most of the energy while most are small: just what a threshold on magnitude wants.

    x in the model's basis    ▃ ▅ ▂ ▄ ▃ ▄ ▂ ▅        in its principal directions    ▇ ▅ ▂ ▁ ▁ ▁ ▁ ▁

Directions fit the text that they come from: along the last of them, other text has more energy. So
they come from the second half of the text, and a calibration from the first. With thresholds from
the same text, less would be dropped elsewhere than was asked for.

The same holds between v_proj and o_proj, head by head. Attention mixes the values of one head by
weights, so that a rotation of the values, v' = Rᵀ v, comes out of it as it went in, and is undone
by o_proj. Each key-value head has its own R; the query heads that share it turn with it.

Sources: rotations, SliceGPT (arXiv 2401.15024) and QuaRot (arXiv 2404.00456); for activation
sparsity, LaRoSA (arXiv 2507.01299), with a rotation a layer, paid for when running. One for all
layers is free.

The seam: it reads a checkpoint folder and writes an ordinary one (folders.py).

    python -m beyond.rotate --model FOLDER --out FOLDER [--text FILE]
"""
import contextlib
from pathlib import Path

import torch

from beyond.folders import (check_new_folder, is_quantized, load_model, read_config,
                            rewrite_checkpoint)
from calibrate import BATCH, SINKS, spread
from model import (DEMO, EMBEDDING, HEAD, Llama, Parser, checked_shards, checkpoint_dtype,
                   command_line, default_context, natural, progress, read_tokens, require,
                   windows_of)

READS_NORM = {               # which norm's output the linears read that read the stream
    "q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm", "up_proj": "post_attention_layernorm",
}


# --------------------------------------------------------------------------------------------------
# The rotations. G key-value heads of D channels, each shared by H / G query heads.

@torch.no_grad()
def covariances(model, windows):
    """Return second moments of the activations over windows (W, T + 1), without their first tokens.

    stream (hidden, hidden) float64: of the normalised stream before the norms' weights, over the
    inputs of all attentions and MLPs. heads (layers, G, D, D) float64: of the attention output of
    the query heads that share a key-value head.
    """
    hidden, D = model.config.hidden_size, model.config.head_dim
    layers, G = model.config.num_hidden_layers, model.config.num_key_value_heads
    stream = torch.zeros(hidden, hidden, dtype=torch.float64, device=model.device)
    heads = torch.zeros(layers, G, D, D, dtype=torch.float64, device=model.device)

    def late(x):
        """Return x (B, T, n) as (N, n) float64, without what would decide the directions alone."""
        return x[:, SINKS:].double().flatten(0, 1)

    def add_stream(norm, inputs):
        x = late(inputs[0])                                                     # (N, hidden)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
        stream.addmm_(x.T, x)

    with contextlib.ExitStack() as hooks:      # a handle is a context manager
        for block, moments in zip(model.model.layers, heads):
            def add_heads(module, inputs, moments=moments):
                x = late(inputs[0]).unflatten(1, (G, -1, D))                    # (N, G, H/G, D)
                moments += torch.einsum("nghd,nghe->gde", x, x)
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                hooks.enter_context(norm.register_forward_pre_hook(add_stream))
            hooks.enter_context(block.self_attn.o_proj.register_forward_pre_hook(add_heads))
        for part in progress(windows.split(BATCH), "rotating, covariances"):
            model(part[:, :-1].to(model.device), last_only=True)
    return stream.cpu(), heads.cpu()


def principal_directions(moments):
    """Return the eigenvectors (..., n, n) of second moments (..., n, n), in columns.

    The one with the largest eigenvalue comes first. Raises InputError if they lack full rank.
    """
    values, vectors = torch.linalg.eigh(moments)
    require(bool((values[..., 0] > 1e-12 * values[..., -1]).all()),
            "the text is too short: the activations do not span all directions; give more with "
            "--tokens or --text (if more does not help, a channel of the model is always zero)")
    return vectors.flip(-1)


# --------------------------------------------------------------------------------------------------
# The checkpoint

def rotated(name, tensor, norms, Q, R):
    """Return the tensor `name` of a checkpoint in the new basis, float64.

    norms: {name of a norm's weight: its weight, float64}; Q (hidden, hidden); R (layers, G, D, D)
    """
    W = tensor.double()
    if name.endswith("norm.weight"):
        return torch.ones_like(W)
    if name == EMBEDDING:
        return W @ Q
    if name == HEAD:
        return W * norms["model.norm.weight"] @ Q
    *_, layer, _, linear, kind = name.split(".")
    R = R[int(layer)]
    G, D = R.shape[:2]
    if linear in READS_NORM and kind == "weight":
        W = W * norms[f"model.layers.{layer}.{READS_NORM[linear]}.weight"] @ Q
    if linear == "v_proj":               # the outputs of each head, bias or not, turned by its R
        W = torch.einsum("gde,gd...->ge...", R, W.unflatten(0, (G, D))).flatten(0, 1)
    if linear == "o_proj" and kind == "weight":            # its inputs, by that of their head
        W = torch.einsum("oghd,gde->oghe", W.unflatten(1, (G, -1, D)), R).flatten(1)
    # o_proj and down_proj write to the stream.
    return Q.T @ W if linear in ("o_proj", "down_proj") else W


def rotate(folder, out, Q, R, dtype=None):
    """Write the checkpoint in `folder`, in the basis Q with head rotations R, to the folder `out`.

    Q (hidden, hidden), R (layers, G, D, D), float64; dtype: to write, None for the checkpoint's. It
    goes tensor by tensor in float64. A tied head is untied: it takes in the last norm's weight, the
    embedding does not. That costs vocab * hidden weights more on disk and in memory, none to read.
    """
    check_floating_point(folder)
    dtype = dtype or checkpoint_dtype(folder)
    shapes = Llama.shapes(read_config(folder))
    norms = {}
    for _, tensors in checked_shards(folder, shapes):
        norms |= {name: tensor.double() for name, tensor in tensors.items()
                  if name.endswith("norm.weight")}

    def change(path, tensors):
        changed = {}
        for name in progress(list(tensors), f"rotating {path.name}"):
            tensor = tensors.pop(name)
            tied = name == EMBEDDING and shapes.config.tie_word_embeddings
            for place in (name, HEAD) if tied else (name,):
                changed[place] = rotated(place, tensor, norms, Q, R).to(dtype)
        return changed

    dtype_name = str(dtype).removeprefix("torch.")
    rewrite_checkpoint(folder, shapes, out, change, {
        "tie_word_embeddings": False, "torch_dtype": dtype_name, "dtype": dtype_name})


def check_floating_point(folder):
    """Raise InputError for a quantized checkpoint folder."""
    require(not is_quantized(folder), f"{folder}: is quantized; rotate first, then quantize")


@torch.no_grad()
def main():
    parser = Parser(description="Writes a checkpoint anew in the principal directions of its "
                                "activations.")
    add = parser.add_argument
    add("--model", default=str(DEMO), help="checkpoint folder (default: the demo model)")
    add("--out", required=True,
        help="folder to write, which must not exist (no default: it is needed)")
    add("--text", metavar="FILE",
        help="UTF-8 text to run (default: the standard library's held-in part)")
    add("--tokens", type=natural, default=50_000,
        help="how many tokens of it at most (default: 50000)")
    parser.add_device()
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        help="to write (default: the checkpoint's own)")
    arguments = parser.parse_args()
    folder, out, device = arguments.model, arguments.out, arguments.device
    check_new_folder(out)
    require(not folder.startswith("random:"),
            f"{folder} has random weights, whose activations have no directions")
    if Path(folder).is_dir():
        check_floating_point(folder)
    model, tokenizer = load_model(folder, device)
    tokens, source = read_tokens(tokenizer, arguments.text, "train")
    context = default_context(model)
    second_half = tokens[-max(arguments.tokens, len(tokens) // 2):]
    windows = windows_of(spread(second_half, arguments.tokens, context), context)
    check = windows[:1, :-1]
    before = model(check.to(device)).cpu()
    stream, heads = covariances(model, windows)
    del model
    Q = principal_directions(stream)
    R = principal_directions(heads)
    rotate(folder, out, Q, R, arguments.dtype and getattr(torch, arguments.dtype))
    after = load_model(out, device)[0](check.to(device)).cpu()
    print(f"{out}: {folder} in the principal directions of {windows[:, 1:].numel():,} tokens of "
          f"{source}")
    energy = torch.linalg.eigvalsh(stream).flip(0).cumsum(0)
    carriers = [int((energy < share * energy[-1]).sum()) + 1 for share in (0.5, 0.9, 0.99)]
    print(f"coordinates that carry half, 90 % and 99 % of the stream's energy: "
          f"{', '.join(map(str, carriers))} of {len(energy)}")
    error = (after - before).norm() / before.norm()
    print(f"logits on {check.numel()} tokens differ from the original's by {error:.1e} relative")


if __name__ == "__main__":
    command_line(main)
