"""JSON schemas of every keyword: documents that an answer may be, and others that it may not, or why the schema is
refused.

The keywords are those of the JSON Schema Test Suite (draft 2020-12). `OBEYED` are held against each engine, `REFUSED`
against the gateway.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Document = Any


class Obeyed(NamedTuple):
    """A schema, and documents in Python's form."""

    schema: Any
    right: list[Document]
    wrong: list[Document]


_INTEGER, _TEXT = {"type": "integer"}, {"type": "string"}
_KIND = {"type": "object", "properties": {"kind": {"const": "a"}, "x": _INTEGER}, "required": ["kind"]}
_OTHER = {"type": "object", "properties": {"kind": {"enum": ["b", "c"]}}, "required": ["kind"]}

OBEYED = {
    "anything": Obeyed({}, [1, "a", [1]], []),
    "type": Obeyed(_INTEGER, [1, -20], ["1", 1.5, True, None, [1], {}]),
    "types": Obeyed({"type": ["string", "null"], "maxLength": 2}, ["ab", None], ["abc", 1]),
    "bounds of several types": Obeyed(
        {"type": ["integer", "string"], "minimum": 3, "minLength": 2}, [3, "ab"], [2, "a"]
    ),
    "boolean": Obeyed({"type": "boolean"}, [True], [1, None, "true"]),
    "null": Obeyed({"type": "null"}, [None], [0, False]),
    "const": Obeyed({"const": "a b"}, ["a b"], ["a", "b", 1]),
    "const of a number": Obeyed({"const": 12}, [12], [1, 2, 13]),
    "enum": Obeyed({"type": ["string", "integer", "null"], "enum": ["a", 1, None]}, ["a", 1, None], ["b", 2, True]),
    "minimum, maximum": Obeyed({"type": "integer", "minimum": 3, "maximum": 15}, [3, 9, 15], [2, 16, -4, 100, 3.5]),
    "exclusive bounds": Obeyed({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6}, [4, 5], [3, 6, 10]),
    "minimum alone": Obeyed({"type": "integer", "minimum": -12}, [-12, 0, 7], [-13, -100]),
    "maximum alone": Obeyed({"type": "integer", "maximum": 12}, [-120, 0, 12], [13, 100]),
    "minimum alone, above 0": Obeyed({"type": "integer", "minimum": 3}, [4, 25], [2, 0, -4]),
    "exclusive bounds alone": Obeyed(
        {"type": "array", "items": {"type": "integer", "exclusiveMinimum": 3}}, [[4]], [[3], [-1], [0]]
    ),
    "minimum of numbers alone": Obeyed({"type": "number", "minimum": 2}, [2.5, 3], [1.5, -1, 0, 1]),
    "maximum of numbers alone": Obeyed({"type": "number", "maximum": -2}, [-2.5, -3], [-1.5, 1, 0, -1]),
    "bounds of numbers": Obeyed(
        {"type": "number", "minimum": 0.25, "maximum": 1.75}, [0.25, 1, 1.5], [0.2, 1.8, 2, -1]
    ),
    "exclusive bounds of numbers": Obeyed(
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, [0.5], [0, 1, 0.0, 1.5, -0.5]
    ),
    "minLength, maxLength": Obeyed(
        {"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "abc"], ["a", "abcd", ""]
    ),
    "pattern": Obeyed(
        {"type": "string", "pattern": "^[a-c]+-\\d{2}$"}, ["ab-12"], ["ad-12", "ab-1", "ab-123", "-12", 12]
    ),
    "pattern of alternatives": Obeyed(
        {"type": "string", "pattern": "^(?:yes|no)$"}, ["yes", "no"], ["y", "yesno", "maybe"]
    ),
    "format": Obeyed({"type": "string", "format": "date"}, ["2020-01-31"], ["2020-13-01", "x", "2020-1-1"]),
    "format uuid": Obeyed(
        {"type": "string", "format": "uuid"}, ["2eb8aa08-aa98-11ea-b4aa-73b441d16380"], ["2eb8aa08", "z"]
    ),
    "items": Obeyed({"type": "array", "items": _INTEGER}, [[1], [1, 2]], [["a"], [1, "a"], 1]),
    "minItems, maxItems": Obeyed(
        {"type": "array", "items": _INTEGER, "minItems": 2, "maxItems": 3}, [[1, 2]], [[1], [1, 2, 3, 4]]
    ),
    "prefixItems": Obeyed(
        {"type": "array", "prefixItems": [_INTEGER, _TEXT], "items": False}, [[1, "a"]], [["a"], [1, 2], [1, "a", 2]]
    ),
    "unevaluatedItems": Obeyed(
        {"type": "array", "prefixItems": [_INTEGER], "unevaluatedItems": False}, [[1]], [[1, 2], ["a"]]
    ),
    "properties": Obeyed(
        {"type": "object", "properties": {"a": _INTEGER, "b": _TEXT}}, [{"a": 1}, {"b": "x"}], [{"a": "x"}, {"c": 1}]
    ),
    "required": Obeyed(
        {"type": "object", "properties": {"a": _INTEGER, "b": {}}, "required": ["a", "b"]},
        [{"a": 1, "b": 2}],
        [{"a": 1}, {}],
    ),
    "additionalProperties": Obeyed(
        {"type": "object", "properties": {"a": _INTEGER}, "additionalProperties": _TEXT},
        [{"a": 1}, {"b": "x"}],
        [{"b": 1}, {"a": "x"}, {"b": "x", "a": "x"}],
    ),
    "additionalProperties false": Obeyed(
        {"properties": {"a": _INTEGER}, "additionalProperties": False}, [{"a": 1}], [{"b": 1}, {"a": "x"}]
    ),
    "unevaluatedProperties": Obeyed(
        {"type": "object", "properties": {"a": _INTEGER}, "unevaluatedProperties": False},
        [{"a": 1}],
        [{"b": 1}, {"a": "x"}],
    ),
    "patternProperties": Obeyed(
        {"type": "object", "patternProperties": {"^a+$": _INTEGER}, "additionalProperties": False},
        [{"a": 1}],
        [{"a": "x"}, {"b": 1}],
    ),
    "propertyNames": Obeyed(
        {"type": "object", "propertyNames": {"pattern": "^a+$"}}, [{"a": 1}], [{"b": 1}, {"ab": 1}]
    ),
    "propertyNames enum": Obeyed({"type": "object", "propertyNames": {"enum": ["x", "y"]}}, [{"x": 1}], [{"b": 1}]),
    "minProperties, maxProperties": Obeyed(
        {"type": "object", "additionalProperties": _INTEGER, "minProperties": 1, "maxProperties": 2},
        [{"a": 1}],
        [{}, {"a": 1, "b": 2, "c": 3}, {"a": "x"}],
    ),
    "minProperties of given ones": Obeyed(
        {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "minProperties": 2},
        [{"a": 1, "b": 2}],
        [{}, {"a": 1}],
    ),
    "unevaluatedProperties of a schema": Obeyed(
        {"type": "object", "properties": {"a": _INTEGER}, "unevaluatedProperties": _TEXT},
        [{"a": 1}, {"b": "x"}],
        [{"b": 1}, {"a": "x"}],
    ),
    "additionalProperties alone": Obeyed({"type": "object", "additionalProperties": _TEXT}, [{"b": "x"}], [{"b": 1}]),
    "additionalProperties true": Obeyed(
        {"type": "object", "properties": {"a": _INTEGER}, "required": ["a"], "additionalProperties": True},
        [{"a": 1}, {"a": 1, "b": "x"}],
        [{"a": "x"}, {"b": 1}, {"a": 1, "b": 2, "a ": None, "c": {}} | {"a": None}],
    ),
    "$ref": Obeyed(
        {"$defs": {"n": _INTEGER}, "type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}},
        [{"a": 1}],
        [{"a": "x"}],
    ),
    "$ref of the root": Obeyed(
        {"type": "object", "properties": {"n": _INTEGER, "more": {"$ref": "#"}}, "required": ["n"]},
        [{"n": 1, "more": {"n": 2}}],
        [{"n": 1, "more": {}}, {"n": 1, "more": 2}],
    ),
    "definitions": Obeyed({"definitions": {"n": _INTEGER}, "$ref": "#/definitions/n"}, [1], ["x"]),
    "anyOf": Obeyed({"anyOf": [_INTEGER, {"type": "string", "maxLength": 1}]}, [1, "a"], ["ab", None]),
    "anyOf beside its type": Obeyed(
        {"type": "object", "anyOf": [_KIND, _OTHER]}, [{"kind": "a"}, {"kind": "b"}], [{"kind": "d"}, 1]
    ),
    "oneOf by type": Obeyed({"oneOf": [_TEXT, _INTEGER]}, ["a", 1], [None, 1.5]),
    "oneOf by a property": Obeyed(
        {"oneOf": [_KIND, {"$ref": "#/$defs/o"}], "$defs": {"o": _OTHER}}, [{"kind": "c"}], [{"kind": "d"}, {}]
    ),
    "allOf of one": Obeyed(
        {"allOf": [{"$ref": "#/$defs/n"}], "$defs": {"n": _INTEGER}, "description": "a number"}, [1], ["x"]
    ),
    "annotations": Obeyed(
        {**_INTEGER, "title": "t", "default": 1, "examples": [2], "$comment": "c", "x-kind": {"not": {}}}, [3], ["x"]
    ),
}

# The schema, and the place in it that is named.
REFUSED = {
    "not": ({"type": "object", "properties": {"a": {"type": "integer", "not": {"const": 2}}}}, "properties.a.not"),
    "if": ({"type": "integer", "if": {"minimum": 3}, "then": {"maximum": 5}}, "if"),
    "allOf": ({"allOf": [{"type": "integer"}, {"minimum": 2}]}, "allOf"),
    "allOf beside": ({"type": "object", "properties": {"a": {}}, "allOf": [{"required": ["a"]}]}, "properties"),
    "anyOf beside": ({"type": "object", "properties": {"a": {}}, "anyOf": [{"type": "object"}]}, "properties"),
    "anyOf of other types": ({"type": "string", "anyOf": [{"maxLength": 2}, {"type": "integer"}]}, "type"),
    "oneOf": ({"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 2}]}, "oneOf"),
    "oneOf of objects": ({"oneOf": [{**_KIND, "required": []}, _OTHER]}, "oneOf"),
    "enum beside": ({"enum": ["a", "b"], "maxLength": 1}, "maxLength"),
    "enum of another type": ({"enum": ["a", 1], "type": "string"}, "type"),
    "no type": ({"properties": {"a": {"minimum": 3}}}, "properties.a.minimum"),
    "no type, required": ({"required": ["a"]}, "required"),
    "required alone": ({"type": "object", "required": ["a"]}, "required"),
    "multipleOf": ({"type": "integer", "multipleOf": 3}, "multipleOf"),
    "a bound that is no whole number": ({"type": "integer", "minimum": 1.5}, "minimum"),
    "a bound of draft 4": ({"type": "integer", "minimum": 1, "exclusiveMinimum": True}, "exclusiveMinimum"),
    "uniqueItems": ({"type": "array", "items": {}, "uniqueItems": True}, "uniqueItems"),
    "contains": ({"type": "array", "items": {}, "contains": {"const": 1}}, "contains"),
    "items of draft 7": ({"type": "array", "items": [{"type": "integer"}]}, "items"),
    "minItems alone": ({"type": "array", "minItems": 1}, "minItems"),
    "dependentRequired": (
        {"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
        "dependentRequired",
    ),
    "dependentSchemas": ({"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}}, "dependentSchemas"),
    "dependencies": ({"type": "object", "dependencies": {"a": ["b"]}}, "dependencies"),
    "patternProperties beside": (
        {"type": "object", "properties": {"b": {}}, "patternProperties": {"^a": {}}},
        "patternProperties",
    ),
    "propertyNames beside": (
        {"type": "object", "properties": {"b": {}}, "propertyNames": {"maxLength": 3}},
        "propertyNames",
    ),
    "format": ({"type": "string", "format": "idn-email"}, "format"),
    "format without type": ({"format": "date"}, "format"),
    "pattern beside a length": ({"type": "string", "pattern": "^a+$", "maxLength": 3}, "maxLength"),
    "pattern beside format": ({"type": "string", "pattern": "^2", "format": "date"}, "pattern"),
    "lookahead": ({"type": "string", "pattern": "^(?!b)[a-z]$"}, "pattern"),
    "an anchor in the middle": ({"type": "string", "pattern": "a^b"}, "pattern"),
    "an anchor of Python's": ({"type": "string", "pattern": "^a\\Z"}, "pattern"),
    "a named class": ({"type": "string", "pattern": "^[[:alpha:]]$"}, "pattern"),
    "$ref beside": ({"$defs": {"n": _INTEGER}, "$ref": "#/$defs/n", "minimum": 3}, "minimum"),
    "$ref elsewhere": ({"$ref": "https://example.com/schema"}, "$ref"),
    "$ref of an anchor": ({"$defs": {"n": {"$anchor": "n"}}, "$ref": "#n"}, "$ref"),
    "$ref to nothing": ({"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}}, "properties.a.$ref"),
    "$ref to what it stands in": (
        {"$defs": {"n": {"anyOf": [{"$ref": "#/$defs/n"}, {}]}}, "$ref": "#/$defs/n"},
        "$ref",
    ),
    "a reference's own": (
        {"$defs": {"n": {"not": {}}}, "type": "array", "items": {"$ref": "#/$defs/n"}},
        "$defs.n.not",
    ),
    "$dynamicRef": ({"$dynamicRef": "#n"}, "$dynamicRef"),
    "$id within": ({"type": "array", "items": {"$id": "a", "type": "integer"}}, "items.$id"),
    "false": ({"type": "object", "properties": {"a": False}}, "properties.a"),
    "a type of none": ({"type": "any"}, "type"),
}
