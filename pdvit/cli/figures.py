"""What the kinds of `pdvit plot` share: which run directories, and where the figure and its data go."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pdvit.errors import UserError, closest

if TYPE_CHECKING:
    from pdvit.plots.style import Drawing, Theme

SUFFIXES = (".png", ".svg", ".pdf")
Runs = Annotated[list[Path] | None, typer.Argument(help="Run directories, or folders of analyses; unset: the newest.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="File; .png, .svg or .pdf decides the format. Its data go beside it, as CSV."),
]
Dark = Annotated[bool, typer.Option("--dark", help="Light lines on a dark background.")]


def check_suffix(out: Path | None) -> None:
    """Refuse an unknown format before any work is done."""
    if out is not None and out.suffix.lower() not in SUFFIXES:
        what = f"'{out.suffix or out.name}' is not a format of figures"
        raise UserError(what, f"--out {out}", closest(out.suffix, SUFFIXES))


def folders_of(runs: list[Path] | None, marker: str, command: str, count: int) -> list[Path]:
    """Return the run directories to draw: those named, or the newest that hold the file `marker`.

    UserError names the command that makes what is missing; `{}` in it stands for the run.
    """
    from pdvit.plots.reading import checkpoint_of
    from pdvit.tracking import newest

    folders = [Path(os.path.expanduser(run)) for run in runs or []] or newest(marker)[:count]
    if not folders:
        raise UserError(f"no run here has {marker} yet", "runs/", f"run {command.format('RUN')} first")
    for folder in folders:
        if not folder.is_dir():
            raise UserError("there is no such run directory", str(folder), "name a folder below runs/")
        if not (folder / marker).is_file():
            tip = f"run {command.format(checkpoint_of(folder))} first"
            raise UserError(f"the run has no {marker}", str(folder), tip)
    return folders


def names_of(folders: list[Path]) -> list[str]:
    """Return what runs are called: the name of the folder, with those above where that is not enough."""
    parts = [folder.resolve().parts for folder in folders]
    names = [name_of(folder) for folder in folders]
    for at, name in enumerate(names):
        if [name_of(folder) for folder in folders].count(name) > 1:
            names[at] = "/".join(parts[at][-2:]).encode(errors="replace").decode()
    return names


def name_of(folder: Path) -> str:
    """Return what a run is called."""
    name = folder.resolve().name.removeprefix("analysis-").removeprefix("eval-")
    return name.encode(errors="replace").decode()  # pandas on pyarrow has no text for other file names


def theme_of(dark: bool) -> "Theme":
    """Return the colours."""
    from pdvit.plots.style import DARK, LIGHT

    return DARK if dark else LIGHT


def write(figure: "Drawing", kind: str, folders: list[Path], out: Path | None, page: str | None = None) -> None:
    """Write the figure, beside it its data as CSV and `page` as Markdown, each renamed when whole; say where it is."""
    from pdvit.plots.style import render
    from pdvit.tracking import write_file, writing

    out = out or _default(kind, folders)
    table = figure.data.to_csv(index=False, float_format="%.6g")
    texts = {out.with_suffix(".csv"): table} | ({out.with_suffix(".md"): page} if page else {})
    for file, text in texts.items():
        _refuse_other(file, text)
    with writing("the figure", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, render(figure, out.suffix))
        for file, text in texts.items():
            write_file(file, text.encode(errors="replace"))  # what a file system takes as a name need not be text
    print(out)


def _default(kind: str, folders: list[Path]) -> Path:
    names = [re.sub(r"[^\w.-]", "-", name_of(folder))[:40] for folder in folders[:3]]
    more = [f"{len(folders) - 3}-more"] if len(folders) > 3 else []
    return Path("figures") / f"{'-'.join([kind, *names, *more])}.png"


def _refuse_other(file: Path, text: str) -> None:
    """Keep `--out RUN/analysis.png` from replacing RUN/analysis.csv: a figure's table begins with another column.

    A page begins with a table, whose heading may be that of other columns.
    """
    if not file.exists():
        return
    begin = re.split("[,\n]", text, maxsplit=1)[0].encode()
    with file.open("rb") as opened:
        known = opened.read(len(begin) + 1)
    same = known[:1] == b"|" if file.suffix == ".md" else re.fullmatch(re.escape(begin) + rb"[,\n]?", known)
    if not same:
        what = f"{file.name} is there, and is not the data of a figure"
        raise UserError(what, str(file), "choose another --out: a figure's data go beside it, under its name")
