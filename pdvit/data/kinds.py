"""The kinds of sources, as `--data help` lists them. No torch: the list has to come at once."""

from dataclasses import dataclass

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".zip")


@dataclass(frozen=True)
class Kind:
    """One kind of source: how it is written, what it is, and the beginning or end of the text that tells it."""

    name: str
    written: str
    help: str
    prefix: str = ""
    suffixes: tuple[str, ...] = ()


KINDS = (
    Kind("digits", "digits", "1,797 handwritten digits of scikit-learn, built in; some: digits:0-4", "digits:"),
    Kind("folder", "FOLDER", "train/CLASS/IMAGE with val/, validation/ or test/; or CLASS/IMAGE alone; ImageNet-1k"),
    Kind("archive", "FILE.tar, FILE.zip", "the same inside an archive; also .tar.gz, .tar.xz", suffixes=ARCHIVES),
    Kind("csv", "FILE.csv", "a table with the columns path, label and perhaps split", suffixes=(".csv",)),
    Kind("torch", "torch/cifar100", "data sets of torchvision, in --data-dir", "torch/"),
    Kind("hfds", "hfds/OWNER/NAME", "Hugging Face data sets, by name or folder (extra hf-data)", "hfds/"),
    Kind("hfids", "hfids/OWNER/NAME", "their streams, copied once into the cache (extra hf-data)", "hfids/"),
    Kind("wds", "wds/NAME", "WebDataset shards, in --data-dir", "wds/"),
    Kind("tfds", "tfds/NAME", "TensorFlow data sets, copied once into the cache (extra tf-data)", "tfds/"),
)


def kind_of(source: str) -> str | None:
    """Return the kind that the text alone tells; None for a path that has to be looked at, or nothing known."""
    lower = source.lower()
    for kind in KINDS:
        if source == kind.written or (kind.prefix and lower.startswith(kind.prefix)):
            return kind.name
        if kind.suffixes and lower.endswith(kind.suffixes):
            return kind.name
    return None


def list_kinds() -> str:
    """Return one line for each kind."""
    width = max(len(kind.written) for kind in KINDS)
    lines = (f"  {kind.written:{width}}  {kind.help}" for kind in KINDS)
    return "\n".join(["--data takes:", *lines, "docs/data.md says more"])
