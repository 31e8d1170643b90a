"""Writes into an embedded database for a while, each transaction durable, and checks that none is lost.

databases.py WHAT FOLDER SECONDS [TOLD]    WHAT: sqlite-delete, sqlite-wal, lmdb, check-delete, check-wal
TOLD is a file that holds the number of the last transaction that was told to be done.
"""
import os
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


def sqlite(mode):
    import sqlite3

    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "db")
    db = sqlite3.connect(path, isolation_level=None)
    db.execute(f"pragma journal_mode={mode}")
    db.execute("pragma synchronous=full")
    db.execute("create table rows (number integer primary key, bytes blob)")
    number = 0
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


if what == "lmdb":
    lmdb()
elif what.startswith("check-"):
    with open(told) as file:
        at_least = int(file.read())
    last = check_sqlite(os.path.join(folder, "db"), at_least)
    print(f"{at_least} told, {last} there")
else:
    sqlite(what.removeprefix("sqlite-"))
