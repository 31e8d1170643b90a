"""Frames and messages, from docs/PROTOCOL.md, "Frames" and "Messages"."""

import re


class Wrong(Exception):
    """The bytes are not what the documents say."""


def need(condition, text):
    if not condition:
        raise Wrong(text)


class Reader:
    def __init__(self, data, what):
        self.data, self.at, self.what = data, 0, what

    def take(self, count):
        need(self.at + count <= len(self.data), f"{self.what}: {count} bytes at {self.at} of {len(self.data)}")
        self.at += count
        return self.data[self.at - count:self.at]

    def u8(self):
        return self.take(1)[0]

    def u16(self):
        return int.from_bytes(self.take(2), "little")

    def u32(self):
        return int.from_bytes(self.take(4), "little")

    def u64(self):
        return int.from_bytes(self.take(8), "little")

    def i64(self):
        return int.from_bytes(self.take(8), "little", signed=True)

    def bytes16(self):
        return self.take(self.u16())

    def bytes32(self):
        return self.take(self.u32())

    def id(self):
        return self.take(32)

    def varint(self):
        value, shift = 0, 0
        while True:
            byte = self.u8()
            need(shift < 28 and (byte or not shift), f"{self.what}: a varint that is too long")
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value

    def list(self, item, least, most):
        count = self.u16()
        need(least <= count <= most, f"{self.what}: a list of {count}")
        return [item() for _ in range(count)]

    def bits(self, most):
        count = self.u16()
        need(count <= most, f"{self.what}: {count} bits")
        number = int.from_bytes(self.take((count + 7) // 8), "little")
        need(number >> count == 0, f"{self.what}: unused bits are set")
        return [bool(number >> at & 1) for at in range(count)]

    def name(self):
        raw = self.bytes16()
        need(1 <= len(raw) <= 200 and re.fullmatch(rb"[A-Za-z0-9_][A-Za-z0-9._+:@-]*(/[A-Za-z0-9_][A-Za-z0-9._+:@-]*)*", raw),
             f"{self.what}: the name {raw!r}")
        return raw.decode()

    def is_empty(self):
        return self.at == len(self.data)

    def end(self):
        need(self.is_empty(), f"{self.what}: {len(self.data) - self.at} bytes left over")


def hello(r):
    need(r.take(4) == b"LFWP", "Hello: magic")
    fields = dict(version=r.u16(), lowest=r.u16(), highest=r.u16(), features=r.u64())
    if fields["highest"] > 1:
        r.take(len(r.data) - r.at)
    return fields


def error(r):
    code, text = r.u8(), r.bytes16()
    need(len(text) <= 2000, "Error: text")
    return dict(code=code, text=text.decode())


def fetch(r):
    flags = r.u8()
    need(flags & ~2 == 0, f"Fetch: flags {flags}")
    return dict(flags=flags, names=r.list(r.name, 1, 256))


def offer(r):
    flags = r.u8()
    need(flags & ~7 == 0, f"Offer: flags {flags}")
    layers = r.list(lambda: (r.id(), r.u64()), 1, 1024)
    names = r.list(lambda: (r.name(), r.u16()), 0 if flags & 4 else 1, 256)
    need(all(index < len(layers) for _, index in names), "Offer: a name's layer")
    return dict(flags=flags, layers=layers, names=names, hints=r.list(r.id, 0, 64))


def stored_chunk(r):
    fields = dict(id=r.id(), class_=r.u8(), codec=r.u8(), plain_bytes=r.u32(), stored=r.bytes32())
    need(fields["class_"] <= 3 and fields["codec"] <= 1, "Chunks: class or codec")
    need(1 <= fields["plain_bytes"] <= 262144 and 1 <= len(fields["stored"]) <= 262144, "Chunks: lengths")
    return fields


def bundle(r):
    bases = r.list(lambda: r.take(8), 0, 256)
    first, chunks, plain_bytes, frame = r.u32(), r.u16(), r.u32(), r.bytes32()
    need(1 <= chunks <= 1024, "Bundle: chunks")
    need(first == 0xFFFFFFFF or first + chunks <= 65536, "Bundle: numbers")
    need(1 <= plain_bytes <= 1 << 20 and 1 <= len(frame) <= 1 << 20, "Bundle: frame")
    return dict(bases=bases, first=None if first == 0xFFFFFFFF else first, chunks=chunks, plain_bytes=plain_bytes, frame=frame)


def patches(r):
    bases = r.list(lambda: r.take(8), 1, 256)
    pages = [r.u16() for _ in bases]
    need(all(pages), "Patches: pages")
    first, plain_bytes, frame = r.u32(), r.u32(), r.bytes32()
    need(first == 0xFFFFFFFF or first + len(bases) <= 65536, "Patches: numbers")
    need(1 <= plain_bytes <= 1 << 20 and 1 <= len(frame) <= 1 << 20, "Patches: frame")
    return dict(bases=bases, pages=pages, first=None if first == 0xFFFFFFFF else first, chunks=len(bases), plain_bytes=plain_bytes, frame=frame)


def look(r):
    fields = dict(names=r.list(r.name, 0, 256), layers=r.list(r.id, 0, 1024))
    need(bool(fields["names"]) != bool(fields["layers"]), "Look: either names or layers")
    return fields


def pace(r):
    fields = dict(limit=r.u64(), priority=r.u8(), paused=r.u8())
    need(fields["limit"] == 0 or fields["limit"] >= 1024, "Pace: limit")
    need(fields["priority"] <= 2 and fields["paused"] <= 1, "Pace: priority or pause")
    return fields


def text(r, most):
    raw = r.bytes16()
    need(len(raw) <= most, f"a text of {len(raw)} bytes")
    return raw.decode()


def prepare(r):
    fields = dict(move=r.take(16), epoch=r.u64(), flags=r.u8(), stack=r.id(), description=text(r, 60000),
                  surroundings=text(r, 8000))
    need(fields["flags"] & ~14 == 0, f"Prepare: flags {fields['flags']}")
    return fields


def stage(r):
    fields = dict(move=r.take(16), instance=r.id(), state=r.id(), flags=r.u8())
    need(fields["flags"] & ~4 == 0, f"Stage: flags {fields['flags']}")
    return fields


MESSAGES = {
    0x01: ("Hello", hello),
    0x02: ("Error", error),
    0x03: ("Alive", lambda r: {}),
    0x10: ("Fetch", fetch),
    0x11: ("Offer", offer),
    0x12: ("Need", lambda r: dict(lacking=r.bits(1024), held=r.bits(64))),
    0x13: ("Ask", lambda r: dict(number=r.u32(), ids=r.list(r.id, 1, 1024))),
    0x14: ("Want", lambda r: dict(number=r.u32(), wanted=r.bits(1024))),
    0x15: ("Chunks", lambda r: dict(chunks=r.list(lambda: stored_chunk(r), 1, 65535))),
    0x16: ("End", lambda r: dict(chunks=r.u64())),
    0x17: ("Done", lambda r: dict(changed=r.u16())),
    0x18: ("Get", lambda r: dict(ids=r.list(r.id, 1, 1024))),
    0x19: ("Bundle", bundle),
    0x3C: ("Patches", patches),
    0x1A: ("Group", lambda r: dict(token=r.take(16))),
    0x1B: ("Join", lambda r: dict(token=r.take(16))),
    0x1C: ("Got", lambda r: dict(frames=r.u64())),
    0x1D: ("Look", look),
    0x1E: ("Trace", lambda r: dict(layers=r.list(r.id, 1, 64))),
    0x1F: ("Traced", lambda r: dict(layer=r.id(), ids=r.list(r.id, 1, 1024))),
    0x20: ("Pace", pace),
    0x21: ("Part", lambda r: dict(number=r.u64())),
    0x30: ("Prepare", prepare),
    0x31: ("Prepared", lambda r: dict(obstacles=r.list(lambda: (text(r, 900), text(r, 900)), 0, 64))),
    0x32: ("Stage", stage),
    0x33: ("Commit", lambda r: dict(move=r.take(16))),
    0x34: ("Abort", lambda r: dict(move=r.take(16))),
    0x35: ("Inquire", lambda r: dict(move=r.take(16))),
    0x36: ("Fate", lambda r: dict(fate=r.u8(), micros=r.u64(), text=text(r, 2000))),
}


def parse(kind, body):
    """A message as (name, fields)."""
    need(kind in MESSAGES, f"type {kind:#04x}")
    name, decode = MESSAGES[kind]
    reader = Reader(body, name)
    fields = decode(reader)
    reader.end()
    return name, fields


class Stream:
    """One direction of a connection: bytes in, messages out."""

    def __init__(self):
        self.data = b""

    def feed(self, data):
        self.data += data
        while len(self.data) >= 5:
            length, kind = int.from_bytes(self.data[:4], "little"), self.data[4]
            most = 2097152 if kind in (0x15, 0x19, 0x3C) else 131072
            need(1 <= length <= most, f"a frame of {length} bytes of type {kind:#04x}")
            if len(self.data) < 4 + length:
                return
            body, self.data = self.data[5:4 + length], self.data[4 + length:]
            yield parse(kind, body)
