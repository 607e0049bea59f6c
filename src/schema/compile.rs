//! From the schema document to [`Schema`]: which keywords there are, and what each of them does to a field.

use std::collections::HashSet;
use std::sync::Arc;

use arrow::datatypes;
use serde_json::Number;

use super::document::Node;
use super::{BooleanType, Field, IntegerType, NumberType, Schema, TextFormat, TextType, ValueType};

/// Keywords that say something to people and nothing to a validator.
const ANNOTATIONS: [&str; 10] = [
    "$schema",
    "$id",
    "title",
    "description",
    "default",
    "examples",
    "$comment",
    "deprecated",
    "readOnly",
    "writeOnly",
];
const DOCUMENT_KEYWORDS: [&str; 4] = ["type", "properties", "required", "additionalProperties"];
const DRAFT: &str = "https://json-schema.org/draft/2020-12/schema";
/// Column names of the provenance columns begin with this.
const RESERVED_PREFIX: &str = "_kafka_";

type Members = [(String, Node)];

#[derive(Default)]
struct Problems(Vec<String>);

impl Problems {
    fn add(&mut self, pointer: &str, found: &str, allowed: &str) {
        let at = if pointer.is_empty() { "/" } else { pointer };
        self.0.push(format!("{at}: found {found}; {allowed}"));
    }
}

pub fn compile(document: &Node) -> Result<Schema, Vec<String>> {
    let mut problems = Problems::default();
    let Node::Object(members) = document else {
        problems.add("", &document.show(), "allowed is an object: a JSON Schema of `type: object`");
        return Err(problems.0);
    };
    refuse_doubled(members, "", &mut problems);
    let required = read_required(members, &mut problems);
    let mut closed = false;
    let mut properties: &Members = &[];
    for (key, node) in members {
        let pointer = pointer_to("", key);
        match (key.as_str(), node) {
            ("type", Node::String(t)) if t == "object" => {}
            ("type", other) => problems.add(&pointer, &other.show(), "allowed is \"object\""),
            ("additionalProperties", Node::Bool(allowed)) => closed = !allowed,
            ("additionalProperties", other) => problems.add(&pointer, &other.show(), "allowed are true and false"),
            ("properties", Node::Object(p)) => properties = p,
            ("properties", other) => problems.add(&pointer, &other.show(), "allowed is an object of properties"),
            ("required", _) => {}
            ("$schema", Node::String(s)) if s.trim_end_matches('#') == DRAFT => {}
            ("$schema", other) => problems.add(&pointer, &other.show(), &format!("allowed is \"{DRAFT}\"")),
            (key, _) if ANNOTATIONS.contains(&key) => {}
            (key, _) => {
                let allowed = format!("allowed here are {} and annotations", DOCUMENT_KEYWORDS.join(", "));
                problems.add(&pointer, &format!("the keyword {key:?}"), &allowed);
            }
        }
    }
    if get(members, "type").is_none() {
        problems.add("", "no `type`", "`\"type\": \"object\"` is needed");
    }
    if properties.is_empty() && !matches!(get(members, "properties"), Some(node) if !matches!(node, Node::Object(_))) {
        problems.add("/properties", "no properties", "at least one is needed: properties become columns");
    }
    refuse_doubled(properties, "/properties", &mut problems);

    let mut fields = Vec::with_capacity(properties.len());
    for (name, node) in properties {
        fields.extend(read_field(name, node, required.contains(name.as_str()), &mut problems));
    }
    for name in required {
        if get(properties, name).is_none() {
            problems.add("/required", &format!("{name:?}"), "allowed are names of `properties`");
        }
    }
    if !problems.0.is_empty() {
        return Err(problems.0);
    }
    let columns = fields.iter().map(|f| datatypes::Field::new(&f.name, f.value.arrow(), f.nullable));
    let arrow = Arc::new(datatypes::Schema::new(columns.collect::<Vec<_>>()));
    Ok(Schema { arrow, fields, closed, fingerprint: String::new() })
}

fn read_required<'a>(members: &'a Members, problems: &mut Problems) -> HashSet<&'a str> {
    let mut names = HashSet::new();
    match get(members, "required") {
        None => {}
        Some(Node::Array(items)) => {
            for (i, item) in items.iter().enumerate() {
                let pointer = format!("/required/{i}");
                match item {
                    Node::String(name) if names.insert(name.as_str()) => {}
                    Node::String(name) => problems.add(&pointer, &format!("{name:?} again"), "name each once"),
                    other => problems.add(&pointer, &other.show(), "allowed are names of properties"),
                }
            }
        }
        Some(other) => problems.add("/required", &other.show(), "allowed is a list of names"),
    }
    names
}

fn read_field(name: &str, node: &Node, required: bool, problems: &mut Problems) -> Option<Field> {
    let pointer = pointer_to("/properties", name);
    let before = problems.0.len();
    if name.is_empty() {
        problems.add(&pointer, "an empty name", "a property needs a name to be a column");
    }
    if name.starts_with(RESERVED_PREFIX) {
        let allowed = format!("names that begin with {RESERVED_PREFIX} are kept for the provenance columns");
        problems.add(&pointer, &format!("{name:?}"), &allowed);
    }
    let Node::Object(members) = node else {
        problems.add(&pointer, &node.show(), "allowed is an object with a `type`");
        return None;
    };
    refuse_doubled(members, &pointer, problems);
    let (json_type, null_type) = read_type(members, &pointer, problems)?;
    let keywords = Keywords { members, pointer: &pointer, json_type };
    keywords.refuse_unknown(problems);
    let (only, null_listed) = keywords.read_only(null_type, problems);
    let value = match json_type {
        "boolean" => keywords.boolean(only),
        "integer" => keywords.integer(only, problems),
        "number" => keywords.number(only, problems),
        _ => keywords.text(only, problems),
    };
    if problems.0.len() > before {
        return None;
    }
    let accepts_null = null_type && null_listed;
    let allowed = in_words(&value, accepts_null);
    Some(Field { name: name.to_owned(), required, nullable: !required || accepts_null, accepts_null, value, allowed })
}

/// The one type besides `null`, and whether `null` is among the types.
fn read_type(members: &Members, pointer: &str, problems: &mut Problems) -> Option<(&'static str, bool)> {
    const ALLOWED: &str =
        "allowed are \"string\", \"integer\", \"number\", \"boolean\", or a list of one of them and \"null\"";
    let known = |name: &str| ["string", "integer", "number", "boolean"].into_iter().find(|known| *known == name);
    let at = pointer_to(pointer, "type");
    let Some(node) = get(members, "type") else {
        problems.add(pointer, "no `type`", &format!("one is needed to make a column: {ALLOWED}"));
        return None;
    };
    let names: Vec<&str> = match node {
        Node::String(name) => vec![name.as_str()],
        Node::Array(items) => items.iter().map(|i| if let Node::String(s) = i { s.as_str() } else { "" }).collect(),
        _ => vec![],
    };
    let null = names.contains(&"null");
    let mut types: Vec<&str> = names.iter().copied().filter(|name| *name != "null").collect();
    types.sort_unstable();
    types.dedup();
    // Every integer is a number.
    if types == ["integer", "number"] {
        types = vec!["number"];
    }
    match types[..] {
        [one] if known(one).is_some() => known(one).map(|one| (one, null)),
        _ => {
            problems.add(&at, &node.show(), ALLOWED);
            None
        }
    }
}

/// The keywords of one property.
struct Keywords<'a> {
    members: &'a Members,
    pointer: &'a str,
    json_type: &'static str,
}

impl Keywords<'_> {
    fn allowed(&self) -> &'static [&'static str] {
        match self.json_type {
            "boolean" => &["type", "enum", "const"],
            "string" => &["type", "enum", "const", "format", "minLength", "maxLength"],
            _ => &["type", "enum", "const", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"],
        }
    }

    fn refuse_unknown(&self, problems: &mut Problems) {
        for (key, _) in self.members {
            if !self.allowed().contains(&key.as_str()) && !ANNOTATIONS.contains(&key.as_str()) {
                let allowed =
                    format!("allowed for type {} are {} and annotations", self.json_type, self.allowed().join(", "));
                problems.add(&pointer_to(self.pointer, key), &format!("the keyword {key:?}"), &allowed);
            }
        }
    }

    /// The values that `enum` and `const` leave, without `null`, and whether `null` is among them.
    fn read_only(&self, null_type: bool, problems: &mut Problems) -> (Option<Vec<Node>>, bool) {
        let mut only: Option<Vec<Node>> = None;
        if let Some(node) = get(self.members, "enum") {
            match node {
                Node::Array(items) if !items.is_empty() => only = Some(items.clone()),
                other => problems.add(&pointer_to(self.pointer, "enum"), &other.show(), "allowed is a list of values"),
            }
        }
        if let Some(node) = get(self.members, "const") {
            match &only {
                Some(values) if !values.contains(node) => {
                    problems.add(&pointer_to(self.pointer, "const"), &node.show(), "it has to be among `enum` as well");
                }
                _ => only = Some(vec![node.clone()]),
            }
        }
        let Some(mut values) = only else { return (None, true) };
        let of_type = |node: &Node| match (self.json_type, node) {
            (_, Node::Null) => null_type,
            ("boolean", Node::Bool(_)) | ("string", Node::String(_)) | ("number", Node::Number(_)) => true,
            ("integer", Node::Number(n)) => whole(n).is_some(),
            _ => false,
        };
        for value in values.iter().filter(|v| !of_type(v)) {
            let keyword = if get(self.members, "const") == Some(value) { "const" } else { "enum" };
            let allowed = format!("allowed are values of the property's type, {}", self.json_type);
            problems.add(&pointer_to(self.pointer, keyword), &value.show(), &allowed);
        }
        let null = values.contains(&Node::Null);
        values.retain(|v| *v != Node::Null);
        (Some(values), null)
    }

    fn format<'f>(&self, known: &[&'f str], problems: &mut Problems) -> Option<&'f str> {
        let node = get(self.members, "format")?;
        let found = known.iter().copied().find(|f| matches!(node, Node::String(s) if s == f));
        if found.is_none() {
            let allowed = format!("allowed for type {} are {}", self.json_type, known.join(", "));
            problems.add(&pointer_to(self.pointer, "format"), &node.show(), &allowed);
        }
        found
    }

    fn bound(&self, keyword: &str, problems: &mut Problems) -> Option<Number> {
        match get(self.members, keyword)? {
            Node::Number(n) => Some(n.clone()),
            other => {
                problems.add(&pointer_to(self.pointer, keyword), &other.show(), "allowed is a number");
                None
            }
        }
    }

    fn length(&self, keyword: &str, problems: &mut Problems) -> Option<usize> {
        let node = get(self.members, keyword)?;
        let length = if let Node::Number(n) = node { whole(n).and_then(|n| usize::try_from(n).ok()) } else { None };
        if length.is_none() {
            problems.add(&pointer_to(self.pointer, keyword), &node.show(), "allowed is a whole number from 0");
        }
        length
    }

    fn refuse_empty(&self, lower: impl std::fmt::Display, upper: impl std::fmt::Display, problems: &mut Problems) {
        problems.add(self.pointer, &format!("a range from {lower} to {upper}"), "no value can satisfy it");
    }

    fn boolean(&self, only: Option<Vec<Node>>) -> ValueType {
        let only = only.map(|v| v.iter().filter_map(|n| if let Node::Bool(b) = n { Some(*b) } else { None }).collect());
        ValueType::Boolean(BooleanType { only })
    }

    fn integer(&self, only: Option<Vec<Node>>, problems: &mut Problems) -> ValueType {
        let fits = match self.format(&["int32", "int64"], problems) {
            Some("int32") => (i64::from(i32::MIN), i64::from(i32::MAX)),
            _ => (i64::MIN, i64::MAX),
        };
        let (mut min, mut max) = (i128::from(fits.0), i128::from(fits.1));
        if let Some(n) = self.bound("minimum", problems) {
            min = min.max(ceil(&n));
        }
        if let Some(n) = self.bound("exclusiveMinimum", problems) {
            min = min.max(floor(&n).saturating_add(1));
        }
        if let Some(n) = self.bound("maximum", problems) {
            max = max.min(floor(&n));
        }
        if let Some(n) = self.bound("exclusiveMaximum", problems) {
            max = max.min(ceil(&n).saturating_sub(1));
        }
        if min > max {
            self.refuse_empty(min, max, problems);
        }
        let (min, max) = (clamp(min), clamp(max));
        let only =
            only.map(|v| v.iter().filter_map(|n| if let Node::Number(n) = n { whole(n) } else { None }).collect());
        ValueType::Integer(IntegerType { fits, min, max, only })
    }

    fn number(&self, only: Option<Vec<Node>>, problems: &mut Problems) -> ValueType {
        self.format(&["double"], problems);
        let (mut min, mut max) = (f64::MIN, f64::MAX);
        let mut bound = |keyword: &str| self.bound(keyword, problems).and_then(|n| n.as_f64());
        if let Some(n) = bound("minimum") {
            min = min.max(n);
        }
        if let Some(n) = bound("exclusiveMinimum") {
            min = min.max(n.next_up());
        }
        if let Some(n) = bound("maximum") {
            max = max.min(n);
        }
        if let Some(n) = bound("exclusiveMaximum") {
            max = max.min(n.next_down());
        }
        if min > max {
            self.refuse_empty(min, max, problems);
        }
        let only =
            only.map(|v| v.iter().filter_map(|n| if let Node::Number(n) = n { n.as_f64() } else { None }).collect());
        ValueType::Number(NumberType { min, max, only })
    }

    fn text(&self, only: Option<Vec<Node>>, problems: &mut Problems) -> ValueType {
        let format = match self.format(&["date-time", "date", "uuid"], problems) {
            Some("date-time") => TextFormat::DateTime,
            Some("date") => TextFormat::Date,
            Some("uuid") => TextFormat::Uuid,
            _ => TextFormat::Plain,
        };
        let min_chars = self.length("minLength", problems).unwrap_or(0);
        let max_chars = self.length("maxLength", problems).unwrap_or(usize::MAX);
        if min_chars > max_chars {
            self.refuse_empty(min_chars, max_chars, problems);
        }
        let only = only.map(|values| {
            let mut texts: Vec<String> =
                values.into_iter().filter_map(|n| if let Node::String(s) = n { Some(s) } else { None }).collect();
            texts.sort_unstable();
            texts.dedup();
            texts
        });
        ValueType::Text(TextType { format, min_chars, max_chars, only })
    }
}

fn in_words(value: &ValueType, null: bool) -> String {
    fn list<T: std::fmt::Debug>(only: &[T]) -> String {
        let shown: Vec<String> = only.iter().take(12).map(|v| format!("{v:?}")).collect();
        format!("one of {}{}", shown.join(", "), if only.len() > 12 { ", …" } else { "" })
    }
    fn range<T: PartialEq + std::fmt::Display>(noun: &str, lower: Option<T>, upper: Option<T>) -> String {
        match (lower, upper) {
            (None, None) => noun.to_owned(),
            (Some(min), None) => format!("{noun} from {min}"),
            (None, Some(max)) => format!("{noun} up to {max}"),
            (Some(min), Some(max)) => format!("{noun} from {min} to {max}"),
        }
    }
    let mut words = match value {
        ValueType::Boolean(BooleanType { only: Some(only) }) => list(only),
        ValueType::Integer(IntegerType { only: Some(only), .. }) => list(only),
        ValueType::Number(NumberType { only: Some(only), .. }) => list(only),
        ValueType::Text(TextType { only: Some(only), .. }) => list(only),
        ValueType::Boolean(_) => "true or false".to_owned(),
        ValueType::Integer(t) => {
            let noun = if t.is_int32() { "a 32-bit integer" } else { "an integer" };
            range(noun, Some(t.min).filter(|m| *m != t.fits.0), Some(t.max).filter(|m| *m != t.fits.1))
        }
        ValueType::Number(t) => {
            range("a number", Some(t.min).filter(|m| *m != f64::MIN), Some(t.max).filter(|m| *m != f64::MAX))
        }
        ValueType::Text(t) => {
            let noun = match t.format {
                TextFormat::Plain => "a string",
                TextFormat::DateTime => "an RFC 3339 date-time with an offset, such as 2026-01-31T23:59:59.5Z",
                TextFormat::Date => "an RFC 3339 date, such as 2026-01-31",
                TextFormat::Uuid => "a UUID, such as 123e4567-e89b-12d3-a456-426614174000",
            };
            match (t.min_chars, t.max_chars) {
                (0, usize::MAX) => noun.to_owned(),
                (min, usize::MAX) => format!("{noun} of at least {min} characters"),
                (0, max) => format!("{noun} of at most {max} characters"),
                (min, max) => format!("{noun} of {min} to {max} characters"),
            }
        }
    };
    if null {
        words.push_str(", or null");
    }
    words
}

fn get<'a>(members: &'a Members, key: &str) -> Option<&'a Node> {
    members.iter().find(|(k, _)| k == key).map(|(_, node)| node)
}

fn refuse_doubled(members: &Members, pointer: &str, problems: &mut Problems) {
    let mut seen = HashSet::new();
    for (key, _) in members.iter().filter(|(key, _)| !seen.insert(key.as_str())) {
        problems.add(&pointer_to(pointer, key), &format!("{key:?} a second time"), "give each member once");
    }
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
