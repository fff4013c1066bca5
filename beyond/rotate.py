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
they come from the second half of the text, and a calibration from the first.

The same holds between v_proj and o_proj, head by head. Attention mixes the values of one head by
weights, so that a rotation of the values, v' = Rᵀ v, comes out of it as it went in, and is undone
by o_proj. Each key-value head has its own R; the query heads that share it turn with it.

Sources: rotations, SliceGPT (arXiv 2401.15024) and QuaRot (arXiv 2404.00456); for activation
sparsity, LaRoSA (arXiv 2507.01299), with a rotation a layer, paid for when running.

The seam: it reads a checkpoint folder and writes an ordinary one (folders.py).

    python -m beyond.rotate --model FOLDER --out FOLDER [--text FILE]
"""
import contextlib
from pathlib import Path

import torch
import torch.nn.functional as F

from beyond.folders import (check_new_folder, is_quantized, load_model, read_config,
                            rewrite_checkpoint)
from calibrate import SINKS, run_windows, some_windows
from model import (EMBEDDING, HEAD, Llama, Parser, command_line, default_context, map_checkpoint,
                   progress, read_tokens, require)

FOLDED = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")
READS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")     # the stream, normalised by
NORM = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}


# --------------------------------------------------------------------------------------------------
# The rotations. G key-value heads of D channels, each shared by H / G query heads.

@torch.no_grad()
def covariances(model, windows):
    """Return second moments of the activations over windows (W, T), without their first tokens.

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
        x = F.rms_norm(late(inputs[0]), (hidden,), eps=norm.eps)                # (N, hidden)
        stream.addmm_(x.T, x)

    with contextlib.ExitStack() as hooks:      # a handle is a context manager
        for block, moments in zip(model.model.layers, heads):
            def add_heads(module, inputs, moments=moments):
                x = late(inputs[0]).unflatten(1, (G, -1, D))                    # (N, G, H/G, D)
                moments += torch.einsum("nghd,nghe->gde", x, x)
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                hooks.enter_context(norm.register_forward_pre_hook(add_stream))
            hooks.enter_context(block.self_attn.o_proj.register_forward_pre_hook(add_heads))
        run_windows(model, windows, "rotating, covariances")
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

    norms: {name of a FOLDED weight: it, float64}; Q (hidden, hidden); R (layers, G, D, D)
    """
    W = tensor.double()
    if name in norms:
        return torch.ones_like(W)
    if name == EMBEDDING:
        return W @ Q
    if name == HEAD:
        return W * norms["model.norm.weight"] @ Q
    *_, layer, part, linear, kind = name.split(".")
    R = R[int(layer)]
    G, D = R.shape[:2]
    if linear in READS and kind == "weight":
        W = W * norms[f"model.layers.{layer}.{NORM[part]}.weight"] @ Q
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
    model = map_checkpoint(Llama.on_meta(read_config(folder)), folder)
    dtype = dtype or max(model.parameters(), key=torch.numel).dtype
    norms = {name: weight.double() for name, weight in model.named_parameters()
             if name.endswith(FOLDED)}

    def change(path, tensors):
        changed = {}
        for name, tensor in progress(tensors.items(), f"rotating {path.name}"):
            tied = name == EMBEDDING and model.config.tie_word_embeddings
            for place in (name, HEAD) if tied else (name,):
                changed[place] = rotated(place, tensor, norms, Q, R).to(dtype)
        return changed

    dtype_name = str(dtype).removeprefix("torch.")
    rewrite_checkpoint(folder, model, out, change, {
        "tie_word_embeddings": False, "torch_dtype": dtype_name, "dtype": dtype_name})


def check_floating_point(folder):
    """Raise InputError for a quantized checkpoint folder."""
    require(not (Path(folder).is_dir() and is_quantized(folder)),
            f"{folder}: is quantized; rotate first, then quantize")


@torch.no_grad()
def main():
    parser = Parser(description="Writes a checkpoint anew in the principal directions of its "
                                "activations; --dtype: to write.")
    parser.add_model()
    parser.add_text("held-in", 50_000)
    parser.add_argument("--out", required=True,
                        help="folder to write, which must not exist (no default: it is needed)")
    arguments = parser.parse_args()
    folder, out, device = arguments.model, arguments.out, arguments.device
    check_new_folder(out)
    require(not folder.startswith("random:"),
            f"{folder} has random weights, whose activations have no directions")
    check_floating_point(folder)
    model, tokenizer = load_model(folder, device)
    tokens, source = read_tokens(tokenizer, arguments.text, "train")
    context = default_context(model, arguments.context)
    second_half = tokens[-max(arguments.tokens, len(tokens) // 2):]
    context = min(context, arguments.tokens)
    windows = some_windows(model, second_half, arguments.tokens // context, context)
    check = windows[:1].cpu()
    before = model(check.to(device)).cpu()
    stream, heads = covariances(model, windows)
    del model
    rotate(folder, out, principal_directions(stream), principal_directions(heads),
           arguments.dtype and getattr(torch, arguments.dtype))
    after = load_model(out, device)[0](check.to(device)).cpu()
    print(f"{out}: {folder} in the principal directions of {windows.numel():,} tokens of "
          f"{source}")
    energy = torch.linalg.eigvalsh(stream).flip(0).cumsum(0)
    carriers = [int((energy < share * energy[-1]).sum()) + 1 for share in (0.5, 0.9, 0.99)]
    print(f"coordinates that carry half, 90 % and 99 % of the stream's energy: "
          f"{', '.join(map(str, carriers))} of {len(energy)}")
    error = (after - before).norm() / before.norm()
    print(f"logits on {check.numel()} tokens differ from the original's by {error:.1e} relative")


if __name__ == "__main__":
    command_line(main)
