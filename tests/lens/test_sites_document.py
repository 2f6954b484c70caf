"""docs/sites.md names every site, in each of its tables, and TransformerLens' hooks as the comparison has them."""

import re
from pathlib import Path

from nemo_qwen_hidden.hookpoint import SITES, HookPoint
from nemo_qwen_hidden.plan.footprint import DecoderShape
from nemo_qwen_hidden.plan.shapes import state_shape
from tests.support.lens import HOOKS

DOCUMENT = Path(__file__).parents[2] / "docs" / "sites.md"
SIZES = {"D": 96, "N": 6, "G": 3, "d": 16, "F": 40, "keys": 11}
DECODER = DecoderShape(
    num_layers=2,
    hidden_size=SIZES["D"],
    num_heads=SIZES["N"],
    num_query_groups=SIZES["G"],
    head_dim=SIZES["d"],
    ffn_hidden_size=SIZES["F"],
    vocab_size=7,
)


def table(column: str) -> dict[str, str]:
    """Site to cell, of the table that has this column."""
    lines = iter(DOCUMENT.read_text(encoding="utf-8").splitlines())
    for line in lines:
        header = cells(line)
        if header[:1] == ["site"] and column in header:
            next(lines)
            break
    found: dict[str, str] = {}
    for line in lines:
        if not line.startswith("|"):
            break
        row = dict(zip(header, cells(line), strict=True))
        found |= dict.fromkeys(re.findall(r"`(\w+)`", row["site"]), row[column])
    return found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []


def test_every_site_stands_in_every_table() -> None:
    for column in ("equation", "TransformerLens", "local spec"):
        assert list(table(column)) == list(SITES), column


def test_the_hooks_are_those_that_are_compared() -> None:
    assert {site: name.strip("`") for site, name in table("TransformerLens").items()} == HOOKS


def test_the_shapes_are_those_of_the_plan() -> None:
    for site, written in table("state of a token").items():
        shape = tuple(SIZES[letter] for letter in re.findall(r"\w+", written))
        assert state_shape(HookPoint(site, 0), DECODER, keys=SIZES["keys"]) == shape, site
