"""Shared by all tests: the repository root on sys.path, and where real data may be found."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def _folder(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT / default))
    if not folder.is_dir():
        pytest.skip(f"no real data: {variable} is not set to a folder, and there is no {folder}")
    return folder


@pytest.fixture(scope="session")
def hh_rlhf_dir() -> Path:
    """A folder with helpful-base/ and harmless-base/ of HH-RLHF; skips where there is none."""
    return _folder("HH_RLHF_DIR", "../shared/data/hh-rlhf")


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's tokenizer from tiktoken's cache; skips where there is none."""
    folder = _folder("TIKTOKEN_CACHE_DIR", "../shared/data/tiktoken")
    import data
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        try:
            return data.gpt2_tokenizer()
        except data.UserError as error:
            pytest.skip(f"no real data: {error}")
