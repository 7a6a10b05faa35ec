"""Every option of the framework, once: name, type, range, default, unit and help.

`vil.command_line` builds the command lines of train.py and eval.py from these dataclasses, and
`vil.validation` validates YAML files, stored configurations and command lines against them. `--model`,
`--schedule` and `--data` load one YAML file into one section, `--config` loads a partial file into all of
them, `--section.field value` sets one field; the last one wins. Invalid input raises `UserError`: one line
with the file, the option and the reason.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, Predicate

from vil.errors import UserError

Tree = dict[str, Any]
"""Plain values by name: the mappings, lists and scalars of a YAML or JSON file."""

AttentionName = Literal[
    "full", "vision_longformer", "linformer", "performer", "spatial_reduction", "global_only"
]
Precision = Literal["float32", "bfloat16", "float16"]
Logger = Literal["tensorboard", "csv", "wandb", "mlflow"]
TRACKER_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow or mlflow-skinny"}
"""Loggers that may send data to a server, for the command line alone -> the package that each needs."""

MAX_SIDE = 8192
"""Height and width of the largest images, in pixels: 0.8 GB each as float32."""
MAX_WORKERS = 1024
"""Processes that load images, per rank."""
MAX_WIDTH = 1_000_000
"""Largest number of channels, heads, tokens and other sizes of an architecture."""

Count = Annotated[int, Ge(1)]
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
"""Also a probability."""
Rate = Annotated[float, Ge(0), Lt(1)]
PositiveFraction = Annotated[float, Gt(0), Le(1)]
AspectRatio = Annotated[float, Ge(1e-3), Le(1e3)]
ClassWeight = Annotated[float, Ge(1e-6), Le(1_000_000)]
LayerScaleInit = Annotated[float, Gt(0), Le(100)]
Seconds = Annotated[float, Gt(0), Le(1_000_000)]
Side = Annotated[int, Ge(1), Le(MAX_SIDE)]
ImageSize = Side | tuple[Side, Side]
"""Height and width of images in pixels, or one number for square images."""
Size = tuple[int, int]
"""Height and width, in pixels or positions."""
Width = Annotated[int, Ge(1), Le(MAX_WIDTH)]
TokenCount = Annotated[int, Ge(0), Le(MAX_WIDTH)]


def _is_rising(pair: tuple[float, float]) -> bool:
    """In rising order."""
    return pair[0] <= pair[1]


def _is_ascending(numbers: list[float]) -> bool:
    """At least one, in ascending order."""
    return len(numbers) > 0 and all(a < b for a, b in itertools.pairwise(numbers))


def _is_not_empty(values: list[Any]) -> bool:
    """At least one."""
    return len(values) > 0


def _is_mixing_alpha(alpha: float) -> bool:
    """From 1e-6 to 1e6, or 0 for off."""
    return alpha == 0 or 1e-6 <= alpha <= 1e6


def _is_resizing_plan(plan: list[tuple[float, int | Size] | tuple[float, int | Size, int]]) -> bool:
    """Rising fractions of the epochs, the first of them 0, each with an image size in pixels."""
    fractions = [fraction for fraction, *_ in plan]
    return fractions[:1] == [0] and all(a < b for a, b in itertools.pairwise(fractions))


def as_size(image_size: int | Size) -> Size:
    """Return (height, width) of an image size, which is one number for square images."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height, width


def format_size(image_size: int | Size) -> str:
    """Return an image size as text, e.g. 160×224."""
    return "×".join(map(str, as_size(image_size)))


MixingAlpha = Annotated[float, Predicate(_is_mixing_alpha)]
Scalar = bool | int | float | str | None
PlainValue = Scalar | list[Scalar] | list[list[Scalar]] | dict[str, Scalar | list[Scalar]]
"""A number, text, true, false or null, or a list or mapping of them: data that names nothing to import."""


@dataclass
class StageConfig:
    """One stage of a multi-scale model: a patch embedding and `blocks` pairs of attention and MLP."""

    dim: Width
    """Width of the tokens (channels)."""
    heads: Width
    """Attention heads; must divide dim."""
    blocks: TokenCount = 1
    """Number of attention + MLP blocks."""
    patch: Width = 2
    """Patch size and stride of the stage's patch embedding, in positions of its input map."""
    attention: AttentionName = "vision_longformer"
    """Attention mechanism."""
    global_tokens: TokenCount = 1
    """Global tokens, prepended to the tokens of the map."""
    position: Literal["relative", "absolute"] = "relative"
    """Position encoding: a learned bias per head and offset, or learned embeddings of rows and columns."""
    window: Width = 7
    """Side of a chunk of the local attention, in tokens (vision_longformer)."""
    projected_tokens: Width = 256
    """Number of keys after the projection along the token axis (linformer)."""
    random_features: Width = 256
    """Number of random features per head (performer)."""
    reduction: Width = 8
    """Stride of the convolution that reduces keys and values (spatial_reduction)."""


@dataclass
class ModelConfig:
    """The model: one of the zoo, changed by the options below; null keeps the zoo's value."""

    name: str = "vil_tiny"
    """A name from vil.list_models(), `vil` with a list of stages, or timm/<name> for any model of timm."""
    image_size: ImageSize = 224
    """Height and width of the images in pixels, e.g. [160, 224], or one number for square images."""
    num_classes: TokenCount | None = None
    """Classes of the head; null is the number of classes of the data."""
    in_chans: Width = 3
    """Channels of the images: 3 (RGB) or 1 (grayscale)."""
    pool: Literal["avg", "cls"] | None = None
    """Input of the head: the mean over all tokens (except the distillation token) or the first global token;
    null is avg."""
    attention: AttentionName | list[AttentionName] | None = None
    """Attention of the sparse stages, or a list with one name per stage."""
    blocks: tuple[TokenCount, ...] | None = None
    """Blocks per stage, e.g. [1, 2, 8, 1]."""
    position: Literal["relative", "absolute"] | None = None
    """Position encoding of every stage."""
    mask: Literal["chunk", "exact", "cyclic"] | None = None
    """Local attention: keys of a query (null is chunk): all of the nine chunks; exact: offsets up to window;
    cyclic: chunks wrap around the edges of the map."""
    neighbors: Literal["all", "self", "random"] | None = None
    """Local attention: neighboring chunks in training: all eight, none, or a random one (random shift)."""
    window: Width | None = None
    """Local attention: side of a chunk in every stage, in tokens."""
    global_tokens: TokenCount | list[TokenCount] | None = None
    """Global tokens of every stage, or a list with one number per stage."""
    distillation_token: bool = False
    """A further global token of the last stage with a head of its own, which learns from a teacher
    (schedule.distillation); in evaluation the logits are the mean of both heads."""
    stage_globals: Literal["discard", "carry"] = "discard"
    """Global tokens between stages: discarded, or projected to the width of the next stage."""
    share_global_projection: bool = True
    """Local attention: global and local tokens share their projections."""
    projected_tokens: Width | None = None
    """Linformer: keys after the projection, in every stage."""
    share_key_value_projection: bool = True
    """Linformer: one projection along the tokens for keys and values."""
    random_features: Width | None = None
    """Performer: random features per head, in every stage."""
    reduction: Width | None = None
    """Spatial reduction: stride of the convolution, in every stage."""
    attention_backend: Literal["auto", "dense", "chunked", "fused"] = "auto"
    """Implementation of the local attention; auto selects the fastest, see docs/attention.md."""
    drop_path: Rate = 0.0
    """Stochastic depth: rate of the last block, rising linearly from 0 at the first."""
    dropout: Rate = 0.0
    """Dropout after the embeddings, the attention's output projection and the layers of the MLP."""
    position_dropout: Rate | None = None
    """Dropout after the embeddings; null is the value of dropout."""
    attention_dropout: Rate = 0.0
    """Dropout of the attention weights."""
    head_dropout: Rate = 0.0
    """Dropout before the head."""
    mlp_ratio: Annotated[float, Gt(0), Le(100)] = 4.0
    """Hidden width of the MLPs, as a multiple of the stage's width."""
    stages: list[StageConfig] | None = None
    """The stages, for name: vil."""
    norm_embed: bool = True
    """LayerNorm after each patch embedding."""
    layer_scale: LayerScaleInit | None = None
    """LayerScale: initial value of a learned factor per channel after each attention and MLP, e.g. 1e-6; null
    is off."""
    timm_options: dict[str, PlainValue] | None = None
    """Further keyword arguments for a timm/<name> model, e.g. {depth: 6, qkv_bias: false}. A file may set
    options of the architecture only; options that load or download weights (pretrained, checkpoint_path, ...)
    are for the command line alone."""
    init_from: str | None = None
    """Initial weights: a run's folder, a checkpoint, safetensors, or a published checkpoint. If no model is
    named, its architecture is used. Position embeddings are resized to image_size; rows of the head are found
    by the names of the classes, the others are new."""
    init_released_config: str | None = None
    """The configuration published with the checkpoint in init_from."""
    new_head: bool = False
    """Start with a new head, whatever the classes of the initial weights (init_from, or weights of timm)."""

    def __post_init__(self) -> None:
        height, width = as_size(self.image_size)
        self.image_size = height if height == width else (height, width)

    @property
    def size(self) -> Size:
        """Height and width of the images, in pixels."""
        return as_size(self.image_size)


@dataclass
class AugmentConfig:
    """Augmentation of the training images; evaluation does not use it."""

    crop: Literal["random_resized", "pad_random", "resize_random", "eval_resize_random", "none"] = (
        "random_resized"
    )
    """random_resized: Inception crop; pad_random: shift by up to `pad`; resize_random: short side, reflected
    padding, then crop (DeiT III); eval_resize_random: short side as in evaluation (image_size /
    data.crop_pct), then crop, without padding; none: short side, center crop. If image_size is not square,
    the image is resized to cover it."""
    scale: Annotated[tuple[PositiveFraction, PositiveFraction], Predicate(_is_rising)] = (0.08, 1.0)
    """random_resized: smallest and largest area, as a fraction of the image."""
    ratio: Annotated[tuple[AspectRatio, AspectRatio], Predicate(_is_rising)] = (3 / 4, 4 / 3)
    """random_resized: smallest and largest aspect ratio."""
    pad: Annotated[int, Ge(0), Le(4096)] = 4
    """pad_random and resize_random: padding on each side, in pixels."""
    hflip: Fraction = 0.5
    """Probability of a horizontal flip."""
    vflip: Fraction = 0.0
    """Probability of a vertical flip."""
    interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    """Interpolation of training images; random is bilinear or bicubic, drawn for each image."""
    color_jitter: Annotated[float, Ge(0), Le(100)] = 0.0
    """Strength of brightness, contrast and saturation jitter; as in timm, not used together with an
    auto_augment other than 3a."""
    auto_augment: str | None = None
    """A timm policy: rand-m9-mstd0.5-inc1, augmix-m3-w3, original, 3a, ..., or trivial (torchvision's
    TrivialAugmentWide)."""
    aug_splits: Annotated[int, Ge(1), Le(100)] = 1
    """AugMix training: views of each image, compared by the Jensen-Shannon loss (--aug-splits of timm). All
    have the same crop and flip; the first has no other augmentation. The paper uses 3; 1 is off. batch_size
    counts images."""
    random_erasing: Fraction = 0.0
    """Probability of erasing a rectangle."""
    random_erasing_mode: Literal["const", "rand", "pixel"] = "pixel"
    """Fill of the rectangle: zero, one random color, or noise per pixel."""
    random_erasing_count: Annotated[int, Ge(1), Le(1000)] = 1
    """Largest number of rectangles per image."""
    mixup: MixingAlpha = 0.0
    """Mixup alpha; 0 is off."""
    cutmix: MixingAlpha = 0.0
    """CutMix alpha; 0 is off."""
    cutmix_minmax: Annotated[tuple[Fraction, Fraction], Predicate(_is_rising)] | None = None
    """CutMix with a rectangle whose sides are drawn between these fractions of the image's, in place of an
    area drawn by alpha; it switches CutMix on. null is off."""
    mixup_prob: Fraction = 1.0
    """Probability of mixing a batch (pair, element)."""
    mixup_switch_prob: Fraction = 0.5
    """Probability of CutMix if both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """Images that share a mixing weight: the batch, a pair, or none (elem). pair and elem, which mix image by
    image, wait for the GPU once per batch."""
    mixup_until: Annotated[int, Ge(0)] | None = None
    """First epoch without mixing; null is none."""
    repeated_augmentation: Count = 1
    """Repeated augmentation: views of one image in a global batch; an epoch keeps its length (DeiT uses
    3)."""


@dataclass
class ScheduleConfig:
    """Training: length, batch size, optimizer, learning rate, regularization and augmentation."""

    epochs: Count = 300
    """Passes over the training set."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps, before the last epoch; schedules keep their length."""
    batch_size: Count = 1024
    """Images per optimizer step, over all ranks and accumulation steps."""
    accumulation: Count = 1
    """Gradient accumulation: micro-batches per step and rank."""
    trainable: Literal["all", "head", "attention"] = "all"
    """Parameters to train: all, the classifier, or the attention modules and the classifier. The others are
    frozen, in evaluation mode."""
    optimizer: str = "adamw"
    """A name known to timm.optim: adamw, sgd, lamb, lion, ..."""
    lr: Positive = 1e-3
    """Peak learning rate, for lr_batch_size if that is set, else for batch_size."""
    lr_batch_size: Count | None = None
    """Batch size that lr refers to; the learning rate is scaled to batch_size by lr_scaling."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """Scaling of the learning rate with the batch size: proportional, or by the square root of the ratio."""
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    """Betas of Adam-like optimizers."""
    momentum: Rate = 0.9
    """Momentum of SGD-like optimizers."""
    dampening: Fraction = 0.0
    """Dampening of the momentum (SGD)."""
    eps: Positive | None = None
    """Epsilon of the optimizer; null is its default."""
    optimizer_options: dict[str, PlainValue] | None = None
    """Further keyword arguments of the optimizer, e.g. {amsgrad: true}; null is none."""
    weight_decay: NonNegative = 0.05
    """Weight decay; none on embeddings, norms, bias tables and the head's bias."""
    decay_biases: bool = False
    """Apply weight decay to the biases of linear and convolution layers too (except the head's), as the
    paper's code does."""
    layer_decay: PositiveFraction | None = None
    """Factor on the learning rate per layer, from the head down; null is 1."""
    layer_decay_min: Fraction = 0.0
    """layer_decay: smallest factor of a layer."""
    clip_grad: Positive | None = None
    """Gradient clipping threshold; null is off."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """Clip by global norm, by value, or adaptively (AGC)."""
    scheduler: Literal["cosine", "step", "multistep", "poly", "constant"] = "cosine"
    """Learning-rate schedule after warm-up, updated every step; poly is linear."""
    min_lr: NonNegative = 1e-6
    """Learning rate at the last step (cosine, poly)."""
    warmup_epochs: NonNegative = 5.0
    """Length of the linear warm-up, in epochs; fractions are allowed."""
    warmup_factor: Fraction = 0.002
    """Learning rate at the first step, as a fraction of the peak."""
    warmup_prefix: bool = True
    """cosine and poly start at the peak after the warm-up; if false, they start with the run and the warm-up
    replaces their first part, as in the code of the paper and of DeiT."""
    decay_epochs: Positive = 30.0
    """scheduler step: epochs between two drops."""
    decay_milestones: Annotated[list[Positive], Predicate(_is_ascending)] | None = None
    """scheduler multistep: epochs at which the learning rate drops, e.g. [30, 60]."""
    decay_rate: Positive = 0.1
    """scheduler step and multistep: factor of a drop."""
    cooldown_epochs: Annotated[int, Ge(0)] = 0
    """Epochs after the schedule, in addition to epochs: at min_lr (cosine, poly), or with the
    schedule continued."""
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    """Cross-entropy over classes, or binary cross-entropy per class (DeiT III)."""
    bce_threshold: Rate | None = None
    """loss bce: the target of a class is 1 if its probability is above this threshold, else 0 (timm's
    target_threshold); null is 0 without label smoothing, and soft targets with it."""
    class_weights: Literal["none", "balanced"] | list[ClassWeight] = "none"
    """Weights of the classes in the loss: none; balanced: inversely proportional to their number of training
    images; or a list with one number per class, in the order of the classes. Evaluation does not use them."""
    label_smoothing: Rate = 0.1
    """Probability mass spread over all classes."""
    distillation: Literal["none", "soft", "hard"] = "none"
    """Distillation (DeiT): learn from the labels and a teacher, from its probabilities (soft) or its most
    probable class (hard)."""
    teacher: str | None = None
    """Teacher of the distillation: a run's folder, a checkpoint, safetensors, a published checkpoint, or
    timm/<name>."""
    teacher_weights: str | None = None
    """Weights of a teacher timm/<name>: a file, or `pretrained` to download them, for the command line
    alone."""
    teacher_released_config: str | None = None
    """The configuration published with the checkpoint in teacher."""
    distillation_alpha: Fraction = 0.5
    """Weight of the teacher's loss; the loss of the labels has the weight 1 - distillation_alpha."""
    distillation_temperature: Annotated[float, Ge(0.01), Le(1000)] = 1.0
    """distillation soft: temperature of both distributions."""
    ema_decay: Rate | None = None
    """Decay per step of the exponential moving average of the weights; null is off."""
    ema_warmup: bool = False
    """Start the average with a small decay that grows to ema_decay."""
    patience: Count | None = None
    """Early stopping: end the run after this many evaluations without a better one; null is off."""
    best_metric: Literal["top1", "top5", "loss", "balanced_accuracy", "f1"] = "top1"
    """Metric on the validation set that chooses the best evaluation; f1 is the macro average."""
    random_shift_until: Fraction = 0.75
    """Random shift ends after this fraction of the epochs: all eight neighbors are used from there on."""
    progressive_resizing: (
        Annotated[list[tuple[Rate, ImageSize] | tuple[Rate, ImageSize, Count]], Predicate(_is_resizing_plan)]
        | None
    ) = None
    """Progressive resizing: size of the training images in pixels from a fraction of the epochs on, e.g.
    [[0, 160], [0.6, 224]] or [[0, [80, 112]], [0.6, [160, 224]]]; null is image_size throughout. Evaluation
    always uses image_size. A third number is the global batch size from there on: [[0, 128, 2048], [0.5, 224,
    1024]]; without it, that of the entry before, at first batch_size."""
    random_sizes: Annotated[list[ImageSize], Predicate(_is_not_empty)] | None = None
    """Multi-scale training: sizes of the training images in pixels, of which each step draws one, e.g. [160,
    192, 224]; null is image_size throughout. Evaluation always uses image_size."""
    scale_lr_with_batch_size: bool = False
    """Scale the learning rate with the batch size of progressive_resizing, by lr_scaling; lr is for
    batch_size."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation of the training images."""

    @property
    def total_epochs(self) -> int:
        """Epochs of the run: those of the schedule and of the cool-down."""
        return self.epochs + self.cooldown_epochs


@dataclass
class DataConfig:
    """The data set and the evaluation transform."""

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
    val_fraction: Annotated[float, Gt(0), Lt(1)] | None = None
    """Hold out this fraction of each class for validation, for a data set without a validation split
    (folder: root/<class>/... or root/train/<class>/...; zip, tar, wds). The images of a run are listed in
    split.txt in its folder."""
    val_seed: Annotated[int, Ge(0)] = 0
    """Seed of val_fraction: the same images for the same seed, in every run and on every machine."""
    val_list: str | None = None
    """Hold out the images named in this text file for validation, one a line, as list_file; split.txt of a
    run is such a file."""
    download: bool = False
    """Download a timm data set (torch/..., hfds/...) if it is missing; for the command line alone."""
    workers: Annotated[int, Ge(0), Le(MAX_WORKERS)] = 4
    """Data workers per rank, at most one per core; 0 loads images in the training process."""
    index: str | None = None
    """Folder for the indexes of data sets (folder, zip, tar, wds), which are then listed once; null is
    $XDG_CACHE_HOME/vil or ~/.cache/vil, for 20,000 images or more; off lists the images at every start. A
    folder is for the command line alone."""
    unreadable_images: Literal["fail", "skip"] = "fail"
    """An image that cannot be read ends the program, or is skipped: in training it is replaced by the next
    one and listed in bad_images.txt in the run's folder; in evaluation it is counted and reported."""
    max_unreadable_fraction: Fraction = 0.001
    """unreadable_images skip: largest fraction of the training images that may be unreadable, at least one
    image unless it is 0; more end the run."""
    train_fraction: PositiveFraction = 1.0
    """Train on this fraction of each class; a larger fraction includes the images of a smaller one."""
    images_per_class: Count | None = None
    """Train on at most this many images of each class; null is all."""
    list_file: str | None = None
    """Train on the images named in this text file, one a line: paths below the split, or plain file names."""
    balanced_sampling: bool = False
    """Draw the training images such that all classes are equally frequent; an epoch keeps its length."""
    ffcv_order: Literal["random", "quasi_random"] = "random"
    """source ffcv: order of an epoch. quasi_random reads adjacent pages of the file together, for files
    larger than the memory."""
    crop_pct: Annotated[float, Ge(0.01), Le(1)] = 0.875
    """Evaluation: image_size / crop_pct is the short side before the center crop, or, if image_size is not
    square, the size that the image is resized to cover."""
    crop_mode: Literal["center", "squash", "border"] = "center"
    """Evaluation, as in timm: center covers that size and crops the center; squash resizes both sides to it,
    whatever the aspect ratio; border fits the whole image into it and pads with the mean color."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    """Evaluation: interpolation of that resize."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the channels, for values in 0..1."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Standard deviation of the channels, for values in 0..1."""
    real_labels: str | None = None
    """Evaluation on ImageNet's validation images: the file real.json of their reassessed labels (ReaL,
    https://github.com/google-research/reassessed-imagenet), for the metric real_top1."""


TRANSFORM_OPTIONS = ("crop_pct", "crop_mode", "interpolation", "mean", "std")
"""Options of the data section that define the evaluation transform; they are stored with the weights."""


def check_border_color(data: DataConfig) -> None:
    """Raise UserError if `crop_mode` border would pad with a `mean` outside 0..1."""
    if data.crop_mode == "border" and not all(0 <= value <= 1 for value in data.mean):
        values = ", ".join(f"{value:g}" for value in data.mean)
        reason = f"border pads with the color data.mean, which must be between 0 and 1, got {values}"
        raise UserError("data.crop_mode", reason)


@dataclass
class TrainConfig:
    """Train a model. Without arguments: a small Vision Longformer on the bundled digits."""

    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output: str | None = None
    """Folder of the run; null is runs/<data source>."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues the run in the output folder; never refuses a folder that contains one."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of all random draws."""
    device: str = "auto"
    """auto, cpu or cuda; under torchrun each rank takes its own GPU."""
    precision: Precision | None = None
    """Mixed precision by autocast, float16 with loss scaling; null is bfloat16 on a GPU that has it, else
    float32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    compile_backend: str | None = None
    """compile: a backend of torch.compile, e.g. aot_eager; null is inductor."""
    compile_mode: (
        Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None
    ) = None
    """compile: mode of the backend inductor; null is default. reduce-overhead and max-autotune, which record
    CUDA graphs, are refused."""
    channels_last: bool = False
    """Keep images and convolution weights in channels-last order."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    deterministic: bool = False
    """Use deterministic algorithms only: repeated runs on one GPU are bit-identical. On a CPU they always
    are."""
    log_every: Count = 10
    """Steps between two logged steps."""
    eval_every: Count = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    save_every: Count | None = None
    """Steps between two checkpoints, in addition to those after each epoch; SIGUSR1 requests one at any
    time."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep, in addition to the best."""
    max_skipped_steps: Annotated[int, Ge(0)] = 20
    """Steps with a non-finite loss or gradient are skipped; more than this number in a row end the run."""
    spike_threshold: Positive | None = 6.0
    """A loss this many standard deviations above the mean of the last 100 steps is logged with the images
    of its batch; null is off."""
    start_timeout: Seconds = 600.0
    """Several processes: seconds that the start waits for the other ranks before it ends with status 1."""
    hang_timeout: Seconds = 600.0
    """Seconds without progress after which each rank prints where it hangs."""
    hang_action: Literal["report", "exit"] = "report"
    """After hang_timeout: report keeps waiting, exit ends the process with status 1; the same command
    continues the run."""
    grace_period: Seconds = 120.0
    """Seconds for the last step and its checkpoint after SIGTERM or Ctrl-C, before the process exits
    unsaved."""
    attention_every: Count | None = 10
    """Epochs between two images of attention maps in TensorBoard, with one at the end; null is off. Not
    available for timm models."""
    loggers: list[Logger] = field(default_factory=lambda: ["tensorboard"])
    """Logs in addition to metrics.jsonl: TensorBoard, metrics.csv, Weights & Biases and MLflow, the last two
    if their packages are installed, and from the command line alone; [] is none."""
    progress: bool = True
    """Show progress on rank 0: bars in a terminal, otherwise a line per minute."""
    eval_sets: list[str] = field(default_factory=list)
    """Further data sets to evaluate on with the validation set, as eval.py's datasets: folders of class
    folders, or YAML files of the section data. They are logged, and never choose the best checkpoint."""


@dataclass
class EvalConfig:
    """Evaluate checkpoints: Top-1, Top-5, parameters, FLOPs, memory, images per second."""

    checkpoint: list[str] | None = None
    """Run folders or files: of train.py, safetensors, or published; several may be given."""
    weights: Literal["auto", "raw", "ema"] = "auto"
    """Weights of a checkpoint: raw or their moving average (ema); auto is the more accurate one."""
    run_checkpoint: Literal["best", "last"] = "best"
    """Checkpoint of a run's folder."""
    released_config: str | None = None
    """The configuration published with the checkpoint: gives architecture, image size, crop, interpolation
    and normalization; options of the command line override it."""
    complexity: bool = False
    """Report parameters, FLOPs and memory only, without data."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    datasets: list[str] | None = None
    """Data sets to evaluate on instead of that of data: folders of class folders (ImageNet's val, -V2, -A,
    -R, -Sketch, -C or one of its corruptions), or YAML files of the section data."""
    match_classes: Literal["names", "position"] = "names"
    """Match the classes of the data with the rows of the head by name, or by position (class k is row k) if
    the checkpoint has no class names."""
    batch_size: Count = 128
    """Images per forward pass and rank; halved when the GPU runs out of memory."""
    tta: Literal["none", "hflip", "five_crop", "ten_crop"] = "none"
    """Test-time augmentation: mean logits of the image and its mirror image, of the center and the four
    corners, or of these five and their mirror images."""
    tta_scales: Annotated[list[Annotated[float, Ge(0.1), Le(10)]], Predicate(_is_not_empty)] = field(
        default_factory=lambda: [1.0]
    )
    """Test-time augmentation: mean logits over these factors on the size before the crop, image_size /
    data.crop_pct."""
    json: str | None = None
    """Write the results to this JSON file, with precision, recall and F1 of each class."""
    csv: str | None = None
    """Write the results to this CSV file: a row per checkpoint and data set, columns as in the JSON file."""
    per_class_csv: str | None = None
    """Write precision, recall, F1 and images of each class to this CSV file."""
    confusion_csv: str | None = None
    """Write the confusion matrix to this CSV file: rows are classes of images, columns predictions."""
    device: str = "auto"
    """auto, cpu or cuda."""
    start_timeout: Seconds = 600.0
    """Several processes: seconds that the start waits for the other ranks before it ends with status 1."""
    precision: Precision = "float32"
    """Precision of the forward pass."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = False
    """Keep images and convolution weights in channels-last order."""
    deterministic: bool = False
    """Use deterministic algorithms only."""
    progress: bool = True
    """Show progress on rank 0: bars in a terminal, otherwise a line per minute."""


RENAMED_OPTIONS = {
    "schedule.sizes": "schedule.progressive_resizing",
    "schedule.augment.repeats": "schedule.augment.repeated_augmentation",
    "data.on_error": "data.unreadable_images",
    "data.max_bad": "data.max_unreadable_fraction",
    "sets": "datasets",
    "which": "run_checkpoint",
    "tensorboard": "loggers",
}
"""Names of options of earlier versions -> current names; files with the old names are still read."""

RENAMED_VALUES: dict[str, dict[bool, list[str]]] = {
    "tensorboard": {True: ["tensorboard"], False: []},
}
"""Earlier name -> its values -> the current values."""
