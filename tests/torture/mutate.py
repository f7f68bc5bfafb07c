"""Changes: of values inside each other, of text, of bytes. Each takes a `random.Random`, so that a seed repeats it."""

from __future__ import annotations

import contextlib
import copy
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from random import Random
from typing import Any
from xml.etree import ElementTree

__all__ = [
    "bend",
    "bend_bytes",
    "bend_json",
    "bend_lines",
    "bend_png_text",
    "bend_protobuf",
    "bend_safetensors",
    "bend_toml",
    "bend_xml",
    "odd",
    "odd_text",
]

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 2**70, 10**300, 0.5, -0.0, 1e-320, 1e308, "", " ", "x", "0", "..",
    "../../etc/passwd", "/etc/passwd", "/dev/zero", "/dev/null", ".", "~", "package:", "package:__main__", "package:json/x", "package:os",
    "con", "a\x00b", "\ud800", "\N{PILE OF POO}" * 3, "[red]x[/]", "\x1b[2J", "%s%n", "a" * 300, "a" * 70_000, [], {}, [[]], [None], {"": {}},
    {"use": None}, {"use": "lora"}, [0] * 100, ["x", 1, None], float("inf"), float("-inf"), float("nan"), "1e999", "f32", "nan", "-1",
]  # fmt: skip


def odd(random: Random) -> Any:
    """Return a value that few expect; now and then one inside many others."""
    if random.random() < 0.03:
        value: Any = 1
        for _ in range(random.choice([20, 70, 3000])):
            value = [value] if random.random() < 0.5 else {"a": value}
        return value
    return copy.deepcopy(random.choice(ODD))


def odd_text(random: Random) -> str:
    """Return an odd value as text, as a command line has it."""
    try:
        return str(odd(random))[:3000]
    except RecursionError:  # a value inside thousands of others
        return "[" * 3000


def bend(value: Any, random: Random) -> Any:
    """Return a copy of JSON-like values with one to three places changed."""
    root = [copy.deepcopy(value)]
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        places: list[tuple[Any, Any]] = []
        waiting: list[tuple[Any, Any]] = [(root, 0)]
        while waiting and len(places) < 10_000:
            outer, key = waiting.pop()
            places.append((outer, key))
            inner = outer[key]
            waiting += [(inner, k) for k in (list(inner) if isinstance(inner, dict) else range(len(inner)))] if isinstance(inner, dict | list) else []  # fmt: skip
        outer, key = random.choice(places[1:] or places) if random.random() < 0.97 else places[0]
        other, other_key = random.choice(places)
        action = random.randrange(6)
        if action == 0 and outer is not root:
            del outer[key]
        elif action == 1 and isinstance(outer[key], dict):
            outer[key][str(odd(random))[:50]] = odd(random)
        elif action == 1 and isinstance(outer[key], list):
            outer[key].insert(random.randint(0, len(outer[key])), odd(random))
        elif action == 2:
            outer[key] = copy.deepcopy(other[other_key])
        elif action == 3 and isinstance(outer, dict):
            outer[str(key) + "x"] = outer.pop(key)
        elif action == 4 and isinstance(outer[key], int | float) and not isinstance(outer[key], bool):
            outer[key] = random.choice(
                [-outer[key], outer[key] * 2, outer[key] + 1, float(outer[key]), str(outer[key])]
            )
        else:
            outer[key] = odd(random)
    return root[0]


def bend_bytes(data: bytes, random: Random) -> bytes:
    """Return bytes with some flipped, cut, repeated, inserted or gone."""
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 5, 20])):
        at, other = (random.randint(0, max(len(changed) - 1, 0)) for _ in range(2))
        action = random.randrange(6)
        if action == 0 and changed:
            changed[at] ^= 1 << random.randrange(8)
        elif action == 1:
            del changed[at : at + random.choice([1, 2, 8, 100, 10**6])]
        elif action == 2:
            changed[at:at] = random.choice(
                [b"\0", b"\xff", b"\n", b'"', b"{", b"[" * 50, random.randbytes(8), b"9" * 5000]
            )
        elif action == 3:
            changed[at : at + 4] = random.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\x80"])
        elif action == 4:
            changed[at:at] = changed[other : other + random.choice([1, 16, 400])]
        elif changed:
            changed[at] = random.randrange(256)
    return bytes(changed)


def bend_json(data: bytes, random: Random) -> bytes:
    """Change the values of a JSON text, or now and then its bytes."""
    if random.random() < 0.15:
        return bend_bytes(data, random)
    try:
        text = json.dumps(bend(json.loads(data), random))
    except RecursionError:  # deeper than Python writes, and as deep as others write
        text = "[" * 100_000
    if random.random() < 0.1:
        text = text.replace("1", random.choice(["1e999", "9" * 5000, "-0", "1e400"]), 1)
    return text.encode()


def bend_lines(data: bytes, random: Random) -> bytes:
    """Change one line of JSON Lines, or the bytes of all."""
    if random.random() < 0.2:
        return bend_bytes(data, random)
    lines = data.splitlines()
    at = random.randrange(len(lines))
    lines[at] = bend_json(lines[at], random)
    return random.choice([b"\n", b"\r\n", b"\n\n", b"\0\n"]).join(lines)


def bend_toml(data: bytes, random: Random) -> bytes:
    """Change the values of a TOML text, or now and then its bytes."""
    import tomllib

    import tomlkit

    if random.random() < 0.3:
        return random.choice([bend_bytes(data, random), data + b"\nx = " + b"[" * 5000, data + b"\nx = " + b"9" * 5000])
    try:
        return tomlkit.dumps(bend(tomllib.loads(data.decode()), random)).encode()
    except (TypeError, ValueError, AttributeError, RecursionError):  # what TOML cannot hold
        return bend_bytes(data, random)


def bend_xml(data: bytes, random: Random) -> bytes:
    """Change attributes, elements and their order in XML, or now and then its bytes."""
    if random.random() < 0.1:
        return bend_bytes(data, random)
    root = ElementTree.fromstring(data)
    words = [
        "", "-1", "0", "1", "99999999999999999999", "9223372036854775807", "2147483647", "abc", "Constant", "Const", "Parameter", "Result",
        "If", "Loop", "TensorIterator", "ReadValue", "Assign", "Add", "f32", "u1", "i4", "string", "dynamic", "-1,-1", "0,0", "1..5", "1e999", "nan",
        "opset1", "opset6", "opset15", "2147483647,2147483647", "?", "1,2,3,4,5,6,7,8,9",
    ]  # fmt: skip
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        elements = list(root.iter())
        described = [element for element in elements if element.attrib]
        element, action = random.choice(elements), random.randrange(8)
        if action < 4 and described:
            element = random.choice(described)
            key = random.choice(list(element.attrib))
            others = [each.attrib[key] for each in described if key in each.attrib]
            element.set(key, random.choice(words if random.random() < 0.7 else others))
        elif action == 4 and element.attrib:
            del element.attrib[random.choice(list(element.attrib))]
        elif action == 5 and len(element):
            element.remove(random.choice(list(element)))
        elif action == 6 and len(element):
            element.insert(random.randint(0, len(element)), copy.deepcopy(random.choice(list(element))))
        elif len(element) > 1:
            inner = list(element)
            random.shuffle(inner)
            element[:] = inner
    return ElementTree.tostring(root)


def bend_safetensors(data: bytes, random: Random) -> bytes:
    """Change the header's values, its length, or the file's bytes."""
    if random.random() < 0.25:
        return bend_bytes(data, random)
    [length] = struct.unpack_from("<Q", data)
    header = bend_json(data[8 : 8 + length], random)
    said = len(header) if random.random() < 0.95 else random.choice([0, 1, 2**31, 2**63, len(header) + 9])
    return struct.pack("<Q", said) + header + data[8 + length :]


def bend_png_text(data: bytes, random: Random, change: Callable[[bytes, Random], bytes] = bend_json) -> bytes:
    """Change the text in a PNG's iTXt chunk, with a right checksum; or now and then the file's bytes."""
    if random.random() < 0.1:
        return bend_bytes(data, random)
    at = data.index(b"iTXt") - 4
    [length] = struct.unpack_from(">I", data, at)
    content = data[at + 8 : at + 8 + length]
    head = content.index(b"{")
    changed = b"iTXt" + content[:head] + change(content[head:], random)
    chunk = struct.pack(">I", len(changed) - 4) + changed + struct.pack(">I", zlib.crc32(changed))
    return data[:at] + chunk + data[at + 12 + length :]


# -- protobuf, without its schema -------------------------------------------------------------------------------------

Field = list[Any]
"""Number, wire type (0 varint, 1 eight bytes, 2 of a length, 5 four bytes), value; a message is a list of fields."""


def bend_protobuf(data: bytes, random: Random) -> bytes:
    """Remove, repeat, copy, renumber or change fields of a message or of those inside it, or now and then bytes."""
    if random.random() < 0.15:
        return bend_bytes(data, random)
    message = _parsed(data)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        places = list(_places(message))
        if not places:
            break
        inside, field = random.choice(places)
        action = random.randrange(8)
        if action == 0:
            inside.remove(field)
        elif action == 1:
            inside.insert(random.randint(0, len(inside)), copy.deepcopy(field))
        elif action == 2:
            other = random.choice(places)[1]
            field[1:] = copy.deepcopy(other[1:])
        elif action == 3:
            field[0] = random.choice([1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 15, 20])
        elif action == 4:
            random.shuffle(inside)
        elif field[1] == 0:
            field[2] = random.choice([0, 1, 2, 3, 5, 7, 19, 23, 100, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -1, -2])
        elif field[1] == 2:
            own = _written(field[2]) if isinstance(field[2], list) else field[2]
            words = [
                b"",
                b"x",
                b"y",
                b"Add",
                b"Loop",
                b"Const",
                b"\xff\xfe",
                b"a" * 70_000,
                b"../x",
                b":0",
                b"^x",
                b"y:1",
            ]
            field[2] = random.choice([*words, own[: random.randint(0, 8)], own * 2])
        else:
            field[2] = random.choice([b"\xff", b"\0", b"\x7f"]) * len(field[2])
    return _written(message)


def _places(message: list[Field]) -> Iterator[tuple[list[Field], Field]]:
    for field in message:
        yield message, field
        if isinstance(field[2], list):
            yield from _places(field[2])


def _parsed(data: bytes, depth: int = 0) -> list[Field]:
    """Return a message's fields; what has a length is a message if it can be read as one. Raises ValueError."""
    fields, at = list[Field](), 0
    while at < len(data):
        tag, at = _number(data, at)
        number, wire = tag >> 3, tag & 7
        value: Any
        if wire == 0:
            value, at = _number(data, at)
        else:
            length, at = _number(data, at) if wire == 2 else ({1: 8, 5: 4}.get(wire, len(data)), at)
            value, at = data[at : at + length], at + length
        if number == 0 or at > len(data):
            raise ValueError("not a message")
        if wire == 2 and value and depth < 12:
            with contextlib.suppress(ValueError):
                value = _parsed(value, depth + 1)
        fields.append([number, wire, value])
    return fields


def _number(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("not a number")


def _written(message: list[Field]) -> bytes:
    out = bytearray()
    for number, wire, value in message:
        out += _varint(number << 3 | wire)
        if wire == 0:
            out += _varint(value)
        else:
            data = _written(value) if isinstance(value, list) else value
            out += (_varint(len(data)) if wire == 2 else b"") + data
    return bytes(out)


def _varint(value: int) -> bytes:
    out, value = bytearray(), value & (2**64 - 1)
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
