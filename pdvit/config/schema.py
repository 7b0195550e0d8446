"""Every setting of a run: TOML keys, flags, help and the docs' table all come from these dataclasses.

An unset value (None) is filled in by `resolve`, or later from the source and the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, get_args, get_type_hints

TERMS = ("cosine", "contrastive", "mixing", "koleo", "spectral", "gram")
# paper: arXiv 2104.12753 v3; v1: its first version; released: ChengyueGongR/PatchVisionTransformer at b70ee23;
# diverse-vit: VITA-Group/Diverse-ViT, reg.py. docs/losses.md has them side by side.
VARIANTS = ("paper", "v1", "released", "diverse-vit")
# paper: arXiv 2508.10104; the others: options of facebookresearch/dinov3, dinov3/loss/gram_loss.py at 6876159.
GRAM_VARIANTS = ("paper", "remove-neg", "remove-only-teacher-neg", "batch")
SCHEDULES = ("cosine", "poly", "wsd", "tanh", "constant")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
MIXUP_MODES = ("batch", "pair", "elem")
# Some of timm's. Known here, because their completion must not wait for the import of timm.
OPTIMIZERS = ("adamw", "adam", "nadamw", "radamw", "lamb", "lars", "lion", "adan", "muon", "adafactorbv", "sgd")
INTERPOLATIONS = ("bilinear", "bicubic")  # the modes of timm that its vision transformers use and torch can do on bytes
CROP_MODES = ("center", "squash")
LAUNCHERS = ("none", "local", "slurm")
MINUTES = {"above": 0, "unit": "min", "clock": True}  # limits of a key that is a time
PREPROCESSING = ("mean", "std", "crop_pct", "interpolation", "crop_mode")  # settings of `data` that a model has too
OF_CHECKPOINTS = (  # settings with which a checkpoint is opened
    *("data.img_size", "data.mean", "data.std", "data.crop_pct", "data.interpolation"),
    *("model.depth", "model.width", "model.heads", "model.patch_size", "model.args", "run.precision"),
)


@dataclass(frozen=True)
class Key:
    """A setting of the schema: its section, name, type (without None), default, help, flags and allowed values."""

    section: str
    name: str
    type: Any
    default: Any
    help: str
    flags: tuple[str, ...]
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None  # an exclusive minimum
    choices: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()  # some of many values, for the shell's completion
    unit: str = ""  # of a bare number, if the key is a duration
    percent: bool = True  # whether a duration may be a percentage of the run
    clock: bool = False  # whether a duration may be a time, such as 10min
    words: Mapping[str, int] = field(default_factory=dict)  # words for numbers

    def describe_range(self) -> str:
        """Return the range of a number as text."""
        low = f"above {self.above:g}" if self.above is not None else ""
        low = f"at least {self.minimum:g}" if self.minimum is not None else low
        high = f"at most {self.maximum:,}" if self.maximum is not None else ""
        return " and ".join(part for part in (low, high) if part)


def key(default: Any, help: str, *flags: str, **limits: Any) -> Any:
    """Declare a setting; `limits` are the other fields of `Key`."""
    return field(default=default, metadata={"help": help, "flags": flags, **limits})


# Defaults of the diversity section; docs/losses.md has the sources of the weights.
NO_TERMS = {"variant": "paper", "first": "block", "last": "norm", "patch_head": "own"} | dict.fromkeys(TERMS, 0.0)
ALL = {"cosine": 1.0, "contrastive": 1.0, "mixing": 1.0}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": NO_TERMS | ALL,
    "v1": NO_TERMS | ALL | {"variant": "v1"},
    "released": NO_TERMS | ALL | {"variant": "released", "cosine": 0.0, "first": "patches"},
    "diverse-vit": NO_TERMS
    | {"variant": "diverse-vit", "cosine": 0.5, "contrastive": 0.5, "mixing": 1.0}
    | {"first": "embed", "last": "block", "patch_head": "class"},
    "koleo": NO_TERMS | {"koleo": 1.0},
    "spectral": NO_TERMS | {"spectral": 1.0},
    "cutmix": NO_TERMS,  # the control: images are mixed as with the mixing term
    "none": NO_TERMS,
}


@dataclass(frozen=True)
class DataConfig:
    """Data."""

    source: str = key("digits", "Images: a name, folder, tar or table; 'help' lists all.", "--data")
    root: str | None = key(None, "Folder of the data sets torch/ and hfds/.", "--data-dir")
    train_split: str | None = key(None, "Training split; unset: train.", "--train-split")
    val_split: str | None = key(None, "Validation split; unset: val, validation or a tenth of train.", "--val-split")
    input_key: str | None = key(None, "Column of the images (hfds/); unset: image.", "--input-key")
    target_key: str | None = key(None, "Column of the labels (hfds/); unset: label.", "--target-key")
    download: bool = key(False, "Download the data set (torch/, hfds/).", "--dataset-download")
    on_bad_image: str = key(
        "error", "Policy for images that do not decode.", "--on-bad-image", choices=("error", "skip")
    )
    batch_size: int = key(
        32, "Images per update, in total; auto: all that fit.", "--batch-size", "-b", minimum=1, words={"auto": 0}
    )
    micro_batch: int | None = key(None, "Images per pass of a process; unset: all.", "--micro-batch-size", minimum=1)
    img_size: int | None = key(None, "Side of the square input in pixels.", "--img-size", minimum=1)
    mean: tuple[float, float, float] | None = key(None, "Means; unset, like all preprocessing: the model's.", "--mean")
    std: tuple[float, float, float] | None = key(None, "Channel standard deviations.", "--std", above=0)
    crop_pct: float | None = key(None, "Centre-crop fraction (image files).", "--crop-pct", above=0.05, maximum=2)
    interpolation: str | None = key(None, "Resize interpolation.", "--interpolation", choices=INTERPOLATIONS)
    crop_mode: str | None = key(None, "Crop or squash images in evaluation.", "--crop-mode", choices=CROP_MODES)
    workers: int | None = key(
        None, "Processes that decode images; unset: one per core, up to 16.", "--workers", "-j", minimum=0, maximum=1000
    )
    resident: str = key("auto", "Keep images on the device; auto: if few.", "--resident", choices=("auto", "on", "off"))
    split_seed: int = key(0, "Seed of the held-out images of a source without splits.", minimum=0, maximum=2**32 - 1)


@dataclass(frozen=True)
class ModelConfig:
    """Model."""

    name: str | None = key(None, "Any timm vision transformer; unset: that of --init, or a small one.", "--model")
    init: str | None = key(None, "Initial weights: a run, timm folder, file, or model of timm's hub.", "--init")
    weights: str | None = key(None, "Weights of --init; unset: ema, else raw.", "--weights", choices=("raw", "ema"))
    init_hash: str | None = key(None, "Hash of the weights of --init; set by the run, which rejects others.")
    freeze: str | None = key(None, "Freeze the embedding and N blocks, or the backbone.", "--freeze")
    depth: int | None = key(None, "Number of blocks.", "--depth", minimum=1, maximum=1000)
    width: int | None = key(None, "Embedding dimension.", "--width", minimum=1)
    heads: int | None = key(None, "Attention heads per block.", "--heads", minimum=1)
    patch_size: int | None = key(None, "Side of a patch in pixels.", "--patch-size", minimum=1)
    drop_path: float | None = key(
        None, "Stochastic depth of the last block; unset: 0, or that of --init.", "--drop-path", minimum=0, maximum=0.99
    )
    grad_checkpointing: bool = key(False, "Recompute activations: less memory, more time.", "--grad-checkpointing")
    args: dict[str, object] | None = key(None, "Argument of the timm model, k=v; repeatable.", "--model-kwargs")


def _weight(term: str) -> Any:
    return key(None, f"Weight of the {term} term; unset: the preset's.", f"--{term}", minimum=0)


def _schedule(term: str) -> Any:
    parts = "warmup:3ep, decay:10%, until:200st; several with commas"
    return key("constant", f"Schedule of the {term} weight: constant, {parts}.", f"--{term}-schedule")


@dataclass(frozen=True)
class DiversityConfig:
    """Diversity."""

    preset: str = key("paper", "Terms and variant; cutmix: only mixed images.", "--diversity", choices=tuple(PRESETS))
    variant: str | None = key(None, "Variant of three terms; unset: the preset's.", "--variant", choices=VARIANTS)
    cosine: float | None = _weight("cosine")
    contrastive: float | None = _weight("contrastive")
    mixing: float | None = _weight("mixing")
    koleo: float | None = _weight("koleo")
    spectral: float | None = _weight("spectral")
    gram: float | None = _weight("gram")
    cosine_schedule: str = _schedule("cosine")
    contrastive_schedule: str = _schedule("contrastive")
    mixing_schedule: str = _schedule("mixing")
    koleo_schedule: str = _schedule("koleo")
    spectral_schedule: str = _schedule("spectral")
    gram_schedule: str = _schedule("gram")
    gram_variant: str = key(
        "paper", "Variant of the gram term: the paper's, or of DINOv3's code.", "--gram-variant", choices=GRAM_VARIANTS
    )
    first: str | None = key(
        None,
        "First layer: block (the first, of the last stage), embed (input of the blocks), patches (without positions), "
        "or a block's number; unset: the preset's.",
        "--first",
    )
    last: str | None = key(None, "Last layer: norm or block; unset: the preset's.", "--last", choices=("norm", "block"))
    cosine_layers: str = key("", "More blocks for the cosine term: 6,12.", "--cosine-layers")
    patch_head: str | None = key(
        None, "Head of the mixing term; unset: the preset's.", "--patch-head", choices=("own", "class")
    )


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation."""

    cutmix: float | None = key(None, "CutMix alpha; 0: off; unset: 1 for mixing or cutmix.", "--cutmix", minimum=0)
    mixup: float = key(0.0, "Mixup alpha; 0 disables it.", "--mixup", minimum=0)
    mixup_prob: float = key(0.5, "Fraction of batches that are mixed.", "--mixup-prob", minimum=0, maximum=1)
    mixup_switch_prob: float = key(0.5, "CutMix fraction if both are on.", "--mixup-switch-prob", minimum=0, maximum=1)
    mixup_mode: str = key("batch", "One draw per batch, pair or image.", "--mixup-mode", choices=MIXUP_MODES)
    shift: int = key(0, "Largest random shift in pixels.", "--shift", minimum=0, maximum=1024)
    scale: tuple[float, float] | None = key(
        None, "Crop area range (min, max); unset: 0.35 1 for files, no crop for digits.", "--scale", above=0, maximum=1
    )
    ratio: tuple[float, float] = key((0.75, 4 / 3), "Crop aspect ratio range.", "--ratio", above=0, maximum=100)
    hflip: float | None = key(None, "Flip probability; unset: 0.5, for digits 0.", "--hflip", minimum=0, maximum=1)
    auto_augment: str = key("", "timm's RandAugment, such as rand-m9-mstd0.5-inc1; empty: off.", "--aa")
    color_jitter: float = key(0.0, "timm's colour jitter; not with --aa.", "--color-jitter", minimum=0, maximum=10)
    reprob: float = key(0.0, "Probability of random erasing (with noise).", "--reprob", minimum=0, maximum=1)
    smoothing: float = key(0.0, "Label smoothing of images and patches.", "--smoothing", minimum=0, maximum=0.99)


@dataclass(frozen=True)
class SegmentConfig:
    """Segmentation."""

    head: str | None = key(None, "Segmentation head; unset: classify images.", "--head", choices=("upernet", "linear"))
    width: int = key(512, "Channels of the head (upernet).", "--head-width", minimum=8)
    aux: float = key(0.4, "Loss weight of the auxiliary head (upernet); 0: no such head.", "--aux", minimum=0)
    norm: str | None = key(None, "UPerNet's norm; unset: batch if possible.", "--head-norm", choices=("batch", "group"))
    classes: str | None = key(None, "Class table of a mask folder; unset: its classes.tsv.", "--classes")
    check_masks: bool = key(False, "Read every mask before the start.", "--check-masks")
    crop: int | None = key(None, "Side of crops and windows in pixels; unset: the image size.", "--crop", minimum=8)
    short_side: int | None = key(None, "Resize images to this short side first; unset: no.", "--short-side", minimum=8)
    jitter: tuple[float, float] = key((0.5, 2.0), "Resize range (min, max).", "--jitter", above=0, maximum=16)
    max_share: float = key(0.75, "Redraw crops with a larger part of one class.", "--cat-max-ratio", above=0, maximum=1)
    photometric: bool = key(True, "Brightness, contrast, saturation, hue jitter.", "--photometric/--no-photometric")
    mode: str | None = key(None, "Whole images or windows; unset: by model.", "--eval-mode", choices=("whole", "slide"))
    stride: int | None = key(None, "Window stride in pixels; unset: two thirds of a window.", "--stride", minimum=1)


@dataclass(frozen=True)
class OptimConfig:
    """Optimization."""

    opt: str = key("adamw", "Any timm optimizer.", "--opt", examples=OPTIMIZERS)
    lr: float | None = key(
        None,
        "Peak learning rate; unset: 2e-3, or with --model 5e-4 x sqrt(batch / 512) (with --init a tenth of it; "
        "segmentation 6e-5 x sqrt(batch / 16); without the root for SGD and others that do not adapt).",
        "--lr",
        above=0,
    )
    weight_decay: float = key(0.05, "Weight decay.", "--weight-decay", minimum=0)
    clip_grad: float | None = key(None, "Largest gradient norm; unset: no clipping.", "--clip-grad", above=0)
    epochs: str = key("40", "Length: 40 or 40ep, 2000st, 1e6im.", "--epochs", above=0, unit="ep", percent=False)
    warmup: str = key("5%", "Linear warm-up: 3ep, 200st, 5%.", "--warmup-epochs", minimum=0, unit="ep")
    schedule: str = key("cosine", "Learning rate schedule after warm-up.", "--sched", choices=SCHEDULES)
    layer_decay: float | None = key(None, "Learning rate factor per block.", "--layer-decay", above=0, maximum=1)
    head_lr: float | None = key(
        None,
        "Peak learning rate of classifier and heads; unset: --lr, or 1e-3 for --init without --lr.",
        "--head-lr",
        above=0,
    )
    ema_decay: float | None = key(
        None, "Decay of averaged weights, which are exported; unset: off.", "--model-ema-decay", minimum=0, maximum=1
    )
    min_lr: float | None = key(None, "Least learning rate; unset: --lr / 1000.", "--min-lr", minimum=0)


@dataclass(frozen=True)
class RunConfig:
    """Run."""

    out: str | None = key(None, "Run directory; unset: runs/NAME, with a suffix if taken.", "--out")
    name: str | None = key(None, "Name under runs/; unset: source, --init, terms, other changes.", "--name")
    seed: int = key(0, "Seed of weights, order and augmentation.", "--seed", minimum=0, maximum=2**63 - 1)
    device: str = key("auto", "auto, cpu, cuda or cuda:N.", "--device")
    precision: str = key(
        "auto", "Autocast of forward passes; auto: bf16 on a GPU that has it.", "--precision", choices=PRECISIONS
    )
    tf32: bool = key(True, "TF32 for float32 matrix products in training on a GPU.", "--tf32/--no-tf32")
    compile: bool = key(False, "torch.compile the model and the losses.", "--compile")
    deterministic: bool = key(False, "Only deterministic kernels (CPUs have no others).", "--deterministic")
    distribute: str = key("ddp", "Replicate (ddp) or shard (fsdp) the model.", "--distribute", choices=("ddp", "fsdp"))
    time_limit: str | None = key(None, "Stop after 12h, resumable.", "--time-limit", above=0, unit="min", clock=True)
    stop_after: str | None = key(None, "Stop after 300ep, resumable.", "--stop-after", above=0, unit="ep")
    log_every: str = key("10st", "Interval of training records.", "--log-interval", above=0, unit="st")
    eval_every: str = key("1ep", "Interval of evaluations.", "--val-interval", above=0, unit="ep")
    warn_similarity: float = key(
        0.9, "Warn if P of the last layer exceeds this.", "--warn-similarity", minimum=0, maximum=1
    )
    track: str | None = key(None, "Also log to tensorboard, wandb or trackio; several with commas.", "--track")
    profile: str | None = key(None, "Write a profiler trace of steps FROM:TO, such as 20:25.", "--profile")
    probe_images: int = key(64, "Held-out images for P at every evaluation.", minimum=1)


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoint."""

    every: str = key("10min", "Interval of checkpoints: 1ep, 10min.", "--save-every", above=0, unit="ep", clock=True)
    keep: int = key(1, "Number of recent checkpoints to keep.", "--keep", minimum=1)
    best: bool = key(False, "Also keep the checkpoint with the best evaluation.", "--keep-best")
    milestones: str | None = key(None, "Always keep one every 30ep.", "--milestone-every", above=0, unit="ep")


@dataclass(frozen=True)
class LaunchConfig:
    """Launch."""

    launcher: str = key("none", "Train in this command, or in jobs: local or slurm.", "--launcher", choices=LAUNCHERS)
    nodes: int = key(1, "Machines of a run.", "--nodes", minimum=1)
    gpus: int | None = key(None, "GPUs per machine, one process for each; unset: one process.", "--gpus", minimum=1)
    cpus: int | None = key(None, "CPU cores and threads per process.", "--cpus", minimum=1)
    mem: str | None = key(None, "Memory per machine, such as 64G.", "--mem")
    time: str = key("1h", "Limit of a Slurm job: 90, 4h; the run continues in the next.", "--time", **MINUTES)
    grace: str = key("2min", "Time before the limit at which a run is saved.", "--grace", **MINUTES)
    partition: str | None = key(None, "Slurm's partition; unset: its default.", "--partition")
    account: str | None = key(None, "Slurm's account.", "--account")
    constraint: str | None = key(None, "Features of the machines, such as a100.", "--constraint")
    parallel: int | None = key(
        None, "Cells of a sweep at a time; unset: all (slurm), one per GPU, or one.", "--parallel", minimum=1
    )
    sbatch: dict[str, object] | None = key(None, "Another option of sbatch, k=v; repeatable.", "--sbatch")


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
    launch: LaunchConfig = LaunchConfig()


def _keys() -> dict[str, Key]:
    keys: dict[str, Key] = {}
    for section, cls in SECTIONS.items():
        hints = get_type_hints(cls)
        for item in fields(cls):
            hint = hints[item.name]
            hint = get_args(hint)[0] if isinstance(hint, UnionType) else hint  # X | None
            keys[f"{section}.{item.name}"] = Key(section, item.name, hint, item.default, **item.metadata)
    return keys


# The section classes by TOML table, and every setting by section.key.
SECTIONS: dict[str, Any] = get_type_hints(Config)
KEYS = _keys()
