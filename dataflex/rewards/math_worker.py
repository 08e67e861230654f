"""Run as a script: compare mathematical answers, one JSON pair [response, reference] per line of standard input.

Replies with one JSON line each: true, false, or null where the reference holds no expression.
"""

from __future__ import annotations

import json
import re
import sys

_MARKED = re.compile(r"\$|\\boxed|\\\(|\\\[|(?<!\\)\b[A-Za-z]{2,}")


def delimited(reference: str) -> str:
    """Return a bare formula as LaTeX between dollars; what has delimiters or words of its own stays as it is.

    Without, the package reads 3x as the number 3.
    """
    return reference if _MARKED.search(reference) else f"${reference}$"


def main() -> None:
    """Answer until the input ends."""
    from math_verify import parse, verify

    replies = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no reply
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        response, reference = json.loads(line)
        # The parent ends this process when it takes too long, so the package's own alarms are switched off.
        gold = parse(delimited(reference), parsing_timeout=None) or parse(reference, parsing_timeout=None)
        found = parse(response, parsing_timeout=None)
        print(json.dumps(verify(gold, found, timeout_seconds=None) if gold else None), file=replies, flush=True)


if __name__ == "__main__":
    main()
