"""Several machines at one search, through Optuna's shared storage.

Each worker takes a trial, carries it out in its own store, and reports. A trial is leased: its worker says
that it lives every few seconds, and where it stops saying so, another takes the trial over (Akiba et al.,
"Optuna", KDD 2019). The storage is a file for one host, or a PostgreSQL database for many. Who takes which
trial depends on the clock, so a joint search is not repeated bit by bit; each of its trials is.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgekit import profile
from edgekit.errors import BadInput, EdgekitError, Missing
from edgekit.search.loop import Found, Request, Trial, Worker
from edgekit.search.pick import Outcome, pick

#: A worker that said nothing for ``grace`` seconds is dead.
_BEAT_S, _GRACE_S = 10, 45
_RETRIES = 3
_ASK_AGAIN_S = 1.0

Params = dict[str, Any]


@dataclass(frozen=True)
class Lease:
    """How often a worker says that it lives, and after what silence its trial is taken over, in seconds."""

    beat_s: int = _BEAT_S
    grace_s: int = _GRACE_S


def search_together(request: Request, url: str, trials: int) -> Found:
    """Join the search for this contract, work until it has so many trials, and carry the best one out here.

    Args:
        request: as for ``search``.
        url: ``sqlite:///file``, ``postgresql+pg8000://...``, or the path of a file.
        trials: of all workers together.

    Raises:
        BadInput: the storage cannot be used.
        Missing: its driver is not installed.
        EdgekitError: a stage of the best trial failed here.
    """
    worker = Worker(request)

    def objective(params: Params) -> float:
        tried = worker.carry_out(trial_of(params, request))
        return cost(pick([tried], request.contract, request.profile, request.sources.device), request)

    best = work(url, _name(request), trials, _space(request), objective)
    trial = trial_of(best, request)
    if not any(one.name == trial.name for one in worker.tried):
        worker.carry_out(trial)
    outcome = pick(worker.tried, request.contract, request.profile, request.sources.device)
    return Found(tuple(worker.tried), outcome, tuple(worker.records))


def work(
    url: str,
    name: str,
    trials: int,
    space: dict[str, list[Any]],
    objective: Callable[[Params], float],
    lease: Lease = Lease(),
) -> Params:
    """Take trials until the study has so many, and return the parameters of the best.

    Args:
        url: of the storage.
        name: of the study; workers of the same name share it.
        trials: of all workers together.
        space: parameter -> its values, the first of which are tried first.
        objective: parameters -> what to minimize; an ``EdgekitError`` ends that trial only.
        lease: when a silent worker's trial is taken over.

    Raises:
        BadInput: the storage cannot be used, or no trial succeeded.
        Missing: its driver is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise Missing(
            "a joint search needs optuna", str(error), "install it: pip install 'edgekit[study]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # heartbeats and constant_liar are called experimental
        study = _open(url, name, lease)
        study.enqueue_trial({key: values[0] for key, values in space.items()}, skip_if_exists=True)
        while (left := _left(study, trials)) is not None:
            if left:
                study.optimize(lambda trial: _carry_out(trial, space, objective), n_trials=1)
            else:
                time.sleep(_ASK_AGAIN_S)
                optuna.storages.fail_stale_trials(study)  # the lease ran out: it waits for a worker again
        try:
            return dict(study.best_trial.params)
        except ValueError as error:
            raise BadInput(
                "no trial of the search succeeded",
                next((str(t.user_attrs["why"]) for t in study.trials if "why" in t.user_attrs), "none ended"),
                "run the command without --study to see the error",
            ) from error


def trial_of(params: Params, request: Request) -> Trial:
    """The trial that a point of the search space stands for."""
    epochs = request.recipe.recover.epochs
    changes = {
        "prune.allocation": params["allocation"],
        "prune.importance": params["importance"],
        "recover.epochs": params["recovery"] * epochs,
        "recover.quantization_aware_epochs": max(1, epochs // 4) if params["quantization_aware"] else 0,
    }
    name = f"{params['allocation']} by {params['importance']}, recovery x {params['recovery']}"
    return Trial(name + (", quantization-aware" if params["quantization_aware"] else ""), changes)


def cost(outcome: Outcome, request: Request) -> float:
    """What a search minimizes: first the parts that are missed and by how much, then the latency."""
    facts, contract = outcome.chosen.facts, request.contract
    if not outcome.unmet:
        return float(1 / facts["speedup"])
    over = 0.0
    if contract.size is not None:
        over += max(0.0, facts["params_ratio"] / contract.size - 1)
    if contract.max_drop is not None:
        over += max(0.0, facts["metric_drop"] - contract.max_drop)
    if contract.latency is not None:
        over += max(0.0, facts["latency_ms"][contract.latency.quantile] / contract.latency.ms - 1)
    return 10.0 * len(outcome.unmet) + over


def _space(request: Request) -> dict[str, list[Any]]:
    prune, recover = request.recipe.prune, request.recipe.recover
    allocations = dict.fromkeys((prune.allocation, "sensitivity", "global"))
    importances = dict.fromkeys((prune.importance, "magnitude", "taylor", "activation"))
    return {
        "allocation": list(allocations),
        "importance": list(importances),
        "recovery": [1, 2],
        "quantization_aware": [recover.quantization_aware_epochs > 0, recover.quantization_aware_epochs == 0],
    }


def _name(request: Request) -> str:
    """The same for workers that were asked the same, whatever their directories."""
    sources = request.sources
    asked = {
        "data": [sources.calib.digest, sources.train.digest, sources.held_out.digest],
        "model": sources.model.digest,
        "profile": profile.digest(request.profile),
        "recipe": request.recipe.model_dump(mode="json", exclude={"threads"}),
    }
    return "edgekit-" + hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]


def _open(url: str, name: str, lease: Lease) -> Any:
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        storage = optuna.storages.RDBStorage(
            url if "://" in url else f"sqlite:///{url}",
            heartbeat_interval=lease.beat_s,
            grace_period=lease.grace_s,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(
                max_retry=_RETRIES
            ),
        )
        return optuna.create_study(
            storage=storage,
            study_name=name,
            sampler=optuna.samplers.TPESampler(constant_liar=True),
            load_if_exists=True,
        )
    except (ImportError, ModuleNotFoundError) as error:
        raise Missing(
            f"the study {_hidden(url)} needs a driver that is not installed",
            str(error),
            "install it, such as pg8000 for postgresql+pg8000://, or give a file",
        ) from error
    except (SQLAlchemyError, ValueError) as error:
        raise BadInput(
            f"the study {_hidden(url)} cannot be used",
            str(error).strip().splitlines()[0],
            "give a file, sqlite:///FILE or postgresql+pg8000://USER@HOST/DATABASE",
        ) from error


def _left(study: Any, trials: int) -> bool | None:
    """Whether there is a trial to take now; None: the study has all it needs."""
    from optuna.trial import TrialState

    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    ended = sum(state in (TrialState.COMPLETE, TrialState.PRUNED) for state in states)
    if ended >= trials:
        return None
    return TrialState.WAITING in states or ended + states.count(TrialState.RUNNING) < trials


def _carry_out(trial: Any, space: dict[str, list[Any]], objective: Callable[[Params], float]) -> float:
    import optuna

    params = {key: trial.suggest_categorical(key, values) for key, values in space.items()}
    try:
        return objective(params)
    except EdgekitError as error:
        trial.set_user_attr("why", str(error.what))
        raise optuna.TrialPruned from error


def _hidden(url: str) -> str:
    """The address without a password."""
    before, at, after = url.rpartition("@")
    scheme, separator, user = before.partition("://")
    return f"{scheme}{separator}{user.partition(':')[0]}{at}{after}" if at else url
