"""Weight files: safetensors, and pickled ones read without executing anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import BadInput, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

_PICKLED = (".pt", ".pth", ".bin", ".ckpt")


def read(path: Path) -> dict[str, Tensor]:
    """Read a state dict.

    Raises:
        BadInput: missing, of another kind, damaged, or a pickle that would execute code.
    """
    if not path.is_file():
        raise BadInput(f"the weights {path} do not exist", "there is no such file", "check the path")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _PICKLED:
        return _read_pickled(path)
    raise BadInput(
        f"the weights {path} are of an unknown kind",
        f"edgekit reads .safetensors and, without executing anything, {', '.join(_PICKLED)}",
        "save them with safetensors.torch.save_file(model.state_dict(), 'model.safetensors')",
    )


def fill(module: nn.Module, state: dict[str, Tensor], where: Path) -> None:
    """Put a state dict into a module; every tensor has to be there and fit.

    Raises:
        BadInput: a tensor is missing, left over or of another shape.
    """
    own = module.state_dict()
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    misshapen = [name for name in sorted(set(own) & set(state)) if own[name].shape != state[name].shape]
    if misshapen:
        name = misshapen[0]
        why = f"'{name}' is {list(state[name].shape)} in the file and {list(own[name].shape)} in the model"
        fix = "build the model with the settings that it was trained with"
    elif missing:
        why = f"the file lacks '{missing[0]}'" + _more(missing)
        fix = nearest(missing[0], unexpected) if unexpected else "give the weights of this model"
    elif unexpected:
        why = f"the model has no '{unexpected[0]}'" + _more(unexpected)
        fix = "build the model that these weights belong to"
    else:
        module.load_state_dict(state)
        return
    raise BadInput(f"the weights {where} do not fit the model", why, fix)


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise BadInput(
            f"the weights {path} are damaged", f"safetensors: {error}", "copy or download them again"
        ) from error


def _read_pickled(path: Path) -> dict[str, Tensor]:
    import pickle

    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadInput(
            f"the weights {path} are refused",
            "reading that pickle would execute code, or it is damaged; nothing of it was executed",
            "save the weights alone: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')",
        ) from error
    except Exception as error:  # the restricted unpickler trips in a dozen ways over a damaged file
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        raise BadInput(f"the weights {path} are damaged", reason, "copy or download them again") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise BadInput(
            f"the weights {path} are not a state dict",
            "the file holds something else than tensors by name",
            "save model.state_dict()",
        )
    return state
