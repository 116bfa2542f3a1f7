import pytest

from tic_clip import models
from tic_clip.training import plan as plan_module


def by_hand(width, patches, layers, mlp=4):
    """MACs of a transformer's matrix products on ``patches`` tokens: q, k, v, out; scores and sums; the MLP."""
    return layers * (patches * width * width * (4 + 2 * mlp) + 2 * patches * patches * width)


@pytest.mark.parametrize("patch", [8, 12])
def test_the_embedded_models_macs_by_hand(patch):
    """48 pixels of 8 are 6 x 6 patches, and a class token; width 128; 24 tokens of text; embeddings of 128."""
    patches = (48 // patch) ** 2
    image = patches * patch * patch * 3 * 128 + by_hand(128, patches + 1, 4) + 128 * 128
    text = by_hand(128, 24, 2) + 128 * 128
    assert models.count_macs(f"ViT-Tiny-{patch}-48") == image + text


def test_published_figures():
    """OpenCLIP's profile gives 14.78 GFLOPs for ViT-B-32, 46.44 for SigLIP's ViT-B-16; a MAC is two."""
    assert round(models.count_macs("ViT-B-16-SigLIP") * 2 / 1e9, 2) == 46.44
    each = models.count_macs("ViT-B-32")
    assert round(each * 2 / 1e9, 2) == 14.78
    assert each * 12_800_000 == pytest.approx(9.5e16, rel=0.01)  # DataComp's small scale


def test_the_table_has_what_is_counted():
    assert {model: models.count_macs(model) for model in models.MACS} == models.MACS


def test_a_teacher_costs_a_third():
    each = models.macs_per_sample("ViT-Tiny-8-48")
    plan = {"model": "ViT-Tiny-8-48", "samples": 300, "samples_seen": 1000, "samples_distilled": 600, "teacher": "x.pt"}
    for change, macs in (({}, (400, 1200)), ({"teacher": None, "samples_distilled": 0}, (300, 1000))):
        found = plan_module.add_macs(plan | change)
        assert (found["macs"], found["macs_seen"]) == (each * macs[0], each * macs[1])


def test_architectures_are_known_as_openclip_knows_them():
    import open_clip

    for model in (*open_clip.list_models(), "ViT-Tiny-8-48"):
        models.check_architecture(model)
