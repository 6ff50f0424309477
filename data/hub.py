"""Find out why the Hugging Face hub can't be reached, or refuses a repository.

The libraries that load models and datasets hide some of the hub's answers. So once they have failed, this module asks
the hub again directly.
"""

import contextlib
import os
import re

from basics.printing import one_line
from utils import rank0_print

_TIMEOUT = 10  # seconds
_MAX_REQUESTED_FILES = 40  # files of a repository that are requested to find one that the hub refuses


def use_cache_if_unreachable(names: list[str]):
    """Switch to offline mode, as HF_HUB_OFFLINE=1 does, if a name isn't a local path and the hub can't be reached.

    Without this, the libraries retry for minutes before they use the cache.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.is_offline_mode() or all(os.path.exists(os.path.expanduser(name)) for name in names):
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception as error:  # the exception depends on its HTTP library
        rank0_print(f"The hub ({constants.ENDPOINT}) can't be reached ({error}): using the cache")
        constants.HF_HUB_OFFLINE = True  # huggingface_hub read the variable at its import
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries imported later, and for workers


def current_commit(repo_id: str, cache_dir: str) -> str | None:
    """Return the commit of a model's main branch on the hub, or else in the cache; None if neither has it."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    use_cache_if_unreachable([repo_id])
    if not constants.is_offline_mode():
        with contextlib.suppress(Exception):  # explained later, when the model can't be loaded
            return HfApi().model_info(repo_id, timeout=_TIMEOUT).sha
    path = try_to_load_from_cache(repo_id, "config.json", cache_dir)
    return os.path.basename(os.path.dirname(path)) if isinstance(path, str) else None


def explain_failure(failure: Exception, repo_id: str, repo_type: str) -> tuple[str, str] | None:
    """Return why the hub doesn't give a repository to this user, and the remedy; None if the hub isn't the cause.

    Args:
        failure: the exception of the library that failed to load it.
        repo_type: 'model' or 'dataset'.
    """
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HFValidationError

    if os.path.exists(repo_id):
        return None
    if constants.is_offline_mode():
        remedy = "If the cache doesn't have it, start once where the hub can be reached, with HF_HUB_OFFLINE unset"
        return one_line(failure), remedy
    try:
        info = HfApi().repo_info(repo_id, repo_type=repo_type, timeout=_TIMEOUT)
        files = [sibling.rfilename for sibling in info.siblings or []]
        for file in files[:_MAX_REQUESTED_FILES]:
            get_hf_file_metadata(hf_hub_url(repo_id, file, repo_type=repo_type), timeout=_TIMEOUT)
    except HFValidationError:
        return None
    except Exception as error:
        return _explain_answer(error, repo_id, repo_type)
    return None


def _explain_answer(error: Exception, repo_id: str, repo_type: str) -> tuple[str, str]:
    """Return the cause and the remedy of an error that came from asking the hub."""
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
            f"there is no such folder, and the hub has no {repo_type} with this id that you can see",
            f"Check the spelling of {repo_id}; if it is private, {login}",
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        reason = "is overloaded or down" if status >= 500 or status == 429 else "refuses access"
        if status in (401, 403):
            return f"the hub {reason} ({status} for {error.response.url})", f"If it is private, {login}"
        return f"the hub {reason} ({status} for {error.response.url})", "Start again later; downloaded files are kept"
    return (
        f"the hub ({constants.ENDPOINT}) can't be reached ({type(error).__name__}: {str(error)[:200]})",
        "Check the connection and start again; downloaded files are kept",
    )


def is_url(file: str) -> bool:
    """True for the URL of a file on the hub, as the `datasets` library writes it."""
    return file.startswith("hf://")


def split_url(url: str) -> tuple[str, str, str]:
    """Split hf://datasets/OWNER/NAME@COMMIT/PATH into id, commit and path."""
    match = re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", url)
    return match.groups() if match else ("", "", url)


def cached_copy(url: str) -> str | None:
    """Return the path of a hub file's copy in the cache; None if there is none."""
    from huggingface_hub import try_to_load_from_cache

    repo_id, commit, path = split_url(url)
    copy = try_to_load_from_cache(repo_id, path, revision=commit, repo_type="dataset") if repo_id else None
    return copy if isinstance(copy, str) else None
