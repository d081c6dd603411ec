"""Which cache and which sink a key belongs to."""

from __future__ import annotations

import pytest

import forebay
from forebay.nodes.workers.routes import Routes
from forebay.schemas.errors import ConfigError
from support.workers import Table


def routes(*sinks: tuple[str, Table]) -> Routes:
    made = Routes()
    for template, sink in sinks:
        made.add_sink(template, sink)
    return made


def test_a_key_goes_to_the_sink_of_its_template_with_its_fields() -> None:
    """Escaped values come out as they were."""
    flights, crews = Table("flights"), Table("crews")
    found = routes(("flight:{id}", flights), ("crew:{base}:{id}", crews)).sink_of("crew:E%3AR:7")
    assert found is not None
    assert found[0] is crews
    assert dict(found[1]) == {"base": "E:R", "id": "7"}


def test_a_key_of_no_template_has_no_sink() -> None:
    """Neither a longer key nor a shorter one is taken for another's."""
    made = routes(("flight:{id}", Table()))
    assert [made.sink_of(key) for key in ("flight", "flight:1:2", "flights:1", "x")] == [None] * 4


def test_two_sinks_never_share_a_name() -> None:
    """Checkpoints go by the name: one of the two would get the other's writes."""
    made = routes(("flight:{id}", Table("table")))
    with pytest.raises(ConfigError, match="another sink has the name table"):
        made.add_sink("crew:{id}", Table("table"))


def test_two_functions_of_one_name_are_refused_where_they_are_declared() -> None:
    """As it happens when each is called ``save``."""
    node = forebay.Node("shop")

    @node.sink("flight:{id}")
    async def save(writes: list[forebay.Write[int]]) -> None: ...

    with pytest.raises(ConfigError):

        @node.sink("crew:{id}")
        async def save(writes: list[forebay.Write[int]]) -> None: ...


def test_one_sink_may_take_several_templates() -> None:
    """It is one sink all the same: opened once, one lane."""
    table = Table()
    made = routes(("flight:{id}", table), ("crew:{id}", table))
    assert list(made.all_sinks()) == [table]


def test_a_template_has_one_sink() -> None:
    """A second one would never get anything."""
    made = routes(("flight:{id}", Table("a")))
    with pytest.raises(ConfigError, match="already"):
        made.add_sink("flight:{id}", Table("b"))
