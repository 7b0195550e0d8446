"""The docs' table of every key: `python -m pdvit.config.table` prints it."""

from dataclasses import fields

from pdvit.config.keys import info_of
from pdvit.config.load import describe_range, sections


def markdown_table() -> str:
    """Return every key with its flag, default, range and help, as Markdown."""
    lines = ["| key | flag | default | allowed | |", "| --- | --- | --- | --- | --- |"]
    for section, cls in sections().items():
        for item in fields(cls):
            info = info_of(item)
            flags = ", ".join(f"`{flag}`" for flag in info.flags)
            value = item.default
            default = "" if value is None else f"`{list(value) if isinstance(value, tuple) else value}`"
            allowed = ", ".join(info.choices) or describe_range(info).replace("finite", "")
            lines.append(f"| `{section}.{item.name}` | {flags} | {default} | {allowed} | {info.help} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
