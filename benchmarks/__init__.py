"""What is measured, and shown in the documentation: ``python -m benchmarks``."""

import sys
from pathlib import Path

# How the tests read compiled programs and find Optax's optimizers serves here too.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
