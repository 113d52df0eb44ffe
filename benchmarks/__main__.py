"""Lists the benchmarks and runs them.

python -m benchmarks                  # the list
python -m benchmarks stream           # one, to out/stream.csv and out/stream.svg
python -m benchmarks stream --quick   # a look, in seconds
python -m benchmarks stream --help    # what it measures, and its options
python -m benchmarks all --docs       # everything that the documentation shows
"""

import importlib
import subprocess
import sys

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import shared

# What each measures, and how long that takes on two CPU cores.
BENCHMARKS = {
    "stream": ("time and memory of accumulating across steps", "3 min"),
    "in_step": ("time and memory of micro-batches inside one step", "8 min"),
    "decoder": ("what accumulating adds to the step of a transformer", "8 min"),
    "encoder": ("a contrastive loss, its encoders in micro-batches", "4 min"),
    "temporaries": ("what each Optax optimizer holds in memory", "6 min"),
    "collectives": ("what one update exchanges between devices", "30 s"),
    "exchange": ("bytes and time of one exchange per update", "2 min"),
    "packing": ("how fast and how densely documents are packed", "10 s"),
    "planning": ("the memory plan of a model too large to run here", "1 min"),
    "equivalence": ("losses that micro-batches change, and their causes", "1 min"),
    "numerics": ("how exact a sum of k gradients is", "30 s"),
    "digits": ("one training on global batches and on micro-batches", "1 min"),
    "contrastive": ("a contrastive loss, exactly and by plain accumulation", "2 min"),
    "char_lm": ("token weights against a mean of means", "2 min"),
}


def main(arguments: list[str]) -> None:
    """Runs what the command line says."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        table = Table(box=box.SIMPLE_HEAD, padding=0)
        for heading in ("benchmark", "measures", "takes about"):
            table.add_column(heading, no_wrap=True)
        for benchmark, (summary, time) in BENCHMARKS.items():
            table.add_row(benchmark, summary, time)
        Console().print(table)
    elif name == "all":
        # Each in a process of its own: they need different numbers of devices.
        for benchmark in BENCHMARKS:
            print(f"--- {benchmark}", flush=True)
            command = [sys.executable, "-m", "benchmarks", benchmark, *rest]
            subprocess.run(command, check=True)
    elif name in BENCHMARKS:
        shared.run(name, importlib.import_module(f"benchmarks.{name}"), rest)
    else:
        sys.exit(f"{name!r} is not one of all, {', '.join(BENCHMARKS)}")


if __name__ == "__main__":
    main(sys.argv[1:])
