"""The toy world: drawings depend on their seed, datasets have MVTec's layout, masks show the defects."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import toy_world
from dataset.toy.captions import UNLABELLED, draw_pairs, random_captioned_scene
from dataset.toy.defects import DEFECTS
from dataset.toy.objects import OBJECTS
from dataset.toy.pretraining import region_loss
from dataset.toy.scene import COLORS, Scene, Thing, draw, draw_with_mask
from dataset.toy.textures import TEXTURES
from dataset.toy_world import TOY_DATASETS, draw_toy_class, toy_defects, write_toy_dataset


@pytest.fixture(scope="module")
def toy_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "toy_test"
    write_toy_dataset("toy_test", folder)
    return folder


def _scene(kind: str, seed: int = 0) -> Scene:
    return Scene((Thing(kind, "blue", "yellow", "plastic"),), "white", (), (seed,))


def test_datasets_do_not_share_classes_and_differ_in_defects():
    train, test = TOY_DATASETS["toy_train"], TOY_DATASETS["toy_test"]
    assert not set(train.values()) & set(test.values())
    for names in (train, test):
        assert set(names.values()) & set(OBJECTS) and set(names.values()) & set(TEXTURES)
    found = {
        name: {d for folder in classes for d in toy_defects(name, folder)} for name, classes in TOY_DATASETS.items()
    }
    assert found["toy_test"] - found["toy_train"]
    assert found["toy_test"] & found["toy_train"]


def test_the_layout_is_that_of_mvtec(toy_test: Path):
    assert {folder.name for folder in toy_test.iterdir()} == set(TOY_DATASETS["toy_test"])
    for folder in toy_test.iterdir():
        defects = toy_defects("toy_test", folder.name)
        counts = {d.name: len(list(d.glob("*.png"))) for d in (folder / "test").iterdir()}
        assert counts == {"good": toy_world.GOOD_IMAGES["toy_test"], **defects}
        for defect in defects:
            images = sorted((folder / "test" / defect).glob("*.png"))
            masks = sorted((folder / "ground_truth" / defect).glob("*.png"))
            assert [m.name for m in masks] == [f"{i.stem}_mask.png" for i in images]


def test_masks_are_8_bit_and_cover_a_patch_to_a_quarter(toy_test: Path):
    for path in toy_test.glob("*/ground_truth/*/*.png"):
        with Image.open(path) as image:
            assert image.mode == "L"
            assert image.size == (toy_world.IMAGE_SIZE, toy_world.IMAGE_SIZE)
            mask = np.asarray(image)
        assert set(np.unique(mask)) == {0, 255}
        assert toy_world.SMALLEST_DEFECT <= (mask > 0).mean() < 0.25, path


def test_saved_images_do_not_depend_on_order(toy_test: Path):
    write_toy_dataset("toy_test", toy_test)  # changes nothing
    image, mask = draw_toy_class("toy_test", "brick_wall", "burn", 2)
    drawn = np.asarray(Image.open(toy_test / "brick_wall" / "test" / "burn" / "002.png"))
    assert np.array_equal(drawn, image)
    saved = np.asarray(Image.open(toy_test / "brick_wall" / "ground_truth" / "burn" / "002_mask.png"))
    assert np.array_equal(saved > 0, mask)


@pytest.mark.parametrize("kind", [*OBJECTS, *TEXTURES])
def test_every_kind_is_drawn_reproducibly(kind: str):
    scene = _scene(kind)
    image = draw(scene, 64)
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert image.std() > 5
    assert np.array_equal(image, draw(scene, 64))


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("kind", ["plate", "brick wall"])
def test_the_mask_covers_changed_pixels(defect: str, kind: str):
    scene = _scene(kind, seed=3)
    sound = draw(scene, 96).astype(int)
    damaged, mask = draw_with_mask(scene, 96, defect)
    assert np.array_equal(damaged, draw(scene, 96, defect))
    change = np.abs(damaged - sound).max(-1)
    assert change[mask].mean() > 15
    # Not more: the rim of a bend moves a little and is left out of its mask, and light from a dent reaches beyond it.
    assert change[mask].mean() > 5 * change[~mask].mean()


def test_a_failure_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(toy_world, "_write_class", fail)
    with pytest.raises(OSError, match="disk full"):
        write_toy_dataset("toy_test", tmp_path / "data" / "toy_test")
    assert not list((tmp_path / "data").iterdir())


def test_captions_are_reproducible_and_seldom_mention_damage():
    samples = [random_captioned_scene((0, i)) for i in range(2000)]
    assert random_captioned_scene((0, 17)) == samples[17]
    damaged = [s for s in samples if s.defect is not None]
    assert 0.07 < len(damaged) / len(samples) < 0.13
    states = ("damaged", "broken", "flaw", "defect", "damage")
    said = [s for s in samples if any(word in s.caption for word in states)]
    assert all(s.defect is not None for s in said)
    assert 0.2 < len(said) / len(damaged) < 0.6


def test_captions_name_every_class_of_both_datasets():
    kinds = Counter(s.scene.things[0].kind for s in (random_captioned_scene((0, i)) for i in range(3000)))
    names = [name for classes in TOY_DATASETS.values() for name in classes.values()]
    assert all(kinds[name] for name in names)


def test_pairs_do_not_depend_on_the_chunk():
    one, other = draw_pairs((5, 0), 3, 6, 48, 8), draw_pairs((5, 0), 0, 5, 48, 8)
    assert np.array_equal(one.images[:2], other.images[3:])
    assert np.array_equal(one.patches[:2], other.patches[3:])
    assert one.descriptions[:2] == other.descriptions[3:]


def test_patch_labels_describe_regions_but_no_damage():
    drawn = draw_pairs((0, 0), 0, 400, 96, 8)
    damaged = np.array([random_captioned_scene((0, 0, i)).defect is not None for i in range(400)])
    assert (drawn.patches[damaged] == UNLABELLED).all()
    labelled = Counter()
    for image, patches, words in zip(drawn.images, drawn.patches, drawn.descriptions, strict=True):
        cells = image.reshape(12, 8, 12, 8, 3).mean((1, 3)) / 255
        for number, name in enumerate(words.regions):
            where = patches == number
            labelled[name.split()[-1]] += int(where.sum())
            if name.endswith(" background") and where.sum() >= 4:
                # Light and noise change a colour a little; another named colour lies further away.
                assert np.abs(np.median(cells[where], axis=0) - COLORS[name.split()[0]]).max() < 0.35
    assert labelled["background"] > labelled["dot"] > 0 and labelled["wood"] > 0 and labelled["key"] > 0


def test_the_region_loss_weighs_regions_equally():
    random = torch.Generator().manual_seed(0)
    patches, phrases = torch.randn(2, 5, 4, generator=random), torch.randn(3, 4, generator=random)
    regions = torch.tensor([[0, 0, 0, 2, -1], [1, 0, -1, -1, -1]])

    def mean_of(picture, region):
        places = [place for place in range(5) if regions[picture, place] == region]
        losses = [-torch.log_softmax(10 * phrases @ patches[picture, place], 0)[region] for place in places]
        return sum(losses) / len(losses)

    expected = (mean_of(0, 0) + mean_of(0, 2) + mean_of(1, 1) + mean_of(1, 0)) / 4
    assert torch.allclose(region_loss(patches, regions, phrases, torch.tensor(10.0)), expected)
    nothing = region_loss(patches, torch.full_like(regions, -1), phrases, torch.tensor(10.0))
    assert nothing == 0
