"""What an import costs: processor seconds of fresh Python processes, in turns.

python -m benchmarks.imports
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.harness import RESULTS, Timer, compare, machine, write_results

DIFFUSERS = "import diffusers"
PIPELINE = "from diffusers import DiTPipeline"
IMPORTS = {
    DIFFUSERS: DIFFUSERS,
    "import slora_diffusers": "import slora_diffusers",
    "a pipeline of diffusers": PIPELINE,
    "a pipeline, and load_serial_lora": f"{PIPELINE}; from slora_diffusers import load_serial_lora",
}
# What stands before and after the import in the process that is timed.
PROGRAM = "import time; start = time.process_time(); {}; print(time.process_time() - start)"


class Fresh(Timer):
    """Takes the time that a process says it needed."""

    def time(self, call: Callable[[], bytes]) -> float:
        """Processor seconds between the start of a fresh process's program and its end."""
        return float(call().split()[-1])


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, write, and return the path of the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="How often everything is timed.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="Folder of imports.json.")
    options = parser.parse_args(argv)
    run = partial(subprocess.check_output, stderr=subprocess.DEVNULL)
    programs = {name: partial(run, [sys.executable, "-c", PROGRAM.format(code)]) for name, code in IMPORTS.items()}
    seconds = Fresh(options.rounds).alternate(programs)
    results = {"machine": machine(), "rounds": options.rounds, "imports": compare(seconds, [DIFFUSERS])}
    return write_results("imports", results, options.output)


if __name__ == "__main__":
    print(main())
