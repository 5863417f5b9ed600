"""Upload one folder to the Hugging Face hub. A folder is uploaded only if the user requests it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from toolkit.base.errors import ConfigError, RetryError, first_line

if TYPE_CHECKING:
    from pathlib import Path

WHERE = "push to the hub"


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    message: str = "Upload of grpo-toolkit",
) -> str:
    """Create the model repository ``repo_id`` if needed, and upload ``folder`` in one commit.

    If ``token`` is None, the token of ``hf auth login`` or HF_TOKEN is used. If ``private`` is
    None, the account's default applies to a new repository. An existing repository keeps its
    visibility.

    Returns:
        The address of the repository.

    Raises:
        ConfigError: the hub rejects the name or the token, or HF_HUB_OFFLINE is set.
        RetryError: the hub cannot be reached.
    """
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=message)
    except OfflineModeIsEnabled as error:
        raise ConfigError(
            "HF_HUB_OFFLINE is set, but an upload needs the hub",
            where=WHERE,
            fix=f"unset HF_HUB_OFFLINE, or upload later with `hf upload {repo_id} {folder}`",
        ) from error
    except HFValidationError as error:
        raise ConfigError(
            f"{repo_id!r} is not a valid name of a repository: {first_line(error)}",
            where=WHERE,
            fix="write the name as owner/name",
        ) from error
    except HfHubHTTPError as error:
        raise _rejection_error(error, repo_id, folder) from error
    except (OSError, httpx.HTTPError) as error:
        raise _upload_error(error, repo_id, folder) from error
    return str(url)


def _rejection_error(error: HfHubHTTPError, repo_id: str, folder: Path) -> ConfigError | RetryError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return ConfigError(
            f"the hub rejects {repo_id} ({status}): {first_line(error)}",
            where=WHERE,
            fix="log in with `hf auth login`, or set HF_TOKEN to a token with write access",
        )
    return _upload_error(error, repo_id, folder)


def _upload_error(error: BaseException, repo_id: str, folder: Path) -> RetryError:
    return RetryError(
        f"the upload to {repo_id} failed: {first_line(error)}",
        where=WHERE,
        fix=f"try again, or upload later with `hf upload {repo_id} {folder}`",
    )
