"""The page about the sampler holds an example that runs, and that needs torch and NumPy alone."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "sampler.md"


def test_the_ten_lines_run_without_the_rest_of_the_package():
    example = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    assert len(example.strip().splitlines()) <= 12  # ten and the blank ones
    loaded = "\nimport sys\nprint([m for m in ('polars', 'triton', 'tyro', 'metarec_fast.vq') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", example + loaded], capture_output=True, text=True, check=True)
    *batches, rest = done.stdout.splitlines()
    assert len(batches) == 6  # three epochs of three users, two at a time
    assert all("torch.Size([" in line for line in batches)
    assert rest == "[]"
