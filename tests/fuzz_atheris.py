"""Coverage-guided fuzzing of the readers, for nightly runs: needs atheris (`pip install atheris`), which no test does.

    python tests/fuzz_atheris.py READER [-max_total_time=3600]      READER: a name in test_volumes_fuzz.READERS

A reader returns or raises MedsegError. Anything else, more than 2 s or more than 1 GB is a finding: libFuzzer writes
the input to `crash-...`, `timeout-...` or `oom-...`; add it to tests/corpus.py when it is mended.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

LIMITS = ["-timeout=2", "-rss_limit_mb=3072", "-max_len=65536"]  # the interpreter and its libraries take up to 2 GB


def fuzz(name: str, options: list[str]) -> None:
    """Fuzz one reader until libFuzzer ends."""
    import atheris  # pyright: ignore[reportMissingImports]

    with atheris.instrument_imports(include=["medseg"]):
        from test_volumes_fuzz import READERS

        from medseg.errors import MedsegError
        from medseg.volumes import read_geometry, read_image, read_label

    suffix, make = READERS[name]
    folder = Path(tempfile.mkdtemp(prefix="medseg-fuzz-"))
    path = folder / f"input{suffix}"
    seeds = folder / "seeds"
    seeds.mkdir()
    (seeds / "good").write_bytes(make(folder))

    def one(data: bytes) -> None:
        path.write_bytes(data)
        for read in (read_image, read_label, read_geometry):
            with contextlib.suppress(MedsegError):
                read(path)

    atheris.Setup([sys.argv[0], *LIMITS, *options, str(seeds)], one)
    atheris.Fuzz()


def main(arguments: list[str]) -> int:
    """Exit code: 0 ended, 2 wrong name, 5 no atheris."""
    from test_volumes_fuzz import READERS

    if not arguments or arguments[0] not in READERS:
        print(f"{__doc__}\nREADER: {', '.join(READERS)}", file=sys.stderr)
        return 2
    try:
        import atheris  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("atheris is not installed: pip install atheris (Linux; a tool for nightly runs)", file=sys.stderr)
        return 5
    fuzz(arguments[0], arguments[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
