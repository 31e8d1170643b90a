"""BLAKE3 in plain Python, from its paper: for the decoder, where the module isn't installed. Slow, and enough."""

IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
ORDER = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8
MASK = 0xFFFFFFFF
MIXED = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
         (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))


def compress(value, block, counter, length, flags):
    v = [*value, *IV[:4], counter & MASK, counter >> 32, length, flags]
    m = list(block)
    for number in range(7):
        for at, (a, b, c, d) in enumerate(MIXED):
            va, vb, vc, vd = v[a], v[b], v[c], v[d]
            va = (va + vb + m[2 * at]) & MASK
            vd ^= va
            vd = (vd >> 16 | vd << 16) & MASK
            vc = (vc + vd) & MASK
            vb ^= vc
            vb = (vb >> 12 | vb << 20) & MASK
            va = (va + vb + m[2 * at + 1]) & MASK
            vd ^= va
            vd = (vd >> 8 | vd << 24) & MASK
            vc = (vc + vd) & MASK
            vb ^= vc
            vb = (vb >> 7 | vb << 25) & MASK
            v[a], v[b], v[c], v[d] = va, vb, vc, vd
        if number < 6:
            m = [m[i] for i in ORDER]
    return [v[i] ^ v[i + 8] for i in range(8)]


def words(data):
    data = data.ljust(64, b"\0")
    return [int.from_bytes(data[at:at + 4], "little") for at in range(0, 64, 4)]


def chunk_output(data, counter):
    """What is left to compress of a chunk of up to 1,024 bytes."""
    value, blocks = IV, [data[at:at + 64] for at in range(0, len(data), 64)] or [b""]
    for number, block in enumerate(blocks[:-1]):
        flags = CHUNK_START if number == 0 else 0
        value = compress(value, words(block), counter, 64, flags)
    flags = CHUNK_END | (CHUNK_START if len(blocks) == 1 else 0)
    return value, words(blocks[-1]), counter, len(blocks[-1]), flags


def tree_output(data, counter):
    """The same of a subtree: the left one has the greatest power of two of chunks that leaves something."""
    if len(data) <= 1024:
        return chunk_output(data, counter)
    chunks = (len(data) - 1) // 1024
    left = 1 << (chunks.bit_length() - 1)
    pair = compress(*tree_output(data[:left * 1024], counter)) + compress(*tree_output(data[left * 1024:], counter + left))
    return IV, pair, 0, 64, PARENT


def blake3(data):
    """The 32 bytes of the hash of `data`."""
    value, block, counter, length, flags = tree_output(bytes(data), 0)
    out = compress(value, block, 0 if flags & PARENT else counter, length, flags | ROOT)
    return b"".join(word.to_bytes(4, "little") for word in out)
