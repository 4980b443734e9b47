"""Data sets fetched from the Hugging Face hub."""

from pathlib import Path

from gatewright.extras import require

HUB_IDS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
# The hub keeps a parquet copy of most data sets, whatever their own format, on this branch.
PARQUET_BRANCH = "refs/convert/parquet"
TIMEOUT = 5.0  # seconds


def download_parquet(name: str, *, instead: str) -> Path:
    """Fetch the parquet files of a hub data set, or find them among earlier downloads.

    Args:
        name: `owner/name`, `cifar10` or `cifar100`.
        instead: A sentence about other data to train on; it ends the sentence that says the hub cannot be reached.

    Returns:
        The folder that holds them, in the hub's own cache.

    Raises:
        ConnectionError: If the hub cannot be reached, or may not be (`HF_HUB_OFFLINE`), and there is no earlier
            download.
        ImportError: If huggingface_hub is not installed.
        ValueError: If the hub has no such data set, does not show it to you, or has no parquet files of it.
    """
    hub_id = HUB_IDS.get(name, name)
    errors = require("huggingface_hub.errors", "train")
    try:
        folder = _snapshot(hub_id, "main")
        return folder if any(folder.rglob("*.parquet")) else _snapshot(hub_id, PARQUET_BRANCH)
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"the hub has no parquet files of {hub_id}: download it yourself, and {instead}") from error
    except errors.RepositoryNotFoundError as error:
        hint = "check the name, or log in with: hf auth login"
        raise ValueError(f"the hub has no data set {hub_id}, or shows it to members only: {hint}") from error
    except Exception as error:  # of whichever HTTP library the installed huggingface_hub stands on
        raise ConnectionError(
            f"{hub_id} cannot be fetched from the Hugging Face hub ({_first_line(error)}): set `data.path` to a folder "
            f"of parquet files in its schema, or {instead}"
        ) from error


def _snapshot(hub_id: str, branch: str) -> Path:
    hub, errors = require("huggingface_hub", "train"), require("huggingface_hub.errors", "train")
    wanted = {"repo_id": hub_id, "repo_type": "dataset", "revision": branch, "allow_patterns": "*.parquet"}
    try:
        # One question with a time limit: snapshot_download has none, and datasets would retry for half a minute.
        hub.HfApi().dataset_info(hub_id, revision=branch, timeout=TIMEOUT)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except Exception as unreachable:  # as above
        try:
            return Path(hub.snapshot_download(**wanted, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            raise unreachable from None
    return Path(hub.snapshot_download(**wanted))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
