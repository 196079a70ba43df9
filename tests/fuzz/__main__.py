"""`python -m tests.fuzz`: reads many damaged files and says what came of them; `--only load --number 17` reads one."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"


def main() -> None:
    """Print a table of readers and outcomes, and every failure."""
    from tests.fuzz.judge import judge
    from tests.fuzz.readers import READERS, SHARES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000, help="Files in all, over every reader.")
    parser.add_argument("--only", choices=list(READERS), help="One reader alone.")
    parser.add_argument("--number", type=int, help="The number of one input, as a failure names it.")
    options = parser.parse_args()
    names = [options.only] if options.only else list(READERS)
    failures: list[str] = []
    for name in names:
        count = options.inputs if options.only else round(options.inputs * SHARES[name])
        numbers = [options.number] if options.number is not None else range(count)
        with tempfile.TemporaryDirectory() as folder:
            tally = judge(name, READERS[name](), numbers, Path(folder))
        print(f"{name}: {tally}", flush=True)
        failures += tally.failures
    print("\n".join(failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
