"""NB-LoRA against its paper: the bound, completeness, the corrected backward, the manifold identity, the start."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from vislora import attach, linalg, load
from vislora.adapters.nb_lora import NBLoRA
from vislora.errors import InputError
from vislora.linalg import _Cayley, cayley, product_singular_values, schatten


def _free(n, m, r, scale=1.0, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(r, n, generator=g, dtype=dtype), torch.randn(r, m, generator=g, dtype=dtype)
    return scale * A, scale * B


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1, 10, 1e3, 1e6])
@pytest.mark.parametrize("p", [1, 2, 4, math.inf])
def test_every_singular_value_is_bounded(scale, p):
    method = NBLoRA(rank=8, p=p, delta=3.0)
    for seed in range(5):
        A, B = _free(24, 40, 8, scale, seed)
        t = SimpleNamespace(A=A, B=B, delta=torch.tensor(3.0))
        t.s = torch.randn(8, generator=torch.Generator().manual_seed(seed)) * 4
        update, s = method.factors(t), method.singular_bounds(t)
        values = product_singular_values(update.up, update.down)
        assert (values <= s.sort(descending=True).values * (1 + 1e-5)).all()
        assert torch.isclose(schatten(s, p), torch.tensor(3.0), rtol=1e-6)
        assert schatten(values, p) <= 3.0 * (1 + 1e-5)
        Q = torch.cat(cayley(A, B), -1)
        assert (Q @ Q.mT - torch.eye(8)).abs().max() < 1e-4


@pytest.mark.parametrize("p, goal", [(1, 1), (2, 2), (math.inf, math.inf), (1, math.inf)])
def test_gradient_ascent_reaches_the_bound_and_never_passes_it(p, goal):
    torch.manual_seed(0)
    method = NBLoRA(rank=4, p=p, delta=2.0)
    t = SimpleNamespace(A=0.3 * torch.randn(4, 10), B=0.1 * torch.randn(4, 12), delta=torch.tensor(2.0))
    t.s = 0.01 * torch.randn(4)
    for x in (t.A, t.B, t.s):
        x.requires_grad_()
    optimizer = torch.optim.Adam([t.A, t.B] + ([t.s] if p < math.inf else []), lr=0.2 if p < goal else 0.05)
    best = 0.0
    for _ in range(500):
        optimizer.zero_grad()
        update = method.factors(t)
        norm = schatten(torch.linalg.svdvals(update.product()), goal)
        best = max(best, norm.item())
        assert schatten(torch.linalg.svdvals(update.product()), p) <= 2.0 * (1 + 1e-5)
        (-norm).backward()
        optimizer.step()
    assert 0.999 * 2.0 < best <= 2.0 * (1 + 1e-5)


@pytest.mark.parametrize("case", ["random", "at the bound", "zeros", "all zero", "repeated"])
def test_every_matrix_within_the_bound_is_reached(case):
    torch.manual_seed(3)
    n, m, r = 9, 7, 4
    s = torch.tensor([1.3, 1.0, 0.8, 0.5], dtype=torch.float64)
    sigma = {
        "random": s * torch.rand(4, dtype=torch.float64),
        "at the bound": s.clone(),
        "zeros": s * torch.tensor([0.9, 0.4, 0, 0], dtype=torch.float64),
        "all zero": torch.zeros(4, dtype=torch.float64),
        "repeated": torch.full((4,), 0.4, dtype=torch.float64),
    }[case]
    U = linalg.orthonormal(torch.randn(m, r, dtype=torch.float64))
    V = linalg.orthonormal(torch.randn(n, r, dtype=torch.float64))
    goal = U @ torch.diag(sigma) @ V.mT
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        At, Bt = NBLoRA.invert(*(x.to(dtype) for x in (U, sigma, V, s)))
        A, B = cayley(At, Bt)
        assert At.dtype == dtype and (2 * B.mT @ torch.diag(s).to(dtype) @ A - goal).abs().max() < tolerance


@pytest.mark.parametrize("r, n, m", [(1, 4, 3), (8, 8, 8), (32, 40, 200)])
def test_the_inverse_is_well_conditioned(r, n, m):
    """Random subspaces, negative starts among them: the signs keep I + G away from singular."""
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        U = linalg.orthonormal(torch.randn(m, r, generator=g, dtype=torch.float64))
        V = -linalg.orthonormal(torch.randn(n, r, generator=g, dtype=torch.float64))
        s = torch.rand(r, generator=g, dtype=torch.float64) + 0.1
        sigma = s * torch.rand(r, generator=g, dtype=torch.float64)
        At, Bt = NBLoRA.invert(U, sigma, V, s)
        A, B = cayley(At, Bt)
        assert (2 * B.mT @ torch.diag(s) @ A - (U * sigma) @ V.mT).abs().max() < 1e-11
        assert At.abs().max() < 10 * r


def test_the_signs_are_needed():
    """With V the negative of the first axes G is -I, and I + G singular unless signs are turned."""
    U, V = torch.eye(6, 4, dtype=torch.float64), -torch.eye(5, 4, dtype=torch.float64)
    s = torch.ones(4, dtype=torch.float64)
    A, B = cayley(*NBLoRA.invert(U, 0.5 * s, V, s))
    assert (2 * B.mT @ A - 0.5 * U @ V.mT).abs().max() < 1e-12


@pytest.mark.parametrize("p", [1, 2, 4, 50])
def test_scales_are_found_above_any_spectrum_inside(p):
    method = NBLoRA(rank=5, p=p, delta=2.0)
    sigma = torch.tensor([1.0, 0.5, 0.5, 0.1, 0.0], dtype=torch.float64)
    sigma = sigma * (2.0 * (1 - 1e-3) / schatten(sigma, p))
    t = SimpleNamespace(delta=torch.tensor(2.0), s=method.scale_for(sigma, 2.0).float())
    s = method.singular_bounds(t)
    assert torch.isclose(schatten(s, p), torch.tensor(2.0), rtol=1e-6)
    assert (s > sigma).all()


@pytest.mark.parametrize("n, m, r", [(6, 5, 3), (4, 4, 4), (9, 3, 2)])
def test_custom_backward(n, m, r):
    A, B = _free(n, m, r, dtype=torch.float64)
    inputs = (A.requires_grad_(), B.requires_grad_())
    assert torch.autograd.gradcheck(cayley, inputs)
    A32, B32 = (x.detach().float().requires_grad_() for x in inputs)
    grads = []
    for backward in ("custom", "autodiff"):
        down, up = cayley(A32, B32, backward)
        g = torch.Generator().manual_seed(1)
        loss = (down * torch.randn(r, n, generator=g)).sum() + (up * torch.randn(r, m, generator=g)).sum()
        grads.append(torch.autograd.grad(loss, (A32, B32)))
    for custom, auto in zip(*grads, strict=True):
        assert (custom - auto).norm() <= 1e-5 * auto.norm()


def test_the_papers_printed_sign_fails(monkeypatch):
    """Equation 25 as printed takes the half H M term off; the check above must notice that."""
    right = _Cayley.backward

    def printed(ctx, dA, dB):
        V, down, up = ctx.saved_tensors
        to_down, to_up = right(ctx, dA, dB)
        r, n = down.shape
        Y, dH = torch.cat([down[:, r:], up], 1), torch.cat([dA[:, r:], dB], 1)
        dN = -2 * V.mT @ (dA[:, :r] - dH @ Y.mT) @ V.mT
        off = 2 * (dN + dN.mT) @ Y
        return torch.cat([to_down[:, :r], to_down[:, r:] - off[:, : n - r]], 1), to_up - off[:, n - r :]

    monkeypatch.setattr(_Cayley, "backward", staticmethod(printed))
    A, B = _free(6, 5, 3, dtype=torch.float64)
    with pytest.raises(torch.autograd.gradcheck.__globals__["GradcheckError"]):
        torch.autograd.gradcheck(cayley, (A.requires_grad_(), B.requires_grad_()))


@pytest.mark.parametrize("p, total", [(1, 2 * 3.0), (math.inf, 2 * 8 * 3.0)])
def test_balanced_factors_lie_on_the_manifold_of_equation_9(p, total):
    method = NBLoRA(rank=8, p=p, delta=3.0)
    t = SimpleNamespace(A=None, B=None, delta=torch.tensor(3.0).double(), s=torch.randn(8).double())
    t.A, t.B = _free(24, 40, 8, dtype=torch.float64)
    A, B = cayley(t.A, t.B)
    s = method.singular_bounds(t)
    root = (2 * s).sqrt()[:, None]
    gram = (root * A) @ (root * A).mT + (root * B) @ (root * B).mT
    assert (gram - torch.diag(2 * s)).abs().max() < 1e-6
    assert torch.isclose(gram.trace(), torch.tensor(total).double(), rtol=1e-6)


@pytest.mark.parametrize("start", ["kaiming", "orthogonal"])
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_start(start, p):
    net = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))
    adapter = attach(net, "nb_lora", rank=8, p=p, delta=1.0, start=start)
    assert all(not d.any() for d in adapter.deltas().values())
    net(torch.randn(5, 16)).square().sum().backward()
    for name, parameter in adapter.named_parameters():
        moved = parameter.grad.abs().max() > 0
        assert moved == name.endswith("B"), name
    if start == "orthogonal":
        for name, parameter in adapter.named_parameters():
            if name.endswith("A"):
                assert (parameter @ parameter.mT - torch.eye(8)).abs().max() < 1e-5


def test_spectral_bound_trains_no_scale_and_unbounded_trains_it_freely():
    net = nn.Sequential(nn.Linear(16, 24))
    names = {n for n, _ in attach(net, "nb_lora", rank=4, p=math.inf, delta=1.0, name="a").named_parameters()}
    assert names == {"0.A", "0.B"}
    free = attach(net, "nb_lora", rank=4, p=1, delta=2.0, bounded=False, name="b")
    scale = dict(free.named_parameters())["0.s"]
    assert torch.allclose(scale, torch.full((4,), 0.5))
    with torch.no_grad():
        scale.fill_(100.0)
        dict(free.named_parameters())["0.B"].normal_()
    assert torch.linalg.matrix_norm(free.deltas()["0"], ord=2) > 2.0


def test_delta_ratio_is_of_each_weights_own_norm():
    net = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))
    for p in (1, 2, math.inf):
        adapter = attach(net, "nb_lora", rank=4, p=p, delta_ratio=0.25, name=f"p{p}")
        for _, site, t, _ in adapter.site_updates():
            assert torch.isclose(t.delta, 0.25 * schatten(torch.linalg.svdvals(site.weight()), p), rtol=1e-5)
        adapter.detach()


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SEES = {**SMALL, "image_size": 16, "patch_size": 8}


@pytest.mark.parametrize(
    "kind, p, ratio",
    [("encoder", 1, 0.02), ("encoder", math.inf, 0.04), ("llama", 1, 0.1), ("llama", math.inf, 0.2),
     ("classifier", 1, 0.02), ("vit", 1, 0.1), ("vit", 2, 0.2), ("towers", 1, 0.1), ("own", 1, 0.1), ("own", 1.5, 0.1)],
)  # fmt: skip
def test_without_a_bound_the_models_kind_has_one(kind, p, ratio, tmp_path):
    torch.manual_seed(0)
    model = {
        "encoder": lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, vocab_size=50)),
        "classifier": lambda: transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**SMALL, vocab_size=50)
        ),
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SEES)),
        "towers": lambda: transformers.SiglipModel(transformers.SiglipConfig(text_config=SMALL, vision_config=SEES)),
        "own": lambda: nn.Sequential(nn.Linear(16, 24)),
    }[kind]()
    adapter = attach(model, "nb_lora", rank=2, p=p, targets="all-linear")
    assert adapter.method.delta_ratio == ratio and adapter.method.delta is None
    for _, site, t, _ in adapter.site_updates():
        assert torch.isclose(t.delta, ratio * schatten(torch.linalg.svdvals(site.weight()), p), rtol=1e-5)
    adapter.save(tmp_path)
    adapter.detach()
    assert load(model, tmp_path).method.delta_ratio == ratio


def test_a_text_encoder_beside_a_denoiser_has_the_denoisers_bound():
    parts = {"unet": nn.ModuleDict({"to_q": nn.Linear(8, 8)}),
             "text_encoder": transformers.BertModel(transformers.BertConfig(**SMALL))}  # fmt: skip
    assert attach(parts, "nb_lora", rank=2, targets="all-linear").method.delta_ratio == 0.1
    other = {"text_encoder": transformers.BertModel(transformers.BertConfig(**SMALL))}
    assert attach(other, "nb_lora", rank=2, delta=3.0, targets="all-linear").method.delta_ratio is None


def test_factors_rounded_to_bf16_stay_near_the_bound():
    A, B = _free(64, 48, 8, 10.0)
    t = SimpleNamespace(A=A, B=B, delta=torch.tensor(1.0))
    update = NBLoRA(rank=8, p=math.inf, delta=1.0).factors(t)
    values = product_singular_values(update.up.bfloat16(), update.down.bfloat16())
    assert values.max() <= 1.01


@pytest.mark.parametrize(
    "options, words",
    [
        pytest.param({"p": 0.5}, ("p", "0.5"), marks=pytest.mark.case("C09")),
        ({"p": math.nan}, ("p", "nan")),
        pytest.param({"delta": 0.0}, ("delta", "0.0", "positive"), marks=pytest.mark.case("C09")),
        ({"delta": -1.0}, ("delta", "-1.0")),
        ({"delta": math.inf}, ("delta", "inf")),
        ({"delta_ratio": 0.0}, ("delta_ratio", "0.0")),
        ({"delta": 1.0, "delta_ratio": 0.1}, ("delta", "0.1")),
        pytest.param({"rank": 0}, ("rank", "0"), marks=pytest.mark.case("C01")),
        pytest.param({"rank": 17}, ("rank", "17", "16"), marks=pytest.mark.case("C01")),
        ({"start": "zeros"}, ("start", "zeros")),
        ({"alpha": 8}, ("alpha", "no such option", "delta_ratio")),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(InputError) as error:
        attach(nn.Sequential(nn.Linear(16, 24)), "nb_lora", **options)
    assert all(word in str(error.value) for word in words), error.value
