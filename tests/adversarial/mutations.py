"""Mutations of files: bytes, JSON, safetensors, npz; all drawn from one `random.Random`."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MARKER = "a-pickle-was-run"
"""Name of the file that a pickle makes, in the working folder, where one is run."""
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 1.5, 1e-30, 1e30, 1e308, -0.0, 10**9, 10**400, 2**63, float("nan"), float("inf")),
    *("", "a", "0", "8", "token", "cosine", "\ud800", "\0", "x" * 5000, "../../etc/passwd", "/", "(a+)+$", "(", "~"),
    *([], {}, [0], [[]], [None], [1, 2, 3], ["a", "b", "c"], [0.5, 0.5, 0.5], [0, 0, 0], {"a": 1}, {"": {}}, [1e400]),
]
SNIPPETS = [b"", b"\0", b"null", b"[]", b"{}", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"PK\3\4"]
SNIPPETS += [b"\x93NUMPY\1\0", b"\x89PNG\r\n\x1a\n", b"<html>404</html>", b"[" * 100_000, b'{"a":' * 5000, b"\xff" * 64]


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Damage as disks, networks and editors do it."""
    n = len(content)
    at, other = sorted((draw.randrange(n + 1), draw.randrange(n + 1)))
    if draw.random() < 0.5:  # near the start, where headers are
        at, other = at % 200, at % 200 + draw.randrange(1, 64)
    noise = draw.randbytes(draw.randint(1, 16))
    return draw.choice(
        [
            lambda: content[:at],
            lambda: content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :] if at < n else b"",
            lambda: content[:at] + noise + content[at + len(noise) :],
            lambda: content[:at] + noise + content[at:],
            lambda: content[:at] + content[other:],
            lambda: content[:other] + content[at:],
            lambda: content[:at] + bytes(other - at) + content[other:],
            lambda: content + noise,
            lambda: content.replace(b"\n", b"\r\n"),
            lambda: draw.choice(SNIPPETS),
        ]
    )()


def mutate_json(content: Any, draw: random.Random) -> Any:
    """A value somewhere inside is replaced, removed, renamed, doubled or wrapped."""
    spots: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            spots.append((node, key))
            walk(node[key])

    content = json.loads(json.dumps(content))
    walk(content)
    if not spots or draw.random() < 0.05:
        return draw.choice(VALUES)
    node, key = draw.choice(spots)
    old = node[key]
    kind = draw.randrange(8)
    if kind <= 3:
        node[key] = draw.choice(VALUES)
    elif kind == 4:
        del node[key]
    elif kind == 5:
        node[key] = draw.choice(
            [str(old), [old], {"a": old}, [old, old], old * 2 if isinstance(old, (int, str)) else 2]
        )
    elif kind == 6 and isinstance(node, dict):
        node[draw.choice(["a", key + "_", key.upper(), "0"])] = node.pop(key)
    else:
        other, place = draw.choice(spots)
        if place in (other if isinstance(other, dict) else range(len(other))):
            node[key] = other[place] if not isinstance(other[place], (dict, list)) else draw.choice(VALUES)
    return content


def dump_json(content: Any) -> bytes:
    """JSON as bytes, whatever Python can write of it: also NaN, lone surrogates, numbers of 400 digits."""
    return json.dumps(content, indent=2).encode("utf-8", "surrogatepass")


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join_safetensors(header: Any, data: bytes) -> bytes:
    """The reverse."""
    text = dump_json(header)
    return len(text).to_bytes(8, "little") + text + data


def mutate_safetensors(content: bytes, draw: random.Random) -> bytes:
    """Header, metadata, dtypes, shapes, values, names: most results are files that parse."""
    header, data = split_safetensors(content)
    names = [name for name in header if name != "__metadata__"]
    kind = draw.randrange(10)
    meta = header.get("__metadata__", {})
    if kind == 0:
        return join_safetensors(mutate_json(header, draw), data)
    if kind <= 2 and meta:
        key = draw.choice(list(meta))
        try:
            meta[key] = dump_json(mutate_json(json.loads(meta[key]), draw)).decode("utf-8", "replace")
        except ValueError:
            meta[key] = draw.choice(["", "{", "null", "0", "[]", "nan"])
        if draw.random() < 0.2:
            del meta[key]
        return join_safetensors(header, data)
    tensors = _tensors(header, data)
    name = draw.choice(names)
    dtype, array = tensors[name]
    if kind <= 4:  # values
        tensors[name] = dtype, _spoil(array, draw)
    elif kind == 5:
        tensors[name] = _recast(dtype, array, draw)
    elif kind == 6:
        tensors[name] = dtype, _reshape(array, draw)
    elif kind == 7:
        del tensors[name]
    elif kind == 8:
        tensors[draw.choice([name + "_", "a", "", name.upper(), name.replace("0", "1"), "x." + name])] = tensors.pop(
            name
        )
    else:
        other = draw.choice(names)
        tensors[name], tensors[other] = tensors[other], tensors[name]
    return _pack(tensors, meta)


def _tensors(header: dict[str, Any], data: bytes) -> dict[str, tuple[str, np.ndarray]]:
    """name -> dtype and the numbers; those of types that numpy lacks stay bytes."""
    types = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I8": "i1", "U8": "u1", "BOOL": "?"}
    found = {}
    for name, facts in header.items():
        if name != "__metadata__":
            start, end = facts["data_offsets"]
            array = np.frombuffer(data[start:end], types[facts["dtype"]]).reshape(facts["shape"])
            found[name] = facts["dtype"], array
    return found


def _pack(tensors: dict[str, tuple[str, np.ndarray]], meta: dict[str, Any]) -> bytes:
    header: dict[str, Any] = {"__metadata__": meta} if meta else {}
    parts, at = [], 0
    for name, (dtype, array) in tensors.items():
        part = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + len(part)]}
        parts.append(part)
        at += len(part)
    return join_safetensors(header, b"".join(parts))


def _spoil(array: np.ndarray, draw: random.Random) -> np.ndarray:
    spoilt = array.copy().reshape(-1)
    if not spoilt.size:
        return array
    where: Any = draw.choice([slice(None), draw.randrange(spoilt.size)])
    floats = spoilt.dtype.kind == "f"
    with np.errstate(all="ignore"):
        spoilt[where] = (
            draw.choice([np.nan, np.inf, 1e30, -1e38, 0, 1e-44, 1.0, 7e5]) if floats else draw.choice([0, 1, 127])
        )
    return spoilt.reshape(array.shape)


def _recast(dtype: str, array: np.ndarray, draw: random.Random) -> tuple[str, np.ndarray]:
    to = draw.choice(["F64", "F16", "I64", "I32", "U8", "BOOL", "BF16", "F8_E4M3", "C64"])
    numpy = {"F64": "f8", "F16": "f2", "I64": "i8", "I32": "i4", "U8": "u1", "BOOL": "?", "C64": "c8"}.get(to)
    with np.errstate(all="ignore"):
        if numpy:
            return to, np.nan_to_num(array.astype("f8"), nan=0, posinf=1, neginf=-1).astype(numpy)
        return to, array.astype("f4").view("u4").astype("u4").__rshift__(16).astype("u2" if to == "BF16" else "u1")


def _reshape(array: np.ndarray, draw: random.Random) -> np.ndarray:
    shapes: list[Callable[[], np.ndarray]] = [
        lambda: array.T,
        lambda: array.reshape(-1),
        lambda: array[None],
        lambda: array[..., None],
        lambda: array[:-1] if array.ndim else array[None],
        lambda: array[:0] if array.ndim else array[None],
        lambda: array.reshape(-1)[:1].reshape(()) if array.size else array,
        lambda: np.concatenate([array, array]) if array.ndim else array[None],
        lambda: array.reshape(array.shape[::-1]),
        lambda: np.tile(array, (1,) * (array.ndim - 1) + (2,)) if array.ndim else array[None],
    ]
    return draw.choice(shapes)()


class _Run:
    """An object whose pickle makes a file where it is run."""

    def __reduce__(self) -> Any:
        return open, (MARKER, "w")


def mutate_npz(content: bytes, draw: random.Random) -> bytes:
    """Members of other kinds, sizes, names; claims that are not true; objects and code."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    name = draw.choice(list(members))
    array = np.load(io.BytesIO(members[name]), allow_pickle=False)
    wrong: list[Callable[[], Any]] = [
        lambda: array.astype(draw.choice(["f4", "i8", "?", "c8", "U5", "M8[s]"])) if array.dtype.kind != "U" else array,
        lambda: np.full(array.shape, 10**8) if array.dtype.kind in "iu" else np.flip(array),
        lambda: _reshape(array, draw),
        lambda: np.asfortranarray(array),
        lambda: np.array([None, 1, "a"], dtype=object),
        lambda: np.zeros(3, dtype=[("a", "i4"), ("b", "f4")]),
        lambda: np.array(np.nan),
        lambda: np.zeros(0),
        lambda: np.full(array.shape, -1),
        lambda: np.array(["\ud800", "b", "c"]),
    ]
    kind = draw.randrange(7)
    if kind <= 2:
        with io.BytesIO() as member:
            np.save(member, draw.choice(wrong)(), allow_pickle=True)
            members[name] = member.getvalue()
    elif kind == 3:  # a header that promises more than there is
        members[name] = _npy_header(draw.choice([(10**12,), (2**62, 4), (10**6, 10**6), (-1,)]), "|u1") + b"\0" * 64
    elif kind == 4:
        members[name] = draw.choice([pickle.dumps(_Run()), b"", b"abc", mutate_bytes(members[name], draw)])
    elif kind == 5:
        members[draw.choice(["a.npy", "x/../" + name, name.upper(), name.removesuffix(".npy")])] = members.pop(name)
    else:  # a bomb: 16 MB of zeros in 16 KB
        members[name] = _npy_header((1 << 24,), "|u1") + bytes(1 << 24)
    with io.BytesIO() as packed:
        with zipfile.ZipFile(packed, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as file:
            for key, member_bytes in members.items():
                file.writestr(key, member_bytes)
        return packed.getvalue()


def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    text = text.ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text


def mutate_file(path: Path, draw: random.Random) -> str:
    """Mutate a file in place, as its kind allows; which kind of mutation it was."""
    kind = draw.random()
    if kind < 0.03:
        return _replace(path, draw)
    content = path.read_bytes()
    structured: Callable[[], bytes] | None = {
        ".json": lambda: dump_json(mutate_json(json.loads(content), draw)),
        ".safetensors": lambda: mutate_safetensors(content, draw),
        ".npz": lambda: mutate_npz(content, draw),
    }.get(path.suffix)
    if structured is not None and kind < 0.7:
        path.write_bytes(structured())
        return "structure"
    path.write_bytes(mutate_bytes(content, draw))
    return "bytes"


def _replace(path: Path, draw: random.Random) -> str:
    """Something else than a file at its place."""
    path.unlink()
    kind = draw.choice(["absent", "a folder", "a link to itself", "a dangling link", "a pipe", "a device"])
    if kind == "a folder":
        path.mkdir()
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    elif kind == "a dangling link":
        path.symlink_to("nothing")
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    return kind
