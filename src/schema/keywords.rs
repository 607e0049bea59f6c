//! The keywords of draft 2020-12, and the JSON types that each of them says something about.

use std::fmt::Write as _;

/// A set of JSON types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Types(u8);

impl Types {
    pub const NONE: Types = Types(0);
    pub const NULL: Types = Types(1);
    pub const BOOLEAN: Types = Types(2);
    pub const INTEGER: Types = Types(4);
    /// Every integer is a number.
    pub const NUMBER: Types = Types(8 | 4);
    pub const STRING: Types = Types(16);
    pub const ARRAY: Types = Types(32);
    pub const OBJECT: Types = Types(64);
    pub const ANY: Types = Types(127);
    const NAMED: [(&str, Types); 7] = [
        ("null", Types::NULL),
        ("boolean", Types::BOOLEAN),
        ("integer", Types::INTEGER),
        ("number", Types::NUMBER),
        ("string", Types::STRING),
        ("array", Types::ARRAY),
        ("object", Types::OBJECT),
    ];

    pub fn of_name(name: &str) -> Option<Types> {
        Types::NAMED.into_iter().find(|(known, _)| *known == name).map(|(_, types)| types)
    }

    pub fn and(self, other: Types) -> Types {
        Types(self.0 | other.0)
    }

    pub fn without(self, other: Types) -> Types {
        Types(self.0 & !other.0)
    }

    pub fn contains(self, other: Types) -> bool {
        self.0 & other.0 == other.0
    }

    pub fn meets(self, other: Types) -> bool {
        self.0 & other.0 != 0
    }

    /// `a string, an object or null`.
    pub fn in_words(self) -> String {
        if self == Types::ANY {
            return "any JSON value".to_owned();
        }
        let nouns = [
            ("true or false", Types::BOOLEAN),
            ("a number", Types::NUMBER),
            ("an integer", Types::INTEGER),
            ("a string", Types::STRING),
            ("a list", Types::ARRAY),
            ("an object", Types::OBJECT),
            ("null", Types::NULL),
        ];
        let mut words = String::new();
        let mut left = self;
        for (noun, types) in nouns {
            if left.contains(types) {
                left = left.without(types);
                // Writing to a string cannot fail.
                let _ = write!(words, "{}{noun}", if words.is_empty() { "" } else { ", or " });
            }
        }
        words
    }
}

/// Keywords that say something to people, or to the compiler itself, and nothing to a validator.
const ANNOTATIONS: [&str; 18] = [
    "$schema",
    "$id",
    "$anchor",
    "$dynamicAnchor",
    "$vocabulary",
    "$defs",
    "definitions",
    "title",
    "description",
    "default",
    "examples",
    "$comment",
    "deprecated",
    "readOnly",
    "writeOnly",
    "contentMediaType",
    "contentSchema",
    "contentEncoding",
];

const ASSERTIONS: [(&str, Types); 40] = [
    ("type", Types::ANY),
    ("enum", Types::ANY),
    ("const", Types::ANY),
    ("format", Types::ANY),
    ("$ref", Types::ANY),
    ("$dynamicRef", Types::ANY),
    ("allOf", Types::ANY),
    ("anyOf", Types::ANY),
    ("oneOf", Types::ANY),
    ("not", Types::ANY),
    ("if", Types::ANY),
    ("then", Types::ANY),
    ("else", Types::ANY),
    ("minLength", Types::STRING),
    ("maxLength", Types::STRING),
    ("pattern", Types::STRING),
    ("minimum", Types::NUMBER),
    ("maximum", Types::NUMBER),
    ("exclusiveMinimum", Types::NUMBER),
    ("exclusiveMaximum", Types::NUMBER),
    ("multipleOf", Types::NUMBER),
    ("items", Types::ARRAY),
    ("prefixItems", Types::ARRAY),
    ("contains", Types::ARRAY),
    ("minContains", Types::ARRAY),
    ("maxContains", Types::ARRAY),
    ("minItems", Types::ARRAY),
    ("maxItems", Types::ARRAY),
    ("uniqueItems", Types::ARRAY),
    ("unevaluatedItems", Types::ARRAY),
    ("properties", Types::OBJECT),
    ("required", Types::OBJECT),
    ("additionalProperties", Types::OBJECT),
    ("patternProperties", Types::OBJECT),
    ("propertyNames", Types::OBJECT),
    ("minProperties", Types::OBJECT),
    ("maxProperties", Types::OBJECT),
    ("dependentRequired", Types::OBJECT),
    ("dependentSchemas", Types::OBJECT),
    ("unevaluatedProperties", Types::OBJECT),
];

/// Whether a keyword has no bearing on what is valid; names that begin with `x-` are anybody's own.
pub fn is_annotation(key: &str) -> bool {
    ANNOTATIONS.contains(&key) || key.starts_with("x-")
}

/// The types that a keyword says something about; None for what is no keyword.
pub fn types_of(key: &str) -> Option<Types> {
    ASSERTIONS.iter().find(|(known, _)| *known == key).map(|(_, types)| *types)
}
