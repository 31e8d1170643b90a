#!/usr/bin/env python3
"""Reads a recorded session as a stranger would: written from docs/PROTOCOL.md and docs/FORMAT.md alone.

    decode.py SESSION

SESSION holds what went over one connection inside TLS, in order: for each write a byte for its direction (0 from the
caller, 1 from the listener), a u32 with its length, and the bytes. Direction 2 is for frames that belong to no session: each
is only decoded. What may follow what is checked, every chunk is verified, every layer rebuilt. The answer, in JSON on
stdout, is how many messages of each kind there were, how many ids bundles left out, and the tree of every name that was moved.
"""

import collections
import json
import sys

from frames import Reader, Stream, need
from layers import listing, open_bundle, open_chunk, open_patches


class Transfer:
    """One transfer after its Offer: what may follow, and what it brings."""

    def __init__(self, sender, offer, known):
        self.sender, self.offer, self.known = sender, offer, known
        self.state, self.asked, self.next_ask = "offered", collections.deque(), 0
        self.awaited, self.sent, self.lacking = set(), 0, []
        self.numbered, self.holes = {}, 0
        self.is_dry = bool(offer["flags"] & 2)

    def on(self, side, name, fields):
        """Returns whether it is over."""
        from_sender = side == self.sender
        handler = getattr(self, f"on_{name.lower()}", None)
        need(handler is not None, f"{name} in a transfer")
        need(from_sender == (name in ("Ask", "Chunks", "Bundle", "Patches", "End")), f"{name} from the wrong side")
        return handler(fields)

    def on_need(self, fields):
        need(self.state == "offered", f"Need when {self.state}")
        need(len(fields["lacking"]) == len(self.offer["layers"]), "Need: one bit for each layer")
        need(len(fields["held"]) == len(self.offer["hints"]), "Need: one bit for each hint")
        need(any(fields["lacking"]), "Need without need")
        self.lacking = [layer for (layer, _), lacks in zip(self.offer["layers"], fields["lacking"]) if lacks]
        self.state = "sending"

    def on_ask(self, fields):
        need(self.state == "sending" and fields["number"] == self.next_ask, "Ask's number")
        self.next_ask += 1
        self.asked.append(fields)
        need(sum(len(ask["ids"]) for ask in self.asked) + len(self.awaited) <= 65536, "too many ids outstanding")

    def on_want(self, fields):
        need(self.asked, "Want without Ask")
        ask = self.asked.popleft()
        need(fields["number"] == ask["number"] and len(fields["wanted"]) == len(ask["ids"]), "Want doesn't fit its Ask")
        wanted = [id_ for id_, wants in zip(ask["ids"], fields["wanted"]) if wants]
        need(not self.awaited & set(wanted), "wanted twice")
        if not self.is_dry:
            self.awaited |= set(wanted)

    def on_chunks(self, fields):
        need(self.state == "sending" and not self.is_dry, "Chunks too late, or in a dry run")
        for chunk in fields["chunks"]:
            need(chunk["id"] in self.awaited, "a chunk that wasn't wanted")
            self.awaited.remove(chunk["id"])
            self.known[chunk["id"]] = open_chunk(chunk)
        self.sent += len(fields["chunks"])

    def on_patches(self, fields):
        self.on_bundle(fields, open_patches)

    def on_bundle(self, fields, opened=open_bundle):
        need(self.state == "sending" and not self.is_dry, "Bundle too late, or in a dry run")

        def base(begin):
            found = [plain for id_, plain in self.known.items() if id_.startswith(begin)]
            need(len(found) == 1, f"base {begin.hex()} isn't known")
            return found[0]

        chunks, holes = opened(fields, base, self.numbered)
        self.holes += holes
        for id_, plain in chunks:
            self.known[id_] = plain
            self.awaited.discard(id_)
        self.sent += fields["chunks"]

    def on_end(self, fields):
        need(self.state == "sending" and not self.asked and not self.awaited, "End too early")
        need(self.is_dry or fields["chunks"] == self.sent, f"End after {self.sent} of {fields['chunks']} chunks")
        self.state = "ended"

    def on_done(self, fields):
        need(self.state in ("offered", "ended"), f"Done when {self.state}")
        need(fields["changed"] <= len(self.offer["names"]), "Done: names changed")
        return True


class Session:
    def __init__(self):
        self.streams = [Stream(), Stream(), Stream()]
        self.greeted = [False, False]
        self.counts = collections.Counter()
        self.known, self.trees, self.holes = {}, {}, 0
        self.transfer, self.fetching, self.getting = None, None, None

    def feed(self, side, data):
        for name, fields in self.streams[side].feed(data):
            self.counts[name] += 1
            if side < 2:
                self.on(side, name, fields)

    def on(self, side, name, fields):
        if not self.greeted[side]:
            need(name == "Hello" and fields["version"] == 1, f"{name} instead of Hello")
            need(fields["features"] >> 32 == 0, "an unknown feature")
            self.greeted[side] = True
        elif name in ("Alive", "Pace"):
            pass
        elif name == "Error":
            need(False, f"side {side} says: {fields['text']}")
        elif self.transfer:
            if self.transfer.on(side, name, fields):
                self.finish()
        elif self.fetching is not None:
            need(side == 1 and name == "Offer", f"{name} instead of an Offer")
            need(fields["flags"] & 2 == self.fetch_flags & 2, "a dry run for a wet one")
            need(sorted({n for n, _ in fields["names"]}) == sorted(set(self.fetching)), "other names than fetched")
            self.transfer, self.fetching = Transfer(1, fields, self.known), None
        elif self.getting is not None:
            self.on_answer(side, name, fields)
        else:
            self.on_request(side, name, fields)

    def on_request(self, side, name, fields):
        need(side == 0, f"{name} as the listener's request")
        if name == "Offer":
            self.transfer = Transfer(0, fields, self.known)
        elif name == "Fetch":
            self.fetching, self.fetch_flags = fields["names"], fields["flags"]
        elif name == "Get":
            self.getting, self.got = set(fields["ids"]), 0
        else:
            need(False, f"{name} as a request")

    def on_answer(self, side, name, fields):
        need(side == 1, f"{name} from the caller")
        if name == "End":
            need(fields["chunks"] == self.got, "End's count after Get")
            self.getting = None
            return
        need(name == "Chunks", f"{name} after Get")
        for chunk in fields["chunks"]:
            need(chunk["id"] in self.getting, "a chunk that wasn't asked for")
            self.getting.remove(chunk["id"])
            self.known[chunk["id"]] = open_chunk(chunk)
            self.got += 1

    def finish(self):
        offer = self.transfer.offer
        self.holes += self.transfer.holes
        for name, index in offer["names"]:
            if not self.transfer.is_dry:
                self.trees[name] = {"layer": offer["layers"][index][0].hex(),
                                    "entries": listing(self.known.__getitem__, offer["layers"][index][0])}
        self.transfer = None

    def end(self):
        need(all(not stream.data for stream in self.streams), "an end inside a frame")
        need(self.transfer is None and self.fetching is None and self.getting is None, "an end inside a transfer")
        return {"messages": dict(self.counts), "holes": self.holes, "trees": self.trees}


def main():
    with open(sys.argv[1], "rb") as file:
        reader = Reader(file.read(), "session")
    session = Session()
    while not reader.is_empty():
        side = reader.u8()
        session.feed(side, reader.bytes32())
    json.dump(session.end(), sys.stdout)


if __name__ == "__main__":
    main()
