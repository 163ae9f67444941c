"""How often a client may fail to authenticate. Pure: the clock is an argument."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass

BURST = 10
REFILL_S = 6.0  # one more attempt every so often: ten a minute in the long run
MAX_CLIENTS = 4096

_IPV6_PREFIX_BITS = 64  # what one site usually has


@dataclass(frozen=True)
class _Bucket:
    """A client's attempts: how many were left at a moment."""

    left: float
    at_s: float

    def left_at(self, now_s: float) -> float:
        return min(float(BURST), self.left + max(0.0, now_s - self.at_s) / REFILL_S)


class FailedAttempts:
    """A token bucket for each client that failed; the memory is bounded, the oldest are forgotten first."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def wait_s(self, client: str, now_s: float) -> float:
        """How long a client has to wait before it may try again; 0.0: it need not.

        Args:
            client: its address; addresses of one IPv6 site count as one.
            now_s: a monotonic clock.
        """
        bucket = self._buckets.get(_site(client))
        if bucket is None:
            return 0.0
        return max(0.0, 1.0 - bucket.left_at(now_s)) * REFILL_S

    def failed(self, client: str, now_s: float) -> None:
        """Count a failure."""
        site = _site(client)
        bucket = self._buckets.pop(site, _Bucket(BURST, now_s))
        self._buckets[site] = _Bucket(max(0.0, bucket.left_at(now_s) - 1.0), now_s)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)


def _site(client: str) -> str:
    try:
        address = ipaddress.ip_address(client.partition("%")[0])
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv4Address):
        return client
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, _IPV6_PREFIX_BITS), strict=False))
