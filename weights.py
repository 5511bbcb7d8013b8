"""Weight files, read without trusting them: safetensors and PyTorch checkpoints.

Read it in this order:
  1. Reading safetensors   names, shapes and raw numbers; the file holds no code
  2. Writing safetensors   tensors are written as float32
  3. Checkpoints           `read_weights` takes a file or a folder, in either format

Inside this file, a ValueError says what is wrong with a weight file. `read_safetensors` turns it
into a UserError, which also names the file; `write_safetensors` and `read_weights` raise only
UserErrors.
"""
import json
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from run import UserError, check_is_file, first_sentence, is_out_of_memory

# ---- 1. Reading safetensors --------------------------------------------------
# The format: 8 bytes give the header's length. The JSON header gives each tensor's dtype, shape
# and byte range. The bytes follow. Every number in the header is checked against the file's size
# before it is used.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
MAX_HEADER = 100_000_000  # bytes, the limit of the reference implementation; GPT-2 has 14,283
MAX_DIMENSIONS = 8        # no real model has more


@dataclass
class StoredTensor:
    """Where one tensor lies in a safetensors file: bytes `begin` to `end`, counted from 0."""
    name: str
    dtype: torch.dtype
    shape: list[int]
    begin: int
    end: int


def read_safetensors(path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file by name. Raises UserError.

    The tensors are views of the mapped file where the file aligns them, so reading takes no
    memory until they are used. GPT-2's own file does not align them, so they are copied.
    """
    try:
        stored = locate_tensors(Path(path))
        # A private map: pages are read on use, and writing to them never reaches the file.
        content = torch.from_file(str(path), shared=False, size=Path(path).stat().st_size,
                                  dtype=torch.uint8)  # (bytes of the file,)
        tensors = {}
        for tensor in stored:
            raw = content[tensor.begin:tensor.end]  # (bytes of the tensor,)
            if tensor.begin % tensor.dtype.itemsize:
                raw = raw.clone()  # torch cannot view unaligned bytes as numbers
            if tensor.dtype == torch.bool:
                numbers = raw != 0  # a view would let bytes other than 0 and 1 through
            else:
                numbers = raw.view(tensor.dtype)
            tensors[tensor.name] = numbers.reshape(tensor.shape)
        return tensors
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RuntimeError) as error:  # RuntimeError: torch cannot map the file
        why = str(error).splitlines()[0]
        raise UserError(f"{path} is not a usable safetensors file: {why}") from None


def locate_tensors(path: Path) -> list[StoredTensor]:
    """Read and check the header. Raises ValueError unless every byte after the header belongs to
    exactly one tensor."""
    file_end = path.stat().st_size
    header, data_begin = read_header(path, file_end)
    stored = []
    for name, entry in header.items():
        stored.append(check_entry(name, entry, data_begin, file_end))

    # The format allows neither gaps nor overlaps. Bytes that no tensor claims could hide
    # something, and tensors that share bytes would make a small file claim much memory.
    position = data_begin
    for tensor in sorted(stored, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin < position:
            raise ValueError(f"{tensor.name[:80]!r} overlaps another tensor")
        if tensor.begin > position:
            raise ValueError(f"there is a hole before {tensor.name[:80]!r}")
        position = tensor.end
    if position != file_end:
        raise ValueError(f"{file_end - position:,} bytes at its end belong to no tensor")
    return stored


def read_header(path: Path, size: int) -> tuple[dict, int]:
    """Returns (the header without its metadata, the position of the first byte after it)."""
    if not path.is_file():
        raise ValueError("it is not a file")
    with open(path, "rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        if n_header > min(size - 8, MAX_HEADER):
            raise ValueError(f"it has {size:,} bytes, but claims a header of {n_header:,}")
        text = file.read(n_header)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=refuse_double_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    return header, 8 + n_header


def refuse_double_keys(pairs: list[tuple]) -> dict:
    """By default json takes the last of two equal keys. Another reader may take the first one,
    and would see a different file."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key occurs twice")
    return entries


def check_entry(name: str, entry, data_begin: int, file_end: int) -> StoredTensor:
    """Check one tensor's entry in the header. Its offsets count from the end of the header."""
    label = repr(name[:80])
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{label} has no known dtype")
    if not is_whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(
            f"the shape of {label} is not a list of up to {MAX_DIMENSIONS} whole numbers")
    if not is_whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"the offsets of {label} are not a begin and an end")
    begin, end = data_begin + offsets[0], data_begin + offsets[1]
    if end > file_end:
        raise ValueError(f"{label} ends beyond the file, which may be an incomplete download")
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"the offsets of {label} do not fit its shape")
    return StoredTensor(name, DTYPES[dtype], shape, begin, end)


def is_whole_numbers(value) -> bool:
    """Whether value is a list of ints from 0 to 2^60. `type` is compared because True is an int
    in Python, too."""
    if not isinstance(value, list):
        return False
    return all(type(number) is int and 0 <= number < 2**60 for number in value)


# ---- 2. Writing safetensors --------------------------------------------------


def write_safetensors(path, tensors: dict[str, torch.Tensor]):
    """Write tensors as float32, to a temporary file that then replaces `path`. Raises UserError.

    One tensor is copied at a time, so a model of 6 GB needs no second 6 GB. (`write_atomically`
    would need all the bytes at once.)
    """
    path = Path(path)
    header = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the numbers, so that a reader can map them
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                file.write(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        if temporary.exists():
            temporary.unlink()


# ---- 3. Checkpoints ----------------------------------------------------------


def read_weights(path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint: a file, or a folder that holds model.safetensors or
    pytorch_model.bin. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        path = find_weights(path)
    check_is_file(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        size = path.stat().st_size
        # With weights_only, nothing in a pickle can run. Files from before PyTorch 1.6 are not
        # zip files, and cannot be mapped.
        tensors = torch.load(path, map_location="cpu", weights_only=True,
                             mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # a truncated zip, a pickle with code, ...: torch raises many types
        if is_out_of_memory(error):
            raise
        why = first_sentence(error)
        raise UserError(f"{path} is not a usable checkpoint ({why})") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise UserError(f"{path} does not hold a dictionary of tensors")
    for name, tensor in tensors.items():
        if not is_plain_tensor(tensor, max_bytes=size):
            raise UserError(f"{path} does not hold a plain tensor under {name[:80]!r}")
    return tensors


def find_weights(folder: Path) -> Path:
    """The weight file in a folder; safetensors is preferred."""
    files = [folder / "model.safetensors", folder / "pytorch_model.bin"]
    for file in files:
        if file.exists():
            return file
    for file in files:
        if Path(f"{file}.index.json").exists():
            raise UserError(f"{folder} holds a checkpoint in several files, which is not "
                            "supported: save it as one file")
    raise UserError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def is_plain_tensor(value, max_bytes: int) -> bool:
    """Whether value is a dense CPU tensor of at most `max_bytes`. With strides of 0 a file of
    1 kB can claim a petabyte, which a copy of the tensor would then allocate."""
    if not isinstance(value, torch.Tensor):
        return False
    if value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() <= max_bytes
