//! The digest of everything that decides what a batch means.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{Config, ExpectationConfig, TableConfig, TypeConfig, WindowConfig};

/// SHA-256 over a canonical form. In it: schema document, the column of what it leaves open, whether there is a registry, transform,
/// expectations, event time, and of every table its name, columns and keys. Not in it: what decides only where from, how fast and how
/// often, such as brokers, topics (a plan has its own), watermark policy (a plan has its watermarks), trigger, limits
/// and retry.
pub fn fingerprint(config: &Config, documents: Vec<Value>) -> String {
    let mut meaning = json!({
        "registry": config.registry.is_some(),
        "event_time": config.event_time.as_ref().map(|e| json!({
            "column": e.column,
            "watermark_delay_ms": e.watermark_delay.as_millis() as u64,
            "max_future_ms": e.max_future.map(|d| d.as_millis() as u64),
        })),
        "windows": config.windows.iter().map(window).collect::<Vec<_>>(),
        "dead_letters": table(&config.dead_letters),
    });
    let types: Vec<Value> =
        config.types.iter().zip(documents).map(|(of, document)| message_type(of, document)).collect();
    match types.as_slice() {
        // The settings of the only type stand beside the others.
        [Value::Object(only)] if config.types.iter().all(|of| of.name.is_empty()) => {
            if let Some(meaning) = meaning.as_object_mut() {
                meaning.extend(only.clone());
            }
        }
        _ => meaning["types"] = types.into(),
    }
    // Only where there are some: configurations without them keep the fingerprint that they have always had.
    let expectations = &config.quality.expectations;
    if !expectations.is_empty() {
        let expectation = |e: &ExpectationConfig| match e.of {
            0 => json!([e.name, e.sql, e.on_fail.name()]),
            of => json!([e.name, e.sql, e.on_fail.name(), of]),
        };
        meaning["expectations"] = expectations.iter().map(expectation).collect();
    }
    Sha256::digest(meaning.to_string()).iter().map(|b| format!("{b:02x}")).collect()
}

fn message_type(of: &TypeConfig, document: Value) -> Value {
    let mut meaning = json!({
        "schema": canonical(document),
        "filter": of.transform.filter,
        "columns": of.transform.columns,
        "rows": of.rows.as_ref().map(|t| json!([table(t), t.provenance])),
    });
    // Only where it is set, so that checkpoints from before there was the setting go on.
    if let (true, Some(extra)) = (of.schema.has_extra, of.schema.arrow.fields().last()) {
        meaning["extra_column"] = extra.name().as_str().into();
    }
    if !of.name.is_empty() {
        meaning["name"] = of.name.as_str().into();
        meaning["when"] = json!([of.when.topic, of.when.member]);
        meaning["event_time"] = of.event_time.as_deref().into();
    }
    meaning
}

/// What there has not always been is only there where it is set.
fn window(window: &WindowConfig) -> Value {
    let mut meaning = json!({
        "table": table(&window.table),
        "size_ms": window.windowing.size().as_millis() as u64,
        "group_by": window.group_by,
        "aggregates": window.aggregates,
    });
    if window.of > 0 {
        meaning["type"] = window.of.into();
    }
    let windowing = window.windowing.to_string();
    if windowing != (window.windowing.size().as_millis() * 1000).to_string() {
        meaning["windowing"] = windowing.into();
    }
    if let Some(filter) = &window.filter {
        meaning["filter"] = filter.as_str().into();
    }
    if let Some(late) = &window.late_table {
        meaning["late_table"] = table(late).into();
    }
    meaning
}

fn table(table: &TableConfig) -> &str {
    &table.table
}

/// Layout and order of keys in the document have no meaning.
fn canonical(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.into_iter().collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().map(|(k, v)| (k, canonical(v))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(canonical).collect()),
        other => other,
    }
}
