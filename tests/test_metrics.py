"""Streamed metrics against scikit-learn on the full arrays, and AUPRO against a plain form of MVTec's definition."""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    jaccard_score,
    precision_recall_curve,
    precision_recall_fscore_support,
    roc_auc_score,
)
from torch import Tensor

from benchmarks import bench_metrics
from model.scoring import Outputs, anomaly_map
from utils import metrics
from utils.errors import UserError
from utils.metrics import PixelCounter, decision_metrics, image_metrics, overkill_at, region_shares
from utils.pixel_counts import COARSE_BINS, score_keys

# In percentage points.
ALLOWED = 0.005
ROUNDING = 1e-8
# One bin per coarse bin, and next to nothing kept.
TINY = {"bins": COARSE_BINS, "buffer": 16}
SIZES = pytest.mark.parametrize("sizes", [TINY, {}], ids=["tiny", "default"])


def reference(scores: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """AUROC, AP and F1-max of all pixels by scikit-learn, in percent."""
    scores, labels = scores.ravel().astype(np.float64), labels.ravel()
    if not labels.any():
        return {"pixel_auroc": None, "pixel_ap": None, "pixel_f1_max": None}
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return {
        "pixel_auroc": None if labels.all() else 100 * roc_auc_score(labels, scores),
        "pixel_ap": 100 * average_precision_score(labels, scores),
        "pixel_f1_max": 100 * f1.max(),
    }


def regions_of(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """8-connected regions of a mask (H, W), by growing them pixel by pixel."""
    left = set(map(tuple, np.argwhere(mask).tolist()))
    regions = []
    while left:
        region, border = set(), [left.pop()]
        while border:
            y, x = border.pop()
            region.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            border += near
        regions.append(region)
    return regions


def plain_aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float | None:
    """MVTec's definition on the full arrays, in percent: at each threshold, the mean overlap over regions."""
    shares, count = np.zeros(masks.shape), 0
    for share, mask in zip(shares, masks, strict=True):
        for region in regions_of(mask):
            share[tuple(np.transpose(list(region)))] = 1 / len(region)
            count += 1
    if not count or masks.all():
        return None
    order = np.argsort(-maps.ravel(), kind="stable")
    last = np.append(np.diff(maps.ravel()[order]) != 0, True)
    fpr = np.append(0, np.cumsum(~masks.ravel()[order])[last] / (~masks).sum())
    pro = np.append(0, np.cumsum(shares.ravel()[order])[last] / count)
    inside = fpr <= limit
    x, y = np.append(fpr[inside], limit), np.append(pro[inside], np.interp(limit, fpr, pro))
    return 100 * float(np.trapezoid(y, x)) / limit


def plain_aupimo(maps: np.ndarray, masks: np.ndarray) -> float | None:
    """The authors' trapezoid over log(FPR) for each anomalous image, with all scores as thresholds, in percent."""
    anomalous = masks.any(axis=(1, 2))
    if anomalous.all() or not anomalous.any():
        return None
    thresholds = [np.inf, *np.unique(maps)[::-1]]
    fpr = np.array([(maps[~anomalous] >= threshold).mean() for threshold in thresholds])
    low, high = np.log(metrics.AUPIMO_LIMITS)
    areas = []
    for image, mask in zip(maps[anomalous], masks[anomalous], strict=True):
        overlap = np.array([(image[mask] >= threshold).mean() for threshold in thresholds])
        clean = overlap[fpr == 0].max()
        # A step at the first rate above 0, then the reached points, with the last one of several at the same rate.
        x = np.log(fpr[fpr > 0])
        points = [(low, clean), (x[0], clean), *zip(x, overlap[fpr > 0], strict=True)]
        area = 0.0
        for (left, before), (right, after) in pairwise(points):
            start, end = max(left, low), min(right, high)
            if end > start:
                heights = [before + (after - before) * (at - left) / (right - left) for at in (start, end)]
                area += (end - start) * sum(heights) / 2
        areas.append(area / (high - low))
    return 100 * float(np.mean(areas))


def full_reference(maps: Tensor, masks: Tensor) -> dict[str, float | None]:
    maps, masks = maps.float().numpy() + np.float32(0), masks.numpy()
    return {**reference(maps, masks), "aupro": plain_aupro(maps, masks), "aupimo": plain_aupimo(maps, masks)}


def feed(counter: PixelCounter, maps: Tensor, masks: Tensor, batch: int = 3) -> None:
    names = [f"image {index}" for index in range(len(maps))]
    for start in range(0, len(maps), batch):
        rows = slice(start, start + batch)
        counter.update(maps[rows], masks[rows], names[rows])


def stream(maps: Tensor, masks: Tensor, batch: int = 3, **sizes) -> PixelCounter:
    counter = PixelCounter(**sizes)
    feed(counter, maps, masks, batch)
    return counter


def as_counted(counter: PixelCounter, maps: Tensor) -> Tensor:
    """The ranks of the maps' pixels, equal for pixels that count as ties."""
    return torch.unique(counter.counts.ties(score_keys(maps.float().flatten())), return_inverse=True)[1].view(
        maps.shape
    )


def assert_within(counter: PixelCounter, expected: dict[str, float | None], allowed: float) -> None:
    """Errors are within `allowed` percentage points."""
    values = counter.result()
    for name, value in expected.items():
        if value is None:
            assert values[name] is None, name
        else:
            assert abs(values[name] - value) <= allowed, f"{name}: {values[name]} instead of {value}"


def neighbouring_floats(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Clusters in coarse bins far from each other, each of a few neighbouring float32 values."""
    centre = np.exp2(rng.integers(-40, 40, shape)).astype(np.float32) * rng.choice([-1, 1], shape).astype(np.float32)
    return (centre.view(np.int32) + rng.integers(0, 40, shape).astype(np.int32)).view(np.float32)


def outlying_scores(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    scores = 0.5 + 0.01 * rng.normal(size=shape)
    scores.flat[rng.integers(0, scores.size, 3)] = 1e30, -1e30, 3e38
    return scores


KINDS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "steps": lambda rng, shape: rng.integers(-3, 4, shape) / 4,
    "clustered": lambda rng, shape: 2 + 0.001 * rng.uniform(-1, 1, shape),
    "neighbouring floats": neighbouring_floats,
    "all sizes": lambda rng, shape: rng.choice([-1, 1], shape) * 10.0 ** rng.uniform(-30, 30, shape),
    "denormals and zeros": lambda rng, shape: rng.choice([-0.0, 0.0, 1e-45, -1e-45, 1e-39, -1e-39, 1e-38], shape),
    "outliers": outlying_scores,
    "constant": lambda rng, shape: np.full(shape, -0.7),
}


def masks_of(rng: np.random.Generator, shape: tuple[int, int, int], what: str) -> np.ndarray:
    if what == "some":
        return rng.random(shape) < 0.2
    masks = np.full(shape, what.startswith("all"))
    if what in ("single", "all but one"):
        masks.flat[rng.integers(0, masks.size)] ^= True
    return masks


MASKS = ["none", "single", "some", "all but one", "all"]


def case(kind, what: str, seed: int = 0, shape: tuple[int, int, int] = (4, 12, 11), raised: bool = False):
    """Maps (B, H, W) float32 and masks of a kind; with `raised`, most anomalous pixels get the higher scores."""
    rng = np.random.default_rng(seed)
    masks = masks_of(rng, shape, what)
    scores = KINDS[kind](rng, shape).astype(np.float32)
    if raised:
        order = np.argsort(rng.normal(size=scores.size) + 2 * masks.ravel())
        scores.flat[order] = np.sort(scores.ravel())
    return torch.from_numpy(scores), torch.from_numpy(masks)


@SIZES
@pytest.mark.parametrize("what", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_hard_cases_agree_with_the_references(kind, what, sizes):
    maps, masks = case(kind, what)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counter = stream(maps, masks, **sizes)
    assert_within(counter, full_reference(as_counted(counter, maps), masks), ROUNDING)


def test_undefined_metrics_are_none():
    maps = torch.rand(2, 5, 5)
    for sizes in (TINY, {}):
        nothing = stream(maps, torch.zeros(2, 5, 5, dtype=torch.bool), **sizes).result()
        assert nothing == dict.fromkeys(metrics.PIXEL_METRICS)
        everything = stream(maps, torch.ones(2, 5, 5), **sizes).result()
        assert everything == {**nothing, "pixel_ap": 100.0, "pixel_f1_max": 100.0}
    assert set(PixelCounter().result().values()) == {None}


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(list(KINDS)),
    st.sampled_from(MASKS),
    st.integers(0, 2**32),
    st.booleans(),
    st.integers(1, 5),
    st.integers(1, 200),
    st.integers(COARSE_BINS, COARSE_BINS + 3000),
)
def test_pixels_of_a_bin_are_ties(kind, what, seed, raised, batch, buffer, bins):
    """With each score replaced by its bin, the references agree exactly."""
    maps, masks = case(kind, what, seed, raised=raised)
    counter = stream(maps, masks, batch, bins=bins, buffer=buffer)
    assert_within(counter, full_reference(as_counted(counter, maps), masks), ROUNDING)


def published_maps(spread: float, dtype: torch.dtype, count: int = 24, size: int = 128) -> tuple[Tensor, Tensor]:
    """Maps as the published scoring gives them, from similarities that differ by `spread` on four levels.

    Every second image has anomalies, which the levels see with another strength each, some hardly.
    """
    generator = torch.Generator().manual_seed(0)
    masks = bench_metrics.draw_masks(count, size, generator)
    hit = torch.nn.functional.adaptive_avg_pool2d(masks[:, None].float(), 16).flatten(1)
    levels = []
    for _ in range(4):
        noise = torch.randn(count, 256, 2, generator=generator)
        strength = 4 * torch.rand(count, 1, generator=generator)
        levels.append(20 + spread * (noise + torch.stack([-strength * hit, strength * hit], dim=-1)))
    maps = anomaly_map(Outputs(levels, torch.zeros(count, 2)), size, "industrial")
    return maps.to(dtype).float(), masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as they are", "tied"])
@pytest.mark.parametrize("spread", [3.0, 0.1, 1e-3, 1e-5, 1e-6])
def test_maps_of_models_in_bins_agree_with_scikit_learn(spread, dtype):
    """From the width that trained models give to a few neighbouring float32 numbers."""
    maps, masks = published_maps(spread, dtype)
    expected = full_reference(maps, masks)
    assert 5 < expected["pixel_ap"] < 95 or spread < 1e-4 or dtype == torch.bfloat16
    assert_within(stream(maps, masks, buffer=1 << 15), expected, ALLOWED)


FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(FLOATS, st.booleans()), min_size=1, max_size=40), st.integers(0, 40))
@example([(0.0, True), (-0.0, False)], 0)
@example([(2.0, False), (np.nextafter(np.float32(2), np.float32(3)).item(), True), (1.0, False)], 0)
def test_all_finite_scores_are_accepted(pixels, buffer):
    maps = torch.tensor([score for score, _ in pixels], dtype=torch.float32).reshape(-1, 1, 1)
    masks = torch.tensor([label for _, label in pixels]).reshape(-1, 1, 1)
    counter = stream(maps, masks, bins=COARSE_BINS, buffer=buffer)
    assert_within(counter, full_reference(as_counted(counter, maps), masks), ROUNDING)


@settings(deadline=None)
@given(st.lists(FLOATS, min_size=1))
@example([0.0, -0.0, 1e-45, -1e-45, 3.4028234663852886e38, -3.4028234663852886e38])
def test_integer_keys_are_ordered_like_floats(scores):
    scores = torch.tensor(scores, dtype=torch.float32)
    ranks = np.unique(scores.numpy(), return_inverse=True)[1]
    assert np.array_equal(np.unique(score_keys(scores).numpy(), return_inverse=True)[1], ranks)


def many_pixels(seed: int = 3) -> tuple[Tensor, Tensor]:
    """Maps of 2 % anomalous pixels with overlapping scores, more than the small buffers of these tests hold."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((12, 60, 60), dtype=bool)
    for mask in masks[6:]:
        y, x = rng.integers(0, 50, 2)
        mask[y : y + 12, x : x + 12] = True
    scores = 0.1 * rng.random(masks.shape) ** 3 + 0.15 * masks * rng.random(masks.shape)
    return torch.from_numpy(scores.astype(np.float32)), torch.from_numpy(masks)


@pytest.mark.parametrize("outlier", [None, 1e30])
def test_anomalies_above_the_range_of_the_bins(outlier):
    rng = np.random.default_rng(5)
    masks = torch.zeros(20, 60, 60, dtype=torch.bool)
    masks[15:, 5:20, 5:20] = True
    noise = torch.from_numpy(rng.normal(size=masks.shape)).float()
    maps = 2 + 0.01 * noise + masks * (0.3 + 0.1 * noise.roll(1, 0))
    if outlier:
        maps[0, 0, 0] = outlier
    counter = stream(maps, masks, buffer=20000)
    assert_within(counter, reference(maps.numpy(), masks.numpy()), ALLOWED)


# Bands of scores, the first images' first: 0.9 +- 0.001, then 0.1 +- 0.0001, ...
CENTRES = st.lists(st.sampled_from([-3.0, 1e-6, 0.01, 0.1, 0.5, 0.9, 1.0, 40.0]), min_size=1, max_size=4, unique=True)


def in_bands(centres: list[float], widths: list[float], seed: int) -> tuple[Tensor, Tensor]:
    """Images in bands of relative widths around the centres, one band after the other, and masks."""
    rng = np.random.default_rng(seed)
    masks = torch.from_numpy(rng.random((20, 64, 64)) < 0.1)
    band = torch.arange(20) * len(centres) // 20
    centre, width = (torch.tensor(values)[band, None, None] for values in (centres, widths))
    return centre * (1 + width * (torch.from_numpy(rng.normal(size=masks.shape)) + masks)).float(), masks


@settings(deadline=None, max_examples=30)
@given(CENTRES, st.lists(st.sampled_from([1e-5, 1e-4, 1e-3]), min_size=4, max_size=4), st.integers(0, 99))
@example([0.9, 0.1], [1e-3, 1e-4, 1e-3, 1e-3], 0)
@example([0.1, 0.9, 0.01, 0.5], [1e-4] * 4, 1)
@example([-3.0, 1e-6, 0.01, 0.1], [1e-5] * 4, 0)
def test_separate_bands_of_scores_in_any_order(centres: list[float], widths: list[float], seed: int) -> None:
    """Later images whose scores lie in a narrow band, far from those that the bins were chosen by."""
    maps, masks = in_bands(centres, widths, seed)
    counter = stream(maps, masks, buffer=1 << 14)
    assert_within(counter, reference(maps.numpy(), masks.numpy()), ALLOWED)


@settings(deadline=None, max_examples=20)
@given(CENTRES, st.lists(st.sampled_from([1e-5, 1e-3, 0.1]), min_size=4, max_size=4), st.integers(0, 99))
@example([-3.0, 0.9, 1.0], [1e-5, 0.1, 1e-5, 1e-5], 0)
def test_bands_that_overlap_are_exact_in_small_sets(centres: list[float], widths: list[float], seed: int) -> None:
    """Without bins, which a set needs only if it has more pixels than the buffer."""
    maps, masks = in_bands(centres, widths, seed)
    assert_within(stream(maps, masks), reference(maps.numpy(), masks.numpy()), 1e-9)


@pytest.mark.parametrize("buffer", [16, 1000, 1 << 21])
def test_the_batch_size_does_not_matter(buffer):
    maps, masks = many_pixels()
    results = [stream(maps, masks, batch, bins=1 << 17, buffer=buffer).result() for batch in (1, 5, 12)]
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=0, abs=1e-10)


def state_bytes(value: object) -> int:
    """Bytes of all arrays that an object holds."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(state_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(state_bytes, value))
    return state_bytes(vars(value)) if hasattr(value, "__dict__") else 0


def test_memory_does_not_grow_with_images():
    assert PixelCounter.__init__.__defaults__ == (1 << 21, 1 << 22, 0.3), "the sizes of which docs/testing.md speaks"
    maps, masks = (tensor.repeat(1, 3, 3) for tensor in many_pixels())
    counter = PixelCounter(buffer=1 << 18)
    for _ in range(6):
        feed(counter, maps, masks)
        assert state_bytes(counter) <= 82 * 2**20 + 16 * (1 << 18)
    kept = PixelCounter(buffer=1 << 18)
    feed(kept, maps[:8], masks[:8])
    assert state_bytes(kept) == 4 * maps[:8].numel() + 20 * int(masks[:8].sum())


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), density=st.floats(0.02, 0.6), levels=st.integers(1, 300))
def test_aupro_agrees_with_the_plain_definition(seed, density, levels):
    rng = np.random.default_rng(seed)
    masks = rng.random((3, 9, 8)) < density
    maps = (rng.integers(0, levels, masks.shape) + masks * rng.integers(0, levels, masks.shape)).astype(np.float32)
    counter = stream(torch.from_numpy(maps), torch.from_numpy(masks))
    assert_within(counter, {"aupro": plain_aupro(maps, masks)}, ROUNDING)


def test_aupro_integrates_to_its_limit():
    maps, masks = case("normal", "some")
    for limit in (0.05, 1.0):
        counter = stream(maps, masks, fpr_limit=limit, **TINY)
        counted = as_counted(counter, maps).numpy()
        assert_within(counter, {"aupro": plain_aupro(counted, masks.numpy(), limit)}, ROUNDING)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([*KINDS, "ties"]),
    st.integers(0, 2**32),
    st.sampled_from([(1e-5, 1e-4), (0.01, 0.2), (0.05, 0.9)]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 100),
)
@example("constant", 0, (0.01, 0.2), False, False, 16)
def test_aupimo_agrees_with_the_plain_definition(kind, seed, limits, one_region, raised, buffer):
    """Of images in the order normal, anomalous, normal, in bins too; ties, constant maps and single regions."""
    rng = np.random.default_rng(seed)
    masks = rng.random((5, 8, 9)) < 0.2
    if one_region:
        masks[:] = False
        masks[:, 2:5, 3:7] = True
    masks[[0, 2, 4]] = False
    scores = rng.integers(0, 20, masks.shape) / 4 if kind == "ties" else KINDS[kind](rng, masks.shape)
    scores = scores.astype(np.float32)
    scores = np.where(raised & masks, np.abs(scores), scores)
    maps, masks = torch.from_numpy(scores), torch.from_numpy(masks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "AUPIMO_LIMITS", limits)
        exact, binned = stream(maps, masks), stream(maps, masks, bins=COARSE_BINS + 500, buffer=buffer)
        assert_within(exact, {"aupimo": plain_aupimo(maps.numpy() + np.float32(0), masks.numpy())}, 1e-6)
        assert_within(binned, full_reference(as_counted(binned, maps), masks), 1e-6)


def test_aupimo_of_known_curves():
    """One anomalous image, of which half is found without false positives and the rest at a rate of 0.1."""
    masks = torch.zeros(2, 1, 10, dtype=torch.bool)
    masks[0, 0, :4] = True
    maps = torch.zeros(2, 1, 10)
    maps[0, 0, :4] = torch.tensor([9.0, 9.0, 5.0, 5.0])
    maps[1, 0, 0] = 7.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "AUPIMO_LIMITS", (0.01, 0.1))
        assert stream(maps, masks).result()["aupimo"] == pytest.approx(50)
        patch.setattr(metrics, "AUPIMO_LIMITS", (0.01, 1.0))
        # From 0.1 on, all is found.
        assert stream(maps, masks).result()["aupimo"] == pytest.approx(75)


def test_regions_touch_diagonally_and_not_across_images():
    """One region of two pixels and one of one: half of the first found, then the second, before any normal pixel."""
    masks = torch.zeros(2, 3, 3, dtype=torch.bool)
    masks[0, 1, 1] = masks[0, 2, 2] = masks[1, 0, 0] = True
    assert [part.tolist() for part in region_shares(masks.numpy())] == [[4, 8, 9], [[0.5, 0.5], [0.5, 0.5], [1, 1]]]
    two_regions = np.array([[[True, False, True], [False, False, True]]])
    assert region_shares(two_regions)[1].tolist() == [[1, 1 / 3], [0.5, 1 / 3], [0.5, 1 / 3]]
    maps = torch.zeros(2, 3, 3)
    maps[0, 2, 2] = 2.0
    found = stream(maps, masks).result()["aupro"]
    # PRO starts at (1/2 + 0) / 2 and reaches 1 on a straight line at a false positive rate of 1.
    assert found == pytest.approx(100 * (0.25 + 0.75 * 0.3 / 2))
    # A mask counts from above one half on.
    assert stream(maps, 0.5 + masks / 2).result()["aupro"] == found
    maps[0, 2, 2], maps[1, 0, 0] = 0.0, 2.0
    found = stream(maps, masks).result()["aupro"]
    assert found == pytest.approx(100 * (0.5 + 0.5 * 0.3 / 2))


@SIZES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_pixel_scores_are_reported_with_their_image(bad, sizes):
    maps, masks = case("normal", "some")
    counter = PixelCounter(**sizes)
    feed(counter, maps, masks)
    before = counter.result()
    broken = maps.clone()
    broken[2, 3, 4] = bad
    with pytest.raises(UserError, match=r"map of third\.png "):
        counter.update(broken, masks, ["first.png", "second.png", "third.png", "fourth.png"])
    assert counter.result() == before
    with pytest.raises(UserError, match=r"map of huge\.png .*float32"):
        counter.update(torch.full((1, 2, 2), 1e300, dtype=torch.float64), torch.ones(1, 2, 2), ["huge.png"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_count_as_float32(dtype):
    maps, masks = case("normal", "some")
    maps = maps.to(dtype).requires_grad_()
    assert_within(stream(maps, masks.to(dtype)), full_reference(maps.detach(), masks), ROUNDING)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("what", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_counting_on_a_gpu_gives_the_same(kind, what):
    maps, masks = case(kind, what)
    for sizes in (TINY, {"buffer": 100}, {}):
        on_cpu, on_gpu = stream(maps, masks, **sizes), stream(maps.cuda(), masks.cuda(), **sizes)
        assert on_gpu.result() == pytest.approx(on_cpu.result(), abs=1e-10)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.booleans()), min_size=1, max_size=30))
@example([(1.0, True)])
@example([(1.0, False)])
@example([(1.0, False), (1.0 + 1e-12, True)])
def test_image_metrics_are_exact(images):
    scores, labels = (np.array(column) for column in zip(*images, strict=True))
    found = image_metrics(labels.astype(int), scores, [str(index) for index in range(len(images))])
    expected = {name.replace("pixel", "image"): value for name, value in reference(scores, labels).items()}
    assert found == pytest.approx(expected, abs=ROUNDING)


def test_non_finite_image_scores_are_reported_with_their_image():
    with pytest.raises(UserError, match=r"b\.png"):
        image_metrics(np.array([0, 1]), np.array([0.5, np.nan]), ["a.png", "b.png"])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=30), st.integers(-1, 6))
@example([(0, False)], 0)
@example([(0, True)], 0)
def test_decisions_agree_with_scikit_learn(images, threshold):
    scores, labels = (np.array(column) for column in zip(*images, strict=True))
    called = scores > threshold
    counts = ((called & labels).sum(), (called & ~labels).sum(), (~called & labels).sum())
    values = decision_metrics("image", *map(int, counts))
    expected = precision_recall_fscore_support(labels, called, average="binary", zero_division=0)[:3]
    expected = [*expected, jaccard_score(labels, called, zero_division=0)]
    assert list(values) == ["image_precision", "image_recall", "image_f1", "image_iou"]
    assert list(values.values()) == ([pytest.approx(100 * one) for one in expected] if labels.any() else [None] * 4)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=30),
    st.sampled_from([0, 0.05, 0.1, 0.25, 0.29, 0.5, 1]),
)
@example([(1, True), (2, False)], 1)
def test_overkill_and_escape_rates_are_the_best_of_all_thresholds(images, rate):
    scores, labels = (np.array(column) for column in zip(*images, strict=True))
    for truth, values in ((labels, scores), (~labels, -scores)):
        found = overkill_at(truth, values, rate)
        if truth.all() or not truth.any():
            assert found is None
            continue
        called = [values > threshold for threshold in (*np.unique(values), -np.inf)]
        allowed = [100 * one[~truth].mean() for one in called if 1 - one[truth].mean() <= rate + 1e-12]
        assert found == pytest.approx(min(allowed), abs=1e-9)
