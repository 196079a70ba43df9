"""`python -m tests.walks`: takes many random walks, in parts that each have a seed, and says how many went well."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"


def main() -> None:
    """Print a line per part; of a failure the walk, and the seed that takes it again."""
    import torch
    from hypothesis import Phase, core, settings
    from hypothesis.stateful import run_state_machine_as_test

    from tests.test_walks import QUIET
    from tests.walks.neighbours import WalkAmongOthers, WalkCompiled

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--walks", type=int, default=200, help="Walks in all.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the first part.")
    parser.add_argument("--part", type=int, default=100, help="Walks of a part: one in fifty of compiled models.")
    parser.add_argument("--shrink", action="store_true", help="Look for the shortest walk that fails: minutes.")
    options = parser.parse_args()
    phases = (Phase.generate, Phase.shrink) if options.shrink else (Phase.generate,)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda unraisable: None  # a fault inside a destructor
    done, failed, began = 0, 0, time.monotonic()
    for seed in range(options.seed, options.seed + -(-options.walks // options.part)):
        core.global_force_seed = seed
        part = min(options.part, options.walks - done)
        for walk, count in ((WalkAmongOthers, part - part // 50), (WalkCompiled, part // 50)):
            if not count:
                continue
            try:
                given = settings(
                    **QUIET,
                    max_examples=count,
                    stateful_step_count=16,
                    print_blob=False,
                    report_multiple_bugs=False,
                    phases=phases,
                )
                run_state_machine_as_test(walk, settings=given)
            except Exception:
                failed += 1
                traceback.print_exc()
                print(f"seed {seed}: a walk of {walk.__name__} failed", flush=True)
        done += part
        print(f"seed {seed}: {done:,} walks, {failed} parts failed, {time.monotonic() - began:,.0f} s", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
