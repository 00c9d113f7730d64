"""Chat templates within limits: long loops and long texts end, others come out as jinja2 writes them."""

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from labkit.text.limits import Limits, render

ENVIRONMENT = ImmutableSandboxedEnvironment()


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(3) %}{{ loop.index }}/{{ loop.length }} {{ i }},{% endfor %}",
        "{{ range(2, 9, 3) | list }} {{ range(5) | reverse | list }} {{ range(4)[1] }} {{ 2 in range(3) }}",
        "{% macro m(n) %}{% for i in range(n) %}{{ i }}{% endfor %}{% endmacro %}{{ m(4) }}{{ a }}",
        "{{ range(10)[2:5] | list }} {{ range(3) | length }} {{ range(3) | sum }}",
    ],
)
def test_a_template_writes_what_it_always_did(source):
    template = ENVIRONMENT.from_string(source)
    assert render(template, {"a": "b"}) == template.render(a="b")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "longer than 0.05 s"),
        ("{% for i in range(1000) %}{{ 'x' * 100 }}{% endfor %}", "too long a text"),
        ("{{ 'x' * 100000 }}", "too long a text"),
        ("{{ range(100001) }}", "more than 100000 numbers"),
    ],
)
def test_a_template_that_takes_too_much_is_refused(source, told):
    with pytest.raises(ValueError, match=told):
        render(ENVIRONMENT.from_string(source), {}, Limits(0.05, 50_000))
