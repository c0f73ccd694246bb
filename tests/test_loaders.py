"""Loaders give the same images as the per-image transforms, the same however often interrupted, and on however many processes."""

from __future__ import annotations

import math
import random
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import thriftnet as tn
from images import arrays, class_folders
from thriftnet.data import loaders
from thriftnet.data.augmentation import Augmentation
from thriftnet.data.batched import Draws, _by_slices, _by_windows, crop_and_flip, cut_out, draw, normalise, pad
from thriftnet.data.dataset import ArrayImages, Subset
from thriftnet.data.loaders import Batch, ImageLoader, Loader, ResidentLoader, make_loader
from thriftnet.data.sources import open_data
from thriftnet.data.transforms import cutout, eval_transform, padded_crop, preserve_random_state, train_transform

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
AUGMENTATION = Augmentation(crop_padding=2, flip=True, cutout=4, mean=MEAN, std=STD)
PLAIN = Augmentation(mean=MEAN, std=STD)
KINDS = [(True, 0), (False, 0), (False, 2)]
each_kind = pytest.mark.parametrize(("resident", "workers"), KINDS, ids=["resident", "images", "images-two-workers"])


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


def loader(resident: bool, workers: int = 0, **options: object) -> Loader:
    given: dict[str, object] = {"augmentation": AUGMENTATION, "train": True, "seed": 3, "workers": workers, **options}
    batch_size = given.pop("batch_size", 8)
    return make_loader(arrays(), batch_size, resident=resident, **given)  # type: ignore[arg-type]


def test_the_factory_chooses():
    assert isinstance(make_loader(arrays(), 4, augmentation=AUGMENTATION, train=True), ResidentLoader)
    random_crop = Augmentation(random_resized_crop=(0.5, 1.0), image_size=12, mean=MEAN, std=STD)
    assert isinstance(make_loader(arrays(), 4, augmentation=random_crop, train=True), ImageLoader)
    assert isinstance(make_loader(arrays(), 4, augmentation=random_crop, train=False), ResidentLoader)
    cropped = Augmentation(image_size=12, resize=14, mean=MEAN, std=STD)
    assert isinstance(make_loader(arrays(), 4, augmentation=cropped, train=False), ImageLoader)
    with pytest.raises(tn.ConfigError, match="resident=True needs images of one size"):
        make_loader(arrays(), 4, augmentation=random_crop, train=True, resident=True)


def test_a_set_too_large_is_not_kept_on_the_device(monkeypatch: pytest.MonkeyPatch):
    needed = 50 * 3 * 16 * 16  # with the border of 2
    for limit, kind in ((needed, ResidentLoader), (needed - 1, ImageLoader)):
        monkeypatch.setattr(loaders, "RESIDENT_BYTES", limit)
        assert isinstance(make_loader(arrays(), 4, augmentation=AUGMENTATION, train=True), kind)


@pytest.mark.parametrize("form", [_by_slices, _by_windows])
def test_a_crop_at_given_offsets_equals_that_of_torchvision(form):
    images = arrays(6).images
    crop = torch.tensor([[0, 0], [4, 4], [2, 2], [1, 3], [0, 4], [3, 0]])
    flip = torch.tensor([True, False, True, False, False, True])
    indices = torch.tensor([5, 0, 3, 3, 1, 2])
    got = form(pad(images, 2), indices, crop, flip, 12, 12)
    for place, index in enumerate(indices.tolist()):
        image = transforms.functional.pad(Image.fromarray(images[index].permute(1, 2, 0).numpy()), [2] * 4)
        image = transforms.functional.crop(image, *crop[place].tolist(), 12, 12)
        image = transforms.functional.hflip(image) if flip[place] else image
        assert np.array_equal(got[place].permute(1, 2, 0).numpy(), np.array(image))


def test_normalised_pixels_are_those_of_torchvision_to_the_bit():
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    per_image = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    wanted = per_image(Image.fromarray(images[0].permute(1, 2, 0).contiguous().numpy()))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    assert torch.equal(normalise(images, mean, std)[0], wanted)


def test_cutout_at_given_centres_equals_slices_of_the_image():
    centres = torch.tensor([[0, 0], [11, 11], [5, 6], [1, 10]])
    got = cut_out(torch.ones(4, 3, 12, 12), centres, 5)  # an odd side is rounded down, as the authors' code does
    for image, (row, column) in zip(got, centres.tolist(), strict=True):
        wanted = torch.ones(3, 12, 12)
        wanted[:, max(0, row - 2) : row + 2, max(0, column - 2) : column + 2] = 0
        assert torch.equal(image, wanted)


def test_cutout_comes_after_normalising_in_both_forms():
    black = ArrayImages(torch.zeros(64, 3, 12, 12, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64))
    only = Augmentation(cutout=4, mean=MEAN, std=STD)
    for resident in (True, False):
        images, _ = next(iter(make_loader(black, 64, augmentation=only, train=True, resident=resident)))
        assert set(images[:, 0].unique().tolist()) == {0.0, torch.tensor(-MEAN[0]).div(STD[0]).item()}


def chi_square(counts: torch.Tensor) -> float:
    """Statistic against equal shares, in standard deviations from its mean."""
    expected = counts.sum() / counts.numel()
    freedom = counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def test_batched_and_per_image_chance_have_one_distribution():
    """One white pixel in the middle tells the offset, mirrored or not; both forms give each of the 50 cases equally often."""
    image = torch.zeros(3, 12, 12, dtype=torch.uint8)
    image[:, 5, 5] = 255
    image[:, 5, 6] = 128
    count = 5000
    many = ArrayImages(image.expand(count, -1, -1, -1).contiguous(), torch.zeros(count, dtype=torch.int64))
    moving = Augmentation(crop_padding=2, flip=True, mean=(0.0,) * 3, std=(1.0,) * 3)
    for resident in (True, False):
        pixels = next(iter(make_loader(many, count, augmentation=moving, train=True, resident=resident)))[0][:, 0]
        white = (pixels == 1).flatten(1).float().argmax(1)
        grey = ((pixels > 0) & (pixels < 1)).flatten(1).float().argmax(1)
        cases = torch.stack([white // 12, white % 12, (grey < white).long()], 1).unique(dim=0, return_counts=True)
        assert len(cases[0]) == 50
        assert abs(chi_square(cases[1].float())) < 4


def test_chance_differs_by_epoch_seed_and_purpose():
    def drawn(seed: int, epoch: int) -> list[torch.Tensor]:
        draws = draw(AUGMENTATION, 1000, 5, 5, seed, epoch)
        return [field for field in (draws.crop, draws.flip, draws.cutout) if field is not None]

    first = drawn(0, 0)
    assert len(first) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(0, 0), strict=True))
    for other in (drawn(0, 1), drawn(1, 0)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[2])  # both are pairs in 0 .. 4


def test_cutout_centres_are_everywhere_equally_often():
    centres = draw(Augmentation(cutout=4), 20000, 4, 5, seed=0, epoch=0).cutout
    assert centres is not None
    places, counts = centres.unique(dim=0, return_counts=True)
    assert len(places) == 20
    assert abs(chi_square(counts.float())) < 4
    with preserve_random_state():
        cuts = torch.stack([cutout(torch.ones(1, 4, 5), 4) for _ in range(3000)])
    expected = torch.stack(
        [cut_out(torch.ones(1, 1, 4, 5), torch.tensor([[r, c]]), 4)[0] for r in range(4) for c in range(5)]
    )
    assert (cuts.mean(0) - expected.mean(0)).abs().max() < 0.04


@each_kind
def test_an_epoch_holds_every_image_once_and_epochs_differ(resident: bool, workers: int):
    ids = ArrayImages(arrays().images, torch.arange(50))
    batches = make_loader(ids, 8, augmentation=AUGMENTATION, train=True, resident=resident, workers=workers)
    orders = []
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        given = [labels for _, labels in batches]
        assert [len(labels) for labels in given] == [8] * 6 + [2]
        orders.append(torch.cat(given))
    assert all(order.sort().values.tolist() == list(range(50)) for order in orders)
    assert not torch.equal(*orders)


@each_kind
@pytest.mark.parametrize("stop", [0, 1, 4, 7])
def test_a_resumed_epoch_goes_on_with_the_batches_not_yet_given(resident: bool, workers: int, stop: int):
    whole = loader(resident, workers)
    whole.set_epoch(2)
    uninterrupted = list(whole)

    stopped = loader(resident, workers)
    stopped.set_epoch(2)
    given = []
    running = iter(stopped)
    for _ in range(stop):
        given.append(next(running))
    state = stopped.state_dict()

    resumed = loader(resident, workers)
    resumed.load_state_dict(state)
    resumed.set_epoch(2)  # as a training loop does for every epoch
    assert same(given + list(resumed), uninterrupted)
    assert resumed.state_dict()["step"] == len(uninterrupted)
    resumed.set_epoch(3)
    whole.set_epoch(3)
    assert same(list(resumed), list(whole))


@each_kind
def test_passes_over_one_epoch_are_equal_and_leave_global_random_numbers_alone(resident: bool, workers: int):
    batches = loader(resident, workers)
    np.random.seed(7)
    random.seed(7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = list(batches)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    torch.manual_seed(99)
    next(iter(batches))  # a pass that is given up
    assert same(first, list(batches))


def test_the_number_of_workers_changes_nothing():
    assert same(list(loader(False)), list(loader(False, workers=2)))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])  # 50 = 5 x 10 = 3 x 15 + 5
def test_several_processes_give_what_one_gives_with_a_larger_batch(resident: bool, drop_last: bool, world_size: int):
    one = loader(resident, batch_size=5 * world_size, drop_last=drop_last)
    ranks = [
        loader(resident, batch_size=5, drop_last=drop_last, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert len({len(rank) for rank in ranks} | {len(one)}) == 1
    for batches in (one, *ranks):
        batches.set_epoch(1)
    joined = [(torch.cat([x for x, _ in step]), torch.cat([y for _, y in step])) for step in zip(*ranks, strict=True)]
    assert same(joined, list(one))


def test_fewer_last_images_than_processes_are_left_out_on_every_process():
    ranks = [loader(True, batch_size=7, rank=rank, world_size=7) for rank in range(7)]  # 50 = 49 + 1
    assert {len(rank) for rank in ranks} == {1}


def test_a_state_moves_to_another_number_of_processes_with_the_same_batch_in_all():
    one = loader(True, batch_size=8)
    running = iter(one)
    next(running)
    resumed = [loader(True, batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    for batches in resumed:
        batches.load_state_dict(one.state_dict())
    wanted = next(running)[0]
    assert torch.equal(torch.cat([next(iter(batches))[0] for batches in resumed]), wanted)


@pytest.mark.parametrize("change", [{"seed": 4}, {"batch_size": 9}])
def test_a_state_of_another_run_is_refused(change: dict[str, int]):
    with pytest.raises(tn.ConfigError, match=r"the sampler's state has \w+=\d+, this loader \d+"):
        loader(True, **change).load_state_dict(loader(True).state_dict())


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_evaluation_gives_every_image_once_over_all_processes(resident: bool, world_size: int):
    ids = ArrayImages(arrays().images, torch.arange(50))
    options = {"augmentation": AUGMENTATION, "train": False, "resident": resident, "world_size": world_size}
    ranks = [make_loader(ids, 4, rank=rank, **options) for rank in range(world_size)]
    given = [batch for batches in ranks for batch in batches]
    assert torch.cat([labels for _, labels in given]).tolist() == list(range(50))
    wanted = torch.stack([eval_transform(AUGMENTATION)(ids.image(i)) for i in range(50)])
    assert torch.equal(torch.cat([images for images, _ in given]), wanted)
    assert sum(batches.images_per_epoch for batches in ranks) == 50


def test_more_processes_than_images_to_evaluate():
    ranks = [make_loader(arrays(2), 4, augmentation=PLAIN, train=False, rank=rank, world_size=3) for rank in range(3)]
    assert [sum(len(y) for _, y in batches) for batches in ranks] == [0, 1, 1]


def test_per_image_chance_depends_on_seed_epoch_and_image_only():
    strong = Augmentation(
        image_size=16,
        random_resized_crop=(0.3, 1.0),
        interpolation="random",
        flip=True,
        color_jitter=0.2,
        rand_augment="rand-m9-mstd0.5-inc1",
        random_erasing=0.5,
        mean=MEAN,
        std=STD,
    )
    options = {"augmentation": strong, "train": True, "seed": 1}
    first = list(make_loader(arrays(), 8, **options))
    np.random.seed(5)
    torch.manual_seed(5)
    assert same(first, list(make_loader(arrays(), 8, **options, workers=2)))
    other = make_loader(arrays(), 8, **options)
    other.set_epoch(1)
    assert not same(first, list(other))


def test_rand_augment_survives_its_highest_magnitude():
    """timm then posterizes to 0 bits, which new versions of pillow refuse."""
    hardest = Augmentation(image_size=12, rand_augment="rand-m10-p1-inc1", mean=MEAN, std=STD)
    transform = train_transform(hardest)
    with preserve_random_state():
        assert all(transform(arrays().image(i)).isfinite().all() for i in range(50))


def test_padded_crop_takes_images_of_any_size():
    image = Image.new("RGB", (10, 6), "white")
    assert padded_crop(image, 2).size == (10, 6)


def test_images_of_different_sizes_need_an_image_size(tmp_path: Path):
    root = class_folders(tmp_path)
    Image.new("RGB", (5, 9)).save(root / "cat" / "odd.png")
    source = open_data(f"folder:{tmp_path}")
    for workers in (0, 2):
        with pytest.raises(tn.DataError, match=r"differ in size.*set an image_size"):
            list(make_loader(source.splits["train"], 9, augmentation=PLAIN, train=True, workers=workers))
    fixed = Augmentation(image_size=8, mean=MEAN, std=STD)
    assert next(iter(make_loader(source.splits["train"], 9, augmentation=fixed, train=True)))[0].shape[2:] == (8, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_named_by_one_line(tmp_path: Path, workers: int):
    root = class_folders(tmp_path)
    whole = (root / "dog" / "3.png").read_bytes()
    (root / "dog" / "3.png").write_bytes(whole[: len(whole) // 2])
    splits = open_data(f"folder:{tmp_path}").splits.values()
    one_by_one = [
        make_loader(split, 4, augmentation=PLAIN, train=False, resident=False, workers=workers) for split in splits
    ]
    with pytest.raises(tn.DataError, match=r"dog/3\.png cannot be decoded") as caught:
        list(chain(*one_by_one))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"seed": -1}, "seed=-1"),
        ({"augmentation": Augmentation()}, "no mean and std"),
        ({"augmentation": Augmentation(mean=(0.5,), std=(0.5,))}, "1 values, the images 3 channels"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str):
    with pytest.raises(tn.ConfigError, match=message):
        loader(True, **options)


def test_fewer_images_than_a_batch_are_refused_in_training():
    with pytest.raises(tn.DataError, match="50 training images are fewer than one batch of 64"):
        loader(True, batch_size=64, drop_last=True)
    assert len(loader(True, batch_size=64)) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_padding": -1}, "crop_padding=-1: expected an integer from 0 to"),
        ({"random_resized_crop": (0.5, 2.0), "image_size": 8}, "expected 2 values"),
        ({"random_resized_crop": (0.5, 1.0)}, "random_resized_crop needs an image_size"),
        ({"random_erasing": 1.5}, "expected a number from 0 to 1"),
        ({"interpolation": "bicubik"}, "did you mean 'bicubic'"),
        ({"eval_interpolation": "random"}, "unknown eval_interpolation 'random'"),
        ({"mean": (0.5,), "std": (0.5, 0.5)}, "as many numbers"),
        ({"std": (0.0,)}, "numbers > 0"),
        ({"resize": 8, "image_size": 12}, "a number >= image_size"),
        ({"crop_pct": 0.0}, "expected a number in"),
    ],
)
def test_impossible_augmentations_are_refused(fields: dict[str, object], message: str):
    with pytest.raises(tn.ConfigError, match=message):
        Augmentation(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["rnd-m9", "rand-x9", "rand-mnine", "augmix-m3"])
def test_an_unknown_rand_augment_is_refused(text: str):
    with pytest.raises(tn.ConfigError, match="timm knows no rand_augment"):
        train_transform(Augmentation(rand_augment=text, mean=MEAN, std=STD))


def test_lists_of_a_yaml_file_become_tuples():
    assert hash(Augmentation(mean=[0.5], std=[0.5])) == hash(Augmentation(mean=(0.5,), std=(0.5,)))  # type: ignore[arg-type]


def test_images_without_chance_are_only_picked():
    images = arrays(4).images
    assert torch.equal(crop_and_flip(images, torch.tensor([2, 0]), Draws(), 12, 12), images[[2, 0]])


def test_a_subset_is_resident_without_the_rest():
    subset = Subset(arrays(), torch.tensor([7, 3]))
    assert torch.equal(subset.resident(), arrays().images[[7, 3]])
    assert torch.equal(subset.resident(torch.tensor([1])), arrays().images[[3]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_sees_what_the_cpu_sees():
    on_device = [(x.cpu(), y.cpu()) for x, y in loader(True, device="cuda")]
    for (got, labels), (wanted, wanted_labels) in zip(on_device, loader(True), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
        assert torch.equal(labels, wanted_labels)
