"""Which files are images, what format they are, and what their cases are called."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from medseg.errors import DataError, FormatError, UsageError
from medseg.files import full_suffix, require_file
from medseg.volumes_pictures import sniff_picture

__all__ = [
    "NO_IMAGES",
    "case_id",
    "check_unique",
    "closed_folders",
    "find_format",
    "hidden_id",
    "list_inputs",
    "natural_key",
    "one_kind",
    "same_file",
]

NO_IMAGES = "the folder holds no images"  # what `list_inputs` says of one: who calls it may know more
_DICOMDIR = "1.2.840.10008.1.3.10"  # media storage directory, PS3.4 annex I: a table of contents, no image

SUFFIXES = {
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".mha": "metaimage",
    ".mhd": "metaimage",
    ".nrrd": "nrrd",
    ".seg.nrrd": "nrrd",
    ".nhdr": "nrrd",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".ome.tif": "tiff",
    ".ome.tiff": "tiff",
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".gif": "gif",
    ".dcm": "dicom",
}


def find_format(path: str | Path, *, case: str | None = None) -> str:
    """Format of an image file or DICOM folder, by suffix, confirmed by content where the content says so.

    Raises:
        FormatError: E301 an unknown format, or a picture whose content is another format than its suffix.
    """
    path = Path(path)
    if os.path.isdir(path):
        return "dicom"
    named = SUFFIXES.get(full_suffix(path)) or SUFFIXES.get(path.suffix.lower())
    with require_file(path, case=case).open("rb") as file:
        start = file.read(132)
    actual = sniff_picture(start) or ("dicom" if start[128:132] == b"DICM" else None)
    if named is None and actual is None:
        expected = ", ".join(SUFFIXES)
        found = f"starts with {start[:8]!r}"
        fix = "convert it to one of these: volumes to .nii.gz, pictures to .png or .tif"
        if path.suffix.lower() in (".hdr", ".img"):
            fix = "save the pair of .hdr and .img as one .nii file"
        raise FormatError(
            "unknown image format", code="E301", case=case, file=path, expected=expected, found=found, fix=fix
        )
    if named is not None and actual is not None and named != actual:
        message = f"named {full_suffix(path)} but the content is {actual.upper()}"
        fix = "rename the file, or save it again"
        raise FormatError(message, code="E301", case=case, file=path, expected=named, found=actual, fix=fix)
    return named or actual or ""


def case_id(path: str | Path) -> str:
    """Id of the case that a file holds: its name without the format's suffix; a keyed hash for a DICOM series.

    Names of DICOM folders and files often hold the patient's name or UIDs, so nothing of them goes into the id.

    >>> case_id("images/liver.v2_7.nii.gz"), case_id("a/b.tar.png"), case_id("-x.TIF")
    ('liver.v2_7', 'b.tar', '-x')
    """
    path = Path(path)
    suffix = full_suffix(path)
    known = suffix in SUFFIXES and suffix != ".dcm"
    if not known and (os.path.isdir(path) or (os.path.isfile(path) and find_format(path) == "dicom")):
        from medseg.volumes_dicom import series_id

        return series_id(path)
    if not known:
        suffix = Path(path.name.lower()).suffix
        suffix = suffix if suffix in SUFFIXES else ""
    return path.name[: len(path.name) - len(suffix)]


def list_inputs(paths: Sequence[str | Path], *, skip: str | Path | None = None, unique: bool = True) -> list[Path]:
    """Image files out of files, folders and glob patterns, in natural order, each once.

    `skip`: a folder below the named ones whose images are left out, such as that of the results. `unique`: refuse two
    files of one case.

    A folder stands for all images in it and below it; a folder with DICOM files is one input (its series). Hidden files
    and files of other formats in folders are left out; a file that is named is always taken. A name that exists is
    never read as a pattern, so `[` and `*` in names are safe.

    Raises:
        UsageError: E103 nothing found; two inputs with the same case id.
    """
    found: dict[tuple[str, str], Path] = {}
    for name in paths:
        path = Path(name)
        if not str(name):  # an empty shell variable, which Path would take for the current folder
            raise UsageError("an input without a name", code="E103", expected="a file, folder or pattern", found="''")
        try:
            is_folder, is_there = path.is_dir(), path.exists() or path.is_symlink()
        except PermissionError as error:  # of the folder that it lies in
            text, fix = "no permission to look at an input", "allow it (chmod u+rx for its folder)"
            raise UsageError(text, code="E103", file=path, found=error.strerror, fix=fix) from None
        except (OSError, ValueError) as error:  # a name that is too long, or that holds a zero byte
            raise UsageError("no possible name of a file", code="E103", file=path, found=str(error)[:80]) from None
        if is_folder:
            inside = _images_below(path, skip)
            if not inside:
                expected = "images, or the files of a DICOM series"
                fix = "name a folder with images"
                raise UsageError(NO_IMAGES, code="E103", file=path, expected=expected, fix=fix)
        elif is_there:
            inside = [path]
        else:
            closed = closed_folders(str(name))
            matches = [part for part in map(Path, glob.glob(str(name), recursive=True)) if part.parent not in closed]
            inside = sorted([*matches, *closed], key=natural_key)
            if skip is not None and _is_below(Path(skip), _fixed_part(path)):
                inside = [part for part in inside if not _is_below(part, Path(skip), or_same=True)]
            inside = [image for part in inside for image in _images_below(part, skip)]
            if not inside:
                raise UsageError("no such file, folder or pattern", code="E103", file=path, found="nothing")
        for image in inside:
            found.setdefault(same_file(image), image)
    if not found:
        raise UsageError("no inputs were named", code="E103", expected="files, folders or patterns")
    if unique:
        check_unique(list(found.values()))
    return list(found.values())


def same_file(path: Path) -> tuple[str, str]:
    """What two spellings of one input share: the place that links lead to, and for a file its own name (its case)."""
    return os.path.realpath(path), "" if os.path.isdir(path) else path.name


def _is_segmentation(path: Path) -> bool:
    """Whether a file's name says that it is a segmentation of 3D Slicer."""
    return full_suffix(path) == ".seg.nrrd"


def one_kind(paths: Sequence[Path], *, images: bool) -> list[Path]:
    """Of files among which segmentations of 3D Slicer lie beside their images (`p1.seg.nrrd`, `p1.nrrd`) the images, or
    else the segmentations and what is no segmentation's image."""
    if images:
        return [path for path in paths if not _is_segmentation(path)]
    drawn = {case_id(path) for path in paths if _is_segmentation(path)}
    return [path for path in paths if not drawn or _is_segmentation(path) or case_id(path) not in drawn]


def closed_folders(pattern: str, root: str | Path = "") -> list[Path]:
    """Folders on the way of a glob pattern that this user may not look into: `glob` passes over them without a word."""
    parts = Path(pattern).parts
    closed: dict[Path, None] = {}
    for count, part in enumerate(parts[1:], start=1):
        need = os.X_OK | (os.R_OK if glob.has_magic(part) else 0)
        for place in glob.glob(str(Path(*parts[:count])), root_dir=root or None, recursive=True):
            folder = Path(root, place)
            if os.path.isdir(folder) and not os.access(folder, need) and folder.name != "lost+found":
                closed[folder] = None
    return list(closed)


def natural_key(path: str | Path) -> tuple:
    """Sort key that puts `liver_2` before `liver_10`."""
    return tuple((int(t), "") if t.isdecimal() and t.isascii() else (-1, t) for t in re.split(r"([0-9]+)", str(path)))


def _fixed_part(pattern: Path) -> Path:
    """The folder that all matches of a glob pattern lie in."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))


def _is_below(path: Path, folder: Path, *, or_same: bool = False) -> bool:
    path, folder = path.resolve(), folder.resolve()
    return folder in path.parents or (or_same and path == folder)


def _images_below(folder: Path, skip: str | Path | None = None) -> list[Path]:
    if not os.path.isdir(folder):
        return [folder]
    images: list[Path] = []
    left_out = None if skip is None else Path(skip).resolve()

    def unread(place: str) -> None:  # an input that fails when it is read: what lies there is not left out in silence
        if Path(place).name != "lost+found":
            images.append(Path(place))

    for base, folders, names in os.walk(folder, onerror=lambda error: unread(error.filename)):
        if not os.access(base, os.X_OK):  # the names in it can be read, nothing else
            unread(base)
            folders.clear()
            continue
        folders[:] = sorted(
            (name for name in folders if not name.startswith(".") and Path(base, name).resolve() != left_out),
            key=natural_key,
        )
        files = [Path(base, name) for name in sorted(names, key=natural_key) if not name.startswith(".")]
        known = [file for file in files if SUFFIXES.get(full_suffix(file), "dicom") != "dicom"]
        images += known
        if any(_is_dicom(file) for file in files if file not in known):
            images.append(Path(base))
    return sorted(images, key=natural_key)


def hidden_id(path: Path) -> str | None:
    """An id for a DICOM folder or file that has none because it cannot be read; None for anything else.

    Its name often is the patient's, so only a hash of its place is taken.
    """
    if not (os.path.isdir(path) or full_suffix(path) == ".dcm" or (os.path.isfile(path) and _is_dicom(path))):
        return None
    place = os.path.realpath(path).encode("utf-8", "surrogateescape")
    return "dicom-unread-" + hashlib.blake2b(place, digest_size=6).hexdigest()


def _is_dicom(path: Path) -> bool:
    """Whether a file is DICOM and no table of contents (DICOMDIR), which lies beside the images of a CD."""
    try:
        with path.open("rb") as file:
            if file.read(132)[128:] != b"DICM":
                return False
    except OSError:
        return False
    if path.name.upper() == "DICOMDIR":  # PS3.10, 8.6: no other file has this name
        return False
    from pydicom.filereader import read_file_meta_info

    try:
        return read_file_meta_info(path).get("MediaStorageSOPClassUID") != _DICOMDIR
    except Exception:  # pydicom raises what it likes on bad headers; the file is refused when it is read
        return True


def check_unique(images: Sequence[Path]) -> None:
    """Refuse two files of one case (UsageError E103)."""
    ids: dict[str, Path] = {}
    for image in images:
        try:
            name = case_id(image)
        except DataError:
            continue  # refused when it is read, with its own message; the others go on
        if name in ids:
            raise UsageError(
                f"two inputs have the same case id {name}",
                code="E103",
                file=image,
                found=f"{ids[name]} too",
                fix="rename one, or run them into different output folders",
            )
        ids[name] = image
