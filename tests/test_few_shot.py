"""Few-shot selection: K images per class, half anomalous, balanced, nested, determined by the seed."""

import logging
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.catalog import CATALOG
from dataset.few_shot import few_shot
from dataset.locate import LocatedDataset
from dataset.records import Record
from engine.data.task import TaskData, choose_training_images
from utils.errors import UserError


def make_class(name, normal, **defects):
    records = [Record(f"{name}/test/good/{i:03}.png", 0, name) for i in range(normal)]
    for kind, count in defects.items():
        records += [Record(f"{name}/test/{kind}/{i:03}.png", 1, name, f"{name}/mask/{kind}/{i}") for i in range(count)]
    return records


def labels(records):
    return Counter(record.label for record in records)


@st.composite
def classes(draw):
    counts = st.integers(0, 9)
    records = make_class("wood", draw(counts), hole=draw(counts), scratch=draw(counts), stain=draw(counts))
    return records or make_class("wood", 1)


@settings(deadline=None)
@given(classes(), st.data(), st.integers(-5, 2**40))
def test_k_shots_are_half_anomalous_and_contain_fewer_shots(records, data, seed):
    shot = data.draw(st.integers(1, len(records)))
    fewer = data.draw(st.integers(1, shot))
    chosen = few_shot(records, shot, seed)
    there = labels(records)
    assert len(set(chosen)) == shot and set(chosen) <= set(records)
    assert set(few_shot(records, fewer, seed)) <= set(chosen)
    anomalous = max(min((shot + 1) // 2, there[1]), shot - there[0])
    assert labels(chosen) == Counter({1: anomalous, 0: shot - anomalous})


@settings(deadline=None)
@given(classes(), st.data())
def test_defect_types_are_balanced(records, data):
    chosen = few_shot(records, data.draw(st.integers(1, len(records))), 3)
    there = Counter(r.image_path.split("/")[2] for r in records if r.label)
    taken = Counter(r.image_path.split("/")[2] for r in chosen if r.label)
    most = max(taken.values(), default=0)
    assert all(taken[kind] >= min(most - 1, there[kind]) for kind in there)


def test_the_shots_of_a_class_do_not_depend_on_other_classes_or_order():
    wood, tile = make_class("wood", 20, hole=6, scratch=9), make_class("tile", 20, crack=20)
    both = few_shot(wood + tile, 8, seed=1)
    assert Counter((r.class_name, r.label) for r in both) == Counter(
        {("wood", 0): 4, ("wood", 1): 4, ("tile", 0): 4, ("tile", 1): 4}
    )
    mixed = wood + tile
    random.Random(0).shuffle(mixed)
    assert few_shot(mixed, 8, seed=1) == both
    assert few_shot(tile, 8, seed=1) + few_shot(wood, 8, seed=1) == both


def test_the_seed_determines_the_choice():
    wood = make_class("wood", 50, hole=50)
    picks = {tuple(few_shot(wood, 8, seed)) for seed in range(20)}
    assert len(picks) == 20
    # No image is out of reach: over many seeds all are chosen.
    assert {r for pick in (few_shot(wood, 8, seed) for seed in range(200)) for r in pick} == set(wood)


def test_replacing_missing_kinds_is_logged(caplog):
    caplog.set_level(logging.INFO)
    toothbrush = make_class("toothbrush", 12, defective=30)
    assert labels(few_shot(toothbrush, 24, 0)) == {1: 12, 0: 12}
    assert not caplog.messages
    assert labels(few_shot(toothbrush, 32, 0)) == {1: 20, 0: 12}
    (message,) = caplog.messages
    assert "toothbrush" in message and "12 of 16 normal" in message
    caplog.clear()
    few_shot(make_class("colon", 0, polyp=10), 10, 0)
    assert "0 of 5 normal" in caplog.text
    few_shot(make_class("pure", 10), 9, 0)
    assert "0 of 5 anomalous" in caplog.text


def test_too_many_shots_are_an_error_with_class_and_count():
    with pytest.raises(UserError) as error:
        few_shot(make_class("wood", 40, hole=40) + make_class("grid", 21, bent=57), 80, 0)
    assert "'grid' has 78 images" in str(error.value)
    assert "57 anomalous, 21 normal" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("shot", "anomalous", "normal"), [(7, 4, 3), (1, 1, 0), (8, 4, 4)])
def test_the_meaning_of_a_shot_is_logged(caplog, shot, anomalous, normal):
    caplog.set_level(logging.INFO)
    records = make_class("wood", 9, hole=9)
    data = TaskData(LocatedDataset(CATALOG["toy_train"], Path("data")), records, {"wood": "wood"}, "")
    chosen = choose_training_images(data, "few_shot", shot, 0)
    assert labels(chosen.records) == {label: count for label, count in ((1, anomalous), (0, normal)) if count}
    assert f"--shot {shot}: {anomalous} anomalous and {normal} normal images of each class" in caplog.messages
    caplog.clear()
    choose_training_images(data, "full_shot", shot, 0)
    assert "--shot" not in caplog.text


@pytest.mark.parametrize("shot", [0, -2])
def test_shot_below_one(shot):
    with pytest.raises(UserError, match="at least 1"):
        few_shot(make_class("wood", 4), shot, 0)
