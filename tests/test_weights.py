"""Tests of weights.py. The files are made here, byte by byte."""
import json
import math
import os
import random
import struct

import pytest
import torch

from run import UserError
from weights import read_safetensors, read_weights, write_safetensors

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
         torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
         torch.uint8: "U8", torch.bool: "BOOL"}


def pack(header, data=b"") -> bytes:
    """A safetensors file; `header` is JSON, or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def stored(tensors: dict, pad=0) -> bytes:
    """A safetensors file of these tensors, with `pad` spaces behind the header."""
    header, data = {}, b""
    for name, t in tensors.items():
        raw = t.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return pack(json.dumps(header).encode() + b" " * pad, data)


def one(n=8, **fields) -> bytes:
    """A file with `n` bytes of data and one tensor, float32 of shape [2] but for `fields`."""
    fields = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields
    return pack({"a": {key: value for key, value in fields.items() if value != "none"}}, bytes(n))


def two(a: list, b: list, n: int) -> bytes:
    """A file with `n` bytes of data and two tensors with these offsets; b comes first."""
    header = {"b": {"dtype": "U8", "shape": [b[1] - b[0]], "data_offsets": b},
              "__metadata__": {"format": "pt"},
              "a": {"dtype": "U8", "shape": [a[1] - a[0]], "data_offsets": a}}
    return pack(header, bytes(range(n)))


def refused(function, *args, **kwargs) -> str:
    """The one sentence that a call is refused with."""
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 700
    return message


# ---- Safetensors -------------------------------------------------------------


@pytest.mark.parametrize("pad", range(8))
def test_reads_every_dtype_at_every_alignment(tmp_path, pad):
    tensors = {name: (torch.randn(3, 5) * 50).to(dtype) for dtype, name in NAMES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4),
                "odd": torch.ones(3).char(), "after": torch.tensor([1e-30, 7.0]).double()}
    (tmp_path / "a.safetensors").write_bytes(stored(tensors, pad))
    read = read_safetensors(tmp_path / "a.safetensors")
    assert list(read) == list(tensors)
    for name, t in tensors.items():
        assert read[name].dtype == t.dtype and torch.equal(read[name], t), name


A = b'{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
HOSTILE = [  # why it is refused, and files
    ("claims a header", b"", b"\x02\0\0", b"\xff" * 8 + b"{}", struct.pack("<Q", 3) + b"{}"),
    ("header is not JSON", pack(b'{"\xff": 1}'), pack('{"a": {}}'.encode("utf-16")), pack(b""),
     pack(b"{'a': 1}"), pack(b"[" * 200_000), pack(b'{"a": ' + b"9" * 5000 + b"}")),
    ("header is not a JSON object", pack([{}]), pack(b"null")),
    ("key occurs twice", pack(b'{"a": %s, "a": %s}' % (A, A), bytes(8)),
     pack(b'{"a": {"shape": [9], %s}' % A[1:], bytes(8))),
    ("'a' has no known dtype", pack({"a": 3}), one(dtype="F31"), one(dtype=["F32"]),
     one(dtype="none")),
    # Sizes that are text, negative, fractional, true, NaN or huge, and too many of them.
    ("shape of 'a' is not a list", one(shape="none"), one(shape="2"), one(shape=[-1, -2]),
     one(shape=[2.0]), one(shape=[True, 2]), one(shape=[math.nan]), one(shape=[1] * 8 + [2]),
     one(0, shape=[0, 2**62], data_offsets=[0, 0])),
    ("offsets of 'a' are not a begin and an end", one(data_offsets="none"),
     one(data_offsets=[0, 4, 8]), one(data_offsets=[-8, 0]), one(data_offsets=[8, 0])),
    ("'a' ends beyond the file", one(7)),
    ("offsets of 'a' do not fit its shape", one(shape=[1]), one(dtype="F64"),
     one(0, shape=[2**32, 2**32], data_offsets=[0, 0])),  # a product that wraps around 2^64
    ("'b' overlaps", two([0, 8], [4, 12], 12)), ("overlaps", two([0, 8], [0, 8], 8)),
    ("hole before 'a'", one(12, data_offsets=[4, 12])),
    ("hole before 'b'", two([0, 8], [12, 20], 20)),
    ("3 bytes at its end", one(11))]


@pytest.mark.parametrize("case", HOSTILE, ids=[case[0] for case in HOSTILE])
def test_refuses_a_hostile_safetensors_file(tmp_path, case):
    why, *files = case
    for content in files:
        (tmp_path / "a.safetensors").write_bytes(content)
        message = refused(read_safetensors, tmp_path / "a.safetensors")
        assert str(tmp_path / "a.safetensors") in message and why in message


@pytest.mark.parametrize("content, expected", [
    (pack(b"{}"), {}), (one(shape=[1] * 7 + [2]), {"a": [[[[[[[[0, 0]]]]]]]]}),
    (two([0, 8], [8, 16], 16), {"b": [*range(8, 16)], "a": [*range(8)]}),  # in any order
    (two([0, 0], [0, 8], 8), {"b": [*range(8)], "a": []}),
    (one(dtype="BOOL", shape=[8]).replace(bytes(8), bytes(range(8))), {"a": [False] + [True] * 7})])
def test_the_cases_above_are_refused_for_what_is_wrong_with_them(tmp_path, content, expected):
    (tmp_path / "a.safetensors").write_bytes(content)
    read = read_safetensors(tmp_path / "a.safetensors")
    assert {name: t.tolist() for name, t in read.items()} == expected
    for t in read.values():  # a byte above 1 is no third truth value
        assert t.dtype != torch.bool or t.view(torch.uint8).max() == 1


def test_large_claims_allocate_nothing(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    with open(file, "wb") as f:
        f.write(struct.pack("<Q", 100_000_001) + b"{}")
        f.truncate(200_000_000)  # sparse: takes no room on the disk
    assert "claims a header of 100,000,001" in refused(read_safetensors, file)
    file.write_bytes(one(shape=[2**48], data_offsets=[0, 2**50]))
    for name in ("from_file", "empty", "zeros", "frombuffer"):
        monkeypatch.setattr(torch, name, None)  # a call would raise a TypeError
    assert "ends beyond the file" in refused(read_safetensors, file)


def test_a_damaged_file_gives_a_sentence_or_tensors_within_the_file(tmp_path):
    """Cut anywhere, or with a few wrong bytes: over a second, for some 600 files."""
    whole = stored({"a": torch.randn(2, 3), "b": torch.arange(4, dtype=torch.int16)})
    file, rng, n_read = tmp_path / "a.safetensors", random.Random(0), 0
    for n in range(len(whole)):
        file.write_bytes(whole[:n])
        refused(read_safetensors, file)
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(whole) - 32)] = rng.choice(b'0123456789[]{}",: eE-\x00\xffF')
        file.write_bytes(damaged)
        try:
            read = read_safetensors(file)
        except UserError:
            continue
        n_read += 1  # a name or a shape has changed, not the sizes
        assert sum(t.numel() * t.element_size() for t in read.values()) == 32
    assert 0 < n_read < 100


def test_what_is_written_is_read_and_the_file_stays_as_it_is(tmp_path, monkeypatch):
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(4, 6).t(), "c": torch.tensor(1.5),
               "d": torch.zeros(0, 3), "e": torch.ones(1000, dtype=torch.float64),
               "f": torch.ones(2, requires_grad=True)}
    file = tmp_path / "deep" / "a.safetensors"
    write_safetensors(file, tensors)
    before = file.read_bytes()
    assert int.from_bytes(before[:8], "little") % 8 == 0
    read = read_safetensors(file)
    for name, t in tensors.items():
        assert read[name].dtype == torch.float32 and torch.equal(read[name], t.float())
    read["e"].zero_()  # the map is private
    monkeypatch.setattr(os, "replace", lambda source, target: open("no such file"))  # OSError
    assert f"cannot write {file}: No such file" in refused(write_safetensors, file, tensors)
    assert file.read_bytes() == before and os.listdir(file.parent) == ["a.safetensors"]

    def no_room(*args, **kwargs):
        raise RuntimeError("unable to mmap\nC++ frames")
    monkeypatch.setattr(torch, "from_file", no_room)
    assert refused(read_safetensors, file).endswith("file: unable to mmap")


# ---- Checkpoints -------------------------------------------------------------


class Code:
    """Unpickling this creates the file "ran"."""
    def __reduce__(self):
        return open, ("ran", "w")


def test_a_folder_prefers_safetensors(tmp_path):
    assert "neither model.safetensors nor pytorch_model.bin" in refused(read_weights, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "several files" in refused(read_weights, tmp_path)
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert torch.equal(read_weights(tmp_path)["a"], torch.zeros(2))
    (tmp_path / "model.safetensors").write_bytes(stored({"a": torch.ones(2)}))
    assert torch.equal(read_weights(tmp_path)["a"], torch.ones(2))
    assert torch.equal(read_weights(tmp_path / "pytorch_model.bin")["a"], torch.zeros(2))
    for name in ("none", "none.safetensors"):
        assert "does not exist" in refused(read_weights, tmp_path / name)
    assert "not a file" in refused(read_safetensors, tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    file, tied = tmp_path / "pytorch_model.bin", torch.randn(40, 5)
    torch.save({"a": tied, "b": tied.t()}, file, _use_new_zipfile_serialization=zipped)
    read = read_weights(file)
    assert torch.equal(read["a"], tied) and torch.equal(read["b"], tied.t())
    whole = file.read_bytes()
    for n in range(0, len(whole), 97):
        file.write_bytes(whole[:n])
        assert str(file) in refused(read_weights, file)
    torch.save({"a": Code()}, file, _use_new_zipfile_serialization=zipped)
    assert str(file) in refused(read_weights, tmp_path) and os.listdir() == [file.name]
    torch.load(file, weights_only=False)["a"].close()  # this runs it
    assert "ran" in os.listdir()


def test_refuses_what_is_no_dictionary_of_plain_tensors(tmp_path):
    file, a_petabyte = tmp_path / "m.bin", torch.zeros(1).expand(2**48)
    more_than_the_file = torch.zeros(1).expand(1000)  # 4,000 bytes; the file has less, but 1,000
    for content in (torch.ones(2), [torch.ones(2)], {1: torch.ones(2)}):
        torch.save(content, file)
        assert f"{file} does not hold a dictionary" in refused(read_weights, file)
    for value in ("text", {"b": torch.ones(2)}, torch.eye(3).to_sparse(), a_petabyte,
                  more_than_the_file, torch.ones(1, device="meta")):
        torch.save({"b": torch.ones(1), "a": value}, file)
        assert f"{file} does not hold a plain tensor under 'a'" in refused(read_weights, file)
