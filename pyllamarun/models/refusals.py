"""What a web server's refusal means, in words: not there, not allowed, not yet, not now."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from pyllamarun.errors import DownloadError

BUSY = (429, 500, 502, 503, 504)
AGAIN = "Try again; if it goes on, the server or the network on the way is at fault."


@dataclass(frozen=True)
class Place:
    """Where something is got, and how messages speak of it.

    `token` goes to the host of `url`, and to no other.  `page` is where a model's licence is accepted, where there is
    such a page; `login` is how to give a token.
    """

    url: str
    shown: str
    token: str | None = field(default=None, repr=False)
    page: str = ""
    login: str = ""


def wait_seconds(retry_after: str | None, otherwise: float) -> float:
    """What a Retry-After header asks for: seconds, or a date."""
    if not retry_after:
        return otherwise
    if retry_after.strip().isdigit():
        return float(retry_after.strip()[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return otherwise


def refusal(place: Place, status: int, headers: Mapping[str, str]) -> DownloadError:
    """What an answer means that is not the file.  X-Error-Code is Hugging Face's, which answers 401 for much."""
    code = headers.get("X-Error-Code", "")
    if code == "GatedRepo":
        login = "" if place.token else f"  Then {place.login}."
        return DownloadError(
            f"{place.shown} is gated: its publisher wants its licence accepted first.",
            remedy=f"Accept it at {place.page or 'the model page'}, logged in.{login}",
        )
    if code == "RevisionNotFound":
        return DownloadError(f"There is no such revision: {place.shown}.", remedy="Check what stands after the @.")
    if code == "RepoNotFound" or (status == 401 and place.page and not place.token):
        why = "The token that was sent does not see it." if place.token else "Or it is private, and no token was sent."
        remedy = "Check the name." if place.token else f"Check the name; for a private model, {place.login}."
        return DownloadError(f"There is no model {place.shown}.", why=why, remedy=remedy)
    if status == 401:
        why = "The server does not accept the token." if place.token else "The server wants a login (401)."
        return DownloadError(f"{place.shown} cannot be read.", why=why, remedy=_login_remedy(place))
    if status == 403:
        why = "The server forbids it (403)" + (", also with the token that was sent." if place.token else ".")
        remedy = f"Look at {place.page}: there may be a licence to accept." if place.page else "Check the address."
        return DownloadError(f"{place.shown} cannot be read.", why=why, remedy=remedy)
    if status in (404, 410):
        why = f"Its server does not know it ({status})."
        return DownloadError(f"There is no {place.shown}.", why=why, remedy="Check the name.")
    if status in BUSY:
        return _busy(place, status, wait_seconds(headers.get("Retry-After"), 0))
    why = f"The server answered {status}."
    return DownloadError(f"{place.shown} cannot be read.", why=why, remedy="Check the address.")


def _busy(place: Place, status: int, wait: float) -> DownloadError:
    why = f"The server {'wants fewer requests' if status == 429 else 'is overloaded or broken'} ({status})"
    why += f", and asks to wait {wait:,.0f} seconds." if wait else "."
    remedy = "Try again after that." if wait else "Try again later."
    if status == 429 and place.login and not place.token:
        remedy += f"  With a token more requests are allowed: {place.login}."
    return DownloadError(f"{place.shown} cannot be read now.", why=why, remedy=remedy)


def _login_remedy(place: Place) -> str:
    if not place.login:
        return "Download the file by other means, and name it by its path."
    return "Renew the token." if place.token else f"To log in, {place.login}."
