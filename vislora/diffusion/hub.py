"""What the model hub's client raises, as errors of one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vislora.errors import EnvironmentFault, InputError


@contextmanager
def hub_errors(subject: str, revision: str | None, variant: str | None) -> Iterator[None]:
    """What the hub's client raises, as one line."""
    try:
        yield
    except InputError:
        raise
    except GatedRepoError as error:
        raise InputError(subject, "is gated on the hub", "accept its terms there, then: hf auth login") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(subject, "no such folder, and no such model on the hub", "check the name") from error
    except RevisionNotFoundError as error:
        raise InputError(subject, f"has no revision {revision!r}", "check --revision") from error
    except LocalEntryNotFoundError as error:
        wrong = "no such folder, and the hub cannot be reached"
        raise EnvironmentFault(subject, wrong, "check the network, or name a local folder") from error
    except EntryNotFoundError as error:
        raise InputError(subject, "holds no model_index.json on the hub", "it must be in diffusers' format") from error
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        if isinstance(error, ValueError) and variant is not None:
            raise InputError(subject, f"variant {variant!r}: {brief(error)}", "leave --variant out") from error
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        remedy = "free some space in the hub's cache (HF_HOME)" if full else "try again, or name a local folder"
        raise EnvironmentFault(subject, f"cannot be fetched ({brief(error)})", remedy) from error


def brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
