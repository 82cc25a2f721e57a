"""How fast is it? Run `python tests/benchmark.py`; each benchmark is one function that prints its own lines.

A ratio travels from machine to machine better than a speed does, so both sides are timed in turn in the same run, and the
ratio of their medians comes first.
"""

import argparse
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frozen_lake import FrozenLake, Lake, random_lakes

SECONDS = 0.3  # of one repeat


def machine() -> str:
    """The processor and the versions that the figures belong to."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor without a name
        pass
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, gymnasium {gymnasium.__version__}"
    return f"{cpu}, {os.cpu_count()} cores, {versions}"


def alternate(repeats: int, *sides: Callable[[], float]) -> list[list[float]]:
    """Time the sides in turn, so that whatever else the machine does meets all of them; one list of results a side."""
    for side in sides:
        side()  # warm up
    return [list(results) for results in zip(*([side() for side in sides] for _ in range(repeats)))]


def our_speed(lakes: list[Lake]) -> Callable[[], float]:
    """A function that plays random actions on all lakes at once and returns environment steps a second."""
    rng = np.random.default_rng(0)
    env = FrozenLake(lakes, rng)
    actions = rng.integers(0, 4, (64, len(lakes)))  # drawn beforehand on both sides: what is timed is the environment

    def run() -> float:
        env.reset()
        begin, steps = time.perf_counter(), 0
        for action in itertools.cycle(actions):
            _, _, terminated, truncated = env.step(action)
            env.reset(terminated | truncated)
            steps += len(lakes)
            if (seconds := time.perf_counter() - begin) > SECONDS:
                return steps / seconds

    return run


def gymnasium_speed(lakes: list[Lake]) -> Callable[[], float]:
    """The same with one gymnasium environment a lake, which take turns: an episode each."""
    envs = [gymnasium.make("FrozenLake-v1", desc=list(lake.rows), is_slippery=False) for lake in lakes]
    actions = itertools.cycle(np.random.default_rng(0).integers(0, 4, 10_000).tolist())
    turns = itertools.cycle(envs)

    def run() -> float:
        begin, steps = time.perf_counter(), 0
        for env in turns:
            env.reset()
            for action in actions:
                _, _, terminated, truncated, _ = env.step(action)
                steps += 1
                if terminated or truncated:
                    break
            if (seconds := time.perf_counter() - begin) > SECONDS:
                return steps / seconds

    return run


def environment(repeats: int, lakes: int) -> None:
    """Environment steps a second, resets included: FrozenLake against gymnasium's FrozenLake-v1."""
    maps = random_lakes(lakes, np.random.default_rng(0))
    ours, theirs = alternate(repeats, our_speed(maps), gymnasium_speed(maps[:100]))
    print(f"environment: {statistics.median(ours) / statistics.median(theirs):.0f} times gymnasium's steps a second")
    for name, speeds in ((f"FrozenLake, {lakes:,} lakes at once", ours), ("gymnasium.make('FrozenLake-v1')", theirs)):
        print(f"    {name:<36} {statistics.median(speeds):>14,.0f} steps/s  ({min(speeds):,.0f} to {max(speeds):,.0f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="timings of each side, of which the median counts (default 7)")
    parser.add_argument("--lakes", type=int, default=4000, help="lakes stepped at once (default 4000)")
    args = parser.parse_args()
    environment(args.repeats, args.lakes)
    print(machine())


if __name__ == "__main__":
    main()
