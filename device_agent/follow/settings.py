"""The table ``[follow.NAME]``: which tag a model comes from, and when it may change.

Every key, with its default but for the first and ``windows``:

    [follow.detector]
    reference = "oci://registry.example.com/models/detector:stable"
    interval_s = 300
    windows = ["02:00-04:00"]           # installs only then; downloads at any time. Empty: always
    windows_utc = false                 # the device's local time
    username = ""                       # with password_file
    password_file = ""
    token_file = ""                     # instead of them: a token that is sent as it is
    ca_file = ""                        # authorities to trust in the system's place
    plain_http = false                  # true: without TLS beyond loopback, and without credentials
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Tuple

from device_agent.errors import BadInput
from device_agent.follow import windows
from device_agent.manifest_checks import valid_name
from device_agent.oci import reference


@dataclass(frozen=True)
class Follow:
    """How a model follows a tag; NAME is the model's name, and no other model is taken from there.

    Attributes:
        reference: where; with ``@sha256:...`` it is pinned, and looked at until it is installed.
        interval_s: seconds between two looks at the tag, give or take a tenth.
        windows: times of day in which an update may be installed, such as ``02:00-04:00``; none: always.
        windows_utc: whether they are in UTC; otherwise in the device's local time.
        username: who asks, with ``password_file``.
        password_file: a file that holds a password or an access token, readable by nobody else.
        token_file: a file that holds a bearer token, readable by nobody else.
        ca_file: PEM certificates of the authorities to trust in the system's place.
        plain_http: talk without TLS to a registry beyond loopback. Bundles are signed; credentials are
            never sent so.
    """

    reference: str = ""
    interval_s: float = 300.0
    windows: Tuple[str, ...] = ()
    windows_utc: bool = False
    username: str = ""
    password_file: str = ""
    token_file: str = ""
    ca_file: str = ""
    plain_http: bool = False


def problems(name: str, follow: Follow) -> Iterator[Tuple[str, str]]:
    """What is wrong with a table: the key, and what it should be; an empty key means the table's name."""
    if not valid_name(name):
        yield "", "a model's name: letters, digits, '.', '_' or '-'"
    try:
        reference.parse(follow.reference)
    except BadInput:
        yield "reference", "a reference such as oci://registry.example.com/models/detector:stable"
    if not 0 < follow.interval_s < float("inf"):
        yield "interval_s", "a number above zero"
    if any(windows.parse(text) is None for text in follow.windows):
        yield "windows", 'a list of times of day such as ["02:00-04:00"]'
    if bool(follow.username) != bool(follow.password_file):
        yield "username", "given together with password_file"
    if follow.token_file and follow.password_file:
        yield "token_file", "given alone, or password_file instead"
