"""An optimizer comes back bit for bit, under names, or is refused."""

import json

import pytest
import torch
from torch import nn

from vislora.errors import InputError
from vislora.training.checkpoint import load, save
from vislora.training.optimizer_state import load_optimizer, optimizer_tensors


def model_and_optimizer(kind, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)).to(dtype)
    groups = [{"params": model[0].parameters(), "lr": 1e-3 / 3}, {"params": model[1].parameters(), "lr": 0.02}]
    return model, kind(groups)


def advance(model, optimizer, steps, start):
    for step in range(start, start + steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


KINDS = {
    "adamw": torch.optim.AdamW,
    "fused": lambda g: torch.optim.AdamW(g, fused=True),
    "amsgrad": lambda g: torch.optim.AdamW(g, amsgrad=True, betas=(0.8, 0.95)),
    "sgd": lambda g: torch.optim.SGD(g, momentum=0.9),
    "plain": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "tensor lr": lambda g: torch.optim.AdamW([dict(h, lr=torch.tensor(h["lr"])) for h in g]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_optimizer_goes_on_bit_for_bit(tmp_path, kind):
    model, optimizer = model_and_optimizer(KINDS[kind])
    advance(model, optimizer, 3, 0)
    optimizer.param_groups[1]["lr"] *= 0.7
    tensors, rest = optimizer_tensors(optimizer, list(model.named_parameters()))
    path = save(
        tmp_path, 3, {"adapter": dict(model.named_parameters()), "optimizer": tensors}, {"optimizer": rest}, None
    )
    advance(model, optimizer, 4, 3)

    again, second = model_and_optimizer(KINDS[kind], seed=1)
    read = load(path)
    again.load_state_dict(read.tensors["adapter"])
    names = list(again.named_parameters())[::-1]  # the order of names is no part of the state
    load_optimizer(second, names, read.tensors["optimizer"], read.state["optimizer"])
    advance(again, second, 4, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for group, other in zip(optimizer.param_groups, second.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}
        assert all(type(group[k]) is type(other[k]) for k in group)
    a, b = optimizer_tensors(optimizer, list(model.named_parameters()))[0], optimizer_tensors(second, names)[0]
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_moments_keep_a_dtype_other_than_the_parameters():
    model, optimizer = model_and_optimizer(torch.optim.AdamW, torch.bfloat16)
    advance(model, optimizer, 1, 0)
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].float() + 1e-4
    names = list(model.named_parameters())
    tensors, rest = optimizer_tensors(optimizer, names)
    second = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[1].parameters()}])
    load_optimizer(second, names, tensors, json.loads(json.dumps(rest)))
    for parameter, state in optimizer.state.items():
        assert second.state[parameter]["exp_avg"].dtype == torch.float32
        assert torch.equal(second.state[parameter]["exp_avg"], state["exp_avg"])
        assert second.state[parameter]["exp_avg"].data_ptr() != state["exp_avg"].data_ptr()


def stored():
    model, optimizer = model_and_optimizer(torch.optim.AdamW)
    advance(model, optimizer, 1, 0)
    return model, optimizer, *optimizer_tensors(optimizer, list(model.named_parameters()))


def test_what_does_not_fit_is_refused_and_nothing_changes():
    model, optimizer, tensors, rest = stored()
    names = list(model.named_parameters())
    kept = {k: v.clone() for k, v in optimizer_tensors(optimizer, names)[0].items()}
    short = {k: v for k, v in tensors.items() if k != "0.weight|exp_avg"}
    more = tensors | {"0.weight|extra": torch.zeros(1)}
    reshaped = json.loads(json.dumps(rest))
    reshaped["states"]["0.weight"]["shape"] = [4, 4]
    renamed = [("net." + name, parameter) for name, parameter in names]
    for args, words in (
        ((names, short, rest), "tensor 0.weight.exp_avg is not in the checkpoint"),
        ((names, more, rest), "tensor 0.weight.extra is not in the run"),
        ((names, tensors, reshaped), r"0.weight has shape \[4, 4\] there and \[5, 4\] here"),
        ((renamed, tensors, rest), "parameter 0.bias is not in the run"),
        ((names, tensors, rest | {"class": "SGD"}), "it is of SGD, the run has AdamW"),
        ((names, tensors, rest | {"groups": rest["groups"][:1]}), "it has 1 parameter groups"),
    ):
        with pytest.raises(InputError, match=words):
            load_optimizer(optimizer, *args)
    now = optimizer_tensors(optimizer, names)[0]
    assert kept.keys() == now.keys() and all(torch.equal(kept[k], now[k]) for k in kept)
    for wrong in (names[:-1], names + [("x", nn.Parameter(torch.zeros(1)))], [("same", p) for _, p in names]):
        with pytest.raises(ValueError, match="each needs a name of its own"):
            optimizer_tensors(optimizer, wrong)


def test_a_state_that_is_neither_tensor_nor_scalar_is_refused():
    model, optimizer, *_ = stored()
    optimizer.state[model[0].weight]["history"] = [torch.zeros(2)]
    with pytest.raises(ValueError, match="0.weight.history holds .* neither a tensor nor a JSON scalar"):
        optimizer_tensors(optimizer, list(model.named_parameters()))


def test_moments_come_back_in_the_memory_layout_of_their_parameter():
    """The fused kernel pairs parameter, gradient and moments by place in memory."""

    def made():
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)

    def advance(layer, optimizer, seed):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        layer(x.to(memory_format=torch.channels_last)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    (one, first), (other, second) = made(), made()
    for seed in range(3):
        advance(one, first, seed)
    saved, rest = optimizer_tensors(first, list(one.named_parameters()))
    other.load_state_dict(one.state_dict())
    load_optimizer(second, list(other.named_parameters()), {n: t.contiguous() for n, t in saved.items()}, rest)
    advance(one, first, 3)
    advance(other, second, 3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
