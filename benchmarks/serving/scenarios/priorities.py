"""Three priority levels on one model at half of its capacity and at 120%, requests coming when they come."""

from __future__ import annotations

import numpy as np

from serving import wire
from serving.bench import Bench, Judged, Result, Rounds, say, settle
from serving.closed_loop import ClosedLoop
from serving.open_loop import poisson, send_mixed
from serving.peers.ours import OURS_LEVELS, SLO_MS
from serving.scenarios.open_loop import quantile

_SHARES = (0.2, 0.3, 0.5)  # of the requests, the highest level first
_SECONDS = 8.0
_CAPACITY_SECONDS = 1.0
_CLIENTS = 8  # enough to keep the engine busy, and few enough that the objective refuses none
_GRACE_S = 1.0


def priorities(bench: Bench) -> Result:
    """What the highest level notices of an overload, and what is left for the others."""
    cnn = bench.models["cnn"]
    requests = [wire.oip_infer(cnn.name, cnn.row, priority=level) for level in (1, 2, 3)]
    p99_s = {load: Rounds() for load in (0.5, 1.2)}
    served, ratio = Rounds(), Rounds()
    with bench.start(OURS_LEVELS, [cnn]) as server:
        for number in range(bench.rounds):
            with ClosedLoop(server.address, [OURS_LEVELS.request(cnn)] * _CLIENTS) as loop:
                capacity = loop.run(bench.seconds(_CAPACITY_SECONDS)).rate
            say(f"  {capacity:.0f} a second")
            for load, rounds in p99_s.items():
                arrivals_s = poisson(load * capacity, bench.seconds(_SECONDS), number)
                kinds = np.random.default_rng(number).choice(3, size=len(arrivals_s), p=_SHARES).tolist()
                outcomes = send_mixed(server.address, requests, arrivals_s, kinds, _GRACE_S)
                settle(server)
                for level, outcome in enumerate(outcomes, start=1):
                    rounds.add(f"level {level}", quantile(outcome.latencies_s + outcome.unanswered_s, 0.99))
                    if load > 1:
                        sent = max(1, kinds.count(level - 1))
                        served.add(f"level {level}", len(outcome.latencies_s) / sent)
            ratio.add("level 1", p99_s[1.2].of("level 1")[-1] / p99_s[0.5].of("level 1")[-1])
    result = Result({f"p99 ms at {load:.0%}": rounds.medians(1e3) for load, rounds in p99_s.items()})
    result.table["answered share at 120%"] = served.medians()
    result.judged = {
        "level_1_p99_at_120_over_50": Judged(ratio.medians().get("level 1"), "<=", 1.5),
        "least_answered_share": Judged(min(value or 0.0 for value in served.medians().values()), ">=", 0.1),
    }
    result.notes.append(f"levels have {_SHARES} of the requests; the objective is {SLO_MS:g} ms for all")
    return result
