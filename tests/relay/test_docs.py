"""The table of settings in docs/relay.md names every flag."""

import pathlib
import re

from memdlm.relay.config import FLAG_PREFIX, flag_fields

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "relay.md"


def test_every_flag_is_in_the_table_and_nothing_else():
    section = DOCS.read_text().partition("## Settings")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == {name.removeprefix(FLAG_PREFIX) for name, _, _ in flag_fields()}
