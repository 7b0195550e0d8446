"""Every setting of a run, once: TOML keys, flags, help and the docs' table all come from these dataclasses.

An unset value (None) means "as the source, the model or the preset says"; `resolve` fills in what does not need them.
"""

from dataclasses import dataclass
from typing import Any

from pdvit.config.keys import key
from pdvit.config.presets import PRESETS, VARIANTS

SCHEDULES = ("cosine", "poly", "wsd", "tanh", "constant")
MIXUP_MODES = ("batch", "pair", "elem")
# Of timm's, those that bytes can be scaled with, and that its vision transformers ask for.
INTERPOLATIONS = ("bilinear", "bicubic")
CROP_MODES = ("center", "squash")


@dataclass(frozen=True)
class DataConfig:
    """Data."""

    source: str = key("digits", "Where images come from: a name, folder, tar or table; help lists all.", "--data")
    root: str | None = key(None, "Where data sets that go by a name lie (torch/, hfds/).", "--data-dir")
    train_split: str | None = key(None, "Split to learn from; unset: train.", "--train-split")
    val_split: str | None = key(
        None, "Split to validate on; unset: val or validation, or else a tenth of train.", "--val-split"
    )
    input_key: str | None = key(None, "Where a data set of a hub has its images; unset: image.", "--input-key")
    target_key: str | None = key(None, "Where a data set of a hub has its labels; unset: label.", "--target-key")
    download: bool = key(False, "Download a data set that goes by a name.", "--dataset-download")
    on_bad_image: str = key(
        "error",
        "An image that does not decode ends the run, or is skipped and counted.",
        "--on-bad-image",
        choices=("error", "skip"),
    )
    batch_size: int = key(
        32,
        "Images per update, in total (timm's is per process); auto: as many as a GPU holds.",
        "--batch-size",
        "-b",
        minimum=1,
        words={"auto": 0},
    )
    micro_batch: int | None = key(
        None,
        "Images per forward pass of a process; fewer than its share accumulates gradients. Unset: its share.",
        "--micro-batch-size",
        minimum=1,
    )
    img_size: int | None = key(None, "Side of the square input in pixels.", "--img-size", minimum=1)
    mean: tuple[float, float, float] | None = key(
        None, "Mean of the channels, of 1; this and the next four unset: as the model's configuration says.", "--mean"
    )
    std: tuple[float, float, float] | None = key(None, "Standard deviation of the channels.", "--std", above=0)
    crop_pct: float | None = key(
        None, "Share of the side that the centre crop keeps (image files).", "--crop-pct", above=0, maximum=2
    )
    interpolation: str | None = key(None, "How images are resized.", "--interpolation", choices=INTERPOLATIONS)
    crop_mode: str | None = key(
        None, "What becomes of held-out images that are not square.", "--crop-mode", choices=CROP_MODES
    )
    workers: int = key(2, "Processes that decode image files.", "--workers", "-j", minimum=0)
    resident: str = key(
        "auto",
        "Decode image files once and keep the pixels on the device: auto (where they are small), on or off.",
        "--resident",
        choices=("auto", "on", "off"),
    )
    split_seed: int = key(0, "Which images of a source without splits are held out.", minimum=0, maximum=2**32 - 1)


@dataclass(frozen=True)
class ModelConfig:
    """Model."""

    name: str | None = key(
        None, "Any timm vision transformer; unset: that of --init, or a small one of ours.", "--model"
    )
    init: str | None = key(
        None, "Weights to begin with: a run, a timm folder, a file, or a model that timm publishes.", "--init"
    )
    weights: str | None = key(
        None, "Which of --init, where it holds both; unset: the moving average.", "--weights", choices=("raw", "ema")
    )
    init_hash: str | None = key(None, "Hash of the weights of --init; set by the run, so that others are refused.")
    freeze: str | None = key(
        None,
        "Of --init, keep as they are: the embedding and the first N blocks, or backbone: all but the heads.",
        "--freeze",
        number=True,
    )
    depth: int | None = key(None, "Number of blocks.", "--depth", minimum=1)
    width: int | None = key(None, "Length of a token.", "--width", minimum=1)
    heads: int | None = key(None, "Attention heads per block.", "--heads", minimum=1)
    patch_size: int | None = key(None, "Side of a patch in pixels.", "--patch-size", minimum=1)
    drop_path: float | None = key(
        None, "Stochastic depth of the last block; unset: 0, or that of --init.", "--drop-path", minimum=0, maximum=0.99
    )
    grad_checkpointing: bool = key(
        False, "Compute activations twice instead of keeping them: less memory, more time.", "--grad-checkpointing"
    )
    args: dict[str, object] | None = key(
        None, "More arguments of the timm model, k=v; repeat the flag.", "--model-kwargs"
    )


def _weight(term: str) -> Any:
    return key(None, f"Weight of the {term} term; unset: the preset's.", f"--{term}", minimum=0)


def _weight_schedule(term: str) -> Any:
    how = f"Course of the {term} weight: constant, warmup:3ep, decay:10%, until:200st; several with commas."
    return key("constant", how, f"--{term}-schedule")


@dataclass(frozen=True)
class DiversityConfig:
    """Diversity."""

    preset: str = key(
        "paper",
        "Weights and form of the terms; cutmix: the mixed images without any term; none: neither.",
        "--diversity",
        choices=tuple(PRESETS),
    )
    variant: str | None = key(
        None,
        "Form of the cosine, contrastive and mixing terms; unset: the preset's, or paper.",
        "--variant",
        choices=VARIANTS,
    )
    cosine: float | None = _weight("cosine")
    contrastive: float | None = _weight("contrastive")
    mixing: float | None = _weight("mixing")
    koleo: float | None = _weight("koleo")
    spectral: float | None = _weight("spectral")
    cosine_schedule: str = _weight_schedule("cosine")
    contrastive_schedule: str = _weight_schedule("contrastive")
    mixing_schedule: str = _weight_schedule("mixing")
    koleo_schedule: str = _weight_schedule("koleo")
    spectral_schedule: str = _weight_schedule("spectral")
    first: str | None = key(
        None,
        "First layer: block (the first one with last's grid), embed (what enters the blocks), patches (without "
        "positions), or a block's number; unset: the preset's.",
        "--first",
        number=True,
    )
    last: str | None = key(
        None,
        "Last layer: norm (after the final norm) or block (before it); unset: the preset's.",
        "--last",
        choices=("norm", "block"),
    )
    cosine_layers: str = key(
        "", "More blocks whose patches the cosine term sees: 6,12.", "--cosine-layers", number=True
    )
    patch_head: str | None = key(
        None,
        "Head of the mixing term: own, or class (the model's own classifier); unset: the preset's.",
        "--patch-head",
        choices=("own", "class"),
    )


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation."""

    cutmix: float | None = key(
        None,
        "Alpha of the patch-aligned CutMix, 0 is off; unset: 1 with the mixing term or preset cutmix.",
        "--cutmix",
        minimum=0,
    )
    mixup: float = key(0.0, "Alpha of Mixup, 0 is off.", "--mixup", minimum=0)
    mixup_prob: float = key(0.5, "Share of batches that are mixed.", "--mixup-prob", minimum=0, maximum=1)
    mixup_switch_prob: float = key(
        0.5, "Share of mixed batches that CutMix takes, with Mixup on too.", "--mixup-switch-prob", minimum=0, maximum=1
    )
    mixup_mode: str = key(
        "batch", "One draw for the batch, for each pair or for each image.", "--mixup-mode", choices=MIXUP_MODES
    )
    shift: int = key(0, "Move the image by up to so many pixels each way.", "--shift", minimum=0, maximum=1024)
    scale: tuple[float, float] | None = key(
        None,
        "Area of the random crop, least and most; unset: 0.35 1 for image files, no crop for digits.",
        "--scale",
        above=0,
        maximum=1,
    )
    ratio: tuple[float, float] = key(
        (0.75, 4 / 3), "Width to height of the random crop, least and most.", "--ratio", above=0, maximum=100
    )
    hflip: float | None = key(
        None,
        "Probability of a horizontal flip; unset: 0.5 for image files, 0 for digits.",
        "--hflip",
        minimum=0,
        maximum=1,
    )
    auto_augment: str = key("", "RandAugment in timm's words, such as rand-m9-mstd0.5-inc1; empty: none.", "--aa")
    color_jitter: float = key(
        0.0,
        "Strength of the jitter of brightness, contrast and saturation; as in timm, not with --aa.",
        "--color-jitter",
        minimum=0,
        maximum=10,
    )
    reprob: float = key(0.0, "Probability of erasing a rectangle (by noise).", "--reprob", minimum=0, maximum=1)
    smoothing: float = key(0.0, "Label smoothing of images and patches.", "--smoothing", minimum=0, maximum=0.99)


@dataclass(frozen=True)
class SegmentConfig:
    """Segmentation."""

    head: str | None = key(
        None, "Label every pixel, with this head; unset: classify images.", "--head", choices=("upernet", "linear")
    )
    width: int = key(512, "Channels inside the head (upernet).", "--head-width", minimum=8)
    aux: float = key(0.4, "Weight of the auxiliary head's loss (upernet); 0: no such head.", "--aux", minimum=0)
    norm: str | None = key(
        None,
        "Norm inside the head (upernet); unset: batch, or group where a forward pass has a single image.",
        "--head-norm",
        choices=("batch", "group"),
    )
    classes: str | None = key(
        None, "Table of the classes (name, id, colour) of folders of masks; unset: classes.tsv there.", "--classes"
    )
    check_masks: bool = key(False, "Read every mask before the start.", "--check-masks")
    crop: int | None = key(
        None, "Side of training crops and of evaluation windows in pixels; unset: the image size.", "--crop", minimum=8
    )
    short_side: int | None = key(
        None, "Scale images to this short side, before the jitter too; unset: as they are.", "--short-side", minimum=8
    )
    jitter: tuple[float, float] = key(
        (0.5, 2.0), "Factors of the short side in training, least and most.", "--jitter", above=0, maximum=16
    )
    max_share: float = key(
        0.75, "Draw a crop again where one class covers more; 1: never.", "--cat-max-ratio", above=0, maximum=1
    )
    photometric: bool = key(True, "Jitter brightness, contrast, saturation and hue.", "--photometric/--no-photometric")
    mode: str | None = key(
        None,
        "Evaluate whole images, or windows of them; unset: windows for plain models and those of one size.",
        "--eval-mode",
        choices=("whole", "slide"),
    )
    stride: int | None = key(
        None, "Pixels from window to window; unset: two thirds of a window.", "--stride", minimum=1
    )


@dataclass(frozen=True)
class OptimConfig:
    """Optimization."""

    opt: str = key("adamw", "Any timm optimizer.", "--opt")
    lr: float | None = key(
        None,
        "Peak learning rate; unset: 1e-3, or 5e-4 x batch / 512 with --model (with --init a tenth of that; "
        "of segmentation 6e-5 x batch / 16).",
        "--lr",
        above=0,
    )
    weight_decay: float = key(0.05, "Weight decay.", "--weight-decay", minimum=0)
    clip_grad: float | None = key(None, "Largest norm of the gradient; unset: any.", "--clip-grad", above=0)
    epochs: str = key("24", "Length: 24 or 24ep, 2000st, 1e6im.", "--epochs", above=0, unit="ep", percent=False)
    warmup: str = key("5%", "Linear warm-up: 3ep, 200st, 5%.", "--warmup-epochs", minimum=0, unit="ep")
    schedule: str = key("cosine", "Learning rate after warm-up.", "--sched", choices=SCHEDULES)
    layer_decay: float | None = key(
        None, "Factor of the learning rate from block to block, downwards.", "--layer-decay", above=0, maximum=1
    )
    ema_decay: float | None = key(
        None,
        "Decay of the moving average of the weights, which is then what is evaluated and exported; unset: none.",
        "--model-ema-decay",
        minimum=0,
        maximum=1,
    )
    min_lr: float = key(1e-6, "Where warm-up starts and the schedule ends.", "--min-lr", minimum=0)


@dataclass(frozen=True)
class RunConfig:
    """Run."""

    out: str | None = key(None, "Run directory; unset: runs/NAME, with a suffix where taken.", "--out")
    name: str | None = key(None, "Name under runs/; unset: SOURCE-PRESET, or SOURCE-from-INIT.", "--name")
    seed: int = key(0, "Seed of weights, order and augmentation.", "--seed", minimum=0, maximum=2**63 - 1)
    device: str = key("auto", "auto, cpu, cuda or cuda:N.", "--device")
    precision: str = key("fp32", "Autocast of forward passes.", "--precision", choices=("fp32", "bf16", "fp16"))
    tf32: bool = key(True, "Let a GPU round the factors of float32 products in training (TF32).", "--tf32/--no-tf32")
    compile: bool = key(False, "Compile the model and the losses (torch.compile).", "--compile")
    deterministic: bool = key(
        False, "Take only kernels that give the same bits each time (a CPU always does).", "--deterministic"
    )
    distribute: str = key(
        "ddp",
        "Over several processes: ddp keeps the model whole on each, fsdp spreads it over all.",
        "--distribute",
        choices=("ddp", "fsdp"),
    )
    time_limit: str | None = key(
        None,
        "Stop, resumable, after this time: 90min, 12h; a bare number is minutes.",
        "--time-limit",
        above=0,
        unit="min",
        clock=True,
    )
    stop_after: str | None = key(
        None, "Stop, resumable, once this much of the run is done: 300ep.", "--stop-after", above=0, unit="ep"
    )
    log_every: str = key("10st", "Steps between records of training.", "--log-interval", above=0, unit="st")
    eval_every: str = key("1ep", "Length between evaluations, with the probe.", "--val-interval", above=0, unit="ep")
    warn_similarity: float = key(
        0.9, "Warn where P of the last layer on the probe is above this.", "--warn-similarity", minimum=0, maximum=1
    )
    track: str | None = key(
        None, "Send the records to tensorboard, wandb or trackio too; several with commas.", "--track"
    )
    profile: str | None = key(None, "Write a trace of these steps: FROM:TO, as 20:25.", "--profile")
    probe_images: int = key(64, "Held-out images on which P is measured at every evaluation.", minimum=1)


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoint."""

    every: str = key(
        "10min", "Length between resumable states: 50st, 1ep, 10min.", "--save-every", above=0, unit="ep", clock=True
    )
    keep: int = key(1, "How many of the newest are kept.", "--keep", minimum=1)
    best: bool = key(False, "Keep the one with the best evaluation too.", "--keep-best")
    milestones: str | None = key(
        None, "Keep one for good each time this length is done: 30ep.", "--milestone-every", above=0, unit="ep"
    )


@dataclass(frozen=True)
class Config:
    """All sections; the attribute names are the TOML tables."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    diversity: DiversityConfig = DiversityConfig()
    augment: AugmentConfig = AugmentConfig()
    segment: SegmentConfig = SegmentConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
