//! Settings by key, typed, out of the tree: a value of the wrong kind becomes an error and reading goes on.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::StartingOffsets;
use super::document::{Node, Origin, Value};
use super::error::{ConfigError, Place};
use super::settings::{self, Kind};
use super::units;
use crate::batch::{Offsets, TopicPartition};

pub struct Reader<'a> {
    pub root: &'a Node,
    pub file: &'a Path,
    pub errors: Vec<ConfigError>,
}

fn split(key: &str) -> Vec<String> {
    key.split('.').map(String::from).collect()
}

impl Reader<'_> {
    pub fn has(&self, key: &str) -> bool {
        self.root.get(&split(key)).is_some()
    }

    /// Adds an error at the place of a key, or of the innermost section around it that there is.
    pub fn error(&mut self, key: &str, problem: impl Into<String>) {
        let place = match &self.root.nearest(&split(key)).origin {
            Origin::Line(line) => Place::File(self.file.into(), *line),
            Origin::Variable { name, .. } => Place::Variable(name.clone()),
        };
        self.errors.push(ConfigError { place, key: key.into(), problem: problem.into() });
    }

    pub fn required(&mut self, key: &str) {
        if !self.has(key) {
            let allowed = settings::find(&split(key)).map_or("a value", |s| s.kind.allowed());
            self.error(key, format!("is required: {allowed}"));
        }
    }

    /// Reports keys that are no settings, and values where a section belongs.
    pub fn check_keys(&mut self) {
        let root = self.root;
        self.check_section(root, &mut Vec::new());
    }

    fn check_section(&mut self, node: &Node, path: &mut Vec<String>) {
        let is_list = settings::is_list(path);
        match &node.value {
            Value::Table(entries) if !is_list => {
                for (name, child) in entries {
                    path.push(name.clone());
                    if settings::find(path).is_none() {
                        if settings::is_section(path) {
                            self.check_section(child, path);
                        } else {
                            self.error_at(child, path, format!("unknown key; {}", settings::suggestion(path)));
                        }
                    }
                    path.pop();
                }
            }
            Value::List(items) if is_list => {
                for (index, child) in items.iter().enumerate() {
                    path.push(index.to_string());
                    self.check_section(child, path);
                    path.pop();
                }
            }
            _ if is_list => {
                let entry = match path[0].as_str() {
                    "windows" => "window",
                    "types" => "type",
                    _ => "entry",
                };
                self.error_at(node, path, format!("write every {entry} as a section [[{}]]", path.join(".")));
            }
            _ => self.error_at(node, path, format!("found {}, allowed is a section", describe(node, false))),
        }
    }

    fn error_at(&mut self, node: &Node, path: &[String], problem: String) {
        let place = match &node.origin {
            Origin::Line(line) => Place::File(self.file.into(), *line),
            Origin::Variable { name, .. } => Place::Variable(name.clone()),
        };
        self.errors.push(ConfigError { place, key: path.join("."), problem });
    }

    /// The value, or the setting's default, by `parse`; None when there is neither or when the value is wrong.
    fn read<T>(&mut self, key: &str, parse: impl Fn(&Node) -> Option<T>) -> Option<T> {
        let path = split(key);
        let setting = settings::find(&path)?;
        let Some(node) = self.root.get(&path) else {
            return parse(&text_node(setting.default?));
        };
        let parsed = parse(node);
        if parsed.is_none() {
            let found = describe(node, super::is_secret(key));
            let problem = format!("found {found}, allowed is {}", setting.kind.allowed());
            self.error(key, problem);
        }
        parsed
    }

    pub fn text(&mut self, key: &str) -> Option<String> {
        self.read(key, |n| match &n.value {
            Value::Text(t) => Some(t.clone()),
            _ => None,
        })
    }

    pub fn integer(&mut self, key: &str) -> Option<u64> {
        self.read(key, |n| match &n.value {
            Value::Integer(i) => u64::try_from(*i).ok(),
            Value::Text(t) if n.is_loose() => units::integer(t),
            _ => None,
        })
    }

    pub fn share(&mut self, key: &str) -> Option<f64> {
        self.read(key, |n| {
            let number = match &n.value {
                Value::Decimal(t) => t.replace('_', "").parse().ok()?,
                Value::Integer(i) => *i as f64,
                Value::Text(t) if n.is_loose() => t.trim().parse::<f64>().ok()?,
                _ => return None,
            };
            (0.0..1.0).contains(&number).then_some(number)
        })
    }

    pub fn boolean(&mut self, key: &str) -> Option<bool> {
        self.read(key, |n| match &n.value {
            Value::Boolean(b) => Some(*b),
            Value::Text(t) if n.is_loose() => match t.trim().to_ascii_lowercase().as_str() {
                "true" => Some(true),
                "false" => Some(false),
                _ => None,
            },
            _ => None,
        })
    }

    pub fn duration(&mut self, key: &str) -> Option<Duration> {
        self.read(key, |n| match &n.value {
            Value::Text(t) => units::duration(t),
            _ => None,
        })
    }

    pub fn bytes(&mut self, key: &str) -> Option<u64> {
        self.read(key, |n| match &n.value {
            Value::Text(t) => units::bytes(t),
            Value::Integer(i) => u64::try_from(*i).ok(),
            _ => None,
        })
    }

    pub fn list(&mut self, key: &str) -> Vec<String> {
        let list = self.read(key, |n| match &n.value {
            Value::Text(t) if n.is_loose() => Some(split_list(t)),
            Value::List(items) => items
                .iter()
                .map(|i| match &i.value {
                    Value::Text(t) => Some(t.clone()),
                    _ => None,
                })
                .collect(),
            _ => None,
        });
        list.unwrap_or_default()
    }

    /// In the order of the file. Numbers and truth values are taken as they are written.
    pub fn map(&mut self, key: &str) -> Vec<(String, String)> {
        let path = split(key);
        let Some(node) = self.root.get(&path) else { return Vec::new() };
        let Value::Table(entries) = &node.value else {
            self.error(key, format!("found {}, allowed is {}", describe(node, true), Kind::Map.allowed()));
            return Vec::new();
        };
        let mut map = Vec::with_capacity(entries.len());
        for (name, entry) in entries {
            match &entry.value {
                Value::Text(t) => map.push((name.clone(), t.clone())),
                Value::Integer(i) => map.push((name.clone(), i.to_string())),
                Value::Boolean(b) => map.push((name.clone(), b.to_string())),
                _ => {
                    let problem = format!("found {}, allowed is a text", describe(entry, true));
                    self.error_at(entry, &[key.to_string(), name.clone()], problem);
                }
            }
        }
        map
    }

    pub fn starting_offsets(&mut self, key: &str) -> Option<StartingOffsets> {
        self.read(key, |n| match &n.value {
            Value::Text(t) => match t.trim() {
                "earliest" => Some(StartingOffsets::Earliest),
                "latest" => Some(StartingOffsets::Latest),
                // Spark's spelling, which also fits into a variable.
                json if json.starts_with('{') => {
                    let nested: BTreeMap<String, BTreeMap<i32, i64>> = serde_json::from_str(json).ok()?;
                    let flat = nested.into_iter().flat_map(|(topic, partitions)| {
                        let topic: Arc<str> = topic.into();
                        partitions.into_iter().map(move |(p, o)| (TopicPartition::new(topic.clone(), p), o))
                    });
                    explicit(flat.collect())
                }
                time => units::timestamp_ms(time).map(StartingOffsets::Timestamp),
            },
            Value::Time(t) => units::timestamp_ms(t).map(StartingOffsets::Timestamp),
            Value::Table(topics) => {
                let mut offsets = Offsets::new();
                for (topic, partitions) in topics {
                    let Value::Table(partitions) = &partitions.value else { return None };
                    for (partition, offset) in partitions {
                        let Value::Integer(offset) = offset.value else { return None };
                        offsets.insert(TopicPartition::new(topic.as_str(), partition.parse().ok()?), offset);
                    }
                }
                explicit(offsets)
            }
            _ => None,
        })
    }
}

fn explicit(offsets: Offsets) -> Option<StartingOffsets> {
    let sound = !offsets.is_empty() && offsets.iter().all(|(tp, offset)| tp.partition >= 0 && *offset >= 0);
    sound.then_some(StartingOffsets::Explicit(offsets))
}

impl Node {
    /// Variables and defaults are texts whatever the setting's kind; in the file a number is written as a number.
    fn is_loose(&self) -> bool {
        matches!(self.origin, Origin::Variable { .. })
    }
}

fn text_node(text: &str) -> Node {
    let origin = Origin::Variable { name: String::new(), from_file: false };
    Node { value: Value::Text(text.into()), origin }
}

/// At the commas that are not inside parentheses: `bucket(16, device_id), status` are two.
fn split_list(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut depth = 0usize;
    for c in text.chars() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                items.push(String::new());
                continue;
            }
            _ => {}
        }
        if let Some(last) = items.last_mut() {
            last.push(c);
        }
    }
    items.iter().map(|i| i.trim().to_string()).filter(|i| !i.is_empty()).collect()
}

/// What was found, for messages; never a value that may be a secret.
fn describe(node: &Node, hide: bool) -> String {
    let hide = hide || matches!(node.origin, Origin::Variable { from_file: true, .. });
    match &node.value {
        Value::Text(_) if hide => "a text".into(),
        Value::Text(t) => format!("{t:?}"),
        Value::Integer(_) if hide => "a number".into(),
        Value::Integer(i) => i.to_string(),
        Value::Boolean(b) => b.to_string(),
        Value::Decimal(_) => "a number with a fraction".into(),
        Value::Time(t) => t.clone(),
        Value::Other(kind) => (*kind).into(),
        Value::List(_) => "a list that does not fit".into(),
        Value::Table(_) => "a table that does not fit".into(),
    }
}
