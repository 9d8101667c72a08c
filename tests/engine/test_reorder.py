"""``KVCache.reorder``: rows of many requests at once take what others of theirs hold."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from engine.kv_cache import KVCache, Row
from tests.engine.hash_model import HashStorage

BLOCK, MAX_LEN = 4, 64


def make(num_blocks: int = 400, num_rows: int = 24) -> KVCache:
    return KVCache(HashStorage(num_blocks, BLOCK), num_rows, MAX_LEN)


def write(cache: KVCache, row: Row, start: int, tokens: list[int]) -> None:
    assert cache.grow(row, start, start + len(tokens))
    cache.copy_shared()
    cache.tokens[row.index, start : start + len(tokens)] = tokens


def check_holders(cache: KVCache, rows: list[Row]) -> None:
    expected = Counter(block for row in rows for block in row.blocks)
    assert {block: count for block, count in enumerate(cache.pool.holders) if count} == dict(expected)
    assert cache.pool.num_available == cache.num_blocks - len(expected)
    for row in rows:
        assert cache.tables[row.index, : len(row.blocks)].tolist() == row.blocks
    assert len({id(row.blocks) for row in rows}) == len(rows)


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_requests_of_all_lengths_follow_their_parents(seed: int) -> None:
    rng, cache = random.Random(seed), make()
    groups = [[cache.open_row(None) for _ in range(width)] for width in (4, 1, 7, 2)]
    rows = [row for group in groups for row in group]
    lengths = {id(group): rng.randrange(1, 14) for group in groups}
    history: dict[int, list[int]] = {row.index: [] for row in rows}
    for group in groups:  # the first row has the prompt, and the others are forked from it
        history[group[0].index] = [rng.randrange(50) for _ in range(lengths[id(group)])]
        write(cache, group[0], 0, history[group[0].index])
    for step in range(30):
        parents: list[int] = []
        for group in groups:
            first = len(parents)
            parents += [first + (rng.randrange(len(group)) if step else 0) for _ in group]
        known = [(list(rows[p].blocks), list(history[rows[p].index]), rows[p].num_known, rows[p].tip) for p in parents]
        cache.reorder(rows, parents)
        for row, (blocks, tokens, num_known, tip) in zip(rows, known, strict=True):
            assert (row.blocks, row.num_known, row.tip) == (blocks, num_known, tip)
            assert cache.tokens[row.index, : len(tokens)].tolist() == tokens
            history[row.index] = list(tokens)
        check_holders(cache, rows)
        for row in rows:
            tokens, token = history[row.index], rng.randrange(50)
            write(cache, row, len(tokens), [token])
            tokens.append(token)
            cache.remember(row, tokens, len(tokens))
        held = Counter(block for row in rows for block in row.blocks)
        assert all(held[row.blocks[-1]] == 1 for row in rows)  # each writes to a block of its own
    for row in rows:
        cache.close_row(row)
    assert not any(cache.pool.holders)


def test_rows_that_change_places_take_and_drop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make()
    rows = [cache.open_row(None) for _ in range(3)]
    for i, row in enumerate(rows):
        write(cache, row, 0, [i] * 6)
    changes: list[object] = []
    monkeypatch.setattr(cache.pool, "hold", changes.extend)
    before = [row.blocks for row in rows]
    cache.reorder(rows, [2, 0, 1])
    assert [row.blocks for row in rows] == [before[2], before[0], before[1]] and not changes
    assert cache.tokens[[row.index for row in rows], 5].tolist() == [2, 0, 1]
    check_holders(cache, rows)


def test_what_is_lost_is_kept_while_it_is_known_and_cleared_if_it_is_broken() -> None:
    cache = make()
    rows = [cache.open_row(None) for _ in range(2)]
    for row, token in zip(rows, (7, 8), strict=True):
        write(cache, row, 0, [token] * 9)
        cache.remember(row, [token] * 9, 9)
    lost = list(rows[1].blocks)
    cache.reorder(rows, [0, 0])
    again = cache.open_row(None)
    assert cache.take_prefix(again, [8] * 9) == 8 and again.blocks == lost[:2]
    cache.discard(again)
    cache.storage.values[lost] = 5  # type: ignore[attr-defined]
    cache.close_row(again)
    assert not cache.storage.values[lost[:2]].any()  # type: ignore[attr-defined]
