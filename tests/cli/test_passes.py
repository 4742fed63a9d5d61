"""`jettison passes`: every pass, policy, format and method, with every option."""

from __future__ import annotations

import dataclasses

from jettison.passes import USER_PASSES
from jettison.passes.formats import FORMATS
from jettison.passes.methods import METHODS
from jettison.passes.policies import POLICIES
from jettison.passes.predictors import PREDICTORS


def test_json_lists_every_pass_policy_and_option(run):
    result = run("passes", "--json")
    assert (result.code, result.err) == (0, "")
    document = result.json
    assert set(document) == {"passes", "policies", "formats", "methods", "predictors", "factorizers", "pruners"}
    kinds = {"policies": POLICIES, "formats": FORMATS, "methods": METHODS, "predictors": PREDICTORS}
    named = {"passes": {cls.name: cls for cls in USER_PASSES}, **kinds}
    for key, by_name in named.items():
        classes = tuple(by_name.values())
        assert [entry["name"] for entry in document[key]] == list(by_name)
        for entry, cls in zip(document[key], classes, strict=True):
            assert set(entry) == {"name", "summary", "options", "doc"}
            assert entry["summary"]
            assert [o["name"] for o in entry["options"]] == [f.name for f in dataclasses.fields(cls) if f.init]
            for option in entry["options"]:
                assert set(option) == {"name", "type", "default", "doc"}
                assert all(option.values())
    size = next(entry for entry in document["policies"] if entry["name"] == "window")["options"][0]
    assert size["type"] == "int|none (at least 1)"


def test_table_is_whole(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    result = run("passes")
    assert (result.code, result.err) == (0, "")
    for entry in (entry for entries in run("passes", "--json").json.values() for entry in entries):
        assert entry["name"] in result.out
        assert entry["summary"] in result.out
        for option in entry["options"]:
            rows = [line for line in result.out.splitlines() if line.split()[:1] == [option["name"]]]
            assert any(option["type"] in row and option["default"] in row and option["doc"] in row for row in rows)


def test_one_pass_is_shown_with_all_that_is_documented(run):
    result = run("passes", "quantize-weights")
    assert result.code == 0
    assert "Declines when:" in result.out
    assert "merge-qkv-projections" not in result.out
    document = run("passes", "window", "--json").json
    assert document["passes"] == []
    assert [entry["name"] for entry in document["policies"]] == ["window"]


def test_unknown_name_lists_close_ones(run):
    run("passes", "quantize-weight").fails(2, "quantize-weights")
