"""Uploading a run or an exported model to the hub, by flag only."""

from __future__ import annotations

from pathlib import Path

from recllm.errors import DataError

KEPT_HERE = ("checkpoints/**", "rows/**", "probes.parquet", ".*")
"""What is never uploaded: checkpoints, and files with prompts, which tell of users."""


def push_folder(folder: Path, repository: str) -> str:
    """Uploads a run's or an exported model's folder; a new repository is private.

    Args:
        folder: The folder; `KEPT_HERE` names what stays.
        repository: USER/NAME on the hub.

    Returns:
        The repository's address.

    Raises:
        DataError: There is no such folder, the name is none, the hub cannot be reached or refuses. The folder
            stays as it is, and the upload can be repeated.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder to upload")
    left_out = " ".join(f"--exclude '{pattern}'" for pattern in KEPT_HERE)
    again = (
        f"{folder} is complete; `hf upload {repository} {folder} --private {left_out}` uploads it later, or, "
        "for a run, the same command once more with --resume auto"
    )
    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"Upload {folder.resolve().name}",
            ignore_patterns=list(KEPT_HERE),
        )
    except HFValidationError as error:
        raise DataError(f"--push-to-hub {repository}: expected USER/NAME ({_first_line(error)})") from None
    except OfflineModeIsEnabled:
        raise DataError(f"--push-to-hub {repository}: HF_HUB_OFFLINE is set. {again}") from None
    except HfHubHTTPError as error:
        raise DataError(
            f"--push-to-hub {repository}: the hub refused ({_first_line(error)}); {again}"
        ) from None
    except HfHubHTTPError.__bases__ as error:  # those of its HTTP client, whose name differs by version
        raise DataError(
            f"--push-to-hub {repository}: the hub cannot be reached ({_first_line(error)}); {again}"
        ) from None
    return str(address)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[
        :200
    ]
