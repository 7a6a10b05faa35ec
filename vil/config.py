"""Every option of the framework: once, typed, with its default, its unit and one line of help.

``train.py`` and ``eval.py`` build their command lines from these dataclasses (`vil.command_line`), and
`vil.schema` validates plain data, from whatever file, against them. ``--model``, ``--schedule`` and
``--data`` each load one YAML file into one section, ``--config`` loads a partial file over all of them, and
``--section.field value`` overrides one field; the last one on the line wins. Invalid input ends in a
`ConfigError` whose text is one line: the file, the key, and the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

AttentionName = Literal[
    "full", "vision_longformer", "linformer", "performer", "spatial_reduction", "global_only"
]
Precision = Literal["float32", "bfloat16", "float16"]
Color3 = tuple[float, float, float]
Scalar = bool | int | float | str | None
PlainValue = Scalar | list[Scalar] | list[list[Scalar]] | dict[str, Scalar | list[Scalar]]
"""A number, text, true, false or null, or a list or mapping of them: data that names nothing to import."""

LONGEST_LINE = 4000
"""Characters of a message that are shown."""


def printable(text: str) -> str:
    r"""The text on one line, as a terminal and any encoding can show it.

    White space becomes spaces; other characters that cannot be printed, which may steer a terminal or stand
    for no character at all, are written as \x1b; of a text that is too long the end is left out.
    """
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE - 3]}..."
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in text
    )


COMMAND_LINE = "command line"
"""Origin of a value that the command line sets."""


class ConfigError(ValueError):
    """An option that cannot be used. Its text is one printable line.

    Args:
        key: the option, as `window` or `data.root`; `in_section` prepends a section.
        reason: what is wrong with it, on one line, and what would be right.
        origin: where the value comes from: the name of a file, or `COMMAND_LINE`; empty if unknown.
    """

    def __init__(self, key: str, reason: str, origin: str = "") -> None:
        super().__init__(key, reason, origin)
        self.key = key
        self.reason = reason
        self.origin = origin

    def __str__(self) -> str:
        """Return `origin: key: reason`, without the parts that are empty."""
        return printable(": ".join(part for part in (self.origin, self.key, self.reason) if part))


@contextmanager
def in_section(section: str) -> Iterator[None]:
    """Put `section.` in front of the key of a ConfigError that is raised inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{section}.{error.key}", error.reason, error.origin) from error


@contextmanager
def of_option(key: str) -> Iterator[None]:
    """Makes a ConfigError that is raised inside the reason why the option `key` cannot be used."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(key, str(error)) from error


@dataclass
class StageConfig:
    """One stage of a multi-scale model: a patch embedding and `blocks` pairs of attention and MLP."""

    dim: int
    """Width of the tokens (channels)."""
    heads: int
    """Attention heads; must divide the width."""
    blocks: int = 1
    """Number of attention + MLP blocks."""
    patch: int = 2
    """Side of the patches of this stage's embedding, in positions of the map that it receives."""
    attention: AttentionName = "vision_longformer"
    """Attention mechanism."""
    global_tokens: int = 1
    """Global tokens put in front of the map's tokens."""
    position: Literal["relative", "absolute"] = "relative"
    """Position encoding: a learned bias per head and offset, or learned embeddings of rows and columns."""
    window: int = 7
    """Side of a chunk of the local attention, in tokens (vision_longformer)."""
    projected_tokens: int = 256
    """Number of keys after the projection along the token axis (linformer)."""
    random_features: int = 256
    """Number of random features per head (performer)."""
    reduction: int = 8
    """Stride of the convolution that makes keys and values (spatial_reduction)."""


@dataclass
class ModelConfig:
    """What is built: a model of the zoo, changed by the options below; empty (null) keeps the zoo's own
    value."""

    name: str = "vil_tiny"
    """A name from vil.list_models(), `vil` with a list of stages, or timm/<name> for any model of timm."""
    image_size: int = 224
    """Height and width of the images, in pixels."""
    num_classes: int | None = None
    """Classes of the head; null takes their number from the data."""
    in_chans: int = 3
    """Channels of the images: 3 (RGB) or 1 (grey)."""
    pool: Literal["avg", "cls"] | None = None
    """What the head sees: the mean over all tokens or the first global token; null is avg."""
    attention: AttentionName | list[AttentionName] | None = None
    """Attention of the sparse stages, or a list with one name per stage."""
    blocks: tuple[int, ...] | None = None
    """Blocks per stage, as [1, 2, 8, 1]."""
    position: Literal["relative", "absolute"] | None = None
    """Position encoding of every stage."""
    mask: Literal["chunk", "exact", "cyclic"] | None = None
    """Local attention: what lies in the window (null is chunk): the nine chunks, offsets up to w, chunks
    that wrap."""
    neighbors: Literal["all", "self", "random"] | None = None
    """Local attention: which chunks around a query's own are seen in training; random is the random shift."""
    window: int | None = None
    """Local attention: side of a chunk in every stage, in tokens."""
    global_tokens: int | list[int] | None = None
    """Global tokens of every stage, or a list with one number per stage."""
    stage_globals: Literal["discard", "carry"] = "discard"
    """Global tokens between stages: dropped, or carried on by a linear map to the next width."""
    share_global_projection: bool = True
    """Local attention: global tokens use the projections of the local ones, not their own."""
    projected_tokens: int | None = None
    """Linformer: keys after the projection, in every stage."""
    share_key_value_projection: bool = True
    """Linformer: one projection along the tokens for keys and values."""
    random_features: int | None = None
    """Performer: random features per head, in every stage."""
    reduction: int | None = None
    """Spatial reduction: stride of the convolution, in every stage."""
    attention_backend: Literal["auto", "dense", "chunked", "fused"] = "auto"
    """Implementation of the local attention; auto takes the fastest, see docs/attention.md."""
    drop_path: float = 0.0
    """Stochastic depth: rate at the last block, rising linearly from 0 at the first."""
    dropout: float = 0.0
    """Dropout after the embeddings, the attention's projection and the MLP."""
    attention_dropout: float = 0.0
    """Dropout of the attention weights."""
    stages: list[StageConfig] | None = None
    """The stages themselves, for name: vil."""
    norm_embed: bool = True
    """LayerNorm after each patch embedding."""
    timm_options: dict[str, PlainValue] | None = None
    """Further keyword arguments for a timm/<name> model, as {depth: 6, qkv_bias: false}. A file may set
    options of the architecture only; what loads or downloads weights (pretrained, checkpoint_path, ...) is
    taken from the command line alone."""
    init_from: str | None = None
    """Training starts from these weights: a run's folder, a checkpoint, safetensors, or a published
    checkpoint. Where neither a file nor the line names a model, the architecture is theirs too; another
    image_size resizes, another number of classes cuts or renews the head."""
    init_released_config: str | None = None
    """The configuration published with the checkpoint in init_from."""


@dataclass
class AugmentConfig:
    """How training images are changed; evaluation never uses any of this."""

    crop: Literal["random_resized", "pad_random", "resize_random", "eval_resize_random", "none"] = (
        "random_resized"
    )
    """random_resized: Inception crop; pad_random: shift by up to `pad`; resize_random: short side, reflected
    padding, then crop (DeiT III); eval_resize_random: short side as in evaluation (image_size /
    data.crop_pct), then crop, without padding; none: short side, centre crop."""
    scale: tuple[float, float] = (0.08, 1.0)
    """random_resized: smallest and largest area, as a fraction of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """random_resized: smallest and largest aspect ratio."""
    pad: int = 4
    """pad_random and resize_random: padding on each side, in pixels."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    vflip: float = 0.0
    """Probability of a vertical flip."""
    interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    """Interpolation of training images; random is bilinear or bicubic, drawn anew for each image."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter; as in timm, not used beside an auto_augment
    other than 3a."""
    auto_augment: str | None = None
    """A timm policy: rand-m9-mstd0.5-inc1, augmix-m3-w3, original, 3a, ..."""
    random_erasing: float = 0.0
    """Probability of erasing a rectangle."""
    random_erasing_mode: Literal["const", "rand", "pixel"] = "pixel"
    """Fill of the rectangle: zero, one random colour, or noise per pixel."""
    random_erasing_count: int = 1
    """Largest number of rectangles per image."""
    mixup: float = 0.0
    """Mixup alpha; 0 is off."""
    cutmix: float = 0.0
    """CutMix alpha; 0 is off."""
    mixup_prob: float = 1.0
    """Probability that a batch (pair, element) is mixed at all."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix where both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """What shares a mixing weight: the batch, a pair, or nothing."""
    mixup_until: int | None = None
    """Epoch from which mixing is off; null never."""
    repeats: int = 1
    """Repeated augmentation: views of one image in a global batch; an epoch keeps its length (DeiT uses
    3)."""


@dataclass
class ScheduleConfig:
    """How a model is trained: length, batch, optimiser, learning rate, regularisation and augmentation."""

    epochs: int = 300
    """Passes over the training set."""
    max_steps: int | None = None
    """Stop after this many optimiser steps, before the last epoch; schedules keep their length."""
    batch_size: int = 1024
    """Images per optimiser step, over all ranks and accumulation steps."""
    accumulation: int = 1
    """Parts into which each rank splits its share of a batch, to save memory."""
    optimizer: str = "adamw"
    """A name known to timm.optim: adamw, sgd, lamb, lion, ..."""
    lr: float = 1e-3
    """Peak learning rate, for batch_size, or for lr_batch_size where that is given."""
    lr_batch_size: int | None = None
    """Batch size that lr is meant for; the rate is scaled linearly to batch_size."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam-like optimisers."""
    momentum: float = 0.9
    """Momentum of SGD-like optimisers."""
    dampening: float = 0.0
    """Dampening of the momentum (SGD)."""
    eps: float | None = None
    """The optimiser's epsilon; null keeps its default."""
    weight_decay: float = 0.05
    """Weight decay; none on embeddings, norms, bias tables and the head's bias."""
    decay_biases: bool = False
    """Decay also the biases of linear and convolution layers (the head's excepted), as the paper's code
    does."""
    layer_decay: float | None = None
    """Factor on the learning rate per layer from the head down; null is 1."""
    clip_grad: float | None = None
    """Gradient clipping threshold; null is off."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """Clip by global norm, by value, or adaptively."""
    scheduler: Literal["cosine", "step", "poly", "constant"] = "cosine"
    """Learning-rate schedule after warm-up, updated every step; poly is a straight line."""
    min_lr: float = 1e-6
    """Learning rate at the last step (cosine, poly)."""
    warmup_epochs: float = 5.0
    """Length of the linear warm-up, in epochs; fractions are allowed."""
    warmup_factor: float = 0.002
    """Learning rate at the first step, as a fraction of the peak."""
    warmup_prefix: bool = True
    """cosine and poly begin at the peak after the warm-up; false lets them begin with the run, and the
    warm-up replace their first part, as in the code of the paper and of DeiT."""
    decay_epochs: float = 30.0
    """scheduler step: epochs between two drops."""
    decay_rate: float = 0.1
    """scheduler step: factor of a drop."""
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    """Cross-entropy over classes, or binary cross-entropy per class (DeiT III)."""
    label_smoothing: float = 0.1
    """Probability mass spread over all classes."""
    ema_decay: float | None = None
    """Decay per step of the exponential moving average of the weights; null is off."""
    ema_warmup: bool = False
    """Start the average with a small decay that grows to ema_decay."""
    random_shift_until: float = 0.75
    """neighbors: random switches to all eight neighbours after this fraction of the epochs."""
    sizes: list[tuple[float, int]] | None = None
    """Side of the training images in the course of a run, as [[0, 160], [0.6, 224]]: from which fraction of
    the epochs on, and how many pixels; null is image_size throughout. Evaluation always uses image_size."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation of the training images."""


@dataclass
class DataConfig:
    """Which images, and how they are brought to the model's size."""

    source: str = "digits"
    """digits (bundled), folder (root/train/<class>/..., root/val/...), zip (root/train.zip and
    train_map.txt), ffcv (root/train.beton, by tools/write_ffcv.py), tar, wds (WebDataset shards), or a timm
    data set: torch/cifar10, hfds/..."""
    root: str | None = None
    """Folder of the data set."""
    train_split: str = "train"
    """Name of the training split: the sub-folder, for folders."""
    val_split: str = "val"
    """Name of the validation split: the sub-folder, for folders."""
    download: bool = False
    """Let a timm data set (torch/..., hfds/...) download what is missing; for the command line alone."""
    workers: int = 4
    """Processes that load images, per rank; 0 loads in the training process."""
    on_error: Literal["fail", "skip"] = "fail"
    """An image that cannot be read ends the program, or is skipped: in training the next of the epoch takes
    its place, and bad_images.txt in the run's folder lists it; in evaluation it is counted and reported."""
    max_bad: float = 0.001
    """on_error skip: the largest share of the training images that may be unreadable, one image at
    least unless it is 0; more stop the run."""
    train_fraction: float = 1.0
    """Train on this share of each class; a larger share holds the images of a smaller one."""
    images_per_class: int | None = None
    """Train on at most so many images of each class; null is all."""
    list_file: str | None = None
    """Train on the images named in this text file, one a line: paths below the split, or plain file names."""
    ffcv_order: Literal["random", "quasi_random"] = "random"
    """source ffcv: the order of an epoch. quasi_random reads neighbouring pages of the file together, for
    files that are larger than the memory."""
    crop_pct: float = 0.875
    """Evaluation: image_size / crop_pct is the short side before the centre crop."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    """Evaluation: interpolation of that resize."""
    mean: Color3 = (0.485, 0.456, 0.406)
    """Mean of the channels, for values in 0..1."""
    std: Color3 = (0.229, 0.224, 0.225)
    """Standard deviation of the channels, for values in 0..1."""
    real_labels: str | None = None
    """Evaluation on ImageNet's validation images: the file real.json of their reassessed labels (ReaL,
    https://github.com/google-research/reassessed-imagenet), for an accuracy of its own beside Top-1."""


@dataclass
class TrainConfig:
    """Train a model. Without arguments: a small Vision Longformer on the bundled digits."""

    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output: str | None = None
    """Folder of the run; null is runs/<data source>."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues the run that is in the output folder; never refuses a folder that holds one."""
    seed: int = 0
    """Every random draw is a function of this seed and of what it is for."""
    device: str = "auto"
    """auto, cpu or cuda; under torchrun each rank takes its own GPU."""
    precision: Precision | None = None
    """Mixed precision by autocast, float16 with loss scaling; null is bfloat16 on a GPU that has it, else
    float32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = False
    """Keep images and convolution weights in channels-last order."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    deterministic: bool = False
    """Use deterministic algorithms only: two identical runs on one GPU are equal to the bit. A CPU's always
    are."""
    log_every: int = 10
    """Steps between two logged steps."""
    eval_every: int = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    save_every: int | None = None
    """Steps between two checkpoints, beside the one after each epoch; SIGUSR1 asks for one at any time."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep, beside the best."""
    max_skipped_steps: int = 20
    """A step whose loss or gradient is not finite is skipped; more of them in a row stop the run."""
    spike_threshold: float | None = 6.0
    """A loss so many standard deviations above the mean of the last 100 steps is logged with the samples of
    its batch; null is off."""
    hang_timeout: float = 600.0
    """Seconds without progress after which each rank says where it hangs."""
    grace_period: float = 120.0
    """Seconds for the last step and its checkpoint after SIGTERM or Ctrl-C; then the process ends unsaved."""
    attention_every: int | None = 10
    """Epochs between two pictures, in TensorBoard, of what the model attends to in a few validation images,
    with one at the end; null is off. Only models of this project have them."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    progress: bool = True
    """Show progress bars on rank 0."""


@dataclass
class EvalConfig:
    """Evaluate checkpoints: Top-1, Top-5, parameters, FLOPs, memory, images per second."""

    checkpoint: list[str] | None = None
    """Run folders or files: of train.py, tools/convert.py, or published; several may be given."""
    weights: Literal["auto", "raw", "ema"] = "auto"
    """Which weights of a checkpoint: auto takes the kind that was best."""
    which: Literal["best", "last"] = "best"
    """Which checkpoint of a run's folder."""
    released_config: str | None = None
    """The configuration published with the checkpoint: gives architecture, resolution, crop, interpolation
    and normalisation; options on the line go over it."""
    complexity: bool = False
    """Report parameters, FLOPs and memory only; needs no data."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sets: list[str] | None = None
    """Several data sets, in the place of data's own: folders of class folders (ImageNet's val, -V2, -A, -R,
    -Sketch, -C or one of its corruptions), or YAML files for the section data."""
    match_classes: Literal["names", "position"] = "names"
    """Which row of the head a class of the data is: the one of its name, or, where the checkpoint knows none
    of the names, position: class k is row k."""
    batch_size: int = 128
    """Images per forward pass and rank."""
    json: str | None = None
    """Write the results to this file."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: Precision = "float32"
    """Precision of the forward pass."""
    deterministic: bool = False
    """Use deterministic algorithms only."""
    progress: bool = True
    """Show progress bars on rank 0."""
