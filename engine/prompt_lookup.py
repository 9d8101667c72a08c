"""Guesses from what a sequence has read: after the same few tokens as now, what came next the last time?

The source counts as read, where source and target share a vocabulary: summaries, corrections and extracts copy from it.
The idea is Saxena's prompt lookup decoding (2023).
"""

from __future__ import annotations

from engine.request import Sequence


class NgramIndex:
    """Where each run of ``least`` to ``most`` tokens of a growing text last ended, its very end left out."""

    def __init__(self, least: int, most: int) -> None:
        self.sizes = range(most, least - 1, -1)
        self.text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def extend(self, token_ids: list[int]) -> None:
        self.text += token_ids

    def match(self) -> tuple[int, int] | None:
        """The longest run that ends the text and is found earlier: its size and where it last ended, or None."""
        self._index()
        length = len(self.text)
        for size in self.sizes:
            end = self._ends.get(tuple(self.text[length - size :])) if size <= length else None
            if end is not None:
                return size, end
        return None

    def following(self, end: int, count: int) -> list[int]:
        """The tokens from ``end`` on; a run that reaches up to now goes on with itself."""
        period = len(self.text) - end
        return [self.text[end + i % period] for i in range(count)]

    def _index(self) -> None:
        for end in range(self._indexed + 1, len(self.text)):
            for size in self.sizes:
                if size <= end:
                    self._ends[tuple(self.text[end - size : end])] = end
        self._indexed = max(self._indexed, len(self.text) - 1)


class PromptLookup:
    """A drafter (``engine.speculation.Drafter``) that runs no model. The kind of a guess is the size of the run."""

    def __init__(self, least: int, most: int, reads_source: bool) -> None:
        self.least, self.most, self.reads_source = least, most, reads_source
        self._read: dict[Sequence, tuple[NgramIndex, int]] = {}  # with the number of the sequence's tokens in it
        self._ends: dict[Sequence, int] = {}

    def kinds(self, sequences: list[Sequence]) -> list[int | None]:
        self._read = {sequence: self._read_on(sequence) for sequence in sequences}
        found = [self._read[sequence][0].match() for sequence in sequences]
        self._ends = {s: match[1] for s, match in zip(sequences, found, strict=True) if match is not None}
        return [None if match is None else match[0] for match in found]

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        return [
            self._read[sequence][0].following(self._ends[sequence], count)
            for sequence, count in zip(sequences, most, strict=True)
        ]

    def _read_on(self, sequence: Sequence) -> tuple[NgramIndex, int]:
        index, known = self._read.get(sequence) or (NgramIndex(self.least, self.most), 0)
        if known == 0 and self.reads_source:
            index.extend(sequence.request.encoder_prompt_token_ids or [])
        index.extend(sequence.token_ids[known:])
        return index, len(sequence.token_ids)
