//! The digest of everything that decides what a batch means.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{Config, OutputMode, TableConfig, WindowConfig};

/// SHA-256 over a canonical form. In it: schema document, the column of what it leaves open, whether there is a registry, transform,
/// expectations, event time, and of every table its name, columns and keys. Not in it: what decides only where from, how fast and how
/// often, such as brokers, topics (a plan has its own), watermark policy (a plan has its watermarks), trigger, limits
/// and retry.
pub fn fingerprint(config: &Config, schema_document: &str) -> String {
    // A document that is not JSON has been refused before.
    let schema: Value = serde_json::from_str(schema_document).unwrap_or(Value::Null);
    let mut meaning = json!({
        "schema": canonical(schema),
        "registry": config.registry.is_some(),
        "filter": config.transform.filter,
        "columns": config.transform.columns,
        "event_time": config.event_time.as_ref().map(|e| json!({
            "column": e.column,
            "watermark_delay_ms": e.watermark_delay.as_millis() as u64,
            "max_future_ms": e.max_future.map(|d| d.as_millis() as u64),
        })),
        "rows": config.rows.as_ref().map(|t| json!([table(t), t.provenance])),
        "windows": config.windows.iter().map(window).collect::<Vec<_>>(),
        "dead_letters": table(&config.dead_letters),
    });
    // Only where it is set, so that checkpoints from before there was the setting go on.
    if let (true, Some(extra), Some(meaning)) =
        (config.schema.has_extra, config.schema.arrow.fields().last(), meaning.as_object_mut())
    {
        meaning.insert("extra_column".to_owned(), extra.name().as_str().into());
    }
    // Only where there are some: configurations without them keep the fingerprint that they have always had.
    let expectations = &config.quality.expectations;
    if !expectations.is_empty() {
        meaning["expectations"] = expectations.iter().map(|e| json!([e.name, e.sql, e.on_fail.name()])).collect();
    }
    Sha256::digest(meaning.to_string()).iter().map(|b| format!("{b:02x}")).collect()
}

/// What there has not always been is only there where it is set.
fn window(window: &WindowConfig) -> Value {
    let mut meaning = json!({
        "table": table(&window.table),
        "size_ms": window.windowing.size().as_millis() as u64,
        "group_by": window.group_by,
        "aggregates": window.aggregates,
    });
    let windowing = window.windowing.to_string();
    if windowing != (window.windowing.size().as_millis() * 1000).to_string() {
        meaning["windowing"] = windowing.into();
    }
    if window.output_mode != OutputMode::Append {
        meaning["output_mode"] = window.output_mode.name().into();
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
