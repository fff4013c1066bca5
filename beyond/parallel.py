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

The logits they gather are the same to the last bit, so all ranks choose the same tokens. What could
differ, as a random seed, a line of input or a draft model that each has whole, is rank 0's, which
alone prints. When a rank ends, the others meet an error in their next collective and end too. (In a
replayed CUDA graph a GPU waits for the rank that is gone: there torchrun ends the others.)

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
import torch.nn.functional as F

import model as core
from beyond import folders
from model import (Head, InputError, Llama, find_device, in_memory, map_checkpoint, preset_config,
                   refusing, require)

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
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank():
    """Return which of them this is."""
    return int(os.environ.get("RANK") or 0)


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
    with refusing("the processes cannot be joined", RuntimeError, ValueError):
        dist.init_process_group(backend, timeout=PATIENCE)
        objects = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(
            nowhere if rank() > 0 else sys.stdout):
        yield device
    # A thread of gloo that lets go of a tensor while the Python interpreter is ending aborts the
    # process: "terminate called without an active exception" (PyTorch issue 190489). The threads
    # end with the last reference to their group. `objects` is one; destroy_process_group gives up
    # PyTorch's own; a third, group=group.WORLD, is a default argument in a file that is imported
    # with the first meta tensor: so it is imported above, before there is a group. After an error
    # nothing is destroyed, for it would wait for ranks that are gone: see command_line.
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
    with refusing(f"rank {rank()}: another process has ended or does not answer", RuntimeError):
        collective(*arguments)


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
    """Return how many outputs of a linear each rank has. Zeros fill up a vocabulary."""
    return -(-outputs // ranks())


def part_of(name, tensor):
    """Return this rank's part of the tensor that a checkpoint calls `name`.

    tensor: (out, in) or (out,) of a linear; what is no linear's is whole on every rank.
    """
    linear = name.split(".")[-2]
    if linear in BY_OUTPUT:
        rows = rows_of(len(tensor))
        part = tensor[rank() * rows:][:rows]
        return F.pad(part, (0, 0) * (part.ndim - 1) + (0, rows - len(part)))
    if linear in BY_INPUT and tensor.ndim == 2:
        return tensor.tensor_split(ranks(), 1)[rank()]
    if linear in BY_INPUT and rank() > 0:
        return torch.zeros_like(tensor)  # a bias is added once
    return tensor


def empty_part(config, name):
    """Return a Llama on the meta device with this rank's linears, and the ranks' talk built in."""
    own = {}
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        whole = getattr(config, key)
        require(whole % ranks() == 0,
                f"{name}: {key} is {whole}, which {ranks()} processes cannot share evenly")
        own[key] = whole // ranks()
    untied = replace(config, tie_word_embeddings=False)    # the head is a part of the embedding
    model = Llama.on_meta(replace(untied, **own))
    model.config = untied
    model.lm_head = Head(config.hidden_size, rows_of(config.vocab_size), bias=False, device="meta")
    for block in model.model.layers:
        for module in (block.self_attn, block.mlp):
            module.register_forward_hook(lambda module, inputs, y: talk(dist.all_reduce, y))
    model.register_forward_hook(
        lambda module, inputs, logits: gathered(logits)[..., :config.vocab_size])
    return model


def gathered(logits):
    """Return the logits (B, T, rows) of every rank side by side, (B, T, ranks * rows)."""
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
    whole = map_checkpoint(Llama.on_meta(folders.read_config(folder)), folder)
    model = empty_part(whole.config, folder).requires_grad_(False)
    parts = {name: part_of(name, tensor) for name, tensor in whole.state_dict().items()}
    model.load_state_dict(parts, assign=True)
    return in_memory(model, device, dtype)


def random(preset, device="cpu", dtype=torch.bfloat16):
    """Return a rank's part of a Llama of a preset's shapes, for speed; as Llama.random."""
    return empty_part(preset_config(preset), preset).fill_random(device, dtype)


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
