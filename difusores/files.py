"""Where files come from (a folder, this package, the Hub) and how they are written: whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

ASSETS = os.path.join(os.path.dirname(__file__), "assets")
BUNDLED = "bundled:"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """Name a temporary file beside `path`, which takes its place at the end, or goes on failure."""
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def bundled_folder(name: str) -> str:
    """The folder of a model that is part of this package.

    Raises:
        OSError: there is none of that name; those that there are, are named.
    """
    entries = os.scandir(ASSETS) if os.path.isdir(ASSETS) else ()
    names = sorted(
        entry.name for entry in entries if os.path.isfile(os.path.join(entry.path, "model_index.json"))
    )
    if name not in names:
        raise OSError(f"there is no bundled model {name!r}; there are: {', '.join(names) or 'none'}")
    return os.path.join(ASSETS, name)


def find_file(
    source: str | os.PathLike[str], names: str | Iterable[str], subfolder: str | None = None, **hub: Any
) -> str:
    """Path of the first of `names` found in `source`.

    Args:
        source: a file itself, a folder, "bundled:<name>", or (where no such path exists) the id of a Hub
            repository.
        subfolder: searched first, then the root: the oldest repositories have all their files there.
        hub: for `huggingface_hub.hf_hub_download`, which is imported only where it is needed.

    Raises:
        OSError: nothing was found, or the Hub cannot be reached.
    """
    source = os.fspath(source)
    names = (names,) if isinstance(names, str) else tuple(names)
    if source.startswith(BUNDLED):
        source = bundled_folder(source.removeprefix(BUNDLED))
    if os.path.isfile(source):
        return source
    if os.path.isdir(source):
        folders = [os.path.join(source, subfolder), source] if subfolder else [source]
        for path in (os.path.join(folder, name) for folder in folders for name in names):
            if os.path.isfile(path):
                return path
        raise OSError(f"there is no file named {' or '.join(names)} in {' or '.join(map(repr, folders))}")
    return _download(source, names, [subfolder, None] if subfolder else [None], hub)


def _download(repository: str, names: tuple[str, ...], folders: list[str | None], hub: dict[str, Any]) -> str:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise OSError(
            f"{repository!r} is no folder of this machine, and huggingface_hub is not installed to fetch it"
        ) from error
    missing: Exception | None = None
    for folder, name in ((folder, name) for folder in folders for name in names):
        try:
            return str(hf_hub_download(repository, filename=name, subfolder=folder, **hub))
        except (EntryNotFoundError, OSError, ValueError) as error:
            # LocalEntryNotFoundError, a kind of EntryNotFoundError, means that the Hub was not reached
            if not isinstance(error, EntryNotFoundError) or isinstance(error, LocalEntryNotFoundError):
                raise OSError(
                    f"{repository!r} is no folder here, and reading {name} from the Hub failed: {error}"
                ) from error
            missing = error
    raise OSError(f"the Hub repository {repository!r} has no file named {' or '.join(names)}") from missing


def upload_folder(folder: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Upload a folder to a Hub repository, made if it is not there, and return the commit.

    Args:
        kwargs: `repo_id` (the folder's name if absent), `private`, `token`, `subfolder`, and what
            `huggingface_hub.HfApi.upload_folder` takes.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.pop("token", None))
    repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(folder)))
    repo = api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True)
    subfolder = kwargs.pop("subfolder", None)
    where = {"repo_id": repo.repo_id, "folder_path": os.fspath(folder), "path_in_repo": subfolder}
    return api.upload_folder(**where, **kwargs)
