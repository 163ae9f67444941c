"""Every server of the benchmark, by name. A new peer is one file here and one line below."""

from __future__ import annotations

from serving.peers.base import Peer
from serving.peers.bentoml import BENTOML
from serving.peers.floors import AIOHTTP, ECHO, RAW
from serving.peers.litserve import LITSERVE
from serving.peers.mlserver import MLSERVER
from serving.peers.ours import OURS, OURS_UVLOOP
from serving.peers.triton import DELAY, DYNAMIC, PLAIN

ALWAYS: tuple[Peer, ...] = (OURS, ECHO, RAW, AIOHTTP)
#: What ``--peers`` chooses from. ``ours-uvloop`` is there on request only.
GROUPS: dict[str, tuple[Peer, ...]] = {
    "triton": (PLAIN, DYNAMIC, DELAY),
    "mlserver": (MLSERVER,),
    "litserve": (LITSERVE,),
    "bentoml": (BENTOML,),
    "ours-uvloop": (OURS_UVLOOP,),
}
DEFAULT_GROUPS = ("triton", "mlserver", "litserve", "bentoml")
