"""eval/speed.py and eval/speed_loop.py at a tiny size: they run, count what can be known, and a missed goal fails."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "eval"))
    for name in [name for name in sys.modules if name.startswith("speed") or name in ("cost", "turns")]:
        monkeypatch.delitem(sys.modules, name)
    import speed

    threads = torch.get_num_threads()
    yield speed
    torch.set_num_threads(threads)


def test_rows_table_and_plot(speed, tmp_path, capsys):
    words = ["--hosts", "linear", "llama", "--size", "tiny", "--pairs", "2"]
    variants = ["peft:lora", "lora", "pissa", "full"]
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "plot.png")]
    speed.main([*words, "--variants", *variants, *files])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(r["model"], r["variant"]) for r in rows] == [
        (model, name) for model in ("linear", "llama") for name in ("frozen", *variants)
    ]
    of = {r["variant"]: r for r in rows if r["model"] == "linear"}
    assert of["frozen"]["over frozen"] == [1.0, 1.0, 1.0] and of["lora"]["over lora"] == [1.0, 1.0, 1.0]
    kept = 4 * 10 * 16  # the input of a layer of 16 on 10 tokens, all that the quick way holds beside the loss
    assert of["lora"]["saved"] - of["frozen"]["saved"] == kept
    assert of["peft:lora"]["saved"] - of["frozen"]["saved"] == kept + 4 * 10 * 4  # and what lies between its factors
    assert of["lora"]["ops"] - of["frozen"]["ops"] <= 7 < of["peft:lora"]["ops"] - of["frozen"]["ops"]
    assert all(r["seconds"] > 0 and r["peak"] > 0 for r in rows)
    shown = capsys.readouterr().out
    assert "peft:lora" in shown and "2 pairs" in shown
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_more_batches_are_more_to_do(speed):
    once, thrice = (
        speed.Variant(speed.HOSTS["vit"]("tiny"), "lora", 4, torch.float32, "cpu", batch=batch) for batch in (1, 3)
    )
    assert thrice.inputs[0].shape[0] == 3 * once.inputs[0].shape[0]
    assert speed.counts(thrice)["saved"] > 2 * speed.counts(once)["saved"]
    assert thrice.forward().item() == pytest.approx(once.forward().item(), rel=1e-5)


def test_counting_leaves_nothing_behind(speed):
    variant = speed.Variant(speed.HOSTS["llama"]("tiny"), "frozen", 4, torch.float32, "cpu")
    variant.step()

    def held() -> int:
        gc.collect()
        return sum(type(o) is torch.Tensor for o in gc.get_objects())

    before = held()
    assert speed.counts(variant)["saved"] > 0
    assert held() == before


def test_between_two_renewals_nothing_is_renewed(speed):
    host, seen = speed.HOSTS["llama"]("tiny"), {}
    for name in ("od_lora", "od_lora:between"):
        variant = speed.Variant(host, name, 4, torch.float32, "cpu")
        variant.step()
        variant.step()
        before = bases(variant.model)
        variant.step()
        after = bases(variant.model)
        seen[name] = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert seen["od_lora"] and not any(seen["od_lora"]) and all(seen["od_lora:between"])


def bases(model) -> list[torch.Tensor]:
    return [t.clone() for name, t in model.named_buffers() if name.endswith((".Qa", ".Qb"))]


def test_models_build_and_join(speed):
    for name in ("unet", "sd_block", "vit", "llm_block"):
        host = speed.HOSTS[name]("tiny")
        frozen = speed.Variant(host, "frozen", 4, torch.float32, "cpu")
        frozen.step()
        if host.joined:
            joined = speed.Variant(host, "joined", 4, torch.float32, "cpu")
            assert joined.forward().item() == pytest.approx(frozen.forward().item(), rel=1e-5)
            assert speed.counts(joined)["ops"] < speed.counts(frozen)["ops"]
            adapted, apart = (speed.Variant(host, name, 4, torch.float32, "cpu") for name in ("joined:lora", "lora"))
            assert speed.counts(adapted)["ops"] < speed.counts(apart)["ops"]


def test_a_missed_goal_fails(speed, capsys):
    import speed_goals

    rows = [{"model": "linear", "rank": 128, "dtype": "float32", "variant": "lora", "over frozen": [ratio, 0, 0]}
            for ratio in (1.9, 2.02, 2.1)]  # fmt: skip
    said = [(speed_goals.check([row]), capsys.readouterr().out) for row in rows]
    assert [passed for passed, _ in said] == [True, True, False]
    for words, (_, out) in zip(("met", "within the slack", "missed"), said, strict=True):
        assert words in out
    assert {goal.host for goal in speed_goals.GOALS} <= set(speed.HOSTS)


def test_no_pairs_are_refused(speed):
    with pytest.raises(speed.InputError, match="--pairs.*0 measures nothing"):
        speed.main(["--pairs", "0"])


def test_the_loop_s_losses_are_the_script_s(speed):
    import speed_loop

    row = speed_loop.compare(size=32, divisor=32, layers=1, rank=2, pairs=2, checkpointing=True)
    assert row["losses apart"] < 1e-5
    assert row["operations, script / ours"] > 1.05  # the encoders
    assert all(ratio > 0 for ratio in row["script / ours"])


def test_parts_are_measured(speed, monkeypatch):
    import speed_parts

    monkeypatch.setattr(speed_parts, "DEVICE", "cpu")
    (row,) = speed_parts.cayley_map(2, [(12, 3, 4)])
    assert row["what"] == "d 12, r 3, 4 layers" and all(value[0] > 0 for value in list(row.values())[1:])
    assert [row["what"] for row in speed_parts.files(1)] == ["load and take away", "swap", "merge and unmerge"]
    *ratios, apart = speed_parts.inference(1)
    assert len(ratios) == 3 and 0 < apart["apart, relative"] < 1e-5
    of = {row["what"].removesuffix(" over frozen"): row for row in speed_parts.step(1, "tiny")}
    assert len(of) == 2 * len(speed_parts.STEPS)
    assert 1 < of["vit, lora"]["operations"] < of["vit, od_lora"]["operations"] < 2  # its update has twice the rank
    assert of["unet, lora"]["with the optimizer"][0] > 1


def test_variants_share_large_weights_and_train_their_own(speed):
    host = speed.HOSTS["linear"]("usual")
    base = speed.model_of(host, torch.float32, "cpu")
    base["layer"] = torch.nn.Linear(1024, 1024).requires_grad_(False)
    host = dataclasses.replace(host, inputs=lambda: (torch.randn(4, 1024),))
    lora = speed.Variant(host, "lora", 4, torch.float32, "cpu", base)
    held = base["layer"].weight.clone()
    lora.step()
    assert lora.model["layer"].weight.data_ptr() == base["layer"].weight.data_ptr()
    assert lora.model["layer"].bias.data_ptr() != base["layer"].bias.data_ptr()
    assert torch.equal(held, base["layer"].weight)


def test_scaling_rows_grow_with_what_grows(speed, tmp_path, capsys):
    import speed_scaling

    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "plot.png")]
    small = ["--width", "32", "--pairs", "2", "--variants", "lora"]
    speed_scaling.main(["layers", "--values", "2", "8", *small, *files])
    rows = {(r["variant"], r["value"]): r for r in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["frozen", 8]["saved MiB"] == 0 and rows["frozen", 8]["over frozen"] == [1.0, 1.0, 1.0]
    assert rows["lora", 8]["saved MiB"] == 4 * rows["lora", 2]["saved MiB"] > 0  # every layer's input
    assert rows["lora", 8]["ms"] > 1.5 * rows["lora", 2]["ms"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "step / frozen, by layers" in capsys.readouterr().out
    with pytest.raises(speed.InputError, match="--values.*take numbers from 1 on"):
        speed_scaling.main(["rank", "--values", "0"])


def test_scaling_over_two_processes(speed, tmp_path):
    import speed_scaling

    words = ["--values", "1", "2", "--width", "16", "--pairs", "1", "--variants", "lora"]
    speed_scaling.main(["processes", *words, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(r["value"], r["variant"]) for r in rows] == [(1, "lora"), (2, "lora")]
    assert rows[0]["over the first"] == 1 and all(r["ms"] > 0 for r in rows)
    assert rows[1]["sent MiB"] == 32 * 16 * (16 + 16) * 4 / 2**20  # 32 layers at rank 16


def test_compiled_steps_are_compared(speed, monkeypatch, tmp_path, capsys):
    from functools import partialmethod

    import speed_scaling

    eager = partialmethod(torch.nn.Module.compile, backend="eager")  # no kernels: the compiler takes minutes
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    speed_scaling.main(["compile", "--pairs", "1", "--variants", "lora", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [r["variant"] for r in rows] == ["frozen", "lora"]
    assert all(r["first step s"] > r["plain ms"] / 1000 > 0 and r["compiled / plain"][0] > 0 for r in rows)
    assert "compiled / plain" in capsys.readouterr().out
