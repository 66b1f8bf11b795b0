"""Where the learner's ranks listen for each other."""

import os
from types import SimpleNamespace

import psutil
import pytest

from eopd.learner import ranks
from eopd.learner.ranks import _listen_towards

CHOSEN = "GLOO_SOCKET_IFNAME"


@pytest.fixture(autouse=True)
def _not_chosen(monkeypatch):
    monkeypatch.setenv(CHOSEN, "")  # so that what is set here is undone
    monkeypatch.delenv(CHOSEN)


def test_ranks_of_one_machine_meet_at_its_loopback():
    _listen_towards("127.0.0.1", 1)
    found = psutil.net_if_addrs()[os.environ[CHOSEN]]
    assert "127.0.0.1" in [one.address for one in found]


def test_a_rank_listens_where_the_machine_of_the_first_one_reaches_it(monkeypatch):
    """Not where the name of its own machine leads."""
    cards = {"lo": "127.0.0.1", "slow0": "192.0.2.7", "fast0": "198.51.100.7"}
    found = {name: [SimpleNamespace(address=address)] for name, address in cards.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(ranks, "address_towards", lambda host, port: cards["fast0"])
    _listen_towards("198.51.100.1", 29500)
    assert os.environ[CHOSEN] == "fast0"


def test_the_user_knows_better(monkeypatch):
    monkeypatch.setenv(CHOSEN, "ib0")
    _listen_towards("127.0.0.1", 1)
    assert os.environ[CHOSEN] == "ib0"
