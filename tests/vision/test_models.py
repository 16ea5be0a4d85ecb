"""Towers of three libraries: what they give, what they keep, and that equal weights train equally."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from tiny_vit import hf_vit, save_timm, timm_vit

import vislora
from vislora import world
from vislora.errors import InputError
from vislora.vision import heads, models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{library: a folder with the same ViT}."""
    place = tmp_path_factory.mktemp("models")
    hf_vit(timm_vit()).save_pretrained(place / "hf")
    words = {"size": {"height": 16, "width": 16}, "image_mean": [0.4] * 3, "image_std": [0.2] * 3, "resample": 3}
    (place / "hf" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "do_resize": True, **words})
    )
    return {"timm": save_timm(place / "timm"), "transformers": place / "hf"}


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_features_and_source_head_are_the_librarys_own_logits(folders, library):
    tower = models.load(str(folders[library]))
    assert tower.library == library and tower.width == 24 and tower.preprocess.size == 16
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(tower.source_head(tower(x)), timm_vit().eval()(x), atol=1e-5, rtol=1e-4)
    assert "_aside" not in dict(tower.named_modules()) and len(list(tower.children())) == 1


def test_preprocessing_is_read_from_each_library(folders):
    assert models.load(str(folders["timm"])).preprocess == models.Preprocess(16, crop_pct=1.0)
    read = models.load(str(folders["transformers"])).preprocess
    assert read.mean == (0.4,) * 3 and read.std == (0.2,) * 3 and read.squash and read.interpolation == "bicubic"


def test_a_clip_gives_its_image_features_and_a_zero_shot_head(tmp_path):
    import open_clip

    tower = models.load(str(world.ROOT / "assets" / "world" / "tiny-clip"))
    x = torch.randn(2, 3, 64, 64)
    clip, name = tower.clip
    (tmp_path / "words.txt").write_text("a photo of {}\n")
    head = heads.source_head(tower, ["red_apple", "dog", "bus"], str(tmp_path / "words.txt"))
    words = open_clip.get_tokenizer(name)(["a photo of red apple", "a photo of dog", "a photo of bus"])
    with torch.no_grad():
        image, said = clip.encode_image(x, normalize=True), head(tower(x))
        torch.testing.assert_close(said, 100 * image @ clip.encode_text(words, normalize=True).T, atol=1e-3, rtol=1e-4)
    assert heads.zero_shot(tower, ["dog"], "openai").weight.shape == (128, 1)
    with pytest.raises(InputError, match="without {}"):
        (tmp_path / "words.txt").write_text("a photo")
        heads.zero_shot(tower, ["dog"], str(tmp_path / "words.txt"))


def test_the_source_head_goes_by_names_where_there_are_any(folders, caplog):
    tower = models.load(str(folders["timm"]))
    x, head = torch.randn(2, 24), tower.source_head
    tower.source_classes = ("a cat", "dog", "Owl", "bus")
    found = heads.source_head(tower, ["bus", "a_cat", "dog", "owl"], "openai")
    with torch.no_grad():
        torch.testing.assert_close(found(x), head(x)[:, [3, 0, 1, 2]])
    assert heads.source_head(tower, ["a cat", "dog", "owl", "bus"], "openai") is head and not caplog.records
    assert heads.source_head(tower, ["sun", "moon", "star", "sky"], "openai") is head
    assert "sun, moon, star" in caplog.text
    caplog.clear()
    tower.source_classes = tuple(f"LABEL_{i}" for i in range(4))
    assert heads.source_head(tower, ["sun", "moon", "star", "sky"], "openai") is head and not caplog.records


def test_imagenets_names_are_for_imagenet_alone(monkeypatch):
    import open_clip
    from open_clip import zero_shot_metadata as words

    asked = []
    monkeypatch.setattr(open_clip, "build_zero_shot_classifier",
                        lambda clip, tokenizer, names, *more, **rest: asked.append(names) or torch.zeros(8, len(names)))
    tower, known = models.load(str(world.ROOT / "assets" / "world" / "tiny-clip")), list(words.IMAGENET_CLASSNAMES)
    wnids = [f"n{i:08d}" for i in range(1000)]
    own = [name if i % 3 else f"{name}, something else" for i, name in enumerate(known)]
    others = [f"dish {i}" for i in range(1000)]
    for classes in (wnids, own, others, wnids[::-1]):
        heads.source_head(tower, classes, "simple")
    assert asked == [known, known, others, wnids[::-1]]


def test_templates_are_for_clips(folders):
    with pytest.raises(InputError, match="no CLIP"):
        heads.source_head(models.load(str(folders["timm"])), ["a", "b", "c", "d"], "openai imagenet")


def trained(tower: models.Tower, adapter, steps: int = 6) -> tuple[list[float], list[torch.Tensor]]:
    """The losses of some steps, and the deltas of q and v in order."""
    torch.manual_seed(3)
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    head = heads.new_head(24, 4, 0)
    optimizer = torch.optim.AdamW([*adapter.param_groups(5e-3), {"params": list(head.parameters()), "lr": 5e-3}])
    adapter.bind(optimizer, steps)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(head(tower(x)), y) + adapter.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [update.dense(site.weight()) for _, site, _, update in adapter.site_updates()]


@pytest.mark.parametrize("method", ["nb_lora", "pissa", "dora", "sorsa"])
def test_timm_and_transformers_train_equally_from_equal_weights(folders, method):
    runs, first = [], []
    for folder in folders.values():
        tower = models.load(str(folder))
        tower.model.train()
        adapter = vislora.attach(tower.model, method, rank=2, **({"delta_ratio": 0.5} if method == "nb_lora" else {}))
        if runs:  # the random start is by a site's name, and names differ
            for own, other in zip(adapter.named_tensors(), first, strict=True):
                own[1].data.copy_(other)
        else:
            first = [t.detach().clone() for _, t in adapter.named_tensors()]
        assert len(adapter.sites) == 4
        runs.append(trained(tower, adapter))
    (losses, deltas), (other_losses, other_deltas) = runs
    assert losses == pytest.approx(other_losses, rel=1e-4) and losses[-1] < losses[0]
    for a, b in zip(deltas, other_deltas, strict=True):
        assert a.norm() > 1e-4
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize("method", ["lora", "nb_lora", "dora", "pissa"])
def test_merging_moves_q_and_v_rows_and_leaves_k_rows_bit_unchanged(folders, method):
    tower = models.load(str(folders["timm"]))
    base = {n: p.detach().clone() for n, p in tower.model.named_parameters()}
    adapter = vislora.attach(tower.model, method, rank=2, **({"delta_ratio": 0.5} if method == "nb_lora" else {}))
    trained(tower, adapter)
    deltas = adapter.deltas()
    adapter.detach(merge=True)
    for i in range(2):
        name = f"blocks.{i}.attn.qkv"
        merged, delta = tower.model.get_submodule(name).weight, deltas[name]
        for rows in (slice(0, 24), slice(48, 72)):
            assert delta[rows].norm() > 1e-3
            torch.testing.assert_close(merged[rows], base[f"{name}.weight"][rows] + delta[rows])
        assert torch.equal(merged[24:48], base[f"{name}.weight"][24:48]) and not delta[24:48].any()
    for name, p in tower.model.named_parameters():
        assert "qkv.weight" in name or torch.equal(p, base[name]), name


@pytest.mark.parametrize("method, count", [("lora", 294_912), ("nb_lora", 295_104)])
def test_parameters_of_vit_b_are_the_formulas(method, count):
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    options = {"p": 1, "delta": 1.0} if method == "nb_lora" else {}
    adapter = vislora.attach(model, method, rank=8, **options)
    assert sum(p.numel() for p in adapter.parameters()) == count
    r, m, n, sites = 8, 768, 768, 24
    assert count == sites * (r * (m + n) + (r if method == "nb_lora" else 0))


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    for name, words in {
        "vit_bse_patch16_224": "did you mean", "/nope/model": "is no folder", str(tmp_path): "no configuration",
        "ViT-B-32": "take one of",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=words):
            models.load(name)
    with pytest.raises(InputError, match="quickgelu"):
        models.load("ViT-B-32", pretrained="openai")
    with pytest.raises(InputError, match="no such file"):
        models.load("vit_tiny_patch16_224", pretrained="weights.bin")


def test_random_weights_on_request():
    tower = models.load("test_vit", pretrained="random")
    assert tower.width == 64 and tower.source_head.out_features == 1000


@pytest.mark.parametrize("library", ["timm", "transformers", "open_clip"])
def test_random_weights_are_a_function_of_the_seed(folders, library):
    name = str(world.ROOT / "assets" / "world" / "tiny-clip") if library == "open_clip" else str(folders[library])
    if library == "timm":
        name = "test_vit"
    state = torch.random.get_rng_state()
    one = models.load(name, pretrained="random", seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(3)
    same, other = (models.load(name, pretrained="random", seed=seed) for seed in (3, 4))
    pairs = [(p, same.state_dict()[n], other.state_dict()[n]) for n, p in one.state_dict().items()]
    assert all(torch.equal(a, b) for a, b, _ in pairs) and any(not torch.equal(a, c) for a, _, c in pairs)
    if one.source_head is not None:
        assert torch.equal(one.source_head.weight, same.source_head.weight)


@pytest.mark.parametrize("library", ["timm", "transformers"])
@pytest.mark.parametrize("method", ["nb_lora", "full", "none"])
def test_a_run_becomes_a_model_of_its_own(folders, library, method, tmp_path):
    from vislora import config
    from vislora.baselines import BASELINES
    from vislora.vision import results, whole
    from vislora.vision.options import ClassificationOptions

    chosen = BASELINES[method]() if method in BASELINES else vislora.adapters.get(method)(rank=2)
    tower, run = models.load(str(folders[library])), tmp_path / "run"
    adapter = vislora.attach(tower.model, chosen)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    head = heads.new_head(24, 3, 0)
    run.mkdir()
    if method != "none":
        adapter.save(run / "adapter")
    results.save_head(head, ("a", "b", "c"), run)
    options = ClassificationOptions(model_name_or_path=str(folders[library]), dataset_name="x")
    from vislora.training.run import RunFolder

    RunFolder(run).write_config(config.to_dict(options, chosen))
    again = models.load(str(whole.write(run, tmp_path / "out")))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(again.source_head(again(x)), head(tower(x)), atol=1e-5, rtol=1e-4)
    assert again.source_classes == ("a", "b", "c") and again.preprocess == tower.preprocess
    with pytest.raises(InputError, match="not empty"):
        whole.write(run, tmp_path / "out")
