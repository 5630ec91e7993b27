"""scripts/ablations.py: the table of a summary, and that what is written by hand beside it stays."""

import pathlib

import pytest
from helpers import load_script

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "scripts" / "ablations.py"
SUMMARY = {
    "cells": 10,
    "missing": ["b / seed 5"],
    "mismatched": [],
    "failed": {},
    "results": {
        "loss": {
            "a": {"n": 5, "mean": 2.0},
            "b": {
                **{"n": 4, "mean": 1.5, "difference": -0.5, "difference_low": -0.75, "difference_high": -0.25},
                **{"p": 0.00001, "p_holm": 0.00002, "differs": True},
            },
        }
    },
}


@pytest.fixture(scope="module")
def script():
    return load_script("ablations")


def test_a_row_has_mean_difference_and_what_is_missing(script):
    lines = script.table(SUMMARY).splitlines()
    assert lines[2] == "| loss | a | 5 | 2.0000 |  |  |"
    assert lines[3] == "| loss | b | 4 | 1.5000 | **-0.5000 (-0.7500 to -0.2500)** | <0.0001 |"
    assert lines[-1] == "1 of 10 cells are missing."


def test_a_table_takes_the_place_of_the_old_one_and_of_nothing_else(script):
    page = script.replace_block("# Page\n", "ffn", "old")
    page = page.replace("<!-- end of ffn -->", "<!-- end of ffn -->\n\nWhat it means.\n\n## more")
    again = script.replace_block(page, "ffn", "new")
    assert again == page.replace("old", "new") and "What it means." in again
