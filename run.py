"""Tools that every command needs: errors, options, randomness, devices and files. No RLHF.

This file imports no other file of the project. A reader of the paper can skip it. Read it in this
order:
  1. Errors       one sentence for the user's mistakes, and a stop before NaN reaches a checkpoint
  2. Options      a command line, with --help, made from dataclasses
  3. Randomness   every use has a generator of its own, named by what it is for
  4. Devices      CPU or GPU, and how much work to give it at once
  5. Checkpoints  plain dictionaries, written whole or not at all
"""
import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import inspect
import io
import json
import math
import os
import re
import stat
import sys
import textwrap
import zlib
from pathlib import Path
from random import Random

try:
    import fcntl
except ImportError:  # Windows: there, two processes on one file are not noticed
    fcntl = None


def _hide_traceback_of_ctrl_c(kind, error, traceback):
    """Ctrl-C is not an error. Python calls this when an exception ends the program."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped; a training command continues with --resume", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _hide_traceback_of_ctrl_c  # before the import of torch, which takes a second
# Read when torch is imported: operations that a Mac's GPU lacks run on its CPU, with a warning.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import torch
import torch.distributed as dist
from tqdm import tqdm

# ---- 1. Errors ---------------------------------------------------------------


class UserError(Exception):
    """The user's mistake, described in one sentence. The commands print it and exit with status 2:
    a traceback would point at our code, not at the mistake."""


class TrainingError(Exception):
    """Training cannot go on: a loss is not finite, or an invariant of PPO does not hold."""


def check_finite(where: str, **numbers: float):
    """Stop before NaN or infinity gets into the weights, so that the last checkpoint stays good."""
    for name, number in numbers.items():
        if not math.isfinite(number):
            words = f"the {name.replace('_', ' ')} is {number}"
            raise TrainingError(f"{where}: {words}; the last good checkpoint is kept")


def first_sentence(error: Exception) -> str:
    """What a library's error says, in at most 100 characters; cut between words."""
    text = str(error).split("DefaultCPUAllocator: ")[-1]  # without the line of torch's C++ code
    lines = text.splitlines() or [type(error).__name__]
    return textwrap.shorten(lines[0].split(". ")[0], 100, placeholder=" ...")


# ---- 2. Options --------------------------------------------------------------

LARGEST_COUNT = 10**9  # of anything: a larger count is a typo


def options(description: str, configs: dict, presets: dict | None = None,
            may_be_zero: tuple[str, ...] = (), at_most_one: tuple[str, ...] = (),
            aliases: dict[str, str] | None = None) -> dict:
    """Parse the command line -> {prefix: an instance of its dataclass}.

    configs: {prefix: dataclass}. Field `lr` of the prefix "rl" becomes --rl.lr; the fields of "run"
    get no prefix. The comment after a field is its help text. An option for a list may be repeated.
    presets: {name: {"rl.lr": value, ...}}; options on the command line override it.
    may_be_zero, at_most_one: fields that may be 0, and fields that are at most 1. All numbers are
    above 0 otherwise, and whole numbers other than seeds are at most LARGEST_COUNT.
    aliases: second names of options, {"rl.lr": "--lr"}. Raises UserError for a number out of
    range."""
    presets, aliases = presets or {}, aliases or {}
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help,
                                     epilog=_describe(presets))
    for prefix, config in configs.items():
        group = parser.add_argument_group(prefix)
        comments = _comments(config)
        for field in dataclasses.fields(config):
            name, default = f"{prefix}.{field.name}", field.default
            flags = [flag(name)]
            if name in aliases:
                flags.append(aliases[name])
            if field.type is bool:
                kind = {"action": "store_true"}
            elif field.type is list:
                kind, default = {"action": "append", "metavar": "FILE"}, []
            else:
                kind = {"type": field.type, "metavar": field.type.__name__.upper()}
            group.add_argument(*flags, dest=name, default=default,
                               help=comments[field.name].replace("%", "%%"), **kind)
    given = vars(parser.parse_args())
    preset = given.get("run.preset")
    if preset:
        if preset not in presets:
            raise UserError(f"--preset {preset}: choose one of {', '.join(presets)}")
        # Parse again with the preset's values as defaults, so that explicit options win.
        applicable = {name: value for name, value in presets[preset].items() if name in given}
        parser.set_defaults(**applicable)
        given = vars(parser.parse_args())
    for name, value in given.items():
        _check_range(name, value, may_be_zero, at_most_one)
    result = {}
    for prefix, config in configs.items():
        values = {}
        for field in dataclasses.fields(config):
            values[field.name] = given[f"{prefix}.{field.name}"]
        result[prefix] = config(**values)
    return result


def flag(name: str) -> str:
    """For example, "rl.kl_coef" becomes "--rl.kl-coef", and "run.out" becomes "--out"."""
    return "--" + name.removeprefix("run.").replace("_", "-")


def _check_range(name: str, value, may_be_zero: tuple[str, ...], at_most_one: tuple[str, ...]):
    """Raise UserError if a number is outside its allowed range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    field = name.split(".")[1]
    is_share = field in at_most_one
    zero_is_fine = field in may_be_zero or name in may_be_zero
    big_enough = value > 0 or (zero_is_fine and value == 0)
    most = math.inf
    if is_share:
        most = 1
    elif isinstance(value, int) and field != "seed":
        most = LARGEST_COUNT
    if not math.isfinite(value):
        raise UserError(f"{flag(name)} {value}: must be a finite number")
    if big_enough and value <= most:
        return
    rule = "must be at least 0" if zero_is_fine else "must be above 0"
    if is_share:
        rule += " and at most 1"
    elif value > most:
        rule = f"must be at most {most:,}"
    raise UserError(f"{flag(name)} {value}: {rule}")


def _comments(config) -> dict[str, str]:
    """{field: the comment on its line}, for a dataclass and those it extends."""
    comments = {}
    for cls in reversed(config.__mro__[:-1]):
        # matches "    name: type = default  # comment"
        comments |= dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(cls), re.M))
    return comments


def _describe(presets: dict) -> str:
    lines = ["presets:"]
    for name, preset in presets.items():
        words = []
        for option, value in preset.items():
            words.append(flag(option) if value is True else f"{flag(option)} {value}")
        lines.append(f"  {name}: {' '.join(words)}")
    return "\n".join(lines)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints each option's default after its help, and each preset on a line of its own."""


def main(command, description: str, configs: dict, **rules):
    """Parse the options and run a command. `options` explains `configs` and `rules`."""
    with errors_in_one_sentence():
        command(**options(description, configs, **rules))


@contextlib.contextmanager
def errors_in_one_sentence():
    """A user's mistake, failed training or a lack of memory ends the program with one sentence and
    status 2. Other exceptions are bugs of ours, and keep their traceback."""
    name = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's stream is of another kind
            stream.reconfigure(errors="replace")  # a terminal without a character shows "?"
    try:
        yield
    except (UserError, TrainingError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"{name}: out of memory ({first_sentence(error)}): add --resume, which continues "
              "from the last checkpoint, and --recompute, a smaller token budget or fewer slots; "
              "or start over with a smaller --size (see --help)", file=sys.stderr)
        sys.exit(2)


def is_out_of_memory(error: Exception) -> bool:
    """Libraries say it in many ways. The words of torch's CPU allocator differ between systems
    ("can't allocate memory" on Linux)."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "DefaultCPUAllocator: " in str(error) or "out of memory" in str(error)


# ---- 3. Randomness -----------------------------------------------------------


def rng(seed: int, *name) -> Random:
    """A generator named by what it is for: rng(0, "prompts", iteration). A run that is resumed at
    iteration 30 draws what it would have drawn anyway, with no generator state to save."""
    return Random(zlib.crc32(repr((seed, *name)).encode()))


def torch_rng(seed: int, *name) -> torch.Generator:
    """The same for torch's random functions."""
    return torch.Generator().manual_seed(rng(seed, *name).getrandbits(62))


# ---- 4. Devices --------------------------------------------------------------


# Set by `choose_device`:
_precision = "auto"  # what --precision says
_gpu_tokens = 16384  # tokens of one forward pass on a GPU


def choose_device(name: str, precision: str = "auto") -> torch.device:
    """The named device; for "auto" an NVIDIA GPU if there is one, else the CPU. Sets the precision
    of its arithmetic. Raises UserError if the device or the precision is not available."""
    global _precision, _gpu_tokens
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} is not available here; use cpu, cuda, mps or auto")
    if precision not in ("auto", "bf16", "float32"):
        raise UserError(f"--precision {precision}: choose auto, bf16 or float32")
    if precision == "bf16" and device.type != "cuda":
        raise UserError("--precision bf16 needs an NVIDIA GPU; leave it out")
    _precision = precision
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # streams and graphs are made on the current device
        # cuDNN's attention plans anew for each new shape, and here nearly every batch has one.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # The products that stay in float32, above all the logits, may round their inputs to TF32's
        # 10 bits. Their results are float32, unlike bf16's.
        torch.set_float32_matmul_precision("high")
        # 512 tokens for each GiB that is free, in powers of two, so that a few MiB change nothing.
        # (16,384 tokens of GPT-2 take some 5 GB in the update.)
        gib = max(1, torch.cuda.mem_get_info()[0] // 2**30)
        _gpu_tokens = min(16384, 512 * 2 ** (gib.bit_length() - 1))
    return device


def compute_dtype(device) -> torch.dtype:
    """The dtype of most matrix products: bf16 on a GPU that has it in hardware (a T4 only imitates
    it, slowly), else float32. --precision overrides it on a GPU."""
    if torch.device(device).type != "cuda" or _precision == "float32":
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 or _precision == "bf16" else torch.float32


def autocast(device):
    """Matrix products in `compute_dtype`. Losses are float32 in any case."""
    is_enabled = compute_dtype(device) == torch.bfloat16
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=is_enabled)


def tokens_at_once(budget: int, device) -> int:
    """Tokens of one forward pass: `budget`, where 0 picks a fast default. On a CPU the activations
    should stay in its caches, and small batches have few pads (the toy's PPO update took 0.86 of
    the time at 1,024 tokens that it took at 2,048), but a step of the toy's LM, 1,280 tokens, is
    faster in one piece. A GPU needs large batches to be busy."""
    if budget:
        return budget
    return 1280 if torch.device(device).type == "cpu" else _gpu_tokens


def logits_at_once(budget: int, device) -> int:
    """Logits of one chunk: `budget`, where 0 picks a fast default. On a CPU that is 32 MiB: the
    allocator returns larger blocks to the system and fetches them anew each time (with GPT-2's
    vocabulary, distillation took 0.55 of the time that 64 MiB took)."""
    if budget:
        return budget
    return 2**23 if torch.device(device).type == "cpu" else 2**26


def progress(items, what: str, unit: str):
    """The items, with a progress bar if they take more than two seconds; no bar in a log file."""
    return tqdm(items, desc=what, unit=f" {unit}", leave=False, delay=2, disable=None)


# ---- 5. Checkpoints ----------------------------------------------------------


def is_first() -> bool:
    """Whether this process writes: the first of several (ranks.py), or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def lock(file) -> bool:
    """Lock an open file, until it is closed or this process ends or dies. False if another process
    has locked it. A disk without locks, or Windows, locks nothing."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def write_jsonl(path, rows: list[dict]):
    """Replace `path` by one JSON object a line; a name that ends with .gz is compressed."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if str(path).endswith(".gz"):
        data = gzip.compress(data, mtime=0)  # no time in the file: the same rows, the same bytes
    write_atomically(path, data)


def write_atomically(path, data: bytes):
    """Replace `path` by `data` in one step: readers see the old file or the whole new one. The
    bytes go to a temporary name first; renaming within a folder is a single step."""
    if not is_first():
        return
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()  # frees space on a full disk
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def save(path: Path, **content):
    """Write a checkpoint. If this fails or is killed, the old file stays intact."""
    if not is_first():
        return
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def check_is_file(path):
    """Raise UserError unless `path` is a regular file. Reading a pipe might wait forever, and
    reading a device might never end."""
    try:
        is_file = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not is_file:
        raise UserError(f"{path} is not a file")


def read_text(path) -> str:
    check_is_file(path)
    try:
        return Path(path).read_text("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def load(path: Path) -> dict:
    """Read a checkpoint to the CPU. Nothing in it can run code (weights_only)."""
    check_is_file(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        reason = f"it holds a {type(saved).__name__}"
    except Exception as error:  # a truncated zip, a pickle with code, ...: torch raises many types
        if is_out_of_memory(error):
            raise
        saved = None
        reason = first_sentence(error)
    if not isinstance(saved, dict):
        raise UserError(f"{path} is not a checkpoint of this project ({reason})")
    return saved


def file_hash(paths) -> str:
    """One short hash for each file, joined by spaces; "" if there are no files."""
    hashes = []
    for path in paths:
        check_is_file(path)
        try:
            hashes.append(hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16])
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
    return " ".join(hashes)
