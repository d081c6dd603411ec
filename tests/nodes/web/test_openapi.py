"""GET /openapi.json is valid OpenAPI, and describes the node's answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from forebay.nodes.web import openapi
from forebay.nodes.web.server import _COORDINATION

OWN = [("POST", "/v1/events", "publish events"), ("GET", "/livez", "alive")]


def described(*, guarded: bool = False) -> dict[str, Any]:
    ours = [(each.method, each.path, each.purpose) for each in _COORDINATION]
    return openapi.document([*OWN, *ours], version="1.2.3", guarded=guarded)


def validator(document: dict[str, Any], name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", **document})


def faults(document: dict[str, Any]) -> Iterator[str]:
    """The violations of the OpenAPI 3.1 rules that Forebay uses."""
    names: list[str] = []
    for path, item in document["paths"].items():
        for method, operation in item.items():
            where = f"{method} {path}"
            names.append(operation["operationId"])
            declared = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
            if declared != set(re.findall(r"{(\w+)}", path)):
                yield f"{where}: parameters of the path"
            if not operation["responses"] or not all(
                re.fullmatch(r"[1-5]\d\d", status) and "description" in response
                for status, response in operation["responses"].items()
            ):
                yield f"{where}: responses"
            if method == "get" and "requestBody" in operation:
                yield f"{where}: a body"
    if len(names) != len(set(names)):
        yield "operationId twice"
    for reference in set(re.findall(r"'\$ref': '#/components/schemas/(\w+)'", str(document))):
        if reference not in document["components"]["schemas"]:
            yield f"nothing is {reference}"


def test_the_document_keeps_the_rules() -> None:
    """Each schema is valid JSON Schema 2020-12, and each reference resolves."""
    document = described(guarded=True)
    assert document["openapi"] == "3.1.0"
    assert list(faults(document)) == []
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_a_fault_is_found_when_planted() -> None:
    """The validation finds planted errors."""
    document = described()
    document["paths"]["/v1/x/{y}"] = {"get": {"operationId": "publish", "responses": {}}}
    document["components"]["schemas"].pop("Granted")
    assert sorted(faults(document)) == [
        "get /v1/x/{y}: parameters of the path",
        "get /v1/x/{y}: responses",
        "nothing is Granted",
        "operationId twice",
    ]


def test_every_route_of_coordination_has_a_shape() -> None:
    """O1: each route is described; with a token, the guarded routes require it."""
    assert all((each.method, each.path) in openapi.SHAPES for each in _COORDINATION)
    for path, item in described(guarded=True)["paths"].items():
        for operation in item.values():
            assert ("security" in operation) == path.startswith("/v1/")
            assert ("401" in operation["responses"]) == path.startswith("/v1/")


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("Acquire", {"lease": 3, "meta": {"a": 1}}, {"leese": 3}),
        ("Take", {"subject": "u", "cost": 2}, {"cost": 2}),
        ("Event", {"type": "invalidate", "keys": ["a"]}, {"type": "juggle"}),
        ("Event", {"type": "write", "key": "a", "value": None}, {"type": "write"}),
        (
            "CloudEvent",
            {"specversion": "1.0", "id": "1", "source": "s", "type": "t", "data": {"keys": ["a"]}},
            {"id": "1"},
        ),
        (
            "ErrorResponse",
            {"error": {"code": "held", "problem": "p", "field": "", "fix": ""}, "holder": "n"},
            {},
        ),
    ],
)
def test_shapes_take_what_the_node_takes(name: str, good: Any, bad: Any) -> None:
    """The schemas reject the input that the node rejects."""
    shape = validator(described(), name)
    shape.validate(good)
    with pytest.raises(ValidationError):
        shape.validate(bad)
