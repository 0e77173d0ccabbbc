"""Processes that do not run the caller's script again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_script"]


@contextmanager
def without_script() -> Iterator[None]:
    """Start processes without the script that is running, for work that stands in medseg's own modules.

    A process that is not forked imports the script that started it first, in case the work stands there. A script
    without `if __name__ == "__main__":` would then train once more in every process, so `multiprocessing` is not
    told of it. Processes that are started later, outside, are told as ever.

    >>> import sys
    >>> before = dict(vars(sys.modules["__main__"]))
    >>> with without_script():
    ...     vars(sys.modules["__main__"]).get("__file__")
    >>> vars(sys.modules["__main__"]) == before
    True
    """
    facts = vars(sys.modules["__main__"])  # what multiprocessing.spawn.get_preparation_data looks at
    kept = {name: facts[name] for name in ("__spec__", "__file__") if name in facts}
    facts.pop("__file__", None)
    facts["__spec__"] = None
    try:
        yield
    finally:
        facts.pop("__spec__")
        facts.update(kept)
