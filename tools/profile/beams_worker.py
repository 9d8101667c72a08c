"""Run by ``tools.profile engine --workload beams`` in a process of its own: what our beam searches hold of the cache.

As ``engine_worker``, whose settings these are, but a line is {"prompts": [[...], ...], "new_tokens": 64, "beams": 4},
answered by the most blocks that the searches held at once for their sources and for all, and the bytes of a block.
"""

from __future__ import annotations

import sys
from typing import Any

from engine import LLM, BeamSearchParams
from tools.profile import engine_worker


def held(contender: Any, request: dict[str, Any]) -> dict[str, int]:
    """All prompts are searched together."""
    llm, length = contender.llm, request["new_tokens"]
    params = BeamSearchParams(request["beams"], min_tokens=length, max_tokens=length)
    for i, prompt in enumerate(request["prompts"]):
        llm.add_request(str(i), {"prompt_token_ids": prompt}, params)
    sources = everything = 0
    while llm.has_unfinished_requests():
        sources = max(sources, source_blocks(llm))
        everything = max(everything, llm.engine.cache.pool.num_held)
        llm.step()
    storage = llm.engine.cache.storage
    return {"sources": sources, "all": everything, "bytes": storage.blocks.nbytes // storage.num_blocks}


def source_blocks(llm: LLM) -> int:
    """The blocks that cross-attention reads for any beam that runs, by the tables that it reads them by."""
    cache, found = llm.engine.cache, set()
    for sequence in llm.engine.scheduler.live:
        if sequence.row is not None:
            count = cache.blocks_for(int(cache.source_lengths[sequence.row.index]))
            found.update(cache.source_tables[sequence.row.index, :count].tolist())
    return len(found)


if __name__ == "__main__":
    engine_worker.main(*sys.argv[1:], answer=held)
