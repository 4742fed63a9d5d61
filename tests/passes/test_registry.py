from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import pytest

import jettison.passes
from jettison.passes import PASSES, USER_PASSES
from jettison.passes.base import Pass
from jettison.passes.options import describe
from jettison.passes.pipeline import CANONICALIZE, RAISE

# Modules of the package that hold no pass.
INFRASTRUCTURE = {
    "base", "decode_only", "dense_forms", "expert_reads", "gather_costs", "grammar", "head_estimators", "head_forms",
    "input_errors", "knapsack", "linear_sites", "mlp_activity", "mlp_sites", "neuron_groups", "options", "pipeline",
    "requirements", "residual_stream", "whitening",
}  # fmt: skip
VERBS = ("allocate", "annotate", "approximate", "cache", "canonicalize", "cluster", "eliminate", "factorize", "fold",
         "fuse", "lower", "merge", "place", "plan", "predict", "prune", "quantize", "raise", "select", "sparsify",
         "split", "strip")  # fmt: skip


def pass_modules():
    return {
        module.name for module in pkgutil.iter_modules(jettison.passes.__path__) if not module.ispkg
    } - INFRASTRUCTURE


def module_name(pass_):
    return pass_.__module__.rpartition(".")[2]


def test_every_file_is_registered():
    assert [module_name(pass_) for pass_ in PASSES] == sorted(pass_modules())


def test_every_file_holds_one_pass():
    for name in pass_modules():
        module = importlib.import_module(f"jettison.passes.{name}")
        own = [
            value
            for value in vars(module).values()
            if inspect.isclass(value)
            and issubclass(value, Pass)
            and value.__module__ == module.__name__
            and not value.__name__.startswith("_")
        ]
        assert len(own) == 1, name
        assert own[0] in PASSES


@pytest.mark.parametrize("pass_", PASSES, ids=lambda pass_: pass_.name)
def test_id_class_and_file_are_one_name(pass_):
    assert pass_.name == module_name(pass_).replace("_", "-")
    words = pass_.name.split("-")
    assert pass_.__name__.lower() == "".join(words)
    assert words[0] in VERBS


@pytest.mark.parametrize("pass_", PASSES, ids=lambda pass_: pass_.name)
def test_the_docstring_answers_the_usual_questions(pass_):
    text = importlib.import_module(pass_.__module__).__doc__ or ""
    first, *rest = text.split("\n\n")
    assert first.endswith(".")
    assert "\n" not in first.strip()
    labels = re.findall(r"^(Before|After|Fires when|Declines when|Numerics|Saves):", "\n\n".join(rest), re.MULTILINE)
    assert labels == ["Before", "After", "Fires when", "Declines when", "Numerics", "Saves"]


def test_ids_are_unique():
    assert len({pass_.name for pass_ in PASSES}) == len(PASSES)


def test_users_name_what_does_not_always_run():
    always = {type(pass_) for pass_ in (*CANONICALIZE, *RAISE)}
    assert set(USER_PASSES) == set(PASSES) - always
    assert list(USER_PASSES) == [pass_ for pass_ in PASSES if pass_ in USER_PASSES]


@pytest.mark.parametrize("pass_", PASSES, ids=lambda pass_: pass_.name)
def test_defaults_make_a_pass_and_have_a_text(pass_):
    assert pass_() == pass_()
    assert hash(pass_()) == hash(pass_())
    assert all(doc for _, _, _, doc in describe(pass_))
    if pass_ not in USER_PASSES:
        assert describe(pass_) == []
