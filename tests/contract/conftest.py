import pytest
from agents import soon


@pytest.fixture(autouse=True)
def _worlds_are_fitted_soon(monkeypatch):
    soon(monkeypatch, rows=40)
