"""Checkpoints that survive: whole before the old one is touched, known by their SHA-256, read as data, never as code.

    store = CheckpointStore(run_folder)
    store.save(state)                   last.pt; the one before becomes last.prev.pt
    store.save(state, "best")           best.pt
    state, notices = store.load("last") falls back to last.prev.pt, and says so

The order of a save: write a temporary file, sync it, read it back; note its SHA-256 in index.json; give the old file
its second name; rename. Killed at any point, a whole checkpoint stands under one of the names and its sum in the index.
A state holds tensors and plain values only; files are opened with `weights_only=True`, always.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from medseg.checkpoint_model import Model, load_model
from medseg.checkpoint_read import read_state
from medseg.checkpoint_run import check_run
from medseg.errors import CheckpointError
from medseg.files import atomic_path, fail_point, sha256_file, write_json
from medseg.files_atomic import temporary_name

__all__ = ["FORMAT", "CheckpointStore", "Model", "load_model", "read_state"]

FORMAT = "medseg-checkpoint-1"
_REMEMBERED = 8  # sums of one name; with one more the files are read to see which of them stand
_FALLBACK = {"last": ("last.pt", "last.prev.pt"), "best": ("best.pt",)}


class CheckpointStore:
    """The checkpoints of one run folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def index(self) -> dict[str, Any]:
        """What index.json says: {"format", "known": {sha256: facts}}; empty when it is missing or unreadable."""
        with contextlib.suppress(OSError, ValueError):
            content = json.loads((self.folder / "index.json").read_text(encoding="utf-8"))
            if isinstance(content, dict) and isinstance(content.get("known"), dict):
                return content
        return {"format": FORMAT, "known": {}}

    def save(self, state: Mapping[str, Any], name: str = "last", *, facts: Mapping[str, Any] | None = None) -> Path:
        """Save a state as NAME.pt.

        Args:
            state: tensors and plain values.
            name: "last" (the one before is kept as last.prev.pt), "best", or another, for good.
            facts: plain values for the index (epoch, score), for people who look into it.

        Raises:
            ResourceError: E501 no space left, E502 not writable; what was there before is untouched.
        """
        path = self.folder / f"{name}.pt"

        def verify(temporary: Path) -> None:
            _check_archive(temporary)
            known = self.index["known"]
            self._note(sha256_file(temporary), {"name": path.name, **(facts or {})})
            fail_point("indexed")
            # a damaged last.pt, after which this run went on from last.prev.pt, must not take that one's place
            if name == "last" and path.exists() and (not known or sha256_file(path) in known):
                self._rotate(path)
            fail_point("rotated")

        with atomic_path(path, verify=verify) as temporary:
            torch.save({"format": FORMAT, **state}, temporary)
        fail_point("saved")
        return path

    def load(self, name: str = "last") -> tuple[dict[str, Any], list[str]]:
        """The newest whole state called `name` of this run, and what should be told (that an older one was taken).

        A state whose pipeline or split is not that of the folder's pipeline.yaml and split.json is of another run and
        is not taken, whatever index.json says or whether there is one.

        Raises:
            CheckpointError: E360, there is none that can be used; E366, there is none but of another run.
        """
        notices: list[str] = []
        refused: list[CheckpointError] = []
        for file in _FALLBACK.get(name, (f"{name}.pt",)):
            path = self.folder / file
            if not path.exists():
                continue
            try:
                state = self.read(path)
                compared = check_run(state, path)
            except CheckpointError as error:
                refused.append(error)
                notices.append(f"{file} cannot be used ({error.message}); trying the one before")
                continue
            if refused:
                notices.append(f"continuing from {file}")
            if not compared and not self.index["known"]:
                notices.append(f"{file} is taken as it is: no index.json, pipeline.yaml or split.json tells its run")
            return state, notices
        if refused and all(error.code == "E366" for error in refused):
            raise refused[0]
        found = "; ".join(f"{Path(e.file or '').name}: {e.message}" for e in refused) or "no checkpoint"
        raise CheckpointError(
            "there is no checkpoint to continue from" if name == "last" else f"there is no usable {name}.pt",
            code="E360",
            file=self.folder,
            expected=" or ".join(_FALLBACK.get(name, (f"{name}.pt",))),
            found=found,
            fix=None if refused or name != "last" else "it ended before anything was saved: train it anew",
        )

    def read(self, path: Path) -> dict[str, Any]:
        """The state in `path`, if its SHA-256 is one that the index knows.

        Without an index the archive's own checksums decide.

        Raises:
            CheckpointError: E361 not whole, E362 not a checkpoint of medseg.
        """
        known = self.index["known"]
        if known and sha256_file(path) not in known:
            fix = "it was damaged or changed after it was written"
            raise CheckpointError("its checksum is not the one that was noted", code="E361", file=path, fix=fix)
        return read_state(path, verify=not known)

    def _note(self, digest: str, facts: dict[str, Any]) -> None:
        index = self.index
        known = {**index["known"], digest: facts}
        name = facts["name"]
        noted = [old for old, entry in known.items() if entry.get("name") == name]
        if len(noted) > _REMEMBERED:
            # how new a sum is does not tell whether its file got its name: saves may have been killed before that
            paths = [self.folder / file for file in _FALLBACK.get(Path(name).stem, (name,))]
            standing = {digest, *(sha256_file(path) for path in paths if path.exists())}
            known = {old: entry for old, entry in known.items() if old not in noted or old in standing}
        write_json(self.folder / "index.json", {**index, "known": known})

    def _rotate(self, path: Path) -> None:
        # a second name for the old file, so that at no moment there is none called last.pt
        second = self.folder / temporary_name(".prev")
        try:
            os.link(path, second)
        except OSError:  # a file system without hard links
            second.write_bytes(path.read_bytes())
        os.replace(second, path.with_name("last.prev.pt"))


def _check_archive(path: Path) -> None:
    """What was written can be read: the archive's checksums are compared before the old checkpoint is touched."""
    with zipfile.ZipFile(path) as archive:
        if (broken := archive.testzip()) is not None:
            raise CheckpointError("the checkpoint was not written correctly", code="E361", file=path, found=broken)
