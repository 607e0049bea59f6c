//! The message types of a pipeline: one from `[schema]`, `[transform]` and `[rows]`, or those of `[[types]]`.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::build::{is_plain, table};
use super::error::{ConfigError, Place};
use super::read::Reader;
use super::{EventTimeConfig, TransformConfig, TypeConfig};
use crate::decode::route::When;
use crate::schema::Schema;

/// The types and their schema documents. None when one of the schemas is of no use.
pub fn types(
    r: &mut Reader<'_>,
    topics: &[String],
    event_time: Option<&EventTimeConfig>,
) -> Option<(Vec<TypeConfig>, Vec<Value>)> {
    if !r.has("types") {
        r.required("schema.file");
        let (schema, document) = schema(r, "schema.file", "schema.extra_column")?;
        let only = TypeConfig {
            name: String::new(),
            when: When::default(),
            schema,
            transform: TransformConfig { filter: r.text("transform.filter"), columns: r.map("transform.columns") },
            event_time: event_time.map(|e| e.column.clone()),
            rows: r.has("rows").then(|| table(r, "rows")),
        };
        return Some((vec![only], vec![document]));
    }
    for key in ["schema.file", "schema.extra_column", "transform", "rows"] {
        if r.has(key) {
            r.error(key, "has no meaning beside [[types]]: each type has its own schema, filter, columns and table");
        }
    }
    let mut types: Vec<TypeConfig> = Vec::new();
    let mut documents = Vec::new();
    let mut complete = true;
    for index in 0.. {
        let section = format!("types.{index}");
        if !r.has(&section) {
            break;
        }
        let key = |name: &str| format!("{section}.{name}");
        r.required(&key("name"));
        r.required(&key("schema"));
        let name = r.text(&key("name")).unwrap_or_default();
        if r.has(&key("name")) && !is_plain(&name, 128) {
            r.error(&key("name"), format!("found {name:?}, allowed are up to 128 letters, digits, '.', '_' and '-'"));
        } else if !name.is_empty() && types.iter().any(|t| t.name == name) {
            r.error(&key("name"), format!("{name:?} is the name of another type"));
        }
        let when = when(r, &section, topics);
        if let Some(earlier) = types.iter().find(|earlier| earlier.when.shadows(&when)) {
            let problem = format!(
                "would never get a record: type {:?} before it takes them all; the first type whose conditions hold has the record",
                earlier.name
            );
            r.error(&key("name"), problem);
        }
        let transform = TransformConfig { filter: r.text(&key("filter")), columns: r.map(&key("columns")) };
        let rows = r.has(&key("table")).then(|| table(r, &section));
        for name in ["partition_by", "sort_by", "properties", "provenance"] {
            if rows.is_none() && r.has(&key(name)) {
                r.error(&key(name), "has no meaning without a table");
            }
        }
        let own = r.text(&key("event_time"));
        if own.is_some() && event_time.is_none() {
            r.error(&key("event_time"), "has no meaning without [event_time]");
        }
        let Some((schema, document)) = schema(r, &key("schema"), &key("extra_column")) else {
            complete = false;
            continue;
        };
        // A type may do without, unless there are windows of it.
        let event_time =
            own.or(event_time.map(|e| e.column.clone()).filter(|column| schema.arrow.field_with_name(column).is_ok()));
        types.push(TypeConfig { name, when, schema, transform, event_time, rows });
        documents.push(document);
    }
    if complete {
        for topic in topics {
            if !types.iter().any(|t| t.when.topic.as_ref().is_none_or(|of| of == topic)) {
                r.error(
                    "source.topics",
                    format!("no type takes records of {topic:?}; all of them would be dead letters"),
                );
            }
        }
    }
    complete.then_some((types, documents))
}

fn when(r: &mut Reader<'_>, section: &str, topics: &[String]) -> When {
    let key = |name: &str| format!("{section}.{name}");
    let topic = r.text(&key("topic"));
    if let Some(topic) = topic.as_ref().filter(|topic| !topics.contains(topic)) {
        r.error(&key("topic"), format!("{topic:?} is not among source.topics"));
    }
    let (field, equals) = (r.text(&key("field")), r.text(&key("equals")));
    let member = match (field, equals) {
        (Some(field), Some(equals)) => Some((field, equals)),
        (None, None) => None,
        (Some(_), None) => {
            r.error(&key("field"), "needs equals: the value that the field has in records of this type");
            None
        }
        (None, Some(_)) => {
            r.error(&key("equals"), "needs field: the member of the document that has this value");
            None
        }
    };
    When { topic, member }
}

/// The index of the type that `key` names. With one type there is nothing to name.
pub fn type_index(r: &mut Reader<'_>, key: &str, types: &[TypeConfig]) -> usize {
    let names = || types.iter().map(|t| t.name.as_str()).collect::<Vec<_>>().join(", ");
    if types.is_empty() {
        // That is an error of its own.
        return 0;
    }
    match r.text(key) {
        Some(name) => types.iter().position(|t| t.name == name && !name.is_empty()).unwrap_or_else(|| {
            let problem = match types {
                [only] if only.name.is_empty() => "has no meaning without [[types]]".to_string(),
                _ => format!("found {name:?}, allowed are the types {}", names()),
            };
            r.error(key, problem);
            0
        }),
        None => {
            if types.len() > 1 {
                r.error(key, format!("is needed where there are several types: one of {}", names()));
            }
            0
        }
    }
}

/// The compiled schema and its document.
fn schema(r: &mut Reader<'_>, key: &str, extra_key: &str) -> Option<(Arc<Schema>, Value)> {
    let file = r.text(key)?;
    let path = r.file.parent().unwrap_or(Path::new("")).join(file);
    let document = match std::fs::read_to_string(&path) {
        Ok(document) => document,
        Err(e) => {
            r.error(key, format!("cannot read {}: {e}", path.display()));
            return None;
        }
    };
    let extra_column = r.text(extra_key);
    if extra_column.as_deref().is_some_and(|name| name.is_empty() || name.starts_with("_kafka_")) {
        r.error(extra_key, "a name is needed that does not begin with _kafka_, such as \"_extra\"");
        return None;
    }
    match Schema::parse_with_extra(&document, extra_column.as_deref()) {
        // A document that is not JSON is no schema.
        Ok(schema) => Some((schema, serde_json::from_str(&document).unwrap_or(Value::Null))),
        Err(problems) => {
            r.errors.extend(problems.into_iter().map(|problem| ConfigError {
                place: Place::File(path.clone(), 0),
                key: String::new(),
                problem,
            }));
            None
        }
    }
}
