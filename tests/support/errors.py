"""Patterns for messages."""

import re


def saying(*words):
    """A pattern for a message that has all `words` in this order."""
    return "(?s)" + ".*".join(map(re.escape, words))
