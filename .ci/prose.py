"""Reads the prose as an editor does: phrases that read oddly, and a better form.

    python .ci/prose.py [FILE ...]

Without files it reads all pages, docstrings, comments and messages. Code is left out of
pages, and all but strings and comments of modules. Code on a page is only measured: a
longer line is cut off on a laptop.
"""

import io
import os
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ["*.md", "docs/*.md"]
MODULES = ["optax_accum/**/*.py", "examples/*.py", "benchmarks/*.py", "docs/*.py"]
CODE_COLUMNS = 88

# What to avoid (a regular expression, whose spaces may be ends of lines), and what to
# write.
PHRASES = {
    r"\bso that\b": "so, or: to",
    r"(^|[.:;] )where (it|that|this|they|there|nothing|no|a|the|all)\b": "if, when",
    r"\b(is|are|gives?|give|to|for|by|have|has) another\b": "a different",
    r"(?<!there )(?<!that )\b(is|are|was|were) no (?!longer|more|less)": "is not",
    r"\bbeside\b": "besides, next to, with",
    r"\bwhat (is|was|are) (left|no|not|more|to be)\b": "a noun: the rest",
    r"\b(is|are|was) to be\b": "should be, must be, has to be",
    r"\b(goes|go|went) on\b": "continues",
    r"\btells\b": "says, shows, reports",
    r"\banew\b": "again",
    r"\bshall\b": "will, should",
    r"\bfor ever\b": "forever, or what really happens",
    r"\bnobody\b|\bno one\b": "name who or what",
    r"\bnevertheless\b": "still",
    r"\ba training(?! (loop|run|step|script|job|set|batch|example))": "a training run",
    r"\btrainings\b": "training runs",
    r"\bwhich is a test\b": "tested by",
    r"\b(at hand|too dear|of old|nothing but|all but)\b": "plainer words",
    r"\bmends?\b|\bmended\b": "fix, repair",
    r"\bhands? out\b": "yields, returns",
    r"\bmade? up\b(?! of)|\bmakes up\b": "simulated",
    r"\b(next to nothing|no matter)\b": "a number, or: any",
    r"\b(slots|forgiven|in turn|meter)\b": "the field's word",
}
SIMPLER = {
    re.compile(bad.replace(" ", r"\s"), re.IGNORECASE | re.MULTILINE): good
    for bad, good in PHRASES.items()
}


def page(text):
    """The lines of a page, without its code, and the lines of code that are cut off."""
    fence, prose, cut = "", [], []
    for number, line in enumerate(text.splitlines(), 1):
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if mark and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
            prose.append("")
        elif fence:
            prose.append("")
            if len(line.rstrip()) > CODE_COLUMNS:
                cut.append(
                    (number, f"{len(line)} columns: a page shows {CODE_COLUMNS}")
                )
        else:
            prose.append(re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", "`", line))
    return prose, cut


def module(text):
    """The lines of a module's strings and comments, as they are read."""
    prose = [""] * (text.count("\n") + 2)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            for number, line in enumerate(
                token.string.splitlines(), token.start[0] - 1
            ):
                prose[number] += re.sub(r"`[^`]*`", "`", line)
    return prose, []


def problems(path):
    """What to change in a file, as lines that an editor opens."""
    prose, cut = (page if path.suffix == ".md" else module)(path.read_text())
    found = cut if path.parent.name == "docs" else []
    text = "\n".join(line.strip() for line in prose)
    for bad, good in SIMPLER.items():
        for match in bad.finditer(text):
            number = text.count("\n", 0, match.start()) + 1
            found.append((number, f"“{' '.join(match[0].split())}”: {good}"))
    return [f"{path}:{number}: {what}" for number, what in sorted(found)]


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]] or sorted(
        Path(os.path.relpath(path))
        for pattern in PAGES + MODULES
        for path in ROOT.glob(pattern)
    )
    found = [problem for path in files for problem in problems(path)]
    print("\n".join(found) or f"{len(files)} files read well")
    sys.exit(bool(found))
