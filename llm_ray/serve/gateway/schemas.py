"""Checks JSON schemas for answers: finds what no engine here enforces before the request reaches one.

All engines constrain answers with xgrammar. In each schema it reads only the first of `$ref`, `const`, `enum`, `anyOf`,
`oneOf`, `allOf` and `type`, and silently ignores the rest, so an answer could break the schema despite status 200.
`unenforced` finds these cases; tests/full/test_schemas.py checks each keyword with each engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vllm.sampling_params import check_json_nesting
from vllm.v1.structured_output.backend_xgrammar import STRING_SUPPORTED_FORMATS


class Fault(NamedTuple):
    """A place in a schema that would not be enforced, with the reason or a replacement."""

    place: str
    said: str


_LENGTHS = {"minLength", "maxLength"}
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_OF_PROPERTIES = "properties required additionalProperties unevaluatedProperties patternProperties propertyNames minProperties maxProperties"
# Keywords enforced together with each type.
_BESIDE: Mapping[str, frozenset[str]] = {
    "object": frozenset(_OF_PROPERTIES.split()),
    "array": frozenset(("items", "prefixItems", "unevaluatedItems", "minItems", "maxItems")),
    "string": frozenset((*_LENGTHS, "pattern", "format")),
    "number": frozenset(_BOUNDS),
    "integer": frozenset(_BOUNDS),
    "boolean": frozenset(),
    "null": frozenset(),
}
_HEADS = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf", "type")
# Keywords that no engine ever enforces.
_NEVER = frozenset(
    [
        "not",
        "if",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "contains",
        "uniqueItems",
        "multipleOf",
        "additionalItems",
        "$dynamicRef",
        "$recursiveRef",
    ]
)
_ASSERTIONS = frozenset().union(_HEADS, *_BESIDE.values())
# Keywords from which xgrammar infers the type object or array, if none is given.
_IMPLIES = {
    "object": ("properties", "additionalProperties", "unevaluatedProperties"),
    "array": ("items", "prefixItems", "unevaluatedItems"),
}
_UNENFORCED = "it is not enforced here: remove it, and check the answer yourself"
# Larger schemas are not compared, because that would take as long as an answer.
_MOST_BRANCHES, _MOST_VALUES, _DEEPEST = 100, 10_000, 32
_REFERS = "only references within this schema are followed: # and #/…, with names without ~ and %"
# Of the groups with a question mark only (?:…), and only escapes that mean the same as in ECMAScript.
_PATTERN = re.compile(
    r"\\(?:[^a-zA-Z0-9]|[dDwWsSnrtfv0]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|c[a-zA-Z])|\[\^?|\(\?:|[^\\]", re.DOTALL
)


def unenforced(schema: Any, place: str) -> Fault | None:
    """Returns the first part of a schema that would not be enforced; None if all of it is. `place` is the schema's path
    in the request.

    Raises VLLMValidationError for a schema nested too deeply.
    """
    check_json_nesting(schema)
    return next(_Schema(schema, place).all(), None)


def unenforced_tag(tag: Any, place: str) -> Fault | None:
    """Returns the first unenforced part of the schemas and patterns in a structural tag, or None."""
    waiting = [(tag, place)]
    while waiting:
        part, at = waiting.pop()
        if isinstance(part, list):
            waiting += [(one, f"{at}[{number}]") for number, one in enumerate(part)]
        if not isinstance(part, dict):
            continue
        for name, value in part.items():
            here = f"{at}.{name}"
            if name in ("json_schema", "schema") and isinstance(value, dict):
                if fault := unenforced(value, here):
                    return fault
            elif name == "pattern" and isinstance(value, str):
                if reason := unenforced_pattern(value):
                    return Fault(here, reason)
            else:
                waiting.append((value, here))
    return None


def unenforced_pattern(pattern: str) -> str | None:
    """Returns what in a regular expression would be ignored or read differently from ECMAScript; None if nothing is."""
    parts: list[str] = []
    at, in_class = 0, False
    while at < len(pattern):
        if not (match := _PATTERN.match(pattern, at)):
            return f"the escape {pattern[at : at + 2]} is not supported: write the characters themselves"
        part = match[0]
        if in_class and part.startswith("["):
            if pattern.startswith("[:", at):
                return "named classes such as [:alpha:] are not supported: write the characters themselves"
            part = "["
        elif part == "(" and pattern.startswith("(?", at):
            return "lookaround, named groups and flags are not supported: only (?:…) may begin with (?"
        at += len(part)
        if in_class:
            in_class = part != "]"
        elif part.startswith("["):
            in_class = True
            parts.append("x")
        else:
            parts.append(part if part in ("^", "$", "|", "(", "(?:", ")") else "x")
    depth, alternatives = 0, [""]
    for part in parts:
        depth += {"(": 1, "(?:": 1, ")": -1}.get(part, 0)
        if part == "|" and depth == 0:
            alternatives.append("")
        else:
            alternatives[-1] += "(" if part == "(?:" else part
    if any(re.search(r"[^(^]\^|\$[^)$]", alternative) for alternative in alternatives):
        return "^ is enforced only at its beginning, and $ at its end"
    return None


class _Schema:
    """A complete schema, in which references are resolved."""

    def __init__(self, root: Any, place: str) -> None:
        self._root, self._place = root, place
        self._referred = {"#"}
        self._waiting: list[tuple[str, Any]] = [("#", root)]  # references and their targets
        self._straight: set[str] = set()  # references known not to be circular
        self._known: dict[int, set[str]] = {}  # types of a schema's values, by the schema's id()

    def all(self) -> Iterator[Fault]:
        """Yields the faults of the root and of everything it references."""
        while self._waiting:
            reference, schema = self._waiting.pop()
            yield from self.faults(schema, self._place + reference[1:].replace("/", "."))

    def faults(self, schema: Any, place: str) -> Iterator[Fault]:
        """Yields the faults of a part of the schema. Its references are queued."""
        if schema is True:
            return
        if schema is False:
            yield Fault(
                place, "false, which allows nothing, is enforced only in items, additionalProperties and unevaluated…"
            )
            return
        if not isinstance(schema, dict):
            yield Fault(place, "a schema must be an object, or true")
            return
        for keyword in schema.keys() & _NEVER:
            if not (keyword == "uniqueItems" and schema[keyword] is False):
                yield Fault(f"{place}.{keyword}", _UNENFORCED)
        if "$id" in schema and schema is not self._root:
            yield Fault(f"{place}.$id", "ids of subschemas are not supported: remove it")
        head = next((keyword for keyword in _HEADS if keyword in schema), None)
        if head == "type" or head is None:
            yield from self._typed(schema, place)
            return
        beside = (schema.keys() & _ASSERTIONS) - {head}
        if "type" in beside and self._types_of(schema, head) <= _declared(schema):
            beside -= {"type"}
        if head in ("const", "enum"):
            beside -= {"format"}
        for keyword in sorted(beside):
            yield Fault(f"{place}.{keyword}", f"it is not enforced together with {head}: remove it, or move it inside")
        if head == "$ref":
            yield from self._reference(schema["$ref"], f"{place}.$ref")
        elif head in ("anyOf", "oneOf", "allOf"):
            yield from self._several(head, schema[head], f"{place}.{head}")
        elif head == "enum" and not (isinstance(schema["enum"], list) and schema["enum"]):
            yield Fault(f"{place}.enum", "it must be a list of at least one value")

    def _reference(self, reference: Any, place: str) -> Iterator[Fault]:
        target = self._target(reference)
        if target is None:
            yield Fault(place, _REFERS)
        elif self._circular(reference):
            yield Fault(place, "it refers to itself")
        elif reference not in self._referred:
            self._referred.add(reference)
            self._waiting.append((reference, target[0]))

    def _target(self, reference: Any) -> tuple[Any] | None:
        """Returns a reference's target in a 1-tuple; None if the reference is not supported."""
        if not isinstance(reference, str) or not re.fullmatch(r"#(/[^~%/]+)*", reference):
            return None
        found = self._root
        for name in reference.split("/")[1:]:
            if not isinstance(found, dict) or name not in found:
                return None
            found = found[name]
        return (found,)

    def _circular(self, reference: str) -> bool:
        """Whether a reference leads back to itself without a property or an item in between."""
        path, way = [(reference, iter(self._onward(reference)))], {reference}
        while path:
            name, onward = path[-1]
            following = next(onward, None)
            if following is None:
                path.pop()
                way.discard(name)
                self._straight.add(name)
            elif following in way:
                return True
            elif following not in self._straight:
                way.add(following)
                path.append((following, iter(self._onward(following))))
        return False

    def _onward(self, reference: str) -> set[str]:
        """Returns the references that a target consists of, directly or as a branch."""
        waiting, found = [*(self._target(reference) or ())], set()
        while waiting:
            schema = waiting.pop()
            if not isinstance(schema, dict):
                continue
            if isinstance(other := schema.get("$ref"), str):
                found.add(other)
            for keyword in ("anyOf", "oneOf", "allOf"):
                if isinstance(branches := schema.get(keyword), list):
                    waiting += branches
        return found

    def _several(self, head: str, branches: Any, place: str) -> Iterator[Fault]:
        if not isinstance(branches, list) or not branches:
            yield Fault(place, "it must be a list of at least one schema")
            return
        if head == "allOf" and len(branches) > 1:
            yield Fault(place, "several schemas that must all hold are not enforced: merge them into one")
            return
        for number, branch in enumerate(branches):
            yield from self.faults(branch, f"{place}[{number}]")
        if head == "oneOf" and len(branches) > _MOST_BRANCHES:
            yield Fault(place, f"more than {_MOST_BRANCHES} schemas are not compared: use anyOf")
        elif head == "oneOf" and not all(self._apart(a, b) for i, a in enumerate(branches) for b in branches[:i]):
            yield Fault(
                place,
                "it is enforced only if its schemas exclude each other (different types, different values, or a "
                "required property with different values); use anyOf if several may hold",
            )

    # By type ----------------------------------------------------------------------------------------------------------

    def _typed(self, schema: dict[str, Any], place: str) -> Iterator[Fault]:
        asked = schema.get("type")
        implied = next((kind for kind, keywords in _IMPLIES.items() if schema.keys() & set(keywords)), None)
        types = [implied] if asked is None else asked if isinstance(asked, list) else [asked]
        if asked is None and implied is None:
            for keyword in sorted(schema.keys() & _ASSERTIONS):
                kind = next(kind for kind, beside in _BESIDE.items() if keyword in beside)
                yield Fault(
                    f"{place}.{keyword}",
                    f'it is enforced only together with a type: add "type": "{kind}", or a list of types',
                )
            return
        if not types or not all(isinstance(kind, str) and kind in _BESIDE for kind in types):
            yield Fault(f"{place}.type", f"it must be one of {', '.join(_BESIDE)}, or a list of them")
            return
        if "object" in types:
            yield from self._object(schema, place)
        if "array" in types:
            yield from self._array(schema, place)
        if "string" in types:
            yield from _string(schema, place)
        if "number" in types or "integer" in types:
            yield from _number(schema, place, whole="integer" in types)

    def _object(self, schema: dict[str, Any], place: str) -> Iterator[Fault]:
        properties, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        for keyword, value in (("properties", properties), ("patternProperties", patterns)):
            if not isinstance(value, dict):
                yield Fault(f"{place}.{keyword}", "it must be an object of schemas")
                return
            for name, part in value.items():
                yield from self.faults(part, f"{place}.{keyword}.{name}")
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            yield Fault(f"{place}.required", "it must be a list of names")
        elif missing := [name for name in required if name not in properties]:
            yield Fault(
                f"{place}.required",
                f"`{missing[0]}` is not among the properties, so it is not enforced: add it there, as {{}}",
            )
        if "patternProperties" in schema:
            if "properties" in schema or len(patterns) > 1:
                yield Fault(f"{place}.patternProperties", "it is enforced only with one pattern and without properties")
            for pattern in patterns:
                if reason := unenforced_pattern(pattern):
                    yield Fault(f"{place}.patternProperties", reason)
        if "propertyNames" in schema:
            yield from self._names(schema, place)
        for keyword in ("additionalProperties", "unevaluatedProperties"):
            if isinstance(schema.get(keyword), dict):
                yield from self.faults(schema[keyword], f"{place}.{keyword}")
        more = any(
            schema.get(keyword, False) is not False for keyword in ("additionalProperties", "unevaluatedProperties")
        )
        named = bool(patterns) or "propertyNames" in schema or more
        yield from _counts(schema, ("minProperties", "maxProperties"), place)
        for keyword in ("minProperties", "maxProperties"):
            if keyword in schema and not properties and not named:
                yield Fault(
                    f"{place}.{keyword}",
                    'no properties are defined: add "additionalProperties": true',
                )

    def _names(self, schema: dict[str, Any], place: str) -> Iterator[Fault]:
        names = schema["propertyNames"]
        beside = {"properties", "patternProperties", "unevaluatedProperties"} & schema.keys()
        if beside or schema.get("additionalProperties") is False:
            yield Fault(
                f"{place}.propertyNames",
                "the only other keyword of properties with which it is enforced is additionalProperties",
            )
        elif (
            not isinstance(names, dict)
            or names.get("type", "string") != "string"
            or names.keys() & {"$ref", "anyOf", "oneOf", "allOf"}
        ):
            yield Fault(
                f"{place}.propertyNames", "it is enforced only as pattern, format, lengths, const or enum of a string"
            )
        else:
            yield from self.faults({"type": "string"} | names, f"{place}.propertyNames")

    def _array(self, schema: dict[str, Any], place: str) -> Iterator[Fault]:
        items, first = schema.get("items", True), schema.get("prefixItems", [])
        if isinstance(items, list):
            yield Fault(f"{place}.items", "since 2020, a list of schemas is called prefixItems: use that")
        elif items is not False:
            yield from self.faults(items, f"{place}.items")
        if not isinstance(first, list):
            yield Fault(f"{place}.prefixItems", "it must be a list of schemas")
            return
        for number, part in enumerate(first):
            if part is True:
                yield Fault(f"{place}.prefixItems[{number}]", "write {}, which means the same")
            yield from self.faults(part, f"{place}.prefixItems[{number}]")
        if isinstance(schema.get("unevaluatedItems"), dict):
            yield from self.faults(schema["unevaluatedItems"], f"{place}.unevaluatedItems")
        yield from _counts(schema, ("minItems", "maxItems"), place)
        for keyword in ("minItems", "maxItems"):
            if keyword in schema and not schema.keys() & set(_IMPLIES["array"]):
                yield Fault(f"{place}.{keyword}", 'no items are defined: add "items": {}')

    # What a schema allows ---------------------------------------------------------------------------------------------

    def _types(self, schema: Any, depth: int = 0) -> set[str]:
        """Returns the types that a schema's values may have (an upper bound)."""
        if not isinstance(schema, dict) or depth > _DEEPEST:
            return set(_BESIDE)
        if id(schema) not in self._known:
            self._known[id(schema)] = set(_BESIDE)  # recursive schema: any type until known
            self._known[id(schema)] = self._types_of(
                schema, next((keyword for keyword in _HEADS if keyword in schema), None), depth
            )
        return self._known[id(schema)]

    def _types_of(self, schema: dict[str, Any], head: str | None, depth: int = 0) -> set[str]:
        if head == "$ref" and (target := self._target(schema["$ref"])):
            return self._types(target[0], depth + 1)
        if head in ("const", "enum"):
            values = [schema["const"]] if head == "const" else schema["enum"]
            return {_type(value) for value in values} if isinstance(values, list) else set(_BESIDE)
        if head in ("anyOf", "oneOf", "allOf") and isinstance(schema[head], list):
            return set().union(*(self._types(branch, depth + 1) for branch in schema[head]))
        return _declared(schema)

    def _resolved(self, schema: Any) -> Any:
        for _ in range(_DEEPEST):
            if not isinstance(schema, dict) or "$ref" not in schema or not (target := self._target(schema["$ref"])):
                break
            schema = target[0]
        return schema

    def _values(self, schema: Any) -> list[Any] | None:
        """Returns the values that a schema lists; None if it does not list them."""
        schema = self._resolved(schema)
        if not isinstance(schema, dict):
            return None
        return (
            [schema["const"]] if "const" in schema else schema["enum"] if isinstance(schema.get("enum"), list) else None
        )

    def _apart(self, one: Any, other: Any) -> bool:
        """Whether no value can match both schemas."""
        if not self._types(one) & self._types(other):
            return True
        one, other = self._resolved(one), self._resolved(other)
        if _differ(self._values(one), self._values(other)):
            return True
        if self._types(one) | self._types(other) != {"object"}:
            return False
        names = set(one.get("required") or ()) & set(other.get("required") or ())
        return any(
            _differ(*(self._values((part.get("properties") or {}).get(name)) for part in (one, other)))
            for name in names
        )


def _differ(some: list[Any] | None, others: list[Any] | None) -> bool:
    """Whether two lists have no value in common; 1 and true differ."""
    if some is None or others is None or len(some) * len(others) > _MOST_VALUES:
        return False
    return not any(
        one == other and isinstance(one, bool) == isinstance(other, bool) for one in some for other in others
    )


def _declared(schema: dict[str, Any]) -> set[str]:
    """Returns the types that a schema's keywords allow."""
    implied = [kind for kind, keywords in _IMPLIES.items() if schema.keys() & set(keywords)][:1]
    types = schema.get("type", implied or [*_BESIDE])
    found = {kind for kind in (types if isinstance(types, list) else [types]) if isinstance(kind, str)}
    return found | ({"integer"} if "number" in found else set())


def _type(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return "integer"
    return {float: "number", str: "string", list: "array"}.get(type(value), "object")


def _counts(schema: dict[str, Any], keywords: tuple[str, str], place: str) -> Iterator[Fault]:
    for keyword in keywords:
        value = schema.get(keyword, 0)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            yield Fault(f"{place}.{keyword}", "it must be a non-negative integer")


def _string(schema: dict[str, Any], place: str) -> Iterator[Fault]:
    yield from _counts(schema, ("minLength", "maxLength"), place)
    form, pattern = schema.get("format"), schema.get("pattern")
    if form is not None and form not in STRING_SUPPORTED_FORMATS:
        yield Fault(
            f"{place}.format", f"it is not enforced; supported are: {', '.join(sorted(STRING_SUPPORTED_FORMATS))}"
        )
    if pattern is not None:
        if not isinstance(pattern, str):
            yield Fault(f"{place}.pattern", "it must be a regular expression")
        elif reason := unenforced_pattern(pattern):
            yield Fault(f"{place}.pattern", reason)
        if form is not None:
            yield Fault(f"{place}.pattern", "it is not enforced together with format: remove one of them")
    if form is not None or pattern is not None:
        for keyword in sorted(schema.keys() & _LENGTHS):
            yield Fault(
                f"{place}.{keyword}",
                "it is not enforced together with pattern or format: write it into the pattern, as .{1,9}",
            )


def _number(schema: dict[str, Any], place: str, whole: bool) -> Iterator[Fault]:
    for keyword in _BOUNDS:
        value = schema.get(keyword, 0)
        if not isinstance(value, int | float) or isinstance(value, bool):
            yield Fault(f"{place}.{keyword}", "it must be a number")
        elif whole and (value != value // 1 or abs(value) >= 2**63):
            yield Fault(f"{place}.{keyword}", "with type integer it must be an integer of at most 63 bits")
