"""One model on several GPUs: tensor parallelism.

Llama-2-70B in bfloat16 is 138 GB, more than a GPU holds, and one token reads all of it. N processes, each with a GPU of its
own, hold and read 1/N each. A matrix can be split in two ways, and what the first has made the second can use where it lies:

    by output   y = W x     each rank has some rows of W, reads all of x, and has those entries of y whole
    by input    y = W x     each rank has some columns of W, reads those entries of x, and has a part of the sum for all of y

    x, the same on all ranks
    │   rank 0:  q k v of its heads ─► attention of its heads ─► its columns of o_proj ─┐
    ├── rank 1:  q k v of its heads ─► attention of its heads ─► its columns of o_proj ─┴─ all-reduce ─► x, the same on all ranks

q, k, v, gate and up are split by output, o and down, which read what these make, by input: then one all-reduce is needed for
attention and one for the MLP, two a block. (Megatron-LM, arXiv 1909.08053, section 3.) A rank attends with its own heads, so
the KV cache is split by itself. The head is split by output, and its logits are gathered; every rank has the embedding.

Sparsity is not touched by this. Whether channel i is kept is a question to |x_i| alone, and the rank that holds channel i of
o_proj asks it: together the ranks keep exactly the channels that one process keeps.

Every rank runs the same program, and the logits they gather are the same to the last bit, so all choose the same tokens; what
could differ, as a draft model that each has whole, a random seed or a line of input, is taken from rank 0. Rank 0 alone prints.

When a rank ends, the others meet an error in their next collective and end too. (So with gloo, where it is tested. In a replayed
CUDA graph a GPU waits for the rank that is gone: there torchrun ends the others.)

    torchrun --nproc-per-node=2 generate.py --model FOLDER --sparsity 0.5
"""
import contextlib
import datetime
import os
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from checkpoint import Config, checked_shards, checkpoint_dtype
from cli import InputError, find_device
from model import Llama, preset_config, put

BY_OUTPUT = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"}
BY_INPUT = {"o_proj", "down_proj"}
objects = None           # the processes once more, as a group for Python objects: rank 0 may wait for a person there
PATIENCE = datetime.timedelta(minutes=10)                  # how long a rank waits for another, who may be loading still


@contextlib.contextmanager
def group(device):
    """Joins the processes that torchrun started, and yields this one's device; outside torchrun, `device` as it is.

    device: "cpu" (the processes talk through gloo), or "cuda", of which each process takes its own (NCCL).
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield device
        return
    backend = "gloo"
    if find_device(device).type == "cuda":
        backend, device = "nccl", f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(find_device(device))
    global objects
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
        objects = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes cannot be joined: {str(error).splitlines()[0]}") from None
    with contextlib.ExitStack() as stack:
        if dist.get_rank():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield device
    dist.destroy_process_group()                           # not after an error, where it would wait for those that are gone


def ranks():
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def talk(collective, *arguments):
    """One of torch.distributed's collectives; InputError if another process is gone."""
    try:
        collective(*arguments)
    except RuntimeError as error:
        raise InputError(f"rank {dist.get_rank()}: another process has ended or does not answer: {str(error).splitlines()[0]}") from None


def from_first(find):
    """What find() is on rank 0, where alone it is called, on every rank: any Python object."""
    if ranks() == 1:
        return find()
    box = [find() if dist.get_rank() == 0 else None]
    talk(dist.broadcast_object_list, box, 0, objects)
    return box[0]


def rows_of(outputs):
    """How many of the outputs of a linear each rank has; of a vocabulary that does not divide, the last ranks have zeros too."""
    return -(-outputs // ranks())


def part_of(name, tensor):
    """This rank's part of the tensor that a checkpoint calls `name`: (out, in) or (out,) of a linear; whole where it is no linear's."""
    rank, linear = dist.get_rank(), name.split(".")[-2]
    if linear in BY_OUTPUT:
        rows = rows_of(len(tensor))
        part = tensor[rank * rows:(rank + 1) * rows]
        return F.pad(part, (0, 0) * (part.ndim - 1) + (0, rows - len(part))) if len(part) < rows else part
    if linear in BY_INPUT and tensor.ndim == 2:
        return tensor.tensor_split(ranks(), 1)[rank]
    if linear in BY_INPUT and rank:
        return torch.zeros_like(tensor)                    # a bias is added once
    return tensor


def part_of_thresholds(thresholds):
    """This rank's part of thresholds, as sparsify takes them: o and down read its own channels alone."""
    if ranks() == 1:
        return thresholds
    parts = dict(thresholds)
    for name, threshold in thresholds.items():
        if name.split(".")[-1] in BY_INPUT and isinstance(threshold, torch.Tensor) and threshold.ndim:
            parts[name] = threshold.tensor_split(ranks())[dist.get_rank()]
    return parts


def empty_part(config, name):
    """A Llama on the meta device with the linears that this rank holds, and what the ranks say to each other built in."""
    own = {}
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        own[key], rest = divmod(getattr(config, key), ranks())
        if rest:
            raise InputError(f"{name}: {key} is {getattr(config, key)}, which {ranks()} processes cannot share evenly")
    if config.quantization_config:
        raise InputError(f"{name}: quantized folders are not split; take the unquantized one, with --quantize")
    model = Llama.shapes(replace(config, **own, tie_word_embeddings=False))
    model.lm_head = nn.Linear(config.hidden_size, rows_of(config.vocab_size), bias=False, device="meta")
    model.config = replace(config, tie_word_embeddings=False)        # of the whole model, but that the head is no longer the embedding
    for block in model.model.layers:
        for module in (block.self_attn, block.mlp):
            module.register_forward_hook(lambda module, inputs, y: summed(y))
    model.register_forward_hook(lambda module, inputs, logits: gathered(logits)[..., :config.vocab_size])
    return model


def summed(y):
    """The sum of all ranks' y, in its place."""
    talk(dist.all_reduce, y)
    return y


def gathered(logits):
    """(B, T, vocab / ranks) of every rank, side by side: (B, T, vocab)."""
    parts = [torch.empty_like(logits) for _ in range(ranks())]
    talk(dist.all_gather, parts, logits.contiguous())
    return torch.cat(parts, -1)


def from_pretrained(folder, device="cpu", dtype=None):
    """This rank's part of the Llama in a checkpoint folder; as Llama.from_pretrained.

    Of tensors split by output it reads its own rows alone. Of those split by input it reads its columns, and on a disk their
    neighbours with them, as lines of a file are shorter than its pages; ranks of one machine share what was read.
    """
    config, dtype = Config.read(folder), dtype or checkpoint_dtype(folder)
    model = empty_part(config, folder)
    for _, tensors in checked_shards(folder, Llama.shapes(config)):
        for name in list(tensors):
            tensor = tensors.pop(name)
            put(model, name, part_of(name, tensor), device, dtype)
            if config.tie_word_embeddings and name == "model.embed_tokens.weight":
                put(model, "lm_head.weight", part_of("lm_head.weight", tensor), device, dtype)
    return model.eval()


def random(preset, device="cpu", dtype=torch.bfloat16, seed=0):
    """A rank's part of a Llama of a preset's shapes with random weights, for speed; as Llama.random."""
    model = empty_part(preset_config(preset), preset).to(dtype).to_empty(device=device)
    return model.fill_random(seed)


def follow_first(model):
    """Makes a draft model, which every rank has whole, give the logits of rank 0 everywhere: another rank's GPU may round otherwise."""
    if ranks() > 1:
        model.register_forward_hook(lambda module, inputs, logits: talk(dist.broadcast, logits, 0))


def count_together(model):
    """Adds up what the sparse linears of all ranks have counted, so that realised_sparsity is that of the whole model."""
    if ranks() > 1 and hasattr(model, "sparse_state"):
        talk(dist.all_reduce, model.sparse_state.counts)
