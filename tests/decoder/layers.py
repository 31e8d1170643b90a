"""Chunks, manifests, tables, contents and the merged tree, from docs/FORMAT.md."""

import shutil
import stat
import subprocess
import sys
import tempfile

from frames import Reader, Wrong, need

try:
    from blake3 import blake3 as blake3_module
    def blake3(data):
        return blake3_module(data).digest()
except ImportError:
    from blake3_pure import blake3

try:
    import zstandard
    def unzstd(frame, prefix, plain_bytes):
        raw = zstandard.ZstdCompressionDict(prefix, dict_type=zstandard.DICT_TYPE_RAWCONTENT) if prefix else None
        return zstandard.ZstdDecompressor(dict_data=raw, max_window_size=1 << 21).decompress(frame, max_output_size=plain_bytes)
except ImportError:
    if shutil.which("zstd") is None:
        print("there is neither Python's zstandard nor the program zstd", file=sys.stderr)
        sys.exit(77)

    def unzstd(frame, prefix, plain_bytes):
        with tempfile.NamedTemporaryFile() as file:
            file.write(prefix)
            file.flush()
            dictionary = ["-D", file.name] if prefix else []
            command = ["zstd", "-d", "-q", "-c", "--memory=2MB", *dictionary]
            done = subprocess.run(command, input=frame, capture_output=True, check=False)
        need(done.returncode == 0, f"zstd: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout


def open_chunk(fields):
    """The plain bytes of a chunk of a Chunks message, verified."""
    stored = fields["stored"]
    plain = stored if fields["codec"] == 0 else unzstd(stored, b"", fields["plain_bytes"])
    need(len(plain) == fields["plain_bytes"], "a chunk's length")
    need(blake3(plain) == fields["id"], f"chunk {fields['id'].hex()} does not hash to its id")
    return plain


def bundle_table(r, count):
    """The chunks' lengths, and the holes as (place, number)."""
    need(all(class_ <= 3 for class_ in r.take(count)), "a bundle's classes")
    lengths = [r.varint() for _ in range(count)]
    need(all(1 <= length <= 262144 for length in lengths), "a bundle's lengths")
    holes, end, following = [], 0, 0
    count = r.varint()
    need(count <= 8192, "a bundle's holes")
    for _ in range(count):
        at, step = end + r.varint(), r.varint()
        number = following + (step >> 1 if step % 2 == 0 else -(step + 1 >> 1))
        need(0 <= number < 65536, "a hole's number")
        holes.append((at, number))
        end, following = at + 32, number + 1
    return lengths, holes


def open_bundle(fields, base, numbered):
    """The chunks of a bundle as (id, plain bytes), and how many holes were filled; `base` gives the plain bytes of what
    begins so, `numbered` is the ids of numbered chunks, to which those of this one are added."""
    prefix = b"".join(base(begin) for begin in fields["bases"])
    need(len(prefix) <= 1 << 20, "a bundle's bases are too long")
    total = fields["plain_bytes"]
    data = unzstd(fields["frame"], prefix, total)
    need(len(data) == total, f"a bundle of {len(data)} bytes instead of {total}")
    reader = Reader(data, "Bundle's table")
    lengths, holes = bundle_table(reader, fields["chunks"])
    data = bytearray(data[reader.at:])
    need(len(data) == sum(lengths), "a bundle's chunks and lengths")
    chunks, start, filled = [], 0, len(holes)
    for index, length in enumerate(lengths):
        end = start + length
        while holes and holes[0][0] < end:
            at, number = holes.pop(0)
            need(at + 32 <= end and number in numbered, f"a hole for {number}")
            data[at:at + 32] = numbered[number]
        piece = bytes(data[start:end])
        chunks.append((blake3(piece), piece))
        if fields["first"] is not None:
            need(fields["first"] + index not in numbered, "a number twice")
            numbered[fields["first"] + index] = chunks[-1][0]
        start = end
    need(not holes, "a hole beyond the end")
    return chunks, filled


def pages_of(plain, pages):
    """Where those pages of a chunk lie, as (begin, end)."""
    need(len(plain) <= 65536 and not pages >> -(-len(plain) // 4096), "pages beyond a base's end")
    return [(at * 4096, min(at * 4096 + 4096, len(plain))) for at in range(16) if pages >> at & 1]


def open_patches(fields, base, numbered):
    """The same for chunks of which only pages came."""
    bases = [base(begin) for begin in fields["bases"]]
    need(sum(map(len, bases)) <= 1 << 20, "the bases of patches are too long")
    places = [pages_of(plain, pages) for plain, pages in zip(bases, fields["pages"])]
    prefix = b"".join(plain[begin:end] for plain, some in zip(bases, places) for begin, end in some)
    need(len(prefix) == fields["plain_bytes"], "the length of patches")
    data, chunks = unzstd(fields["frame"], prefix, len(prefix)), []
    need(len(data) == len(prefix), "the length of patches' frame")
    for index, (plain, some) in enumerate(zip(bases, places)):
        piece = bytearray(plain)
        for begin, end in some:
            piece[begin:end], data = data[:end - begin], data[end - begin:]
        chunks.append((blake3(bytes(piece)), bytes(piece)))
        if fields["first"] is not None:
            need(fields["first"] + index not in numbered, "a number twice")
            numbered[fields["first"] + index] = chunks[-1][0]
    return chunks, 0


def extent(r):
    tag = r.u8()
    if tag == 0:
        length = r.u64()
        need(length > 0, "an empty hole")
        return (length, None)
    need(tag == 1, f"extent {tag}")
    length = r.u32()
    need(1 <= length <= 262144, "an extent's length")
    return (length, r.id())


def no_two_holes(extents):
    need(all(a[1] or b[1] for a, b in zip(extents, extents[1:])), "neighbouring holes")


def content(r):
    tag = r.u8()
    if tag == 0:
        data = r.bytes16()
        need(len(data) <= 512, "inline content")
        return ("inline", data)
    need(tag in (1, 2), f"content {tag}")
    chunker, length, data_bytes = r.u8(), r.u64(), r.u64()
    need(chunker <= 2 and data_bytes <= length < 1 << 63, "content: chunker or lengths")
    if tag == 1:
        extents = [extent(r) for _ in range(r.u8())]
        need(len(extents) <= 4 and sum(e[0] for e in extents) == length, "direct content")
        no_two_holes(extents)
        return ("extents", length, extents)
    depth = r.u8()
    need(1 <= depth <= 8, "a tree's depth")
    return ("tree", length, depth, r.id())


def node(get, id_, depth, length):
    """The extents below a list node."""
    r = Reader(get(id_), "list node")
    need(r.u8() == depth, "a list node's depth")
    count = r.u16()
    need(1 <= count <= 512, "a list node's entries")
    if depth == 1:
        extents = [extent(r) for _ in range(count)]
        no_two_holes(extents)
    else:
        extents = []
        for _ in range(count):
            bytes_, child = r.u64(), r.id()
            extents += node(get, child, depth - 1, bytes_)
    r.end()
    need(sum(e[0] for e in extents) == length, "a list node's length")
    return extents


def extents_of(get, what):
    if what[0] == "extents":
        return what[2]
    return node(get, what[3], what[2], what[1])


def data_of(get, what):
    if what[0] == "inline":
        return what[1]
    pieces = []
    for length, id_ in extents_of(get, what):
        piece = get(id_) if id_ else bytes(length)
        need(len(piece) == length, "an extent's length and its chunk's")
        pieces.append(piece)
    return b"".join(pieces)


def manifest(plain):
    r = Reader(plain, "manifest")
    need(r.take(4) == b"LFMF" and r.u16() == 1, "manifest: magic or version")
    kind, flags = r.u8(), r.u8()
    need(kind <= 2 and flags <= 3, "manifest: kind or flags")
    parent = r.id() if flags & 1 else None
    fields = dict(kind=kind, parent=parent, depth=r.u32(), next=r.u64(), inodes=r.u64(), dentries=r.u64(), bytes=r.u64())
    fields["inode_table"], fields["dentry_table"] = content(r), content(r)
    fields["image"] = content(r) if flags & 2 else None
    r.end()
    need((fields["depth"] == 0) == (parent is None) and fields["next"] >= 2, "manifest: depth or next inode number")
    return fields


def time(r):
    seconds, nanoseconds = r.i64(), r.u32()
    need(nanoseconds < 10**9, "a time")
    return seconds, nanoseconds


def inode(r):
    r = Reader(r.take(r.u32()), "inode record")
    number, mode, links = r.u64(), r.u32(), r.u32()
    kind = stat.S_IFMT(mode)
    need(number > 0 and mode & ~0o177777 == 0, "an inode's number or mode")
    fields = dict(number=number, mode=mode, links=links, owner=r.u32(), group=r.u32(), times=[time(r) for _ in range(3)])
    xattrs = [(r.bytes16(), r.bytes32()) for _ in range(r.u16())]
    need(all(a[0] < b[0] for a, b in zip(xattrs, xattrs[1:])), "extended attributes aren't sorted")
    fields["xattrs"] = xattrs
    if kind == stat.S_IFREG:
        fields["content"] = content(r)
    elif kind == stat.S_IFLNK:
        fields["target"] = r.bytes16()
        need(1 <= len(fields["target"]) <= 4095, "a link's target")
    elif kind in (stat.S_IFBLK, stat.S_IFCHR):
        fields["device"] = r.u64()
    else:
        need(kind in (stat.S_IFDIR, stat.S_IFIFO, stat.S_IFSOCK), f"kind {kind:o}")
    r.end()
    return (number,), fields


def dentry(r):
    folder, number, kind, length = r.u64(), r.u64(), r.u8(), r.u8()
    name = r.take(length)
    need(folder > 0 and name not in (b"", b".", b"..") and not set(b"/\0") & set(name), "a dentry")
    need(kind <= 7 and (kind == 0) == (number == 0), "a dentry's kind")
    return (folder, name), (number, kind)


def table(get, what, record, count):
    """The records of a table by key, checked as the receiver checks them."""
    if what[0] == "extents" or what[0] == "tree":
        need(all(id_ for _, id_ in extents_of(get, what)), "a hole in a table")
    reader, records, last = Reader(data_of(get, what), "table"), {}, None
    ends = set()
    while not reader.is_empty():
        key, value = record(reader)
        need(last is None or last < key, f"a table isn't sorted at {key}")
        records[key] = value
        last = key
        ends.add(reader.at)
    need(len(records) == count, f"a table of {len(records)} records instead of {count}")
    at = 0
    for length, _ in extents_of(get, what) if what[0] != "inline" else []:
        at += length
        need(length == 32768 or at in ends, "a table's piece ends inside a record")
    return records


def layer(get, id_):
    """A layer's manifest and tables, checked."""
    fields = manifest(get(id_))
    inodes = table(get, fields["inode_table"], inode, fields["inodes"])
    dentries = table(get, fields["dentry_table"], dentry, fields["dentries"])
    files = [value["content"] for value in inodes.values() if "content" in value]
    size = sum(len(what[1]) if what[0] == "inline" else what[1] for what in files)
    need(size == fields["bytes"], "the files' lengths added up")
    need(all(key[0] < fields["next"] for key in inodes), "an inode's number")
    return fields, inodes, dentries


def stack(get, top):
    """The merged tables of a layer and all below it."""
    layers, next_ = [], top
    while next_ is not None:
        layers.append(layer(get, next_))
        next_ = layers[-1][0]["parent"]
    inodes, dentries = {}, {}
    for depth, (fields, own_inodes, own_dentries) in enumerate(reversed(layers)):
        need(fields["depth"] == depth, "a layer's depth")
        inodes.update(own_inodes)
        dentries.update(own_dentries)
    return inodes, {key: value for key, value in dentries.items() if value[0] != 0}


KINDS = {1: stat.S_IFREG, 2: stat.S_IFDIR, 3: stat.S_IFLNK, 4: stat.S_IFBLK, 5: stat.S_IFCHR, 6: stat.S_IFIFO, 7: stat.S_IFSOCK}


def listing(get, top):
    """Every path of the tree with its kind, and of a file its length and its bytes' hash."""
    inodes, dentries = stack(get, top)
    need((1,) in inodes and stat.S_ISDIR(inodes[(1,)]["mode"]), "the root folder")
    lines, folders = [], [(1, "")]
    while folders:
        folder, path = folders.pop()
        for (_, name), (number, kind) in sorted(item for item in dentries.items() if item[0][0] == folder):
            record = inodes.get((number,))
            need(record is not None, f"inode {number} isn't there")
            need(KINDS[kind] == stat.S_IFMT(record["mode"]), f"inode {number} is of another kind than its dentry says")
            here = f"{path}/{name.decode(errors='backslashreplace')}"
            if "content" in record:
                data = data_of(get, record["content"])
                lines.append([here, "file", len(data), blake3(data).hex()])
            elif kind == 2:
                lines.append([here, "folder", 0, ""])
                folders.append((number, here))
            else:
                lines.append([here, "other", 0, ""])
    return sorted(lines)


__all__ = ["Wrong", "blake3", "listing", "open_bundle", "open_chunk"]
