"""The assertions of `running.py` are asserted for the tests."""

import pytest

pytest.register_assert_rewrite("tests.codegen.running")
