"""Checkpoints as files: read from a path, the hub or timm, and written as a timm folder. Nothing is executed."""

import argparse
import io
import json
import os
import pickle
import re
import resource
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import psutil  # type: ignore[import-untyped]
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from pdvit.config.schema import PREPROCESSING
from pdvit.errors import UserError, closest, closest_path, command
from pdvit.files import read_json, reading, reason_of
from pdvit.models.build import check_memory, readable_models, sketch_model
from pdvit.models.layouts import jax, open_clip, transformers
from pdvit.models.layouts.conversion import Converted
from pdvit.models.layouts.formats import DISTRIBUTED, INDEX, files_of, read_distributed, refuse_container
from pdvit.models.layouts.libraries import to_timm
from pdvit.models.matching import listed

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# The header of the weights holds the text of config.json under this key.
HEADER_KEY = "config.json"
# timm's order in a folder: these names, then a single file with one of these suffixes.
OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
INDEXES = (f"{WEIGHTS}{INDEX}", f"pytorch_model.bin{INDEX}")  # of weights in several files
PREFERRED = (WEIGHTS, "pytorch_model.bin", "pytorch_model.pth", "model.pth", *OPEN_CLIP, *INDEXES)
FOLDER_SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".bin", ".npz")
TORCH_SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".ckpt")
# Limits for nested tables, because a pickled table can contain itself, and for the letters of a tensor's name.
MAX_DEPTH, MAX_VALUES, MAX_NAME = 5, 200_000, 500
# A setting in a pickle is at most this deep, with so many values in each list or table.
MAX_NESTING, MAX_ITEMS = 3, 100
TYPES_SHOWN = 20  # of skipped objects, in a note
# Bytes that a torch file may take beside twice its size: a small pickle can unpack to any size.
SPARE_MEMORY = 2**29
COPY = "copy or download it again"
ZIP = b"PK\3\4"
# Plain values of Python's own library in pickles, by module and name; those of other packages are skipped too.
BYSTANDERS = re.compile(
    r"pathlib\.(?:_local\.)?\w*Path|(?:typing|datetime|enum)\.\w+"
    r"|builtins\.(?:bool|bytes|complex|dict|float|frozenset|int|list|object|range|set|slice|str|tuple)"
)
SECONDS_TO_ANSWER = 5.0  # for the hub


def read_checkpoint(source: str | Path) -> tuple[str, Converted]:
    """Read a run directory, a timm folder, a file, `local-dir:FOLDER`, `hf-hub:OWNER/NAME`, or a model of timm.

    Return its place in error messages, and its contents, with dotted names for tensors in nested tables. Raises
    UserError if there is no such checkpoint, or the file is damaged, of another format, or could run code.
    """
    text = str(source)
    scheme, _, rest = text.partition(":")
    exists = os.path.exists(os.path.expanduser(source))  # Path.exists raises if a name is too long
    if exists or scheme.lower() == "local-dir":
        return _read_path(Path(source if exists else rest).expanduser())
    if scheme.lower() in ("hf-hub", "hf_hub"):
        return _read_path(_download(rest))
    if timm.is_model(text) and not text.endswith((".safetensors", *TORCH_SUFFIXES)):  # timm ignores what follows a dot
        return _read_published(text)
    known = [] if os.sep in text or "." in text else readable_models()
    tip = closest(text, known, otherwise="name a run directory, a file, or a model of timm")
    tip = f"did you mean 'runs/{text}'?" if os.path.isdir(f"runs/{text}") else closest_path(text, tip)
    raise UserError("there is no such checkpoint", text, tip)


def name_of(path: Path) -> str:
    """Return a checkpoint's name: its folder, its file unless that is called `model`, or the published name."""
    if not os.path.exists(path):
        path = Path(str(path).partition("@")[0].rpartition(":")[2])
        if not os.path.exists(path):
            return path.stem if path.suffix in (".safetensors", *TORCH_SUFFIXES) else path.name
    if path.is_dir():
        return path.resolve().name
    return path.resolve().parent.name if path.stem == "model" else path.stem


def export(
    model: nn.Module,
    classes: list[str],
    data_config: dict[str, Any],
    weights: str,
    state: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """Return the files (name -> content) of a timm folder: `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    The weights alone are enough for pdvit, because their header contains config.json. The files contain no names of
    the machine, no paths and no times. `data_config` is timm's: input_size, mean, std, ... `weights` is `raw` or `ema`,
    `state` the weights if not the model's own; `metadata` adds to the section `pdvit` of config.json.
    """
    extra = {"label_names": classes, "pdvit": {"weights": weights, **(metadata or {})}}
    with TemporaryDirectory() as folder:
        # timm's public save_for_hf also writes the model's weights, which are incomplete on each process under FSDP.
        save_config_for_hf(model, str(Path(folder) / CONFIG), model_config=extra, data_config=data_config)
        config = json.loads((Path(folder) / CONFIG).read_text())
    for key in ("tag", "license"):  # those of the published weights of this architecture
        config["pretrained_cfg"].pop(key, None)
    text = json.dumps(config, indent=2) + "\n"
    tensors = {name: value.detach().cpu().contiguous() for name, value in (state or model.state_dict()).items()}
    file = save(tensors, metadata={"format": "pt", HEADER_KEY: text})
    # With sorted metadata: the library's own order varies from call to call.
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))} | header
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # tensors are aligned to 8 bytes
    return {CONFIG: text.encode(), WEIGHTS: len(head).to_bytes(8, "little") + head + file[8 + size :]}


def _read_path(path: Path) -> tuple[str, Converted]:
    file = _find_weights(path) if path.is_dir() else path
    if not file.is_file():
        raise UserError("there is no such checkpoint", str(file), "name a run directory or a file of weights")
    with reading(file, COPY):
        parts = files_of(file)
        check_memory(parts, str(file))
        if parts == [file]:
            refuse_container(file)
    if not file.name.endswith((".safetensors", ".npz", INDEX, DISTRIBUTED, *TORCH_SUFFIXES)):
        tip = f"convert weights to .safetensors, or one of {', '.join(TORCH_SUFFIXES)}; pass images with --images"
        raise UserError(f"the format '{file.suffix or file.name}' is not supported", str(file), tip)
    read = _read_parts(file, parts)
    if not read.tensors:
        what = "; ".join(["it holds no tensors", *read.notes])
        raise UserError(what, str(file), "name a file with a state_dict")
    if longest := next((name for name in read.tensors if len(name) > MAX_NAME), None):
        raise UserError(f"a tensor has a name of {len(longest):,} letters", str(file), COPY)
    beside, config = file.parent / CONFIG, read.config
    if not config.get("architecture") and beside.is_file():
        with reading(beside, COPY, "its configuration is not a table in JSON"):
            config = read_json(beside)
    found = to_timm(read.tensors, config, file.parent, str(file))
    return str(file), Converted(found.tensors, found.config, read.notes + found.notes)


def _read_parts(file: Path, parts: Sequence[Path]) -> Converted:
    """Read a file of weights, or all files that an index or torch's `.metadata` lists."""
    if file.suffix == ".npz" or file.name == DISTRIBUTED:
        limit = 2 * sum(part.stat().st_size for part in parts) + SPARE_MEMORY
        with reading(file, COPY, "the checkpoint is damaged, or of another layout"), limited_memory(limit):
            return jax.read(file) if file.suffix == ".npz" else Converted(read_distributed(file))
    tensors, config, notes = dict[str, Tensor](), dict[str, Any](), list[str]()
    for part in parts:
        found = Converted(*_read_safetensors(part)) if part.suffix == ".safetensors" else _read_torch(part)
        tensors, config, notes = tensors | found.tensors, found.config, notes + found.notes
    return Converted(tensors, config, notes)


def _find_weights(folder: Path) -> Path:
    files = [folder / name for name in (*PREFERRED, DISTRIBUTED) if (folder / name).is_file()][:1]
    is_run = (folder / "run.toml").exists()
    for suffix in () if is_run else FOLDER_SUFFIXES:
        files = files or sorted(folder.glob(f"*{suffix}"))
    if len(files) > 1:
        listed = ", ".join(file.name for file in files[:4])
        raise UserError(f"the folder holds several checkpoints: {listed}", str(folder), "name one of the files")
    if not files:
        resumed = f"wait for the run to finish, or resume it: {command('train', '--resume', folder)}"
        tip = resumed if is_run else "name a run directory or a timm folder; pass images with --images"
        raise UserError(f"no {WEIGHTS} in the folder", str(folder), tip)
    return files[0]


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with reading(file, COPY, "the safetensors file is damaged"), safe_open(file, framework="pt") as opened:
        header = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    with reading(file, COPY, "its configuration is not a table in JSON"):
        return tensors, read_json(header.get(HEADER_KEY, "{}"))


class EqualsDict(type):
    """A class that equals `dict`: torch's restricted unpickler compares classes before it sets items."""

    __hash__ = type.__hash__

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is dict


class Skipped(metaclass=EqualsDict):
    """Stands for an object of any class in a pickle: takes any arguments, state and items, and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any) -> Self:
        """Return an object, whatever the arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Take the object's state, and keep none."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Take an item of a table, and keep none."""


def _read_torch(file: Path) -> Converted:
    """Read the tensors, plain values and argparse's namespaces in a file of torch.save; other objects are skipped.

    Torch's restricted unpickler gets `Skipped` for their names, so that nothing of theirs is imported or called. Names
    of torch and of Python's own library that are no plain values are refused.
    """
    with reading(file, COPY, "the torch file is damaged"), limited_memory(2 * file.stat().st_size + SPARE_MEMORY):
        # From memory, torch does not try the tar files of its first years, whose reader may never end.
        with file.open("rb") as opened:
            is_zip = opened.read(4) == ZIP
        source = file if is_zip else io.BytesIO(file.read_bytes())
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) if is_zip else set()
        refused = {"torch", *sys.stdlib_module_names}
        skipped = {it for it in names if BYSTANDERS.fullmatch(it) or it.partition(".")[0] not in refused}
        # Torch looks all up for each object.
        if len(skipped) > MAX_ITEMS or max(map(len, skipped), default=0) > MAX_NAME:
            skipped = set()
        # In place of a defaultdict stands a plain table, whose items follow.
        allowed: list[Any] = [argparse.Namespace, (lambda *_: {}, "collections.defaultdict")]
        allowed += [(Skipped, name) for name in skipped]
        try:
            with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols and storages
                content = torch.load(source, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if re.search("Unsupported operand|invalid load key", str(error)):
                raise
            found = re.search(r"GLOBAL (\S+)", str(error))
            types = [found[1]] if found else sorted(skipped)[:TYPES_SHOWN]
            held = f" ({', '.join(types)})" if types else ""
            what = f"it holds more than tensors and plain values{held}, which could run code: it was not opened"
            load = f"x = torch.load({file.name!r}, weights_only=False)"
            kept = "torch.is_tensor(v) or isinstance(v, dict) and all(map(torch.is_tensor, v.values()))"
            weights = f"{{k: v for k, v in x.items() if {kept}}}"
            if any(name.startswith("torch.nn.modules.") for name in names):  # a whole model, perhaps in a table
                load += "; x = x if isinstance(x, dict) else {'model': x}"
                weights = "{k: v.state_dict() for k, v in x.items() if isinstance(v, torch.nn.Module)}"
            tip = f"if you trust it, save its weights alone: {load}; torch.save({weights}, 'weights.pt')"
            raise UserError(what, str(file), tip) from error
        notes = listed({"types of objects skipped": sorted(skipped)}, TYPES_SHOWN)
        if not isinstance(content, Mapping):
            raise UserError("; ".join(["it holds no table of weights", *notes]), str(file), "save the state_dict alone")
        tensors = dict(_named_tensors(content, file))
        stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
        if sum(stored.values()) > 4 * file.stat().st_size:
            raise ValueError("its tensors claim more numbers than it holds")
        return Converted(tensors, _parse_training_args(content), notes)


@contextmanager
def limited_memory(size: int) -> Iterator[None]:
    """Let this process take at most `size` more bytes; beyond that, allocations fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + size
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _named_tensors(content: Mapping[Any, Any], file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a table and the tables in it, with dotted names."""
    waiting: list[tuple[str, Any, int]] = [("", content, 0)]
    values = 0
    while waiting:
        name, value, depth = waiting.pop()
        values += 1
        if values > MAX_VALUES or len(name) > MAX_NAME * MAX_DEPTH:
            raise UserError("it holds more values than a state_dict does", str(file), "save the state_dict alone")
        if isinstance(value, Tensor) and _is_plain(value):
            yield name, value.detach()
        elif isinstance(value, Mapping) and depth < MAX_DEPTH:
            items = [(f"{name}.{key}" if name else key, item) for key, item in value.items() if isinstance(key, str)]
            waiting += [(key, item, depth + 1) for key, item in reversed(items)]


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is dense and stores all its numbers: an expanded shape can claim any size."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _parse_training_args(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the model and images in the arguments of a training checkpoint (names of timm, DeiT, DINO, MAE)."""
    table: Any = content.get("args")
    table = vars(table) if isinstance(table, argparse.Namespace) else table
    items = table.items() if isinstance(table, Mapping) else ()
    # timm's script keeps an empty text for some unset arguments
    args: dict[str, Any] = {key: value for key, value in items if isinstance(key, str) and value not in (None, "")}
    config: dict[str, Any] = {}
    for name in (args.get("model"), args.get("arch"), content.get("arch")):
        if isinstance(name, str) and "architecture" not in config:
            config["architecture" if timm.is_model(name) else "foreign_name"] = name
    size = args.get("img_size", args.get("input_size"))
    size = size[-1] if isinstance(size, list | tuple) and size else size
    arguments = {"img_size": size, "global_pool": args.get("gp"), "drop_path_rate": args.get("drop_path")}
    arguments = {key: value for key, value in arguments.items() if isinstance(value, int | float | str)}
    extra = args.get("model_kwargs")
    if isinstance(extra, Mapping) and all(isinstance(key, str) for key in extra):
        arguments |= extra
    data = {key: args[key] for key in PREPROCESSING if key in args}
    if not _is_small([arguments, data]):
        raise ValueError("its args hold more than plain settings")
    return config | {"model_args": arguments, "pretrained_cfg": data}


def _is_small(value: Any, nesting: int = MAX_NESTING) -> bool:
    """Return whether a value is plain, with few parts: lists that share lists can be written in no memory."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        return nesting >= 0 and len(value) <= MAX_ITEMS and all(_is_small(part, nesting - 1) for part in value)
    short = isinstance(value, str | int) and len(str(value)) <= MAX_NAME
    return short or value is None or isinstance(value, float)


def _read_published(name: str) -> tuple[str, Converted]:
    sketch = sketch_model(name, {}, name)  # refuses unsupported models before any download
    check_memory(sketch, name)
    family, _, tag = name.partition(".")
    known = timm.list_pretrained(f"{family}.*")
    if not known or (tag and name not in known):
        tip = closest(name, known, shown=3) if known else "name a file, or train from scratch: --model"
        raise UserError(f"timm publishes no weights of {name}", name, tip)
    with _downloading(name):
        model: Any = timm.create_model(name, pretrained=True)
    keys, published = ("input_size", *PREPROCESSING, "label_names"), model.pretrained_cfg
    cfg = {key: published[key] for key in keys if published.get(key) is not None}
    cfg = json.loads(json.dumps(cfg))  # as in a config.json: lists for tuples
    config = {"architecture": name, "num_classes": model.num_classes, "pretrained_cfg": cfg}
    return name, Converted(model.state_dict(), config)


def _download(repository: str) -> Path:
    """Download the configuration and the weights of `OWNER/NAME` or `OWNER/NAME@REVISION`; return their folder."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    owner_and_name, _, revision = repository.partition("@")
    where = f"hf-hub:{repository}"
    fetch = partial(hf_hub_download, owner_and_name, revision=revision or None)
    with _downloading(where):
        try:
            fetch(CONFIG)
        except EntryNotFoundError:
            fetch(open_clip.CONFIG)
        for name in (open_clip.CONFIG, *transformers.PROCESSORS):  # some folders have the first beside config.json
            with suppress(EntryNotFoundError):
                fetch(name)
        for name in PREFERRED:
            with suppress(EntryNotFoundError):
                file = Path(fetch(name))
                for part in set(files_of(file)) - {file}:
                    fetch(part.name)
                return file.parent
    what = f"none of {', '.join(PREFERRED)} is there, or in the cache if there is no network"
    raise UserError(what, where, "check the network, or name a repository in timm's format")


@contextmanager
def _downloading(where: str) -> Iterator[None]:
    """Turn any error into a UserError. If the hub does not answer, use its cache alone: it would try for a minute."""
    from huggingface_hub import constants, get_session

    before, what = constants.HF_HUB_OFFLINE, "the weights can't be downloaded"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS_TO_ANSWER)
    except Exception as error:
        constants.HF_HUB_OFFLINE, what = True, f"{what}: {reason_of(error)}"
    try:
        with reading(where, "check the network, or name a downloaded folder", what):
            yield
    finally:
        constants.HF_HUB_OFFLINE = before
