"""Fails unless a tag, the package, the changelog and the citation agree on the version.

python .github/check_release.py v0.1.0
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def versions() -> dict[str, str]:
    """Where a version stands, and which."""
    places = {
        "optax_accum/__init__.py": r'^__version__ = "(.+)"$',
        "CITATION.cff": r"^version: (.+)$",
        "CHANGELOG.md": r"^## \[?(\d[^\]\s]*)",
    }
    found = {}
    for name, pattern in places.items():
        match = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
        found[name] = match[1] if match else "none"
    return found


def main(tag: str) -> None:
    """Says what does not agree with `tag`."""
    wrong = {name: v for name, v in versions().items() if f"v{v}" != tag}
    for name, version in wrong.items():
        print(f"{name} has version {version}, the tag is {tag}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main(sys.argv[1])
