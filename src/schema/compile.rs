//! From the schema document to an [`ObjectType`]: which column a schema makes, and who checks each keyword.
//!
//! A schema with one type makes a column of that type; one with several, or none, a column of JSON text. `$ref` into the
//! document is followed, and so are the ways in which generators write "this or null" (`anyOf`, `oneOf`) and "this, with
//! a description" (`allOf` of one). What else there is goes on the list of keywords for the validator.

use std::collections::HashSet;

use serde_json::Number;

use super::document::Node;
use super::keywords::{Types, is_annotation, types_of};
use super::validator::{OWN_FORMATS, Validator};
use super::words::in_words;
use super::{
    BooleanType, DecimalType, Field, IntegerType, JsonType, ListType, MapType, NumberType, ObjectType, TextFormat,
    TextSet, TextType, ValueType, pattern,
};

const DRAFT: &str = "https://json-schema.org/draft/2020-12/schema";
/// Column names of the provenance columns begin with this.
const RESERVED_PREFIX: &str = "_kafka_";
/// Structs, lists and maps inside one another.
const MAX_NESTING: usize = 32;
/// Fields altogether: `$ref` can double them at each step.
const MAX_FIELDS: usize = 10_000;

type Members = [(String, Node)];

pub struct Compiled {
    pub object: ObjectType,
    pub slow_keywords: Vec<String>,
}

pub fn compile(document: &Node, extra_column: Option<&str>) -> Result<Compiled, Vec<String>> {
    let mut compiler = Compiler { document, problems: vec![], slow: vec![], followed: vec![], nesting: 0, fields: 0 };
    let object = compiler.root(extra_column);
    match object {
        Some(object) if compiler.problems.is_empty() => Ok(Compiled { object, slow_keywords: compiler.slow }),
        _ => Err(compiler.problems),
    }
}

struct Compiler<'a> {
    document: &'a Node,
    problems: Vec<String>,
    slow: Vec<String>,
    /// The `$ref`s on the way to this place.
    followed: Vec<String>,
    nesting: usize,
    fields: usize,
}

/// A value type, and whether it takes `null` as well.
type Value = (ValueType, bool);

/// The keywords of one schema.
struct Place<'a, 'p> {
    members: &'a Members,
    pointer: &'p str,
}

impl<'a> Place<'a, '_> {
    fn get(&self, key: &str) -> Option<&'a Node> {
        self.members.iter().find(|(k, _)| k == key).map(|(_, node)| node)
    }

    fn at(&self, key: &str) -> String {
        pointer_to(self.pointer, key)
    }

    /// Whether `enum` and `const` leave `null` valid.
    fn lists_null(&self) -> bool {
        let listed = !matches!(self.get("enum"), Some(Node::Array(values)) if !values.contains(&Node::Null));
        listed && self.get("const").is_none_or(|value| *value == Node::Null)
    }
}

impl<'a> Compiler<'a> {
    fn problem(&mut self, pointer: &str, found: &str, allowed: &str) {
        let at = if pointer.is_empty() { "/" } else { pointer };
        let problem = format!("{at}: found {found}; {allowed}");
        // Two references to one schema have its problems once.
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    fn slow(&mut self, pointer: &str, keyword: &str) {
        let at = if pointer.is_empty() { "/" } else { pointer };
        let place = format!("{at}: {keyword}");
        if !self.slow.contains(&place) {
            self.slow.push(place);
        }
    }

    fn root(&mut self, extra_column: Option<&str>) -> Option<ObjectType> {
        let document = self.document;
        let Node::Object(members) = document else {
            self.problem("", &document.show(), "allowed is an object: a JSON Schema of `type: object`");
            return None;
        };
        for (key, node) in members.iter().filter(|(key, _)| key == "$schema") {
            if !matches!(node, Node::String(s) if s.trim_end_matches('#') == DRAFT) {
                self.problem(&pointer_to("", key), &node.show(), &format!("allowed is \"{DRAFT}\""));
            }
        }
        let value = self.schema(document, "")?.0;
        let ValueType::Object(object) = value else {
            if self.problems.is_empty() {
                let allowed = "`\"type\": \"object\"` and `properties` are needed: properties become columns";
                self.problem("", in_words(&value, false).as_str(), allowed);
            }
            return None;
        };
        if let Some(extra) = extra_column {
            if object.closed {
                self.problem("/additionalProperties", "false", &format!("nothing is left for the column {extra:?}"));
            }
            if object.fields.iter().any(|field| field.name == extra) {
                let found = format!("the property {extra:?}");
                self.problem(
                    "/properties",
                    &found,
                    "choose another name for the column of what the schema leaves open",
                );
            }
        }
        Some(object)
    }

    /// What a schema makes of a value; None after a problem.
    fn schema(&mut self, node: &'a Node, pointer: &str) -> Option<Value> {
        let members = match node {
            Node::Bool(true) => return Some((ValueType::Json(JsonType { types: Types::ANY }), true)),
            Node::Bool(false) => {
                self.slow(pointer, "false");
                return Some((ValueType::Json(JsonType { types: Types::ANY }), true));
            }
            Node::Object(members) => members,
            other => {
                self.problem(pointer, &other.show(), "allowed is a schema: an object, true or false");
                return None;
            }
        };
        let place = Place { members, pointer };
        self.refuse_doubled(&place);
        // Another `$id` changes what references mean; the validator knows.
        if place.get("$id").is_some() && !pointer.is_empty() {
            return self.opaque(&place, "$id");
        }
        match place.get("$ref") {
            None => {}
            Some(Node::String(reference)) if reference == "#" || reference.starts_with("#/") => {
                self.siblings(&place, "$ref");
                return self.follow(reference, &place);
            }
            Some(_) => return self.opaque(&place, "$ref"),
        }
        if place.get("type").is_none()
            && let Some(value) = self.wrapped(&place)
        {
            return value;
        }
        let types = self.types(&place)?;
        let value = self.typed(&place, types)?;
        Some((value, types.contains(Types::NULL) && place.lists_null()))
    }

    fn follow(&mut self, reference: &str, place: &Place<'a, '_>) -> Option<Value> {
        let at = place.at("$ref");
        if self.followed.iter().any(|before| before == reference) || reference == "#" {
            let found = format!("{reference:?}, a schema inside itself");
            self.problem(&at, &found, "a column cannot hold itself; describe a bounded depth, or leave out the type");
            return None;
        }
        let Some(target) = resolve(self.document, reference) else {
            self.problem(&at, &format!("{reference:?}"), "there is no such place in the document");
            return None;
        };
        self.followed.push(reference.to_owned());
        let value = self.schema(target, reference.trim_start_matches('#'));
        self.followed.pop();
        value
    }

    /// `allOf` of one, and `anyOf` or `oneOf` of one and `null`: None if it is neither.
    fn wrapped(&mut self, place: &Place<'a, '_>) -> Option<Option<Value>> {
        let is_null = |node: &Node| matches!(node, Node::Object(m) if matches!(&m[..], [(k, Node::String(t))] if k == "type" && t == "null"));
        for keyword in ["allOf", "anyOf", "oneOf"] {
            let Some(Node::Array(branches)) = place.get(keyword) else { continue };
            let (index, null) = match (&branches[..], keyword) {
                ([_], _) => (0, false),
                ([one, other], "anyOf" | "oneOf") if is_null(one) != is_null(other) => {
                    (usize::from(is_null(one)), true)
                }
                _ => continue,
            };
            self.siblings(place, keyword);
            let inner = self.schema(&branches[index], &format!("{}/{index}", place.at(keyword)));
            if null && keyword == "oneOf" && inner.as_ref().is_some_and(|(_, accepts_null)| *accepts_null) {
                self.slow(place.pointer, keyword);
            }
            return Some(inner.map(|(value, accepts_null)| (value, accepts_null || null)));
        }
        None
    }

    /// What stands beside a keyword that decides the column is for the validator.
    fn siblings(&mut self, place: &Place<'a, '_>, keyword: &str) {
        for (key, _) in place.members.iter().filter(|(key, _)| key != keyword && !is_annotation(key)) {
            match types_of(key) {
                Some(_) => self.slow(place.pointer, key),
                None => self.unknown(place, key),
            }
        }
    }

    fn unknown(&mut self, place: &Place<'a, '_>, key: &str) {
        let allowed = "allowed are those of draft 2020-12, and names of your own that begin with \"x-\"";
        self.problem(&place.at(key), &format!("the keyword {key:?}"), allowed);
    }

    fn opaque(&mut self, place: &Place<'a, '_>, keyword: &str) -> Option<Value> {
        self.slow(place.pointer, keyword);
        Some((ValueType::Json(JsonType { types: Types::ANY }), true))
    }

    /// The types that `type` names; without it those of `enum` or `const`, if they are of one type.
    fn types(&mut self, place: &Place<'a, '_>) -> Option<Types> {
        let Some(node) = place.get("type") else { return Some(listed_types(place)) };
        let names: Vec<&Node> = match node {
            Node::Array(items) if !items.is_empty() => items.iter().collect(),
            other => vec![other],
        };
        let mut types = Types::NONE;
        for name in names {
            match name {
                Node::String(name) if Types::of_name(name).is_some() => {
                    types = types.and(Types::of_name(name).unwrap_or(Types::NONE));
                }
                _ => {
                    let allowed = "allowed are \"string\", \"integer\", \"number\", \"boolean\", \"object\", \"array\", \
                                   \"null\", or a list of them";
                    self.problem(&place.at("type"), &node.show(), allowed);
                    return None;
                }
            }
        }
        Some(types)
    }

    fn typed(&mut self, place: &Place<'a, '_>, types: Types) -> Option<ValueType> {
        let one = types.without(Types::NULL);
        let decimal = matches!(place.get("format"), Some(Node::String(f)) if f == "decimal");
        let (value, checked): (ValueType, &[&str]) = match one {
            t if decimal && t.meets(Types::NUMBER.and(Types::STRING)) => {
                let checked =
                    ["type", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"].as_slice();
                (self.decimal(place, one)?, checked)
            }
            Types::BOOLEAN => (self.boolean(place)?, &["type", "enum", "const"]),
            Types::INTEGER => {
                let (value, multiple) = self.integer(place)?;
                (value, if multiple { &INTEGER } else { &INTEGER[..INTEGER.len() - 1] })
            }
            Types::NUMBER => (self.number(place)?, &INTEGER[..INTEGER.len() - 1]),
            Types::STRING => {
                let (value, pattern) = self.text(place)?;
                (value, if pattern { &STRING } else { &STRING[..STRING.len() - 1] })
            }
            Types::ARRAY if place.get("items").is_some() && place.get("prefixItems").is_none() => {
                (self.list(place)?, &["type", "items", "minItems", "maxItems"])
            }
            Types::OBJECT => match (place.get("properties"), place.get("additionalProperties")) {
                (Some(Node::Object(properties)), _) if !properties.is_empty() => {
                    // The two that `object` may leave to the validator are on its list already.
                    (self.object(place, properties)?, &["type", "properties", "required", "additionalProperties"])
                }
                (None, Some(Node::Object(_))) if place.get("patternProperties").is_none() => {
                    (self.map(place)?, &["type", "additionalProperties"])
                }
                (Some(node), _) if !matches!(node, Node::Object(_)) => {
                    self.problem(&place.at("properties"), &node.show(), "allowed is an object of properties");
                    return None;
                }
                _ => (ValueType::Json(JsonType { types }), &["type"]),
            },
            _ => (ValueType::Json(JsonType { types }), &["type"]),
        };
        for (key, node) in place.members {
            match types_of(key) {
                _ if is_annotation(key) || checked.contains(&key.as_str()) => {}
                // It says nothing about values of this type.
                Some(about) if !about.meets(types) => {}
                Some(_) if is_always_true(key, node) => {}
                Some(_) => self.slow(place.pointer, key),
                None => self.unknown(place, key),
            }
        }
        Some(value)
    }

    fn field(&mut self, name: &str, node: &'a Node, required: bool, pointer: &str) -> Option<Field> {
        self.fields += 1;
        if self.fields == MAX_FIELDS {
            self.problem(pointer, &format!("the {MAX_FIELDS}th field"), "a table has fewer columns");
        }
        if self.fields >= MAX_FIELDS {
            return None;
        }
        let (value, accepts_null) = self.schema(node, pointer)?;
        let allowed = in_words(&value, accepts_null);
        let nullable = !required || accepts_null;
        Some(Field { name: name.to_owned(), required, nullable, accepts_null, value, allowed })
    }

    fn nested(&mut self, pointer: &str, inner: impl FnOnce(&mut Self) -> Option<ValueType>) -> Option<ValueType> {
        if self.nesting == MAX_NESTING {
            self.problem(
                pointer,
                "another struct, list or map",
                &format!("{MAX_NESTING} inside one another are allowed"),
            );
            return None;
        }
        self.nesting += 1;
        let value = inner(self);
        self.nesting -= 1;
        value
    }

    fn object(&mut self, place: &Place<'a, '_>, properties: &'a Members) -> Option<ValueType> {
        self.nested(place.pointer, |compiler| {
            let at = place.at("properties");
            compiler.refuse_doubled(&Place { members: properties, pointer: &at });
            let required = compiler.required(place);
            let mut fields = Vec::with_capacity(properties.len());
            let mut complete = true;
            for (name, node) in properties {
                let pointer = pointer_to(&at, name);
                if name.is_empty() {
                    compiler.problem(&pointer, "an empty name", "a property needs a name to be a column");
                }
                if name.starts_with(RESERVED_PREFIX) && compiler.nesting == 1 {
                    let allowed =
                        format!("names that begin with {RESERVED_PREFIX} are kept for the provenance columns");
                    compiler.problem(&pointer, &format!("{name:?}"), &allowed);
                }
                match compiler.field(name, node, required.contains(name.as_str()), &pointer) {
                    Some(field) => fields.push(field),
                    None => complete = false,
                }
            }
            if required.iter().any(|name| !properties.iter().any(|(key, _)| key == name)) {
                compiler.slow(place.pointer, "required");
            }
            let mut closed = false;
            match place.get("additionalProperties") {
                None | Some(Node::Bool(true)) => {}
                Some(Node::Bool(false)) if place.get("patternProperties").is_none() => closed = true,
                Some(node) if is_always_true("additionalProperties", node) => {}
                Some(_) => compiler.slow(place.pointer, "additionalProperties"),
            }
            complete.then_some(ValueType::Object(ObjectType { fields, closed }))
        })
    }

    fn required(&mut self, place: &Place<'a, '_>) -> HashSet<&'a str> {
        let mut names = HashSet::new();
        match place.get("required") {
            None => {}
            Some(Node::Array(items)) => {
                for (i, item) in items.iter().enumerate() {
                    let pointer = format!("{}/{i}", place.at("required"));
                    match item {
                        Node::String(name) if names.insert(name.as_str()) => {}
                        Node::String(name) => self.problem(&pointer, &format!("{name:?} again"), "name each once"),
                        other => self.problem(&pointer, &other.show(), "allowed are names of properties"),
                    }
                }
            }
            Some(other) => self.problem(&place.at("required"), &other.show(), "allowed is a list of names"),
        }
        names
    }

    fn list(&mut self, place: &Place<'a, '_>) -> Option<ValueType> {
        let items = place.get("items")?;
        let min_items = self.length(place, "minItems").unwrap_or(0);
        let max_items = self.length(place, "maxItems").unwrap_or(usize::MAX);
        self.refuse_empty(place, min_items <= max_items, min_items, max_items);
        self.nested(place.pointer, |compiler| {
            let element = compiler.field("element", items, true, &place.at("items"))?;
            Some(ValueType::List(Box::new(ListType { element, min_items, max_items })))
        })
    }

    fn map(&mut self, place: &Place<'a, '_>) -> Option<ValueType> {
        let values = place.get("additionalProperties")?;
        self.nested(place.pointer, |compiler| {
            let value = compiler.field("value", values, true, &place.at("additionalProperties"))?;
            Some(ValueType::Map(Box::new(MapType { value })))
        })
    }

    /// The values that `enum` and `const` leave, without `null`.
    fn only(&mut self, place: &Place<'a, '_>, of_type: impl Fn(&Node) -> bool) -> Option<Vec<Node>> {
        let mut only: Option<Vec<Node>> = None;
        if let Some(node) = place.get("enum") {
            match node {
                Node::Array(items) if !items.is_empty() => only = Some(items.clone()),
                other => self.problem(&place.at("enum"), &other.show(), "allowed is a list of values"),
            }
        }
        if let Some(node) = place.get("const") {
            match &only {
                Some(values) if !values.contains(node) => {
                    self.problem(&place.at("const"), &node.show(), "it has to be among `enum` as well");
                }
                _ => only = Some(vec![node.clone()]),
            }
        }
        let mut values = only?;
        let given = values.len();
        values.retain(|value| of_type(value) || *value == Node::Null);
        if values.is_empty() && given > 0 {
            let keyword = if place.get("const").is_some() { "const" } else { "enum" };
            let found = place.get(keyword).map(Node::show).unwrap_or_default();
            self.problem(&place.at(keyword), &found, "one of them has to be of the property's type");
        }
        values.retain(|value| *value != Node::Null);
        Some(values)
    }

    fn format<'f>(&mut self, place: &Place<'a, '_>, known: &[&'f str], types: &str) -> Option<&'f str> {
        let node = place.get("format")?;
        let found = known.iter().copied().find(|f| matches!(node, Node::String(s) if s == f));
        if found.is_none() {
            self.problem(
                &place.at("format"),
                &node.show(),
                &format!("allowed for type {types} are {}", known.join(", ")),
            );
        }
        found
    }

    fn bound(&mut self, place: &Place<'a, '_>, keyword: &str) -> Option<&'a Number> {
        match place.get(keyword)? {
            Node::Number(n) => Some(n),
            other => {
                self.problem(&place.at(keyword), &other.show(), "allowed is a number");
                None
            }
        }
    }

    fn length(&mut self, place: &Place<'a, '_>, keyword: &str) -> Option<usize> {
        let node = place.get(keyword)?;
        let length = if let Node::Number(n) = node { whole(n).and_then(|n| usize::try_from(n).ok()) } else { None };
        if length.is_none() {
            self.problem(&place.at(keyword), &node.show(), "allowed is a whole number from 0");
        }
        length
    }

    fn refuse_empty(
        &mut self,
        place: &Place<'a, '_>,
        fine: bool,
        lower: impl std::fmt::Display,
        upper: impl std::fmt::Display,
    ) {
        if !fine {
            self.problem(place.pointer, &format!("a range from {lower} to {upper}"), "no value can satisfy it");
        }
    }

    fn boolean(&mut self, place: &Place<'a, '_>) -> Option<ValueType> {
        let only = self.only(place, |n| matches!(n, Node::Bool(_)));
        let only = only.map(|v| v.iter().filter_map(|n| if let Node::Bool(b) = n { Some(*b) } else { None }).collect());
        Some(ValueType::Boolean(BooleanType { only }))
    }

    /// The type, and whether `multipleOf` is in it.
    fn integer(&mut self, place: &Place<'a, '_>) -> Option<(ValueType, bool)> {
        let fits = match self.format(place, &["int32", "int64"], "integer") {
            Some("int32") => (i64::from(i32::MIN), i64::from(i32::MAX)),
            _ => (i64::MIN, i64::MAX),
        };
        let (mut min, mut max) = (i128::from(fits.0), i128::from(fits.1));
        if let Some(n) = self.bound(place, "minimum") {
            min = min.max(ceil(n));
        }
        if let Some(n) = self.bound(place, "exclusiveMinimum") {
            min = min.max(floor(n).saturating_add(1));
        }
        if let Some(n) = self.bound(place, "maximum") {
            max = max.min(floor(n));
        }
        if let Some(n) = self.bound(place, "exclusiveMaximum") {
            max = max.min(ceil(n).saturating_sub(1));
        }
        self.refuse_empty(place, min <= max, min, max);
        let (min, max) = (clamp(min), clamp(max));
        let number = |n: &Node| if let Node::Number(n) = n { whole(n) } else { None };
        let only = self.only(place, |n| number(n).is_some()).map(|v| v.iter().filter_map(number).collect());
        let multiple_of = self.bound(place, "multipleOf").and_then(whole).filter(|n| *n > 0);
        Some((ValueType::Integer(IntegerType { fits, min, max, only, multiple_of }), multiple_of.is_some()))
    }

    fn number(&mut self, place: &Place<'a, '_>) -> Option<ValueType> {
        let single = self.format(place, &["float", "double"], "number") == Some("float");
        let (mut min, mut max) = (f64::MIN, f64::MAX);
        if let Some(n) = self.bound(place, "minimum").and_then(Number::as_f64) {
            min = min.max(n);
        }
        if let Some(n) = self.bound(place, "exclusiveMinimum").and_then(Number::as_f64) {
            min = min.max(n.next_up());
        }
        if let Some(n) = self.bound(place, "maximum").and_then(Number::as_f64) {
            max = max.min(n);
        }
        if let Some(n) = self.bound(place, "exclusiveMaximum").and_then(Number::as_f64) {
            max = max.min(n.next_down());
        }
        self.refuse_empty(place, min <= max, min, max);
        let number = |n: &Node| if let Node::Number(n) = n { n.as_f64() } else { None };
        let only = self.only(place, |n| number(n).is_some()).map(|v| v.iter().filter_map(number).collect());
        Some(ValueType::Number(NumberType { single, min, max, only }))
    }

    fn decimal(&mut self, place: &Place<'a, '_>, types: Types) -> Option<ValueType> {
        if !Types::NUMBER.and(Types::STRING).contains(types) {
            let found = types.in_words();
            self.problem(&place.at("type"), &found, "allowed with \"format\": \"decimal\" are number and string");
            return None;
        }
        let precision = self.digits(place, "x-precision", 1, 38)?;
        let scale = self.digits(place, "x-scale", 0, i64::from(precision))? as i8;
        let numbers = types.meets(Types::NUMBER);
        let mut decimal =
            DecimalType { numbers, strings: types.contains(Types::STRING), precision, scale, min: 0, max: 0 };
        let limit = decimal.limit();
        (decimal.min, decimal.max) = (-limit, limit);
        for keyword in ["minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"] {
            let Some(n) = self.bound(place, keyword) else { continue };
            let Some((below, exact)) = scaled_floor(&n.to_string(), scale) else {
                self.problem(&place.at(keyword), &n.to_string(), "allowed is a number that the decimal can hold");
                continue;
            };
            let above = below.saturating_add(i128::from(!exact));
            match keyword {
                "minimum" => decimal.min = decimal.min.max(above),
                "exclusiveMinimum" => decimal.min = decimal.min.max(below.saturating_add(1)),
                "maximum" => decimal.max = decimal.max.min(below),
                _ => decimal.max = decimal.max.min(above.saturating_sub(1)),
            }
        }
        self.refuse_empty(place, decimal.min <= decimal.max, decimal.min, decimal.max);
        Some(ValueType::Decimal(decimal))
    }

    fn digits(&mut self, place: &Place<'a, '_>, keyword: &str, min: i64, max: i64) -> Option<u8> {
        let found = place.get(keyword);
        let number = if let Some(Node::Number(n)) = found { n.as_i64() } else { None };
        let digits = number.filter(|n| (min..=max).contains(n)).and_then(|n| u8::try_from(n).ok());
        if digits.is_none() {
            let found = found.map_or_else(|| format!("no `{keyword}`"), Node::show);
            self.problem(&place.at(keyword), &found, &format!("a decimal needs one from {min} to {max}"));
        }
        digits
    }

    /// The type, and whether `pattern` is in it.
    fn text(&mut self, place: &Place<'a, '_>) -> Option<(ValueType, bool)> {
        let mut format = TextFormat::Plain;
        match place.get("format") {
            None => {}
            Some(Node::String(name)) => match name.as_str() {
                "date-time" => format = TextFormat::DateTime,
                "local-date-time" | "date-time-local" => format = TextFormat::LocalDateTime,
                "date" => format = TextFormat::Date,
                "time" => format = TextFormat::Time,
                "local-time" | "time-local" => format = TextFormat::LocalTime,
                "uuid" => format = TextFormat::Uuid,
                name if Validator::knows_format(name) && !OWN_FORMATS.contains(&name) => {
                    self.slow(place.pointer, "format")
                }
                name => {
                    let allowed = "allowed for type string are the formats of draft 2020-12, local-date-time, \
                                   local-time and decimal";
                    self.problem(&place.at("format"), &format!("{name:?}"), allowed);
                }
            },
            Some(other) => self.problem(&place.at("format"), &other.show(), "allowed is a name"),
        }
        match place.get("contentEncoding") {
            Some(Node::String(encoding)) if encoding == "base64" && format == TextFormat::Plain => {
                format = TextFormat::Base64;
            }
            _ => {}
        }
        let min_chars = self.length(place, "minLength").unwrap_or(0);
        let max_chars = self.length(place, "maxLength").unwrap_or(usize::MAX);
        self.refuse_empty(place, min_chars <= max_chars, min_chars, max_chars);
        let pattern = match place.get("pattern") {
            Some(Node::String(pattern)) => pattern::translate(pattern),
            Some(other) => {
                self.problem(&place.at("pattern"), &other.show(), "allowed is an expression");
                None
            }
            None => None,
        };
        let only = self.only(place, |n| matches!(n, Node::String(_))).map(|values| {
            let text = |n| if let Node::String(s) = n { Some(s) } else { None };
            TextSet::new(values.into_iter().filter_map(text).collect())
        });
        let translated = pattern.is_some();
        Some((ValueType::Text(TextType { format, min_chars, max_chars, pattern, only }), translated))
    }

    fn refuse_doubled(&mut self, place: &Place<'_, '_>) {
        let mut seen = HashSet::new();
        for (key, _) in place.members.iter().filter(|(key, _)| !seen.insert(key.as_str())) {
            self.problem(&place.at(key), &format!("{key:?} a second time"), "give each member once");
        }
    }
}

/// What the decoder checks of integers and numbers; the last only of integers.
const INTEGER: [&str; 9] =
    ["type", "enum", "const", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"];
/// A `format` that the decoder does not know is on the validator's list already.
const STRING: [&str; 7] = ["type", "enum", "const", "format", "minLength", "maxLength", "pattern"];

/// Keywords that generators write out although they say nothing.
fn is_always_true(key: &str, node: &Node) -> bool {
    let empty = matches!(node, Node::Object(members) if members.is_empty());
    match key {
        "uniqueItems" => *node == Node::Bool(false),
        "items" | "additionalProperties" | "propertyNames" | "unevaluatedItems" | "unevaluatedProperties" => {
            *node == Node::Bool(true) || empty
        }
        "properties" | "patternProperties" | "dependentRequired" | "dependentSchemas" => empty,
        "minLength" | "minItems" | "minProperties" => matches!(node, Node::Number(n) if n.as_u64() == Some(0)),
        "required" => matches!(node, Node::Array(names) if names.is_empty()),
        _ => false,
    }
}

fn listed_types(place: &Place<'_, '_>) -> Types {
    let values: Vec<&Node> = match (place.get("enum"), place.get("const")) {
        (Some(Node::Array(values)), _) => values.iter().collect(),
        (None, Some(value)) => vec![value],
        _ => return Types::ANY,
    };
    let mut types = Types::NONE;
    for value in values {
        types = types.and(match value {
            Node::Null => Types::NULL,
            Node::Bool(_) => Types::BOOLEAN,
            Node::Number(n) if whole(n).is_some() => Types::INTEGER,
            Node::Number(_) => Types::NUMBER,
            Node::String(_) => Types::STRING,
            Node::Array(_) | Node::Object(_) => return Types::ANY,
        });
    }
    types
}

/// A reference into the document, `#/a/b`, percent-encoded or not.
fn resolve<'a>(document: &'a Node, reference: &str) -> Option<&'a Node> {
    let mut node = document;
    for part in reference.strip_prefix('#')?.split('/').skip(1) {
        let part = percent_decoded(part)?.replace("~1", "/").replace("~0", "~");
        node = match node {
            Node::Object(members) => &members.iter().find(|(key, _)| *key == part)?.1,
            Node::Array(items) => items.get(part.parse::<usize>().ok()?)?,
            _ => return None,
        };
    }
    Some(node)
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        if let (b'%', Some(hex)) = (first, after.get(..2)) {
            bytes.push(u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok()?);
            rest = &after[2..];
        } else {
            bytes.push(*first);
            rest = after;
        }
    }
    String::from_utf8(bytes).ok()
}

/// RFC 6901.
fn pointer_to(parent: &str, key: &str) -> String {
    format!("{parent}/{}", key.replace('~', "~0").replace('/', "~1"))
}

/// The number as an int64, if it is one; `1.0` is.
fn whole(n: &Number) -> Option<i64> {
    if let Some(i) = n.as_i64() {
        return Some(i);
    }
    let f = n.as_f64().filter(|f| f.fract() == 0.0 && *f >= -(2f64.powi(63)) && *f < 2f64.powi(63))?;
    n.is_f64().then_some(f as i64)
}

fn floor(n: &Number) -> i128 {
    n.as_i128().unwrap_or_else(|| n.as_f64().unwrap_or(f64::NAN).floor() as i128)
}

fn ceil(n: &Number) -> i128 {
    n.as_i128().unwrap_or_else(|| n.as_f64().unwrap_or(f64::NAN).ceil() as i128)
}

fn clamp(n: i128) -> i64 {
    i64::try_from(n).unwrap_or(if n < 0 { i64::MIN } else { i64::MAX })
}

/// The largest multiple of `10^-scale` that is not above the number, in those units, and whether it is the number.
fn scaled_floor(number: &str, scale: i8) -> Option<(i128, bool)> {
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    let power = exponent.parse::<i64>().ok()? - i64::try_from(fraction.len()).ok()? + i64::from(scale);
    let factor = 10i128.checked_pow(u32::try_from(power.unsigned_abs()).ok()?);
    Some(match (power >= 0, factor) {
        (true, factor) => (digits.checked_mul(factor?)?, true),
        (false, Some(factor)) => (digits.div_euclid(factor), digits.rem_euclid(factor) == 0),
        (false, None) => (if digits < 0 { -1 } else { 0 }, digits == 0),
    })
}
