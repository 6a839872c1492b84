"""Fixtures that every test folder shares."""

import os
import pathlib

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
    """Folder with recorded tensors and public data sets (MEMDLM_SHARED); tests that need it skip without it."""
    folder = os.environ.get("MEMDLM_SHARED", "")
    if not folder or not pathlib.Path(folder).is_dir():
        pytest.skip("set MEMDLM_SHARED to the folder with golden/ and data/ to run this test")
    return pathlib.Path(folder)
