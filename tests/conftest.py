"""Shared by all tests: the repository root on sys.path, and real data where a variable names it."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# The tests' tensors are tiny: more threads would only wait for each other.
torch.set_num_threads(1)


def _folder(variable: str) -> Path:
    if not Path(os.environ.get(variable, "?")).is_dir():
        pytest.skip(f"no real data: {variable} does not name a folder")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def hh_rlhf_dir() -> Path:
    """A folder with helpful-base/ and harmless-base/ of HH-RLHF; skips where there is none."""
    return _folder("HH_RLHF_DIR")


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's tokenizer from tiktoken's cache; skips where there is none."""
    _folder("TIKTOKEN_CACHE_DIR")
    import data
    try:
        return data.gpt2_tokenizer()
    except data.UserError as error:
        pytest.skip(f"no real data: {error}")
