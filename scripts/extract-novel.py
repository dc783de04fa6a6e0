#!/usr/bin/env python3
"""Writes assets/northanger-abbey/text.txt: chapters 1 and 2 of the novel, from Debian's r-cran-janeaustenr.

    apt-get download r-cran-janeaustenr=1.0.0-1 && dpkg-deb -x r-cran-janeaustenr_*.deb janeaustenr
    scripts/extract-novel.py janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb > text.txt
"""

import re
import struct
import sys
import zlib

CHAPTERS = 2


def novels(raw):
    """The novels of an R database of character vectors: lists of lines."""
    at = 0
    while at < len(raw):
        # The length of the data, the compressed data: its header, a vector's type and length, and
        # for each string its type, length and bytes.
        stream = zlib.decompressobj()
        data = stream.decompress(raw[at + 4 :])
        at = len(raw) - len(stream.unused_data)
        place = 2 + 12 + 4 + 5
        (_, count), place = struct.unpack(">ii", data[place : place + 8]), place + 8
        lines = []
        for _ in range(count):
            (_, length), place = struct.unpack(">ii", data[place : place + 8]), place + 8
            lines.append(data[place : place + length].decode())
            place += length
        yield lines


def typeset(paragraph):
    """One line, with the quotes and dashes of the books that the model was trained on."""
    text = " ".join(paragraph.split()).replace("--", "—").replace("_", "")
    for straight, opening, closing in [('"', "“", "”"), ("'", "‘", "’")]:
        text = re.sub(rf"(^|[\s(\[“—-]){straight}", rf"\1{opening}", text)
        text = text.replace(straight, closing)
    return text


def main():
    raw = open(sys.argv[1], "rb").read()
    novel = next(n for n in novels(raw) if n[0] == "NORTHANGER ABBEY")
    chapters = re.split(r"\n+CHAPTER \d+\n+", "\n".join(novel))[1 : CHAPTERS + 1]
    paragraphs = [p for c in chapters for p in re.split(r"\n\s*\n", c) if p.strip()]
    print("\n\n".join(map(typeset, paragraphs)))


main()
