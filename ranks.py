"""Several GPUs: torchrun starts one process for each, and together they train as one.

    torchrun --standalone --nproc-per-node 4 train_rl.py --preset gpt2-hh

A reader of the paper can skip this file. With a single process, no function here changes anything.

A RANK is one of the N processes. Every rank holds all the networks, reads all the data and makes
the same random choices. The work on a batch is divided: a rank samples, scores or trains on its
share of the rows, and the results, or the gradients, are added up over the ranks. Random numbers
belong to responses and not to ranks, and each loss is divided by the tokens of the whole batch. So
N ranks make the same run as one, up to rounding, for any N and any size of a batch, and --resume
may continue with another N. (The exception is SFT's dropout, whose masks depend on how the rows are
divided.) Only rank 0 writes files and prints (run.is_first).

Read it in this order:
  1. Work       a rank's share, and sums over the ranks
  2. Agreement  ranks wait for each other, and must not drift apart
  3. Command    how the processes find each other, and fail as one

torch.distributed does the work, with NCCL between GPUs and gloo between CPUs.
"""
import atexit
import contextlib
import dataclasses
import json
import os
import sys
import time
from datetime import timedelta

from run import TrainingError, UserError, first_sentence, flag, is_first, is_out_of_memory

import torch
import torch.distributed as dist

from data import batches_by_length

# When one rank ends, the others end at once: gloo notices, and torchrun ends those that wait in
# NCCL. This is how long they wait for a rank that hangs, or for rank 0 while it downloads or writes
# a large file.
TIMEOUT = timedelta(hours=1)

# ---- 1. Work -----------------------------------------------------------------


def n_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if n_ranks() > 1 else 0


def share(lengths: list[int]) -> list[int]:
    """The indices of this rank's share of some rows, in ascending order; perhaps []. Rows are dealt
    like cards, sorted by length, so all shares have about as many rows and about as many tokens."""
    if n_ranks() == 1:
        return list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return sorted(order[dist.get_rank()::n_ranks()])


def own_batches(lengths: list[int], token_budget: int) -> list[list[int]]:
    """This rank's share, in batches that fit one forward pass (data.batches_by_length)."""
    own, batches = share(lengths), []
    for batch in batches_by_length([lengths[i] for i in own], token_budget):
        batches.append([own[j] for j in batch])
    return batches


def add_up(tensor):
    """Replace a tensor by the sum of the ranks' tensors, and return it. Where each rank has filled
    in its own share and left zeros elsewhere, this puts the shares together without rounding."""
    if n_ranks() > 1:
        with others_are_there():
            dist.all_reduce(tensor)
    return tensor


def add_up_gradients(*networks):
    """Add up the gradients over the ranks. A rank whose share was empty adds zeros."""
    if n_ranks() == 1:
        return
    for network in networks:
        for parameter in network.parameters():  # the same order on all ranks
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            add_up(parameter.grad)


def add_up_numbers(numbers: dict[str, float]) -> dict[str, float]:
    """Add up numbers by name. A rank whose share was empty may lack them."""
    sums = {}
    for of_rank in gather(numbers):
        for name, number in of_rank.items():
            sums[name] = sums[name] + number if name in sums else number
    return sums


# ---- 2. Agreement ------------------------------------------------------------


def gather(thing) -> list:
    """What each rank gives, in the order of ranks, on every rank."""
    things = [thing] * n_ranks()
    if n_ranks() > 1:
        with others_are_there():
            dist.all_gather_object(things, thing)
    return things


def wait():
    """Wait until all ranks are here, for example before they read what rank 0 has written."""
    gather(None)


def first_alone(function, *args):
    """Call a function on rank 0, then on the others, which find what rank 0 has downloaded."""
    if not is_first():
        wait()
    result = function(*args)
    if is_first():
        wait()
    return result


def check_equal(networks: dict):
    """Stop if the ranks' networks are no longer the same. They must be, bit for bit: they began
    alike, and every rank takes the same step with the same sum of gradients."""
    if n_ranks() == 1:
        return
    checksums = {}
    for name, network in networks.items():
        if isinstance(network, torch.nn.Module):
            total = sum(p.detach().sum(dtype=torch.float64) for p in network.parameters())
            checksums[name] = repr(total.item())  # as text, NaN equals itself
    if any(other != checksums for other in gather(checksums)):
        raise TrainingError("the processes hold different weights; the last checkpoint is kept. "
                            "Use the same GPUs and the same PyTorch everywhere")


@contextlib.contextmanager
def others_are_there():
    """Turn a failed exchange with the other ranks into one sentence."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error) or "CUDA error" in str(error):  # this rank's own failure
            raise
        raise TrainingError("another process has ended, or does not answer; --resume continues "
                            "from the last checkpoint") from None


# ---- 3. Command --------------------------------------------------------------


def together(command):
    """A command as each of torchrun's processes runs it. Without torchrun, the command itself.

    From here on only rank 0 prints. The first rank that fails says why. Other ranks then fail
    because it is gone, and say nothing. torchrun ends those that still run."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ:
        return command
    if os.environ["RANK"] != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w")

    def on_every_rank(**options):
        store = join()
        try:
            check_same(options)
            command(**options)
            wait()  # rank 0 may hold the store that the others still use
        except BaseException as error:
            atexit.register(leave_at_once)
            if not is_first_to_fail(store):
                time.sleep(1)  # until the first one has said why
                sys.exit(2)
            sys.stderr = sys.__stderr__
            explain_to_torchrun(error)
            raise
        dist.destroy_process_group()
    return on_every_rank


def leave_at_once():
    """End this process as it is. Its exchange with the others is broken, and taking that apart in
    order can crash the process after its last words."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(2)


def join():
    """Meet the other processes. Returns torch's key-value store, which they all can reach."""
    if not dist.is_available() or not dist.is_gloo_available():
        raise UserError("this PyTorch cannot connect processes (it lacks gloo): leave out torchrun")
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        store, rank, n = next(dist.rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=TIMEOUT,
                                store=store, rank=rank, world_size=n)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes cannot connect ({first_sentence(error)}): start them with "
                        "torchrun --standalone, which finds a free port") from None
    return store


def check_same(options: dict):
    """Raise UserError if the ranks were started with other options."""
    named = {}
    for prefix, config in options.items():
        for name, value in dataclasses.asdict(config).items():
            named[flag(f"{prefix}.{name}")] = value
    for rank, others in enumerate(gather(named)):
        for name, value in named.items():
            if others.get(name) != value:
                raise UserError(f"all processes need the same options: {name} is {value!r} in one "
                                f"and {others.get(name)!r} in process {rank}")


def device(name: str) -> str:
    """The device of this rank, where --device says `name`: each takes a GPU of its own."""
    if n_ranks() == 1:
        return name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    if name != "cuda":
        raise UserError(f"--device {name} is for one process; with torchrun use cuda or cpu")
    n_gpus = torch.cuda.device_count()
    if n_on_machine() > n_gpus:
        raise UserError(f"torchrun started {n_on_machine()} processes on a machine with {n_gpus} "
                        "GPUs: use a smaller --nproc-per-node, or --device cpu")
    return f"cuda:{os.environ['LOCAL_RANK']}"


def n_on_machine() -> int:
    """How many ranks share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", n_ranks())) if n_ranks() > 1 else 1


def is_first_to_fail(store) -> bool:
    try:
        return store.add("failures", 1) == 1
    except RuntimeError:  # the store is gone, and with it whoever could have said why
        return True


def explain_to_torchrun(error: BaseException):
    """torchrun closes with a long report of its own. Have it end with the sentence, too."""
    path, text = os.environ.get("TORCHELASTIC_ERROR_FILE"), f"{type(error).__name__}: {error}"
    if path:
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w") as file:
            json.dump({"message": {"message": text, "extraInfo": details}}, file)
