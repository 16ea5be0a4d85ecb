"""The state of a torch optimizer as named tensors and JSON: what `checkpoint.save` can hold, and back, bit for bit.

torch's own `load_state_dict` goes by the order of parameters and casts moments to the parameter's dtype; here each
state stands under its parameter's name, keeps its dtype, and a checkpoint that does not fit is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from vislora.errors import InputError, near

Named = Sequence[tuple[str, Parameter]]


def optimizer_tensors(optimizer: Optimizer, names: Named) -> tuple[dict[str, Tensor], dict]:
    """The optimizer's state as ("<parameter>|<key>" -> tensor of any shape and dtype) and a JSON-able dict of the rest.

    `names` pairs every parameter that the optimizer holds with its name; ValueError unless they fit one to one, or
    when a state holds something that is neither a tensor nor a JSON scalar (LBFGS keeps lists of tensors).
    """
    label = _labels(optimizer, names)
    tensors, groups, states = {}, [], {}
    for group in optimizer.param_groups:
        settings = {key: _scalar(value, key) for key, value in group.items() if key != "params"}
        groups.append({"parameters": [label[id(p)] for p in group["params"]], "settings": settings})
        for parameter in group["params"]:
            name, state = label[id(parameter)], optimizer.state.get(parameter, {})
            own = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            tensors |= {f"{name}|{key}": value for key, value in own.items()}
            scalars = {key: _scalar(value, f"{name}|{key}") for key, value in state.items() if key not in own}
            states[name] = {"shape": list(parameter.shape), "tensors": sorted(own), "scalars": scalars}
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "states": states}


def load_optimizer(optimizer: Optimizer, names: Named, tensors: Mapping[str, Tensor], rest: Mapping) -> None:
    """Put back what `optimizer_tensors` gave: state, learning rates and every other setting of the groups.

    InputError, before anything is changed, unless class, groups, names, shapes and tensors agree both ways. A setting
    that this version of the optimizer has and the checkpoint has not keeps its present value.
    """
    label = _labels(optimizer, names)
    if rest["class"] != type(optimizer).__name__:
        _refuse(f"it is of {rest['class']}, the run has {type(optimizer).__name__}")
    here = [sorted(label[id(p)] for p in group["params"]) for group in optimizer.param_groups]
    there = [sorted(group["parameters"]) for group in rest["groups"]]
    if len(here) != len(there):
        _refuse(f"it has {len(there)} parameter groups, the run has {len(here)}")
    for own, saved in zip(here, there, strict=True):
        _same(own, saved, "parameter")
    listed = [f"{name}|{key}" for name, state in rest["states"].items() for key in state["tensors"]]
    _same(listed, list(tensors), "tensor")
    for name, parameter in names:
        if list(parameter.shape) != rest["states"][name]["shape"]:
            _refuse(f"{name} has shape {rest['states'][name]['shape']} there and {list(parameter.shape)} here")
    for group, saved in zip(optimizer.param_groups, rest["groups"], strict=True):
        for key, value in saved["settings"].items():
            if isinstance(group.get(key), Tensor):  # a learning rate kept on the device
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value
        for parameter in group["params"]:
            name = label[id(parameter)]
            state = dict(rest["states"][name]["scalars"])
            for key in rest["states"][name]["tensors"]:
                # torch keeps the step count on the CPU, unless the kernel itself reads it
                on_cpu = key == "step" and not (group.get("capturable") or group.get("fused"))
                value = tensors[f"{name}|{key}"]
                state[key] = value.to("cpu" if on_cpu else parameter.device, copy=True)
                if value.shape == parameter.shape:  # the fused kernel goes by places in memory, whatever the strides
                    state[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
            if state:
                optimizer.state[parameter] = state
            else:
                optimizer.state.pop(parameter, None)


def _labels(optimizer: Optimizer, names: Named) -> dict[int, str]:
    label = {id(parameter): name for name, parameter in names}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if len(names) != len(held) or sorted(label) != sorted(held) or len(set(label.values())) != len(names):
        raise ValueError(f"{len(names)} names for {len(held)} optimizer parameters: each needs a name of its own")
    return label


def _scalar(value, where: str):
    """`value` for JSON. A tensor setting (a learning rate on the device) is stored as its number."""
    if isinstance(value, Tensor):
        value = value.item()
    items = value if isinstance(value, tuple | list) else (value,)
    if not all(item is None or isinstance(item, bool | int | float | str) for item in items):
        raise ValueError(f"optimizer state {where} holds {value!r:.80}: neither a tensor nor a JSON scalar")
    return list(value) if isinstance(value, tuple) else value


def _same(here: list[str], there: list[str], kind: str) -> None:
    for names, others, side in ((there, here, "the run"), (here, there, "the checkpoint")):
        lost = sorted(set(names) - set(others))
        if lost:
            _refuse(f"{kind} {lost[0]} is not in {side}{near(lost[0], others)} ({len(lost)} such)")


def _refuse(wrong: str) -> None:
    raise InputError("optimizer state of the checkpoint", wrong,
                     "resume with the options of the run that wrote it, or start anew")
