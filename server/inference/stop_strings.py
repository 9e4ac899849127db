"""Finds a stop string in a text that arrives in pieces (Knuth, Morris and Pratt 1977): one step for each character."""

from __future__ import annotations


class StopString:
    """One stop string. num_matched: how many of its first characters are the end of the text so far."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        # By length of a matched beginning: its longest shorter beginning that is also its end. Grows as needed.
        self._shorter = [0, 0]

    def find(self, piece: str) -> int | None:
        """Read the next piece; return how many of its characters complete the stop string, or None.

        piece: after a match, nothing more may be read.
        """
        read = 0
        while read < len(piece):
            if self.num_matched == 0:
                first = piece.find(self.text[0], read)
                if first < 0:
                    return None
                read = first
            self.num_matched = self._extended(self.num_matched, piece[read])
            read += 1
            if self.num_matched == len(self.text):
                return read
        return None

    def _extended(self, length: int, character: str) -> int:
        """Return the longest beginning that ends with `character`, after one of this length."""
        while length and self.text[length] != character:
            length = self._shorter_than(length)
        return length + (self.text[length] == character)

    def _shorter_than(self, length: int) -> int:
        while len(self._shorter) <= length:
            known = len(self._shorter)
            self._shorter.append(self._extended(self._shorter[known - 1], self.text[known - 1]))
        return self._shorter[length]
