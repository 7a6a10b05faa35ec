"""FFCV's files: the same views as from a folder, each image once, one-line errors."""

import collections
import importlib.util
import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from helpers.beton_files import PAGE, as_jpeg, convert_folder, write_beton
from helpers.loading import load_validation
from helpers.sample_images import write_image
from PIL import Image
from test_loaders import equal, load

from data import ffcv_loader
from data.beton import _RECORDS, Beton
from data.ffcv_loader import FFCVTrainLoader, QuasiRandomBatches
from data.loaders import TrainLoader
from data.sources import open_source
from vil.config import AugmentConfig, DataConfig
from vil.errors import UserError

POLICIES = {
    "crop": {},
    "recipe": {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5, "vflip": 0.3},
    "three": {"auto_augment": "3a", "color_jitter": 0.3},
    "trivial": {"auto_augment": "trivial", "random_erasing": 0.5, "random_erasing_count": 3},
    "jitter": {"color_jitter": 0.4, "interpolation": "bicubic"},
}
needs_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same images as folders, as pixels in .beton files, and as JPEGs in folders and .beton files."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 12), ("val", 7)):
        for index, name in enumerate(("bear", "cat", "ant")):
            for number in range(count):
                seed, size = 100 * index + number, (40 + 9 * number, 96 - 5 * number)
                write_image(root / "png" / split / name / f"{number:02}.png", seed, size)
        source = open_source(DataConfig(source="folder", root=str(root / "png")), split, 3)
        convert_folder(source, root / "raw" / f"{split}.beton")
        jpegs = convert_folder(source, root / "jpeg" / f"{split}.beton", jpeg=True)
        for index, (_, content) in enumerate(jpegs):
            path = root / "jpg" / source.name(index).replace(".png", ".jpg")
            path = root / "jpg" / split / path.parent.name / path.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


def configured(folders, name, **options):
    source = "folder" if name in ("png", "jpg") else "ffcv"
    return DataConfig(**{"source": source, "root": str(folders / name), "workers": 0, **options})


@needs_ffcv
@pytest.mark.parametrize("policy", POLICIES)
def test_stored_pixels_give_the_views_of_the_folder(folders, policy):
    augment, options = AugmentConfig(**POLICIES[policy]), {"batch_size": 12, "accumulation": 2}
    folder_loader = load(configured(folders, "png"), augment, **options).train
    for threads in (1, 2):
        ffcv_train = load(configured(folders, "raw", workers=threads), augment, **options).train
        assert isinstance(ffcv_train, FFCVTrainLoader)
        assert ffcv_train.steps_per_epoch == folder_loader.steps_per_epoch == 3
        for epoch, start in ((0, 0), (1, 2), (0, 1)):
            assert equal(ffcv_train.epoch(epoch, start), folder_loader.epoch(epoch, start))


@needs_ffcv
@pytest.mark.parametrize("policy", POLICIES)
def test_augmentation_on_batches_is_nearly_that_on_images(folders, policy):
    """As on a GPU, where the policy is carried out on whole batches."""
    augment = AugmentConfig(**POLICIES[policy])
    folder_loader = load(configured(folders, "png"), augment, batch_size=12).train
    ffcv_train = load(configured(folders, "raw"), augment, batch_size=12).train
    ffcv_train._augment_on_batches = True
    for (images, targets), (others, other_targets) in zip(folder_loader.epoch(3), ffcv_train.epoch(3)):
        assert torch.equal(targets, other_targets)
        assert (images - others).abs().mean() < 0.3 / 255 / 0.225


@needs_ffcv
def test_jpegs_give_nearly_the_views_of_the_folder(folders):
    """FFCV's decoder uses a faster, less exact transform."""
    options = {"batch_size": 12, "image_size": 16}
    batches = [
        list(load(configured(folders, name), AugmentConfig(), **options).train.epoch(0))
        for name in ("jpg", "jpeg")
    ]
    for (images, targets), (others, other_targets) in zip(*batches):
        assert torch.equal(targets, other_targets)
        assert (images - others).abs().mean() < 2 / 255 / 0.225


@needs_ffcv
def test_an_unfinished_epoch_does_not_affect_the_next(folders):
    train = load(configured(folders, "raw"), AugmentConfig(), batch_size=4).train
    second = list(train.epoch(1))
    for _ in range(3):
        assert len(list(itertools.islice(train.epoch(0), 2))) == 2
    assert equal(train.epoch(1), second)
    assert list(train.epoch(0, start=train.steps_per_epoch)) == []


@needs_ffcv
def test_batches_are_not_overwritten(folders):
    batches = list(load(configured(folders, "raw"), AugmentConfig(), batch_size=4).train.epoch(0))
    copies = [(images.clone(), targets.clone()) for images, targets in batches]
    assert equal(batches, copies)
    assert len({images.data_ptr() for images, _ in batches}) == len(batches)


@needs_ffcv
def test_channels_last(folders):
    train = load(configured(folders, "raw"), AugmentConfig(), batch_size=4, channels_last=True).train
    images, _ = next(train.epoch(0))
    assert images.is_contiguous(memory_format=torch.channels_last)
    plain, _ = next(load(configured(folders, "raw"), AugmentConfig(), batch_size=4).train.epoch(0))
    assert plain.is_contiguous()
    assert torch.equal(images, plain)


@needs_ffcv
@pytest.mark.parametrize("order", ["random", "quasi_random"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_an_epoch(folders, world_size, order):
    seen = collections.Counter()
    for rank in range(world_size):
        data = configured(folders, "raw", ffcv_order=order)
        train = load(data, AugmentConfig(), batch_size=12, rank=rank, world_size=world_size).train
        for keys in train.micro_batches:
            assert len(keys) == 12 // world_size
            seen.update(index for _, index, _ in keys)
    assert seen == dict.fromkeys(range(36), 1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_equals_that_of_the_folder(folders, world_size):
    """Each image once, without padding, the same to the bit; FFCV itself is not needed."""
    for name, other in (("png", "raw"), ("jpg", "jpeg")):
        images, targets = [], []
        for rank in range(world_size):
            options = {"batch_size": 4, "rank": rank, "world_size": world_size}
            folder_loader = load_validation(configured(folders, name), **options)
            ffcv_train = load_validation(configured(folders, other), **options)
            assert ffcv_train.class_names == folder_loader.class_names == ("ant", "bear", "cat")
            assert ffcv_train.loader.num_images == 21
            assert equal(ffcv_train.loader, folder_loader.loader)
            for batch in ffcv_train.loader:
                images.append(batch[0])
                targets += batch[1].tolist()
        assert len(torch.unique(torch.cat(images), dim=0)) == 21
        assert collections.Counter(targets) == {0: 7, 1: 7, 2: 7}


def test_workers_read_the_same_file_if_an_augmentation_cannot_run_on_batches(folders, caplog):
    crops = [({"crop": crop}, 3, f"augment.crop {crop}") for crop in ("pad_random", "eval_resize_random")]
    augmix = ({"auto_augment": "augmix-m3-w2"}, 3, "augment.auto_augment augmix-m3-w2")
    splits = ({"aug_splits": 3, "auto_augment": "rand-m9"}, 3, "augment.aug_splits 3")
    for options, in_chans, option in (({}, 1, "model.in_chans 1"), augmix, splits, *crops):
        augment, settings = AugmentConfig(**options), {"batch_size": 12, "in_chans": in_chans}
        caplog.clear()
        train = load(configured(folders, "raw", workers=2), augment, **settings).train
        assert isinstance(train, TrainLoader)
        prefix = "" if option.startswith("model") else "schedule."
        assert [record.getMessage() for record in caplog.records] == [
            f"data.source ffcv: {prefix}{option} cannot run on batches; "
            "falling back to 2 worker processes per rank"
        ]
        assert equal(train.epoch(0), load(configured(folders, "png"), augment, **settings).train.epoch(0))


@needs_ffcv
def test_workers_read_the_same_file_for_random_sizes(folders, caplog):
    options = {"batch_size": 12, "random_sizes": [16, 24]}
    train = load(configured(folders, "raw", workers=2), AugmentConfig(), **options).train
    assert isinstance(train, TrainLoader)
    assert [record.getMessage() for record in caplog.records] == [
        "data.source ffcv: schedule.random_sizes [16, 24] cannot run on batches; "
        "falling back to 2 worker processes per rank"
    ]


@needs_ffcv
def test_the_batch_size_follows_a_plan_of_sizes(folders):
    options = {"batch_size": 12, "progressive_resizing": [(0, 16), (0.5, 24, 6)], "epochs": 2}
    ffcv, png = (load(configured(folders, name), AugmentConfig(), **options).train for name in ("raw", "png"))
    for epoch in range(2):
        assert equal(ffcv.epoch(epoch), png.epoch(epoch))


@needs_ffcv
def test_subsets(folders):
    data = {"train_fraction": 0.5, "images_per_class": 4}
    batches = [
        list(load(configured(folders, name, **data), AugmentConfig(), batch_size=6).train.epoch(0))
        for name in ("png", "raw")
    ]
    assert equal(*batches)
    assert sum(len(targets) for _, targets in batches[0]) == 12


@needs_ffcv
def test_balanced_sampling(folders):
    batches = [
        list(
            load(
                configured(folders, name, balanced_sampling=True), AugmentConfig(), batch_size=12
            ).train.epoch(1)
        )
        for name in ("png", "raw")
    ]
    assert equal(*batches)


def test_balanced_sampling_has_no_quasi_random_order(folders):
    data = configured(folders, "raw", balanced_sampling=True, ffcv_order="quasi_random")
    with pytest.raises(UserError) as refused:
        load(data, AugmentConfig(), batch_size=4)
    reason = "cannot be combined with data.ffcv_order quasi_random"
    assert str(refused.value) == f"data.balanced_sampling: {reason}"


@needs_ffcv
def test_repeated_augmentation(folders):
    augment = AugmentConfig(repeated_augmentation=3)
    batches = [
        list(load(configured(folders, name), augment, batch_size=12).train.epoch(2))
        for name in ("png", "raw")
    ]
    assert equal(*batches)


def test_quasi_random_order_reads_neighboring_pages_together():
    pages = np.repeat(np.arange(40), 16)
    options = (2, 1, 0, 1)  # batches of 2: the images of a page are shuffled with few others
    batches = QuasiRandomBatches(pages, 640, *options)
    orders = [batches.draw(epoch, np.arange(640))[0] for epoch in (0, 1, 0)]
    assert np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], orders[1])
    for order in orders:
        assert sorted(order) == list(range(640))
        groups = pages[order].reshape(40, 16)
        assert all(len(np.unique(group)) <= 2 for group in groups)
        assert not np.array_equal(groups[:, 0], np.sort(groups[:, 0]))
    repeated, views = QuasiRandomBatches(pages, 640, 8, 1, 0, 2).draw(0, np.arange(640))
    assert np.array_equal(repeated[::2], repeated[1::2])
    assert views[:4].tolist() == [0, 1, 0, 1]


def test_quasi_random_order_requires_ffcv(folders):
    with pytest.raises(UserError, match=r"^data\.ffcv_order: .*data\.source ffcv"):
        load(configured(folders, "png", ffcv_order="quasi_random"), AugmentConfig(), batch_size=4)


@needs_ffcv
def test_damaged_images(folders, tmp_path):
    """`fail` names the first of them; `skip` takes the next one of the epoch and lists them."""
    source = open_source(configured(folders, "png"), "train", 3)
    images = [source.load(index)[0] for index in range(len(source))]
    contents = [(image.size, as_jpeg(image)) for image in images]
    for index in (3, 8):
        contents[index] = (contents[index][0], contents[index][1][: 200 if index == 3 else -100])
    write_beton(tmp_path / "train.beton", contents, source.targets, source.class_names)
    convert_folder(open_source(configured(folders, "png"), "val", 3), tmp_path / "val.beton")
    data = {"source": "ffcv", "root": str(tmp_path), "workers": 2}
    with pytest.raises(UserError, match=r"^data\.root: image (3|8) of .*train\.beton: cannot be read: "):
        list(load(DataConfig(**data), AugmentConfig(), batch_size=12).train.epoch(0))
    skipping = DataConfig(**data, unreadable_images="skip", max_unreadable_fraction=0.2)
    train = load(skipping, AugmentConfig(), batch_size=12, output=tmp_path).train
    assert sum(len(targets) for _, targets in train.epoch(0)) == 36
    listed = (tmp_path / "bad_images.txt").read_text().splitlines()
    assert sorted(listed) == [f"image {index} of {tmp_path / 'train.beton'}" for index in (3, 8)]


@needs_ffcv
def test_pillow_reads_images_that_ffcv_rejects(folders, tmp_path):
    source = open_source(configured(folders, "png"), "train", 3)
    images = [source.load(index)[0].convert("CMYK") for index in range(8)]
    contents = [(image.size, as_jpeg(image)) for image in images]
    for split in ("train", "val"):
        write_beton(tmp_path / f"{split}.beton", contents, range(8))
    train = load(
        DataConfig(source="ffcv", root=str(tmp_path), workers=0), AugmentConfig(), batch_size=8
    ).train
    ((batch, targets),) = train.epoch(0)
    assert sorted(targets.tolist()) == list(range(8))
    assert batch.isfinite().all()


def test_without_ffcv_one_line_says_how_to_install_it(folders, monkeypatch):
    find_spec = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "ffcv" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(ffcv_loader.importlib.util, "find_spec", missing)
    ffcv_loader.load_decoder.cache_clear()
    with pytest.raises(UserError, match=r"^data\.source: ffcv needs .* pip install ffcv$"):
        load(configured(folders, "raw"), AugmentConfig(), batch_size=4)
    ffcv_loader.load_decoder.cache_clear()


def test_invalid_files(folders, tmp_path):
    def refusal():
        with pytest.raises(UserError) as caught:
            open_source(DataConfig(source="ffcv", root=str(tmp_path)), "train", 3)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    path = tmp_path / "train.beton"
    assert (
        refusal() == f"data.root: {path}: no such file; tools/write_ffcv.py writes it from any other source"
    )
    whole = (folders / "raw" / "train.beton").read_bytes()
    unfinished = bytearray(whole)
    unfinished[16:24] = bytes(8)  # where the table of allocations is, which the writer sets last
    for content in (b"", b"x" * 5000, whole[:100], whole[:3000], whole[:-500], unfinished):
        path.write_bytes(content)
        assert refusal() == f"data.root: {path}: not an FFCV file, or incomplete"
    path.write_bytes(whole)
    description = path.with_suffix(".json")
    for text in ("{", "[]", "{}", '{"class_names": 3}'):
        description.write_text(text)
        assert refusal() == f"data.root: {description}: contains no readable list class_names"
    description.write_text('{"class_names": ["ant"]}')
    assert refusal() == f"data.root: {description}: 1 classes, but {path} has class 2"
    description.write_text('{"class_names": ["ant", "bear", "ant"]}')
    location = f"data.root: {tmp_path}, split train"
    assert refusal() == f"{location}: two classes are named 'ant'; rename one of them"
    description.unlink()
    assert open_source(DataConfig(source="ffcv", root=str(tmp_path)), "train", 3).class_names == (*"012",)
    with pytest.raises(UserError, match=r"^data\.download: "):
        open_source(DataConfig(source="ffcv", root=str(tmp_path), download=True), "train", 3)


def test_a_file_is_mapped_anew_in_another_process(folders):
    beton = Beton(folders / "raw" / "train.beton")
    stored = beton.stored(3)
    pickled = pickle.dumps(beton)
    assert len(pickled) < 20_000 < (folders / "raw" / "train.beton").stat().st_size
    assert np.array_equal(pickle.loads(pickled).stored(3), stored)
    assert len(np.unique(beton.pages)) > 1
    assert (np.diff(beton.pages) >= 0).all()
    assert PAGE == 1 << 14
    assert isinstance(Image.fromarray(stored), Image.Image)
    assert json.loads((folders / "raw" / "train.json").read_text())["class_names"] == ["ant", "bear", "cat"]


def open_fields(folder, fields, targets=(2, 0, 1), **options):
    images = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(len(targets))]
    write_beton(folder / "train.beton", images, targets, fields=fields, **options)
    return open_source(DataConfig(source="ffcv", root=str(folder)), "train", 3)


@pytest.mark.parametrize(
    "fields",
    [
        {"index": 1, "image": 2, "label": 1},
        {"image": 2, "Target": 1, "weight": 0},
        {"index": 1, "covariate": 2, "label": 1},
        {"image": 2, "label": 1, "attributes": 5, "features": 4, "tensor": 6, "text": 3},
    ],
)
def test_the_class_is_the_field_of_that_name(fields, tmp_path):
    source = open_fields(tmp_path, fields)
    assert source.targets.tolist() == [2, 0, 1]
    assert [source.load(index)[0].getpixel((0, 0))[0] for index in range(3)] == [0, 1, 2]


def test_the_only_integer_field_needs_no_name(tmp_path):
    assert open_fields(tmp_path, {"image": 2, "category": 1}).targets.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"a": 1, "image": 2, "b": 1}, "which field is the class is ambiguous: it has 'a' (integers), "),
        ({"label": 1, "image": 2, "target": 1}, "which field is the class is ambiguous"),
        ({"image": 2, "label": 0}, "it has 'image' (images), 'label' (floats)"),
        (
            {"index": 1, "image": 2, "label": 3},
            "it has 'index' (integers), 'image' (images), 'label' (bytes)",
        ),
        ({"index": 1, "image": 2}, "which field is the class is ambiguous"),
        ({"left": 2, "right": 2, "label": 1}, "which field is an image is ambiguous"),
        ({"image": 2, "label": 255}, "field 'label' has a custom type, not one of FFCV's"),
    ],
)
def test_ambiguous_fields_are_rejected_with_their_names(fields, reason, tmp_path):
    with pytest.raises(UserError) as error:
        open_fields(tmp_path, fields, kinds={**_RECORDS, 255: "<u8"})
    assert error.value.reason.startswith(f"{tmp_path / 'train.beton'}: ")
    assert reason in error.value.reason
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("targets", [(0, -1, 1), (0, 1 << 40, 1)])
def test_classes_out_of_range_are_rejected(targets, tmp_path):
    with pytest.raises(
        UserError, match=rf"image 1 has the class {targets[1]} in field 'label'; expected 0 to"
    ):
        open_fields(tmp_path, {"image": 2, "label": 1}, targets)
