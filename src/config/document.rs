//! The file and the environment as one tree of values, each with its place.
//!
//! Owns: TOML, the rules by which a variable names a setting, `_FILE`. Does not own: what a value has to be
//! ([`super::read`]) or what it means ([`super::build`]).

use std::collections::BTreeMap;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, Place};
use super::settings::{self, Kind, SETTINGS};

#[derive(Clone, Debug)]
pub struct Node {
    pub value: Value,
    pub origin: Origin,
}

#[derive(Clone, Debug)]
pub enum Value {
    Text(String),
    Integer(i64),
    Boolean(bool),
    /// A number with a fraction or an exponent, as written.
    Decimal(String),
    /// A TOML date-time, as written.
    Time(String),
    /// A kind that no setting has.
    Other(&'static str),
    List(Vec<Node>),
    /// In the order of the file.
    Table(Vec<(String, Node)>),
}

#[derive(Clone, Debug)]
pub enum Origin {
    Line(usize),
    /// Always a text. One that came from a mounted file may be a secret and is not shown.
    Variable {
        name: String,
        from_file: bool,
    },
}

impl Node {
    pub fn get(&self, path: &[String]) -> Option<&Node> {
        let Some((first, rest)) = path.split_first() else { return Some(self) };
        match &self.value {
            Value::Table(entries) => entries.iter().find(|(name, _)| name == first)?.1.get(rest),
            Value::List(items) => items.get(first.parse::<usize>().ok()?)?.get(rest),
            _ => None,
        }
    }

    /// The innermost node on the way to a path.
    pub fn nearest(&self, path: &[String]) -> &Node {
        (0..=path.len()).rev().find_map(|n| self.get(&path[..n])).unwrap_or(self)
    }

    /// Puts a value at a path and makes the tables on the way; a value that stands in the way is left, for the reader to refuse.
    fn set(&mut self, path: &[String], node: Node) {
        let Some((first, rest)) = path.split_first() else {
            *self = node;
            return;
        };
        match &mut self.value {
            Value::Table(entries) => {
                let index = entries.iter().position(|(name, _)| name == first).unwrap_or_else(|| {
                    let table = Node { value: Value::Table(Vec::new()), origin: node.origin.clone() };
                    entries.push((first.clone(), table));
                    entries.len() - 1
                });
                entries[index].1.set(rest, node);
            }
            Value::List(items) => {
                if let Some(item) = first.parse::<usize>().ok().and_then(|i| items.get_mut(i)) {
                    item.set(rest, node);
                }
            }
            _ => {}
        }
    }
}

/// Parses the file. What could be read is returned along with the errors, so that the rest is checked all the same.
pub fn parse(text: &str, file: &Path, errors: &mut Vec<ConfigError>) -> Node {
    let (table, mistakes) = DeTable::parse_recoverable(text);
    for mistake in mistakes {
        let line = mistake.span().map_or(0, |s| line_of(text, s.start));
        let problem = format!("not valid TOML: {}", mistake.message());
        errors.push(ConfigError { place: Place::File(file.into(), line), key: String::new(), problem });
    }
    let mut root = Node { value: convert_table(text, table.get_ref()), origin: Origin::Line(0) };
    flatten_maps(&mut root, &mut Vec::new());
    root
}

fn line_of(text: &str, position: usize) -> usize {
    1 + text.as_bytes()[..position.min(text.len())].iter().filter(|b| **b == b'\n').count()
}

fn convert_table(text: &str, table: &DeTable<'_>) -> Value {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    Value::Table(
        entries
            .into_iter()
            .map(|(key, value)| {
                // The key's line, not the value's: that is where the eye looks.
                let line = line_of(text, key.span().start);
                (key.get_ref().to_string(), convert(text, line, value.get_ref()))
            })
            .collect(),
    )
}

fn convert(text: &str, line: usize, value: &DeValue<'_>) -> Node {
    let value = match value {
        DeValue::String(s) => Value::Text(s.to_string()),
        DeValue::Integer(i) => {
            i64::from_str_radix(i.as_str(), i.radix()).map_or(Value::Other("an integer beyond 64 bits"), Value::Integer)
        }
        DeValue::Float(f) => Value::Decimal(f.as_str().to_string()),
        DeValue::Boolean(b) => Value::Boolean(*b),
        DeValue::Datetime(d) => Value::Time(d.to_string()),
        DeValue::Array(items) => {
            Value::List(items.iter().map(|i| convert(text, line_of(text, i.span().start), i.get_ref())).collect())
        }
        DeValue::Table(t) => convert_table(text, t),
    };
    Node { value, origin: Origin::Line(line) }
}

/// In maps, `security.protocol = "SSL"` without quotes means the same as with them.
fn flatten_maps(node: &mut Node, path: &mut Vec<String>) {
    let is_map = settings::find(path).is_some_and(|s| s.kind == Kind::Map);
    match &mut node.value {
        Value::Table(entries) if is_map => {
            let mut flat = Vec::new();
            for (name, child) in std::mem::take(entries) {
                flatten_into(name, child, &mut flat);
            }
            *entries = flat;
        }
        Value::Table(entries) => {
            for (name, child) in entries {
                path.push(name.clone());
                flatten_maps(child, path);
                path.pop();
            }
        }
        Value::List(items) => {
            for (index, child) in items.iter_mut().enumerate() {
                path.push(index.to_string());
                flatten_maps(child, path);
                path.pop();
            }
        }
        _ => {}
    }
}

fn flatten_into(name: String, node: Node, flat: &mut Vec<(String, Node)>) {
    match node.value {
        Value::Table(entries) => {
            for (child_name, child) in entries {
                flatten_into(format!("{name}.{child_name}"), child, flat);
            }
        }
        _ => flat.push((name, node)),
    }
}

/// Variables that people bring along from Spark jobs.
const ALIASES: [(&str, &str); 3] = [
    ("KAFKA_BOOTSTRAP_SERVERS", "source.bootstrap_servers"),
    ("KAFKA_TOPIC", "source.topics"),
    ("CHECKPOINT_LOCATION", "checkpoint.location"),
];

/// Lays the environment over the file: it wins.
pub fn overlay(root: &mut Node, env: &BTreeMap<String, String>, errors: &mut Vec<ConfigError>) {
    // Aliases first, so that the variable of the setting itself has the last word.
    for (alias, key) in ALIASES {
        let path: Vec<String> = key.split('.').map(String::from).collect();
        let with_file = format!("{alias}_FILE");
        match (env.get_key_value(alias), env.get_key_value(&with_file)) {
            (Some(_), Some(_)) => errors.push(both(alias)),
            (Some((name, value)), None) => assign(root, &path, name, value.clone(), false),
            (None, Some((name, from))) => assign_from_file(root, &path, name, from, errors),
            (None, None) => {}
        }
    }
    for (name, value) in env {
        let Some(rest) = name.strip_prefix("FLOE_").filter(|rest| !is_no_setting(rest)) else { continue };
        // A setting may itself end in `file`, so the whole name is tried first.
        match resolve(root, rest) {
            Ok(path) => assign(root, &path, name, value.clone(), false),
            Err(problem) => {
                let base = rest.strip_suffix("_FILE").and_then(|base| Some((base, resolve(root, base).ok()?)));
                match base {
                    Some((base, _)) if env.contains_key(&format!("FLOE_{base}")) => {
                        errors.push(both(&format!("FLOE_{base}")));
                    }
                    Some((_, path)) => assign_from_file(root, &path, name, value, errors),
                    None => {
                        errors.push(ConfigError { place: Place::Variable(name.clone()), key: String::new(), problem })
                    }
                }
            }
        }
    }
}

fn both(name: &str) -> ConfigError {
    ConfigError {
        place: Place::Variable(name.into()),
        key: String::new(),
        problem: format!("both {name} and {name}_FILE are set; unset one of them"),
    }
}

/// Variables of Floe that are no settings, and those that Kubernetes makes up for a service called `floe`.
fn is_no_setting(rest: &str) -> bool {
    rest == "CONFIG"
        || rest == "LOG"
        || rest.starts_with("LOG_")
        || rest == "FAILPOINT"
        || rest.starts_with("TEST_")
        || rest == "SERVICE_HOST"
        || rest.starts_with("SERVICE_PORT")
        || rest == "PORT"
        || rest.starts_with("PORT_")
}

fn assign(root: &mut Node, path: &[String], name: &str, value: String, from_file: bool) {
    let origin = Origin::Variable { name: name.into(), from_file };
    root.set(path, Node { value: Value::Text(value), origin });
}

fn assign_from_file(root: &mut Node, path: &[String], name: &str, from: &str, errors: &mut Vec<ConfigError>) {
    match std::fs::read_to_string(from) {
        // Editors and `echo` end a file with a line feed that is not meant.
        Ok(text) => assign(root, path, name, text.trim_end_matches(['\r', '\n']).to_string(), true),
        Err(e) => errors.push(ConfigError {
            place: Place::Variable(name.into()),
            key: path.join("."),
            problem: format!("cannot read {from}: {e}"),
        }),
    }
}

/// `SOURCE__MAX_OFFSETS_PER_TRIGGER` to its path.
fn resolve(root: &Node, rest: &str) -> Result<Vec<String>, String> {
    let mut path: Vec<String> = rest.to_ascii_lowercase().split("__").map(String::from).collect();
    if let Some((at, index)) = path.iter().enumerate().find_map(|(at, p)| Some((at, p.parse::<usize>().ok()?)))
        && settings::is_list(&path[..at])
    {
        let count = match root.get(&path[..at]).map(|n| &n.value) {
            Some(Value::List(items)) => items.len(),
            _ => 0,
        };
        if index >= count {
            let entry = match path[0].as_str() {
                "windows" => "window".to_string(),
                "types" => "type".to_string(),
                _ => path[..at].join("."),
            };
            return Err(format!("there is no {entry} {index}: the file has {count}, counted from 0"));
        }
    }
    if settings::find(&path).is_some_and(|s| s.kind != Kind::Map) {
        return Ok(path);
    }
    // An entry of a map: letters and digits have to agree, anything else is an underscore.
    let parent = path.len().saturating_sub(1);
    if settings::find(&path[..parent]).is_some_and(|s| s.kind == Kind::Map) {
        if let Some(Node { value: Value::Table(entries), .. }) = root.get(&path[..parent])
            && let Some((name, _)) = entries.iter().find(|(name, _)| variable_form(name) == path[parent])
        {
            path[parent] = name.clone();
            return Ok(path);
        }
        if path[..parent] == ["source", "kafka"] && !path[parent].is_empty() && !path[parent].ends_with("_file") {
            // Properties of librdkafka have dots where variables have underscores. The few whose name ends in `.file` have to
            // be in the file: here it says that the value is in a mounted one.
            path[parent] = path[parent].replace('_', ".");
            return Ok(path);
        }
        return Err(format!("the file has no entry of that name in {}", path[..parent].join(".")));
    }
    Err(format!("names no setting; {}", nearest_variable(rest)))
}

fn variable_form(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' }).collect()
}

fn nearest_variable(rest: &str) -> String {
    let near = SETTINGS
        .iter()
        .map(|s| s.key.replace('*', "0").replace('.', "__").to_ascii_uppercase())
        .map(|name| (settings::distance(&rest.to_ascii_uppercase(), &name), name))
        .min();
    match near {
        Some((d, name)) if d <= 2 + rest.len() / 4 => format!("did you mean FLOE_{name}?"),
        _ => "the name is the setting's path in capitals, joined by two underscores: FLOE_SOURCE__TOPICS".into(),
    }
}
