//! The settings that decide what comes of a pipeline, by name: the commit log keeps them, so that a later configuration
//! can be told from the one that the checkpoint was written with.
//!
//! Does not own: what a difference means ([`crate::query::changes`]), nor the digest that decides whether two executions of a
//! batch may pass for each other ([`super::fingerprint`]). Invariant: there is nothing secret in it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{CatalogConfig, Config, TypeConfig, WindowConfig};

/// Value by setting; what is not set is not in it. Windows go by their table, everything else by its place in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Definition(BTreeMap<String, String>);

/// A setting that two configurations differ in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    pub setting: String,
    pub before: Option<String>,
    pub after: Option<String>,
}

impl Definition {
    pub fn of(config: &Config) -> Definition {
        let mut settings = BTreeMap::new();
        let mut set = |name: String, value: String| drop(settings.insert(name, value));
        set("source.bootstrap_servers".into(), config.source.bootstrap_servers.clone());
        set("source.topics".into(), sorted(&config.source.topics));
        if config.registry.is_some() {
            set("schema.registry".into(), "set".into());
        }
        for of in &config.types {
            message_type(of, &mut set);
        }
        for e in &config.quality.expectations {
            let name = match config.types.get(e.of).filter(|of| !of.name.is_empty()) {
                Some(of) => format!("quality.expect.{}.{}", of.name, e.name),
                None => format!("quality.expect.{}", e.name),
            };
            set(name, format!("{}, on_fail = {}", e.sql, e.on_fail.name()));
        }
        if let Some(event_time) = &config.event_time {
            set("event_time.column".into(), event_time.column.clone());
            set("event_time.watermark_delay".into(), format!("{:?}", event_time.watermark_delay));
            set("event_time.policy".into(), event_time.policy.name().into());
            set("event_time.idle_timeout".into(), format!("{} ms", event_time.policy.idle_timeout_ms()));
            if let Some(max_future) = event_time.max_future {
                set("event_time.max_future".into(), format!("{max_future:?}"));
            }
        }
        for w in &config.windows {
            window(w, config.types.get(w.of), &mut set);
        }
        set("dead_letters.table".into(), config.dead_letters.table.clone());
        if let Some(topic) = &config.dead_letter_topic {
            set("dead_letters.topic".into(), topic.clone());
        }
        catalog(&config.catalog, &mut set);
        Definition(settings)
    }

    /// Of a checkpoint that earlier versions have written.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// By setting.
    pub fn differences(&self, after: &Definition) -> Vec<Difference> {
        let names: std::collections::BTreeSet<&String> = self.0.keys().chain(after.0.keys()).collect();
        let difference = |name: &String| Difference {
            setting: name.clone(),
            before: self.0.get(name).cloned(),
            after: after.0.get(name).cloned(),
        };
        names.into_iter().map(difference).filter(|d| d.before != d.after).collect()
    }
}

fn message_type(of: &TypeConfig, set: &mut impl FnMut(String, String)) {
    let place = if of.name.is_empty() { String::new() } else { format!("types.{}.", of.name) };
    set(format!("{place}schema"), of.schema.fingerprint.clone());
    if let (true, Some(extra)) = (of.schema.has_extra, of.schema.arrow.fields().last()) {
        set(format!("{place}schema.extra_column"), extra.name().clone());
    }
    if !of.name.is_empty() {
        set(format!("{place}when"), format!("{:?}", of.when));
    }
    if let Some(filter) = &of.transform.filter {
        set(format!("{place}transform.filter"), filter.clone());
    }
    for (name, sql) in &of.transform.columns {
        set(format!("{place}transform.columns.{name}"), sql.clone());
    }
    if let Some(rows) = &of.rows {
        set(format!("{place}rows.table"), rows.table.clone());
        set(format!("{place}rows.provenance"), rows.provenance.to_string());
    }
}

fn window(window: &WindowConfig, of: Option<&TypeConfig>, set: &mut impl FnMut(String, String)) {
    let place = format!("windows.{}", window.table.table);
    let length = if window.windowing.is_session() { "session_gap" } else { "size" };
    set(format!("{place}.{length}"), format!("{:?}", window.windowing.size()));
    set(format!("{place}.output_mode"), window.output_mode.name().into());
    // Slide, start and time zone, for whoever has them.
    set(format!("{place}.windowing"), window.windowing.to_string());
    if let Some(of) = of.filter(|of| !of.name.is_empty()) {
        set(format!("{place}.type"), of.name.clone());
    }
    if let Some(filter) = &window.filter {
        set(format!("{place}.filter"), filter.clone());
    }
    if !window.group_by.is_empty() {
        set(format!("{place}.group_by"), window.group_by.join(", "));
    }
    for (name, sql) in &window.aggregates {
        set(format!("{place}.aggregates.{name}"), sql.clone());
    }
    if let Some(late) = &window.late_table {
        set(format!("{place}.late_table"), late.table.clone());
    }
}

fn catalog(catalog: &CatalogConfig, set: &mut impl FnMut(String, String)) {
    match catalog {
        CatalogConfig::Sqlite { path, warehouse } => {
            set("catalog.path".into(), path.display().to_string());
            set("catalog.warehouse".into(), warehouse.clone());
        }
        CatalogConfig::Rest(rest) => {
            set("catalog.uri".into(), rest.uri.to_string());
            if let Some(warehouse) = &rest.warehouse {
                set("catalog.warehouse".into(), warehouse.clone());
            }
        }
    }
}

fn sorted(topics: &[String]) -> String {
    let mut topics: Vec<&str> = topics.iter().map(String::as_str).collect();
    topics.sort_unstable();
    topics.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_name_what_came_went_and_changed() {
        let of = |settings: &[(&str, &str)]| {
            Definition(settings.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect())
        };
        let before = of(&[("a", "1"), ("b", "2"), ("c", "3")]);
        let after = of(&[("b", "2"), ("c", "4"), ("d", "5")]);
        let found: Vec<_> = before.differences(&after).into_iter().map(|d| (d.setting, d.before, d.after)).collect();
        let some = |v: &str| Some(v.to_string());
        assert_eq!(
            found,
            [("a".into(), some("1"), None), ("c".into(), some("3"), some("4")), ("d".into(), None, some("5"))]
        );
        assert_eq!(before.differences(&before), []);
    }
}
