"""Writes into an embedded database for a while, each transaction durable, and checks that none is lost.

databases.py WHAT FOLDER SECONDS [TOLD]    WHAT: sqlite-fill, sqlite-delete, sqlite-wal, lmdb, blocks-fill, blocks, check-delete, check-wal, check-blocks
sqlite-fill makes a database of some megabytes, with which sqlite-delete and sqlite-wal go on. blocks is a large file whose blocks are
written again and again in any order, with a sync after each pass: a block may be of a later pass than the last one told, and of no earlier one.
TOLD is a file that holds the number of the last transaction that was told to be done.
"""
import os
import random
import struct
import sys
import time

what, folder, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
told = sys.argv[4] if len(sys.argv) > 4 else None


def row(number):
    return bytes((number * 31 + i) % 251 for i in range(500 + number % 3000))


def tell(number):
    if told:
        with open(told + ".new", "w") as file:
            file.write(str(number))
        os.rename(told + ".new", told)


def check_sqlite(path, at_least):
    import sqlite3

    db = sqlite3.connect(path)
    said = db.execute("pragma integrity_check").fetchall()
    assert said == [("ok",)], said
    rows = dict(db.execute("select number, bytes from rows"))
    last = max(rows, default=0)
    assert last >= at_least, f"{at_least} was told to be done, the last one there is {last}"
    for number in range(1, last + 1):
        # Every seventh transaction removes an earlier row.
        gone = number % 7 == 4 and number + 3 <= last
        assert (number not in rows) if gone else rows[number] == row(number), f"row {number}"
    return last


FILLED = 2100
TABLE = "create table if not exists rows (number integer primary key, bytes blob)"


def fill():
    import sqlite3

    os.makedirs(folder, exist_ok=True)
    db = sqlite3.connect(os.path.join(folder, "db"))
    db.execute(TABLE)
    db.executemany("insert into rows values (?, ?)", ((n, row(n)) for n in range(1, FILLED + 1) if n % 7 != 4))
    db.commit()
    db.close()


def sqlite(mode):
    import sqlite3

    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "db")
    db = sqlite3.connect(path, isolation_level=None)
    db.execute(f"pragma journal_mode={mode}")
    # With `full` SQLite doesn't sync the folder from which it removes its journal: the last transaction may be undone by a lost machine.
    db.execute("pragma synchronous=extra")
    db.execute(TABLE)
    number = db.execute("select coalesce(max(number), 0) from rows").fetchone()[0]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        number += 1
        db.execute("begin")
        db.execute("insert into rows values (?, ?)", (number, row(number)))
        if number % 7 == 0:
            db.execute("delete from rows where number = ?", (number - 3,))
        db.execute("commit")
        tell(number)
    db.close()
    assert check_sqlite(path, number) == number
    print(f"{number} transactions, all there")


def lmdb():
    import lmdb as engine

    os.makedirs(folder, exist_ok=True)
    env = engine.open(folder + "/db", map_size=1 << 30, writemap=False)
    number = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        number += 1
        with env.begin(write=True) as transaction:
            transaction.put(str(number).encode(), row(number))
            if number % 7 == 0:
                transaction.delete(str(number - 3).encode())
    env.close()
    env = engine.open(folder + "/db", map_size=1 << 30, readonly=True)
    with env.begin() as transaction:
        for i in range(1, number + 1):
            gone = i % 7 == 4 and i + 3 <= number
            assert transaction.get(str(i).encode()) == (None if gone else row(i)), i
    print(f"{number} transactions, all there")


BLOCK, BLOCKS = 4096, 64 << 8


def block(written_in, number):
    return struct.pack("<QQ", written_in, number) * (BLOCK // 16)


def fill_blocks():
    os.makedirs(folder, exist_ok=True)
    with open(folder + "/blocks", "wb") as file:
        for number in range(BLOCKS):
            file.write(block(0, number))


def blocks():
    end = time.monotonic() + seconds
    tell(0)
    written_in = 0
    file = os.open(folder + "/blocks", os.O_RDWR)
    while time.monotonic() < end:
        written_in += 1
        for number in random.Random(written_in).sample(range(BLOCKS), BLOCKS):
            os.pwrite(file, block(written_in, number), number * BLOCK)
        os.fsync(file)
        tell(written_in)
    os.close(file)


def check_blocks(at_least):
    with open(folder + "/blocks", "rb") as file:
        for number in range(BLOCKS):
            found = file.read(BLOCK)
            written_in = struct.unpack_from("<Q", found)[0]
            assert found == block(written_in, number), f"block {number} is none that was written"
            # What is told is read a moment before the cut: another pass may have been synced in between.
            assert at_least <= written_in <= at_least + 2, f"block {number} is of pass {written_in}, {at_least} was synced"
        assert not file.read(1)


if what == "lmdb":
    lmdb()
elif what == "blocks-fill":
    fill_blocks()
elif what == "blocks":
    blocks()
elif what == "check-blocks":
    with open(told) as file:
        at_least = int(file.read())
    check_blocks(at_least)
    print(f"pass {at_least} told")
elif what == "sqlite-fill":
    fill()
elif what.startswith("check-"):
    with open(told) as file:
        at_least = int(file.read())
    last = check_sqlite(os.path.join(folder, "db"), at_least)
    print(f"{at_least} told, {last} there")
else:
    sqlite(what.removeprefix("sqlite-"))
