"""A finished run on the model hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError

from vislora.diffusion.hub import brief
from vislora.errors import EnvironmentFault, InputError

_KEPT = ["checkpoints/*", "class_images*/*", "logs/*", ".*"]  # what stays here
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FAULTS = (OSError, ValueError, HTTPError, HfHubHTTPError, HFValidationError)


def require_hub(hub_model_id: str | None, api: HfApi | None = None) -> None:
    """Raise, before anything is trained, unless the hub lets this user in: InputError for a wrong name and without a
    token, EnvironmentFault where it cannot be reached."""
    if hub_model_id is not None and not _ID.fullmatch(hub_model_id):
        raise InputError("--hub_model_id", f"{hub_model_id!r} is no hub id", "give owner/name, or a name of your own")
    try:
        (api or HfApi()).whoami()
    except LocalTokenNotFoundError as error:
        raise InputError("--push_to_hub", "there is no token for the hub", "log in: hf auth login") from error
    except _FAULTS as error:
        wrong = f"the hub does not let you in ({brief(error)})"
        raise EnvironmentFault("--push_to_hub", wrong, "check the network and hf auth login") from error


def push(folder: Path, hub_model_id: str | None, api: HfApi | None = None) -> str:
    """Upload a run's folder, without checkpoints, class images and logs, and return its address.

    hub_model_id None: the folder's name under the user's own. EnvironmentFault, with what to type then, where it fails.
    """
    api, name = api or HfApi(), hub_model_id or folder.resolve().name
    try:
        repo = api.create_repo(name, exist_ok=True).repo_id
        words = "vislora: DreamBooth run"
        done = api.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=_KEPT, commit_message=words)
    except _FAULTS as error:
        wrong = f"could not be sent to the hub ({brief(error)})"
        raise EnvironmentFault(str(folder), wrong, f"it is whole; try: hf upload {name} {folder}") from error
    return str(done)
