"""Patterns for messages."""

import re

import pytest


def saying(*words):
    """A pattern for a message that has all `words` in this order."""
    return "(?s)" + ".*".join(map(re.escape, words))


def refused(*words):
    """Expects an error whose message has all `words` in this order."""
    return pytest.raises((TypeError, ValueError), match=saying(*words))
