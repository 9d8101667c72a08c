"""`python -m tools.profile.budget_worker ARCHITECTURE CASE...`: compiles cases and prints a JSON line a kernel."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from tools.profile.budget import compiled, resources
from tools.profile.budget_cases import CASES


def main(architecture: str, names: list[str]) -> None:
    known: dict[Any, dict[str, Any]] = {}  # cases share kernels
    with compiled(architecture) as kernels:
        for name in names:
            kernels.clear()
            try:
                CASES[name]()
                known |= {kernel: described(kernel, architecture) for kernel in kernels if kernel not in known}
                lines = [known[kernel] for kernel in dict.fromkeys(kernels)]
            except Exception as error:  # a kernel that does not compile is a finding, and the others go on
                lines = [{"error": f"{type(error).__name__}: {error}".strip().splitlines()[-1]}]
            for line in lines:
                text = json.dumps({"case": name, "architecture": architecture, **line})
                sys.stdout.write(text + "\n")  # at once, since other workers write to the same pipe
                sys.stdout.flush()


def described(kernel: Any, architecture: str) -> dict[str, Any]:
    if architecture.startswith("gfx"):
        return {"kernel": kernel.metadata.name, "warps": kernel.metadata.num_warps}
    taken = asdict(resources(kernel, architecture))
    return taken | taken.pop("instructions")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
