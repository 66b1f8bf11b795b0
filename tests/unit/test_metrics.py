"""Metrics become one number by the rule of their class, whoever has which of them."""

import pickle

import numpy as np
import pytest

from eopd.metrics import Max, Mean, Quantile, Same, Sum, reduce


def test_every_class_has_its_rule():
    first = {"sum": Sum(1.0), "mean": Mean(6.0, 3), "max": Max(20.0), "same": Same(1.0)}
    second = {"sum": Sum(2.0), "mean": Mean(1.0, 1), "max": Max(30.0), "same": Same(1.0)}
    assert reduce([first, second]) == {"sum": 3.0, "mean": 1.75, "max": 30.0, "same": 1.0}


def test_a_name_that_some_lack_is_a_number_of_those_that_have_it():
    assert reduce([{"a": Mean(1.0, 2)}, {}, {"b": Mean(3.0, 1), "a": Mean(0.0, 2)}]) == {
        "a": 0.25,
        "b": 3.0,
    }
    assert reduce([]) == {}


def test_a_mean_of_nothing_is_zero():
    assert reduce([{"a": Mean(0.0, 0)}, {"a": Mean(0.0, 0.0)}]) == {"a": 0.0}


def test_a_quantile_is_one_of_all_values():
    parts = [np.array([9.0, 1.0], np.float32), np.arange(2.0, 9.0, dtype=np.float32)]
    found = reduce({"median": Quantile(part, 0.5), "high": Quantile(part, 0.9)} for part in parts)
    assert found == {"median": 5.0, "high": pytest.approx(np.quantile(np.arange(1.0, 10.0), 0.9))}


def test_metrics_travel():
    metrics = {"a": Mean(1.0, 2), "b": Max(3.0)}
    assert pickle.loads(pickle.dumps(metrics)) == metrics


def test_a_name_of_two_classes_is_a_mistake():
    with pytest.raises(TypeError, match=r"a: its parts are \['Max', 'Sum'\]"):
        reduce([{"a": Sum(1.0)}, {"a": Max(1.0)}])
