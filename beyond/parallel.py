"""One model on several GPUs: tensor parallelism.

Llama-2-70B in bfloat16 is 138 GB, more than a GPU holds, and one token reads all of it. N
processes, the ranks, each with a GPU of its own, hold and read 1/N each. A matrix can be split in
two ways, and what the first has computed the second can use where it lies:

    by output   y = W x     each rank has some rows of W, reads all of x, and has those entries of y
    by input    y = W x     each rank has some columns of W, reads those entries of x, and has a
                            part of the sum for all of y

    x, the same on all ranks
    │   rank 0:  q k v of its heads ─► attention ─► its columns of o_proj ─┐
    ├── rank 1:  q k v of its heads ─► attention ─► its columns of o_proj ─┴─ all-reduce ─► x, the
    │                                                                         same on all ranks

q, k, v, gate and up are split by output, o and down, which read what these compute, by input. Then
one all-reduce is needed for attention and one for the MLP, two a block. (Megatron-LM, arXiv
1909.08053, section 3.) A rank attends with its own heads, so the KV cache is split by itself. The
head is split by output, and its logits are gathered; every rank has the embedding. Whether channel
i of o_proj is kept is asked by the rank that holds it: together the ranks keep exactly the channels
that one process keeps.

Every rank runs the same program, and the logits they gather are the same to the last bit, so all
choose the same tokens. What could differ, as a random seed, a line of input or a draft model that
each has whole, is taken from rank 0, which alone prints. When a rank ends, the others meet an error
in their next collective and end too. (So with gloo, where it is tested. In a replayed CUDA graph a
GPU waits for the rank that is gone: there torchrun ends the others.)

The seam: this file is a `maker` for `folders.load_model`, with `from_pretrained` and `random`. What
the ranks say to each other hangs on a model as forward hooks, which record.py sees and steps aside.

    torchrun --nproc-per-node=2 -m beyond --model FOLDER --sparsity 0.5
"""
import contextlib
import datetime
import os
import sys
import time
import traceback
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.distributed.nn.functional           # noqa: F401 (before there is a group: see there)

import model as core
from beyond import folders
from model import (EMBEDDING, HEAD, Head, InputError, Llama, checked_shards, checkpoint_dtype,
                   find_device, preset_config, put, require)

BY_OUTPUT = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"}
BY_INPUT = {"o_proj", "down_proj"}
PATIENCE = datetime.timedelta(minutes=10)        # for another rank, which may be loading still
GRACE = 5                                        # seconds in which rank 0 says what all ranks met
objects = None           # the ranks once more, as a group for Python objects and patient: rank 0
                         # may wait for a person there


# --------------------------------------------------------------------------------------------------
# The ranks

def ranks():
    """Return how many processes share the work: 1 where torchrun started none."""
    return number("WORLD_SIZE", 1)


def rank():
    """Return which of them this is."""
    return number("RANK", 0)


def number(name, default):
    """Return a whole number of the environment, as torchrun sets it; InputError for another."""
    value = os.environ.get(name, str(default))
    require(value.isdecimal(), f"{name} is {value!r} in the environment, expected a whole number, "
                               f"as torchrun sets it, or nothing at all")
    return int(value)


def first_line(error):
    return str(error).splitlines()[0]


@contextlib.contextmanager
def group(device):
    """Join the ranks, and yield this one's device; with one process, yield `device` as it is.

    device: "cpu" (the ranks talk through gloo), or "cuda", of which each takes its own (NCCL).
    Inside, rank 0 alone prints. Raises InputError if the others do not come.
    """
    if ranks() == 1:
        yield device
        return
    backend = "gloo"
    if find_device(device).type == "cuda":
        backend = "nccl"
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(find_device(device))
    global objects
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
        objects = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes cannot be joined: {first_line(error)}") from None
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(
            nowhere if rank() > 0 else sys.stdout):
        yield device
    # A thread of gloo that lets go of a tensor needs the lock of the Python interpreter. If the
    # interpreter is ending, that aborts the process: "terminate called without an active exception"
    # (PyTorch issue 190489). So no thread of gloo may live that long. They are joined when the last
    # reference to their group is given up. `objects` is one; destroy_process_group gives up
    # PyTorch's own; a third, group=group.WORLD, is a default argument in a file that PyTorch
    # imports with the first meta tensor: so that file is imported above, before there is a group.
    # After an error nothing is destroyed, for it would wait for ranks that are gone: see
    # command_line.
    objects = None
    dist.destroy_process_group()


def command_line(main):
    """Run `main` as model.command_line does, which does this with one process.

    An error that all ranks meet is reported by rank 0, and the others wait for it to exit: then
    torchrun ends them. One that rank 0 does not meet is reported by those that do, a bit later.
    """
    def waiting():
        try:
            main()
        except (InputError, OSError):
            if rank() > 0:
                time.sleep(GRACE)
            raise

    status = 0
    try:
        core.command_line(waiting)
    except SystemExit as ended:
        status = ended.code or 0
    except Exception:
        traceback.print_exc()
        status = 1
    if dist.is_initialized():            # an error has left `group`, where threads may still wait
        sys.stdout.flush()               # for a rank that is gone: an orderly end would abort
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def talk(collective, *arguments):
    """Call one of torch.distributed's collectives; raise InputError if another rank is gone."""
    try:
        collective(*arguments)
    except RuntimeError as error:
        raise InputError(f"rank {rank()}: another process has ended or does not answer: "
                         f"{first_line(error)}") from None


def from_first(ask):
    """Return, on every rank, what ask() is on rank 0, where alone it is called: any object."""
    if ranks() == 1:
        return ask()
    box = [ask() if rank() == 0 else None]
    talk(dist.broadcast_object_list, box, 0, objects)
    return box[0]


# --------------------------------------------------------------------------------------------------
# A rank's part of a model

def rows_of(outputs):
    """Return how many outputs of a linear each rank has; the last ranks may fill up with zeros."""
    return -(-outputs // ranks())


def part_of(name, tensor):
    """Return this rank's part of the tensor that a checkpoint calls `name`.

    tensor: (out, in) or (out,) of a linear; what is no linear's is whole on every rank.
    """
    linear = name.split(".")[-2]
    if linear in BY_OUTPUT:
        rows = rows_of(len(tensor))
        part = tensor[rank() * rows:][:rows]
        missing = rows - len(part)       # of a vocabulary that does not divide
        return torch.cat((part, part.new_zeros(missing, *part.shape[1:]))) if missing else part
    if linear in BY_INPUT and tensor.ndim == 2:
        return tensor.tensor_split(ranks(), 1)[rank()]
    if linear in BY_INPUT and rank() > 0:
        return torch.zeros_like(tensor)  # a bias is added once
    return tensor


def part_of_thresholds(thresholds):
    """Return this rank's part of thresholds, as sparsify takes them.

    o and down read a part of the channels; a threshold one a channel is split as they are.
    """
    if ranks() == 1:
        return thresholds
    return {name: threshold.tensor_split(ranks())[rank()]
            if name.split(".")[-1] in BY_INPUT and getattr(threshold, "ndim", 0) else threshold
            for name, threshold in thresholds.items()}


def empty_part(config, name):
    """Return a Llama on the meta device with this rank's linears, and the ranks' talk built in."""
    own = {}
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        whole = getattr(config, key)
        require(whole % ranks() == 0,
                f"{name}: {key} is {whole}, which {ranks()} processes cannot share evenly")
        own[key] = whole // ranks()
    untied = replace(config, tie_word_embeddings=False)    # the head is a part of the embedding
    model = Llama.shapes(replace(untied, **own))
    model.config = untied
    model.lm_head = Head(config.hidden_size, rows_of(config.vocab_size), bias=False, device="meta")
    for block in model.model.layers:
        for module in (block.self_attn, block.mlp):
            module.register_forward_hook(lambda module, inputs, y: summed(y))
    model.register_forward_hook(
        lambda module, inputs, logits: gathered(logits)[..., :config.vocab_size])
    return model


def summed(y):
    """Return the sum of all ranks' y, in its place."""
    talk(dist.all_reduce, y)
    return y


def gathered(logits):
    """Return the logits (B, T, vocab / ranks) of every rank side by side, (B, T, vocab)."""
    parts = [torch.empty_like(logits) for _ in range(ranks())]
    talk(dist.all_gather, parts, logits.contiguous())
    return torch.cat(parts, -1)


def from_pretrained(folder, device="cpu", dtype=None):
    """Return this rank's part of the Llama in a checkpoint folder; as Llama.from_pretrained.

    Of tensors split by output it reads its own rows alone. Of those split by input it reads its
    columns, and on a disk their neighbours with them, as lines of a file are shorter than its
    pages; ranks of one machine share what was read.
    """
    require(not folders.is_quantized(folder), f"{folder}: quantized folders are not split; take "
                                              f"the unquantized one, with --quantize")
    config = folders.read_config(folder)
    dtype = dtype or checkpoint_dtype(folder)
    model = empty_part(config, folder)
    for path, tensors in checked_shards(folder, Llama.shapes(config)):
        for name, tensor in tensors.items():
            tied = name == EMBEDDING and config.tie_word_embeddings
            for place in (name, HEAD) if tied else (name,):
                put(model, place, part_of(place, tensor), path, device, dtype)
    return model.eval()


def random(preset, device="cpu", dtype=torch.bfloat16, seed=0):
    """Return a rank's part of a Llama of a preset's shapes, for speed; as Llama.random."""
    model = empty_part(preset_config(preset), preset).to(dtype).to_empty(device=device)
    return model.fill_random(seed)


def follow_first(model):
    """Make a draft model, which every rank has whole, give the logits of rank 0 everywhere.

    Another rank's GPU may round otherwise.
    """
    if ranks() > 1:
        model.register_forward_hook(
            lambda module, inputs, logits: talk(dist.broadcast, logits, 0))


def mean(share):
    """Return the mean of a number over the ranks, whose parts of a model are equally large."""
    if ranks() == 1:
        return share
    total = torch.tensor(share, dtype=torch.float64)
    talk(dist.all_reduce, total, dist.ReduceOp.SUM, objects)
    return total.item() / ranks()
