"""/openapi.json, and requests made from it at random: no server error, and every answer as it is described."""

import json
import random
import re

import jsonschema
import pytest

JUNK = (None, True, -1, 0, 2**63, 1e308, "", "x", "\x00", "é" * 300, [], {}, [[]], {"a": 1}, ["x", 1], [None])
OFTEN = 0.85  # how often a field is what it is described to be
KEPT = {
    "max_tokens": 3,
    "max_completion_tokens": 2,
    "max_output_tokens": 16,
}  # else an answer may fill the model's room
PLAIN = {  # every other time: hardly a list of items would be right
    "/v1/responses": {"input": "def f("},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "def f("}]},
}
PLAIN |= {path: {"text_1": "def f(", "text_2": ["import os", "x"]} for path in ("/score", "/v1/score")}
REFUSED = {"/classify"}  # the embedded model has no classes
ENDS = ("event: response.completed", "event: response.incomplete", "event: message_stop")
ADAPTERS = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
CLOSED = {"/tokenizer_info", "/v1/load_model", "/v1/unload_model", *ADAPTERS}  # unless a flag opens them
SHORT = {"/v1/responses": {"max_output_tokens": 16}}
NUM = 60  # requests of a route


class Maker:
    """Makes values that fit a schema, and now and then one that does not."""

    def __init__(self, shared: dict, seed: int) -> None:
        self.shared, self.rng = shared, random.Random(seed)

    def make(self, schema: dict, depth: int = 0):
        rng = self.rng
        if rng.random() > OFTEN and depth:
            return rng.choice(JUNK)
        if "$ref" in schema:
            return self.make(self.shared[schema["$ref"].rpartition("/")[2]], depth)
        if "anyOf" in schema:
            return self.make(rng.choice(schema["anyOf"]), depth)
        if "enum" in schema or "const" in schema:
            return rng.choice(schema.get("enum", [schema.get("const")]))
        return getattr(self, f"_{schema.get('type', 'any')}")(schema, depth)

    def _object(self, schema, depth):
        fields, must = schema.get("properties", {}), schema.get("required", ())
        likely = 0.12 if depth == 0 else 0.5  # with all of them, hardly a request would be right
        found = {n: self.make(s, depth + 1) for n, s in fields.items() if n in must or self.rng.random() < likely}
        more = schema.get("additionalProperties")
        if not fields and isinstance(more, dict):
            found[str(self.rng.randrange(2000))] = self.make(more, depth + 1)
        return found

    def _array(self, schema, depth):
        num = max(schema.get("minItems", 0), self.rng.choice((0, 1, 1, 2, 3)))
        return [self.make(schema.get("items", {}), depth + 1) for _ in range(num)]

    def _integer(self, schema, depth):
        least, most = schema.get("minimum", -(2**31)), schema.get("maximum", 2**31)
        usual = range(max(least, 0), min(most, max(least, 0) + 4) + 1)
        return self.rng.choice((*usual, *usual, least, most if most > 4096 else usual[-1]))  # n=1024 takes long

    def _number(self, schema, depth):
        least, most = schema.get("minimum", 0.0), schema.get("maximum", 2.0)
        return self.rng.choice((least, most, (least + most) / 2, 0.5, 1))

    def _string(self, schema, depth):
        return self.rng.choice(("def f(", "user", "a+", "x", '{"type": "string"}', "é\U0001f600", "1" * 50))

    def _boolean(self, schema, depth):
        return self.rng.random() < 0.5

    def _null(self, schema, depth):
        return None

    def _any(self, schema, depth):
        return self.rng.choice(JUNK)


@pytest.fixture(scope="module")
def described(server):
    import httpx

    return httpx.get(f"{server.url}/openapi.json").json()


def test_the_description_is_valid_and_describes_each_answer(described):
    for name, schema in described["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert name
    for path, methods in described["paths"].items():
        for operation in methods.values():
            content = operation["responses"]["200"].get("content")
            if path in ("/health", "/ping"):
                assert content is None
            elif path != "/openapi.json":
                schema = next(iter(content.values())).get("schema")
                assert schema, f"{path} has no schema: add it to answers.py"
                jsonschema.Draft202012Validator.check_schema(schema)


def operations(described):
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def check(described, operation, answer):
    kind = answer.headers.get("content-type", "").partition(";")[0]
    assert answer.status_code < 500 or answer.status_code == 503, answer.text
    if answer.status_code != 200:
        shared, body = described["components"]["schemas"], answer.json()
        theirs = "MessagesError" in json.dumps(operation)
        jsonschema.validate(body, shared["MessagesError" if theirs else "Error"])
        return
    contents = operation["responses"]["200"].get("content")
    if contents is None:
        assert not answer.content
        return
    assert kind in contents
    if kind == "application/json":
        jsonschema.validate(answer.json(), contents[kind].get("schema", {}))
    elif kind == "text/event-stream":
        last = answer.text.split("\n\n")[-2]
        assert last == "data: [DONE]" or last.startswith(ENDS)


def expected(path: str) -> int:
    """The status without a body. No response has this id, and /invocations takes several kinds of bodies."""
    return 404 if "/responses/" in path or path in CLOSED else 400 if path == "/invocations" else 200


def test_routes_without_a_body_answer_as_described(http, described, server):
    for path, method, operation in operations(described):
        if "requestBody" not in operation:
            answer = http.request(method, re.sub(r"\{\w+\}", server.names[0], path))
            assert answer.status_code == expected(path), (method, path)
            check(described, operation, answer)


def test_requests_made_at_random_are_answered_as_described(http, described):
    shared, statuses = described["components"]["schemas"], {}
    for path, method, operation in operations(described):
        if "requestBody" not in operation:
            continue
        maker = Maker(shared, seed=13)
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        schema = shared[schema["$ref"].rpartition("/")[2]]
        for i in range(NUM):
            kept = {name: value for name, value in KEPT.items() if name in schema["properties"]}
            body = maker.make(schema) | SHORT.get(path, kept)
            body |= PLAIN.get(path, {}) if i % 2 else {}
            answer = http.request(method, path, content=json.dumps(body), headers={"Content-Type": "application/json"})
            try:
                check(described, operation, answer)
            except (AssertionError, jsonschema.ValidationError) as error:
                raise AssertionError(f"{method} {path} with {json.dumps(body)}: {error}") from error
            statuses.setdefault(path, []).append(answer.status_code)
    for path, found in statuses.items():
        wanted = {404} if path in CLOSED else {400} if path in REFUSED else {200, 400}
        assert wanted <= set(found), (path, found)  # both were tried
