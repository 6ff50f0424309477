"""The Hugging Face hub where it doesn't serve: whether it can be reached, and why a repository can't be read.

The libraries that load models and datasets swallow some of the hub's answers on their way. So, once they have failed,
the hub itself is asked again.
"""

import os
import re

from utils import rank0_print

_TIMEOUT = 10  # seconds
_ASKED_FILES = 40  # as many of a repository's files are asked for at most


def use_cache_if_unreachable(names: list[str]):
    """Take what is in the cache, as with HF_HUB_OFFLINE=1, if something isn't local and the hub can't be reached.

    Otherwise the libraries try again and again, minutes in all, before they do the same.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.is_offline_mode() or all(os.path.exists(os.path.expanduser(name)) for name in names):
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception as error:  # its HTTP library is its own affair
        rank0_print(f"The hub ({constants.ENDPOINT}) can't be reached ({error}): taking what is in the cache")
        constants.HF_HUB_OFFLINE = True  # read when huggingface_hub was imported
        os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported later, and for workers


def why_not(failure: Exception, repo_id: str, repo_type: str) -> tuple[str, str] | None:
    """Why the hub doesn't give this user a repository, and what to do; None if it does, or it is no hub id.

    Args:
        failure: what a library raised as it loaded from there.
        repo_type: model or dataset.
    """
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HFValidationError

    if os.path.exists(repo_id):
        return None
    if constants.is_offline_mode():
        remedy = "If that is missing in the cache, start once where the hub can be reached, with HF_HUB_OFFLINE unset"
        return " ".join(str(failure).split())[:300], remedy
    try:
        info = HfApi().repo_info(repo_id, repo_type=repo_type, timeout=_TIMEOUT)
        files = [sibling.rfilename for sibling in info.siblings or []]
        for file in files[:_ASKED_FILES]:
            get_hf_file_metadata(hf_hub_url(repo_id, file, repo_type=repo_type), timeout=_TIMEOUT)
    except HFValidationError:
        return None
    except Exception as error:
        return _explained(error, repo_id, repo_type)
    return None


def _explained(error: Exception, repo_id: str, repo_type: str) -> tuple[str, str]:
    from huggingface_hub import constants, errors

    page = f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    login = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        if error.response.status_code == 401:
            return "it is gated, and you are not logged in", f"Ask for access on {page}, then {login}"
        remedy = f"Ask for access on {page}, or log in as a user who has it (`hf auth login` or HF_TOKEN)"
        return "it is gated, and your account has no access to it", remedy
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no such folder, and the hub has no {repo_type} of this id, or a private one that is not yours",
            f"Check the spelling of {repo_id}; for a private one, {login}",
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        reason = "is busy or out of order" if status >= 500 or status == 429 else "refuses"
        if status in (401, 403):
            return f"the hub {reason} ({status} for {error.response.url})", f"If it is not for everyone, {login}"
        return f"the hub {reason} ({status} for {error.response.url})", "Start again later; what has come down is kept"
    return (
        f"the hub ({constants.ENDPOINT}) can't be reached ({type(error).__name__}: {str(error)[:200]})",
        "Check the connection and start again; what has come down is kept",
    )


def access_hint(error: Exception) -> str:
    """What to do where the hub may have refused access (401, 403)."""
    texts, cause = [], error
    while cause is not None:  # transformers calls some of them a lost connection
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    if not re.search(r"\b40[13] |gated|private repository", "\n".join(texts)):
        return ""
    return (
        "\nIf it is gated, accept its conditions on its page on the hub; a gated or private one needs a token, in the "
        "variable HF_TOKEN or by `hf auth login`"
    )


def is_url(file: str) -> bool:
    """Whether it is a file on the hub, as the `datasets` library names them."""
    return file.startswith("hf://")


def split_url(url: str) -> tuple[str, str, str]:
    """hf://datasets/OWNER/NAME@COMMIT/PATH: id, commit and path."""
    match = re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", url)
    return match.groups() if match else ("", "", url)


def cached_copy(url: str) -> str | None:
    """The local copy of a file on the hub, if it has come down."""
    from huggingface_hub import try_to_load_from_cache

    repo_id, commit, path = split_url(url)
    copy = try_to_load_from_cache(repo_id, path, revision=commit, repo_type="dataset") if repo_id else None
    return copy if isinstance(copy, str) else None
