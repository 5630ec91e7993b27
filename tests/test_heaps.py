"""scripts/heaps.py: the law it fits, on a vocabulary that grows by one, and what it says of too little text."""

import pathlib
import subprocess
import sys

import pytest
from helpers import load_script

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "scripts" / "heaps.py"


@pytest.fixture(scope="module")
def script():
    return load_script("heaps")


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_a_vocabulary_of_that_growth_is_fitted(script, beta):
    rows = script.growth(str(int(n**beta)) for n in range(1, 40_001))
    assert [n for n, _ in rows] == [1024, 2048, 4096, 8192, 16384, 32768, 40_000]
    assert all(abs(distinct - n**beta) <= 1 for n, distinct in rows)
    found, r2 = script.fit(rows)
    assert found == pytest.approx(beta, abs=0.01) and r2 > 0.999


def test_a_short_text_is_refused_in_one_line(tmp_path):
    (tmp_path / "short.txt").write_text("to be or not to be")
    for path, said in ((tmp_path / "short.txt", "fewer than 2048 words"), (tmp_path / "none.txt", "none.txt")):
        done = subprocess.run([sys.executable, SCRIPT, "--path", path], capture_output=True, text=True)
        assert done.returncode == 1 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1
